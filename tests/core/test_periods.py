import json
import math
import random
import statistics
from collections.abc import Callable

import pytest

from lightning_recipes.core.periods import EpochProfile


def epochs_of(pattern: Callable[[int], float], epochs: int, batches: int = 40, seed: int = 0) -> EpochProfile:
    profile, chance = EpochProfile(), random.Random(seed)
    for epoch in range(epochs + 1):
        for batch in range(batches):
            profile.add(pattern(batch) * 0.8**epoch + chance.gauss(0, 0.1), batch / batches)
    return profile


def test_a_shared_pattern_is_told_from_chance() -> None:
    assert epochs_of(lambda batch: 1.0, 5).period() is None
    periods = [epochs_of(lambda batch: 1.0, 10, seed=seed).period() for seed in range(300)]
    assert statistics.fmean(period.chance for period in periods if period) == pytest.approx(6, abs=0.6)
    assert max(period.chance for period in periods if period) < 26
    sorted_data = epochs_of(lambda batch: float(batch // 10 % 2), 10).period()
    assert sorted_data is not None
    assert sorted_data.chance > 50
    assert sorted_data.neighbours > 5
    slope = epochs_of(lambda batch: batch / 40, 10).period()  # as where each epoch is a little worse at its end
    assert slope is not None
    assert slope.chance < 26


def test_what_epochs_share_is_its_definition() -> None:
    losses = [[random.Random(40 * epoch + batch).random() for batch in range(40)] for epoch in range(14)]
    profile, resumed = EpochProfile(), EpochProfile()
    for epoch, each in enumerate(losses):
        for batch, loss in enumerate(each):
            profile.add(loss, batch / 40)
            profile.add(math.inf, batch / 40)
            profile.add(100.0, math.nan)
            resumed.add(loss, batch / 40)
            if (epoch, batch) == (8, 17):
                state = json.loads(json.dumps(resumed.state_dict()))
                resumed = EpochProfile()
                resumed.load_state_dict(state)
    assert resumed.state_dict() == profile.state_dict()
    shapes, between, within = [], [], []
    for each in losses[3:13]:  # the last ten that are over
        means = [statistics.fmean(each[start : start + 5]) for start in range(0, 40, 5)]
        slope, intercept = statistics.linear_regression(range(8), means)
        shape = [mean - intercept - slope * phase for phase, mean in enumerate(means)]
        shapes.append(shape)
        between.append(5 * sum(value**2 for value in shape) / 6)
        within.append(statistics.fmean(statistics.variance(each[start : start + 5]) for start in range(0, 40, 5)))
    units = [[value / math.dist(shape, [0] * 8) for value in shape] for shape in shapes]
    shared = sum(statistics.fmean(phase) ** 2 for phase in zip(*units))
    pattern = [statistics.fmean(phase) for phase in zip(*shapes)]
    period = profile.period()
    assert period is not None
    assert period.size == pytest.approx(max(pattern) - min(pattern))
    assert period.chance == pytest.approx(6 * 10 * shared)
    assert period.neighbours == pytest.approx(statistics.fmean(between) / statistics.fmean(within))


def test_epochs_that_say_nothing_are_left_out() -> None:
    short, holes, level, exact = (EpochProfile() for _ in range(4))
    for _ in range(8):
        for batch in range(16):
            if batch % 2:
                short.add(random.Random(batch).random(), batch / 16)  # one loss in each eighth
            if batch != 4:
                holes.add(random.Random(batch).random() if batch != 5 else math.nan, batch / 16)
            level.add(1.0, batch / 16)
            exact.add(float(batch // 4 % 2), batch / 16)
    assert short.period() is holes.period() is level.period() is None
    assert not short.profiles
    assert not holes.profiles
    assert [epochs_of(float, epochs).period() is None for epochs in (5, 6)] == [True, False]
    found = exact.period()
    assert found is not None
    assert found.neighbours == math.inf


def test_an_epoch_of_nine_batches_says_something() -> None:
    profile = EpochProfile()
    for epoch in range(12):
        for batch in range(9):
            profile.add(float(epoch + batch % 2), batch / 9)
        assert len(profile.profiles) == min(epoch, 10)
    found = profile.period()
    assert found is not None
    assert found.chance == pytest.approx(6 * 10)  # all are alike
