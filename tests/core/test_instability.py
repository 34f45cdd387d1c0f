import json
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_recipes.core.instability import Instability, InstabilityRule


def healthy(steps: int = 300, seed: int = 0) -> list[tuple[float, float]]:
    """A loss that falls from 2.3 to 0.3 with some noise, and a gradient norm about 1."""
    chance = random.Random(seed)
    return [
        (0.3 + 2 * math.exp(-step / 80) + 0.05 * chance.gauss(0, 1), math.exp(0.3 * chance.gauss(0, 1)))
        for step in range(steps)
    ]


def judged(values: list[tuple[float, float]], rates: list[float] | None = None, **kwargs: Any) -> list[Instability]:
    rule = InstabilityRule()
    rates = rates or [0.1] * len(values)
    found = [rule.update(*value, rate, **kwargs) for value, rate in zip(values, rates, strict=True)]
    return [each for each in found if each is not None]


def with_event(at: int, change: Callable[[int, float, float], tuple[float, float]]) -> list[tuple[float, float]]:
    """A healthy run that ``change`` acts on from a step on, with the steps since then."""
    return [
        change(step - at, loss, norm) if step >= at else (loss, norm) for step, (loss, norm) in enumerate(healthy())
    ]


EVENTS: dict[str, tuple[Callable[[int, float, float], tuple[float, float]], str, str, int]] = {
    "NaN loss": (lambda t, loss, norm: (math.nan if t == 0 else loss, norm), "not finite", "loss", 0),
    "infinite gradient": (lambda t, loss, norm: (loss, math.inf if t == 0 else norm), "not finite", "gradient norm", 0),
    "spike": (lambda t, loss, norm: (6.0 if t == 0 else loss, norm), "spike", "loss", 0),
    "burst": (lambda t, loss, norm: (3.6 if t < 5 else loss, norm), "burst", "loss", 2),
    "explosion": (lambda t, loss, norm: (loss, 90.0 if t == 0 else norm), "exploding gradient", "gradient norm", 0),
    "divergence": (lambda t, loss, norm: (loss + 0.02 * t, norm * 1.01**t), "divergence", "loss", 60),
    "dead units": (lambda t, loss, norm: (loss + 0.3, 0.05 * norm), "vanishing gradient", "gradient norm", 10),
}  # fmt: skip


# While the loss falls as fast as at step 60, a burst at 3.6 is hardly out of the way.
CASES = [(name, at) for name in EVENTS for at in (60, 131, 200) if (name, at) != ("burst", 60)]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_each_kind_is_told_from_the_others_and_soon(name: str, at: int) -> None:
    change, kind, signal, soon = EVENTS[name]
    first, *_ = judged(with_event(at, change))
    assert (first.kind, first.signal) == (kind, signal)
    assert 0 <= first.step - at <= soon
    assert kind == "not finite" or (first.value < first.expected) == (kind == "vanishing gradient")


@pytest.mark.parametrize("name", ["spike", "burst", "explosion", "divergence"])
@pytest.mark.parametrize(("scale", "shift"), [(1000.0, 0.0), (1e-4, 0.0), (1.0, -50.0), (3.0, 1e4)])
def test_scale_and_sign_of_the_loss_do_not_matter(name: str, scale: float, shift: float) -> None:
    values = with_event(150, EVENTS[name][0])
    moved = [(scale * loss + shift, norm) for loss, norm in values]
    expected, got = judged(values), judged(moved)
    assert [(each.kind, each.step) for each in got] == [(each.kind, each.step) for each in expected]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    assert judged(healthy(600, seed)) == []


def test_heavy_tails_are_left_alone() -> None:
    chance = random.Random(1)
    for _ in range(10):
        losses = [0.5 + 2 * math.exp(-step / 100) + 0.1 * chance.lognormvariate(0, 0.8) for step in range(600)]
        assert judged([(loss, chance.lognormvariate(0, 0.8)) for loss in losses]) == []


def test_a_run_that_interpolates_is_left_alone() -> None:
    """Loss and norm fall together by orders of magnitude: nothing has vanished."""
    chance = random.Random(2)
    falls = [math.exp(-step / 30) * chance.lognormvariate(0, 0.5) for step in range(400)]
    assert judged([(2.3 * fall, fall) for fall in falls]) == []


def test_an_early_rise_is_an_early_instability() -> None:
    rising = [
        (2.3 + (0.05 * (step - 40) if step > 40 else -0.02 * step), 1.0 + 0.01 * (step % 7)) for step in range(99)
    ]
    first, *_ = judged(rising)
    assert first.kind == "early instability"


def test_a_loss_that_does_not_move_while_the_gradient_dies_slowly_makes_no_progress() -> None:
    chance = random.Random(3)
    values = [(2.3 + 0.1 * chance.gauss(0, 1), math.exp(-step / 60 + 0.2 * chance.gauss(0, 1))) for step in range(150)]
    first, *_ = judged(values)
    assert first.kind == "no progress"
    steady = [(2.3 + 0.1 * chance.gauss(0, 1), math.exp(0.2 * chance.gauss(0, 1))) for _ in range(600)]
    assert judged(steady) == []  # as in a fine-tuning with nothing to learn


def test_a_rise_before_there_are_statistics_is_an_early_instability() -> None:
    first, *_ = judged([(0.05, 1.0)] * 4 + [(1.0, 5.0)] * 10)
    assert (first.kind, first.signal) == ("early instability", "loss")
    assert first.step < 12


def test_a_learning_rate_restart_may_raise_the_loss_once() -> None:
    chance = random.Random(4)
    rates = [0.05 * (1 + math.cos(math.pi * (step % 150) / 150)) for step in range(300)]
    losses = [
        0.4 + 2 * math.exp(-step / 40) if step < 150 else 0.5 + min(0.8, (step - 150) / 20) for step in range(300)
    ]
    values = [(loss + 0.03 * chance.gauss(0, 1), math.exp(0.2 * chance.gauss(0, 1))) for loss in losses]
    assert judged(values, rates) == []
    assert [each.kind for each in judged(values)][:1] == ["divergence"]


def test_a_heavy_tail_at_a_low_loss_is_left_alone() -> None:
    """As in a fine-tuning that has nothing to gain: no loss so far says what a bad one would be."""
    for seed in range(5):
        chance = random.Random(seed)
        values = [(0.01 * chance.lognormvariate(0, 0.8), chance.lognormvariate(0, 0.8)) for _ in range(600)]
        assert judged(values) == []


def test_a_rule_whose_jumps_are_cancelled_learns_nothing_from_them() -> None:
    values = healthy(150)
    rule, untouched = InstabilityRule(cancels=True), InstabilityRule(cancels=True)
    for value in values:
        rule.update(*value)
        untouched.update(*value)
    kinds = [rule.update(6.0 + wobble % 3, 1.0) for wobble in range(25)]
    assert {found.kind for found in kinds if found} == {"spike"}
    assert len([found for found in kinds if found]) == 25
    for value in healthy(50, seed=1):
        assert (rule.update(0.6, value[1]) is None) == (untouched.update(0.6, value[1]) is None)
    assert rule.level == untouched.level


def test_outliers_never_enter_the_reference() -> None:
    rule = InstabilityRule()
    for value in healthy(150):
        rule.update(*value)
    for each in (1e6, math.nan, 1e6, math.inf, 1e6):
        assert rule.update(each, 1.0) is not None
    assert max(rule.losses.arrived) < 5
    assert rule.update(6.0, 1.0) is not None  # as far up as before


def test_median_and_deviation_are_those_of_the_last_hundred() -> None:
    rule, values = InstabilityRule(), healthy(260)
    for value in values:
        rule.update(*value)
    last = sorted(loss for loss, _ in values[-100:])
    assert rule.losses.median == last[50]
    assert rule.losses.deviation == pytest.approx((last[75] - last[25]) / 1.349)
    assert rule.norms.median == pytest.approx(sorted(math.log(norm) for _, norm in values[-100:])[50])


def test_a_learning_rate_that_rises_sharpens_the_attention() -> None:
    def creeping(t: int, loss: float, norm: float) -> tuple[float, float]:
        return loss + 0.003 * t, norm * (1 + 0.008 * t)

    delays: dict[bool, list[int]] = {True: [], False: []}
    for seed in range(10):
        values = [
            creeping(step - 150, *value) if step > 150 else value for step, value in enumerate(healthy(500, seed))
        ]
        for known in (True, False):
            rates = [0.1 * 1.02 ** max(0, step - 150) if known else 0.1 for step in range(500)]
            delays[known].append(judged(values, rates)[0].step)
    assert statistics.median(delays[True]) < statistics.median(delays[False]) - 5


def test_steps_that_a_gradscaler_skips_are_normal_until_they_are_a_storm() -> None:
    def update(step: int, value: tuple[float, float]) -> tuple[float, float]:
        return value[0], math.inf if step % 50 == 49 or step >= 200 else value[1]

    found = judged([update(step, value) for step, value in enumerate(healthy(230))], scaled=True)
    assert (found[0].kind, found[0].step) == ("GradScaler storm", 208)


def test_a_resumed_rule_goes_on_as_if_nothing_had_been() -> None:
    values = with_event(200, EVENTS["divergence"][0])
    rule = InstabilityRule()
    for value in values[:170]:
        rule.update(*value, 0.1)
    resumed = InstabilityRule()
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert [rule.update(*value, 0.1) for value in values[170:]] == [resumed.update(*v, 0.1) for v in values[170:]]
    assert str(rule.state_dict()) == str(resumed.state_dict())


def test_memory_is_constant() -> None:
    rule = InstabilityRule()
    sizes = []
    for value in healthy(1000) * 3:
        rule.update(*value)
        sizes.append(len(json.dumps(rule.state_dict())))
    assert max(sizes[1500:]) < 1.05 * max(sizes[:1500])


def test_an_update_of_few_examples_is_only_looked_at_for_nan() -> None:
    rule, values = InstabilityRule(), healthy()
    for step, (loss, norm) in enumerate(values):
        short = step % 29 == 28
        found = rule.update(loss + 8 * short, norm * (50 if short else 1), examples=2 if short else 32)
        assert found is None
    assert max(rule.losses.arrived) < 3
    assert rule.update(8.0, 50.0, examples=20) is not None
    found = rule.update(math.nan, 1.0, examples=2)
    assert found is not None
    assert found.kind == "not finite"


def test_a_burst_that_does_not_end_is_a_divergence_once_and_the_rest_is_normal() -> None:
    found = judged(with_event(200, lambda t, loss, norm: (loss + 2.0, norm)))
    kinds = [each.kind for each in found]
    assert kinds[0] == "burst"
    assert kinds.count("divergence") == 1
    assert kinds[-1] == "divergence"
    assert found[-1].step <= 240


def test_a_loss_that_reaches_zero_has_not_lost_its_gradient() -> None:
    weight, run = torch.tensor(1.0), []
    for _ in range(450):  # gradient descent on a parabola: the square is 0 long before the weight is
        run.append((float(weight**2), float(2 * weight)))
        weight *= 0.8
    assert run[-1][0] == 0 < run[-1][1]
    assert judged(run) == []


@pytest.mark.parametrize("seed", range(5))
def test_what_is_not_finite_or_explodes_is_striking_and_little_else(seed: int) -> None:
    chance, rule, struck, exploded = random.Random(seed), InstabilityRule(), 0, 0
    for step, (loss, norm) in enumerate(healthy(400, seed)):
        event = chance.random() if step > 40 else 1.0
        loss, norm = (loss * 3, norm * 40) if event < 0.01 else (loss, math.nan) if event < 0.02 else (loss, norm)
        striking = rule.is_striking(loss, norm)
        found = rule.update(loss, norm, 0.1)
        struck += striking
        if found is not None and found.kind in ("not finite", "exploding gradient"):
            assert striking
            exploded += 1
    assert exploded > 0
    assert struck < exploded + 45
    for _ in range(2):  # looked at again before the next update
        assert not rule.is_striking(loss, rule_norm(rule))
        for broken in (math.inf, -math.inf, math.nan):
            assert rule.is_striking(broken, rule_norm(rule))
        assert rule.is_striking(loss, math.inf)
        assert rule.is_striking(loss, math.nan)


def test_what_is_striking_goes_with_the_norms() -> None:
    rule = InstabilityRule()
    for step, (loss, norm) in enumerate(healthy(600)):
        factor = math.exp(-step / 100)
        rule.is_striking(loss, factor * norm)
        rule.update(loss, factor * norm, 0.1)
        if step > 40:
            assert not rule.is_striking(0.3, rule_norm(rule))
        assert rule.is_striking(0.3, 1.0) or 20 < step < 400


def rule_norm(rule: InstabilityRule) -> float:
    """A usual one."""
    return math.exp(rule.norms.median)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.5])
def test_a_training_that_goes_to_its_minimum_has_no_vanishing_gradient(rate: float) -> None:
    torch.manual_seed(0)
    model, inputs, targets, rule = nn.Linear(8, 1), torch.randn(64, 8), torch.randn(64, 1), InstabilityRule()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(200):  # the same batch each time
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None]))
        assert rule.update(loss.item(), norm, rate) is None
        optimizer.step()


def test_a_gradient_that_vanishes_without_a_gain_is_told_however_quiet_the_loss_is() -> None:
    rule = InstabilityRule()
    kinds = {found.kind for step in range(100) if (found := rule.update(2.3 - step / 1e4, math.exp(-step / 10)))}
    assert "vanishing gradient" in kinds


def test_what_is_cancelled_thirty_times_in_a_row_is_what_the_training_is_now() -> None:
    rule = InstabilityRule(cancels=True)
    values = [(loss + 6 if step >= 150 else loss, norm) for step, (loss, norm) in enumerate(healthy(350))]
    every = [rule.update(*value) for value in values]
    kinds = [found and found.kind for found in every]
    given_up = every[179]
    assert given_up is not None
    assert given_up.expected == pytest.approx(0.6 + 0.3 * (2.3 - 0.6), abs=0.1)  # 0.3 of the gain above the best level
    assert kinds[150:179] == ["spike"] * 29
    assert (kinds[179], set(kinds[180:])) == ("divergence", {None})
    assert not rule.gave_up  # a hundred updates had no jump
    assert rule.update(60.0, 500.0).kind == "spike"  # type: ignore[union-attr]


def test_what_is_cancelled_again_and_again_belongs_to_the_training() -> None:
    rule = InstabilityRule(cancels=True)
    kinds = []
    for step, (loss, norm) in enumerate(healthy(600)):
        rare = step > 100 and step % 20 == 7
        found = rule.update(20 * loss if rare else loss, 20 * norm if rare else norm)
        kinds.append(found and found.kind)
    jumps = [kind for kind in kinds if kind not in (None, "divergence")]
    assert len(jumps) == 4
    assert kinds.index("divergence") == 187
    assert rule.gave_up
    assert rule.update(math.nan, 1.0).kind == "not finite"  # type: ignore[union-attr]


def test_an_update_without_a_gradient_is_none_to_compare_others_with() -> None:
    rule = InstabilityRule()
    waits = [(0.0, 0.0)] * 200  # as of a discriminator whose loss counts later
    assert [rule.update(*value) for value in [*waits, *healthy(200)]] == [None] * 400
    assert judged([value for each in healthy(300) for value in (each, (0.0, 0.0))]) == []
    last, *_ = judged([*healthy(100), *[(2.3, 0.0)] * 40])
    assert last.kind == "vanishing gradient"


def test_the_usual_number_of_examples_is_the_median_of_the_last() -> None:
    rule = InstabilityRule()
    for step, value in enumerate(healthy(200)):
        rule.update(*value, examples=256 if step % 6 == 0 else 64)
    assert rule.update(60.0, 500.0, examples=16) is None
    assert rule.update(60.0, 500.0, examples=64).kind == "spike"  # type: ignore[union-attr]


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_loss_that_gains_little_and_settles_has_no_vanished_gradient(offset: float) -> None:
    """As of a linear regression on all data at once."""
    falls = [math.exp(-step / 15) for step in range(200)]
    assert judged([(1 + offset + 0.08 * fall**2, fall + 1e-4) for fall in falls]) == []


def test_rounding_is_no_noise() -> None:
    """Nothing moves at a learning rate of 0, but the last digit."""
    waits = [(2.3 + 1e-7 * (step % 2), 1.0) for step in range(60)]
    assert judged([*waits, (2.3 + 8e-7, 1.0), (2.3 + 9e-7, 1.0), (2.3 + 8e-7, 1.0)]) == []


def settled(steps: int = 200) -> list[tuple[float, float]]:
    """A loss of 2 that falls to 1 at once: a gain of 1, and noise of a hundredth of it."""
    chance = random.Random(0)
    return [(2.0 if step < 5 else 1 + 0.01 * chance.gauss(0, 1), 1.0) for step in range(steps)]


def fading(updates: int) -> list[tuple[float, float]]:
    """A norm that falls to a seventh in so many updates, and stays there."""
    return [(loss, (1 / 7) ** min(1.0, t / updates)) for t, (loss, _) in enumerate(settled(100)[5:])]


@pytest.mark.parametrize(
    ("before", "then", "expected"),
    [
        (settled(), [(3.05, 1.0)], "spike"),  # twice the gain
        (settled(), [(2.95, 1.0)], None),
        (settled(), [(2.95, 1.0)] * 2, "burst"),  # two high above
        (settled(), [(2.1, 1.0)] * 2, None),
        (settled(), [(2.1, 1.0), (1.0, 1.0), (2.1, 1.0), (2.1, 1.0)], "burst"),  # three of four
        (settled(), [(2.1, 1.0), (1.0, 1.0), (2.1, 1.0), (1.0, 1.0), (2.1, 1.0)], None),
        (settled(), [(1.33, 1.0)] * 80, "divergence"),  # a third of the gain given back
        (settled(), [(1.27, 1.0)] * 80, None),
        (settled(), [(loss, 0.19) for loss, _ in settled(50)[5:]], "vanishing gradient"),  # to a fifth
        (settled(), [(loss, 0.21) for loss, _ in settled(50)[5:]], None),
        (settled(), [(loss / 10, 0.019) for loss, _ in settled(50)[5:]], "vanishing gradient"),  # of what the loss does
        (settled(), [(loss / 10, 0.021) for loss, _ in settled(50)[5:]], None),
        (settled(), fading(45), "vanishing gradient"),
        (settled(), fading(65), None),  # more than fifty
        ([(1.0, 1.0)] * 5, [(5.1, 1.0)] * 20, "early instability"),  # fivefold
        ([(1.0, 1.0)] * 5, [(4.9, 1.0)] * 20, None),
    ],
)
def test_the_bounds_are_those_of_the_table(
    before: list[tuple[float, float]], then: list[tuple[float, float]], expected: str | None
) -> None:
    kinds = [each.kind for each in judged(before + then)]
    assert expected in kinds if expected else kinds == []


@pytest.mark.parametrize(("skips", "storm"), [(9, False), (10, True)])
def test_a_storm_is_ten_of_the_last_twenty(skips: int, storm: bool) -> None:
    values = [(loss, math.inf if step < skips else norm) for step, (loss, norm) in enumerate(healthy(40))]
    assert ([each.kind for each in judged(values[::-1], scaled=True)] == ["GradScaler storm"]) == storm


@pytest.mark.parametrize(("examples", "seen"), [(15, False), (16, True)])
def test_an_update_of_half_the_usual_examples_is_judged(examples: int, seen: bool) -> None:
    rule = InstabilityRule()
    for value in healthy(150):
        rule.update(*value, examples=32)
    assert (rule.update(60.0, 500.0, examples=examples) is not None) == seen


def test_a_divergence_within_the_first_hundred_updates_is_an_early_instability() -> None:
    kinds = {}
    for onset in range(65, 75):
        rises = [(2.5, norm) if step >= onset else (loss, norm) for step, (loss, norm) in enumerate(settled())]
        found = [each for each in judged(rises) if each.kind not in ("spike", "burst")]
        kinds[found[0].step] = found[0].kind
    assert (kinds[99], kinds[100]) == ("early instability", "divergence")
    assert all((kind == "early instability") == (step < 100) for step, kind in kinds.items())


def swinging(steps: int = 200) -> list[tuple[float, float]]:
    """A loss of 2 that falls to 1 at once and swings by 0.01 about it, with a norm of 1."""
    return [(2.0, 1.0)] * 5 + [(1.01 if step % 2 else 0.99, 1.0) for step in range(steps - 5)]


BOUND = 1.01 + 6 * 0.02 / 1.349  # six deviations above the median of the last hundred


@pytest.mark.parametrize(
    ("before", "then", "kind", "signal", "value", "expected"),
    [
        (swinging(), [(3.5, 1.0)], "spike", "loss", 3.5, BOUND),
        (swinging(), [(2.5, 1.0)] * 2, "burst", "loss", 2.5, BOUND),
        (swinging(), [(1.0, 20.0)], "exploding gradient", "gradient norm", 20.0, math.exp(0.6)),
        (swinging(), [(1.0, 0.125)] * 20, "vanishing gradient", "gradient norm", 0.125, 0.2),
        ([(1.0, 1.0)] * 5, [(6.0, 1.0)] * 20, "early instability", "loss", 6.0, 5.0),
        ([(1.0, 1.0), (1.0, 1.0), (1.25, 1.0)], [(6.5, 1.0)] * 20, "early instability", "loss", 6.5, 6.25),
        ([(1.0, 1.0)] * 3, [(1.25, 1.0)] * 2 + [(5.5, 1.0)] * 20, "early instability", "loss", 5.5, 5.0),
        (swinging(), [(math.nan, 1.0)], "not finite", "loss", math.nan, math.inf),
        (swinging(), [(1.0, math.inf)], "not finite", "gradient norm", math.inf, math.inf),
    ],
)
def test_what_is_told_has_its_value_and_what_would_have_been_normal(
    before: list[tuple[float, float]],
    then: list[tuple[float, float]],
    kind: str,
    signal: str,
    value: float,
    expected: float,
) -> None:
    first, *_ = judged(before + then)
    assert (first.kind, first.signal) == (kind, signal)
    assert (first.value, first.expected) == (pytest.approx(value, nan_ok=True), pytest.approx(expected))
    assert len(before) <= first.step < len(before) + len(then)


def test_a_divergence_is_told_with_the_level_and_what_may_be_given_back() -> None:
    found = judged(swinging() + [(1.4, 1.0)] * 80)
    told = next(each for each in found if each.kind == "divergence")
    assert told.signal == "loss"
    assert told.expected == pytest.approx(1.3, abs=0.01)
    assert told.value == pytest.approx(1.4 - 0.4 * 0.95**31, abs=0.001)  # a moving average, once the burst is over


def test_no_progress_is_told_once_with_the_loss_at_the_start() -> None:
    rule, found = InstabilityRule(), []
    for step in range(300):
        told = rule.update(2.25 + (0.1 if step % 2 else -0.1), math.exp(-step / 60))
        found += [] if told is None else [told]
    first, *others = found
    assert (first.kind, first.signal) == ("no progress", "loss")
    assert first.expected == pytest.approx((2 * 2.35 + 3 * 2.15) / 5)
    assert first.value == pytest.approx(2.25, abs=0.02)
    assert all(other.step - first.step >= 100 for other in others)  # it started anew


def test_a_norm_is_striking_from_six_deviations_on() -> None:
    rule = InstabilityRule()
    for step, value in enumerate(swinging(60)):
        assert rule.is_striking(*value) == (step < 30)
        rule.update(*value)
    assert not rule.is_striking(1.0, 0.99 * math.exp(0.6))
    assert rule.is_striking(1.0, 1.01 * math.exp(0.6))
    huge = InstabilityRule()
    for _ in range(60):
        huge.update(1.0, 1e305)
    assert not huge.is_striking(1.0, 9e303)


def test_the_state_is_all_but_what_was_asked_and_what_comes_of_the_norms() -> None:
    rule = InstabilityRule(cancels=True)
    for value in swinging(60):
        rule.update(*value, 0.1, examples=8)
    state = rule.state_dict()
    assert {*state} == {*vars(rule)} - {"cancels", "striking"}
    assert state["examples"] == [8] * 60
    assert (state["step"], state["seen"], state["first"], state["highest"]) == (60, 60, 2.0, 2.0)
    loaded = InstabilityRule(cancels=True)
    loaded.update(9.0, 9.0)
    loaded.load_state_dict(json.loads(json.dumps(state)))
    assert (loaded.cancels, loaded.is_striking(1.0, 1.0)) == (True, False)
    assert str(loaded.state_dict()) == str(state)
    assert type(loaded.top) is tuple
    assert {type(each) for each in (*loaded.short, *loaded.recent)} == {tuple}
