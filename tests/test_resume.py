"""A run that is cut off and resumed ends bit for bit where the uninterrupted run ends, with all recipes attached."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import Adversaries, Regression, Resumable, SeedEachStep, fp16, quiet_trainer, regression_data, weights_of
from ranks import run_until_killed

from lightning_recipes import (
    EarlyStopping,
    EMAWeights,
    GradientNoiseScale,
    InstabilityDetector,
    LearningCurves,
    PercentileGradientClipping,
    UpdateRatioMonitor,
)

pytestmark = pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")

EPOCHS = 3
VALIDATE_EVERY = 4


class SaveOften(pl.Callback):
    """Save after an update in the middle of an epoch, where Lightning alone resumes exactly."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved_at = path, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = batch_idx + 1 == trainer.num_training_batches
        validates = (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % VALIDATE_EVERY == 0  # not made up for on resume
        if trainer.global_step >= self.saved_at + 3 and not last and not validates:
            self.saved_at = trainer.global_step
            trainer.save_checkpoint(self.path)


class KillAt(pl.Callback):
    """End the process like a power cut, in the middle of a step."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def make_module(kind: str) -> pl.LightningModule:
    if kind == "adversaries":
        return Adversaries()
    fused = {"fused": True} if kind == "fused" else {}
    return Regression(
        batch_norm=kind == "batch norm",
        dropout=0.2,
        schedule=True,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05, **fused),
    )


def train(folder: Path, kind: str, kill_at: int | None, resume: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Train; return everything that the run ends with."""
    plugins = [fp16()] if settings.get("plugins") == "fp16" else None
    ema, clipping = EMAWeights(0.9, every_n_steps=2), PercentileGradientClipping(window=10, warmup_steps=3)
    detector, stopping = InstabilityDetector("skip"), EarlyStopping("val_loss", patience=1000, strict=False)
    noise, ratios, curves = GradientNoiseScale(window=5), UpdateRatioMonitor(2), LearningCurves()
    recipes = [ema, clipping, detector, stopping, noise, ratios, curves]
    callbacks = [SeedEachStep(), *recipes, SaveOften(folder / "last.ckpt")]
    if kill_at is not None:
        callbacks.append(KillAt(kill_at))
    module = make_module(kind)
    trainer = quiet_trainer(
        folder, max_epochs=EPOCHS, callbacks=callbacks, **{**settings, "plugins": plugins}, log_every_n_steps=7
    )
    loader = Resumable(regression_data(batches=11))
    trainer.fit(module, loader, regression_data(2), ckpt_path=folder / "last.ckpt" if resume else None)
    with ema.raw_weights(module):
        raw = weights_of(module)
    return {
        "average": weights_of(module),
        "raw": raw,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "clipping": clipping.state_dict(),
        "ema": ema.state_dict(),
        "detector": detector.state_dict(),
        "stopping": stopping.rule.curve.values,
        "noise": noise.state_dict(),
        "ratios": ratios.state_dict(),
        "curves": curves.state_dict(),
        "step": trainer.global_step,
    }


@pytest.mark.parametrize("kill_at", [13, 22, 30])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("plain", {}),
        ("plain", {"accumulate_grad_batches": 3}),
        ("plain", {"precision": "bf16-mixed"}),
        ("plain", {"precision": "bf16-mixed", "accumulate_grad_batches": 3}),
        ("plain", {"precision": "bf16-true"}),
        ("plain", {"plugins": "fp16"}),
        ("fused", {"plugins": "fp16"}),
        ("batch norm", {}),
        ("adversaries", {}),
    ],
    ids=str,
)
def test_a_killed_run_resumes_bit_for_bit(kind: str, settings: dict[str, Any], kill_at: int, tmp_path: Path) -> None:
    settings = {"val_check_interval": VALIDATE_EVERY, "check_val_every_n_epoch": None, **settings}
    whole = train(tmp_path / "whole", kind, None, False, settings)
    cut = tmp_path / "cut"
    assert run_until_killed(train, cut, kind, kill_at, False, settings) == -signal.SIGKILL
    resumed = train(cut, kind, None, True, settings)
    assert str(whole) == str(resumed)
    for name, value in whole["raw"].items():
        assert torch.equal(value, resumed["raw"][name])
    assert any(not torch.equal(value, whole["average"][name]) for name, value in whole["raw"].items())


def test_the_comparison_would_notice_a_forgotten_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", "plain", None, False, {})
    for forgetful in (EMAWeights, PercentileGradientClipping):
        cut = tmp_path / forgetful.__name__
        run_until_killed(train, cut, "plain", 13, False, {})
        with monkeypatch.context() as patched:
            patched.setattr(forgetful, "load_state_dict", lambda self, state_dict: None)
            patched.setattr(EMAWeights, "on_load_checkpoint", lambda *_: None) if forgetful is EMAWeights else None
            assert str(train(cut, "plain", None, True, {})) != str(whole)


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
