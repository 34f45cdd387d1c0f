import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_recipes.core.criteria import Criterion, Watch
from lightning_recipes.core.fits import Fit, FitRule, fit_of, flipped, helps, mean_loss, other_factors, unstable

TARGETS = torch.tensor([0, 1, 2, 2])
FAILED = Fit(1.0, 300, 0.9, learnt=False, stuck=True, first_loss=2.3, last_loss=2.0)
RISES = replace(FAILED, excess=50.0, last_loss=-100.0, most_excess=50.0)


def criterion(logits: Any, targets: Any = TARGETS, loss: Any = functional.cross_entropy, **more: Any) -> Criterion:
    with Watch() as watch:
        loss(logits() if callable(logits) else logits, targets, **more)
    return watch.seen[0].detach_()


def excess_of(logits: Any, *args: Any, **more: Any) -> float:
    rule = FitRule()
    rule.update(1.0, [criterion(torch.zeros(4, 3), *args, **more)])
    return rule.measure(1.0, [criterion(logits, *args, **more)])


def test_the_excess_is_1_for_the_class_prior_and_0_for_what_is_learnt_by_heart() -> None:
    prior = torch.tensor([0.25, 0.25, 0.5]).log().expand(4, 3)
    assert excess_of(prior) == pytest.approx(1.0)
    assert excess_of(torch.zeros(4, 3)) == pytest.approx(math.log(3) / (1.5 * math.log(2)))
    assert excess_of(100 * functional.one_hot(TARGETS, 3).float()) == pytest.approx(0.0, abs=1e-6)


def test_label_smoothing_and_soft_targets_have_a_floor() -> None:
    smooth = 0.9 * functional.one_hot(TARGETS, 3).float() + 0.1 / 3
    assert excess_of(smooth.log(), label_smoothing=0.1) == pytest.approx(0.0, abs=1e-6)
    assert excess_of(smooth.log(), smooth) == pytest.approx(0.0, abs=1e-6)
    binary = functional.binary_cross_entropy_with_logits
    assert excess_of(smooth.logit(), smooth, binary) == pytest.approx(0.0, abs=1e-5)


def test_a_regression_is_measured_by_the_variance_of_the_targets() -> None:
    targets = torch.tensor([[99.0], [101.0], [100.0], [100.0]])
    rule = FitRule()
    rule.update(1.0, [criterion(torch.zeros(4, 1), targets, functional.mse_loss)])
    assert rule.measure(1.0, [criterion(targets * 0 + 100, targets, functional.mse_loss)]) == pytest.approx(1.0)
    assert rule.far


def test_equal_inputs_with_other_targets_leave_a_loss() -> None:
    targets = torch.tensor([1.0, 3.0, 6.0, 6.0])
    halfway = criterion(torch.tensor([2.0, 2.0, 6.0, 6.0]), targets, functional.mse_loss)
    start, beside = criterion(torch.zeros(4), targets, functional.mse_loss), criterion(torch.zeros(4, 3))
    rule = FitRule(least_loss=0.5)
    rule.update(1.0, [start])
    assert rule.measure(1.0, [halfway]) == pytest.approx(0.0)
    rule = FitRule(least_loss=0.5)
    rule.update(1.0, [start, beside])  # of which of both it is the least is not known
    assert rule.measure(1.0, [halfway]) == pytest.approx(0.5 / 4.5)


def test_targets_that_the_step_makes_up_all_alike_set_no_scale() -> None:
    made_up = replace(criterion(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)), made_up=True)
    for calls, known, one_label in (
        ([made_up], False, False),
        ([replace(made_up, made_up=False)], True, True),
        ([replace(criterion(torch.zeros(4, 3)), made_up=True)], True, False),
    ):
        rule = FitRule()
        assert not rule.update(2.0, calls) or one_label
        assert (rule.known, rule.one_label) == (known, one_label)


def test_a_training_is_over_when_it_is_learnt_hopeless_or_not_finite() -> None:
    known = [criterion(torch.zeros(4, 3))]
    rule = FitRule()
    assert not rule.update(1.0, known)
    assert rule.follow(math.nan)
    assert fit_of(rule, 1.0).excess == math.inf
    rule = FitRule()
    rule.update(1.0, known)
    assert [rule.follow(100.0) for _ in range(60)] == [False] * 49 + [True] * 11
    assert rule.follow(0.01)


@pytest.mark.parametrize(
    ("curve", "stuck"),
    [
        ([1 - step / 200 for step in range(150)], False),
        ([0.3] * 150, True),
        ([0.9] * 150, True),
        ([0.05] * 150, False),
        ([0.4] * 100 + [0.35] * 50, False),
        ([0.4] * 100 + [0.37] * 50, True),
    ],
)
def test_a_training_is_stuck_that_has_learnt_nothing_or_gets_no_further(curve: list[float], stuck: bool) -> None:
    rule = FitRule()
    rule.curve = curve
    assert rule.stuck == stuck


def test_sample_with_labels_that_are_all_alike() -> None:
    rule = FitRule()
    rule.update(1.0, [criterion(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))])
    assert rule.one_label
    assert rule.learnt


def test_lower_rates_are_tried_first_where_the_loss_shot_up() -> None:
    assert other_factors(FAILED)[0] == 10.0
    assert other_factors(replace(FAILED, most_excess=30.0))[0] == 0.1


def test_a_loss_that_rises_with_its_criterion_has_the_right_sign() -> None:
    assert flipped([RISES])
    assert not flipped([replace(RISES, excess=1.5)])
    assert not flipped([replace(RISES, last_loss=100.0)])
    assert not flipped([replace(RISES, first_excess=60.0)])
    edges = {1.0: (1.49, 1.51), 0.5: (1.49, 1.51), 2.0: (2.99, 3.01)}
    for first, (at, beyond) in edges.items():  # half as much again as a constant, or as at the start
        assert not flipped([replace(RISES, first_excess=first, excess=at)])
        assert flipped([replace(RISES, first_excess=first, excess=beyond)])
    for first, at, beyond in ((2.0, 1.81, 1.79), (-10.0, -10.9, -11.1)):  # by a tenth, whatever its sign
        assert not flipped([replace(RISES, first_loss=first, last_loss=at)])
        assert flipped([replace(RISES, first_loss=first, last_loss=beyond)])


def test_a_loss_has_shot_up_at_twice_a_constants_or_the_first_one() -> None:
    for first, at, beyond in ((1.0, 2.0, 2.01), (0.5, 2.0, 2.01), (3.0, 6.0, 6.01), (1.0, 0.0, math.nan)):
        assert not unstable(replace(FAILED, first_excess=first, most_excess=at))
        assert unstable(replace(FAILED, first_excess=first, most_excess=beyond))


def test_a_training_helps_that_learns_or_halves_what_is_left() -> None:
    assert not helps(replace(FAILED, excess=0.45), FAILED)
    assert helps(replace(FAILED, excess=0.44), FAILED)
    assert helps(replace(FAILED, learnt=True), FAILED)


def test_what_a_rule_has_followed() -> None:
    rule = FitRule()
    for loss in (4.0, 20.0, 8.0, 6.0, 2.0):
        rule.update(loss, [])
    fit = fit_of(rule, 0.1)
    assert (fit.factor, fit.steps, fit.excess, fit.learnt) == (0.1, 5, 1.5, False)  # the median
    assert (fit.first_loss, fit.last_loss, fit.first_excess, fit.most_excess) == (4.0, 2.0, 1.0, 5.0)
    rule.update(0.04, [])
    assert rule.learnt
    assert rule.excess == 0.01  # of what is learnt the last one
    falls = FitRule()
    falls.curve, falls.losses = [9.0, 3.0, 2.0], [9.0, 3.0, 2.0]
    assert fit_of(falls, 1.0).most_excess == 3.0  # not the one before any update
    falls.curve = [9.0]
    assert fit_of(falls, 1.0).most_excess == 9.0
    falls.curve = [9.0, math.nan]
    assert fit_of(falls, 1.0).most_excess == math.inf


def test_a_loss_that_nobody_knows_is_measured_by_the_first() -> None:
    rule = FitRule()
    assert rule.measure(4.0, []) == 1.0
    assert rule.measure(2.0, [criterion(torch.zeros(4, 3))]) == 0.5  # the first ones set the scale
    assert not rule.known
    assert math.isnan(FitRule().measure(0.0, []))
    assert not FitRule().update(0.0, [])


def test_of_several_criteria_the_greatest_counts() -> None:
    targets = torch.tensor([[99.0], [101.0], [100.0], [100.0]])
    rule = FitRule()
    nothing = criterion(torch.zeros(4, 3), torch.full((4,), -100))
    rule.measure(1.0, [criterion(torch.zeros(4, 3)), criterion(targets * 0, targets, functional.mse_loss), nothing])
    learnt = criterion(100 * functional.one_hot(TARGETS, 3).float())
    constant = criterion(targets * 0 + 100, targets, functional.mse_loss)
    assert rule.measure(1.0, [learnt, constant]) == pytest.approx(1.0)
    assert rule.measure(1.0, [learnt]) == pytest.approx(0.0, abs=1e-6)
    twice = [
        criterion(targets * 0 + 100, targets, functional.mse_loss),
        criterion(targets, targets, functional.mse_loss),
    ]
    assert rule.measure(1.0, [learnt, *twice]) == pytest.approx(0.5)  # the mean of those that are alike
    assert math.isnan(rule.measure(1.0, [criterion(torch.full((4, 3), math.nan)), constant]))


def test_floors_of_all_shapes() -> None:
    soft = torch.tensor([0.2, 0.3, 0.5])
    rule = FitRule()
    rule.measure(1.0, [criterion(torch.zeros(3), soft)])
    assert rule.one_label  # of one example the constant is the answer
    pixels = TARGETS.view(4, 1, 1).repeat(1, 2, 2)
    pixels[0, 0, 0] = -100
    smooth = 0.9 * functional.one_hot(pixels.clamp(min=0), 3).float().movedim(-1, 1) + 0.1 / 3
    rule = FitRule()
    rule.measure(1.0, [criterion(torch.zeros(4, 3, 2, 2), pixels, label_smoothing=0.1)])
    learnt = [criterion(smooth.log(), pixels, label_smoothing=0.1)]
    assert rule.measure(1.0, learnt) == pytest.approx(0.0, abs=1e-6)
    half = torch.tensor([[0.1, 0.7], [0.9, 0.2]])
    rule = FitRule()
    rule.measure(1.0, [criterion(half * 0 + 0.5, half, functional.binary_cross_entropy)])
    assert rule.measure(1.0, [criterion(half, half, functional.binary_cross_entropy)]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_inputs_leave_a_least_loss_to_means(reduction: str) -> None:
    rule, least = FitRule(least_loss=0.2), torch.full((4, 3), -20.0)
    rule.measure(1.0, [criterion(torch.zeros(4, 3), reduction=reduction)])
    least[torch.arange(4), TARGETS] = math.log(2 / (math.exp(0.2) - 1)) - 20  # a loss of 0.2 each
    measured = rule.measure(1.0, [criterion(least, reduction=reduction)])
    assert (measured == pytest.approx(0.0, abs=1e-4)) == (reduction == "mean")


def test_the_mean_of_the_losses_that_there_are() -> None:
    assert mean_loss([torch.tensor(1.0), None, torch.tensor(2.0, requires_grad=True)]) == 1.5
    assert math.isnan(mean_loss([None]))


@pytest.mark.parametrize(
    ("curve", "excess", "learnt"),
    [
        ([], math.inf, False),
        ([0.03], 0.03, True),
        ([0.031], 0.031, False),
        ([9.0, 5.0, 4.0, 3.0, 2.0, 1.0], 3.0, False),
        ([2.0, 1.0], 2.0, False),
        ([math.nan, 5.0, 4.0, 3.0, 2.0, 1.0], 3.0, False),
        ([5.0, math.inf, 3.0, 2.0, 1.0], math.inf, False),
        ([math.nan, 0.0], 0.0, True),
    ],
)
def test_the_excess_at_the_end(curve: list[float], excess: float, learnt: bool) -> None:
    rule = FitRule()
    rule.curve = curve
    assert (rule.excess, rule.learnt) == (excess, learnt)


@pytest.mark.parametrize(
    ("curve", "stuck"),
    [
        ([0.5] * 6, False),
        ([0.51] * 6, True),
        ([0.4] * 7, False),  # before the last third there are not five
        ([0.4] * 8, False),
        ([0.4] * 9, True),
        ([0.5] * 6 + [0.45] * 3 + [0.449] * 5, False),
        ([0.5] * 10 + [0.45] * 5, False),
        ([0.5] * 10 + [0.451] * 5, True),
        ([0.1] * 15, False),
        ([0.101] * 15, True),
    ],
)
def test_the_bounds_of_being_stuck(curve: list[float], stuck: bool) -> None:
    rule = FitRule()
    rule.curve = curve
    assert rule.stuck == stuck


@pytest.mark.parametrize(
    ("curve", "over"),
    [
        ([30.0] * 50, False),
        ([30.0] * 51, True),
        ([1.0] * 11 + [20.1] * 40, True),
        ([1.0] * 12 + [20.1] * 39, False),
        ([1.0] * 11 + [20.0] * 40, False),
        ([1.0, math.nan], True),
        ([1.0, math.inf], True),
    ],
)
def test_when_a_training_is_hopeless(curve: list[float], over: bool) -> None:
    rule = FitRule()
    rule.known = True
    assert [rule.follow(excess) for excess in curve][-1] is over
    rule = FitRule()  # of a loss that nobody knows
    assert [rule.follow(excess) for excess in curve][-1] is (over and math.isfinite(curve[-1]))


@pytest.mark.parametrize(("most", "factors"), [(2.0, (10.0, 100.0, 0.1)), (2.1, (0.1, 0.01, 10.0))])
def test_the_rates_that_are_tried(most: float, factors: tuple[float, ...]) -> None:
    assert other_factors(replace(FAILED, most_excess=most)) == factors


def test_of_a_start_below_the_constant_the_start_is_the_reference() -> None:
    """A network that knows something is not done before it has learnt nearly all of what it did not."""
    rule = FitRule()
    logits = 2.0 * functional.one_hot(TARGETS, 3).float()
    assert rule.measure(1.0, [criterion(logits)]) == pytest.approx(1.0)
    assert rule.measure(1.0, [criterion(torch.zeros(4, 3))]) > 1.5


@pytest.mark.parametrize("loss", [functional.mse_loss, functional.l1_loss])
@pytest.mark.parametrize(("spread", "one_label"), [(0.0, True), (5e-4, False), (1.0, False)])
def test_targets_of_a_regression_that_are_one_number(spread: float, one_label: bool, loss: Any) -> None:
    rule = FitRule()
    rule.measure(1.0, [criterion(torch.zeros(4), 1 + spread * torch.tensor([0.0, 0.0, 1.0, 1.0]), loss)])
    assert rule.one_label is one_label


def test_bits_can_be_learnt_by_heart() -> None:
    rule, bits = FitRule(), torch.tensor([0.0, 1.0, 1.0, 0.0])
    binary = functional.binary_cross_entropy_with_logits
    assert rule.measure(1.0, [criterion(torch.zeros(4), bits, binary)]) == pytest.approx(1.0)
    assert rule.measure(1.0, [criterion(20 * (2 * bits - 1), bits, binary)]) == pytest.approx(0.0, abs=1e-4)


def test_targets_are_far_that_are_large_for_the_outputs_and_worse_than_their_mean() -> None:
    targets = torch.tensor([99.0, 101.0, 100.0, 100.0])
    for outputs, far in ((torch.zeros(4), True), (targets, False), (torch.tensor([0.0, 100.0, 0.0, 0.0]), True)):
        rule = FitRule()
        rule.measure(1.0, [criterion(outputs, targets, functional.mse_loss)])
        assert (rule.far, rule.known) == (far, True)


def test_a_least_loss_is_that_of_the_classes_beside_other_criteria() -> None:
    rule, numbers = FitRule(0.2), torch.arange(4.0)
    rule.measure(1.0, [criterion(torch.zeros(4, 3)), criterion(numbers * 0, numbers, functional.mse_loss)])
    logits = torch.full((4, 3), math.log((math.exp(0.2) - 1) / 2))
    logits[torch.arange(4), TARGETS] = 0.0  # a loss of 0.2 each
    assert rule.measure(1.0, [criterion(logits)]) == pytest.approx(0.0, abs=1e-5)


def test_a_criterion_that_is_no_number_counts_wherever_it_stands() -> None:
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rule = FitRule()
    rule.measure(1.0, [criterion(numbers * 0, numbers, functional.mse_loss), criterion(torch.zeros(4, 3))])
    for broken, whole in ((numbers * math.nan, torch.zeros(4, 3)), (numbers, torch.full((4, 3), math.nan))):
        assert math.isnan(rule.measure(1.0, [criterion(broken, numbers, functional.mse_loss), criterion(whole)]))


def test_a_fit_of_which_only_the_end_is_known_began_at_a_constant() -> None:
    fit = Fit(1.0, 300, 0.9, learnt=False, stuck=True)
    assert (fit.first_excess, fit.most_excess) == (1.0, 1.0)
    assert math.isnan(fit.first_loss)
    assert math.isnan(fit.last_loss)


def test_of_a_start_that_is_learnt_already_the_constant_is_the_reference() -> None:
    rule, numbers = FitRule(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rule.measure(1.0, [criterion(numbers, numbers, functional.mse_loss)]) == 0.0
    assert rule.measure(1.0, [criterion(numbers * 0 + 2.5, numbers, functional.mse_loss)]) == pytest.approx(1.0)
