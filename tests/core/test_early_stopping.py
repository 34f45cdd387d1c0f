import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_recipes.core.early_stopping import (
    AllOf,
    AnyOf,
    Criterion,
    Curve,
    EarlyStoppingRule,
    GeneralizationLoss,
    Patience,
    ProgressQuotient,
    SuccessiveRises,
    noise_of,
    reading,
    rise,
)

# Of perceptrons that overfit digits and breast cancer for 200 epochs, and of a deep one with sigmoids that stays on a
# plateau for forty epochs before it learns: training loss of each epoch, validation and test loss after it; 4 seeds.
RECORDED: dict[str, list[dict[str, list[float]]]] = json.loads(
    (Path(__file__).parent / "overfitting_curves.json").read_text()
)
RUNS = [(name, run) for name, runs in RECORDED.items() for run in runs]


def stops_at(criterion: Criterion, values: list[float], train: list[float] | None = None, **rule: Any) -> int:
    """The first check after which to stop, counted from 1; the length of the run if there is none."""
    judge = EarlyStoppingRule(**rule)
    for check, value in enumerate(values, 1):
        if judge.update(value, criterion, math.nan if train is None else train[check - 1], steps=check, epochs=check):
            return check
    return len(values)


def lost(run: dict[str, list[float]], stop: int) -> float:
    """By how many percent the test loss at the best check before the stop is above that at the best of all."""
    validation, test = run["validation"], run["test"]
    kept, best = validation.index(min(validation[:stop])), validation.index(min(validation))
    return 100 * (test[kept] / test[best] - 1)


@pytest.mark.parametrize("name", ["digits", "breast cancer", "noisy digits"])
def test_the_default_saves_four_fifths_of_an_overfitting_run_and_loses_nothing(name: str) -> None:
    stops = [stops_at(Patience(3), run["validation"]) for run in RECORDED[name]]
    assert statistics.fmean(1 - stop / 200 for stop in stops) > 0.8
    assert statistics.fmean(lost(run, stop) for run, stop in zip(RECORDED[name], stops)) < 1


def test_the_default_survives_a_plateau_at_the_start_on_which_plain_patience_dies() -> None:
    runs = RECORDED["plateau"]
    assert statistics.fmean(lost(run, stops_at(Patience(3), run["validation"])) for run in runs) < 2
    assert statistics.fmean(lost(run, stops_at(Patience(10), run["validation"], min_delta=0)) for run in runs) > 100


# ------------------------------------------------------------------------------ criteria against their definitions


def gl_by_definition(validation: list[float]) -> float:
    return 100 * (validation[-1] / min(validation) - 1)


def slow_generalization_loss(alpha: float, train: list[float], validation: list[float]) -> int:
    for t in range(1, len(validation) + 1):
        if gl_by_definition(validation[:t]) > alpha:
            return t
    return len(validation)


def slow_progress_quotient(alpha: float, k: int, train: list[float], validation: list[float]) -> int:
    for t in range(k, len(validation) + 1, k):
        strip = train[t - k : t]
        if gl_by_definition(validation[:t]) / (1000 * (sum(strip) / (k * min(strip)) - 1)) > alpha:
            return t
    return len(validation)


def slow_successive_rises(s: int, k: int, validation: list[float]) -> int:
    def stops(s: int, t: int) -> bool:
        if t - k < k:  # there is no strip before the first
            return False
        return validation[t - 1] > validation[t - 1 - k] and (s == 1 or stops(s - 1, t - k))

    return next((t for t in range(k, len(validation) + 1, k) if stops(s, t)), len(validation))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 5.0])
def test_generalization_loss_is_prechelts(alpha: float) -> None:
    for _, run in RUNS:
        expected = slow_generalization_loss(alpha, run["train"], run["validation"])
        assert stops_at(GeneralizationLoss(alpha), run["validation"], min_delta=0) == expected


@pytest.mark.parametrize(("alpha", "strip"), [(0.5, 5), (1.0, 5), (3.0, 4)])
def test_progress_quotient_is_prechelts(alpha: float, strip: int) -> None:
    for _, run in RUNS:
        expected = slow_progress_quotient(alpha, strip, run["train"], run["validation"])
        got = stops_at(ProgressQuotient(alpha, strip), run["validation"], run["train"], min_delta=0)
        assert got == expected


@pytest.mark.parametrize(("rises", "strip"), [(1, 5), (2, 5), (3, 5), (4, 3), (2, 1)])
def test_successive_rises_is_prechelts(rises: int, strip: int) -> None:
    for _, run in RUNS:
        expected = slow_successive_rises(rises, strip, run["validation"])
        assert stops_at(SuccessiveRises(rises, strip), run["validation"], min_delta=0) == expected


def test_relative_criteria_know_negative_metrics_and_both_modes() -> None:
    assert stops_at(GeneralizationLoss(5), [-10.0, -9.8, -9.4, -10.0], min_delta=0) == 3  # 6 % worse than -10
    assert stops_at(GeneralizationLoss(5), [10.0, 9.8, 9.4, 10.0], mode="max", min_delta=0) == 3
    worse = [-1.0, -0.99995, -0.9999, -0.99985]  # a share of |best| below it is no improvement
    assert stops_at(Patience(3), worse, min_delta="0.01%") == 4
    better = [-1.0, -1.00005, -1.0001, -1.02, -1.04]
    assert EarlyStoppingRule("1%").update(better[0], Patience(2)) is None
    assert stops_at(Patience(2), better, min_delta="1%") == 3


def test_all_and_any_of_several() -> None:
    values = [3.0, 1.0, 2.0, 1.5, 1.4, 1.3]
    three, loss = Patience(3), GeneralizationLoss(60)
    assert stops_at(AnyOf([three, loss]), values, min_delta=0) == 3
    assert stops_at(AllOf([Patience(1), loss]), values, min_delta=0) == 3
    assert stops_at(AllOf([three, loss]), values, min_delta=0) == 6
    verdict = AllOf([Patience(1), loss]).verdict(Curve([1.0, 2.0]))
    assert verdict == "did not improve in the last 1 check and is 100 % worse than its best"
    assert AnyOf([three, loss]).criteria == AllOf([three, loss]).criteria == (three, loss)  # no list to be changed


# ------------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize("min_delta", [0.0, "auto"])
@pytest.mark.parametrize(
    ("values", "patience", "stop"),
    [
        ([6, 5, 5, 5, 5, 5], 3, 5),
        ([6, 5, 4, 4, 3, 3], 1, 4),
        ([6, 5, 6, 5, 5, 5], 3, 5),
        ([8, 4, 2, 3, 4, 5, 8, 10], 3, 6),
        ([10, 10, 10, 10], 2, 3),
        ([0, 0, 0, 0, 0], 3, 4),
        ([5, 4, 4.5, 4.6], 2, 4),
        ([1, 0.8, 0.9, 1, 1.1, 1.2], 3, 5),
        ([3, 2, 1], 0, 3),
        ([3, 2, 2, 1], 0, 3),
    ],
)
def test_without_noise_patience_counts_checks(values: list[float], patience: int, stop: int, min_delta: Any) -> None:
    assert stops_at(Patience(patience), [float(value) for value in values], min_delta=min_delta) == stop


def test_a_smooth_curve_near_its_first_value_is_believed_after_eight_checks() -> None:
    values = [1.0, *(0.95 + 0.005 * check for check in range(12))]
    assert stops_at(Patience(3), values, min_delta=0) == 5
    assert stops_at(Patience(3), values) == 8


@pytest.mark.parametrize(("unit", "stop"), [("checks", 6), ("steps", 5), ("epochs", 6), ("seconds", 4)])
def test_patience_in_every_unit(unit: Any, stop: int) -> None:
    rule, criterion = EarlyStoppingRule(0.0), Patience(4 if unit == "checks" else 30, unit)
    for check, value in enumerate([2.0, 1.0, 1.5, 1.4, 1.3, 1.2, 1.1], 1):
        verdict = rule.update(value, criterion, steps=10 * check, epochs=8 * check, seconds=16.0 * check)
        if verdict:
            break
    assert check == stop
    assert unit in str(verdict)


def test_a_lucky_value_does_not_exhaust_patience_nor_an_insignificant_one_reset_it() -> None:
    falling = [1.0 - 0.004 * check + 0.03 * (-1) ** (check % 3) for check in range(100)]
    falling[20] -= 0.08  # as good as what comes twenty checks later
    assert stops_at(Patience(3), falling, min_delta=0) < 30
    assert stops_at(Patience(3), falling) == 100
    flat = [0.5 + 0.3 * 0.5**check + 0.02 * math.sin(7.0 * check * check) - 1e-5 * check for check in range(200)]
    assert stops_at(Patience(3), flat) < 60


def test_nan_is_never_an_improvement() -> None:
    rule = EarlyStoppingRule(0.0)
    assert not rule.improved
    verdicts = [rule.update(value, Patience(3)) for value in (1.0, 0.9, math.nan, 5.0, math.inf)]
    assert [verdict is not None for verdict in verdicts] == [False, False, False, False, True]
    assert rule.curve.best == 1
    rule = EarlyStoppingRule(0.0, "max")
    assert [rule.update(value, Patience(2)) is not None for value in (math.nan, 0.5, math.inf, math.nan)][-1]
    assert rule.curve.best == 1


def test_checks_that_do_not_count_are_remembered_all_the_same() -> None:
    rule = EarlyStoppingRule(0.0)
    verdicts = [rule.update(1.0 + check, Patience(2), counts=check >= 5) for check in range(8)]
    assert [verdict is not None for verdict in verdicts] == [False] * 6 + [True, True]
    assert rule.curve.best == 0


def test_a_resumed_rule_goes_on_as_if_nothing_had_been_and_with_its_own_criterion() -> None:
    for _, run in RUNS[:6]:
        rule, cut = EarlyStoppingRule(), 15
        for value in run["validation"][:cut]:
            rule.update(value, Patience(1000), train=1.0)
        resumed = EarlyStoppingRule()
        resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
        for value in run["validation"][cut:40]:
            assert rule.update(value, Patience(4), 1.0) == resumed.update(value, Patience(4), 1.0)
        assert rule == resumed


# ---------------------------------------------------------------------------------------------------------- noise


def test_noise_is_that_of_the_curve_whatever_its_trend() -> None:
    import random

    chance = random.Random(0)
    for trend in (lambda x: 0.0, lambda x: -0.5 * x, lambda x: 0.01 * x * x):
        estimates = [noise_of([trend(x) + chance.gauss(0, 0.3) for x in range(20)]) for _ in range(300)]
        assert statistics.median(estimates) == pytest.approx(0.3, rel=0.15)


# -------------------------------------------------------------------------------------------------------- reading


def read(validation: list[float], train: list[float], stop: int = 200, **kwargs: Any) -> str | None:
    curve = Curve(validation[:stop], train[:stop], list(range(1, stop + 1)), list(range(1, stop + 1)))
    finding = reading(curve, "val_loss", **kwargs)
    return finding and finding.rule


def test_what_curves_say() -> None:
    for name in ("digits", "noisy digits"):
        assert {read(run["validation"], run["train"]) for run in RECORDED[name]} == {"best at the start"}
    assert [read(run["validation"], run["train"], 45) for run in RECORDED["digits"]] == ["overfitting"] * 4
    assert [read(run["validation"], run["train"], 70) for run in RECORDED["plateau"]] == ["best at the end"] * 4
    rising = [0.5 + 0.02 * check for check in range(200)]
    assert read(rising, rising) == "training loss rises"


def test_where_the_noise_forbids_nothing_is_said() -> None:
    for run in RECORDED["plateau"]:  # so far only noise
        assert read(run["validation"], run["train"], 20) is None
    assert read([1.0, 2.0], [1.0, 1.0], 2) is None
    assert read([0.5] * 100, [0.3] * 100, 100) is None


def test_overfitting_is_told_with_the_gap_and_since_when() -> None:
    run = RECORDED["digits"][0]
    best = run["validation"].index(min(run["validation"])) + 1
    curve = Curve(run["validation"][:80], run["train"][:80], list(range(10, 810, 10)), list(range(1, 81)))
    finding = reading(curve, "val_loss", stopped=True)
    assert finding is not None
    assert f"best at step {10 * best} of 800 (epoch {best})" in finding.message
    assert finding.evidence["gap"] > finding.evidence["got_worse_by"] > 0
    assert finding.evidence["train_fell_by"] > 0


def test_what_is_advised_depends_on_whose_weights_the_model_has() -> None:
    run = RECORDED["digits"][0]
    curve = Curve(run["validation"][:45], run["train"][:45], list(range(1, 46)), list(range(1, 46)))
    for restored in (True, False):
        finding = reading(curve, "val_loss", restored=restored)
        assert finding is not None
        assert ("The model has the weights of that step" in finding.advice) == restored
        assert ("or keep the weights" in finding.advice) != restored


@pytest.mark.parametrize("checks", [4, 200])
def test_a_metric_that_only_gets_worse_is_no_overfitting_if_the_mode_may_be_wrong(checks: int) -> None:
    accuracy = [1 - 0.5 * 0.9**check for check in range(checks)]
    train = [2 * 0.9**check for check in range(checks)]
    curve = Curve(accuracy, train, list(range(10, 10 * checks + 1, 10)), list(range(1, checks + 1)))
    found = reading(curve, "val_score", stopped=True)
    assert found is not None
    assert "If higher is better, set mode='max'." in found.advice
    assert "overfitting" not in str(found)
    assert reading(curve, "val_acc", stopped=True) is None
    known = reading(curve, "val_loss", stopped=True)
    assert known is None if checks < 8 else "overfitting" in str(known)
    curve.values = [0.5] * checks
    assert reading(curve, "val_score", stopped=True) is None


@pytest.mark.parametrize("stop", [45, 200])
def test_a_validation_below_the_training_loss_is_not_called_overfitting(stop: int) -> None:
    run = RECORDED["digits"][0]
    dropout = [loss + 2.0 for loss in run["train"]]
    curve = Curve(run["validation"][:stop], dropout[:stop], list(range(1, stop + 1)), list(range(1, stop + 1)))
    assert "overfitting" in str(reading(curve, "val_error"))  # is not measured alike
    for name in ("val_loss", "val_error"):
        assert "gap" not in str(reading(curve, name))
    assert "overfitting" not in str(reading(curve, "val_loss"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patience(-1), "amount must be a number above 0, got -1"),
        (lambda: Patience(3, "weeks"), "unit must be 'checks' or 'steps' or 'epochs' or 'seconds', got 'weeks'"),  # type: ignore[arg-type]
        (lambda: GeneralizationLoss(0), "alpha must be a number above 0, got 0"),
        (lambda: ProgressQuotient(0.5, 1), "strip must be a whole number of at least 2, got 1"),
        (lambda: AnyOf([]), "criteria must have at least one"),
        (lambda: AllOf([]), "criteria must have at least one"),
        (lambda: SuccessiveRises(0), "rises must be a whole number of at least 1, got 0"),
        (lambda: EarlyStoppingRule("some"), "min_delta must be a number of at least 0, a share .* got 'some'"),
        (lambda: EarlyStoppingRule("x%"), "min_delta must be .* got 'x%'"),
        (lambda: EarlyStoppingRule(-0.1), "min_delta must be .* got -0.1"),
        (lambda: EarlyStoppingRule(mode="best"), "mode must be 'min' or 'max', got 'best'"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_min_delta_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="min_delta must be .* got None"):
        EarlyStoppingRule(None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the bounds it names


@pytest.mark.parametrize(
    ("values", "has_noise"),
    [
        ([1.0, 2.0, 1.5, 1.4], False),  # turns once
        ([1.0, 2.0, 1.5, 3.0], True),
        ([1.0, 2.0, 1.0, 3.0], False),  # two are equal
        ([1.0, 2.0, 3.0, 4.5, 3.0, 2.5, 2.0], False),
        ([1.0, 2.0, 3.0, 4.5, 3.0, 2.5, 1.5, 0.7], True),  # eight are enough
        ([1.0, math.nan, 2.0, math.inf, 1.5, 3.0], True),
        ([0.0, 5.0] * 10 + [1.0] * 20, False),  # the last twenty count
        ([0.0, 5.0] * 10 + [1.0] * 7, True),
    ],
)
def test_few_values_have_noise_only_if_they_turn_and_differ(values: list[float], has_noise: bool) -> None:
    assert (noise_of(values) > 0) == has_noise


def test_a_check_counts_in_full_from_eight_deviations_on_and_at_least_a_tenth() -> None:
    for value, checks, stops in ((1.8, 2, True), (1.79, 2, False), (1.4, 4, True), (1.4, 3, False)):
        assert (Patience(2).verdict(Curve([1.0] + [value] * checks, noise=0.1)) is not None) == stops
    for checks, stops in ((19, False), (20, True)):
        assert (Patience(2).verdict(Curve([1.0] * (1 + checks), noise=0.1)) is not None) == stops
    assert Patience(0).verdict(Curve([1.0, 0.91], noise=0.1)) is not None  # no improvement
    assert Patience(0).verdict(Curve([1.0, 0.89], noise=0.1)) is None


@pytest.mark.parametrize(("wobble", "counts"), [(0.09, False), (0.11, True)])
@pytest.mark.parametrize("first", [2.0, -2.0])
def test_no_check_counts_within_a_tenth_of_the_first_value(wobble: float, counts: bool, first: float) -> None:
    shares = [share * 0.999**check for check in range(15) for share in (1.0, 0.3)]  # that do not repeat themselves
    values = [first, *(first + abs(first) * wobble * share for share in shares)]
    assert (stops_at(Patience(3), values) < len(values)) == counts


def shape(best: int, after: float = 0.01, last: int = 100) -> Curve:
    """Falls by 0.01 a check up to the best one and rises behind it, while the training loss falls."""
    values = [1.0 + (0.01 * (best - step) if step < best else after * (step - best)) for step in range(1, last + 1)]
    steps = list(range(1, last + 1))
    return Curve(values, [0.9 - 0.005 * step for step in steps], steps, [float(step) for step in steps])


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (shape(10), "best at the start"),
        (shape(11), "overfitting"),
        (shape(74, after=0.0), None),
        (shape(75, after=0.0), "best at the end"),
        (shape(100), "best at the end"),
        (shape(7, last=7), None),  # too few to be read
        (shape(8, last=8), "best at the end"),
    ],
)
def test_where_the_best_check_lies(curve: Curve, expected: str | None) -> None:
    finding = reading(curve, "val_loss")
    assert (finding and finding.rule) == expected
    stopped = reading(curve, "val_loss", stopped=True)
    assert (stopped and stopped.rule) == (None if expected == "best at the end" else expected)


def test_a_metric_is_worse_by_the_least_or_has_gained_a_third_of_it() -> None:
    worse = reading(shape(40), "val_loss")
    assert worse is not None
    by = float(worse.evidence["got_worse_by"])
    gain = 0.01  # from the level of step 74 to that of the best
    for curve, least, told in (
        (shape(40), 0.99 * by, True),
        (shape(40), 1.01 * by, False),
        (shape(75, after=0.0), 2.97 * gain, True),
        (shape(75, after=0.0), 3.03 * gain, False),
    ):
        assert (reading(curve, "val_loss", least=least) is not None) == told


WOBBLE = [0.0, 1.0, 0.0, -1.0, 0.0] * 4  # the median of each five is 0


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ([2.0] * 10 + [1.0] * 10 + [1.09] * 10, False),  # a tenth of the lowest
        ([2.0] * 10 + [1.0] * 10 + [1.11] * 10, True),
        ([2.1] * 10 + [0.1] * 10 + [0.19] * 10, False),  # a twentieth of the fall
        ([2.1] * 10 + [0.1] * 10 + [0.21] * 10, True),
        ([*WOBBLE, *(3.9 * noise_of(WOBBLE) + each for each in WOBBLE)], False),
        ([*WOBBLE, *(4.1 * noise_of(WOBBLE) + each for each in WOBBLE)], True),
        ([0.0] * 3 + [1.0] * 4, False),  # too few
        ([0.0] * 4 + [1.0] * 4, True),
    ],
)
def test_a_training_loss_rises_beyond_its_noise_a_tenth_and_a_twentieth(train: list[float], told: bool) -> None:
    assert (rise(train, range(len(train))) is not None) == told


def test_what_is_said_of_a_stop_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    curve = shape(40)
    negative = replace(curve, values=[-value for value in curve.values])
    early = replace(shape(5), steps=[100 * step for step in shape(5).steps])
    still = replace(early, train=[0.5] * 100)
    few = Curve([1.0, 1.25, 1.5, 1.75], [2.0, 1.5, 1.25, 1.0], [1000, 2000, 3000, 4000], [0.5, 1.0, 1.5, 2.0])
    rising = replace(curve, train=[2.0] * 50 + [1.0] * 20 + [1.5] * 30, steps=[100 * step for step in curve.steps])
    told = [
        reading(curve, "val_loss"),
        reading(curve, "val_loss", restored=True),
        reading(curve, "val_error"),
        reading(negative, "val_score", "max"),
        reading(early, "val_loss"),
        reading(early, "val_score"),
        reading(still, "val_loss"),
        reading(few, "val_score", stopped=True),
        reading(few, "val_score", "max", stopped=True),
        reading(shape(90), "val_loss"),
        reading(rising, "val_loss"),
    ]
    verdicts = [
        Patience(2).verdict(Curve([1.0, 2.0, 3.0])),
        Patience(20, "seconds").verdict(Curve([1.0, 2.0, 3.0], seconds=[1.5, 12.0, 24.0])),
        GeneralizationLoss(5).verdict(Curve([1.0, 1.25])),
        ProgressQuotient(0.05, 2).verdict(Curve([1.0, 1.25], [1.5, 1.0])),
        SuccessiveRises(2, 1).verdict(Curve([1.0, 1.25, 1.5])),
        AllOf([Patience(2), GeneralizationLoss(5)]).verdict(Curve([1.0, 2.0, 3.0])),
    ]
    word_for_word(*told, verdicts)


LIMITS = "min_delta must be a number of at least 0, a share of the best value such as '1%', or 'auto', got"
SOME = "criteria must be some of lightning_recipes.core.early_stopping"


@pytest.mark.parametrize(
    ("error", "kind", "argument", "said"),
    [
        (ValueError, EarlyStoppingRule, "x%", f"{LIMITS} 'x%'"),
        (ValueError, EarlyStoppingRule, "-1%", f"{LIMITS} '-1%'"),
        (ValueError, EarlyStoppingRule, "inf%", f"{LIMITS} 'inf%'"),
        (ValueError, EarlyStoppingRule, "1", f"{LIMITS} '1'"),
        (ValueError, EarlyStoppingRule, -0.1, f"{LIMITS} -0.1"),
        (ValueError, EarlyStoppingRule, math.inf, f"{LIMITS} inf"),
        (TypeError, EarlyStoppingRule, True, f"{LIMITS} True"),
        (TypeError, EarlyStoppingRule, None, f"{LIMITS} None"),
        (ValueError, AnyOf, [], "criteria must have at least one, got []"),
        (TypeError, AllOf, Patience(), "criteria must be a list of criteria, got Patience(amount=3, unit='checks')"),
        (TypeError, AllOf, [Patience(), 3], f"{SOME}, got [Patience(amount=3, unit='checks'), 3]"),
        (TypeError, AnyOf, [{}], f"{SOME} (in a configuration of Hydra write _convert_: all beside), got [{{}}]"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wanted(
    error: type[Exception], kind: Any, argument: Any, said: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(said)}$"):
        kind(argument)


def test_the_defaults_are_those_that_are_documented() -> None:
    assert (Patience(), GeneralizationLoss()) == (Patience(3, "checks"), GeneralizationLoss(5.0))
    assert (ProgressQuotient(), SuccessiveRises()) == (ProgressQuotient(0.5, 5), SuccessiveRises(3, 5))
    rule = EarlyStoppingRule()
    rule.update(1.0, Patience())
    assert (rule.min_delta, rule.mode, rule.waived) == ("auto", "min", 0)
    curve = rule.curve
    assert (curve.steps, curve.epochs, curve.seconds, curve.start) == ([0], [0.0], [0.0], 1)
    assert math.isnan(curve.train[0])


def test_a_rule_says_what_the_next_value_has_to_be_better_by() -> None:
    for min_delta, least in ((0.25, 0.25), ("10%", 0.2), ("auto", 0.0)):
        rule = EarlyStoppingRule(min_delta)
        for value in (4.0, 2.0, 3.0):
            rule.update(value, Patience())
        assert rule.least_improvement == pytest.approx(least)
        assert not rule.improved
        rule.update(1.0, Patience())
        assert rule.improved
    assert EarlyStoppingRule("10%").least_improvement == 0.1  # nothing is known yet


def test_the_state_of_a_rule_has_every_list() -> None:
    rule = EarlyStoppingRule("1%", "max")
    rule.update(0.5, Patience(), 1.5, 10, 0.5, 2.5, counts=False)
    rule.update(0.75, Patience(), 1.25, 20, 1.0, 5.0)
    resumed = EarlyStoppingRule("1%", "max")
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert resumed.state_dict() == rule.state_dict() == {
        "values": [-0.5, -0.75], "train": [1.5, 1.25], "steps": [10, 20], "epochs": [0.5, 1.0],
        "seconds": [2.5, 5.0], "waived": 1,
    }  # fmt: skip
