import copy
import json
import math
import pickle
import re
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_recipes.core.early_stopping import EarlyStoppingRule
from lightning_recipes.core.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    CyclicCosine,
    InverseSquareRoot,
    Linear,
    OneCycle,
    PiecewiseConstant,
    PlateauRule,
    Polynomial,
    ReduceOnPlateau,
    Run,
    Schedule,
    StepDecay,
    Warmup,
    WarmupStableDecay,
)

T = 60


def close(schedule: Schedule, definition: Any, steps: int = T) -> None:
    assert schedule.curve(steps) == pytest.approx([definition(step) for step in range(steps)])


def test_schedules_are_their_definitions() -> None:
    close(Constant(), lambda t: 1.0)
    close(Cosine(), lambda t: (1 + math.cos(math.pi * t / T)) / 2)
    close(Cosine(final=0.1), lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / T)) / 2)
    close(Linear(final=0.5), lambda t: 1 - 0.5 * t / T)
    close(Polynomial(power=3), lambda t: (1 - t / T) ** 3)
    close(Polynomial(power=3, final=0.2), lambda t: 0.2 + 0.8 * (1 - t / T) ** 3)
    close(InverseSquareRoot(), lambda t: 1 / math.sqrt(t + 1))  # the lecture's a0 / sqrt(t), counted from 1
    close(StepDecay(interval=20), lambda t: 1.0 if t < 20 else 0.1 if t < 40 else 0.01)
    close(StepDecay(interval=0.25, gamma=0.5), lambda t: 0.5 ** (t // 15))
    close(PiecewiseConstant([10, "0.5 of the run"], [3.0, 0.0]), lambda t: 1.0 if t < 10 else 3.0 if t < 30 else 0.0)


def test_snapshots_get_their_cycles_as_huang_defines_them() -> None:
    for steps, cycles in ((60, 5), (61, 5), (7, 3), (5, 5), (3, 1), (11, 4)):
        period = math.ceil(steps / cycles)
        whole = steps if steps % cycles == 0 else period * (cycles - 1)
        curve = CyclicCosine(cycles).curve(steps)
        assert curve[:whole] == pytest.approx(
            [(math.cos(math.pi * ((t - 1) % period) / period) + 1) / 2 for t in range(1, whole + 1)]
        )
        left = steps - whole
        assert curve[whole:] == pytest.approx([(math.cos(math.pi * t / left) + 1) / 2 for t in range(left)])
    assert CyclicCosine(4).ends(Run(T)) == [15, 30, 45, 60]


@pytest.mark.parametrize("cycles", range(1, 12))
@pytest.mark.parametrize("steps", range(1, 40))
def test_every_cycle_ends_in_its_minimum_and_the_last_with_the_run(cycles: int, steps: int) -> None:
    schedule = CyclicCosine(cycles)
    ends = schedule.ends(Run(steps))
    curve = [schedule.factor(step, Run(steps)) for step in range(steps)]
    assert len(ends) == min(cycles, steps)
    assert ends[-1] == steps
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert end > start
        assert curve[start] == 1
        assert curve[start:end] == sorted(curve[start:end], reverse=True)
        assert curve[end - 1] == pytest.approx((1 + math.cos(math.pi * (1 - 1 / (end - start)))) / 2)
    assert schedule.factor(steps + 5, Run(steps)) == curve[-1]


def test_a_cycle_may_rise_before_it_falls() -> None:
    curve = CyclicCosine(2, warmup_steps=3).curve(20)
    assert curve[:10] == pytest.approx(curve[10:])
    assert curve[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert curve[3:10] == pytest.approx([(1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)])
    assert CyclicCosine(3, warmup_steps=5).ends(Run(18)) == [6, 12, 18]
    assert CyclicCosine(3, warmup_steps=5).ends(Run(19)) == [6, 12, 19]  # 7, 14, 19 leave no fall to the last
    assert CyclicCosine(3, warmup_steps=5).ends(Run(17)) == [9, 17]


def test_noam_is_an_inverse_square_root_behind_a_warmup_of_its_timescale() -> None:
    curve = Warmup(10, InverseSquareRoot(10)).curve(50)
    assert curve[10:] == pytest.approx([math.sqrt(10 / step) for step in range(10, 60)])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("rise", [0, 0.3, 0.5, 1])
def test_one_cycle_rises_and_falls_once_and_momentum_moves_the_other_way(rise: float, shape: Any) -> None:
    schedule, run = OneCycle(rise=rise, initial=0.1, shape=shape), Run(T)
    curve = schedule.curve(T + 1)
    top = round(rise * T)
    curve = [schedule.factor(step, run) for step in range(T + 1)]
    momenta: list[Any] = [schedule.momentum(step, run) for step in range(T + 1)]
    assert curve[top] == pytest.approx(1)
    assert momenta[top] == pytest.approx(0.85)
    assert curve[0] == pytest.approx(0.1 if rise else 1)
    assert curve[T] == pytest.approx(0 if rise < 1 else 1)
    assert curve[: top + 1] == sorted(set(curve[: top + 1]))
    assert curve[top:] == sorted(set(curve[top:]), reverse=True)
    moves = zip(pairwise(curve), pairwise(momenta), strict=True)
    assert all((after - before) * (later - sooner) < 0 for (before, after), (sooner, later) in moves)
    assert OneCycle(cycle_momentum=False).momentum(3, run) is None


def test_warmup_stable_decay_has_three_parts() -> None:
    curve = WarmupStableDecay(warmup_steps=9, decay_steps="0.25 of the run", shape="linear").curve(T)
    assert curve[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert curve[10:46] == [1.0] * 36
    assert curve[45:] == pytest.approx([1 - t / 15 for t in range(15)])
    sqrt = WarmupStableDecay(warmup_steps=0, decay_steps=15).curve(T)
    assert sqrt[45:] == pytest.approx([1 - math.sqrt(t / 15) for t in range(15)])
    assert WarmupStableDecay(warmup_steps=0, decay_steps=0).curve(5) == [1.0] * 5


@pytest.mark.parametrize("behind", SCHEDULES.values(), ids=SCHEDULES)
def test_what_is_behind_a_prepended_warmup_is_what_it_would_be_without(behind: Schedule) -> None:
    schedule = Warmup("0.25 of the run", behind)
    assert schedule.added_steps(Run(T)) == 15
    curve, alone = schedule.curve(T), behind.curve(T)
    assert len(curve) == T + 15
    assert curve[15:] == alone
    assert curve[:15] == [(t + 1) / 16 * alone[0] for t in range(15)]
    overlaid = Warmup("0.25 of the run", behind, "overlaid").curve(T)
    assert overlaid == [min(1, (t + 1) / 16) * factor for t, factor in enumerate(alone)]
    assert Warmup(5, schedule).added_steps(Run(T)) == 20
    assert schedule.momentum(15, Run(T)) == behind.momentum(0, Run(T))


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Warmup(5, Cosine())], ids=repr)
def test_a_schedule_is_data_and_ends_where_it_ends(schedule: Schedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    run = Run(T)
    factors = [schedule.factor(step, run) for step in range(T + 5, 3 * T)]
    assert all(math.isfinite(factor) and 0 <= factor <= 1 for factor in factors)
    assert schedule.curve(1)[0] > 0


def test_epochs_are_those_of_the_run() -> None:
    schedule = StepDecay(interval="2 epochs")
    assert schedule.curve(12, steps_per_epoch=3) == pytest.approx([1.0] * 6 + [0.1] * 6)
    with pytest.raises(ValueError, match="needs the length of an epoch"):
        schedule.curve(12)


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Polynomial(), CyclicCosine(), OneCycle()], ids=repr)
def test_a_run_of_unknown_length_is_refused_by_what_needs_it(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="needs the length of the run.*give the number of steps"):
        schedule.check(Run())
    for needs_none in (Constant(), InverseSquareRoot(), StepDecay(interval=5), Warmup(5)):
        needs_none.check(Run())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepDecay(interval="two"), "interval must be a number of updates"),
        (lambda: StepDecay(gamma=1.5), "gamma must be a number above 0 and below 1"),
        (lambda: PiecewiseConstant([1, 2], [0.1]), "factors must be one for each of 2 milestones"),
        (lambda: PiecewiseConstant([2, 1], [0.1, 0.1]), "milestones must rise"),
        (lambda: PiecewiseConstant([2], [-1.0]), "factors must be a number above 0"),
        (lambda: Cosine(final=2), "final must be a number above 0 and below 1"),
        (lambda: Linear(final=1.5), "final must be"),
        (lambda: Polynomial(final=-0.5), "final must be"),
        (lambda: Polynomial(power=0), "power must be"),
        (lambda: OneCycle(initial=1.5), "initial must be"),
        (lambda: StepDecay(interval=0), "interval must be"),
        (lambda: InverseSquareRoot(0), "must be a number"),
        (lambda: CyclicCosine(2, warmup_steps=-1), "warmup_steps must be"),
        (lambda: WarmupStableDecay(warmup_steps=-1, decay_steps=5), "warmup_steps must be"),
        (lambda: WarmupStableDecay(warmup_steps=5, decay_steps=-1), "decay_steps must be"),
        (lambda: WarmupStableDecay(warmup_steps=5, shape="round"), "shape must be"),  # type: ignore[arg-type]
        (lambda: ReduceOnPlateau(gamma=1.0), "gamma must be"),
        (lambda: ReduceOnPlateau(max_cuts=0), "max_cuts must be"),
        (lambda: CyclicCosine(0), "cycles must be a whole number of at least 1"),
        (lambda: OneCycle(rise=1.1), "rise must be"),
        (lambda: OneCycle(shape="square"), "shape must be 'cosine' or 'linear'"),  # type: ignore[arg-type]
        (lambda: Warmup(0), "warmup_steps must be a number above 0"),
        (lambda: Warmup(5, kind="under"), "kind must be 'prepended' or 'overlaid'"),  # type: ignore[arg-type]
        (lambda: ReduceOnPlateau(patience=0), "patience must be a whole number of at least 1"),
        (lambda: ReduceOnPlateau(min_delta="much"), "min_delta must be"),
        (lambda: ReduceOnPlateau(mode="up"), "mode must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_warmup_of_no_schedule_is_refused() -> None:
    with pytest.raises(TypeError, match="schedule must be one of"):
        Warmup(5, "cosine")  # type: ignore[arg-type]


def test_cuts_come_where_the_curve_stalls_and_can_be_repeated() -> None:
    rule = PlateauRule(ReduceOnPlateau(patience=3, gamma=0.5, min_delta=0.0, max_cuts=2))
    values = [3.0, 2.0, *[2.5] * 4, 1.5, *[1.6] * 20]
    cuts = [step for step, value in enumerate(values) if rule.update(value, 10 * step)]
    assert cuts == [4, 9]  # three checks behind the best; the count starts anew at a cut; and no third one
    assert rule.schedule == PiecewiseConstant([40, 90], [0.5, 0.25])
    again = PlateauRule(rule.asked)
    for step, value in enumerate(values[:6]):
        again.update(value, 10 * step)
    resumed = PlateauRule(ReduceOnPlateau(patience=3, gamma=0.5, min_delta=0.0, max_cuts=2))
    resumed.load_state_dict(again.state_dict())
    for step, value in enumerate(values[6:], 6):
        resumed.update(value, 10 * step)
    assert resumed.schedule == rule.schedule


def test_noise_is_no_plateau_and_a_fall_below_it_neither() -> None:
    chance = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(60, generator=chance)).tolist()
    falling = [5 - 0.05 * step + noise[step] for step in range(60)]
    rule = PlateauRule(ReduceOnPlateau(patience=5))
    assert not any(rule.update(value, step) for step, value in enumerate(falling))
    flat = [2 * math.exp(-step / 3) + 0.3 + noise[step] for step in range(60)]
    rule = PlateauRule(ReduceOnPlateau(patience=5))
    cuts = [step for step, value in enumerate(flat) if rule.update(value, step)]
    assert cuts
    assert cuts[0] > 12


UNKNOWN = (
    "the schedule needs the length of the run, which is not known here (a loader without length, or no max_steps): give"
    " the number of steps"
)


@pytest.mark.parametrize(
    ("error", "kind", "arguments", "said"),
    [
        (ValueError, PiecewiseConstant, ([1, 2], [0.5]), "factors must be one for each of 2 milestones, got (0.5,)"),
        (ValueError, PiecewiseConstant, ([2, 1], [0.5, 0.1]), "milestones must rise, got (2, 1)"),
        (ValueError, PiecewiseConstant, ([2], [-1.0]), "factors must be a number above 0, got -1.0"),
        (TypeError, PiecewiseConstant, ("2",), "milestones must be a list of durations, got '2'"),
        (TypeError, PiecewiseConstant, ([2], "2"), "factors must be a list of numbers, got '2'"),
        (ValueError, Polynomial, (0,), "power must be a number above 0, got 0"),
        (ValueError, CyclicCosine, (0,), "cycles must be a whole number of at least 1, got 0"),
        (ValueError, CyclicCosine, (1, -1), "warmup_steps must be a whole number of at least 0, got -1"),
        (ValueError, OneCycle, (1.1,), "rise must be a number above 0 and below 1, got 1.1"),
        (ValueError, OneCycle, (1, 1.1), "initial must be a number above 0 and below 1, got 1.1"),
        (ValueError, OneCycle, (1, 1, 1.1), "final must be a number above 0 and below 1, got 1.1"),
        (ValueError, OneCycle, (1, 1, 1, "round"), "shape must be 'cosine' or 'linear', got 'round'"),
        (TypeError, OneCycle, (1, 1, 1, "linear", "no"), "cycle_momentum must be True or False, got 'no'"),
        (ValueError, WarmupStableDecay, (0, 0, 2), "final must be a number above 0 and below 1, got 2"),
        (ValueError, WarmupStableDecay, (0, 0, 1, "round"), "shape must be 'linear' or 'sqrt', got 'round'"),
        (TypeError, Warmup, (5, "cosine"), "schedule must be one of lightning_recipes.core.schedules, got 'cosine'"),
        (ValueError, Warmup, (5, Cosine(), "under"), "kind must be 'prepended' or 'overlaid', got 'under'"),
        (ValueError, ReduceOnPlateau, ("loss", "min", 1), "gamma must be a number above 0 and below 1, got 1"),
        (ValueError, ReduceOnPlateau, ("loss", "min", 0.5, 0), "patience must be a whole number of at least 1, got 0"),
        (ValueError, ReduceOnPlateau, ("loss", "up"), "mode must be 'min' or 'max', got 'up'"),
        (
            ValueError,
            ReduceOnPlateau,
            ("loss", "min", 0.5, 2, 0, 0),
            "max_cuts must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wanted(
    error: type[Exception], kind: Any, arguments: Any, said: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(said)}$"):
        kind(*arguments)


@pytest.mark.parametrize("run", [Run(), Run(0)])
def test_what_needs_the_length_of_the_run_says_how_to_give_it(run: Run) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(UNKNOWN)}$"):
        Cosine().check(run)


def test_schedules_are_named_as_they_are() -> None:
    kinds = [
        Constant, Cosine, CyclicCosine, InverseSquareRoot, Linear, OneCycle, Polynomial, StepDecay, WarmupStableDecay,
    ]  # fmt: skip
    assert {name: type(schedule) for name, schedule in SCHEDULES.items()} == {
        re.sub("(?<=.)([A-Z])", r" \1", kind.__name__).lower(): kind for kind in kinds
    }


def test_the_defaults_are_those_that_are_documented() -> None:
    assert StepDecay() == StepDecay("0.3 of the run", 0.1)
    assert (Linear(), Polynomial(), Cosine()) == (Linear(0.0), Polynomial(2.0, 0.0), Cosine(0.0))
    assert InverseSquareRoot() == InverseSquareRoot(1)
    assert WarmupStableDecay() == WarmupStableDecay("0.01 of the run", "0.2 of the run", 0.0, "sqrt")
    assert CyclicCosine() == CyclicCosine(5, 0)
    assert OneCycle() == OneCycle(0.3, 0.04, 0.0, "cosine", True)
    assert Warmup(3) == Warmup(3, Constant(), "prepended")
    assert ReduceOnPlateau() == ReduceOnPlateau("val_loss", "min", 0.1, 5, "auto", 3)
    assert PiecewiseConstant().curve(2) == [1.0, 1.0]


def test_durations_are_whole_updates_and_at_least_one() -> None:
    run = Run(10, 4)
    lengths = [run.length("x", duration) for duration in (3, "2 epochs", 0.25, "0.01 of the run", "0.26 of the run")]
    assert lengths == [3, 8, 2, 1, 3]
    assert (run.passed(5), run.passed(10), run.passed(11)) == (0.5, 1.0, 1.0)


def test_warmups_that_are_laid_over_or_put_in_front_are_counted() -> None:
    run, stable = Run(100), WarmupStableDecay(warmup_steps=7)
    assert (Cosine().overlaid_steps(run), Cosine().added_steps(run), stable.overlaid_steps(run)) == (0, 0, 7)
    assert [Warmup(5, stable, "overlaid").overlaid_steps(run), Warmup(9, stable, "overlaid").overlaid_steps(run)] == [
        7,
        9,
    ]
    assert [Warmup(5, stable).overlaid_steps(run), Warmup(5, Cosine()).overlaid_steps(run)] == [7, 0]
    both = Warmup(5, Warmup(3, stable), "overlaid")
    assert (both.added_steps(run), both.overlaid_steps(run)) == (3, 7)
    assert Warmup(5, OneCycle(), "overlaid").momentum(6, run) == OneCycle().momentum(6, run)
    assert Warmup(5, OneCycle()).momentum(6, run) == OneCycle().momentum(1, run)
    assert stable.added_steps(run) == 0
    assert Cosine().momentum(3, run) is None


def test_a_check_within_a_warmup_does_not_count_and_a_metric_may_be_better_when_higher() -> None:
    rule = PlateauRule(ReduceOnPlateau(mode="max", patience=2, gamma=0.5, min_delta=0.0))
    cuts = [rule.update(0.5, 10 * check, counts=check > 2) for check in range(8)]
    assert cuts == [False] * 4 + [True, False, True, False]
    assert rule.checks.curve.steps == [10 * check for check in range(8)]
    assert rule.checks.curve.values == [-0.5] * 8
    assert rule.schedule == PiecewiseConstant([40, 60], [0.5, 0.25])
    state = json.loads(json.dumps(rule.state_dict()))
    assert str(state) == str({"milestones": [40, 60], "checks": rule.checks.state_dict()})
    resumed = PlateauRule(rule.asked)
    resumed.load_state_dict(state)
    assert [resumed.update(0.5, 80), resumed.update(0.5, 90)] == [rule.update(0.5, 80), rule.update(0.5, 90)]
    assert resumed.schedule == rule.schedule
    assert isinstance(resumed.checks, EarlyStoppingRule)
