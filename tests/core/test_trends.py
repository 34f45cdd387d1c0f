import math
import random
import statistics
from itertools import pairwise

import pytest

from lightning_recipes.core.trends import Trend, trend


def test_the_interval_of_a_slope_has_the_truth_in_it_as_often_as_it_says() -> None:
    for correlation in (0.0, 0.9):
        within = 0
        for seed in range(400):
            chance, noise, values = random.Random(seed), 0.0, []
            for place in range(1000):
                noise = correlation * noise + chance.gauss(0, 1)
                values.append(noise - 2 * place / 1000)
            line = trend(values)
            within += abs(line.change + 2) <= line.error
        assert 0.91 <= within / 400 <= 0.99


def test_a_line_is_found_exactly() -> None:
    line = trend([5.0 - 3 * place / 40 for place in range(40)])
    assert line.change == pytest.approx(-3)
    assert line.error == pytest.approx(0, abs=1e-9)
    assert line.falls


@pytest.mark.parametrize("seed", range(6))
def test_the_error_is_that_of_the_means_of_ten_blocks_about_the_line(seed: int) -> None:
    chance = random.Random(seed)
    values = [chance.gauss(0, 1) for _ in range(150)]
    means = [statistics.fmean(values[start : start + 15]) for start in range(0, 150, 15)]
    places = [block / 10 + 0.05 for block in range(10)]
    slope, intercept = statistics.linear_regression(places, means)
    left = sum((mean - intercept - slope * place) ** 2 for place, mean in zip(places, means))
    across = sum((place - 0.5) ** 2 for place in places)
    line = trend(values)
    assert line.change == pytest.approx(slope)
    assert line.error == pytest.approx(2.306 * (left / 8 / across) ** 0.5, rel=4e-3)  # Student's t with 8 degrees
    assert line.level == pytest.approx(statistics.fmean(values))
    assert line.falls == (slope < -line.error)


def test_three_values_have_a_line_too() -> None:
    few = trend([1.0, 3.0, 2.0])
    assert few.change == pytest.approx(1.5)  # 0.5 from one to the next, over the length of three
    assert few.error < float("inf")


def test_blocks_of_values_that_are_no_multiple_of_ten() -> None:
    values = [float(place % 3) for place in range(13)]
    edges = [0, 1, 3, 4, 5, 6, 8, 9, 10, 12, 13]
    means = [statistics.fmean(values[low:high]) for low, high in pairwise(edges)]
    places = [(low + high) / 26 for low, high in pairwise(edges)]
    slope, _ = statistics.linear_regression(places, means)
    assert trend(values).change == pytest.approx(slope)


def test_a_line_falls_that_is_below_zero_with_its_interval() -> None:
    for error, falls in ((0.99, True), (1.0, False), (1.01, False)):
        assert Trend(-1.0, error, 0.0).falls is falls
    assert trend([2.0, 1.0]).error == math.inf
