"""On an accelerator a step of steady training reads nothing back: counted on the CPU, where reads can be seen."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from host_reads import HostReads
from models import Adversaries, Regression, fp16, quiet_trainer, regression_data
from torch import Tensor

import lightning_recipes
from lightning_recipes import EMAWeights, InstabilityDetector, PercentileGradientClipping
from lightning_recipes.callbacks import measuring

PACKAGE = Path(lightning_recipes.__file__).parent


SELDOM = {"CriticalPointProbe": {"patience": 10_000}}  # reads ten times in so many updates


class CountBetween(pl.Callback):
    """Count the reads of the package from one batch to another."""

    def __init__(self, first: int, last: int, folder: Path = PACKAGE) -> None:
        self.first, self.last, self.reads = first, last, HostReads(folder)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.reads.__enter__()
        if batch_idx == self.last:
            self.reads.__exit__(None, None, None)


def fused_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, fused=True)


@pytest.mark.parametrize(
    "recipe",
    [
        "CriticalPointProbe",
        "EMAWeights",
        "GradientNoiseScale",
        "InstabilityDetector",
        "LearningCurves",
        "PercentileGradientClipping",
        "TrainingReport",
        "UpdateRatioMonitor",
    ],
)
@pytest.mark.parametrize(
    ("make_module", "settings"),
    [
        (Regression, {}),
        (lambda: Regression(batch_norm=True), {"accumulate_grad_batches": 3}),
        (lambda: Regression(make_optimizer=fused_adam), {"plugins": "fp16"}),
        (Adversaries, {}),
    ],
    ids=["plain", "accumulation", "fused fp16", "two optimizers"],
)
def test_a_steady_step_reads_nothing_back(
    recipe: str, make_module: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: False)
    count = CountBetween(8, 55)  # from 8 on: the first batches are copied to the host
    callbacks = [count, getattr(lightning_recipes, recipe)(**SELDOM.get(recipe, {}))]
    if settings.get("plugins") == "fp16":
        settings = {"plugins": [fp16()]}
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, log_every_n_steps=1000, **settings)
    trainer.fit(make_module(), regression_data(batches=60))
    assert count.reads.places == []


def test_what_may_be_read_is_read_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a step that logs, and once for all buffers at the start."""
    monkeypatch.setattr(measuring, "free_to_read", lambda _: False)
    count = CountBetween(0, 59)
    callbacks = [count, EMAWeights(), PercentileGradientClipping(), InstabilityDetector()]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, log_every_n_steps=50)
    trainer.fit(Regression(batch_norm=True), regression_data(batches=60))
    assert 1 <= len(count.reads.places) <= 4


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.item(),
        lambda tensor: float(tensor),
        lambda tensor: bool(tensor > 0),
        lambda tensor: tensor.tolist(),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: torch.nonzero(tensor),
        lambda tensor: tensor.view(1)[tensor.view(1) > 0],
        lambda tensor: tensor.cpu(),
    ],
)
def test_the_count_sees_every_kind_of_read(read: Any) -> None:
    with HostReads(Path(__file__).parent) as reads:
        read(torch.ones(()))
    assert len(reads.places) >= 1


@pytest.mark.parametrize("work", [lambda x: x + 1, lambda x: x.lerp_(x, 0.5), lambda x: torch.where(x > 0, x, 2.0)])
def test_the_count_sees_no_read_where_there_is_none(work: Any) -> None:
    with HostReads(Path(__file__).parent) as reads:
        work(torch.ones(()))
    assert reads.places == []


def test_a_callback_that_reads_each_step_is_noticed(tmp_path: Path) -> None:
    class Reads(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            norm: Tensor = sum(parameter.grad.norm() for parameter in pl_module.parameters())  # type: ignore[assignment]
            norm.item()

    count = CountBetween(5, 15, Path(__file__).parent)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[count, Reads()])
    trainer.fit(Regression(), regression_data(batches=20))
    assert len(count.reads.places) >= 10
