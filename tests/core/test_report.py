import math

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
