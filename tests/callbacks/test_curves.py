import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import Adversaries, Regression, Resumable, SeedEachStep, WithoutRate, fp16, quiet_trainer, regression_data
from ranks import run_on_ranks
from torch import Tensor

from lightning_recipes import EarlyStopping, LearningCurves
from lightning_recipes.callbacks import curves as curves_module


class Scripted(Regression):
    """Its training loss has a given value at each batch, and its validation loss at each check."""

    def __init__(self, train: Any, validation: Any = None, names: tuple[str, ...] = ("val_loss",)) -> None:
        super().__init__()
        self.train_at, self.validation_at, self.names = train, validation, names

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * 0 + self.train_at(
            self.trainer.fit_loop.epoch_loop.total_batch_idx
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        if self.validation_at is not None and not self.trainer.sanity_checking:
            for name in self.names:
                self.log(name, self.validation_at(self.trainer.current_epoch))


def fit(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 4, data: Any = None, **kwargs: Any
) -> pl.Trainer:
    ckpt_path = kwargs.pop("ckpt_path", None)
    torch.manual_seed(2)
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=list(callbacks), **kwargs)
    trainer.fit(module, data or regression_data(10), regression_data(2), ckpt_path=ckpt_path)
    return trainer


def told(folder: Path) -> list[str]:
    files = folder.rglob("findings.jsonl")
    return [json.loads(line)["rule"] for file in files for line in file.read_text().splitlines()]


class Note(pl.Callback):
    """What Lightning says of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"plugins": "fp16"}], ids=str
)
def test_the_curve_is_that_of_the_step_losses(settings: dict[str, Any], tmp_path: Path) -> None:
    if settings.get("plugins") == "fp16":
        settings = {"plugins": [fp16()]}
    curves, note = LearningCurves(), Note()
    fit(tmp_path, Regression(schedule=True), curves, note, **settings)
    rule = curves.rule
    assert [each.mean for each in rule.train.bins] == pytest.approx(note.losses)
    every = settings.get("accumulate_grad_batches", 1)
    if every == 1:
        assert [each.mean for each in rule.rates.bins] == pytest.approx(note.rates)
    assert rule.train.bins[-1].last == len(note.rates)
    assert len(curves.rule.checks.values) == 4
    assert curves.rule.checks.epochs == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("names", "monitor", "expected"),
    [
        (("val_loss", "val_other_loss"), None, "val_loss"),
        (("valid/loss", "val_aux_loss"), None, "valid/loss"),
        (("my_val_loss", "my_val_loss_raw"), None, "my_val_loss"),
        (("val_loss", "val_nll"), "val_nll", "val_nll"),
        (("score",), None, None),
        (("val_loss",), "missing", None),
    ],
)
@pytest.mark.filterwarnings("ignore:no such metric")
def test_it_finds_the_validation_loss(names: Any, monitor: Any, expected: Any, tmp_path: Path) -> None:
    curves = LearningCurves(monitor)
    fit(tmp_path, Scripted(lambda step: 1.0, lambda epoch: 5.0 - epoch, names), curves)
    assert curves.rule.checks.values == ([] if expected is None else [5.0, 4.0, 3.0, 2.0])
    assert expected is None or curves._name == expected


def test_accuracy_is_kept_beside(tmp_path: Path) -> None:
    curves = LearningCurves()
    fit(tmp_path, Scripted(lambda step: 1.0, lambda epoch: 0.5, ("val_loss", "val_accuracy")), curves)
    assert curves.rule.accuracies == [0.5] * 4


def test_without_validation_and_under_manual_optimization(tmp_path: Path) -> None:
    curves = LearningCurves()
    fit(tmp_path, Regression(), curves, limit_val_batches=0)
    assert (curves.rule.train.count, curves.rule.checks.values) == (40, [])
    assert not curves.rule.competes
    curves = LearningCurves()
    fit(tmp_path, Adversaries(), curves)  # its steps return nothing
    assert (curves.rule.train.count, len(curves.rule.checks.values)) == (0, 4)
    assert curves.findings() == []
    assert curves.rule.competes


# --------------------------------------------------------------------------------------------- what it tells


def overfits(epoch: int) -> float:
    return 1.0 + 0.05 * (epoch - 4) ** 2


def test_at_the_end_it_tells_what_the_curves_say(tmp_path: Path) -> None:
    curves = LearningCurves()
    with pytest.warns(UserWarning, match="overfitting at step 120: val_loss was best at step 50 of 120"):
        fit(tmp_path, Scripted(lambda step: 2 * math.exp(-step / 20), overfits), curves, epochs=12)
    assert told(tmp_path) == ["overfitting"]
    assert [finding.rule for finding in curves.findings()] == ["overfitting"]


def test_what_early_stopping_tells_is_told_once(tmp_path: Path) -> None:
    for callbacks in (
        [LearningCurves(), EarlyStopping("val_loss", 0.0, 100)],
        [EarlyStopping("val_loss", 0.0, 100), LearningCurves()],
    ):
        folder = tmp_path / type(callbacks[0]).__name__
        with pytest.warns(UserWarning, match="overfitting at step"):
            fit(folder, Scripted(lambda step: 2 * math.exp(-step / 20), overfits), *callbacks, epochs=12)
        assert told(folder) == ["overfitting"]


def test_it_can_be_asked_during_the_run(tmp_path: Path) -> None:
    class Asks(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            rules.update(finding.rule for finding in curves.findings())

    rules: set[str] = set()
    curves = LearningCurves()
    with pytest.warns(UserWarning, match="falls too slowly at step"):
        fit(tmp_path, Scripted(lambda step: 3 - step / 200), curves, Asks(), epochs=20)
    assert rules == {"falls too slowly"}


def test_a_short_run_is_told_nothing_and_a_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Regression(), LearningCurves())
    fit(tmp_path, Regression(), LearningCurves(), fast_dev_run=True)
    assert not list(tmp_path.rglob("*"))


# --------------------------------------------------------------------------------------------- the figure


def test_the_figure_goes_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves_module, "FIRST_FIGURE", 10)
    logger = TensorBoardLogger(tmp_path)
    shown: list[tuple[str, int]] = []
    monkeypatch.setattr(type(logger.experiment), "add_figure", lambda _, name, figure, step: shown.append((name, step)))
    fit(tmp_path, Regression(), LearningCurves(), logger=logger, log_every_n_steps=100)
    assert shown == [("learning_curves", step) for step in (9, 19, 39, 40)]


def test_the_figure_is_a_png_beside_the_logs_of_another_logger(tmp_path: Path) -> None:
    curves = LearningCurves()
    fit(
        tmp_path, Scripted(lambda step: 2.0 ** (1 - step), overfits, ("val_loss", "val_acc")), curves,
        logger=CSVLogger(tmp_path), log_every_n_steps=100,
    )  # fmt: skip
    assert len(list(tmp_path.rglob("learning_curves.png"))) == 1
    figure = curves.draw()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["training, ± 1 standard deviation", "training, mean", "val_loss", "best: 1.05 at step 40"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (log scale)", "validation\naccuracy", "learning\nrate"]


def test_without_matplotlib_it_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves_module, "FIRST_FIGURE", 10)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "matplotlib" else find(name, *_))
    fit(tmp_path, Regression(), LearningCurves(), logger=CSVLogger(tmp_path), log_every_n_steps=100)
    assert told(tmp_path) == ["no figures"]


# --------------------------------------------------------------------------------------------- state


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("save_at", [7, 13, 20, 31])
def test_a_resumed_run_has_the_same_curves(save_at: int, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == save_at:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    whole, resumed = LearningCurves(), LearningCurves()
    settings: dict[str, Any] = {"data": None, "epochs": 4}
    module = Regression(dropout=0.2, schedule=True)
    fit(tmp_path, module, SeedEachStep(), whole, Save(), **{**settings, "data": Resumable(regression_data(9))})
    module = Regression(dropout=0.2, schedule=True)
    fit(
        tmp_path, module, SeedEachStep(), resumed, ckpt_path=tmp_path / "run.ckpt",
        **{**settings, "data": Resumable(regression_data(9))},
    )  # fmt: skip
    assert str(whole.state_dict()) == str(resumed.state_dict())
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["LearningCurves"]
    assert len(saved["rule"]["bins"][0]) + len(saved["unread"]) == save_at


class Half:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        for inputs, targets in regression_data(6):
            yield inputs[4 * self.rank : 4 * self.rank + 4], targets[4 * self.rank : 4 * self.rank + 4]


def on_a_rank(folder: Path) -> Any:
    import os

    from lightning.pytorch.strategies import DDPStrategy

    curves = LearningCurves()
    trainer = quiet_trainer(
        folder, max_epochs=3, callbacks=[curves], strategy=DDPStrategy(process_group_backend="gloo"), devices=2,
        use_distributed_sampler=False, logger=CSVLogger(folder), log_every_n_steps=100,
    )  # fmt: skip
    trainer.fit(Regression(), Half(int(os.environ["LOCAL_RANK"])), regression_data(2))
    return curves.state_dict()["rule"]


@pytest.mark.filterwarnings("ignore")
def test_ranks_have_the_curve_of_the_whole_batch(tmp_path: Path) -> None:
    first, second = run_on_ranks(on_a_rank, tmp_path)
    assert str(first) == str(second)
    alone = LearningCurves()
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[alone])
    trainer.fit(Regression(), regression_data(6), regression_data(2))
    means = [each[3] for each in first["bins"][0]]
    assert means == pytest.approx([each.mean for each in alone.rule.train.bins], rel=1e-4)


class OnRankZero(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_global_zero:
            self.log("val_loss", self.loss(batch), rank_zero_only=True)


def logs_on_rank_zero(folder: Path) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    curves = LearningCurves()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[curves], strategy=strategy, devices=2)
    trainer.fit(OnRankZero(), regression_data(2), regression_data(2))
    return curves.rule.train.count, curves.rule.checks.values


@pytest.mark.filterwarnings("ignore")
def test_a_validation_that_only_one_rank_logs_is_told(tmp_path: Path) -> None:
    assert run_on_ranks(logs_on_rank_zero, tmp_path) == [(2, []), (2, [])]
    (line,) = (tmp_path / "findings.jsonl").read_text().splitlines()
    assert "Not every rank logs 'val_loss': the curves are those of the training alone." in line


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_an_optimizer_without_a_learning_rate_is_drawn_without_one(defaults: dict[str, None], tmp_path: Path) -> None:
    curves = LearningCurves()
    fit(tmp_path, WithoutRate(defaults), curves)
    assert curves.rule.train.count == 40
    assert not any(each.count for each in curves.rule.rates.bins)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": 3}, TypeError, "monitor must be the name of a metric, or None, got 3"),
        ({"target_loss": "low"}, TypeError, "target_loss must be a finite number"),
        ({"target_loss": math.inf}, ValueError, "target_loss must be a finite number"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearningCurves(**arguments)


def test_losses_are_read_in_bulk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves_module, "UNREAD", 4)
    reads: list[int] = []
    read = LearningCurves._read

    def count(self: LearningCurves, trainer: pl.Trainer) -> None:
        reads.append(len(self._unread))
        read(self, trainer)

    monkeypatch.setattr(LearningCurves, "_read", count)
    curves = LearningCurves()
    fit(tmp_path, Regression(), curves, epochs=1)
    assert reads == [4, 4, 2, 0, 0]
    assert isinstance(curves.rule.train.bins[0].mean, float)
    assert not isinstance(curves.rule.train.bins[0].mean, Tensor)


class LeftInTrainingMode(Regression):
    """Switches to training mode where evaluation mode belongs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.train()
        super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:training mode in validation")
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LeftInTrainingMode(dropout=0.5), ["training mode in validation"]),
        (LeftInTrainingMode(batch_norm=True), ["training mode in validation"]),
        (LeftInTrainingMode(), []),
        (Regression(dropout=0.5, batch_norm=True), []),
    ],
)
def test_layers_in_training_mode_are_told_at_the_first_validation(
    module: pl.LightningModule, expected: list[str], tmp_path: Path
) -> None:
    fit(tmp_path, module, LearningCurves(), epochs=3)
    assert told(tmp_path) == expected


def test_a_metric_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    curves = LearningCurves("validation_loss")
    with pytest.warns(UserWarning, match="The validation logs no 'validation_loss', but val_loss: the curves"):
        fit(tmp_path, Scripted(lambda batch: 1.0, lambda epoch: 1.0), curves)
    assert not curves.rule.checks.values
