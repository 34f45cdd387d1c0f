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
