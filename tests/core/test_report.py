import json
import math
import random
import statistics

import pytest
import torch

from lightning_recipes.core.report import BINS, NAMES, Record, Series


def filled(values: list[float]) -> Series:
    series = Series()
    for step, value in enumerate(values):
        series.update(step, value)
    return series


@pytest.mark.parametrize("points", [1, 2, 255, 256, 257, 1000, 5000])
def test_bins_have_the_statistics_of_their_points(points: int) -> None:
    draw = random.Random(points)
    values = [draw.gauss(1e6, 2.0) for _ in range(points)]
    series = filled(values)
    assert len(series.bins) <= BINS
    assert points <= series.width * BINS
    start = 0
    for each in series.bins:
        own = values[start : start + each.count]
        assert (each.first, each.last) == (start, start + len(own) - 1)
        assert each.mean == pytest.approx(statistics.fmean(own), rel=1e-12)
        assert each.deviation == pytest.approx(statistics.stdev(own) if len(own) > 1 else 0.0, rel=1e-6)
        assert (each.low, each.high) == (min(own), max(own))
        start += each.count
    assert start == points


def test_values_that_are_not_finite_are_counted_and_nothing_else() -> None:
    series = filled([1.0, math.nan, math.inf, 3.0, 1e200] * 200)
    assert series.bad == 600
    assert sum(each.count for each in series.bins) == 400
    assert all(math.isfinite(number) for row in series.as_rows() for number in row)
    assert (min(each.low for each in series.bins), max(each.high for each in series.bins)) == (1.0, 3.0)


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


def test_plain_rows_and_back() -> None:
    series = filled([math.sin(step) for step in range(777)])
    again = Series.of_rows(json.loads(json.dumps(series.as_rows(), allow_nan=False)), series.width)
    for step in range(777, 1500):
        series.update(step, float(step))
        again.update(step, float(step))
    assert again.as_rows() == series.as_rows()


def test_a_record_is_restored_whole_and_safely(tmp_path: object) -> None:
    record = Record()
    for step in range(300):
        record.update("loss", step, 1 / (step + 1))
    record.update("broken", 0, math.nan)
    torch.save(record.state_dict(), f"{tmp_path}/state")
    again = Record()
    again.load_state_dict(torch.load(f"{tmp_path}/state", weights_only=True))
    assert str(again.state_dict()) == str(record.state_dict())
    assert {name: each.as_rows() for name, each in again.series.items()} == {
        name: each.as_rows() for name, each in record.series.items()
    }


def test_the_number_of_names_is_bounded() -> None:
    record = Record()
    for number in range(NAMES + 10):
        record.update(f"metric {number}", 0, 1.0)
    assert (len(record.series), record.left_out) == (NAMES, 10)
