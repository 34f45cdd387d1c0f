"""What recipes show arrives in every logger, or as files in the run's folder."""

import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from matrix import RECIPES, make
from models import Regression, quiet_trainer, regression_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_recipes.callbacks.outlets import WeightsAndBiases, closed
from lightning_recipes.callbacks.telling import log_histogram, log_scalars, log_text, run_folder, show, tell
from lightning_recipes.core.findings import Finding

BINS = [(0.0, 0.0, 2), (1.0, 2.0, 5), (4.0, 8.0, 1)]
FILES = {"findings.jsonl", "curve.png", "norms_1.csv", "members.md"}

pytestmark = pytest.mark.filterwarnings("ignore:ensemble at step", "ignore:ensemble not judged")  # toys


class Shows(pl.Callback):
    """One of each kind, before anything else happens."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        log_scalars(trainer, {"norm": 1.5})
        tell(trainer, Finding("a rule", "info", "Seen.", "Go on.", step=0))
        show(trainer, "curve", draw)
        log_histogram(trainer, "norms/1", BINS)
        log_text(trainer, "members", "| loss |\n|---|\n| 1 |")


def draw() -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    return figure


def fit(folder: Path, logger: Any, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = quiet_trainer(
        folder, logger=logger, callbacks=[*callbacks] or [Shows()], max_steps=20, log_every_n_steps=4, **settings
    )
    trainer.fit(Regression(), regression_data(), regression_data(2))
    return trainer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Plain(Logger):
    """A logger of scalars that nobody has heard of."""

    def __init__(self, version: Any = "a", save_dir: str | None = None) -> None:
        super().__init__()
        self.metrics: dict[str, Any] = {}
        self.run, self.folder = version, save_dir

    @property
    def name(self) -> str:
        return "plain"

    @property
    def version(self) -> Any:
        return self.run

    @property
    def save_dir(self) -> str | None:
        return self.folder

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Raises(Plain):
    """Its server is gone when it is asked for the third time."""

    asked = 0

    @property
    def experiment(self) -> Any:
        self.asked += 1
        if self.asked > 2:
            raise RuntimeError("no connection")
        return None


class Offline(Plain):
    """As W&B's, without W&B."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.shown[key] = (images, step)

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int | None = None) -> None:
        self.shown[key] = (columns, data, step)


def test_tensorboard_shows_all_and_needs_no_file_but_those_that_are_always_there(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger)
    assert names(Path(logger.log_dir)) & FILES == {"findings.jsonl", "members.md"}
    events = EventAccumulator(logger.log_dir, {"images": 0, "histograms": 0, "tensors": 0}).Reload()
    assert {"findings/a rule/text_summary", "members/text_summary"} <= {*events.Tags()["tensors"]}
    assert events.Tags()["images"] == ["curve"]
    (histogram,) = events.Histograms("norms/1")
    assert histogram.histogram_value.num == 8
    assert histogram.histogram_value.bucket_limit == [1.0, 2.0, 4.0, 8.0]
    assert histogram.histogram_value.bucket == [2.0, 5.0, 0.0, 1.0]


def test_of_several_loggers_each_gets_what_it_can_show_and_files_are_for_the_others(tmp_path: Path) -> None:
    board, other = TensorBoardLogger(tmp_path), CSVLogger(tmp_path, "other")
    fit(tmp_path, [board, other])
    assert names(Path(board.log_dir)) >= FILES
    assert EventAccumulator(board.log_dir).Reload().Tags()["images"] == ["curve"]
    assert "norm" in (Path(other.log_dir) / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("make_logger", [CSVLogger, lambda folder: Plain(), lambda folder: Plain(3)])
def test_there_are_files_for_a_logger_that_shows_nothing(make_logger: Callable[[Path], Any], tmp_path: Path) -> None:
    trainer = fit(tmp_path, make_logger(tmp_path))
    folder = run_folder(trainer)
    assert folder is not None
    assert names(folder) >= FILES
    assert (folder / "norms_1.csv").read_text().splitlines() == [
        "lower,upper,count",
        *(",".join(map(str, each)) for each in BINS),
    ]
    assert (folder / "members.md").read_text().startswith("| loss |\n")


def test_without_a_logger_what_is_found_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, False)
    assert names(tmp_path) == {"findings.jsonl", "members.md"}


@pytest.mark.parametrize("logger", [Plain("x"), Plain(3), Plain("x", "logs"), CSVLogger("logs"), TensorBoardLogger("")])
def test_the_folder_of_the_run_is_that_of_its_checkpoints(logger: Any, tmp_path: Path) -> None:
    trainer = fit(tmp_path, logger, ModelCheckpoint())
    folder = run_folder(trainer)
    assert folder is not None
    assert folder.resolve() == Path(trainer.checkpoint_callback.dirpath).resolve().parent  # type: ignore[union-attr]


def test_nothing_is_written_where_the_folder_is_remote(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Plain("a", "s3://bucket"))
    assert run_folder(trainer) is None
    assert not names(tmp_path)


@pytest.mark.filterwarnings("ignore:Raises did not take")
def test_a_logger_that_fails_does_not_end_the_training_and_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Raises did not take all: RuntimeError: no connection"):
        trainer = fit(tmp_path, Raises())
    assert trainer.global_step == 20
    assert names(tmp_path / "plain" / "a") >= FILES


def test_a_file_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"findings.jsonl could not be written .Is a directory"):
        trainer = fit(tmp_path, False)
    assert trainer.global_step == 20


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:validation data in the training data")
def test_every_recipe_works_with_a_logger_that_nobody_has_heard_of(tmp_path: Path) -> None:
    logger = Plain()
    fit(tmp_path, logger, *map(make, RECIPES))
    assert {"grad_norm", "update_ratio/median", "initial_loss", "sharpness", "ensemble/loss"} <= {*logger.metrics}
    pictures = {"grad_norm.png", "learning_curves.png", "update_ratio.png"}
    texts = {"grad_norm.csv", "findings.jsonl", "ensemble.md", "report.html"}
    assert names(tmp_path / "plain" / "a") >= pictures | texts
    assert names(tmp_path) == {"plain"}


def test_a_logger_with_the_methods_of_wandb_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=dict))
    logger = Offline()
    fit(tmp_path, logger)
    (figure,), step = logger.shown["curve"]
    assert isinstance(figure, Figure)
    assert step == 0
    assert logger.shown["findings/a rule"] == (["text"], [["Seen. **Go on.**"]], 0)
    assert logger.metrics["norms/1_histogram"] == {"np_histogram": ([2, 5, 0, 1], [0.0, 1.0, 2.0, 4.0, 8.0])}
    assert names(tmp_path / "plain" / "a") == {"findings.jsonl", "members.md"}


def test_wandb_has_at_most_512_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=dict))
    logger = Offline()
    bins = [(float(low), low + 1.0, low) for low in range(1100)]
    WeightsAndBiases(logger).histogram("many", bins, 0)
    counts, edges = logger.metrics["many_histogram"]["np_histogram"]
    assert len(counts) == len(edges) - 1 == 275
    assert sum(counts) == sum(range(1100))
    assert [*edges[:2], edges[-1]] == [0.0, 4.0, 1100.0]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="project")
    trainer = fit(tmp_path, logger)
    assert run_folder(trainer) == tmp_path / "project" / str(logger.version)
    media = Path(logger.experiment.dir) / "media"
    wandb.finish()
    assert [path.name.partition("_")[0] for path in (media / "images").iterdir()] == ["curve"]
    assert len([*media.rglob("*.table.json")]) == 2
    (finding,) = (media / "table" / "findings").iterdir()
    assert json.loads(finding.read_text())["data"] == [["Seen. **Go on.**"]]
    assert names(tmp_path / "project" / str(logger.version)) == {"findings.jsonl", "members.md"}


@pytest.mark.filterwarnings("ignore")  # MLflow and SQLAlchemy deprecate each other
def test_mlflow_with_sqlite(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    logger = MLFlowLogger("name", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=str(tmp_path))
    trainer = fit(tmp_path / "root", logger)
    artifacts = tmp_path / str(logger.run_id) / "artifacts"
    assert names(artifacts) == {"curve.png", "norms", "findings", "members.md"}
    assert (artifacts / "norms" / "1.csv").read_text().splitlines()[1] == "0.0,0.0,2"
    assert (artifacts / "findings" / "a rule.md").read_text() == "Seen. **Go on.**"
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert ("norm", 1.5) in database.execute("select key, value from metrics").fetchall()
    assert run_folder(trainer) == tmp_path / "root" / str(logger.experiment_id) / str(logger.run_id)


def test_bins_are_closed_whether_the_first_is_empty_or_not() -> None:
    assert closed([]) == []
    assert closed([(0.0, 0.0, 2)]) == [(0.0, 0.0, 2)]
    assert closed([(1.0, 2.0, 5), (2.0, 3.0, 1)]) == [(1.0, 2.0, 5), (2.0, 3.0, 1)]
