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
from lightning_recipes.report.page import render
from lightning_recipes.report.reading import NoRun, find_run, plain, read_findings, read_run
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
    assert len(run.notes) == 3
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


@pytest.mark.parametrize("line", ["[]", "3", "null", "{}", '{"rule": 1}', json.dumps({**FINDING, "step": None})])
def test_lines_that_are_no_findings_are_left_out(line: str, tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").write_text(f"{json.dumps(FINDING)}\n{line}\n{json.dumps({**FINDING, 'new': 1})}\n")
    notes: list[str] = []
    assert read_findings(tmp_path / "findings.jsonl", notes=notes) == [Finding(**FINDING)] * 2
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
