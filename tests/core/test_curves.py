import json
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from lightning_recipes.core.curves import BINS, CurvesRule
from lightning_recipes.core.early_stopping import noise_of


def rules_of(rule: CurvesRule) -> list[str]:
    return [finding.rule for finding in rule.findings()]


def trained(
    level: Callable[[float], float],
    noise: float = 0.05,
    steps: int = 3000,
    rate: Callable[[float], float] = lambda share: 0.1,
    validation: Callable[[float], float] | None = None,
    checks: int = 30,
    jump: float = 0.0,
    seed: int = 0,
    target_loss: float | None = None,
) -> CurvesRule:
    """A run whose loss has a level, given the share of the run that is over, and noise."""
    chance = random.Random(seed)
    rule = CurvesRule(target_loss)
    for step in range(1, steps + 1):
        share = step / steps
        rule.update(level(share) + chance.gauss(0, noise), rate(share), step)
        if validation is not None and step % (steps // checks) == 0:
            rule.check(validation(share) + chance.gauss(0, jump), step, share * checks)
    return rule


def learned(share: float) -> float:
    """Falls within a tenth of the run and still a little at its end."""
    return 0.3 + 2.0 * math.exp(-20 * share) + 0.2 * math.exp(-3 * share)


# ------------------------------------------------------------------------------------------------ memory


def test_losses_and_rates_share_their_bins() -> None:
    rule = CurvesRule()
    for step in range(1, 2 * BINS + 8):
        rule.update(math.nan if step % 5 == 0 else 1.0, math.nan if step < 4 else 0.5, step)
    assert [(each.first, each.last) for each in rule.train.bins] == [
        (each.first, each.last) for each in rule.rates.bins
    ]
    assert [each.count for each in rule.rates.bins[:3]] == [1, 4, 4]
    assert {each.mean for each in rule.rates.bins} == {0.5}


def test_losses_that_are_not_finite_are_counted_in_a_row() -> None:
    rule = CurvesRule()
    for step, value in enumerate([1.0, math.nan, 3.0, math.inf, -math.inf] * 200, 1):
        rule.update(value, 0.1, step)
    assert (rule.train.count, rule.train.bad, rule.lost, rule.lost_at) == (400, 600, 2, 999)
    rule.update(2.0, 0.1, 1001)
    assert rule.lost == 0
    assert rule.first == [1.0, 3.0] * 8


def test_a_resumed_rule_goes_on_as_if_nothing_had_been() -> None:
    def feed(rule: CurvesRule, steps: range) -> None:
        for step in steps:
            chance = random.Random(step)
            rule.update(chance.gauss(1, 0.1), 0.1, step, step % 30 / 30)
            if step % 30 == 0:
                rule.check(chance.gauss(1, 0.1), step, step / 30, 0.5)

    whole, first, second = CurvesRule(), CurvesRule(), CurvesRule(target_loss=0.1)
    feed(whole, range(1, 2000))
    feed(first, range(1, 977))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(second, range(977, 2000))
    assert second.state_dict() == whole.state_dict()
    assert second.target_loss == 0.1


# ------------------------------------------------------------------------------------------------ what is said


def test_nothing_is_said_of_a_healthy_run_whatever_the_scale_of_its_loss() -> None:
    for factor, shift in ((1, 0), (1e-4, 0), (1000, 0), (1, -5), (1e-3, -1)):
        rule = trained(
            lambda share, a=factor, b=shift: a * learned(share) + b,
            noise=0.05 * factor,
            rate=lambda share: 0.1 * (1 - share),
            validation=lambda share, a=factor, b=shift: a * (learned(share) + 0.1) + b,
            jump=0.005 * factor,
        )
        assert rules_of(rule) == []


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_said_of_pure_noise_about_a_healthy_curve(seed: int) -> None:
    schedule = [lambda share: 0.1, lambda share: 0.1 * (1 - share), lambda share: 0.1 * 0.1 ** (share > 0.5)][seed % 3]
    rule = trained(learned, 0.3, rate=schedule, validation=learned, jump=0.01, seed=seed)
    assert [finding.rule for finding in rule.findings() if finding.severity != "info"] == []


def test_a_short_run_is_told_nothing() -> None:
    assert rules_of(CurvesRule()) == []
    assert rules_of(trained(lambda share: 2 - share, steps=99)) == []


def test_a_loss_that_falls_as_fast_in_the_second_half_falls_too_slowly() -> None:
    (finding,) = trained(lambda share: 2.3 - 0.4 * share).findings()
    assert (finding.rule, finding.severity) == ("falls too slowly", "warning")
    assert finding.evidence["second_half"] == pytest.approx(0.2, abs=0.03)
    warmup = trained(lambda share: 2.3 - 2 * max(0, share - 0.2) ** 0.3, rate=lambda share: min(1, share / 0.2))
    assert "falls too slowly" not in rules_of(warmup)
    noisy = trained(lambda share: 2.3 - 0.02 * share, noise=1.0)
    assert rules_of(noisy) == []


def test_flat_at_a_constant_rate_is_told_and_since_when() -> None:
    def level(share: float) -> float:
        return 0.5 + 2 * math.exp(-30 * share)

    (finding,) = trained(level, 0.2).findings()
    assert (finding.rule, finding.severity) == ("falls fast, then flat", "info")
    assert 200 <= float(finding.evidence["since"]) <= 1000
    assert rules_of(trained(level, 0.2, rate=lambda share: 0.1 * (1 - share))) == []
    assert rules_of(trained(level, 0.2, rate=lambda share: 0.1 if share < 0.2 else 0.01)) == []
    assert rules_of(trained(level, 0.001)) == []  # has arrived
    assert rules_of(trained(level, 6.0)) == []  # half a run may have brought more than a tenth of the fall


def test_a_decay_that_came_too_early() -> None:
    def early(share: float) -> float:
        return 2.3 - 3 * share if share < 0.3 else 1.35 + 0.05 * math.exp(-50 * (share - 0.3))

    def late(share: float) -> float:
        return 0.8 + 1.5 * math.exp(-20 * share) if share < 0.5 else 0.5 + 0.3 * math.exp(-50 * (share - 0.5))

    finding = trained(early, 0.1, rate=lambda share: 0.1 if share < 0.3 else 0.01).findings()[0]
    assert (finding.rule, finding.severity) == ("decayed too early", "warning")
    assert 870 <= float(finding.evidence["dropped_at"]) <= 930
    assert rules_of(trained(late, 0.1, rate=lambda share: 0.1 if share < 0.5 else 0.01)) == []
    assert "decayed too early" not in rules_of(trained(early, 0.1))  # nothing was dropped


def until_a_twelfth(share: float) -> float:
    return 2.3 - 3 * min(share, 1 / 12)


@pytest.mark.parametrize("seed", range(6))
def test_a_decay_in_the_first_tenth_of_a_run(seed: int) -> None:
    """What was promised is little beside the noise of as many updates afterwards, not beside that of all the rest."""
    rule = trained(until_a_twelfth, rate=lambda share: 0.1 if share < 1 / 12 else 0.005, seed=seed)
    (finding,) = rule.findings()
    assert (finding.rule, finding.severity) == ("decayed too early", "warning")


@pytest.mark.parametrize(
    ("updates", "severity"), [(30, "info"), (60, "warning"), (150, "warning"), (600, ""), (3000, "")]
)
def test_a_rate_that_decays_at_once_is_told_whatever_the_loss_was(updates: int, severity: str) -> None:
    """The rate is divided by e in so many updates of 3,000; after a few of them nothing is known of the loss."""
    rule = trained(learned, 0.1, rate=lambda share: 0.1 * math.exp(-3000 * share / updates))
    assert {each.rule: each.severity for each in rule.findings()}.get("decayed too early", "") == severity


@pytest.mark.parametrize(
    ("rate", "severity"),
    [
        (lambda share: 1e-3 * share, "warning"),  # a warmup that never ends
        (lambda share: 1 + math.cos(6 * math.pi * share + math.pi), ""),  # three cycles
        (lambda share: 1.01 - math.cos(5 * math.pi * share), "info"),  # that end at the top
        (lambda share: min(1.0, 20 * share), ""),
        (lambda share: 0.5 if share < 0.7 else 0.6, ""),
        (lambda share: 1.0 if share < 0.3 else 0.01 + 0.3 * share, ""),
        (lambda share: 0.0, ""),
        (lambda share: math.nan, ""),
    ],
)
def test_a_learning_rate_that_rises_to_the_end(rate: Callable[[float], float], severity: str) -> None:
    told = {each.rule: each.severity for each in trained(learned, 0.1, rate=rate).findings()}
    assert told.get("learning rate rises", "") == severity


def test_a_rate_that_is_halved_again_and_again_until_nothing_goes_on() -> None:
    assert rules_of(trained(until_a_twelfth, rate=lambda share: 0.1 * 0.5 ** int(60 * share))) == ["decayed too early"]
    in_time = trained(lambda share: 2.3 - 3 * min(share, 0.6), rate=lambda share: 0.1 * 0.5 ** int(10 * share))
    assert "decayed too early" not in rules_of(in_time)


def test_a_decay_is_judged_until_the_rate_comes_back() -> None:
    """A rise behind it is not its doing."""

    def level(share: float) -> float:
        return 2.3 - 3 * min(share, 1 / 12) - 4 * max(0.0, min(share, 0.13) - 1 / 12) + 2 * max(0.0, share - 0.2)

    rule = trained(level, 0.02, rate=lambda share: 0.01 if 1 / 12 < share < 0.2 else 0.1)
    assert "decayed too early" not in rules_of(rule)


def test_a_short_run_that_still_falls() -> None:
    def level(share: float) -> float:
        return 0.5 + 1.5 * math.exp(-2.5 * share)

    for validation in (None, level):
        rule = trained(level, 0.1, steps=300, validation=validation, checks=3)
        assert [(each.rule, each.severity) for each in rule.findings()] == [("best at the end", "info")]
    for other in (
        trained(
            level, 0.1, steps=300, validation=lambda share: 0.8 + (share - 0.6) ** 2, checks=3
        ),  # not best at the end
        trained(level, 0.1, steps=300, rate=lambda share: 0.1 * (1 - share)),  # as it was planned
        trained(learned, 0.2, steps=300),
    ):
        assert "best at the end" not in rules_of(other)


def test_a_training_loss_that_stays_far_above_validation() -> None:
    rule = trained(
        lambda share: 1.6 + 0.7 * math.exp(-20 * share), 0.1, rate=lambda share: 1 - share,
        validation=lambda share: 0.5 + 1.8 * math.exp(-10 * share),
    )  # fmt: skip
    (finding,) = rule.findings()
    assert (finding.rule, finding.severity) == ("training loss above validation", "info")
    assert finding.evidence["above"] == pytest.approx(1.1, abs=0.1)
    dropout = trained(learned, 0.1, rate=lambda share: 1 - share, validation=lambda share: learned(share) - 0.2)
    assert rules_of(dropout) == []


def test_a_validation_that_shows_nothing_of_what_is_learned() -> None:
    def falls(share: float) -> float:
        return 0.1 + 2.2 * math.exp(-5 * share)

    for validation in (
        lambda share: 2.3 + share,
        lambda share: 3.0 - 0.6 * share,
        lambda share: 150.0,
        lambda share: 2e4 - 900 * share,
    ):
        for checks in (2, 3, 30):
            rule = trained(falls, 0.1, rate=lambda share: 1 - share, validation=validation, checks=checks, jump=0.05)
            assert rules_of(rule)[0] == "validation never improves"
    once = trained(falls, 0.1, rate=lambda share: 1 - share, validation=lambda share: 2.3, checks=1)
    assert "validation never improves" not in rules_of(once)
    slowly = trained(lambda share: 2.3 - share, 0.1, rate=lambda share: 0.1, validation=lambda share: 2.3 + share)
    assert rules_of(slowly) == ["validation never improves"]
    overfits = trained(falls, 0.1, rate=lambda share: 1 - share, validation=lambda share: 1.2 + 2 * (share - 0.3) ** 2)
    assert rules_of(overfits) == ["overfitting"]
    # A contrastive loss is higher in the larger batches of validation, and falls there as well.
    apart = trained(falls, 0.1, rate=lambda share: 1 - share, validation=lambda share: 2.5 + 2 * math.exp(-5 * share))
    assert rules_of(apart) == []
    learns_nothing = trained(lambda share: 2.3, 0.1, validation=lambda share: 2.4)
    assert "validation never improves" not in rules_of(learns_nothing)


@pytest.mark.parametrize("schedule", [lambda share: 0.1, lambda share: math.nan])
def test_divergence(schedule: Any) -> None:
    def explodes(share: float) -> float:
        return 2.3 if share < 0.02 else 2.35 + 80 * math.exp(-20 * share)

    for rule in (
        trained(explodes, rate=schedule, validation=explodes),
        trained(lambda share: math.nan if share > 0.7 else learned(share), validation=learned),
        trained(learned, validation=lambda share: math.inf if share > 0.9 else learned(share)),
    ):
        (finding,) = rule.findings()
        assert (finding.rule, finding.severity) == ("diverged", "error")


def test_single_losses_that_are_not_finite_are_no_divergence() -> None:
    rule = trained(learned, rate=lambda share: 1 - share)
    for step in range(3001, 3005):
        rule.update(math.nan, 0.0, step)
    assert rules_of(rule) == []
    rule.update(math.nan, 0.0, 3005)
    assert rules_of(rule) == ["diverged"]
    rule.update(0.3, 0.0, 3006)
    assert rules_of(rule) == []


def test_single_high_losses_behind_a_low_first_one_are_no_divergence() -> None:
    chance, rule = random.Random(2), CurvesRule()
    for step in range(1, 1501):  # small batches with far outliers
        level = 0.4 + 0.4 * math.exp(-step / 300)
        rule.update(0.4 if step == 1 else level * math.exp(chance.gauss(-0.3, 0.8)), 0.1, step)
    assert max(rule.first) > 3
    assert "diverged" not in rules_of(rule)


def test_few_losses_among_many_that_are_not_finite_are_not_read() -> None:
    rule = CurvesRule(target_loss=0.0)
    for step in range(20_000):
        rule.update(1.0 if step < 120 or step == 19_999 else math.nan, 0.1, step)
    assert rules_of(rule) == []


def test_jumps_are_told_without_a_training_loss() -> None:
    rule, chance = CurvesRule(), random.Random(0)
    for check in range(30):
        rule.check(2 * math.exp(-check / 3) + chance.gauss(0, 0.2), check)
    assert [(each.rule, each.step) for each in rule.findings()] == [("validation jumps", 0)]  # no update was told


def test_a_loss_that_stays_where_it_was() -> None:
    (finding,) = trained(lambda share: 2.303, 0.03).findings()
    assert (finding.rule, finding.severity) == ("training loss does not fall", "warning")


def test_a_loss_that_rises_without_any_validation() -> None:
    rule = trained(lambda share: learned(share) + max(0, share - 0.5))
    assert "training loss rises" in rules_of(rule)
    restart = trained(
        lambda share: learned(share) + (0.8 if share > 0.9 else 0), rate=lambda share: 1 if share > 0.9 else 1 - share
    )
    assert "training loss rises" not in rules_of(restart)


def test_overfitting_and_validation_that_jumps() -> None:
    rule = trained(
        lambda share: 2.3 * math.exp(-5 * share), 0.02, rate=lambda share: 1 - share,
        validation=lambda share: 0.5 + 2 * (share - 0.3) ** 2,
    )  # fmt: skip
    assert rules_of(rule) == ["overfitting"]
    jumpy = trained(learned, rate=lambda share: 1 - share, validation=learned, jump=0.15)
    assert [(finding.rule, finding.severity) for finding in jumpy.findings()] == [("validation jumps", "info")]
    slight = trained(learned, rate=lambda share: 1 - share, validation=lambda share: learned(share) + 0.02 * share)
    assert rules_of(slight) == ["underfitting"]


@pytest.mark.parametrize(
    ("target", "floor", "gap", "severity"),
    [
        (0.1, 0.3, 0.01, "warning"),
        (0.4, 0.3, 0.01, None),
        (None, 0.3, 0.01, "info"),
        (None, 0.3, 0.1, None),
        (None, 0.3, -0.1, None),  # of dropout, say
        (None, 0.1, 0.0, None),  # low enough for anybody
        (None, 2.2, 0.01, None),  # hardly anything was learnt, which is another matter
    ],
)
def test_underfitting(target: float | None, floor: float, gap: float, severity: str | None) -> None:
    def falls(share: float) -> float:
        return floor + (2.3 - floor) * math.exp(-20 * share)

    rule = trained(
        falls, 0.02, rate=lambda share: 1 - share, validation=lambda share: falls(share) + gap, target_loss=target
    )
    found = [(finding.rule, finding.severity) for finding in rule.findings()]
    assert found == ([] if severity is None else [("underfitting", severity)])


@pytest.mark.parametrize(("last_quarter", "jump", "told"), [(0.04, 0.0, True), (0.06, 0.0, False), (0.04, 0.08, False)])
def test_underfitting_of_a_loss_that_stands_and_a_validation_that_does(
    last_quarter: float, jump: float, told: bool
) -> None:
    def falls(share: float) -> float:
        return 0.5 + 1.8 * math.exp(-30 * share) + 4 * 1.8 * last_quarter * (1 - share)

    def validation(share: float) -> float:
        return falls(share) + 1.9 * jump  # by which the last ones happen to be lower

    rule = trained(falls, 0.02, rate=lambda share: 1 - share, validation=validation, jump=jump)
    assert ("underfitting" in rules_of(rule)) is told


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (lambda share: 2.303, "training loss does not fall"),
        (lambda share: 2.3 - share, "falls too slowly"),
        (lambda share: abs(share - 0.3) + 0.5, "training loss rises"),
        (lambda share: 1.0 + 9.0 * share, "diverged"),
    ],
)
def test_of_optimizers_that_compete_the_training_loss_is_information(
    level: Callable[[float], float], told: str
) -> None:
    rule = trained(level, 0.01)
    alone = {finding.rule: finding.severity for finding in rule.findings()}
    rule.competes = True
    assert [finding.rule for finding in rule.findings()] == list(alone)
    assert alone[told] != "info"
    assert {finding.severity for finding in rule.findings()} == {"info"}
    for step in range(3001, 3011):
        rule.update(math.nan, 0.1, step)
    assert [finding.severity for finding in rule.findings()] == ["error"]


def in_the_same_order(pattern: Callable[[int], float]) -> list[Any]:
    """What is said of an order that is the same in each epoch: a factor of each batch beside the level."""
    rule, chance = CurvesRule(), random.Random(0)
    for epoch in range(12):
        for batch in range(40):
            level = 2.3 * 0.8 ** (epoch + batch / 40)
            rule.update(level * (1 + pattern(batch)) + chance.gauss(0, 0.02), 0.1, 40 * epoch + batch, batch / 40)
    return [finding for finding in rule.findings() if finding.rule == "periodic training loss"]


def test_data_sorted_by_class_are_told() -> None:
    (finding,) = in_the_same_order(lambda batch: 0.8 * (batch // 10 % 2))
    assert finding.severity == "warning"
    assert "neighbouring batches are alike" in finding.message
    assert finding.advice == "The data come in the same order in each epoch: shuffle."


def test_an_order_that_is_the_same_but_not_sorted_may_be_meant() -> None:
    heights = [random.Random(batch).random() for batch in range(40)]
    (finding,) = in_the_same_order(heights.__getitem__)
    assert finding.severity == "info"
    assert "neighbouring" not in finding.message
    assert finding.advice.endswith("shuffle, if that was not meant.")
    assert in_the_same_order(lambda batch: 0.03 * (batch // 10 % 2)) == []  # too small to matter


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="target_loss must be a finite number"):
        CurvesRule(math.nan)
    with pytest.raises(TypeError, match="target_loss must be a finite number"):
        CurvesRule("low")  # type: ignore[arg-type]


def told(rule: CurvesRule, name: str) -> Any:
    return next(finding for finding in rule.findings() if finding.rule == name)


def test_the_numbers_are_those_of_the_curves() -> None:
    def near(**numbers: float) -> dict[str, Any]:
        return {name: pytest.approx(value, abs=0.03) for name, value in numbers.items()}

    slow = told(trained(lambda share: 2.3 - 0.4 * share), "falls too slowly")
    assert slow.evidence == {**near(first_half=0.2, second_half=0.2), "error": slow.evidence["error"]}
    assert 0 < slow.evidence["error"] < 0.05
    assert "far from its end, 1.9" in slow.message
    still = told(trained(lambda share: 2.303, 0.01), "training loss does not fall")
    assert still.evidence == near(start=2.303, end=2.303)
    flat = told(trained(lambda share: 0.5 + 2 * math.exp(-30 * share), 0.2), "falls fast, then flat")
    assert flat.evidence["level"] == pytest.approx(0.5, abs=0.02)
    assert abs(flat.evidence["change"]) < flat.evidence["error"] < 0.1
    early = told(
        trained(
            lambda share: 2.3 - 3 * min(share, 0.3), 0.05, rate=lambda share: 0.1 if share < 0.3 else 0.01, steps=2000
        ),
        "decayed too early",
    )
    assert early.evidence["dropped_at"] == pytest.approx(600, abs=20)
    assert early.evidence["before"] < -0.3
    assert early.evidence["after"] == pytest.approx(0, abs=0.05)
    assert "from 0.1 to 0.01" in early.message
    rose = told(trained(lambda share: 2.0 + 8 * max(0.0, share - 0.5)), "diverged")
    assert rose.evidence["start"] == pytest.approx(2.0, abs=0.2)
    assert rose.evidence["peak"] == pytest.approx(6.0, abs=0.2)
    assert rose.evidence["end"] == pytest.approx(5.8, abs=0.3)


def test_the_numbers_are_those_of_validation_too() -> None:
    gap = trained(
        lambda share: 1.6 + 0.7 * math.exp(-20 * share), 0.1, rate=lambda share: 1 - share,
        validation=lambda share: 0.5 + 1.8 * math.exp(-10 * share),
    )  # fmt: skip
    found = told(gap, "training loss above validation")
    assert found.evidence["train"] == pytest.approx(1.6, abs=0.05)
    assert found.evidence["fall"] == pytest.approx(1.8, abs=0.3)
    never = told(
        trained(
            lambda share: 0.1 + 2.2 * math.exp(-5 * share), 0.1, rate=lambda share: 1 - share,
            validation=lambda share: 2.3 + share,
        ),
        "validation never improves",
    )  # fmt: skip
    assert never.evidence["best"] == pytest.approx(2.3 + 1 / 30)
    assert never.evidence["start"] == pytest.approx(2.3, abs=0.1)
    assert never.evidence["end"] == pytest.approx(0.12, abs=0.05)
    assert "(step 100)" in never.message
    lost = told(trained(learned, validation=lambda share: math.inf if share > 0.9 else learned(share)), "diverged")
    assert "is not finite since step 2,800" in lost.message
    never_finite = told(trained(learned, validation=lambda share: math.nan), "diverged")
    assert "since step 100" in never_finite.message
    under = told(
        trained(
            lambda share: 0.3 + math.exp(-20 * share), 0.02, rate=lambda share: 1 - share,
            validation=lambda share: 0.31 + math.exp(-20 * share), target_loss=0.1,
        ),
        "underfitting",
    )  # fmt: skip
    assert under.evidence == {
        "end": pytest.approx(0.3, abs=0.01),
        "target": 0.1,
        "gap": pytest.approx(0.01, abs=0.01),
    }
    assert "at least 0.19 above the target of 0.1" in under.message
    hint = told(
        trained(
            lambda share: 0.3 + 2 * math.exp(-20 * share), 0.02, rate=lambda share: 1 - share,
            validation=lambda share: 0.31 + 2 * math.exp(-20 * share),
        ),
        "underfitting",
    )  # fmt: skip
    assert hint.evidence == {
        "end": pytest.approx(0.3, abs=0.01),
        "start": pytest.approx(2.25, abs=0.1),
        "gap": pytest.approx(0.01, abs=0.01),
    }
    assert "hardly falls any more, at 0.3" in hint.message
    for checks, jumps in ((9, False), (10, True)):
        rule = CurvesRule()
        for check in range(checks):
            rule.check(2 * math.exp(-check) + 0.2 * (-1) ** check, check)
        assert ("validation jumps" in rules_of(rule)) == jumps
    jumpy = told(rule, "validation jumps")
    assert jumpy.evidence["noise"] == pytest.approx(0.48, abs=0.05)
    assert jumpy.evidence["fall"] == pytest.approx(2.2 + 0.2, abs=0.05)


def test_underfitting_is_told_of_a_gap_within_the_noise_of_validation() -> None:
    for jump, told_of in ((0.0, False), (0.1, True)):
        rule = trained(
            lambda share: 0.3 + 2 * math.exp(-20 * share), 0.02, rate=lambda share: 1 - share,
            validation=lambda share: 0.34 + 2 * math.exp(-20 * share), jump=jump, target_loss=0.1, seed=1,
        )  # fmt: skip
        assert ("underfitting" in rules_of(rule)) is told_of


@pytest.mark.parametrize(("share", "told_of"), [(0.18, True), (0.22, False)])
def test_a_rate_that_is_dead_for_four_fifths_of_a_run(share: float, told_of: bool) -> None:
    def arrives(over: float) -> float:
        return 0.3 + 2 * math.exp(-100 * over)

    rule = trained(arrives, 0.1, rate=lambda over: 0.1 if over < share else 0.0009)
    assert ("decayed too early" in rules_of(rule)) is told_of
    alive = trained(arrives, 0.1, rate=lambda over: 0.1 if over < share else 0.0011)
    assert "decayed too early" not in rules_of(alive)


@pytest.mark.parametrize(("rise", "told_of"), [(1.45, False), (1.55, True)])
def test_a_rate_that_ends_half_as_high_again(rise: float, told_of: bool) -> None:
    rule = trained(learned, 0.1, rate=lambda share: 0.1 if share < 0.8 else 0.1 * rise)
    assert ("learning rate rises" in rules_of(rule)) is told_of


@pytest.mark.parametrize(("end", "told_of"), [(0.92, True), (0.88, False)])
@pytest.mark.parametrize("start", [0.02, 2.0, 200.0])
def test_a_loss_that_was_far_above_its_start_has_diverged_unless_it_ends_a_tenth_below(
    start: float, end: float, told_of: bool
) -> None:
    def level(share: float) -> float:
        return start * (1.0 if share < 0.02 else 4.0 if share < 0.3 else end)

    assert ("diverged" in rules_of(trained(level, 0.001 * start))) is told_of


def rate_until(until: float) -> Callable[[float], float]:
    return lambda share: 0.1 if share < until else 0.01


def decays(share: float) -> float:
    return 0.1 * (1 - share)


def test_what_the_curves_say_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    def slow(share: float) -> float:
        return 0.5 + 1.5 * math.exp(-2.5 * share)

    def fast(share: float) -> float:
        return 0.3 + 2 * math.exp(-20 * share)

    rules = [
        trained(lambda share: math.nan if share > 0.7 else learned(share), steps=1000),
        trained(learned, steps=1000, validation=lambda share: math.inf if share > 0.9 else learned(share)),
        trained(lambda share: 2.0 + 8 * max(0.0, share - 0.5), steps=1000),
        trained(lambda share: 2.303, 0.01, steps=1000),
        trained(learned, 0.1, rate=lambda share: 1e-3 * share),
        trained(learned, 0.1, rate=lambda share: 1.01 - math.cos(5 * math.pi * share)),
        trained(lambda share: 2.3 - 0.4 * share, steps=1000),
        trained(lambda share: 0.5 + 2 * math.exp(-30 * share), 0.2),
        trained(lambda share: 2.3 - 3 * min(share, 0.3), 0.1, rate=rate_until(0.3), steps=1500),
        trained(learned, 0.1, rate=lambda share: 0.1 * math.exp(-100 * share)),
        trained(lambda share: learned(share) + max(0, share - 0.5), steps=1000),
        trained(slow, 0.1, steps=300),
        trained(slow, 0.1, steps=300, validation=slow, checks=3),
        trained(lambda share: 0.1 + 2.2 * math.exp(-5 * share), 0.1, rate=decays, validation=lambda share: 2.3 + share),
        trained(lambda share: 1.3 + 0.4 * fast(share), 0.1, rate=decays, validation=fast),
        trained(learned, rate=decays, validation=learned, jump=0.15),
        trained(fast, 0.02, rate=decays, validation=lambda share: fast(share) + 0.01, target_loss=0.1),
        trained(fast, 0.02, rate=decays, validation=lambda share: fast(share) + 0.01),
        trained(fast, 0.02, rate=decays, validation=lambda share: 0.5 + 2 * (share - 0.3) ** 2),
    ]
    found = [finding for rule in rules for finding in rule.findings("val_nll")]
    for heights in ([0.8 * (batch // 10 % 2) for batch in range(40)], [batch * 17 % 40 / 40 for batch in range(40)]):
        found += in_the_same_order(heights.__getitem__)
    word_for_word(*found)


def test_the_names_of_the_curves_go_into_the_file_of_a_run() -> None:
    rule = CurvesRule()
    assert {*rule.state_dict()} == {"bins", "width", "first", "lost", "profile", "checks", "accuracies", "since"}
    for step in range(1, 5):
        rule.update(float(step), 0.1, step)
    rule.update(math.nan, 0.1, 5)
    rule.check(math.nan, 5, 0.5, 0.25)
    rule.update(7.0, 0.1, 6)
    state = rule.state_dict()
    assert state["checks"] == {"values": [math.inf], "train": [2.5], "steps": [5], "epochs": [0.5]}
    assert (state["first"], state["lost"], state["accuracies"]) == ([1.0, 2.0, 3.0, 4.0, 7.0], [0, 5], [0.25])
    assert (state["since"], state["width"]) == ([7.0, 1], 1)


def test_the_last_five_checks_are_compared_with_the_losses_before_them() -> None:
    above = trained(lambda share: 3 - share, 0.01, validation=lambda share: 1 - 0.5 * share, checks=12)
    level, loss = (statistics.median(each[-5:]) for each in (above.checks.values, above.checks.train))
    assert told(above, "training loss above validation").evidence == {
        "train": loss,
        "above": loss - level,
        "fall": above.first[0] - level,
    }
    under = trained(
        lambda share: 0.8 + math.exp(-30 * share) - 0.3 * share, 0.01, checks=12, target_loss=0.1,
        validation=lambda share: 0.81 - 0.3 * share - 0.02 * (share > 0.6),
    )  # fmt: skip
    level, loss = (statistics.median(each[-5:]) for each in (under.checks.values, under.checks.train))
    assert told(under, "underfitting").evidence["gap"] == level - loss


def test_a_jump_is_of_all_checks_and_about_the_last_twenty() -> None:
    rule = CurvesRule()
    for check in range(40):
        rule.check((3.0 if check < 15 else 1.0) + 0.5 * (-1) ** check + check / 1000, check)
    finding = told(rule, "validation jumps")
    values = rule.checks.values
    assert finding.evidence == {"noise": noise_of(values), "fall": values[0] - min(values)}
    assert f"about {statistics.median(values[-20:]):.3g}, " in finding.message
