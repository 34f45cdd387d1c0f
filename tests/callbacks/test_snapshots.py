"""SnapshotEnsemble under a real Trainer."""

import json
import math
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from models import (
    Adversaries,
    Regression,
    Resumable,
    SeedEachStep,
    fp16,
    quiet_trainer,
    regression_data,
    same,
    weights_of,
)
from ranks import run_on_ranks, run_until_killed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import EMAWeights, LearningRateSchedule, SnapshotEnsemble
from lightning_recipes.core.ensembles import Ensemble

pytestmark = [
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:ensemble at step"),  # toys differ or not
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Watch(pl.Callback):
    """The weights after each update, and the learning rates that it was made with."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(
                lambda optimizer, *_: self.rates.append([group["lr"] for group in optimizer.param_groups])
            )
            optimizer.register_step_post_hook(lambda *_: self.weights.append(weights_of(pl_module)))


def members_of(callback: SnapshotEnsemble) -> list[dict[str, Tensor]]:
    return callback.rule.states()


def inside(weights: dict[str, Tensor], name: str = "net.") -> dict[str, Tensor]:
    """Of the submodule that is the member."""
    return {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": [first]}, {"params": others, "lr": 0.01}], lr=0.1, momentum=0.9)


def huang(step: int, steps: int, cycles: int) -> float:
    period = math.ceil(steps / cycles)
    return (math.cos(math.pi * (step % period) / period) + 1) / 2


@pytest.mark.parametrize(
    ("module", "settings", "steps"),
    [
        (Regression, {"max_epochs": 5}, 60),
        (lambda: Regression(batch_norm=True, make_optimizer=two_groups), {"max_epochs": 5}, 60),
        (Regression, {"max_steps": 30, "max_epochs": -1}, 30),
        (Regression, {"max_epochs": 5, "accumulate_grad_batches": 4}, 15),
        (Regression, {"max_epochs": 10, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 30),
        (Regression, {"max_epochs": 5, "precision": "bf16-mixed"}, 60),
        (lambda: Regression(make_optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1)), {"max_epochs": 5}, 60),
    ],
)
def test_a_snapshot_is_the_last_update_of_its_cycle_at_the_lowest_rate(
    module: Callable[[], Any], settings: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    watch, snapshots, own = Watch(), SnapshotEnsemble(5), module()
    trainer = quiet_trainer(tmp_path, callbacks=[snapshots, watch], **settings)
    trainer.fit(own, regression_data(), regression_data(2))
    assert len(watch.weights) == steps
    ends = [steps * (cycle + 1) // 5 for cycle in range(5)]
    assert len(members_of(snapshots)) == 5
    for end, member in zip(ends, members_of(snapshots), strict=True):
        assert same(member, inside(watch.weights[end - 1]))
    own_rates = [group["lr"] for group in trainer.optimizers[0].param_groups]  # given back
    assert own_rates in ([0.01], [0.1, 0.01], [0.1])
    for step, rates in enumerate(watch.rates):
        assert rates == pytest.approx([rate * huang(step, steps, 5) for rate in own_rates])


@pytest.mark.parametrize("scale", [2.0**16, 2.0**24])
def test_updates_that_a_scaler_skips_leave_five_snapshots(scale: float, tmp_path: Path) -> None:
    watch, snapshots = Watch(), SnapshotEnsemble(5)
    trainer = quiet_trainer(tmp_path, max_epochs=5, callbacks=[snapshots, watch], plugins=[fp16(scale)])
    trainer.fit(Regression(), regression_data(), regression_data(2))
    made, ends = len(watch.weights), snapshots.rule.ends
    assert 30 < made < 55
    assert made in (ends[-1], ends[-1] - 1)
    assert len(members_of(snapshots)) == 5
    for end, member in zip([*ends[:-1], made], members_of(snapshots), strict=True):
        assert same(member, inside(watch.weights[end - 1]))
        assert watch.rates[end - 1][0] < 0.1 * 0.01
    assert [step for step in range(1, made) if watch.rates[step][0] > 2 * watch.rates[step - 1][0]] == ends[:-1]


def test_a_skipped_last_update_leaves_five_snapshots(tmp_path: Path) -> None:
    class Overflows(Regression):
        def training_step(self, *args: Any) -> Tensor:
            loss: Tensor = super().training_step(*args)
            return loss * (math.inf if self.trainer.global_step == 59 else 1.0)

    watch, snapshots = Watch(), SnapshotEnsemble(5)
    trainer = quiet_trainer(tmp_path, max_epochs=5, callbacks=[snapshots, watch], plugins=[fp16(1.0)])
    trainer.fit(Overflows(), regression_data(), regression_data(2))
    assert len(members_of(snapshots)) == 5
    assert same(members_of(snapshots)[-1], inside(watch.weights[-1]))


def test_several_optimizers_by_hand(tmp_path: Path) -> None:
    watch, snapshots = Watch(), SnapshotEnsemble(3, module="first")
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[snapshots, watch])
    trainer.fit(Adversaries(), regression_data(), regression_data(2))
    assert len(members_of(snapshots)) == 3
    for cycle, member in enumerate(members_of(snapshots), 1):  # the last of three updates of the batch
        assert same(member, inside(watch.weights[12 * 3 * cycle - 1], "first."))
    assert snapshots.report is not None


class StepsTwice(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_a_cycle_may_end_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    watch, snapshots = Watch(), SnapshotEnsemble(3, cycle_steps=5)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[snapshots, watch])
    trainer.fit(StepsTwice(), regression_data(), regression_data(2))
    assert len(watch.weights) == 16  # the batch of the last update, and no more
    for end, member in zip([5, 10, 15], members_of(snapshots), strict=True):
        assert same(member, inside(watch.weights[end - 1]))


# ---------------------------------------------------------------------------------------------------- resume


class SaveAt(pl.Callback):
    def __init__(self, path: Path, every: int = 5) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step % 11:
            trainer.save_checkpoint(self.path)


class KillAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_and_resumed(
    folder: Path, kill_at: int | None, resume: bool, arguments: dict[str, Any], scaled: bool = False
) -> Any:
    snapshots, path = SnapshotEnsemble(5, **arguments), folder / "last.ckpt"
    others = [EMAWeights(0.9)] if arguments.get("weights") == "average" else []
    callbacks = [SeedEachStep(), snapshots, *others, SaveAt(path), *([KillAt(kill_at)] if kill_at else [])]
    trainer = quiet_trainer(folder, max_epochs=5, callbacks=callbacks, plugins=[fp16(2.0**18)] if scaled else [])
    module = Regression(batch_norm=True, dropout=0.2, make_optimizer=two_groups)
    loader = Resumable(regression_data(11))
    trainer.fit(module, loader, regression_data(2), ckpt_path=path if resume else None)
    assert snapshots.report is not None
    return members_of(snapshots), weights_of(module), str(snapshots.report)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:1000])])
@pytest.mark.filterwarnings("ignore:ensemble not used")
def test_a_snapshot_that_cannot_be_read_costs_no_more_than_the_ensemble(damage: Any, tmp_path: Path) -> None:
    class Damages(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 0:
                damage(tmp_path / "snapshots" / "snapshot_1.pt")

    snapshots = SnapshotEnsemble(2, storage="files")
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[snapshots, Damages()])
    with pytest.warns(UserWarning, match="There is no ensemble: the snapshots cannot be read") as told:
        trainer.fit(Regression(), regression_data(11), regression_data(2))
    assert trainer.global_step == 22
    assert snapshots.ensemble is None
    assert sum("cannot be read" in str(each.message) for each in told) == 1


@pytest.mark.parametrize("kill_at", [28, 33, 51])
@pytest.mark.parametrize(
    "arguments", [{}, {"storage": "files"}, {"weights": "average"}, {"warmup_steps": 3, "reset_momentum": True}]
)
def test_a_killed_run_ends_with_the_same_members(kill_at: int, arguments: dict[str, Any], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    members, weights, report = killed_and_resumed(whole, None, False, arguments)
    assert run_until_killed(killed_and_resumed, cut, kill_at, False, arguments) == -signal.SIGKILL
    again, weights_again, report_again = killed_and_resumed(cut, None, True, arguments)
    assert len(members) == len(again) == 5
    assert all(same(one, other) for one, other in zip(members, again, strict=True))
    assert same(weights, weights_again)
    assert report == report_again


def test_cycles_that_were_shortened_stay_so_when_resumed(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    members, *others = killed_and_resumed(whole, None, False, {}, True)
    assert run_until_killed(killed_and_resumed, cut, 43, False, {}, True) == -signal.SIGKILL
    again, *others_again = killed_and_resumed(cut, None, True, {}, True)
    assert all(same(one, other) for one, other in zip(members, again, strict=True))
    assert same(others[0], others_again[0])
    assert others[1] == others_again[1]


# ---------------------------------------------------------------------------------------------------- the ensemble


class Classifier(pl.LightningModule):
    """Learns three classes of points on a plane; one in five labels is wrong."""

    def __init__(self, seed: int = 0, rate: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        self.rate = rate

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        prediction: Tensor = self(batch[0])
        return prediction

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def classes(points: int, seed: int, batch: int = 16) -> DataLoader[Any]:
    chance = torch.Generator().manual_seed(seed)
    inputs = torch.randn(points, 2, generator=chance)
    targets = (inputs[:, 0] > 0).long() + (inputs.norm(dim=1) > 1.3).long()
    wrong = torch.rand(points, generator=chance) < 0.2
    targets[wrong] = torch.randint(3, (int(wrong.sum()),), generator=chance)
    return DataLoader(TensorDataset(inputs, targets), batch)


def trained(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 40, **settings: Any
) -> Any:
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[*callbacks], **settings)
    trainer.fit(module, classes(160, 1), classes(400, 2, 64))
    return trainer


def findings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


def rules(folder: Path) -> list[str]:
    return [finding["rule"] for finding in findings(folder)]


def losses(network: nn.Module, data: DataLoader[Any]) -> float:
    with torch.no_grad():
        pairs = [(network(inputs), targets) for inputs, targets in data]
    return float(nn.functional.cross_entropy(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])))


def test_the_ensemble_is_better_and_the_report_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshots, module = SnapshotEnsemble(4), Classifier()
    trainer = trained(tmp_path, module, snapshots)
    report, ensemble, test = snapshots.report, snapshots.ensemble, classes(4000, 3, 500)
    assert report is not None
    assert ensemble is not None
    assert report.selection.verdict == "gain"
    assert [member.name for member in report.members] == [f"snapshot {number}" for number in (1, 2, 3, 4)]
    assert report.samples == 400
    alone = []
    for state, told in zip(members_of(snapshots), report.members, strict=True):
        member = Classifier()
        member.load_state_dict(state)
        alone.append(losses(member.eval(), test))
        assert told.loss == pytest.approx(losses(member, classes(400, 2, 64)), rel=1e-4)
    assert losses(ensemble, test) < min(alone)
    assert same(weights_of(module), members_of(snapshots)[-1])  # what training ended with
    metrics = trainer.callback_metrics
    assert float(metrics["ensemble/loss"]) == pytest.approx(report.selection.loss)
    assert {
        "ensemble/gain",
        "ensemble/accuracy",
        "ensemble/calibration_error",
        "ensemble/disagreement",
    } <= metrics.keys()
    text = (tmp_path / "ensemble.md").read_text()
    assert text.startswith("| member | weight | loss |")
    assert report.finding.message in text
    inputs = torch.randn(7, 2)
    probabilities = [
        weight * torch.func.functional_call(module, state, inputs).softmax(1)
        for weight, state in zip(report.selection.weights, members_of(snapshots), strict=True)
    ]
    assert torch.allclose(ensemble(inputs).softmax(1), torch.stack(probabilities).sum(0), atol=1e-6)
    ensemble.save(tmp_path / "one.pt")
    assert torch.allclose(Ensemble.load(tmp_path / "one.pt", Classifier())(inputs), ensemble(inputs))


def test_validation_data_need_not_have_been_used(tmp_path: Path) -> None:
    snapshots, module = SnapshotEnsemble(2), Classifier()
    never = {"check_val_every_n_epoch": 1000, "num_sanity_val_steps": 0}
    never |= {"limit_val_batches": 3, "precision": "64-true"}
    trained(tmp_path, module, snapshots, epochs=2, **never)
    assert snapshots.report is not None
    assert snapshots.report.samples == 3 * 64
    member = Classifier().double()
    member.load_state_dict(members_of(snapshots)[0])
    inputs, targets = classes(400, 2, 64).dataset[: 3 * 64]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(member.eval()(inputs.double()), targets)
    assert snapshots.report.members[0].loss == pytest.approx(float(loss), rel=1e-4)


def test_members_that_do_not_differ_claim_no_gain(tmp_path: Path) -> None:
    snapshots = SnapshotEnsemble(3)
    with pytest.warns(UserWarning, match="The members hardly differ"):
        trained(tmp_path, Classifier(rate=1e-6), snapshots, epochs=3)
    assert snapshots.report is not None
    assert snapshots.report.selection.verdict == "alike"
    assert sorted(snapshots.report.selection.weights) == [0, 0, 1]
    assert "weights can be averaged" in rules(tmp_path)


def test_snapshots_of_two_starts_cannot_be_averaged(tmp_path: Path) -> None:
    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 5:
                pl_module.load_state_dict(Classifier(seed=9).state_dict())

    trained(tmp_path, Classifier(), SnapshotEnsemble(2), Anew(), epochs=10)
    (found,) = [each for each in findings(tmp_path) if each["rule"] == "weights cannot be averaged"]
    assert found["evidence"]["barrier"] > 0.05
    assert found["evidence"]["averaged_loss"] > found["evidence"]["ensemble_loss"] + 0.1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("storage", ["memory", "files"])
def test_test_and_predict_use_the_ensemble(storage: Any, tmp_path: Path) -> None:
    snapshots, module = SnapshotEnsemble(4, evaluate=True, weighting="simplex", storage=storage), Classifier()
    last = ModelCheckpoint(tmp_path)
    trainer = trained(tmp_path, module, last, snapshots, enable_checkpointing=True)
    assert snapshots.ensemble is not None
    test = classes(300, 3, 64)
    expected = losses(snapshots.ensemble, test)
    assert trainer.test(module, test, verbose=False)[0]["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.validate(module, test, verbose=False)[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = torch.cat(trainer.predict(module, test))
    assert torch.allclose(predicted, torch.cat([snapshots.ensemble(inputs) for inputs, _ in test]), atol=1e-6)
    assert "forward" not in vars(module)
    assert losses(module.eval(), test) != pytest.approx(expected, rel=1e-3)
    fresh = quiet_trainer(tmp_path, callbacks=[SnapshotEnsemble(4, evaluate=True, storage=storage)])
    found = fresh.test(Classifier(seed=5), test, ckpt_path=last.best_model_path, verbose=False)
    assert found[0]["test_loss"] == pytest.approx(expected, rel=1e-5)
    if storage == "files":
        loaded = Ensemble.load(tmp_path / "ensemble.pt", Classifier())
        assert losses(loaded, test) == pytest.approx(expected, rel=1e-5)
        assert len(list((tmp_path / "snapshots").iterdir())) == 4


def test_a_test_that_does_not_call_the_module_is_told(tmp_path: Path) -> None:
    snapshots, module = SnapshotEnsemble(2, evaluate=True, module="net.0"), Classifier()
    trainer = trained(tmp_path, module, snapshots, epochs=2)
    snapshots.module = None

    class Around(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    around = Around()
    with pytest.warns(UserWarning, match="Nothing in trainer.test has called the module"):
        trainer.test(around, classes(64, 3), verbose=False)


class Pairs(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["x"], batch["y"]), batch_idx)


@pytest.mark.parametrize("told_how", [False, True])
def test_a_batch_that_is_no_pair(told_how: bool, tmp_path: Path) -> None:
    data = [{"x": inputs, "y": targets} for inputs, targets in classes(160, 1)]
    split = {"split_batch": lambda batch: (batch["x"], batch["y"])} if told_how else {}
    snapshots = SnapshotEnsemble(2, **split)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[snapshots])
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    if told_how:
        trainer.fit(Pairs(), loader, loader)
        assert snapshots.report is not None
        return
    with pytest.warns(
        UserWarning, match="could not be judged .TypeError: a batch must be a pair of inputs and targets"
    ):
        trainer.fit(Pairs(), loader, loader)
    assert snapshots.ensemble is not None
    assert len(snapshots.ensemble.members) == 2


def test_without_validation_data_all_are_in_it(tmp_path: Path) -> None:
    snapshots = SnapshotEnsemble(3)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[snapshots])
    with pytest.warns(UserWarning, match="there is no validation data"):
        trainer.fit(Classifier(), classes(160, 1))
    assert snapshots.ensemble is not None
    assert snapshots.ensemble.combine == "logits"
    assert snapshots.ensemble.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert snapshots.report is None


def test_a_function_may_combine(tmp_path: Path) -> None:
    def middle(outputs: Tensor, weights: Tensor) -> Tensor:
        return outputs.median(0).values

    snapshots = SnapshotEnsemble(3, combine=middle, weighting="uniform")
    trained(tmp_path, Classifier(), snapshots, epochs=3)
    assert snapshots.ensemble is not None
    inputs = torch.randn(5, 2)
    each = torch.stack([member(inputs) for member in snapshots.ensemble.members])
    assert torch.equal(snapshots.ensemble(inputs), each.median(0).values)


class Probabilities(Classifier):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.nll_loss(self(batch[0]).log(), batch[1])


def test_members_that_give_probabilities(tmp_path: Path) -> None:
    logits, probabilities = SnapshotEnsemble(3), SnapshotEnsemble(3, combine="mean")
    trained(tmp_path, Classifier(), logits, epochs=6)
    trained(tmp_path, Probabilities(), probabilities, epochs=6)
    assert logits.report is not None
    assert probabilities.report is not None
    assert probabilities.report.selection.loss == pytest.approx(logits.report.selection.loss, rel=1e-3)
    assert probabilities.ensemble is not None
    assert torch.allclose(probabilities.ensemble(torch.randn(5, 2)).sum(1), torch.ones(5))


def test_the_average_may_be_the_member(tmp_path: Path) -> None:
    for first in (True, False):
        kept: list[dict[str, Tensor]] = []
        ema = EMAWeights(0.9)

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                if trainer.global_step % 10 == 0:
                    with ema.average_weights(pl_module):  # noqa: B023
                        kept.append(weights_of(pl_module))  # noqa: B023

        snapshots = SnapshotEnsemble(3, weights="average")
        callbacks = [snapshots, ema] if first else [ema, snapshots]
        trained(tmp_path, Classifier(), *callbacks, Keep(), epochs=3)
        assert len(kept) == 3
        assert all(same(one, other) for one, other in zip(members_of(snapshots), kept, strict=True))
    with pytest.raises(MisconfigurationException, match="needs EMAWeights beside it"):
        trained(tmp_path, Classifier(), SnapshotEnsemble(3, weights="average"), epochs=3)


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float16", False)])
def test_rounding_is_told_where_it_can_be_seen(dtype: Any, told: bool, tmp_path: Path) -> None:
    snapshots = SnapshotEnsemble(2, dtype=dtype)
    with pytest.warns(UserWarning, match=f"Kept as {dtype}") if told else nullcontext():
        trained(tmp_path, Classifier(), snapshots, epochs=20)
    assert members_of(snapshots)[0]["net.0.weight"].dtype == getattr(torch, dtype)
    assert snapshots.ensemble is not None
    assert next(snapshots.ensemble.members[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("reset", [False, True])
def test_momentum_may_start_anew(reset: bool, tmp_path: Path) -> None:
    after: list[float] = []

    class Momenta(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            states = trainer.optimizers[0].state.values()
            after.append(sum(float(state["momentum_buffer"].abs().sum()) for state in states))

    trained(tmp_path, Classifier(), SnapshotEnsemble(3, reset_momentum=reset), Momenta(), epochs=3)
    assert [step for step, size in enumerate(after, 1) if size == 0] == ([10, 20] if reset else [])


# ---------------------------------------------------------------------------------------------------- lengths


def test_a_time_limit_leaves_whole_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer("00:00:01:00")
    monkeypatch.setattr(timer, "time_remaining", lambda *_: 100.0 - 3.0 * trainer.global_step)
    monkeypatch.setattr(timer, "_check_time_remaining", lambda _: None)
    snapshots = SnapshotEnsemble(5, cycle_steps=12)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[timer, snapshots])
    with pytest.warns(UserWarning, match="The training ended in cycle 3 of 5: there are 2 snapshots"):
        trainer.fit(Classifier(), classes(160, 1), classes(64, 2))
    assert trainer.global_step == 24  # 28 seconds are left, and a cycle takes 36
    assert len(members_of(snapshots)) == 2
    assert snapshots.report is not None


def test_a_run_of_unknown_length_needs_cycle_steps(tmp_path: Path) -> None:
    for settings in ({"max_time": "00:01:00:00", "max_epochs": -1}, {"max_epochs": -1, "max_steps": -1}):
        with pytest.raises(MisconfigurationException, match="needs the length of the run.*give cycle_steps"):
            quiet_trainer(tmp_path, callbacks=[SnapshotEnsemble(2)], **settings).fit(Classifier(), classes(160, 1))
    snapshots = SnapshotEnsemble(2, cycle_steps=7)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_steps=-1, callbacks=[snapshots])
    trainer.fit(Classifier(), classes(160, 1), classes(64, 2))
    assert trainer.global_step == 14
    assert len(members_of(snapshots)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cycles": 20, "cycle_steps": 10}, "20 cycles of 10 updates do not fit into a run of 20"),
        ({"cycles": 30}, "30 cycles do not fit into a run of 20 updates: train longer, or take 20"),
        ({"cycles": 3, "warmup_steps": 7}, "3 cycles with 7 updates of warmup each do not fit into a run of 20"),
        ({"module": "body"}, "has no attribute `body`; there are: \\['net'\\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trained(tmp_path, Classifier(), SnapshotEnsemble(**arguments), epochs=2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cycles": 0}, "cycles must be a whole number of at least 1"),
        ({"cycle_steps": 0}, "cycle_steps must be a whole number of at least 1"),
        ({"cycle_steps": 5, "warmup_steps": 5}, "cycle_steps must be above warmup_steps, 5, got 5"),
        ({"weights": "ema"}, "weights must be 'raw' or 'average', got 'ema'"),
        ({"storage": "disk"}, "storage must be 'memory' or 'files', got 'disk'"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"weighting": "all"}, "weighting must be"),
        ({"combine": "vote"}, "combine must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SnapshotEnsemble(**arguments)


@pytest.mark.parametrize("first", [True, False])
def test_a_prepended_warmup_moves_everything(first: bool, tmp_path: Path) -> None:
    watch, snapshots = Watch(), SnapshotEnsemble(2)
    schedule = LearningRateSchedule("constant", warmup_steps=5)
    callbacks: list[pl.Callback] = [schedule, snapshots] if first else [snapshots, schedule]
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[*callbacks, watch])
    trainer.fit(Regression(), regression_data(), regression_data(2))
    warmed = [0.01 * (step + 1) / 6 for step in range(5)]
    assert [rate for (rate,) in watch.rates] == pytest.approx(
        warmed + [0.01 * huang(step, 24, 2) for step in range(24)]
    )
    for end, member in zip((17, 29), members_of(snapshots), strict=True):
        assert same(member, inside(watch.weights[end - 1]))


@pytest.mark.parametrize(
    ("cycles", "epochs", "cut", "again", "longer", "ends"),
    [
        (5, 5, 24, 10, 5, [12, 24, 28, 33, 37, 42, 46, 51, 55, 60]),  # more cycles
        (5, 5, 30, 5, 3, [12, 24, 32, 34, 36]),  # a shorter run
        (2, 2, 24, 2, 4, [12, 24, 48]),  # a longer one behind the last cycle
        (5, 5, 30, 5, 10, [12, 24, 56, 88, 120]),
        (None, 2, 12, 2, 2, [6, 12]),  # of the updates that are left, as it was not there before
    ],
)
def test_what_is_left_of_a_resumed_run_is_divided(
    cycles: int | None, epochs: int, cut: int, again: int, longer: int, ends: list[int], tmp_path: Path
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    before = [] if cycles is None else [SnapshotEnsemble(cycles)]
    quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[save, *before]).fit(
        Regression(), regression_data(), regression_data(2)
    )
    watch, snapshots = Watch(), SnapshotEnsemble(again)
    trainer = quiet_trainer(tmp_path, max_epochs=longer, callbacks=[snapshots, watch])
    trainer.fit(Regression(), regression_data(), regression_data(2), ckpt_path=tmp_path / f"step={cut}.ckpt")
    assert snapshots.rule.ends == ends
    assert len(members_of(snapshots)) == len(ends)
    assert snapshots.ensemble is not None
    made = [end for end in ends if cycles is None or end > cut]
    for end, member in zip(reversed(made), reversed(members_of(snapshots)), strict=False):
        assert same(member, inside(watch.weights[end - 1 - (0 if cycles is None else cut)]))


def test_a_second_fit_has_more_cycles(tmp_path: Path) -> None:
    snapshots, module = SnapshotEnsemble(2), Regression()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[snapshots])
    trainer.fit(module, regression_data(), regression_data(2))
    first = snapshots.ensemble
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, regression_data(), regression_data(2))
    assert snapshots.rule.ends == [12, 24, 48]
    assert snapshots.ensemble is not first is not None


@pytest.mark.parametrize("combine", ["auto", "mean"])
def test_a_checkpoint_of_the_midst_predicts_as_its_members_do(combine: str, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    snapshots = SnapshotEnsemble(2, combine=combine, evaluate=True)
    quiet_trainer(tmp_path, max_epochs=4, callbacks=[save, snapshots]).fit(
        Regression(), regression_data(), regression_data(2)
    )
    [first, _] = members_of(snapshots)
    module, other = Regression(), SnapshotEnsemble(2, combine=combine, evaluate=True)
    trainer = quiet_trainer(tmp_path, callbacks=[other])
    trainer.validate(module, regression_data(2), ckpt_path=tmp_path / "epoch=1.ckpt")
    told = trainer.callback_metrics["val_loss"]
    module.net.load_state_dict(first)
    alone = quiet_trainer(tmp_path)
    alone.validate(module, regression_data(2))
    assert float(told) == pytest.approx(float(alone.callback_metrics["val_loss"]))


def test_a_module_that_cannot_be_copied_is_trained_to_the_end(tmp_path: Path) -> None:
    class Locks(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net.lock = threading.Lock()  # type: ignore[assignment]

    snapshots = SnapshotEnsemble(2)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[snapshots])
    with pytest.warns(UserWarning, match="There is no ensemble: the module cannot be copied"):
        trainer.fit(Locks(), regression_data(), regression_data(2))
    assert trainer.global_step == 24
    assert len(members_of(snapshots)) == 2


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    snapshots = SnapshotEnsemble(2)
    for epochs in (2, 4):
        trained(tmp_path, Classifier(), snapshots, epochs=epochs)
        assert snapshots.rule.ends == [5 * epochs, 10 * epochs]
        assert len(members_of(snapshots)) == 2


def test_fast_dev_run_does_nothing(tmp_path: Path) -> None:
    snapshots = SnapshotEnsemble()
    quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[snapshots]).fit(Classifier(), classes(160, 1), classes(64, 2))
    assert snapshots.ensemble is None


# ---------------------------------------------------------------------------------------------------- ranks


class Quiet(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def on_ranks(folder: Path, storage: Any) -> Any:
    watch, snapshots = Watch(), SnapshotEnsemble(3, storage=storage)
    from test_distributed import make_strategy

    module = Quiet()
    trainer = quiet_trainer(
        folder, max_epochs=3, callbacks=[snapshots, watch], strategy=make_strategy("ddp"), devices=2
    )
    trainer.fit(module, regression_data(), regression_data(4))
    assert snapshots.report is not None
    assert snapshots.ensemble is not None
    ends = [len(watch.weights) * cycle // 3 for cycle in (1, 2, 3)]
    live = [inside(watch.weights[end - 1]) for end in ends]
    return members_of(snapshots), live, str(snapshots.report), snapshots.report.samples, len(watch.weights)


@pytest.mark.parametrize("storage", ["memory", "files"])
def test_both_ranks_keep_and_weigh_the_same(storage: str, tmp_path: Path) -> None:
    first, second = run_on_ranks(on_ranks, tmp_path, storage)
    assert first[4] == 18
    for members, live, *_ in (first, second):
        assert all(same(one, other) for one, other in zip(members, live, strict=True))
    assert all(same(one, other) for one, other in zip(first[0], second[0], strict=True))
    assert first[2] == second[2]
    assert first[3] == 32  # what both have seen
