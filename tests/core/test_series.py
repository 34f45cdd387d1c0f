import json
import math
import random
import statistics

import pytest

from lightning_recipes.core.series import BINS, Bin, Series, bin_of


def filled(values: list[float], most: int = BINS) -> Series:
    series = Series(most)
    for step, value in enumerate(values):
        series.update(step, value)
    return series


@pytest.mark.parametrize("most", [BINS, 400])
@pytest.mark.parametrize("points", [1, 2, 255, 256, 257, 400, 401, 1000, 5000])
def test_bins_have_the_statistics_of_their_points(points: int, most: int) -> None:
    draw = random.Random(points)
    values = [draw.gauss(1e6, 2.0) for _ in range(points)]
    series = filled(values, most)
    assert len(series.bins) <= most
    assert points <= series.width * most
    assert series.points == series.count == points
    start = 0
    for each in series.bins:
        own = values[start : start + each.count]
        assert (each.first, each.last) == (start, start + len(own) - 1)
        assert each.mean == pytest.approx(statistics.fmean(own), rel=1e-12)
        assert each.deviation == pytest.approx(statistics.stdev(own) if len(own) > 1 else 0.0, rel=1e-6)
        assert each.step == statistics.fmean(range(start, start + len(own)))
        assert (each.low, each.high) == (min(own), max(own))
        assert (values[each.low_at], values[each.high_at]) == (each.low, each.high)
        start += each.count
    assert start == points
    assert series.newest == values[-1]


def test_values_that_are_not_finite_are_counted_and_nothing_else() -> None:
    series = filled([1.0, math.nan, math.inf, 3.0, 1e200] * 200)
    assert (series.points, series.bad, series.count) == (1000, 600, 400)
    assert all(math.isfinite(number) for row in series.as_rows() for number in row)
    assert (min(each.low for each in series.bins), max(each.high for each in series.bins)) == (1.0, 3.0)


def test_the_newest_value_is_known_to_be_finite_or_not() -> None:
    series = filled([1.0] * 1000)
    series.update(1000, math.nan)
    assert series.newest is None
    series.update(900, 2.0)
    assert series.newest == 2.0


def test_going_back_forgets_what_is_trained_again() -> None:
    series = filled([1.0] * 100)
    assert series.update(40, 2.0)
    assert [each.last for each in series.bins] == list(range(41))
    assert not series.update(40, 3.0)
    assert series.bins[-1].mean == 3.0


def test_coarse_keeps_every_point_and_leaves_the_series_alone() -> None:
    series = filled([float(value) for value in range(200)])
    assert len(series.coarse(30)) == 25
    assert sum(each.count for each in series.coarse(30)) == 200
    assert len(series.bins) == 200


@pytest.mark.parametrize("most", [BINS, 400])
def test_plain_rows_and_back(most: int) -> None:
    series = filled([math.sin(step) for step in range(777)], most)
    again = Series.of_rows(json.loads(json.dumps(series.as_rows(), allow_nan=False)), series.width, most)
    for step in range(777, 1500):
        series.update(step, float(step))
        again.update(step, float(step))
    assert again.as_rows() == series.as_rows()


def test_plain_rows_have_all_of_a_bin() -> None:
    series = filled([2.0, 6.0, math.nan, 4.0], most=2)
    assert series.width == 2
    assert series.as_rows() == [[0, 1, 2, 4.0, 8.0, 2.0, 6.0, 0, 0, 1], [2, 3, 1, 4.0, 0.0, 4.0, 4.0, 1, 3, 3]]
    again = Series.of_rows(series.as_rows(), series.width, 2, series.newest)
    assert again.bins == series.bins
    assert (again.width, again.most, again.newest) == (2, 2, 4.0)
    bare = Series.of_rows([], 1)
    assert (bare.most, bare.newest, bare.points, bare.count, bare.bad) == (BINS, None, 0, 0, 0)
    assert BINS == Series().most == 256


def test_the_lowest_and_the_highest_are_those_that_came_first() -> None:
    series = filled([math.nan, -3.0, 5.0, -3.0, 5.0, -1.0, 1.0, 0.0], most=2)
    (low, high) = series.bins
    assert (low.low, low.low_at, low.high, low.high_at) == (-3.0, 1, 5.0, 2)
    assert (high.low, high.low_at, high.high, high.high_at) == (-1.0, 5, 5.0, 4)
    (only,) = series.coarse(1)
    assert (only.low_at, only.high_at, only.bad, only.points, only.first, only.last) == (1, 2, 1, 8, 0, 7)
    bad = filled([math.nan] * 3 + [7.0], most=2)
    assert (bad.bins[1].low, bad.bins[1].high, bad.bins[1].mean, bad.bins[1].deviation) == (7.0, 7.0, 7.0, 0.0)


def test_what_counts_as_finite_has_a_square_that_is() -> None:
    for value, count in ((9e149, 1), (-9e149, 1), (1e150, 0), (-1e150, 0)):
        point = bin_of(3, value)
        assert (point.first, point.last, point.count, point.bad) == (3, 3, count, 1 - count)


def test_a_bin_that_reaches_back_is_forgotten_as_a_whole() -> None:
    series = filled([float(value) for value in range(8)], most=4)  # two points a bin
    series.forget(6)
    assert [each.last for each in series.bins] == [1, 3, 5]
    series.forget(3)
    assert [each.last for each in series.bins] == [1]
    series.forget(0)
    assert series.bins == []
    assert not series.update(0, 1.0)


def test_a_bin_without_points_takes_them_in() -> None:
    empty = Bin(0, 0)
    for step, value in enumerate((5.0, 7.0)):
        empty.merge(bin_of(step, value))
    assert empty == Bin(0, 1, 2, 6.0, 2.0, 5.0, 7.0, 0, 0, 1)
