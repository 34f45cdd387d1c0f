"""Nothing piles up: objects, tensors, open files and the size of a checkpoint, from the middle of a run to its end."""

import gc
import io
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from matrix import ALL, RECIPES, make
from models import Regression, quiet_trainer, regression_data

from lightning_recipes import CriticalPointProbe, TrainingReport

pytestmark = pytest.mark.filterwarnings("ignore")
OFTEN: dict[str, Any] = {  # and not for the first time in the second half of a run
    "CriticalPointProbe": CriticalPointProbe,
    "TrainingReport": lambda: TrainingReport(every_n_seconds=1),
}
ONCE = {"InitialLossCheck", "OverfitCheck", "WarmupSweep"}  # before training, then nothing


class Count(pl.Callback):
    """What is alive, twice about the middle of the run and twice at its end."""

    def __init__(self, steps: int) -> None:
        self.at = [steps * share // 10 for share in (5, 6, 9, 10)]
        self.counts: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step not in self.at:
            return
        gc.collect()
        saved = io.BytesIO()
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        torch.save([callback.state_dict() for callback in others], saved)
        tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
        self.counts.append(
            {
                "blocks": sys.getallocatedblocks(),
                "tensors": tensors,
                "files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
                "checkpoint": saved.tell(),
            }
        )


class Leaks(pl.Callback):
    """Keeps the loss of each step, and its graph."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.kept.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [float(loss) for loss in self.kept]}


def grown(folder: Path, callbacks: list[pl.Callback], steps: int) -> dict[str, int]:
    """By how much each count is larger at the end than about the middle, whatever waits to be read in between."""
    count = Count(steps)
    trainer = quiet_trainer(folder, max_steps=steps, max_epochs=-1, callbacks=[*callbacks, count], log_every_n_steps=50)
    trainer.fit(Regression(), regression_data(100), regression_data(2))
    *middle, late, end = count.counts
    return {name: min(late[name], end[name]) - max(each[name] for each in middle) for name in end}


def is_steady(growth: dict[str, int], steps: int) -> bool:
    """Less than a block for three of the steps, a tensor for a hundred, ten bytes of a checkpoint for one."""
    between = 0.3 * steps
    return (
        growth["blocks"] < between / 3 + 300
        and growth["tensors"] < between / 100
        and growth["files"] <= 0
        and growth["checkpoint"] < 10 * between
    )


NAMES = [name for name in RECIPES if name not in ONCE]
EACH = [*NAMES, ALL]


@pytest.mark.parametrize(
    ("name", "steps"),
    [("InstabilityDetector", 1000), *(pytest.param(name, 10_000, marks=pytest.mark.everything) for name in EACH)],
)
def test_nothing_piles_up(name: str, steps: int, tmp_path: Path) -> None:
    names = NAMES if name == ALL else [name]
    recipes = [OFTEN[each]() if each in OFTEN else make(each) for each in names]
    growth = grown(tmp_path, recipes, steps)
    assert is_steady(growth, steps), growth


def test_a_leak_is_seen(tmp_path: Path) -> None:
    assert not is_steady(grown(tmp_path, [Leaks()], 1000), 1000)
