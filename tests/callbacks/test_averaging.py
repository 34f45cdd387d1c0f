import copy
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy
from models import (
    Adversaries,
    Derived,
    GivenGradients,
    Regression,
    Resumable,
    fp16,
    given,
    quiet_trainer,
    regression_data,
    same,
    weights_of,
)
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_recipes import EMAWeights
from lightning_recipes.core.averaging import ExponentialMovingAverage


class Follow(pl.Callback):
    """Average by hand what the module holds after each update, and note what it holds when."""

    def __init__(self, decay: float = 0.9, **kwargs: Any) -> None:
        self.ema = ExponentialMovingAverage(decay, **kwargs)
        self.raw: dict[str, Tensor] = {}
        self.validated: list[dict[str, Tensor]] = []
        self.expected: list[dict[str, Tensor]] = []
        self.updates = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.raw = weights_of(pl_module)
        if trainer.global_step > self.updates:
            self.updates = trainer.global_step
            self.ema.update({name: value for name, value in self.raw.items() if value.is_floating_point()})

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(weights_of(pl_module))
            self.expected.append({**self.raw, **{name: a.clone() for name, a in self.ema.averages.items()}})

    @property
    def average(self) -> dict[str, Tensor]:
        return {**self.raw, **self.ema.averages}


def fit(
    folder: Path,
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    epochs: int = 2,
    data: Any = None,
    ckpt_path: Any = None,
    **settings: Any,
) -> pl.Trainer:
    torch.manual_seed(2)
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=list(callbacks), **settings)
    trainer.fit(module, regression_data() if data is None else data, regression_data(2), ckpt_path=ckpt_path)
    return trainer


def checkpoint_of(path: Any) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("accumulate", [1, 5])
def test_the_average_is_validated_and_the_raw_weights_trained(
    batch_norm: bool, accumulate: int, tmp_path: Path
) -> None:
    with_it, without, follow = Regression(batch_norm), Regression(batch_norm), Follow()
    fit(tmp_path, with_it, EMAWeights(0.9), follow, accumulate_grad_batches=accumulate)
    fit(tmp_path, without, other := Follow(), accumulate_grad_batches=accumulate)
    assert same(follow.raw, other.raw)
    assert same(other.raw, weights_of(without))
    assert len(follow.validated) == 4
    for validated, expected in zip(follow.validated, follow.expected, strict=True):
        assert same(validated, expected)
    assert same(weights_of(with_it), follow.average)
    assert not same(follow.raw, follow.average)


def test_integer_buffers_are_the_live_ones(tmp_path: Path) -> None:
    module, follow = Regression(batch_norm=True), Follow()
    fit(tmp_path, module, EMAWeights(0.9), follow)
    assert [int(held["net.1.num_batches_tracked"]) for held in follow.validated] == [12, 12, 24, 24]
    assert int(module.net[1].num_batches_tracked) == 24


def test_copied_buffers_are_the_live_ones(tmp_path: Path) -> None:
    module, follow = Regression(batch_norm=True), Follow()
    fit(tmp_path, module, EMAWeights(0.9, buffers="copy"), follow)
    for validated, raw_after in zip(follow.validated[2:], [follow.raw] * 2, strict=True):
        assert torch.equal(validated["net.1.running_mean"], raw_after["net.1.running_mean"])
        assert not torch.equal(validated["net.1.weight"], raw_after["net.1.weight"])


class Calibrated(Regression):
    """Finds a threshold at each validation, as others do on a ROC curve."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.register_buffer("thresholds", torch.tensor([0.5, 7.0]))
        self.in_training: list[float] = []

    def on_validation_epoch_end(self) -> None:
        self.thresholds[0] = self.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.in_training.append(float(self.thresholds[0]))


@pytest.mark.parametrize("settings", [{"buffers": "average"}, {"buffers": "copy"}, {"validate_raw": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_validation_writes_into_a_buffer_stays(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    module, plain, follow = Calibrated(), Calibrated(), Follow()
    for each in (module, plain):
        each.thresholds = each.thresholds.to(dtype)
    trainer = fit(tmp_path, module, EMAWeights(0.9, **settings), follow, epochs=3)
    fit(tmp_path, plain, other := Follow(), epochs=3)
    assert module.in_training == plain.in_training == [0.0] * 12 + [12.0] * 12 + [24.0] * 12
    assert same(follow.raw, other.raw)  # the rest is trained as without the average
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for state in (module.state_dict(), checkpoint_of(tmp_path / "a.ckpt")["state_dict"]):
        assert state["thresholds"].tolist() == [36, 7]


class Attention(Regression):
    """Buffers of every kind: a mask with infinities, one that is not persistent, one that is replaced each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scratch += 1
        self.seen = self.seen + 1  # another tensor each time
        return super().training_step(batch, batch_idx)


def test_masks_scratch_and_replaced_buffers(tmp_path: Path) -> None:
    module = Attention()
    ema = EMAWeights(0.9)
    fit(tmp_path, module, ema, epochs=1)
    assert torch.equal(module.mask, torch.full((2, 2), -math.inf).triu(1))
    assert module.scratch.item() == 12
    assert 9 < module.seen.item() < 12
    with ema.raw_weights(module):
        assert module.seen.item() == 12


def shared_and_frozen() -> Regression:
    module = Regression()
    module.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    module.net[1].weight = module.net[0].weight
    module.net[2].requires_grad_(False)
    return module


def test_shared_and_frozen_parameters(tmp_path: Path) -> None:
    module, follow = shared_and_frozen(), Follow()
    frozen = weights_of(module.net[2])
    fit(tmp_path, module, EMAWeights(0.9), follow, checkpoints := ModelCheckpoint(tmp_path))
    assert same(weights_of(module), follow.average)
    assert module.net[1].weight is module.net[0].weight
    assert same(weights_of(module.net[2]), frozen)
    saved = checkpoint_of(checkpoints.best_model_path)
    assert same(saved["state_dict"], follow.average)
    assert "net.1.weight" not in saved["raw_weights"]


class GrowsAndUnfreezes(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.net[2].requires_grad_(True)
            pl_module.added = nn.Parameter(torch.zeros(1))
            trainer.optimizers[0].add_param_group({"params": [pl_module.added]})


def test_parameters_that_are_added_or_unfrozen_during_training(tmp_path: Path) -> None:
    module, follow = shared_and_frozen(), Follow()
    original = module.loss
    module.loss = lambda batch: original(batch) + getattr(module, "added", torch.zeros(1)).sum()  # type: ignore[method-assign]
    fit(tmp_path, module, EMAWeights(0.9), GrowsAndUnfreezes(), follow, epochs=3)
    assert "added" in follow.average
    assert same(weights_of(module), follow.average)
    assert not torch.equal(follow.average["net.2.weight"], follow.raw["net.2.weight"])


def test_before_the_first_average_nothing_is_swapped_saved_or_restored(tmp_path: Path) -> None:
    with_it, without, follow = Regression(), Regression(), Follow()
    ema = EMAWeights(0.9, start_step=100)
    trainer = fit(tmp_path, with_it, ema, follow, checkpoints := ModelCheckpoint(tmp_path))
    fit(tmp_path, without)
    assert not ema.has_average
    assert same(weights_of(with_it), weights_of(without))
    saved = checkpoint_of(checkpoints.best_model_path)
    assert same(saved["state_dict"], weights_of(without))
    assert "raw_weights" not in saved
    assert same(follow.validated[-1], follow.raw)
    with ema.raw_weights(with_it):
        assert same(weights_of(with_it), weights_of(without))
    with pytest.raises(RuntimeError, match="no average yet"), ema.average_weights(with_it):
        pass
    trainer.save_checkpoint(tmp_path / "later.ckpt")


def test_start_step_and_stride_count_updates(tmp_path: Path) -> None:
    module, follow = Regression(), Follow(start_step=3, every_n_steps=2)
    fit(tmp_path, module, EMAWeights(0.9, start_step=3, every_n_steps=2), follow)
    assert same(weights_of(module), follow.average)


def test_each_optimizer_of_a_manual_training_counts_its_own_updates(tmp_path: Path) -> None:
    for raw_optimizers in (False, True):
        module, ema = Adversaries(raw_optimizers), EMAWeights(0.9, every_n_steps=2)
        fit(tmp_path, module, ema, data=regression_data(batches=5))
        assert [ema.rule[index].updates for index in (0, 1)] == [20, 10]
        averaged = weights_of(module)
        with ema.raw_weights(module):
            raw = weights_of(module)
        assert all(not torch.equal(averaged[name], raw[name]) for name in raw)


def fused_sgd(parameters: Any, learning_rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, fused=True)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, fused_sgd])
def test_updates_that_a_gradscaler_skips_are_not_averaged(make_optimizer: Callable[..., Any], tmp_path: Path) -> None:
    module = GivenGradients(make_optimizer=make_optimizer)
    ema = EMAWeights(0.9)
    gradients = [math.inf, -1.0, -1.0, math.nan, -1.0]
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[ema], plugins=[fp16()]).fit(module, given(gradients))
    assert module.weights == [0.0, 1.0, 2.0, 2.0, 3.0]
    by_hand, weight = ExponentialMovingAverage(0.9), torch.zeros(1)
    for _ in range(3):
        weight += 1
        by_hand.update({"weight": weight})
    assert ema.rule[0].updates == 3
    assert module.weight.item() == pytest.approx(by_hand.averages["weight"].item())


def test_cancelled_updates_are_not_averaged(tmp_path: Path) -> None:
    class Cancels(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            if trainer.global_step % 2:
                optimizer.zero_grad(set_to_none=True)

    ema = EMAWeights(0.9)
    fit(tmp_path, Regression(), Cancels(), ema, epochs=1)
    assert ema.rule[0].updates == 6


def test_half_precision_weights_come_back_exactly(tmp_path: Path) -> None:
    with_it, without, follow = Regression(), Regression(), Follow()
    ema = EMAWeights(0.9)
    fit(tmp_path, with_it, ema, follow, precision="bf16-true")
    fit(tmp_path, without, other := Follow(), precision="bf16-true")
    assert same(follow.raw, other.raw)
    assert ema.rule[0].averages["net.0.weight"].dtype == torch.float32
    with ema.raw_weights(with_it):
        assert same(weights_of(with_it), follow.raw)


class Fails(pl.Callback):
    def __init__(self, hook: str, error: type[BaseException]) -> None:
        self.error, self.calls = error, 0
        setattr(self, hook, self._fail)

    def _fail(self, trainer: pl.Trainer, *_: Any) -> None:
        self.calls += not trainer.sanity_checking
        if self.calls == 3:
            raise self.error("on purpose")


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path")  # OnExceptionCheckpoint makes Lightning look for one
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_epoch_end", "on_train_batch_end"])
def test_after_an_exception_the_module_holds_the_raw_weights_and_checkpoints_are_right(
    hook: str, error: type[BaseException], tmp_path: Path
) -> None:
    module, follow, ema = Regression(), Follow(), EMAWeights(0.9)
    saved = OnExceptionCheckpoint(tmp_path, "exception")
    with pytest.raises((RuntimeError, SystemExit)):
        fit(tmp_path, module, saved, follow, ema, Fails(hook, error), epochs=5)
    assert same(weights_of(module), follow.raw)
    checkpoint = checkpoint_of(tmp_path / "exception.ckpt")
    assert same(checkpoint["state_dict"], follow.average)
    assert same(checkpoint["raw_weights"], follow.raw)
    with ema.average_weights(module):
        assert same(weights_of(module), follow.average)
    assert same(weights_of(module), follow.raw)


class Saves(pl.Callback):
    """Save a checkpoint in a hook, and keep what it should hold."""

    def __init__(self, hook: str, path: Path, weights_only: bool) -> None:
        self.path, self.weights_only = path, weights_only
        setattr(self, hook, self._save)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= 15 and not self.path.exists():
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
            (follow,) = (callback for callback in trainer.callbacks if isinstance(callback, Follow))  # type: ignore[attr-defined]
            self.raw, self.average = follow.raw, {name: value.clone() for name, value in follow.average.items()}


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_train_end",
        "on_fit_end",
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_of_any_moment_holds_the_average_and_the_raw_weights_beside_it(
    hook: str, weights_only: bool, before: bool, tmp_path: Path
) -> None:
    saves, follow = Saves(hook, tmp_path / "saved.ckpt", weights_only), Follow()
    order = [follow, saves, EMAWeights(0.9)] if before else [follow, EMAWeights(0.9), saves]
    fit(tmp_path, Regression(batch_norm=True), *order)
    checkpoint = checkpoint_of(saves.path)
    assert same(checkpoint["state_dict"], saves.average)
    if weights_only:
        assert "raw_weights" not in checkpoint
    else:
        raw = {name: value for name, value in saves.raw.items() if value.is_floating_point()}
        assert same(checkpoint["raw_weights"], raw)


def test_load_from_checkpoint_gives_the_average(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, save_weights_only=True)
    fit(tmp_path, Regression(), EMAWeights(0.9), follow := Follow(), checkpoints)
    loaded = Regression.load_from_checkpoint(checkpoints.best_model_path)
    assert same(weights_of(loaded), follow.average)


def test_after_fit_test_and_predict_use_the_average(tmp_path: Path) -> None:
    module, follow, ema = Regression(), Follow(), EMAWeights(0.9)
    trainer = fit(tmp_path, module, ema, follow, ModelCheckpoint(tmp_path))
    loss = module.loss(next(iter(regression_data(1, 16)))).item()
    assert trainer.test(module, regression_data(1, 16), verbose=False)[0]["test_loss"] == pytest.approx(loss)
    assert trainer.validate(module, regression_data(1, 16), verbose=False)[0]["val_loss"] == pytest.approx(loss)
    scores = trainer.test(ckpt_path="best", dataloaders=regression_data(1, 16), verbose=False)
    assert scores[0]["test_loss"] == pytest.approx(loss)
    predicted = trainer.predict(module, regression_data(1, 16))
    assert predicted is not None
    torch.testing.assert_close(predicted[0], module.net(next(iter(regression_data(1, 16)))[0]))
    assert same(weights_of(module), follow.average)
    with ema.raw_weights(module):
        assert same(weights_of(module), follow.raw)


def test_evaluation_alone_needs_no_fit(tmp_path: Path) -> None:
    module, before = Regression(), weights_of(Regression())
    trainer = quiet_trainer(tmp_path, callbacks=[EMAWeights(0.9)])
    trainer.validate(module, regression_data(), verbose=False)
    trainer.test(module, regression_data(), verbose=False)
    trainer.predict(module, regression_data())
    assert same(weights_of(module), before)


def test_evaluating_a_checkpoint_does_not_disturb_the_raw_weights_of_a_fit(tmp_path: Path) -> None:
    module, follow, ema = Regression(), Follow(), EMAWeights(0.9)
    trainer = fit(tmp_path, module, ema, follow, checkpoints := ModelCheckpoint(tmp_path, save_top_k=-1))
    first = sorted(tmp_path.glob("epoch=0*.ckpt"))[0]
    trainer.validate(Regression(), regression_data(), ckpt_path=str(first), verbose=False)
    assert checkpoints.best_model_path
    with ema.raw_weights(module):
        assert same(weights_of(module), follow.raw)


def test_a_second_fit_goes_on_with_the_raw_weights(tmp_path: Path) -> None:
    def momentum_free(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.05)

    once, twice = Regression(make_optimizer=momentum_free), Regression(make_optimizer=momentum_free)
    fit(tmp_path, once, EMAWeights(0.9), epochs=4)
    trainer = fit(tmp_path, twice, ema := EMAWeights(0.9), epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(twice, regression_data(), regression_data(2))
    assert same(weights_of(once), weights_of(twice))
    assert ema.rule[0].updates == 48


def test_a_second_fit_with_other_weights_starts_anew(tmp_path: Path) -> None:
    ema = EMAWeights(0.9)
    fit(tmp_path, Regression(), ema)
    other, alone = Regression(), Regression()
    for module in (other, alone):
        nn.init.constant_(module.net[0].weight, 0.1)
    fit(tmp_path, other, ema)
    fit(tmp_path, alone, EMAWeights(0.9))
    assert same(weights_of(other), weights_of(alone))


def test_a_fit_that_has_nothing_left_to_do_changes_nothing(tmp_path: Path) -> None:
    module, ema = Regression(), EMAWeights(0.9)
    trainer = fit(tmp_path, module, ema)
    averaged = weights_of(module)
    trainer.fit(module, regression_data(), regression_data(2))
    assert same(weights_of(module), averaged)


def test_both_sets_are_at_hand_at_any_time(tmp_path: Path) -> None:
    ema, follow = EMAWeights(0.9), Follow()

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            with ema.average_weights(pl_module):
                assert same(weights_of(pl_module), follow.average)
                with ema.raw_weights(pl_module), ema.raw_weights(pl_module):
                    assert same(weights_of(pl_module), follow.raw)
                assert same(weights_of(pl_module), follow.average)
            assert same(weights_of(pl_module), follow.raw)

        def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if not trainer.sanity_checking:
                with ema.raw_weights(pl_module):
                    assert same(weights_of(pl_module), follow.raw)
                assert same(weights_of(pl_module), follow.average)

    fit(tmp_path, Regression(), ema, follow, Looks())


def test_both_scores_of_one_run(tmp_path: Path) -> None:
    class Spy(pl.Callback):
        calls: list[str]

        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.calls = [*getattr(self, "calls", []), "end"]

    twice, once, raw_only = (Regression(dropout=0.3) for _ in range(3))
    trainer = fit(tmp_path, twice, EMAWeights(0.9, validate_raw=True), spy := Spy(), follow := Follow())
    plain = fit(tmp_path, once, EMAWeights(0.9), other := Follow())
    raw = fit(tmp_path, raw_only)
    assert same(follow.raw, other.raw)
    assert trainer.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]
    assert trainer.callback_metrics["val_loss_raw"] == raw.callback_metrics["val_loss"]
    assert spy.calls == ["end"] * 3  # the sanity check and two epochs
    assert "log" not in vars(twice)


class Measured(Regression):
    """A BatchNorm net that keeps a torchmetrics metric and a buffer of its own over an epoch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(batch_norm=True, **kwargs)
        self.seen = MeanMetric()
        self.register_buffer("batches", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen(loss.detach())
        self.batches += 1
        self.log("train_loss", self.seen, on_step=False, on_epoch=True)
        return loss


def test_recomputed_statistics_are_those_of_the_average_and_leave_no_trace(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)

    def data() -> Any:
        return regression_data(shuffle=True, generator=generator.manual_seed(3))

    with_it, without, follow = Measured(dropout=0.2), Measured(dropout=0.2), Follow()
    ema = EMAWeights(0.9, buffers="recompute")
    recomputed = fit(tmp_path, with_it, ema, follow, checkpoints := ModelCheckpoint(tmp_path), data=data())
    plain = fit(tmp_path, without, other := Follow(), data=data())
    assert same(follow.raw, other.raw)
    assert recomputed.callback_metrics["train_loss"] == plain.callback_metrics["train_loss"]

    inputs = torch.cat([batch[0] for batch in regression_data()])
    activations = with_it.net[0](inputs)
    torch.testing.assert_close(with_it.net[1].running_mean, activations.mean(0))
    torch.testing.assert_close(with_it.net[1].running_var, activations.var(0), rtol=0.2, atol=0)
    assert same(follow.validated[-1], weights_of(with_it))
    saved = checkpoint_of(checkpoints.best_model_path)
    assert same(saved["state_dict"], weights_of(with_it))
    for name, value in saved["raw_weights"].items():
        assert torch.equal(value, follow.raw[name])
    with ema.raw_weights(with_it):
        assert same(weights_of(with_it), follow.raw)


def stream() -> torch.utils.data.DataLoader[Any]:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(regression_data(30))

    return torch.utils.data.DataLoader(Endless(), batch_size=None)


def test_recomputing_takes_part_in_every_kind_of_loader(tmp_path: Path) -> None:
    workers = regression_data(num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    for data in (stream(), workers, Resumable(regression_data())):
        module = Regression(batch_norm=True)
        fit(tmp_path, module, EMAWeights(0.9, buffers="recompute"), data=data, limit_train_batches=8)
        assert int(module.net[1].num_batches_tracked) == 8


def test_recompute_with_manual_optimization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="manual optimization.*buffers='average'"):
        fit(tmp_path, Adversaries(), EMAWeights(buffers="recompute"))


@pytest.mark.parametrize(
    ("half_life", "updates"), [(7, 7.0), ("2 epochs", 6.0), ("0.5 of the run", 6.0), ("100 steps", 100.0)]
)
def test_half_life_as_people_say_it(half_life: int | str, updates: float, tmp_path: Path) -> None:
    ema = EMAWeights(half_life=half_life)
    fit(tmp_path, Regression(), ema, epochs=4, accumulate_grad_batches=4)
    assert ema.rule[0].decay ** updates == pytest.approx(0.5)


def test_half_life_of_an_unknown_length_is_refused(tmp_path: Path) -> None:
    for half_life, unknown in (("2 epochs", "an epoch"), ("0.1 of the run", "the run")):
        with pytest.raises(ValueError, match=f"needs the length of {unknown}, which is not known here"):
            fit(tmp_path, Regression(), EMAWeights(half_life=half_life), data=stream())


def test_an_average_on_another_device_is_updated_and_put_back(tmp_path: Path) -> None:
    module, follow = Regression(), Follow()
    fit(tmp_path, module, EMAWeights(0.9, device="cpu"), follow)
    assert same(weights_of(module), follow.average)


def test_memory_is_one_copy(tmp_path: Path) -> None:
    module, ema = Regression(batch_norm=True), EMAWeights(0.9)
    fit(tmp_path, module, ema)
    kept = sum(average.numel() for average in ema.rule[0].averages.values())
    assert kept == sum(value.numel() for value in module.state_dict().values() if value.is_floating_point())


def test_nothing_of_the_module_is_kept_after_fit(tmp_path: Path) -> None:
    module, ema = Regression(), EMAWeights(0.9)
    fit(tmp_path, module, ema)
    again = pickle.loads(pickle.dumps(EMAWeights(0.9)))
    assert isinstance(copy.deepcopy(again), EMAWeights)
    kept = {id(tensor) for tensor in vars(ema).values()} | {id(a) for a in ema.rule[0].averages.values()}
    assert not kept & {id(parameter) for parameter in module.parameters()}
    assert not ema._tracked
    assert not ema._put_back


@pytest.mark.parametrize("trainable", [False, True])
def test_nothing_to_average_is_an_error(trainable: bool, tmp_path: Path) -> None:
    module = Regression()
    if trainable:  # but not in any optimizer
        elsewhere = nn.Parameter(torch.zeros(1))
        module.make_optimizer = lambda _: torch.optim.SGD([elsewhere], 0.1)
    else:
        module.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="nothing to average"):
        fit(tmp_path, module, EMAWeights())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay must be a number above 0 and below 1, got 1.0"),
        ({"decay": 0}, "decay must be .*, got 0"),
        ({"decay": math.nan}, "decay must be .*, got nan"),
        ({"decay": "0.9"}, "decay must be .*, got '0.9'"),
        ({"decay": 0.9, "half_life": 10}, "give decay or half_life, not both"),
        ({"half_life": 0}, "half_life must be .*, got 0"),
        ({"half_life": "soon"}, "half_life must be .*, got 'soon'"),
        ({"every_n_steps": 0}, "every_n_steps must be .*, got 0"),
        ({"start_step": -1}, "start_step must be .*, got -1"),
        ({"buffers": "none"}, "buffers must be 'average' or 'copy' or 'recompute', got 'none'"),
        ({"device": "cuda:99"}, "device must be one that this machine has.*, got 'cuda:99'"),
        ({"device": "gpu please"}, "device must be one that this machine has.*, got 'gpu please'"),
        ({"device": "meta"}, "device must be one that this machine has"),
        ({"validate_raw": "yes"}, "validate_raw must be True or False, got 'yes'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        EMAWeights(**arguments)


def test_ctrl_c_waits_until_the_weights_are_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    exchange, calls = ExponentialMovingAverage.exchange_, []

    def interrupted(self: ExponentialMovingAverage, tensors: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        exchange(self, tensors)

    monkeypatch.setattr(ExponentialMovingAverage, "exchange_", interrupted)
    module, follow = Regression(), Follow()
    with pytest.raises(SystemExit):
        fit(tmp_path, module, EMAWeights(0.9), follow, epochs=5)
    assert same(weights_of(module), follow.raw)


def test_a_checkpoint_between_validations_holds_statistics_recomputed_for_the_average(tmp_path: Path) -> None:
    saves = Saves("on_train_batch_end", tmp_path / "saved.ckpt", weights_only=False)
    fit(tmp_path, Regression(batch_norm=True), Follow(), saves, EMAWeights(0.9, buffers="recompute"))
    saved = checkpoint_of(saves.path)["state_dict"]
    averaged = Regression(batch_norm=True)
    averaged.load_state_dict(saved)
    activations = averaged.net[0](torch.cat([inputs for inputs, _ in regression_data()]))
    torch.testing.assert_close(saved["net.1.running_mean"], activations.mean(0))


def test_a_training_in_a_thread(tmp_path: Path) -> None:
    module, raw = Regression(), Regression()
    for trained, callbacks in ((module, [EMAWeights(0.9)]), (raw, [])):
        thread = threading.Thread(target=fit, args=(tmp_path, trained, *callbacks))
        thread.start()
        thread.join()
    assert not same(weights_of(module), weights_of(raw))


def test_another_average_of_the_weights_is_refused(tmp_path: Path) -> None:
    for callbacks in ([EMAWeights(), EMAWeightAveraging()], [EMAWeightAveraging(), EMAWeights()]):
        with pytest.raises(MisconfigurationException, match="EMAWeights and EMAWeightAveraging both put.*keep one"):
            fit(tmp_path, Regression(), *callbacks)


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer._accelerator_connector.strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    with pytest.raises(MisconfigurationException, match="DeepSpeed.*use FSDP or ModelParallel"):
        EMAWeights().on_fit_start(trainer, Regression())


# ------------------------------------------------------------------------------------------ tensors that come and go


class Changes(Regression):
    """Something changes when the second of three epochs begins."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("bank", torch.zeros(1, 8))
        self.register_buffer("sparse", torch.eye(8).to_sparse())

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.net[index].parameters())} for index in (0, 3)]
        return torch.optim.SGD(groups, lr=0.01)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch != 1:
            return
        groups = self.trainer.optimizers[0].param_groups
        if self.what == "optimizer":
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self.what == "head":
            self.net[3] = nn.Linear(16, 1)
            groups[1]["params"] = list(self.net[3].parameters())
        if self.what == "size":
            self.net[3] = nn.Linear(16, 2)
            groups[1]["params"] = list(self.net[3].parameters())
        if self.what == "group":
            groups.pop(0)
            self.net[0].requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        if self.what == "buffer" and self.training and self.global_step % 3 == 0:
            self.bank = torch.cat([self.bank, batch[0][:1]])
        return nn.functional.mse_loss(self.net(batch[0])[:, :1], batch[1])


@pytest.mark.parametrize("what", ["optimizer", "head", "size", "group", "buffer"])
def test_the_average_follows_what_is_trained(what: str, tmp_path: Path) -> None:
    module, ema = Changes(what), EMAWeights(decay=0.5)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[ema])
    trainer.fit(module, regression_data(8), regression_data(2))
    assert ema.rule[0].updates == trainer.global_step == 24
    named = {**dict(module.named_parameters()), "bank": module.bank}
    expected = {name for name in named if what != "group" or name.startswith(("net.3", "bank"))}
    assert set(ema.rule[0].averages) == expected
    with ema.raw_weights(module):
        raw = {name: tensor.detach().clone() for name, tensor in named.items()}
    for name in expected:
        torch.testing.assert_close(named[name].detach(), raw[name], rtol=0.5, atol=0.2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")


def test_a_step_that_calls_the_one_it_overrides_is_one_update(tmp_path: Path) -> None:
    ema = EMAWeights(0.9)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ema])
    trainer.fit(Regression(make_optimizer=Derived), regression_data(7))
    assert ema.rule[0].updates == 7


def test_groups_that_another_callback_restores_keep_their_averages(tmp_path: Path) -> None:
    class Unfreeze(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters())})

    class Head(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[3].parameters(), lr=0.01)

    def run(epochs: int, ckpt_path: Any = None) -> Any:
        torch.manual_seed(0)
        module = Head()
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[EMAWeights(0.9), Unfreeze()])
        trainer.fit(module, regression_data(4), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        return weights_of(module)

    whole = run(3)
    run(2)
    assert same(run(3, tmp_path / "cut.ckpt"), whole)


def test_lazy_layers_and_fewer_optimizers_on_resume(tmp_path: Path) -> None:
    class Lazy(Regression):
        def __init__(self, optimizers: int) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
            self.count, self.automatic_optimization = optimizers, False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            layers = (self.net[:2], self.net[2:])[: self.count]
            return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in layers], []

    for optimizers in (2, 1):
        ema = EMAWeights(0.9)
        trainer = quiet_trainer(tmp_path, max_epochs=3 - optimizers, callbacks=[ema])
        path = tmp_path / "cut.ckpt" if optimizers == 1 else None
        trainer.fit(Lazy(optimizers), regression_data(4), regression_data(1), ckpt_path=path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        assert len([*ema.rule]) == optimizers
        assert "net.1.running_mean" in ema.rule[0].averages


@pytest.mark.parametrize("other", [StochasticWeightAveraging(swa_lrs=0.01), ModelPruning("l1_unstructured")])
def test_what_else_rewrites_the_weights_is_refused(other: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[EMAWeights(), other])
    with pytest.raises(MisconfigurationException, match=f"EMAWeights and {type(other).__name__}"):
        trainer.fit(Regression(), regression_data(2))
