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

pytestmark = pytest.mark.filterwarnings("ignore")
ONCE = {"InitialLossCheck", "OverfitCheck", "WarmupSweep"}  # before training, then nothing


class Count(pl.Callback):
    """What is alive in the middle of the run and at its end."""

    def __init__(self, steps: int) -> None:
        self.at, self.counts = (steps // 2, steps), []

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
    """By how much each count is larger at the end than in the middle."""
    count = Count(steps)
    trainer = quiet_trainer(folder, max_steps=steps, max_epochs=-1, callbacks=[*callbacks, count], log_every_n_steps=50)
    trainer.fit(Regression(), regression_data(100), regression_data(2))
    middle, end = count.counts
    return {name: end[name] - middle[name] for name in end}


def is_steady(growth: dict[str, int], steps: int) -> bool:
    """Less than a block for ten steps, a tensor for a hundred, and ten bytes of a checkpoint a step."""
    return (
        growth["blocks"] < steps / 2 / 10 + 500  # some things grow to a bound
        and growth["tensors"] < steps / 2 / 100 + 20
        and growth["files"] <= 0
        and growth["checkpoint"] < 5 * steps
    )


STEPS = [2000, pytest.param(10_000, marks=pytest.mark.everything)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [name for name in [*RECIPES, ALL] if name not in ONCE])
def test_nothing_piles_up(name: str, steps: int, tmp_path: Path) -> None:
    names = [each for each in RECIPES if each not in ONCE] if name == ALL else [name]
    growth = grown(tmp_path, [make(each) for each in names], steps)
    assert is_steady(growth, steps), growth


def test_a_leak_is_seen(tmp_path: Path) -> None:
    assert not is_steady(grown(tmp_path, [Leaks()], 2000), 2000)
