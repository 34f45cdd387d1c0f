import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_recipes.core.criteria import Watch
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.initial_loss import InitialLossRule

CHANCE = torch.Generator()


def judge(
    loss: Callable[[Tensor, Tensor], Any],
    targets: Callable[[], Tensor],
    scale: float = 0.1,
    shift: Any = 0.0,
    outputs: int = 10,
    inputs: float = 1.0,
    **more: Any,
) -> InitialLossRule:
    CHANCE.manual_seed(0)
    rule = InitialLossRule(**more)
    for _ in range(10):
        wanted = targets()
        logits = torch.randn(len(wanted), outputs, generator=CHANCE) * scale + shift
        with Watch() as watch:
            value = loss(logits.requires_grad_(), wanted)
        rule.update(value, watch.part_of(value), [inputs * torch.randn(64, 3, generator=CHANCE)])
    return rule


def classes(kinds: int = 10) -> Callable[[], Tensor]:
    return lambda: torch.randint(kinds, (64,), generator=CHANCE)


def rare() -> Tensor:
    return (torch.rand(64, generator=CHANCE) < 0.05).long()


def nearly_sorted() -> Callable[[], Tensor]:
    """A class ends in each batch, and the next one begins."""
    batches = torch.arange(10).repeat_interleave(64).roll(5).split(64)
    following = itertools.cycle(batches)
    return lambda: next(following)


def rarely_sorted() -> Callable[[], Tensor]:
    """All of one class but for the end, where the next one begins."""
    following = itertools.cycle((torch.arange(640) >= 620).long().split(64))
    return lambda: next(following)


def rules(rule: InitialLossRule) -> list[tuple[str, str]]:
    return [(finding.rule, finding.severity) for finding in rule.findings()]


ONE_FAVOURED = torch.tensor([5.0] + [0.0] * 9)
CROSS = functional.cross_entropy


@pytest.mark.parametrize(
    ("loss", "targets", "more", "first"),
    [
        (CROSS, classes(), {}, ("initial loss as expected", "info")),
        (CROSS, classes(), {"scale": 1.0}, ("initial loss high", "info")),
        (CROSS, classes(), {"scale": 3.0}, ("initial loss high", "warning")),
        (CROSS, classes(), {"scale": 0.01, "shift": ONE_FAVOURED}, ("initial loss high", "warning")),
        (lambda o, t: CROSS(o, t, label_smoothing=0.1), classes(), {}, ("initial loss as expected", "info")),
        (lambda o, t: CROSS(o, t, weight=torch.arange(1.0, 11)), classes(), {}, ("initial loss as expected", "info")),
        (lambda o, t: CROSS(o.softmax(1), t), classes(), {}, ("softmax applied twice", "warning")),
        (lambda o, t: CROSS((o.softmax(1)).clone(), t), classes(), {}, ("softmax applied twice", "warning")),
        (lambda o, t: CROSS(o.log_softmax(1), t), classes(), {}, ("initial loss as expected", "info")),
        (lambda o, t: CROSS(o.relu() * 1, t), classes(), {}, ("activation on the logits", "warning")),
        (lambda o, t: CROSS(o.tanh(), t), classes(), {}, ("activation on the logits", "warning")),
        (lambda o, t: -CROSS(o, t), classes(), {}, ("wrong sign of the loss", "error")),
        (lambda o, t: CROSS(o, t, reduction="sum"), classes(), {}, ("loss is a sum", "warning")),
        (lambda o, t: CROSS(o, t, reduction="none").sum(), classes(), {}, ("loss is a sum", "warning")),
        (lambda o, t: len(o) * CROSS(o, t), classes(), {}, ("loss is a sum", "warning")),
        (lambda o, t: 32 * CROSS(o, t), classes(), {}, ("initial loss as expected", "info")),
        (lambda o, t: CROSS(o, t, reduction="sum") / 64, classes(), {}, ("initial loss as expected", "info")),
        (lambda o, t: CROSS(o, t, reduction="none").mean(), classes(), {}, ("initial loss as expected", "info")),
        (functional.nll_loss, classes(), {}, ("no log-probabilities", "warning")),
        (lambda o, t: functional.nll_loss(o.log_softmax(1), t), classes(), {}, ("initial loss as expected", "info")),
        (CROSS, rare, {"outputs": 2}, ("imbalanced classes", "info")),
        (CROSS, lambda: torch.full((64,), 3), {}, ("labels all alike", "warning")),
        (CROSS, nearly_sorted(), {}, ("labels all alike", "warning")),
        (CROSS, rarely_sorted(), {"outputs": 2}, ("labels all alike", "warning")),
        (lambda o, t: CROSS(o, t) * math.nan, classes(), {}, ("initial loss not finite", "error")),
        (lambda o, t: (o**2).mean(), classes(), {}, ("initial loss not judged", "info")),
        (lambda o, t: (o**2).mean(), classes(), {"expected": 0.01}, ("initial loss as expected", "info")),
        (lambda o, t: (o**2).mean(), classes(), {"expected": 0.004}, ("initial loss off", "warning")),
    ],
)
def test_each_kind_of_loss_and_defect(loss: Any, targets: Any, more: Any, first: tuple[str, str]) -> None:
    assert rules(judge(loss, targets, **more))[0] == first


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets)


def bits() -> Tensor:
    return (torch.rand(64, 4, generator=CHANCE) < torch.tensor([0.5, 0.4, 0.6, 0.5])).float()


def first_of(loss: Any) -> Any:
    return lambda outputs, targets: loss(outputs[:, 0], targets)


def in_batches(targets: Tensor) -> Callable[[], Tensor]:
    following = itertools.cycle(targets.split(64))
    return lambda: next(following)


MIXED = torch.linspace(-1, 1, 640)[torch.randperm(640, generator=CHANCE)]


def normal() -> Tensor:
    return torch.randn(64, 4, generator=CHANCE)


@pytest.mark.parametrize(
    ("loss", "targets", "more", "first"),
    [
        (binary, bits, {}, ("initial loss as expected", "info")),
        (lambda o, t: binary(o.sigmoid(), t), bits, {}, ("sigmoid applied twice", "warning")),
        (lambda o, t: functional.binary_cross_entropy(o.sigmoid(), t), bits, {}, ("initial loss as expected", "info")),
        (functional.mse_loss, normal, {}, ("initial loss as expected", "info")),
        (functional.l1_loss, normal, {}, ("initial loss as expected", "info")),
        (functional.huber_loss, normal, {}, ("initial loss as expected", "info")),
        (functional.mse_loss, lambda: normal() + 100, {}, ("targets not normalised", "info")),
        (functional.mse_loss, lambda: 77 * normal() + 152, {}, ("targets not normalised", "info")),
        (functional.l1_loss, lambda: 77 * normal(), {}, ("targets not normalised", "info")),
        (functional.mse_loss, lambda: 77 * normal(), {"scale": 20.0}, ("initial loss as expected", "info")),
        (functional.mse_loss, normal, {"scale": 5.0}, ("initial loss high", "warning")),
        (lambda o, t: functional.mse_loss(o, t, reduction="sum"), normal, {}, ("loss is a sum", "info")),
        (lambda o, t: functional.mse_loss(o, t, reduction="none").sum(), normal, {}, ("loss is a sum", "info")),
        (first_of(functional.mse_loss), in_batches(torch.linspace(-1, 1, 640)), {}, ("labels all alike", "warning")),
        (first_of(functional.mse_loss), in_batches(MIXED), {}, ("initial loss as expected", "info")),
        (functional.mse_loss, lambda: normal()[:, :1].expand(64, 4), {}, ("initial loss as expected", "info")),
        (first_of(functional.mse_loss), lambda: torch.zeros(64), {}, ("initial loss as expected", "info")),
        (functional.mse_loss, lambda: torch.zeros(64, 4), {"scale": 0.0}, ("initial loss as expected", "info")),
        (first_of(binary), in_batches((torch.arange(640) >= 320).float()), {}, ("labels all alike", "warning")),
        (first_of(binary), lambda: torch.ones(64), {}, ("labels all alike", "info")),  # may be rare, too
        # Several outputs: pictures and windows of a series are alike within an example, which says nothing of an order.
        (
            functional.mse_loss,
            in_batches(MIXED.sort()[0][:, None].expand(-1, 4)),
            {},
            ("initial loss as expected", "info"),
        ),
        (first_of(binary), in_batches((MIXED > 0).float()), {}, ("initial loss as expected", "info")),
        (first_of(binary), in_batches((MIXED > 0.9).float()), {}, ("imbalanced classes", "info")),
    ],
)
def test_outputs_that_are_no_classes(loss: Any, targets: Any, more: Any, first: tuple[str, str]) -> None:
    assert rules(judge(loss, targets, outputs=4, **more))[0] == first


def test_targets_that_are_all_the_same_number() -> None:
    same = judge(functional.mse_loss, lambda: torch.ones(64, 4), outputs=4, scale=0.7)
    assert rules(same) == [("labels all alike", "info")]
    assert same.findings()[0].message.startswith("All targets in the first batches are the same number: mse_loss 1.")


def test_rare_classes_are_told_beside_a_loss_that_starts_high() -> None:
    said = rules(judge(CROSS, rare, outputs=2, shift=torch.tensor([-0.5, 0.0])))
    assert said[:2] == [("imbalanced classes", "info"), ("initial loss high", "info")]


def test_targets_of_another_shape_are_broadcast() -> None:
    for loss in (functional.mse_loss, functional.l1_loss):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns, too
            found = rules(judge(loss, lambda: normal()[:, 0], outputs=1))
        assert found[0] == ("targets broadcast", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wider = rules(judge(functional.mse_loss, lambda: normal()[:, :3], outputs=1))
    assert wider[0] == ("targets broadcast", "error")
    assert rules(judge(lambda o, t: functional.mse_loss(o[:, 0], t), lambda: normal()[:, 0], outputs=1))[0][1] == "info"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_for_all = rules(judge(lambda o, _: functional.mse_loss(o, torch.ones(1)), normal, outputs=1))
    assert "targets broadcast" not in dict(one_for_all)


def test_other_terms_of_the_loss_and_large_inputs_are_told_beside() -> None:
    def penalised(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda o, t: CROSS(o, t) + weight

    assert ("penalty outweighs the loss", "info") in rules(judge(penalised(3.0), classes()))
    summed = rules(judge(lambda o, t: CROSS(o, t, reduction="none").sum(), classes()))
    assert summed == [("loss is a sum", "warning")]  # and no other term
    assert rules(judge(penalised(2.0), classes())) == [("initial loss as expected", "info")]
    assert rules(judge(CROSS, classes(), inputs=120.0))[1:] == [("inputs not normalised", "info")]
    told = judge(CROSS, classes(), inputs=120.0, scale=3.0).findings()
    assert [finding.rule for finding in told] == ["inputs not normalised"]
    assert "not normalised" in told[0].message
    assert rules(judge(CROSS, classes(), scale=1.0))[0] == ("initial loss high", "info")
    assert rules(judge(CROSS, classes(), scale=1.0, inputs=120.0)) == [("inputs not normalised", "warning")]


def test_targets_of_several_classes_at_once_are_no_shares() -> None:
    def shares() -> Tensor:
        return torch.rand(64, 10, generator=CHANCE).softmax(1)

    several = rules(judge(CROSS, lambda: (torch.rand(64, 10, generator=CHANCE) < 0.3).float()))
    assert ("targets do not sum to 1", "info") in several
    assert rules(judge(CROSS, shares)) == [("initial loss as expected", "info")]
    assert "targets do not sum to 1" not in dict(rules(judge(binary, lambda: shares().round(), outputs=10)))


def test_one_large_column_of_a_table_is_enough() -> None:
    rule = InitialLossRule()
    for _ in range(3):
        labels, inputs = torch.randint(10, (64,), generator=CHANCE), torch.randn(64, 30, generator=CHANCE)
        inputs[:, 7] *= 20
        with Watch() as watch:
            loss = CROSS(torch.zeros(64, 10, requires_grad=True) * 1, labels)
        rule.update(loss, watch.part_of(loss), [inputs])
    assert ("inputs not normalised", "info") in rules(rule)


@pytest.mark.parametrize(
    ("targets", "outputs", "told"),
    [
        (lambda labels: torch.zeros_like(labels), 10, None),  # of a contrastive loss
        (lambda labels: labels * 0, 10, "warning"),
        (lambda labels: labels * 0, 2, "info"),  # the other class may be rare
    ],
)
def test_the_same_target_in_all_batches(targets: Any, outputs: int, told: str | None) -> None:
    rule = judge(lambda o, t: CROSS(o, targets(t)), classes(2), outputs=outputs)
    assert dict(rules(rule)).get("labels all alike") == told


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_logits_of_minus_infinity_are_no_outputs_that_hardly_differ(scale: float) -> None:
    ruled_out = torch.tensor([-math.inf] + [0.0] * 9)
    rule = judge(CROSS, lambda: classes(9)() + 1, scale=scale, shift=ruled_out)
    assert ("outputs hardly depend on the input" in dict(rules(rule))) == (scale == 0)
    everywhere = judge(lambda o, t: CROSS(torch.where(o < t.view(-1, 1), -math.inf, 0.0) + o, t * 0), classes())
    assert "outputs hardly depend on the input" not in dict(rules(everywhere))


def sequences(lengths: tuple[int, int], padding: int) -> Callable[[], Tensor]:
    """Rows of 12 labels, filled up."""

    def make() -> Tensor:
        labels = torch.randint(10, (64, 12), generator=CHANCE)
        ends = torch.randint(*lengths, (64, 1), generator=CHANCE)
        return torch.where(torch.arange(12) < ends, labels, padding)

    return make


@pytest.mark.parametrize(
    ("targets", "ignored", "told"),
    [
        (sequences((2, 12), 10), -100, True),
        (sequences((2, 12), 10), 10, False),  # as it should be
        (sequences((2, 12), 3), -100, False),  # is a label, too
        (sequences((12, 13), 10), -100, False),  # nothing to fill up
        (sequences((11, 12), 10), -100, False),  # the end of a text, once
    ],
)
def test_padding_that_the_loss_counts(targets: Callable[[], Tensor], ignored: int, told: bool) -> None:
    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        logits = outputs[:, :, None].expand(-1, -1, 12)
        return CROSS(logits, wanted, ignore_index=ignored)

    assert (("padding counted", "warning") in rules(judge(loss, targets, outputs=11))) == told


def test_the_expectation_the_prior_and_the_interval_are_those_of_the_definition() -> None:
    rule = judge(CROSS, classes(3), outputs=3)
    CHANCE.manual_seed(0)
    losses, labels = [], []
    for _ in range(10):
        wanted = classes(3)()
        labels.append(wanted)
        losses.append(CROSS(torch.randn(64, 3, generator=CHANCE) * 0.1, wanted))
        torch.randn(64, 3, generator=CHANCE)
    share = torch.cat(labels).bincount() / 640
    (result,) = rule.results()
    values = torch.stack(losses)
    assert result.loss == pytest.approx(float(values.mean()), rel=1e-5)
    assert result.uniform == pytest.approx(math.log(3))
    assert result.constant == pytest.approx(float(-(share * share.log()).sum()), rel=1e-5)
    assert result.interval == pytest.approx(2.262 * float(values.std()) / 10**0.5, rel=5e-3)  # Student's t, 9 degrees
    assert result.z == pytest.approx((result.loss - result.uniform) / (float(values.std()) / 10**0.5), rel=1e-2)
    assert result.penalty == pytest.approx(0.0, abs=1e-6)


def test_penalties_are_reported_apart() -> None:
    rule = judge(lambda o, t: CROSS(o, t) + 1.5, classes())
    assert rule.penalty == pytest.approx(1.5, rel=1e-5)
    assert "penalties add 1.5." in rule.findings()[0].message


def test_the_cause_of_a_high_loss_is_named() -> None:
    assert (
        "not normalised (root mean square 1" in judge(CROSS, classes(), scale=3.0, inputs=100.0).findings()[0].message
    )
    assert "class 0 is favoured" in judge(CROSS, classes(), scale=0.01, shift=ONE_FAVOURED).findings()[0].message
    assert "standard deviation of 2.78" in judge(CROSS, classes(), scale=3.0).findings()[0].message


def test_a_difference_within_noise_is_no_finding() -> None:
    rule = InitialLossRule(expected=1.0)
    for loss in (0.2, 5.0, 1.0, 1.5, 0.4):
        rule.update(torch.tensor(loss), [])
    assert [finding.rule for finding in rule.findings()] == ["initial loss as expected"]


def test_outputs_that_are_all_alike_are_told() -> None:
    assert ("outputs hardly depend on the input", "info") in rules(judge(CROSS, classes(), scale=0.0))


def test_inputs_that_are_not_finite_are_told() -> None:
    rule = judge(lambda o, t: CROSS(o, t) * math.nan, classes(), inputs=math.inf)
    assert "the inputs have NaN" in rule.findings()[0].message


def said(rule: InitialLossRule, name: str) -> str:
    return next(finding.message for finding in rule.findings() if finding.rule == name)


def test_a_loss_that_nobody_knows_is_told_as_it_is_and_one_that_is_not_returned_too() -> None:
    assert "is 0.5" in said(judge(lambda o, t: o.sum() * 0 + 0.5, classes()), "initial loss not judged")
    rule = InitialLossRule()
    rule.update(None, [])
    assert "is not returned" in said(rule, "initial loss not judged")


def test_without_penalties_none_are_told() -> None:
    for penalty, told in ((0.0, False), (-0.5, True), (1e-4, False)):
        rule = judge(lambda o, t, more=penalty: CROSS(o, t) + more, classes())
        assert ("penalties add" in rule.findings()[0].message) == told
    rule = InitialLossRule(expected=1.0)
    rule.update(torch.tensor(1.0), [])
    assert math.isnan(rule.penalty)


def test_one_batch_has_no_interval() -> None:
    rule = InitialLossRule(expected=1.0)
    rule.update(torch.tensor(1.5), [])
    (result,) = rule.results()
    assert (result.loss, result.uniform, result.interval, result.batches) == (1.5, 1.0, math.inf, 1)
    rule.update(torch.tensor(1.5), [], expected=2.0)  # of this very batch
    (result,) = rule.results()
    assert (result.loss, result.uniform, result.batches) == (1.5, 1.5, 2)


def test_what_went_through_an_activation_without_a_call_is_known_by_its_values() -> None:
    def rectified(outputs: Tensor, targets: Tensor) -> Tensor:
        return CROSS(outputs * (outputs > 0), targets)

    def shares(outputs: Tensor, targets: Tensor) -> Tensor:
        exponents = outputs.exp()
        return CROSS(exponents / exponents.sum(1, keepdim=True), targets)

    assert rules(judge(rectified, classes()))[0] == ("activation on the logits", "warning")
    assert rules(judge(shares, classes()))[0] == ("softmax applied twice", "warning")
    assert rules(judge(lambda o, t: CROSS(o + 1, t), classes()))[0] == ("initial loss as expected", "info")  # above 0


def test_a_few_classes_have_no_favourite() -> None:
    favoured = "class 0 is favoured"
    for outputs in (3, 4):
        shift = torch.tensor([5.0, 0.0, 0.01, -0.01][:outputs])
        rule = judge(CROSS, classes(outputs), outputs=outputs, scale=0.001, shift=shift)
        assert (favoured in said(rule, "initial loss high")) == (outputs > 3)


@pytest.mark.parametrize(
    ("times", "first"),
    [
        (0.89, ("initial loss low", "info")),
        (0.91, ("initial loss as expected", "info")),
        (1.09, ("initial loss as expected", "info")),
        (1.11, ("initial loss high", "info")),
        (1.59, ("initial loss high", "info")),
        (1.61, ("initial loss high", "warning")),
    ],
)
def test_the_bounds_are_a_tenth_and_six_tenths(times: float, first: tuple[str, str]) -> None:
    """All examples are off by the same, so that there is no noise."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        wrong = (functional.one_hot(1 - targets, 2) - 0.5) * math.log(2**times - 1)
        return CROSS(outputs * 0 + wrong, targets)

    balanced = in_batches(torch.arange(640) % 2)
    assert rules(judge(loss, balanced, outputs=2))[0] == first
    rule = InitialLossRule(expected=1.0)
    for _ in range(3):
        rule.update(torch.tensor(times), [])
    name, severity = first
    assert rules(rule) == [(name if "expected" in name else "initial loss off", severity)]


def test_targets_of_a_single_example_without_a_batch_are_shares_or_not() -> None:
    for sum_of_shares, told in ((1.0, False), (3.0, True)):
        rule = InitialLossRule()
        with Watch() as watch:
            loss = CROSS(torch.zeros(10, requires_grad=True), torch.full((10,), sum_of_shares / 10))
        rule.update(loss, watch.part_of(loss))
        assert ("targets do not sum to 1" in dict(rules(rule))) is told


@pytest.mark.parametrize(("seen", "each", "told"), [(20, 1, False), (19, 5, False), (17, 6, True), (20, 32, True)])
def test_few_labels_of_many_classes_are_no_imbalance(seen: int, each: int, told: bool) -> None:
    """The entropy of n labels of c classes is too low by (c - 1) / 2n: Miller and Madow."""
    following = itertools.cycle(torch.arange(seen).repeat(each).chunk(10))
    rule = judge(CROSS, lambda: next(following), outputs=50)
    assert ("imbalanced classes" in dict(rules(rule))) is told


@pytest.mark.parametrize(("outputs", "told"), [(2, True), (3, False)])
def test_rare_classes_of_many_positions_are_told_of_two_only(outputs: int, told: bool) -> None:
    """Tokens are never equally frequent; of a mask one may start at its share."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return CROSS(logits[:, :, None].expand(-1, -1, 12), targets)

    rule = judge(loss, lambda: (torch.rand(64, 12, generator=CHANCE) < 0.05).long(), outputs=outputs)
    assert ("imbalanced classes" in dict(rules(rule))) is told


WAVE = (torch.arange(256) % 7 - 3).view(64, 4) / 10  # outputs, the same on each machine
ALTERNATE = torch.arange(64) % 4


def told(
    loss: Any, outputs: Tensor = WAVE, targets: Tensor = ALTERNATE, inputs: Tensor = WAVE, **arguments: Any
) -> list[Finding]:
    """What is said of eight batches: every other one with twice the outputs, and with its part of the targets."""
    rule = InitialLossRule(**arguments)
    for batch, (wanted, _) in enumerate(zip(itertools.cycle(targets.split(64)), range(8), strict=False)):
        with Watch() as watch:
            value = loss((outputs * (1 + batch % 2)).requires_grad_(), wanted)
        rule.update(value, watch.part_of(value), [inputs])
    (*_, last) = rule.results() or [None]
    findings = rule.findings(7)
    assert all(each.evidence == asdict(last) for each in findings if each.evidence and last)
    return [replace(each, evidence=dict.fromkeys(each.evidence, "")) for each in findings]  # names are enough here


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_everything_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    mse, logits = functional.mse_loss, functional.binary_cross_entropy_with_logits
    sums, large, zeros = {"reduction": "sum"}, 100 * torch.ones(8, 4), torch.zeros(64, 4)
    favours, knows = torch.tensor([2.0, 0.0, 0.01, -0.01]), 2.0 * functional.one_hot(ALTERNATE, 4)
    ends = torch.where(torch.arange(8) < 4, ALTERNATE.view(64, 1) % 3, 3).repeat(4, 1)
    by_class, by_size = torch.arange(512) // 128, torch.arange(512) / 128
    word_for_word(
        *told(lambda o, t: CROSS(o, t) * math.nan),
        *told(lambda o, t: CROSS(o, t) * math.nan, inputs=large * math.inf),
        *told(lambda o, t: o.sum() * 0 + 0.5),
        *told(lambda o, t: None),
        *told(CROSS),
        *told(lambda o, t: CROSS(o[:, :2], t % 2) + 0.25, inputs=large),
        *told(lambda o, t: CROSS(o, t) - 1.5),
        *told(lambda o, t: CROSS(o, t) + 3),
        *told(lambda o, t: -CROSS(o, t)),
        *told(lambda o, t: logits(o.sigmoid(), t), targets=(WAVE > 0).float()),
        *told(functional.nll_loss),
        *told(lambda o, t: CROSS(o.softmax(1), t)),
        *told(lambda o, t: CROSS(o.tanh(), t)),
        *told(lambda o, t: CROSS(o, t, **sums)),
        *told(lambda o, t: CROSS(o, t, reduction="none").sum()),
        *told(lambda o, t: mse(o, t, **sums), targets=WAVE.flip(0)),
        *told(lambda o, t: mse(o, t, **sums), targets=WAVE.flip(0), adaptive=False),
        *told(CROSS, outputs=knows),
        *told(lambda o, t: o.square().mean() + 1, expected=1.0),
        *told(lambda o, t: o.square().mean() + 1, expected=1.25),
        *told(lambda o, t: o.square().mean() + 1, expected=0.5),
        *told(CROSS, outputs=5 * WAVE),
        *told(CROSS, outputs=10 * WAVE),
        *told(CROSS, outputs=10 * WAVE, inputs=large),
        *told(lambda o, t: CROSS(o, t), outputs=favours + 0.001 * WAVE),
        *told(lambda o, t: CROSS(o, t, weight=torch.arange(1.0, 5)), outputs=5 * WAVE),
        *told(mse, outputs=10 * WAVE, targets=WAVE.flip(0)),
        *told(lambda o, t: CROSS(o.relu(), t), outputs=10 * WAVE, inputs=large),
        *told(mse, outputs=WAVE[:, :1], targets=WAVE[:, 0]),
        *told(lambda o, t: CROSS(o[:, :, None].expand(-1, -1, 8), t), targets=ends),
        *told(CROSS, targets=by_class),
        *told(lambda o, t: mse(o[:, 0], t), targets=by_size),
        *told(lambda o, t: logits(o[:, 0], t), targets=torch.ones(64)),
        *told(CROSS, targets=(WAVE > 0).float()),
        *told(mse, targets=WAVE + 2),
        *told(mse, targets=zeros + 1),
        *told(lambda o, t: CROSS(o[:, :2], t), targets=(torch.arange(64) == 5).long()),
        *told(CROSS, outputs=zeros),
    )


def dead(outputs: Tensor, targets: Tensor, loss: Any) -> bool:
    return "outputs hardly depend on the input" in {each.rule for each in told(loss, outputs, targets)}


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_outputs_hardly_depend_on_the_input_below_a_thousandth(scale: float) -> None:
    """Of the deviation of the targets where these are numbers; every other batch has twice as much."""
    steps = torch.tensor([[1.0], [-1.0]]).repeat(32, 1) * scale * 5e-4
    rare = (torch.arange(64) == 5).float()[:, None]
    numbers = torch.tensor([[3.0], [-1.0]]).repeat(32, 1)
    assert dead(steps, rare, functional.binary_cross_entropy_with_logits) == (scale < 1)
    assert dead(steps * torch.tensor([1.0, -1, 1, -1]), ALTERNATE, CROSS) == (scale < 1)
    assert dead(2 * steps, numbers, functional.mse_loss) == (scale < 1)
    assert dead(2 * steps, numbers, functional.l1_loss) == (scale < 1)


@pytest.mark.parametrize(
    ("means", "favoured"),
    [
        ([8.1, 0.0, 1.0, -1.0], 0),
        ([0.0, 1.0, -9.1, -1.0], 2),
        ([7.9, 0.0, 1.0, -1.0], -1),
        ([8.1, 0.0, 1.0, -1.0, 8.1, 0.0, 1.0, -1.0], -1),  # two are no outlier
        ([8.1, 0.0, 1.0], -1),
    ],
)
def test_a_class_is_favoured_that_is_eight_times_as_far_off_as_others(means: list[float], favoured: int) -> None:
    outputs = torch.tensor(means).expand(64, -1) + torch.zeros(64, 1)
    rule = InitialLossRule()
    with Watch() as watch:
        loss = CROSS(outputs.requires_grad_(), torch.arange(64) % len(means))
    rule.update(loss, watch.part_of(loss))
    assert rule.results()[0].favoured == favoured


@pytest.mark.parametrize(
    ("zeros", "examples", "seen"),
    [(9, 25, False), (11, 25, True), (94, 25, True), (96, 25, False), (25, 12, False)],
)
def test_rectified_values_are_known_by_their_zeros(zeros: int, examples: int, seen: bool) -> None:
    """Of a hundred values nine may be 0 by chance; of 48 nothing is told."""
    outputs = torch.ones(examples * 4)
    outputs[:zeros] = 0.0
    rule = InitialLossRule()
    with Watch() as watch:
        loss = CROSS(outputs.view(examples, 4).requires_grad_(), torch.arange(examples) % 4)
    rule.update(loss, watch.part_of(loss))
    assert ("activation on the logits" in dict(rules(rule))) is seen
