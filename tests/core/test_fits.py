import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_recipes.core.criteria import Criterion, Watch
from lightning_recipes.core.fits import Fit, FitRule, fit_of, flipped, other_factors

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
    [([1 - step / 200 for step in range(150)], False), ([0.3] * 150, True), ([0.9] * 150, True), ([0.05] * 150, False)],
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
    assert not flipped([replace(RISES, last_loss=100.0)])
    assert not flipped([replace(RISES, first_excess=60.0)])
