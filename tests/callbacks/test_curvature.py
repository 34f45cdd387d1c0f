import copy
import csv
import json
import math
import os
import signal
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
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
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_recipes import CriticalPointProbe, EMAWeights
from lightning_recipes.callbacks import curvature, replay
from lightning_recipes.core import hessian

GIVEN = nn.functional.mse_loss


def fit(
    folder: Path,
    module: pl.LightningModule,
    *callbacks: Any,
    data: Any = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> pl.Trainer:
    torch.manual_seed(2)
    trainer = quiet_trainer(folder, **{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, data if data is not None else regression_data(shuffle=True), ckpt_path=ckpt_path)
    return trainer


def findings_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.rglob("findings.jsonl") for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------------------- no trace


class Record(pl.Callback):
    """Everything that a training goes through."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([each.clone() for each in batch])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        self.seen.append([outputs["loss"], torch.get_rng_state(), weights_of(pl_module), gradients])
        self.seen.append([copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers])
        self.seen.append([module.training for module in pl_module.modules()])


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


class Keeps(Regression):
    """Has all the habits that a second run of the step could be noticed by."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(batch_norm=True, dropout=0.3, **kwargs)
        self.losses: list[Tensor] = []
        self.count, self.fired = 0, 0
        self.seen: dict[str, list[float]] = {"losses": []}
        self.generator, self.average = torch.Generator(), torch.zeros(())
        self.register_buffer("calls", torch.zeros(()))
        self.net[0].weight.register_hook(self.fire)

    def fire(self, gradient: Tensor) -> None:
        self.fired += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        self.calls += 1
        batch[0].mul_(0.5)  # in place
        loss = self.loss(batch) + 0.01 * functional.dropout(self.net[0].weight, 0.5).square().sum()
        self.losses.append(loss.detach())
        self.seen["losses"].append(loss.item())
        self.average.lerp_(loss.detach().to(self.average), 0.1)
        self.log("loss", loss)
        self.logger.log_metrics({"beside": loss.item()}, self.count)
        return loss + (torch.rand((), generator=self.generator) * self.average).to(loss)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"precision": "bf16-mixed"}, {}),
        ({"precision": "bf16-true"}, {}),
        ({"precision": "64-true"}, {}),
        ({"plugins": "fp16"}, {}),
        ({"accumulate_grad_batches": 5}, {"make_optimizer": fused}),
    ],
    ids=["single", "bf16-mixed", "bf16", "double", "fp16", "accumulated and fused"],
)
def test_the_run_is_bit_for_bit_as_without(settings: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for probes in (False, True):
        given = {**settings, "plugins": [fp16()]} if "plugins" in settings else settings
        record, module = Record(), Keeps(**options)
        probe = CriticalPointProbe(
            every_n_steps=2 if "accumulate_grad_batches" in settings else 7, batches=3, max_products=4
        )
        logger = CSVLogger(tmp_path / str(probes))
        trainer = fit(logger.log_dir, module, record, *([probe] if probes else []), logger=logger, **given)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            logged = [line["beside"] for line in csv.DictReader(file) if line["beside"]]
        runs.append([record.seen, module.losses, module.seen, module.count, module.fired, weights_of(module), logged])
        assert isinstance(module.net[0].weight, nn.Parameter)
        if probes:
            assert probe.finding is not None
            assert {"sharpness", "smallest_curvature", "relative_gradient"} <= set(trainer.callback_metrics)
    assert alike(runs[0], runs[1])


def test_the_comparison_would_notice_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for forgets in (False, True):
        record = Record()
        with monkeypatch.context() as patched:
            if forgets:
                patched.setattr(replay, "isolate_rng", nullcontext)
            probe = CriticalPointProbe(every_n_steps=7, batches=2, max_products=2)
            fit(tmp_path, Keeps(), record, probe, logger=CSVLogger(tmp_path))
        runs.append(record.seen)
    assert not alike(runs[0], runs[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_goes_on_training(tmp_path: Path) -> None:
    runs = []
    probe = CriticalPointProbe(every_n_steps=7, batches=2, max_products=2)
    for probes in ([], [], [probe]):  # in the first one it computes differently, before it has seen a few calls
        module = Regression(batch_norm=True, dropout=0.2)
        module.net = torch.jit.script(module.net)
        fit(tmp_path, module, *probes)
        runs.append(weights_of(module))
    assert same(*runs[1:])
    assert probe.finding is not None


# ---------------------------------------------------------------------------------- the right numbers


class Given(pl.LightningModule):
    """Trains a model on pairs; each batch is one."""

    def __init__(self, model: nn.Module, make_optimizer: Any, loss: Any = GIVEN) -> None:
        super().__init__()
        self.model, self.make_optimizer, self.given = model, make_optimizer, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.given(self.model(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def exact_sharpness(module: Given, batches: Any) -> float:
    """From the dense Hessian of the trainable parameters."""
    trained = {name: p.detach().double() for name, p in module.model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trained.values()]
    module = module.double().eval()

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(trained, trained.values(), flat.split(sizes), strict=True)
        values = {name: piece.view_as(p) for name, p, piece in pieces}
        losses = [
            module.given(torch.func.functional_call(module.model, values, (_double(x),)), _double(y))
            for x, y in batches
        ]
        return torch.stack(losses).mean()

    flat = torch.cat([p.reshape(-1) for p in trained.values()])
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat)
    return float(torch.linalg.eigvalsh(hessian)[-1])


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class Tied(nn.Module):
    """Token embedding and output share their weights; attention in between."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.attention = attention
        self.mix: nn.Module = (
            nn.MultiheadAttention(4, 2, 0.2, batch_first=True) if attention == "module" else nn.GRU(4, 4, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.attention == "module":
            x = x + self.mix(x, x, x, need_weights=False)[0]
        elif self.attention == "function":
            x = x + functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        else:
            x = x + self.mix(x)[0]
        return self.out(x).transpose(1, 2)


def tokens(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(6, (3, 5), generator=generator), torch.randint(6, (3, 5), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("attention", ["module", "function", "gru"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_attention_recurrence_and_tied_weights(attention: str, precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Given(Tied(attention), partial(torch.optim.SGD, lr=0.1), functional.cross_entropy)
    if attention == "function":
        module.model.mix.requires_grad_(False)  # frozen
    trainer = fit(
        tmp_path, module, CriticalPointProbe(), data=DataLoader(tokens(), batch_size=None), precision=precision
    )
    exact = exact_sharpness(module, tokens())
    assert float(trainer.callback_metrics["sharpness"]) == pytest.approx(exact, rel=0.01)
    assert float(trainer.callback_metrics["sharpness_over_limit"]) == pytest.approx(0.1 * exact / 2, rel=0.01)


def test_the_end_is_that_of_the_trained_weights_with_an_average_too(tmp_path: Path) -> None:
    ends = []
    for others in ([], [EMAWeights(0.9)]):
        for callbacks in ([CriticalPointProbe(), *others], [*others, CriticalPointProbe()]):
            trainer = fit(tmp_path, Regression(), *callbacks)
            ends.append(float(trainer.callback_metrics["sharpness"]))
    assert len(set(ends)) == 1
    assert [each["rule"] for each in findings_of(tmp_path)] == ["sharpness"] * 4


@pytest.mark.parametrize(("learning_rate", "compared"), [(0.1, True), (0.0, False)])
def test_a_learning_rate_of_zero_can_stay_anywhere(learning_rate: float, compared: bool, tmp_path: Path) -> None:
    module = Given(nn.Linear(3, 2), partial(torch.optim.SGD, lr=learning_rate), functional.mse_loss)
    data = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(8)]
    fit(tmp_path, module, CriticalPointProbe(), data=DataLoader(data, batch_size=None))
    (found,) = findings_of(tmp_path)
    assert ("of what the optimizer can stay at" in found["message"]) == compared


def test_a_look_at_the_end_is_of_a_sample_without_doubles(tmp_path: Path) -> None:
    probe = CriticalPointProbe(batches=8, every_n_steps=9)
    shares = []
    original = curvature.measure

    def spy(*args: Any, **kwargs: Any) -> Any:
        shares.append(kwargs["share"])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(curvature, "measure", spy)
        fit(tmp_path, Regression(), probe, data=regression_data(5), max_epochs=3)
    assert shares == [1.0]
    assert probe.finding is not None
    assert probe.finding.evidence["batches"] == 5


# ---------------------------------------------------------------------------------- verdicts during a run


class Valley(pl.LightningModule):
    """A loss of two weights, the same for every batch."""

    def __init__(self, start: tuple[float, float], lr: float, loss: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))
        self.lr, self.given = lr, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.given(*self.weight)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def walls(x: Tensor, y: Tensor) -> Tensor:
    return 1 + torch.log(torch.cosh(4 * x)) + y**2  # steep to both sides of its bottom


@pytest.mark.filterwarnings("ignore:bouncing", "ignore:saddle")
@pytest.mark.parametrize(
    ("start", "lr", "loss", "said", "severity"),
    [
        ((0.3, 0.0), 0.15, walls, "bouncing between the walls", "warning"),
        ((0.0, 0.0), 0.01, lambda x, y: 2 + x**2 - y**2 + y**4, "saddle", "warning"),
        ((0.0, 0.0), 0.01, lambda x, y: 2 + x**2 + y**2, "local minimum", "info"),
        ((1.0, 1.0), 1e-6, lambda x, y: 2 + x**2 + y**2, "still descending", "info"),
    ],
)
def test_what_a_training_is_stuck_at(
    start: Any, lr: float, loss: Any, said: str, severity: str, tmp_path: Path
) -> None:
    probe = CriticalPointProbe(patience=20)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[probe])
    trainer.fit(Valley(start, lr, loss), regression_data(12))
    found = [each for each in findings_of(tmp_path) if each["rule"] != "sharpness"]
    assert [(each["rule"], each["severity"]) for each in found] == [(said, severity)]
    assert "  " not in found[0]["message"]


def test_a_run_that_falls_is_not_looked_at(tmp_path: Path) -> None:
    probe = CriticalPointProbe(patience=40, at_end=False)
    fit(tmp_path, Regression(make_optimizer=partial(torch.optim.SGD, lr=0.003)), probe, data=regression_data(40, 512))
    assert probe.finding is None
    assert findings_of(tmp_path) == []


def test_the_state_that_is_saved_has_the_losses_that_were_not_read(tmp_path: Path) -> None:
    probe = CriticalPointProbe(every_n_steps=1000)
    fit(tmp_path, Regression(), probe)
    assert len(probe.state_dict()["unread"]) == 24
    other = CriticalPointProbe()
    other.load_state_dict(probe.state_dict())
    assert other.state_dict() == probe.state_dict()


def looks_of(monkeypatch: pytest.MonkeyPatch, folder: Path, probe: CriticalPointProbe, **settings: Any) -> list[int]:
    """The updates after which it looked."""
    looked = []

    def note(self: Any, trainer: pl.Trainer, pl_module: Any) -> Any:
        looked.append(trainer.global_step)
        return surface(self, trainer, pl_module)

    surface = CriticalPointProbe._surface
    with monkeypatch.context() as patched:
        patched.setattr(CriticalPointProbe, "_surface", note)
        module = Regression(make_optimizer=partial(torch.optim.SGD, lr=0.0))
        fit(folder, module, probe, data=settings.pop("data", None), **settings)
    return looked


def test_every_so_many_updates_with_accumulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe = CriticalPointProbe(every_n_steps=2, batches=3, max_products=3, at_end=False)
    assert looks_of(monkeypatch, tmp_path, probe, accumulate_grad_batches=5) == [2, 4, 6]  # three an epoch
    probe = CriticalPointProbe(every_n_steps=4, batches=1, max_products=3)
    assert looks_of(monkeypatch, tmp_path, probe, accumulate_grad_batches=5) == [4, 6]


def test_looks_at_stalls_cost_a_tenth_of_the_run_but_for_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = CriticalPointProbe(patience=20, batches=1, max_products=3, at_end=False)
    looked = looks_of(monkeypatch, tmp_path / "one", probe, max_epochs=20)
    cost = 1 + 2 * 3 + 4  # a gradient, three products, steps along the gradient
    assert probe.rule.spent == cost * len(looked)
    assert looked[0] == 20
    assert all(step >= 10 * cost * earlier for earlier, step in enumerate(looked))
    assert len(looked) in (2, 3)  # of 240 updates
    probe = CriticalPointProbe(patience=20, batches=1, max_products=3, at_end=False)
    looked = looks_of(monkeypatch, tmp_path / "accumulated", probe, max_epochs=40, accumulate_grad_batches=4)
    assert probe.rule.spent == pytest.approx(cost * len(looked) / 4)  # an update is four gradients


def test_a_sample_that_an_epoch_began_in_the_middle_is_filled_in_the_next(tmp_path: Path) -> None:
    probe = CriticalPointProbe(batches=4, at_end=False)
    fit(tmp_path, Regression(), SaveAt(tmp_path / "last.ckpt", 10), data=Resumable(regression_data(12)), max_epochs=1)
    sizes = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            sizes.append(sorted(probe._sample))

    fit(
        tmp_path,
        Regression(),
        probe,
        Look(),
        data=Resumable(regression_data(12)),
        max_epochs=3,
        ckpt_path=tmp_path / "last.ckpt",
    )
    assert sizes[2] == [10, 11]
    assert sizes[-1] == [0, 1, 10, 11]


# ---------------------------------------------------------------------------------- killed and resumed


class SaveAt(pl.Callback):
    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step % 12:
            trainer.save_checkpoint(self.path)


class KillAt(pl.Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Hollow(Regression):
    """Every sample of its batches is alike: what is found does not depend on where a resumed run takes one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = functional.dropout(self.net[0].weight, 0.3).square().mean()  # draws random numbers
        return 0 * noise + 1 + (self.net[0].weight.square() - 0.01).square().sum()


def train_and_look(folder: Path, kill_at: int | None, resume: bool) -> str:
    probe = CriticalPointProbe(every_n_steps=9, patience=20, batches=1)
    module = Hollow(make_optimizer=partial(torch.optim.SGD, lr=1e-4), schedule=True)
    last = folder / "last.ckpt"
    callbacks = [SeedEachStep(), probe, SaveAt(last, 5), KillAt(kill_at)]
    trainer = quiet_trainer(folder, max_epochs=5, callbacks=callbacks)
    trainer.fit(module, Resumable(regression_data()), ckpt_path=last if resume else None)
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return str([weights_of(module), states, probe.state_dict(), torch.get_rng_state()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kill_at", [27, 57])
def test_a_killed_run_resumes_with_the_same_looks(kill_at: int, tmp_path: Path) -> None:
    whole = train_and_look(tmp_path / "whole", None, False)
    assert run_until_killed(train_and_look, tmp_path / "cut", kill_at, False) == -signal.SIGKILL
    assert train_and_look(tmp_path / "cut", None, True) == whole
    told = [
        {(each["rule"], each["step"], each["message"]) for each in findings_of(tmp_path / name)}
        for name in ("whole", "cut")
    ]
    assert told[0] == told[1]
    assert len(told[0]) >= 3


def test_a_look_that_was_due_when_the_run_was_saved_waits_for_a_sample(tmp_path: Path) -> None:
    train_and_look(tmp_path, None, False)
    (tmp_path / "findings.jsonl").unlink()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 55
    for name, state in saved["callbacks"].items():
        if "CriticalPointProbe" in name:
            state.update(is_due=True, told="")
    torch.save(saved, tmp_path / "last.ckpt")
    train_and_look(tmp_path, None, True)
    assert findings_of(tmp_path)[0]["step"] == 56


# ---------------------------------------------------------------------------------- what cannot be looked at


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, torch.ones(16, 16))


def test_an_operation_without_second_derivative_is_named_and_training_goes_on(tmp_path: Path) -> None:
    module = Regression()
    module.net[1] = Distances()
    trainer = fit(tmp_path, module, CriticalPointProbe(every_n_steps=5))
    (found,) = findings_of(tmp_path)
    assert (found["rule"], found["severity"]) == ("curvature not measured", "info")
    assert "_cdist_backward" in found["message"]
    assert trainer.global_step == 24


def test_a_second_derivative_that_autograd_gets_wrong_in_silence_is_noticed(tmp_path: Path) -> None:
    module = Regression()
    module.net[1] = type("Doubled", (nn.Module,), {"forward": lambda self, x: Once.apply(x.tanh())})()
    fit(tmp_path, module, CriticalPointProbe(every_n_steps=5, at_end=False))
    (found,) = findings_of(tmp_path)
    assert "not symmetric" in found["message"]
    assert "(Once?)" in found["message"]


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    class Broken(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * math.nan

    fit(tmp_path, Broken(), CriticalPointProbe())
    (found,) = findings_of(tmp_path)
    assert "not finite" in found["message"]


class Complex(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.cfloat))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * self.factor.abs()


class PassesOver(Regression):
    """Has no loss, now and then."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) if torch.rand(()) < 0.5 else None


class ReadsItself(Regression):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


class Prepares(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.first(batch[0]), batch[1]


@pytest.mark.filterwarnings("ignore:.*dataloader_iter", "ignore:.*returned `None`")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Complex, "complex"),
        (PassesOver, "returned None"),
        (ReadsItself, "not an iterator"),
        (Prepares, "graph leaves"),
    ],
)
def test_what_it_cannot_look_at_trains_all_the_same(make: Any, reason: str, tmp_path: Path) -> None:
    runs = []
    for probes in ([], [CriticalPointProbe(every_n_steps=2, batches=2, max_products=2)]):
        module = make()
        fit(tmp_path, module, *probes)
        runs.append(weights_of(module))
    assert same(*runs)
    (found,) = findings_of(tmp_path)
    assert found["rule"] == "curvature not measured"
    assert reason in found["message"]


class Moves:
    """A batch that moves itself, in place."""

    def __init__(self, pair: Any) -> None:
        self.pair, self.moved = pair, 0

    def to(self, *_: Any, **__: Any) -> "Moves":
        self.moved += 1
        return self


def test_a_batch_of_the_run_stays_where_it_is(tmp_path: Path) -> None:
    class Counts(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch.moved)
            return self.loss(batch.pair)

    seen: list[int] = []
    batches: Any = [Moves(each) for each in regression_data(4)]
    fit(tmp_path, Counts(), CriticalPointProbe(at_end=False), data=DataLoader(batches, batch_size=None), max_epochs=1)
    assert seen == [1] * 4


def test_manual_optimization_wants_a_loss(tmp_path: Path) -> None:
    class Both(CriticalPointProbe):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Tensor:
            return GIVEN(pl_module.first(batch[0]), batch[1]) + GIVEN(pl_module.second(batch[0]), batch[1])

    fit(tmp_path / "without", Adversaries(), CriticalPointProbe())
    (found,) = findings_of(tmp_path / "without")
    assert "manual" in found["message"]
    module = Adversaries()
    fit(tmp_path / "with", module, Both(batches=100), data=regression_data())
    inputs = torch.cat([batch[0] for batch in regression_data()])
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    exact = torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(inputs))[-1]
    (found,) = findings_of(tmp_path / "with")
    assert found["evidence"]["sharpness"] == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("name", ["shards", "deepspeed"])
def test_shards_are_refused(name: str) -> None:
    strategy: Any = object.__new__(DeepSpeedStrategy) if name == "deepspeed" else type("S", (), {})()
    if name == "shards":
        strategy.restore_checkpoint_after_setup = True
    else:
        strategy.config = {"zero_optimization": {"stage": 1}}
    trainer: Any = type("T", (), {"strategy": strategy, "fast_dev_run": False})()
    with pytest.raises(MisconfigurationException, match="shards"):
        CriticalPointProbe().on_fit_start(trainer, Regression())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"every_n_steps": 0}, ValueError),
        ({"patience": 19}, ValueError),
        ({"batches": 0}, ValueError),
        ({"max_products": 0.5}, TypeError),
        ({"at_end": 1}, TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        CriticalPointProbe(**arguments)


# ---------------------------------------------------------------------------------- ranks


class BreaksOnOne(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        distance = torch.cdist(self.net[0].weight, self.net[0].weight.flip(0)).sum()
        return loss + distance if self.global_rank == 1 and self.breaks else loss


def train_on_a_rank(folder: Path, probes: bool, breaks: bool) -> Any:
    strategy = DDPStrategy(process_group_backend="gloo")
    module = BreaksOnOne(batch_norm=True, dropout=0.2, make_optimizer=partial(torch.optim.SGD, lr=0.01))
    module.breaks = breaks  # type: ignore[assignment]
    probe = CriticalPointProbe(every_n_steps=9, batches=3, max_products=5)
    trainer = fit(folder, module, *([probe] if probes else []), strategy=strategy, devices=2)
    metrics = {name: value for name, value in trainer.callback_metrics.items() if "sharp" in name}
    return weights_of(module), metrics, probe.finding and probe.finding.as_dict(), torch.get_rng_state()


@pytest.mark.filterwarnings("ignore")
def test_ranks_measure_the_same_and_train_as_without(tmp_path: Path) -> None:
    (first, one, said, state), (_, other, said_too, _) = run_on_ranks(train_on_a_rank, tmp_path, True, False)
    assert one == other
    assert said == said_too
    assert said["evidence"]["batches"] == 6
    (without, *_, state_without), _ = run_on_ranks(train_on_a_rank, tmp_path, False, False)
    assert same(first, without)
    assert torch.equal(state, state_without)


class Talks(Valley):
    """Its ranks speak with each other within the step, as for a loss over all batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = torch.ones(())
        torch.distributed.all_reduce(scale)
        return super().training_step(batch, batch_idx) * scale / 2


def stall_on_a_rank(folder: Path) -> Any:
    if os.environ["LOCAL_RANK"] == "1":
        hessian.ROOM = 0  # here graphs do not fit: the other must not keep its own
    probe = CriticalPointProbe(patience=20)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    fit(folder, Talks((0.3, 0.0), 0.15, walls), probe, strategy=strategy, devices=2, max_epochs=20)
    return probe.finding and probe.finding.as_dict(), str(probe.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_ranks_see_the_same_stall_and_say_it_once(tmp_path: Path) -> None:
    (said, state), (said_too, state_too) = run_on_ranks(stall_on_a_rank, tmp_path)
    assert said["rule"] == "bouncing between the walls"
    assert said["severity"] == "warning"
    assert (said, state) == (said_too, state_too)
    assert [each["rule"] for each in findings_of(tmp_path)] == ["bouncing between the walls", "sharpness"]


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_fails_lets_none_wait(tmp_path: Path) -> None:
    (first, one, said, _), (second, other, said_too, _) = run_on_ranks(train_on_a_rank, tmp_path, True, True)
    assert one == other == {}
    assert said is said_too is None
    assert torch.equal(first["net.0.weight"], second["net.0.weight"])
    assert [each["rule"] for each in findings_of(tmp_path)] == ["curvature not measured"]
