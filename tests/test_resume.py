"""Resuming with other recipes or arguments, and right after a run went back; all else is in ``test_matrix.py``."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import Regression, Resumable, SeedEachStep, quiet_trainer, regression_data, weights_of
from ranks import run_until_killed

from lightning_recipes import (
    EMAWeights,
    InstabilityDetector,
    PercentileGradientClipping,
)

pytestmark = pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")

EPOCHS = 3


class KillAt(pl.Callback):
    """End the process like a power cut, in the middle of a step."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_without_the_recipe_can_be_resumed_with_it_and_the_other_way_round(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(Regression(), regression_data())
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    ema, clipping = EMAWeights(0.9), PercentileGradientClipping()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[ema, clipping])
    trainer.fit(Regression(), regression_data(), ckpt_path=tmp_path / "without.ckpt")
    assert (ema.rule[0].updates, clipping.rule[0].count) == (12, 12)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(Regression(), regression_data(), ckpt_path=tmp_path / "with.ckpt")


def test_a_resumed_run_has_its_own_configuration(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[EMAWeights(0.9), PercentileGradientClipping()])
    trainer.fit(Regression(), regression_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    ema, clipping = EMAWeights(0.5), PercentileGradientClipping(50, window=6, warmup_steps=0)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[ema, clipping])
    trainer.fit(Regression(), regression_data(), ckpt_path=tmp_path / "run.ckpt")
    assert (ema.rule[0].decay, ema.rule[0].updates) == (0.5, 36)
    assert (len(clipping.rule[0].norms.arrived), clipping.rule[0].count) == (6, 36)


class SaveEveryThird(pl.Callback):
    """Save after the same batches in a resumed run, too: what is saved is what a run may go back to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx % 3 == 0:
            trainer.save_checkpoint(self.path)


class PoisonedOnce(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.trainer.fit_loop.epoch_loop.total_batch_idx == 14 else loss


def train_and_rewind(folder: Path, kill_at: int | None, resume: bool) -> str:
    ema, clipping = EMAWeights(0.9), PercentileGradientClipping(window=10, warmup_steps=3)
    detector = InstabilityDetector("rewind", keep_every=5, lr_factor=0.5)
    callbacks = [SeedEachStep(), ema, clipping, detector, SaveEveryThird(folder / "last.ckpt")]
    if kill_at is not None:
        callbacks.append(KillAt(kill_at))
    module = PoisonedOnce(dropout=0.2, schedule=True)
    trainer = quiet_trainer(folder, max_epochs=EPOCHS, callbacks=callbacks, log_every_n_steps=7)
    loader = Resumable(regression_data(batches=11))
    trainer.fit(module, loader, ckpt_path=folder / "last.ckpt" if resume else None)
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return str([weights_of(module), states, clipping.state_dict(), ema.state_dict(), detector.rewinds])


@pytest.mark.filterwarnings("ignore:not finite")
@pytest.mark.parametrize("kill_at", [15, 18, 25])
def test_a_run_that_is_killed_right_after_it_went_back_resumes_bit_for_bit(kill_at: int, tmp_path: Path) -> None:
    whole = train_and_rewind(tmp_path / "whole", None, False)
    assert whole.endswith(", 1]")
    assert run_until_killed(train_and_rewind, tmp_path / "cut", kill_at, False) == -signal.SIGKILL
    assert train_and_rewind(tmp_path / "cut", None, True) == whole
