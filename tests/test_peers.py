"""Defects of other implementations, each as a test that ours passes and theirs fails; theirs is skipped if absent.

pip install ema-pytorch autoclip smartclip zclip pytorch-ignite
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from models import GivenGradients, Regression, fp16, given, quiet_trainer, regression_data, same, weights_of

from lightning_recipes import EarlyStopping, EMAWeights, InstabilityDetector, PercentileGradientClipping
from lightning_recipes.core.averaging import ExponentialMovingAverage
from lightning_recipes.core.early_stopping import EarlyStoppingRule, Patience
from lightning_recipes.core.instability import InstabilityRule

pytestmark = pytest.mark.filterwarnings("ignore")  # peers warn of much that is not the point here


# ------------------------------------------------------------------------------ averages


class Losses(pl.Callback):
    """The validation losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(trainer.callback_metrics["val_loss"].item())


def validated(folder: Path, *recipes: pl.Callback, module: Any = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    module = module or Regression()
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[*recipes, losses := Losses()])
    trainer.fit(module, regression_data(), regression_data(2))
    return losses.losses, weights_of(module)


def test_a_start_that_never_comes_validates_and_returns_the_trained_weights(tmp_path: Path) -> None:
    alone = validated(tmp_path)
    ours = validated(tmp_path, EMAWeights(start_step=1000))
    assert ours[0] == alone[0]
    assert same(ours[1], alone[1])
    theirs = validated(tmp_path, pl.callbacks.EMAWeightAveraging(update_starting_at_step=1000))
    assert theirs[0][0] == theirs[0][1]  # the untrained weights, twice
    assert same(theirs[1], weights_of(Regression()))


class FailsInValidation(pl.Callback):
    trained: dict[str, torch.Tensor]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.trained = weights_of(pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            raise RuntimeError("on purpose")


def failed(folder: Path, recipe: pl.Callback) -> tuple[bool, bool]:
    """Whether the module holds the trained weights after a validation that failed, and whether they were saved."""
    module, fails = Regression(), FailsInValidation()
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[recipe, fails, OnExceptionCheckpoint(folder, "failed")])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, regression_data(), regression_data(2))
    saved = torch.load(folder / "failed.ckpt", weights_only=True)
    raw = saved.get("raw_weights") or saved["current_model_state"]
    return same(weights_of(module), fails.trained), same(raw, fails.trained)


def test_an_exception_in_validation_mixes_nothing_up(tmp_path: Path) -> None:
    assert failed(tmp_path / "ours", EMAWeights(0.9)) == (True, True)
    assert failed(tmp_path / "theirs", pl.callbacks.EMAWeightAveraging(decay=0.9)) == (False, False)


def test_counts_in_buffers_go_on(tmp_path: Path) -> None:
    _, ours = validated(tmp_path, EMAWeights(0.9), module=Regression(batch_norm=True))
    assert int(ours["net.1.num_batches_tracked"]) == 24
    _, theirs = validated(tmp_path, pl.callbacks.EMAWeightAveraging(decay=0.9), module=Regression(batch_norm=True))
    assert int(theirs["net.1.num_batches_tracked"]) < 24


def lag(update: Any, weight: torch.nn.Parameter, average: Any, steps: int) -> float:
    """How many updates behind the weight its average is, when the weight grows by one at each update."""
    with torch.no_grad():
        for _ in range(steps):
            weight += 1
            update()
    return float(weight - average())


def test_a_stride_does_not_change_the_memory() -> None:
    lags = []
    for every in (1, 10):
        weight, ema = torch.nn.Parameter(torch.zeros(())), ExponentialMovingAverage(0.9, every_n_steps=every)
        lags.append(lag(partial(ema.update, {"w": weight}), weight, lambda e=ema: e.averages["w"], 500 * every + 1))
    assert lags[0] == pytest.approx(9, abs=0.1)
    assert lags[1] == pytest.approx(10 * 0.9**10 / (1 - 0.9**10), abs=0.1)  # the same memory, in steps of ten

    peer = pytest.importorskip("ema_pytorch")
    theirs = []
    for every in (1, 10):
        net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(net.weight)
        ema = peer.EMA(net, beta=0.9, update_every=every, update_after_step=0, power=100.0)
        theirs.append(lag(ema.update, net.weight, lambda e=ema: e.ema_model.weight, 500))
    assert theirs[1] > 5 * theirs[0]


# ------------------------------------------------------------------------------ clipping


def moved(folder: Path, gradients: list[float], recipe: pl.Callback | None, **settings: Any) -> list[float]:
    """What each batch moved one weight by at learning rate 1: the gradient as it was clipped, negative."""
    make_optimizer = settings.pop("make_optimizer", torch.optim.SGD)
    module = GivenGradients(weight=8.0, make_optimizer=make_optimizer)
    callbacks = [recipe] if recipe else []
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=callbacks, log_every_n_steps=1000, **settings)
    trainer.fit(module, given(gradients))
    return [before - after for before, after in zip([8.0, *module.weights], module.weights)]


def typical(count: int) -> list[float]:
    return [1 + 0.1 * math.sin(step) for step in range(count)]


def recovers(folder: Path, recipe: pl.Callback) -> list[float]:
    """What is made of two spikes and some healthy gradients, after one that was NaN and left no trace itself."""

    class DropsNaN(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if not pl_module.weight.grad.isfinite().all():
                optimizer.zero_grad(set_to_none=True)

    module = GivenGradients(weight=8.0)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[recipe, DropsNaN()], log_every_n_steps=1000)
    trainer.fit(module, given([*typical(200), math.nan, 500.0, *typical(3), 500.0, 1.0]))
    return [before - after for before, after in zip(module.weights[200:], module.weights[201:])]


def test_one_nan_changes_nothing_for_the_gradients_after_it(tmp_path: Path) -> None:
    ours = recovers(tmp_path, PercentileGradientClipping())
    assert ours == pytest.approx([1.1, *typical(3), 1.1, 1.0], abs=0.15)

    zclip = pytest.importorskip("zclip")
    theirs = recovers(tmp_path, zclip.ZClipLightningCallback(max_grad_norm=None))
    assert max(theirs) > 100 or any(map(math.isnan, theirs))  # a spike goes through


def test_a_spike_neither_excuses_itself_nor_the_next(tmp_path: Path) -> None:
    gradients = [*typical(200), 1e5, *typical(20), 500.0]
    ours = moved(tmp_path, gradients, PercentileGradientClipping(percentile=95))
    assert ours[200] < 1.2
    assert ours[221] < 1.2

    smartclip = pytest.importorskip("smartclip")

    class Theirs(pl.Callback):
        def __init__(self) -> None:
            self.clipper = smartclip.AutoClip(percentile=95.0)

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            smartclip.apply(pl_module, self.clipper)

    theirs = moved(tmp_path, gradients, Theirs())
    assert theirs[200] > 10
    assert theirs[221] > 10


def test_clipping_takes_place_under_lightning(tmp_path: Path) -> None:
    gradients = [*typical(200), 1e5]
    assert moved(tmp_path, gradients, PercentileGradientClipping())[200] < 1.2

    autoclip = pytest.importorskip("autoclip.torch")

    def wrapped(parameters: Any, learning_rate: float) -> Any:
        parameters = list(parameters)
        return autoclip.QuantileClip.as_optimizer(
            torch.optim.SGD(parameters, learning_rate), quantile=0.9, history_length=1000
        )

    assert moved(tmp_path, gradients, None, make_optimizer=wrapped)[200] > 1e4


def test_a_fused_optimizer_under_fp16_is_clipped_at_unscaled_norms(tmp_path: Path) -> None:
    def fused(parameters: Any, learning_rate: float) -> Any:
        return torch.optim.SGD(parameters, learning_rate, fused=True)

    gradients = [1.0, 0.5] * 30
    ours, callback = {}, {}
    for name, make_optimizer in (("plain", torch.optim.SGD), ("fused", fused)):
        callback[name] = PercentileGradientClipping()
        ours[name] = moved(tmp_path, gradients, callback[name], make_optimizer=make_optimizer, plugins=[fp16()])
    assert ours["plain"] == pytest.approx(ours["fused"])
    assert list(callback["fused"].rule[0].norms.arrived) == pytest.approx(gradients)

    zclip = pytest.importorskip("zclip")
    theirs = zclip.ZClipLightningCallback(max_grad_norm=1.0)
    clipped = moved(tmp_path, gradients, theirs, make_optimizer=fused, plugins=[fp16()])
    assert max(clipped) < 0.1  # a norm of 1 times the scale, taken for a norm


# ------------------------------------------------------------------------------ early stopping


class Reports(Regression):
    def __init__(self, losses: list[float], done: int = 0) -> None:
        super().__init__()
        self.losses, self.checks = losses, done

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("scripted", self.losses[self.checks])
            self.checks += 1


def epochs_with(folder: Path, stopping: pl.Callback, losses: list[float], **settings: Any) -> int:
    trainer = quiet_trainer(folder, max_epochs=len(losses), callbacks=[stopping], **settings)
    trainer.fit(Reports(losses), regression_data(2), regression_data(2))
    return trainer.current_epoch


def test_a_resumed_run_has_the_patience_that_it_asks_for() -> None:
    for kind, patience in ((EarlyStopping, 50), (pl.callbacks.EarlyStopping, 3)):
        resumed = kind("val_loss", patience=50)
        resumed.load_state_dict(kind("val_loss", patience=3).state_dict())
        assert resumed.patience == patience


def test_a_metric_that_recovers_before_min_epochs_is_not_stopped(tmp_path: Path) -> None:
    recovers = [5.0, 6.0, 7.0, 4.0, 3.0, 2.0, 1.0, 0.5]
    assert epochs_with(tmp_path, EarlyStopping("scripted", patience=2), recovers, min_epochs=5) == 8
    assert epochs_with(tmp_path, pl.callbacks.EarlyStopping("scripted", patience=2), recovers, min_epochs=5) == 5


def test_neither_nan_nor_a_worse_negative_value_is_an_improvement() -> None:
    rule = EarlyStoppingRule(0.0)
    for value in (1.0, 0.9, math.nan, 5.0):
        rule.update(value, Patience(10))
    assert rule.curve.best == 1
    relative = EarlyStoppingRule("0.01%")
    assert [relative.update(value, Patience(1)) is not None for value in (-1.0, -0.99995)] == [False, True]
    handlers = pytest.importorskip("ignite.handlers")
    engines = pytest.importorskip("ignite.engine")
    scores = iter([-1.0, -0.9, math.nan, -5.0])
    theirs = handlers.EarlyStopping(10, lambda _: next(scores), engines.Engine(lambda *_: None))
    for _ in range(4):
        theirs(engines.Engine(lambda *_: None))
    assert (theirs.best_score, theirs.counter) == (-5.0, 0)


# ------------------------------------------------------------------------------ instability


def steady(rule: InstabilityRule, updates: int = 150) -> None:
    for update in range(updates):
        assert rule.update(2.0 + 0.1 * math.sin(update), 1.0 + 0.1 * math.cos(update)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_noticed_and_poisons_nothing(value: float) -> None:
    rule = InstabilityRule()
    steady(rule)
    found = rule.update(value, 1.0)
    assert found is not None
    assert found.kind == "not finite"
    steady(rule)


def test_a_spike_does_not_excuse_the_next() -> None:
    rule = InstabilityRule()
    steady(rule)
    assert [rule.update(loss, 1.0) is not None for loss in (1e4, 50.0)] == [True, True]


def test_what_was_seen_of_spikes_can_be_resumed(tmp_path: Path) -> None:
    detector, rule = InstabilityDetector(), InstabilityRule()
    steady(rule)
    detector.rule.rules[0] = rule
    resumed = InstabilityDetector()
    resumed.load_state_dict(detector.state_dict())
    assert resumed.rule[0].update(1e4, 1.0) is not None
    spike = pytest.importorskip("lightning.fabric.utilities.spike")
    theirs = spike.SpikeDetection()
    with pytest.raises(AttributeError, match="running"):
        theirs.load_state_dict(theirs.state_dict())
