import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_recipes.core.snapshots import SnapshotRule


def kept(folder: Path | None, **arguments: Any) -> tuple[SnapshotRule, list[dict[str, Any]]]:
    rule, live, truth = SnapshotRule(**arguments), {"weight": torch.randn(3), "count": torch.tensor(0)}, []
    rule.ends = [3, 5, 9]
    for update in range(1, 12):
        live["weight"] += torch.randn(3)
        live["count"] += 1
        if rule.update(update):
            truth.append({name: value.clone() for name, value in live.items()})
            rule.keep(live, folder)
    return rule, truth


@pytest.mark.parametrize("files", [False, True])
def test_each_cycle_is_kept_as_it_was(files: bool, tmp_path: Path) -> None:
    rule, truth = kept(tmp_path / "new" / "folder" if files else None)
    assert [int(state["count"]) for state in truth] == [3, 5, 9]
    assert [{name: value.tolist() for name, value in state.items()} for state in rule.states()] == [
        {name: value.tolist() for name, value in state.items()} for state in truth
    ]
    found = sorted(path.name for path in tmp_path.rglob("*.pt*"))
    assert found == (["snapshot_1.pt", "snapshot_2.pt", "snapshot_3.pt"] if files else [])
    again = SnapshotRule()
    again.load_state_dict(rule.state_dict())
    assert again.ends == [3, 5, 9]
    assert str(again.states()) == str(rule.states())
    assert not again.update(100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_memory_rounds_and_counts_stay_whole(dtype: str) -> None:
    rule, truth = kept(None, dtype=dtype)
    for state, exact in zip(rule.states(), truth, strict=True):
        assert state["weight"].dtype == getattr(torch, dtype)
        assert torch.equal(state["weight"], exact["weight"].to(state["weight"].dtype))
        assert torch.equal(state["count"], exact["count"])
        assert state["count"].dtype == torch.int64


def test_another_process_may_write_the_file(tmp_path: Path) -> None:
    rule = SnapshotRule()
    rule.keep({"weight": torch.ones(1)}, tmp_path, write=False)
    with pytest.raises(FileNotFoundError):
        rule.states()
    SnapshotRule().keep({"weight": torch.ones(1)}, tmp_path)
    assert rule.states() == [{"weight": torch.ones(1)}]


def test_what_is_no_tensor_is_copied_too() -> None:
    rule, extra = SnapshotRule("float16"), {"seen": [1]}
    rule.keep({"_extra_state": extra})
    extra["seen"].append(2)
    assert rule.states() == [{"_extra_state": {"seen": [1]}}]


def test_a_wrong_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be 'same' or"):
        SnapshotRule("float8")


def test_a_shorter_run_divides_what_is_left() -> None:
    rule, planned = SnapshotRule(), [10, 20, 30]
    rule.plan(planned, 30, 0)
    assert rule.ends is planned
    rule.plan(planned, 28, 2)
    assert rule.ends == [9, 18, 28]
    rule.keep({})
    rule.plan(planned, 25, 10)
    assert rule.ends == [9, 17, 25]
    rule.keep({})
    rule.plan(planned, 17, 17)  # nothing would be left
    assert rule.ends == [9, 17, 25]
    rule.plan(planned, 18, 17)
    assert rule.ends == [9, 17, 18]


def test_where_a_cycle_would_be_over_already_what_is_left_begins_now() -> None:
    rule = SnapshotRule()
    rule.ends = [20, 40]
    rule.keep({})
    rule.plan([15, 30, 45, 60], 60, 34)
    assert rule.ends == [20, 42, 51, 60]


def test_a_run_that_goes_on_has_more_cycles_of_that_length() -> None:
    rule = SnapshotRule()
    rule.ends = [20, 40]
    for _ in rule.ends:
        rule.keep({})
    rule.plan([30, 60], 60, 40)
    assert rule.ends == [20, 40, 60]
    rule.plan([40, 80], 200, 40)
    assert rule.ends == [20, 40, 80, 120, 160, 200]


def test_what_is_kept_is_a_copy_of_the_values_alone(tmp_path: Path) -> None:
    rule, weight = SnapshotRule(), torch.nn.Parameter(torch.ones(2))
    rule.keep({"weight": weight})
    rule.keep({"weight": weight}, tmp_path)
    with torch.no_grad():
        weight.zero_()
    for state in rule.states():
        assert (state["weight"].tolist(), state["weight"].requires_grad) == ([1.0, 1.0], False)
    assert rule.kept[1] == str(tmp_path / "snapshot_2.pt")
    assert json.loads(json.dumps({**rule.state_dict(), "kept": rule.kept[1:]})) == {
        "kept": [str(tmp_path / "snapshot_2.pt")],
        "ends": [],
    }


def test_a_folder_is_kept_whole_wherever_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rule = SnapshotRule()
    rule.keep({"weight": torch.ones(1)}, "here")
    monkeypatch.chdir("/")
    assert rule.kept == [str(tmp_path / "here" / "snapshot_1.pt")]
    assert rule.states() == [{"weight": torch.ones(1)}]


def test_the_dtypes_are_named() -> None:
    said = "dtype must be 'same' or 'bfloat16' or 'float16', got 'float8'"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        SnapshotRule("float8")
    assert SnapshotRule().dtype is None


def test_a_run_that_goes_on_for_less_than_half_a_cycle_has_one_more() -> None:
    rule = SnapshotRule()
    rule.ends = [20]
    rule.keep({})
    rule.plan([100], 110, 100)
    assert rule.ends == [20, 110]
