import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import Regression, quiet_trainer, regression_data
from pages import Page
from torch import Tensor

from lightning_recipes.__main__ import main
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.series import Series
from lightning_recipes.report.page import render
from lightning_recipes.report.reading import NoRun, find_run, plain, read_findings, read_run
from lightning_recipes.report.run import Run
from lightning_recipes.report.story import best

FINDING = Finding("spike", "warning", "The loss was 9.", "Warm up.", 12, {"value": 9.0}).as_dict()


class Logs(Regression):
    def __init__(self, width: int = 3, note: str = "<script>", shape: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss


def train(logger: Any, folder: Path, epochs: int = 3, **settings: Any) -> pl.Trainer:
    trainer = quiet_trainer(folder, max_epochs=epochs, logger=logger, log_every_n_steps=2, **settings)
    trainer.fit(Logs(), regression_data(), regression_data(2))
    return trainer


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_run_that_never_used_a_recipe_gives_a_useful_page(kind: Any, tmp_path: Path) -> None:
    trainer = train(kind(tmp_path), tmp_path)
    run = read_run(Path(str(trainer.log_dir)))
    assert {"train_loss", "val_loss"} <= set(run.series)
    assert (len(run.series["train_loss"].bins), len(run.series["val_loss"].bins)) == (18, 3)
    assert run.hyperparameters == {"note": "<script>", "shape": "[1, 2]", "width": "3"}
    assert run.updates == 36
    top = best(run)
    assert top is not None
    assert top.value == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-5)
    html, markdown = render(run)
    assert "Best val_loss" in Page(html).text
    assert "## Curves" in markdown


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_two_loggers_in_a_folder_are_read_once(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, version=0), CSVLogger(tmp_path, version=0)]
    run = read_run(Path(str(train(loggers, tmp_path).log_dir)))
    assert len(run.series["train_loss"].bins) == 18


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_killed_run_is_read_up_to_there(tmp_path: Path) -> None:
    folder = Path(
        str(train([TensorBoardLogger(tmp_path, version=0), CSVLogger(tmp_path, version=0)], tmp_path).log_dir)
    )
    events = next(folder.glob("events*"))
    events.write_bytes(events.read_bytes()[:-7])
    metrics = folder / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-4] + b"\0\0")
    lines = [json.dumps(FINDING), json.dumps(FINDING)[:30]]
    (folder / "findings.jsonl").write_text("\n".join(lines))
    (folder / "hparams.yaml").write_text("width: [3")
    (folder / "report.json").write_text('{"series"')
    run = read_run(folder)
    assert run.findings == [Finding(**FINDING)]
    assert len(run.series["train_loss"].bins) >= 17
    assert len(run.notes) == 4
    assert "damaged" in Page(render(run)[0]).text


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"nonsense" * 50, bytes(range(256)) * 20])
def test_files_of_nonsense_are_no_reason_to_fail(damage: bytes, tmp_path: Path) -> None:
    for name in (
        "events.out.tfevents.1",
        "metrics.csv",
        "findings.jsonl",
        "hparams.yaml",
        "report.json",
        "ensemble.md",
    ):
        (tmp_path / name).write_bytes(damage)
    run = read_run(tmp_path)
    assert run.findings == []
    Page(render(run)[0])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"rule": 1}',
        "[" * 100_000,
        *(
            json.dumps({**FINDING, **change})
            for change in (
                {"step": None},
                {"step": 10**400},
                {"evidence": None},
                {"evidence": [1]},
                {"evidence": {"decision": ["x"]}},
                {"source": None},
            )
        ),
    ],
    ids=lambda line: line[:20],
)
def test_lines_that_are_no_findings_are_left_out(line: str, tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").write_text(f"{json.dumps(FINDING)}\n{line}\n{json.dumps({**FINDING, 'new': 1})}\n")
    notes: list[str] = []
    found = read_findings(tmp_path / "findings.jsonl", notes=notes)
    assert found == [Finding(**FINDING)] * 2
    assert notes == ["1 damaged line of findings.jsonl left out."]


def test_objects_among_the_hyper_parameters_become_text(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text(
        "a: !!python/tuple [1, 2]\nb: !!python/object:os.Thing {x: 1}\nc: !!python/name:torch.nn.ReLU ''\n"
        "d: {e: {f: 1}}\ng: !!python/object/apply:os.system ['touch pwned']\n"
    )
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    found = read_run(tmp_path).hyperparameters
    assert found["a"] == "[1, 2]"
    assert found["d.e.f"] == "1"
    assert "torch.nn.ReLU" in found["c"]
    assert not Path("pwned").exists()


@pytest.mark.parametrize("text", ["date: 2024-13-45", "a: &a\n  b: *a", "a: " + "[" * 3000, "? [a]\n: 1", "a: !!int x"])
def test_settings_that_cannot_be_read_are_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text(text)
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    run = read_run(tmp_path)
    assert (run.hyperparameters, run.notes) == ({}, ["hparams.yaml is damaged and was left out."])


@pytest.mark.parametrize(
    "change",
    [
        {"setup": "x"},
        {"resumed": 3},
        {"resumed": ["x"]},
        {"steps": "12"},
        {"name": 3},
        {"costs": {"a": 1}},
        {"findings": [3]},
        {"series": {"loss": {"width": 1, "newest": 1.0, "bins": [["a"] * 10]}}},
        {"findings_from": -1},
        {"findings_from": "x"},
    ],
    ids=str,
)
def test_a_state_of_another_tool_is_left_out(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    state = {**Run().as_dict(), "findings_from": 0}
    for values, notes in (({**state, **change}, 1), ({}, 1), (change, 1), (state, 0)):
        (tmp_path / "report.json").write_text(json.dumps(values))
        run = read_run(tmp_path)
        assert len(run.notes) == notes
        Page(render(run)[0])


def test_steps_beyond_all_bounds_are_no_trouble(tmp_path: Path) -> None:
    for rows, steps in (("0,1\n1e300,2\n", 1), ("1e18,1\n", 10**18 + 1), ("0,1\n1e18,1\n", 10**18 + 1)):
        (tmp_path / "metrics.csv").write_text(f"step,loss\n{rows}")
        run = read_run(tmp_path)
        assert run.updates == steps
        Page(render(run)[0])


def test_a_table_with_an_open_quote_is_read_up_to_there(tmp_path: Path) -> None:
    rows = [f"{step},{step}" if step != 100 else '100,"1' for step in range(20_000)]
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "\n".join(rows))
    run = read_run(tmp_path)
    assert run.updates == 100
    assert "read up to line" in run.notes[0]


def test_half_a_character_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").write_text(json.dumps({**FINDING, "message": "\ud83d cut"}))
    assert main(["report", str(tmp_path)]) == 0
    assert "? cut" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_large_parts_of_the_settings_are_one_line() -> None:
    vocabulary = {f"token{number}": number for number in range(30_000)}
    made = plain({"data": {"vocabulary": vocabulary, "size": 3}})
    assert [*made] == ["data.vocabulary", "data.size"]
    assert len(made["data.vocabulary"]) == 200


def test_no_hyper_parameters_are_none() -> None:
    assert plain({}) == {}
    assert plain({"net": {}}) == {"net": "{}"}


def test_long_values_are_cut() -> None:
    assert len(plain({"a": "x" * 10_000})["a"]) == 200


def test_a_resumed_run_shows_both_parts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer = train(logger, tmp_path, epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = quiet_trainer(tmp_path, max_epochs=4, logger=TensorBoardLogger(tmp_path, version=0), log_every_n_steps=2)
    again.fit(Logs(), regression_data(), regression_data(2), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    run = read_run(Path(str(again.log_dir)))
    assert len(run.series["train_loss"].bins) == 24
    assert run.resumed == [25]


def write_events(folder: Path, points: dict[int, dict[str, float]]) -> Path:
    """One event file; those of a second have the order in which they are written."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    before = {*folder.glob("events*")}
    writer = EventFileWriter(str(folder))
    for step, values in points.items():
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        writer.add_event(Event(step=step, wall_time=1.0, summary=Summary(value=scalars)))
    writer.close()
    (path,) = {*folder.glob("events*")} - before
    return path


def test_the_order_of_event_files_survives_a_copy(tmp_path: Path) -> None:
    parts = [write_events(tmp_path, {step: {"loss": 1.0} for step in steps}) for steps in (range(50), range(50, 100))]
    for number, path in enumerate(parts):
        path = path.rename(path.with_name(f"events.out.tfevents.100{number}.host"))
        os.utime(path, (1000 - number, 1000 - number))
    run = read_run(tmp_path)
    assert (run.updates, run.series["loss"].count, run.resumed) == (100, 100, [50])


def test_a_test_after_the_training_is_no_part_of_it(tmp_path: Path) -> None:
    for number, points in enumerate(
        ({step: {"loss": 1.0, "epoch": 0.0} for step in range(50)}, {50: {"test_loss": 1.0, "epoch": 1.0}})
    ):
        write_events(tmp_path, points).rename(tmp_path / f"events.out.tfevents.100{number}.host")
    run = read_run(tmp_path)
    assert (run.updates, run.resumed) == (50, [])
    assert "test_loss" in run.series


def test_a_damaged_event_file_says_how_much_of_it_is_lost(tmp_path: Path) -> None:
    path = write_events(tmp_path, {step: {"loss": 1.0} for step in range(100)})
    whole = read_run(tmp_path)
    assert (whole.updates, whole.notes) == (100, [])
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 255
    path.write_bytes(contents)
    run = read_run(tmp_path)
    assert 40 < run.updates < 60
    assert "bytes could not be read" in run.notes[0]


def test_what_matters_is_read_among_more_names_than_are_kept(tmp_path: Path) -> None:
    names = [*(f"layer{number}" for number in range(400)), "val_loss"]
    (tmp_path / "metrics.csv").write_text(",".join(["step", *names]) + "\n" + ",".join(["7", *["1.0"] * 401]) + "\n")
    run = read_run(tmp_path)
    assert "val_loss" in run.series
    assert run.notes == ["More names were logged than are kept: 145 values are left out."]


def test_a_killed_run_has_the_updates_of_its_log_and_no_stale_costs(tmp_path: Path) -> None:
    kept = Run(ended="running", steps=20, resumed=[10], costs={"wall time": "3 s", "peak memory": "1 GiB"})
    kept.series["loss"] = Series()
    kept.series["loss"].update(10, 1.0)
    (tmp_path / "report.json").write_text(json.dumps({**kept.as_dict(), "findings_from": 0}))
    assert read_run(tmp_path).updates == 20
    for steps in (range(10), range(10, 100)):
        write_events(tmp_path, {step: {"loss": 1.0} for step in steps})
    run = read_run(tmp_path)
    assert (run.updates, run.series["loss"].count, run.resumed) == (100, 100, [10])
    assert "wall time" not in run.costs
    assert "peak memory" in run.costs


def test_a_value_that_was_kept_and_logged_is_one(tmp_path: Path) -> None:
    kept = Run()
    kept.series["val_loss"] = Series()
    kept.series["val_loss"].update(19, 1.0)
    (tmp_path / "report.json").write_text(json.dumps({**kept.as_dict(), "findings_from": 0}))
    (tmp_path / "metrics.csv").write_text("step,val_loss\n19,1.0\n")
    assert read_run(tmp_path).series["val_loss"].count == 1


def test_a_finding_that_was_told_again_after_a_resume_is_one(tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").write_text(f"{json.dumps(FINDING)}\n" * 2)
    assert len(read_run(tmp_path).findings) == 1


def test_a_run_with_readable_curves_has_a_reading(tmp_path: Path) -> None:
    rows = [f"{step},{step // 10},{2 / (1 + step / 50):.4f}," for step in range(0, 600, 5)]
    rows += [f"{step},{step // 10},,{1 + abs(step - 200) / 300:.4f}" for step in range(9, 600, 10)]
    (tmp_path / "metrics.csv").write_text("step,epoch,train_loss,val_loss\n" + "\n".join(rows))
    assert [each.rule for each in read_run(tmp_path).findings] == ["overfitting"]


def test_the_newest_of_several_runs_is_taken(tmp_path: Path) -> None:
    for number, age in ((0, 10), (1, 1000)):
        folder = tmp_path / "logs" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,loss\n0,1.0\n")
        os.utime(folder / "metrics.csv", (1e9 - age, 1e9 - age))
    assert find_run(tmp_path) == (tmp_path / "logs" / "version_0", 2)
    assert find_run(tmp_path / "logs" / "version_1") == (tmp_path / "logs" / "version_1", 1)


def test_what_a_run_has_below_it_is_its_own_and_newer_runs_below_are_not_hidden(tmp_path: Path) -> None:
    run = tmp_path / "logs" / "version_0"
    for name, age in (
        ("findings.jsonl", 90),
        ("logs/version_0/events.out.tfevents.1.host", 50),
        ("logs/version_0/loss_train/events.out.tfevents.2.host", 10),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (run / "hparams.yaml").write_text("{}")
    assert find_run(tmp_path) == (run, 2)
    assert find_run(run) == (run, 1)
    os.utime(tmp_path / "findings.jsonl", (1e9, 1e9))
    assert find_run(tmp_path) == (tmp_path, 2)


def test_where_there_is_no_run_the_error_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for folder, said in ((tmp_path, "looked for"), (tmp_path / "no", "does not exist"), (tmp_path / "file", "a file")):
        with pytest.raises(NoRun, match=said):
            find_run(folder)
        assert main(["report", str(folder)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    assert "report" in capsys.readouterr().err


def test_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,step,train_loss\n0,0,2.0\n0,50,1.0\n")
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "lightning_recipes",
        "report",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "out" / "report.html")
    Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "train\\_loss: 2 → 1" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_scalars_of_newer_writers_and_histograms_are_read(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    histogram = HistogramProto(min=0.1, max=3.0, num=3, bucket_limit=[1.0, 3.0], bucket=[2.0, 1.0])
    text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    values = [
        Summary.Value(tag="loss", metadata=metadata, tensor=make_tensor_proto(0.5)),
        Summary.Value(tag="words", metadata=text, tensor=make_tensor_proto("hello")),
        Summary.Value(tag="grad_norm", histo=histogram),
    ]
    writer = EventFileWriter(str(tmp_path))
    writer.add_event(Event(step=7, wall_time=1.0, summary=Summary(value=values)))
    writer.close()
    run = read_run(tmp_path)
    assert {name: [(each.last, each.mean) for each in series.bins] for name, series in run.series.items()} == {
        "loss": [(7, 0.5)]
    }
    assert run.bins == [(0.1, 1.0, 2.0), (1.0, 3.0, 1.0)]


def test_pictures_of_sweeps_are_carried_within_unless_they_are_large(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    for size, count in ((100, 1), (3_000_000, 0)):
        (tmp_path / "warmup_sweep.png").write_bytes(b"\x89PNG" + b"\0" * size)
        assert len(Page(render(read_run(tmp_path))[0]).all("img")) == count
