"""Two gloo ranks: replicated (DDP) and sharded (ModelParallel with fully_shard, FSDP on the CPU)."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from matrix import Sharded, whole
from models import Fragile, Regression, Resumable, SeedEachStep, quiet_trainer, regression_data, weights_of
from ranks import run_on_ranks
from torch import Tensor, nn

from lightning_recipes import (
    EarlyStopping,
    EMAWeights,
    InitialLossCheck,
    InstabilityDetector,
    LearningRateSchedule,
    OverfitCheck,
    PercentileGradientClipping,
    SnapshotEnsemble,
    UpdateRatioMonitor,
    WarmupSweep,
)
from lightning_recipes.callbacks import measuring
from lightning_recipes.core.schedules import ReduceOnPlateau

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.distributed warns of much that is not ours
TIMEOUT = timedelta(seconds=60)


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP on the CPU, which Lightning and torch refuse by default; for single steps and sharded checkpoints."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def make_strategy(name: str) -> Strategy | str:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    if name == "fsdp":
        return CPUFSDPStrategy(process_group_backend="gloo", timeout=TIMEOUT, state_dict_type="sharded")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        timeout=TIMEOUT,
        save_distributed_checkpoint=name == "sharded",
    )


class Note(pl.Callback):
    """What was validated."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(trainer.callback_metrics["val_loss"].item())


def train(
    folder: Path,
    name: str,
    epochs: int = 2,
    ckpt_path: Path | None = None,
    save_at: Path | None = None,
    extra: tuple[pl.Callback, ...] = (),
    data: Any = None,
) -> dict[str, Any]:
    module = Sharded() if name in ("sharded", "one file") else Regression()
    ema, clipping, note = EMAWeights(0.9), PercentileGradientClipping(window=10, warmup_steps=2), Note()
    alone = name == "alone"
    trainer = quiet_trainer(
        folder,
        max_epochs=epochs,
        callbacks=[SeedEachStep(), ema, clipping, note, *extra],
        strategy="auto" if alone else make_strategy(name),
        devices=1 if alone else 2,
        use_distributed_sampler=False,
        log_every_n_steps=5,
    )
    trainer.fit(module, data or Resumable(regression_data(batches=6)), regression_data(2), ckpt_path=ckpt_path)
    if save_at is not None:
        trainer.save_checkpoint(save_at)
    averaged = whole(dict(module.state_dict())) if name != "fsdp" else {}
    with ema.raw_weights(module):
        raw = whole(dict(module.state_dict())) if name != "fsdp" else {}
    return {
        "average": averaged,
        "raw": raw,
        "clipping": clipping.state_dict()["rule"][0],
        "losses": note.losses,
        "ema": ema.state_dict(),
    }


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert {name.removeprefix("_forward_module.") for name in first} == set(second)
    for name in second:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


class SplitData:
    """Each rank's own half of every batch: together they are the batches of a run alone."""

    def __init__(self) -> None:
        self.rank = int(os.environ["LOCAL_RANK"])

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        for inputs, targets in regression_data(batches=6):
            half = slice(4 * self.rank, 4 * self.rank + 4)
            yield inputs[half], targets[half]


def train_on_halves(folder: Path, name: str) -> dict[str, Any]:
    return train(folder, name, data=SplitData())


def test_ddp_has_the_same_thresholds_and_averages_on_both_ranks_bit_for_bit(tmp_path: Path) -> None:
    first, second = run_on_ranks(train_on_halves, tmp_path, "ddp")
    assert str(first) == str(second)
    for kind in ("average", "raw"):
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())


@pytest.mark.parametrize("name", ["ddp", "sharded", "one file", "fsdp"])
@pytest.mark.parametrize("free_to_read", [True, False])
def test_two_ranks_are_one_run(name: str, free_to_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: free_to_read)
    alone = train(tmp_path, "alone", data=list_loader())
    for rank in run_on_ranks(train_on_halves, tmp_path, name):
        torch.testing.assert_close(rank["clipping"]["norms"], alone["clipping"]["norms"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            rank["clipping"]["thresholds"], alone["clipping"]["thresholds"], rtol=1e-4, atol=1e-4
        )
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        if name != "fsdp":
            close(rank["average"], alone["average"])
            close(rank["raw"], alone["raw"])


def list_loader() -> Resumable:
    data = Resumable(regression_data(batches=6))
    data.__class__ = InOrder
    return data


class InOrder(Resumable):
    def __iter__(self) -> Any:
        return iter(self.batches)


class SaveAt(pl.Callback):
    """Save in training and, on request, in the middle of a validation."""

    def __init__(self, path: Path, validating: bool) -> None:
        self.path, self.validating = path, validating

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8 and not self.validating:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_step == 6 and self.validating and batch_idx == 0:
            trainer.save_checkpoint(self.path)


def uninterrupted(folder: Path, name: str, validating: bool) -> dict[str, Any]:
    return train(folder, name, epochs=3, extra=(SaveAt(folder / "run.ckpt", validating),))


def resumed(folder: Path, name: str) -> dict[str, Any]:
    return train(folder, name, epochs=3, ckpt_path=folder / "run.ckpt")


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize("name", ["ddp", "sharded", "one file", "fsdp"])
def test_a_checkpoint_resumes_bit_for_bit(name: str, validating: bool, tmp_path: Path) -> None:
    whole_run = run_on_ranks(uninterrupted, tmp_path, name, validating)
    for one, other in zip(whole_run, run_on_ranks(resumed, tmp_path, name), strict=True):
        assert str(one["clipping"]) == str(other["clipping"])
        assert str(one["ema"]) == str(other["ema"])
        assert one["losses"][-1] == other["losses"][-1]
        for kind in ("average", "raw"):
            assert one[kind].keys() == other[kind].keys()
            assert all(torch.equal(value, other[kind][key]) for key, value in one[kind].items())


def saved(folder: Path, name: str) -> tuple[Any, Any]:
    outcome = train(folder, name, save_at=folder / "run.ckpt")
    return outcome["average"], outcome["raw"]


def test_a_single_file_of_a_sharded_run_holds_the_average_and_loads_alone(tmp_path: Path) -> None:
    (average, raw), _ = run_on_ranks(saved, tmp_path, "one file")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    for key, expected in (("state_dict", average), ("raw_weights", raw)):
        assert checkpoint[key].keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in checkpoint[key].items())
    loaded = Regression.load_from_checkpoint(tmp_path / "run.ckpt")
    assert all(torch.equal(value, average[name]) for name, value in weights_of(loaded).items())


def nan_on_one_rank(folder: Path) -> list[float]:
    class PoisonsOneRank(Regression):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norms.append(sum(p.grad is not None for p in self.parameters()))

        def on_after_backward(self) -> None:
            if self.global_step == 3 and self.trainer.global_rank == 1:
                for parameter in self.parameters():
                    parameter.grad.fill_(torch.nan)

    norms: list[float] = []
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        callbacks=[PercentileGradientClipping(skip_nonfinite=True)],
        strategy=make_strategy("ddp"),
        devices=2,
        use_distributed_sampler=False,
    )
    module = PoisonsOneRank()
    trainer.fit(module, regression_data(batches=6))
    return [*norms, *(value.sum().item() for value in module.state_dict().values())]


def test_a_nan_on_one_rank_cancels_the_update_on_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(nan_on_one_rank, tmp_path)
    assert first == second
    assert first[:6] == [4, 4, 4, 0, 4, 4]
    assert all(value == value for value in first)


def stop_early(folder: Path, losses: list[list[float]]) -> tuple[int, list[float], dict[str, Tensor]]:
    class Scripted(Regression):
        def on_validation_epoch_end(self) -> None:
            self.log("scripted", losses[self.trainer.global_rank][self.current_epoch])

    module, stopping = Scripted(), EarlyStopping("scripted", patience=2)
    trainer = quiet_trainer(
        folder,
        max_epochs=8,
        callbacks=[stopping],
        strategy=make_strategy("ddp"),
        devices=2,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, regression_data(batches=2), regression_data(2))
    return trainer.current_epoch, stopping.rule.curve.values, whole(dict(module.state_dict()))


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([[5.0, 3.0, 4.0, 5.0, 9.0, 9.0], [5.0, 5.0, 4.9, 3.0, 9.0, 9.0]], 4),  # on the mean the second is best
        ([[5.0, 4.0, 3.0, 2.0], [5.0, 4.0, float("nan"), 2.0]], 3),
    ],
)
def test_ranks_stop_together_and_leave_with_the_same_weights(
    losses: list[list[float]], epochs: int, tmp_path: Path
) -> None:
    (ended, curve, weights), (other_ended, other_curve, other_weights) = run_on_ranks(stop_early, tmp_path, losses)
    assert ended == other_ended == epochs
    assert str(curve) == str(other_curve)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def restore_shards(folder: Path, restore: bool) -> None:
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        callbacks=[EarlyStopping("val_loss", restore_best_weights=restore)],
        strategy=make_strategy("one file"),
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(Sharded(), Resumable(regression_data(batches=2)), regression_data(2))


def test_restoring_shards_is_refused_and_stopping_without_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ModelParallelStrategy\): set restore_best_weights=False"):
        run_on_ranks(restore_shards, tmp_path, True)
    run_on_ranks(restore_shards, tmp_path, False)


class PoisonsOneRank(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        poisoned = batch_idx == 45 and self.trainer.global_rank == 1
        return loss * float("nan") if poisoned else loss


def poison_one_rank(folder: Path, action: Any, log_every: int) -> tuple[int, int, list[int], dict[str, Tensor]]:
    module, detector = PoisonsOneRank(), InstabilityDetector(action, keep_every=10)
    noticed: list[int] = []
    decide = detector._act

    def act(*args: Any) -> None:
        noticed.append(args[-1].step)
        decide(*args)

    detector._act = act  # type: ignore[method-assign]
    callbacks = [detector, EMAWeights(0.9), PercentileGradientClipping()]
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        callbacks=callbacks,
        strategy=make_strategy("ddp"),
        devices=2,
        use_distributed_sampler=False,
        log_every_n_steps=log_every,
    )
    trainer.fit(module, regression_data(batches=60))
    return trainer.global_step, detector.rewinds, noticed, whole(dict(module.state_dict()))


@pytest.mark.parametrize(
    ("action", "steps", "rewinds"), [("skip", 60, 0), ("rewind", 60, 1), ("stop", 50, 0), ("warn", 60, 0)]
)
def test_an_instability_on_one_rank_is_everybodys(action: str, steps: int, rewinds: int, tmp_path: Path) -> None:
    first, second = run_on_ranks(poison_one_rank, tmp_path, action, 10)
    assert first[:2] == second[:2] == (steps, rewinds)
    assert first[2] == second[2]
    assert first[2][0] == 45
    assert str(first[3]) == str(second[3])
    assert action == "warn" or all(value.isfinite().all() for value in first[3].values())
    if action in ("skip", "rewind"):  # which look at once
        assert "; first on rank 1, in the loss." in (tmp_path / "findings.jsonl").read_text()


def watch_halves(folder: Path, action: Any) -> str:
    detector = InstabilityDetector(action)
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=[detector],
        strategy=make_strategy("ddp"),
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(Regression(), SplitData())
    return str(detector.rule.state_dict())


@pytest.mark.parametrize("action", ["warn", "skip"])
def test_ranks_with_data_of_their_own_see_the_same_losses(action: str, tmp_path: Path) -> None:
    first, second = run_on_ranks(watch_halves, tmp_path, action)
    assert first == second
    assert "'step': 12" in first


class ShardedFragile(Fragile):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        for layer in (self.first, self.last, *self.blocks):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def sweep_on_ranks(folder: Path, name: str, sweep: WarmupSweep | None, steps: int) -> Any:
    module = Fragile() if name == "ddp" else ShardedFragile()
    used: list[float] = []

    class Looks(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    callbacks = [Looks()] if sweep is None else [sweep, Looks()]
    trainer = quiet_trainer(
        folder, max_steps=steps, max_epochs=-1, callbacks=callbacks, strategy=make_strategy(name), devices=2
    )
    torch.manual_seed(5)
    trainer.fit(module, regression_data(40, 16, shuffle=True))
    trained = str(whole(dict(module.state_dict()))), str(torch.get_rng_state()), os.environ.get("WORLD_SIZE")
    if sweep is None:
        return used, trained
    assert sweep.result is not None
    trials = sorted((str(trial), outcome.stable, outcome.steps) for trial, outcome in sweep.result.outcomes.items())
    return used, trained, trials, sweep.result.best


@pytest.mark.parametrize("name", ["ddp", pytest.param("one file", marks=pytest.mark.everything)])
def test_all_ranks_run_the_same_trials_and_take_the_same_warmup(name: str, tmp_path: Path) -> None:
    sweep = WarmupSweep(unstable_base_learning_rate=2e-4, seeds=1, path=str(tmp_path / "kept.json"))
    first, second = run_on_ranks(sweep_on_ranks, tmp_path, name, sweep, 300)
    assert first == second
    used, _, trials, best = first
    assert 3 <= best.warmup_steps <= 30
    assert len(used) == 300 + best.warmup_steps
    assert any(not stable for _, stable, _ in trials)
    again, _ = run_on_ranks(sweep_on_ranks, tmp_path, name, sweep, 300)  # from rank zero's file
    assert again == first


@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.everything), "one file"])
def test_a_sweep_that_finds_no_warmup_leaves_the_training_of_both_ranks_as_it_was(name: str, tmp_path: Path) -> None:
    sweep = WarmupSweep(base_learning_rate=1e-4, seeds=1)
    swept = run_on_ranks(sweep_on_ranks, tmp_path, name, sweep, 100)
    bare = run_on_ranks(sweep_on_ranks, tmp_path, name, None, 100)
    assert swept[0][3].warmup_steps == 0
    assert [rank[:2] for rank in swept] == [rank[:2] for rank in bare]


def plateau_on_ranks(folder: Path) -> Any:
    schedule = LearningRateSchedule(ReduceOnPlateau("val_loss", patience=1, min_delta=100.0))
    trainer = quiet_trainer(folder, max_epochs=5, callbacks=[schedule], strategy=make_strategy("ddp"), devices=2)
    trainer.fit(Regression(), regression_data(), regression_data(4))
    assert schedule.plateau is not None
    return schedule.plateau.milestones, schedule.plateau.checks.curve.values


def test_a_plateau_is_everybodys(tmp_path: Path) -> None:
    first, second = run_on_ranks(plateau_on_ranks, tmp_path)
    assert first == second
    assert first[0]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (SnapshotEnsemble(), "SnapshotEnsemble cannot keep a model in shards"),
    ],
)
def test_what_needs_whole_weights_refuses_shards(callback: pl.Callback, message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_on_ranks(train_in_shards, tmp_path, callback)


def train_in_shards(folder: Path, callback: pl.Callback) -> None:
    trainer = quiet_trainer(
        folder, max_steps=200, max_epochs=-1, callbacks=[callback], strategy=make_strategy("full"), devices=2
    )
    trainer.fit(Sharded(), regression_data())


def test_both_ranks_raise(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="TrainingInstability: not finite at step 45.*first on rank 1, in the loss"):
        run_on_ranks(poison_one_rank, tmp_path, "raise", 10)


def ratios_on_ranks(folder: Path, name: str) -> list[tuple[float, dict[str, float], float]]:
    """Of a run that validates in between, after which the root of a sharded model stays gathered."""
    monitor, seen = UpdateRatioMonitor(1), []
    take = monitor.rule[0].update

    def note(step: int, ratios: dict[str, float], loss: float, *more: Any) -> None:
        seen.append((step, ratios, loss))
        take(step, ratios, loss, *more)

    monitor.rule[0].update = note  # type: ignore[method-assign]
    monitor.rule.make = lambda: rule
    rule = monitor.rule[0]
    alone = name == "alone"
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=[monitor],
        strategy="auto" if alone else make_strategy(name),
        devices=1 if alone else 2,
        use_distributed_sampler=False,
        log_every_n_steps=4,
    )
    module = Sharded() if name in ("sharded", "one file") else Regression()
    trainer.fit(module, regression_data(batches=6) if alone else SplitData(), regression_data(2))
    return seen


@pytest.mark.parametrize("name", ["ddp", "one file", "fsdp"])
def test_the_update_ratio_is_that_of_the_whole_layer_on_every_rank(name: str, tmp_path: Path) -> None:
    expected = ratios_on_ranks(tmp_path, "alone")
    first, second = run_on_ranks(ratios_on_ranks, tmp_path, name)
    assert first == second
    assert len(first) == 12
    for (step, ratios, loss), (expected_step, expected_ratios, expected_loss) in zip(first, expected, strict=True):
        assert step == expected_step
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert ratios == pytest.approx(expected_ratios, rel=1e-3)


def check_on_halves(folder: Path, checks: bool) -> Any:
    initial, overfit = InitialLossCheck(batches=3), OverfitCheck(max_steps=20)
    module = Regression(batch_norm=True, dropout=0.2)
    torch.manual_seed(4)
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=[initial, overfit] if checks else [],
        strategy=make_strategy("ddp"),
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(module, SplitData())
    weights = str(whole(dict(module.state_dict())))
    return weights, str(torch.get_rng_state()), str(overfit.fits), len(initial.results)


def test_checks_before_training_leave_no_trace_on_two_ranks_and_try_the_same(tmp_path: Path) -> None:
    without = run_on_ranks(check_on_halves, tmp_path / "without", False)
    checked = run_on_ranks(check_on_halves, tmp_path / "with", True)
    assert [rank[:2] for rank in checked] == [rank[:2] for rank in without]
    first, second = (rank[2:] for rank in checked)
    assert first[1] == second[1] == 1
    assert first[0].count("Fit(") == second[0].count("Fit(") >= 1
    assert len((tmp_path / "with" / "findings.jsonl").read_text().splitlines()) >= 2


def check_shards(folder: Path, name: str) -> None:
    recipe = InitialLossCheck() if name == "InitialLossCheck" else OverfitCheck()
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[recipe], strategy=make_strategy("one file"), devices=2)
    trainer.fit(Sharded(), regression_data(batches=2))


@pytest.mark.parametrize("name", ["InitialLossCheck", "OverfitCheck"])
def test_shards_are_refused_by_the_checks_before_training(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"{name} cannot train copies of a model in shards"):
        run_on_ranks(check_shards, tmp_path, name)


class OnRankZero(Regression):
    """Logs on one rank what is judged on all of them."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_global_zero:
            self.log("val_loss", self.loss(batch), rank_zero_only=True)


def judges(folder: Path, callback: pl.Callback) -> None:
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[callback], strategy=strategy, devices=2)
    trainer.fit(OnRankZero(), regression_data(2), regression_data(2))


@pytest.mark.parametrize("callback", [EarlyStopping("val_loss"), LearningRateSchedule(ReduceOnPlateau())])
def test_a_metric_that_one_rank_logs_alone_is_an_error_on_all(callback: pl.Callback, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)rank 0 died.*'?val_loss'?.*rank 1 died.*val_loss"):
        run_on_ranks(judges, tmp_path, callback)


class Gathers(Regression):
    """A collective in the step itself; one rank's batch is bad."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        if batch_idx == 3 and self.trainer.global_rank == 1:
            inputs.fill_(float("nan"))
        outputs = self.all_gather(self.net(inputs), sync_grads=True)
        return torch.nn.functional.mse_loss(outputs.flatten(0, 1), self.all_gather(targets).flatten(0, 1))


def gather_on_ranks(folder: Path) -> bool:
    module = Gathers()
    trainer = quiet_trainer(
        folder, max_epochs=1, callbacks=[InstabilityDetector("skip")], strategy=make_strategy("ddp"), devices=2
    )
    trainer.fit(module, regression_data(batches=12))
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_a_step_with_a_collective_is_not_run_again_by_one_rank(tmp_path: Path) -> None:
    assert run_on_ranks(gather_on_ranks, tmp_path) == [True, True]
