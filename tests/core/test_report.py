import math

import pytest
import torch

from lightning_recipes.core.report import Record


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
    assert [each.newest for each in again.series.values()] == [1 / 300, None]


def test_the_number_of_names_is_bounded() -> None:
    record = Record()
    for number in range(266):
        record.update(f"metric {number}", 0, 1.0)
    assert (len(record.series), record.left_out) == (256, 10)


@pytest.mark.parametrize("name", ["Train/LOSS", "val_acc", "epoch", "lr-Adam", "learning_rate"])
def test_what_matters_takes_the_place_of_the_newest_that_does_not(name: str) -> None:
    record = Record()
    for number in range(256):
        record.update(f"metric {number}", 0, 1.0)
        record.update(f"metric {number}", 1, 1.0)
    record.update(name, 2, 3.0)
    assert [*record] == [*(f"metric {number}" for number in range(255)), name]
    assert record.left_out == 2  # the points of the last one
    record.update("metric 255", 2, 1.0)
    record.update("metric 0", 2, 5.0)  # is there
    assert (record.left_out, record.series["metric 0"].newest, record.series[name].newest) == (3, 5.0, 3.0)


def test_there_may_be_nothing_but_what_matters() -> None:
    record = Record()
    for number in range(258):
        record.update(f"loss {number}", 0, 1.0)
    assert (len(record.series), record.left_out) == (256, 2)
    record.update("accuracy", 0, 1.0)
    assert (len(record.series), record.left_out) == (256, 3)


def test_a_state_has_the_bins_of_each_series_and_goes_on() -> None:
    whole, first, second = Record(), Record(), Record()
    for step in range(3000):
        whole.update("loss", step, float(step))
        if step < 2000:
            first.update("loss", step, float(step))
    first.left_out = 7
    state = first.state_dict()
    assert ({*state}, {*state["series"]["loss"]}) == ({"series", "left_out"}, {"width", "newest", "bins"})
    assert state["series"]["loss"]["bins"].dtype == torch.float64
    second.load_state_dict(state)
    for step in range(2000, 3000):
        second.update("loss", step, float(step))
    assert second.series["loss"].as_rows() == whole.series["loss"].as_rows()
    assert (second.series["loss"].newest, second.left_out) == (2999.0, 7)
