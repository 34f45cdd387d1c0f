import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from models import Adversaries, Regression, fp16, quiet_trainer, regression_data, same, weights_of
from ranks import run_on_ranks
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_recipes import GradientNoiseScale, InstabilityDetector, PercentileGradientClipping
from lightning_recipes.callbacks import noise_scale as module_under_test
from lightning_recipes.callbacks.measuring import examples_in
from lightning_recipes.core.noise_scale import components


def fit(folder: Path, module: pl.LightningModule, *callbacks: Any, **settings: Any) -> pl.Trainer:
    torch.manual_seed(2)
    if settings.get("plugins") == "fp16":
        settings["plugins"] = [fp16()]
    loader = settings.pop("loader", None) or regression_data()
    trainer = quiet_trainer(folder, **{"max_epochs": 1, "callbacks": list(callbacks), **settings})
    trainer.fit(module, loader)
    return trainer


class ByHand(Regression):
    """The slow definition: the gradient of every micro-batch by itself, in double precision."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gradients: list[Tensor] = []
        self.pairs: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        twin = copy.deepcopy(self.net).double()
        torch.nn.functional.mse_loss(twin(batch[0].double()), batch[1].double()).backward()
        self.gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients, self.gradients = self.gradients, []
        if len(gradients) > 1:
            small, large = gradients[0], torch.stack(gradients).mean(0)
            self.pairs.append(components(float(small @ small), float(large @ large), 8, 8 * len(gradients)))


@pytest.mark.parametrize("accumulate", [2, 5])
@pytest.mark.parametrize("settings", [{}, {"plugins": "fp16"}, {"gradient_clip_val": 0.01}], ids=str)
@pytest.mark.parametrize("beside", [(), (PercentileGradientClipping, InstabilityDetector)])
def test_the_pairs_are_those_of_the_definition(
    accumulate: int, settings: Any, beside: tuple[Callable[[], Any], ...], tmp_path: Path
) -> None:
    """A short last window is measured, too."""
    if beside and "gradient_clip_val" in settings:
        settings = {}
    for order in (1, -1):
        noise, module = GradientNoiseScale(), ByHand(make_optimizer=lambda p: torch.optim.SGD(p, 0.01))
        callbacks = [noise, *(make() for make in beside)][::order]
        fit(tmp_path, module, *callbacks, accumulate_grad_batches=accumulate, **settings)
        assert len(noise.rule.pairs) == len(module.pairs) == math.ceil(12 / accumulate)
        tolerance = 2e-2 if settings.get("plugins") else 1e-4
        for got, expected in zip(noise.rule.pairs, module.pairs):
            assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert noise.rule.batch == 16  # of the last window, too


def test_a_fused_optimizer_in_half_precision(tmp_path: Path) -> None:
    noise, module = GradientNoiseScale(), ByHand(make_optimizer=lambda p: torch.optim.SGD(p, 0.01, fused=True))
    fit(tmp_path, module, noise, accumulate_grad_batches=3, plugins="fp16")
    for got, expected in zip(noise.rule.pairs, module.pairs, strict=True):
        assert got == pytest.approx(expected, rel=2e-2, abs=2e-2)


def test_updates_that_a_scaler_skips_are_none(tmp_path: Path) -> None:
    noise = GradientNoiseScale()
    trainer = fit(tmp_path, Regression(), noise, accumulate_grad_batches=2, plugins=[fp16(2.0**127)])
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 6
    assert noise.rule.measured < 6


def test_windows_that_cannot_be_compared_are_left_out(tmp_path: Path) -> None:
    class Sometimes(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx != 4 else None

    noise = GradientNoiseScale()
    uneven = torch.utils.data.DataLoader(regression_data().dataset, batch_size=9)  # the last of 11 has 6
    assert fit(tmp_path, Regression(), noise, loader=uneven, accumulate_grad_batches=2).global_step == 6
    assert noise.rule.measured == 5  # a window of one micro-batch has no pair
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")  # which Lightning says once
        fit(tmp_path, Sometimes(), noise, accumulate_grad_batches=3)
    assert noise.rule.measured == 3
    fit(tmp_path, Regression(), noise, loader=uneven, accumulate_grad_batches=11)
    assert noise.rule.measured == 0
    given = GradientNoiseScale(batch_size=9)  # who says so answers for it
    fit(tmp_path, Regression(), given, loader=uneven, accumulate_grad_batches=11)
    assert given.rule.measured == 1


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ([torch.zeros(4), torch.zeros(4)], 4),
        ({"a": {"b": torch.zeros(7, 1)}}, 7),
        (torch.tensor(1.0), 1),
        ("words", 1),
    ],
)
def test_the_size_of_a_batch(batch: Any, size: int) -> None:
    assert examples_in(batch) == size


def test_the_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    for settings in ({"accumulate_grad_batches": 3}, {"accumulate_grad_batches": 3, "plugins": "fp16"}, {}):
        ends = []
        for callbacks in ([], [GradientNoiseScale()]):
            module = Regression(batch_norm=True, dropout=0.2)
            fit(tmp_path, module, *callbacks, **settings)
            ends.append(weights_of(module))
        assert same(*ends)


# ---------------------------------------------------------------------------------------------------------- ranks


def train_on_ranks(folder: Path, accumulate: int, watched: bool) -> Any:
    module, noise = ByHand(make_optimizer=lambda p: torch.optim.SGD(p, 0.01)), GradientNoiseScale()
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        callbacks=[noise] if watched else [],
        strategy="ddp",
        devices=2,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        log_every_n_steps=3,
    )

    class Own(pl.Callback):
        def __init__(self) -> None:
            self.gradients: list[Any] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch[0].add_(trainer.global_rank)  # data of its own

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.gradients.append(list(pl_module.gradients))

    own = Own()
    trainer.callbacks.append(own)  # type: ignore[attr-defined]
    trainer.fit(module, regression_data(12))
    return weights_of(module), own.gradients, list(noise.rule.pairs), noise.rule.batch, noise._handles


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_give_pairs_and_train_as_they_would(accumulate: int, tmp_path: Path) -> None:
    first, second = run_on_ranks(train_on_ranks, tmp_path, accumulate, True)
    assert first[2] == second[2]
    expected = []
    for mine, other in zip(first[1], second[1]):
        norms = [float(gradients[0] @ gradients[0]) for gradients in (mine, other)]
        large = torch.stack([*mine, *other]).mean(0)
        expected.append(components(sum(norms) / 2, float(large @ large), 8, 16 * accumulate))
    if accumulate == 1:
        expected = expected[:: module_under_test.EVERY]
    assert len(first[2]) == len(expected)
    for got, pair in zip(first[2], expected):
        assert got == pytest.approx(pair, rel=1e-4, abs=1e-4)
    assert first[3] == 16 * accumulate
    assert first[4] == []
    alone, _ = run_on_ranks(train_on_ranks, tmp_path, accumulate, False)
    assert same(first[0], alone[0])


class UnlikeRanks(IterableDataset[Any]):
    """Micro-batches of 16 examples where the other rank's have 8, but for the last four."""

    def __iter__(self) -> Iterator[Any]:
        rank = int(os.environ["LOCAL_RANK"])
        for index in range(12):
            size = 8 * (1 + (index // 2 + rank) % 2) if index < 8 else 8
            yield torch.ones(size, 8), torch.ones(size, 1)


def train_on_unlike_ranks(folder: Path, accumulate: int) -> int:
    noise = GradientNoiseScale()
    trainer = quiet_trainer(
        folder, max_epochs=1, callbacks=[noise], strategy="ddp", devices=2, accumulate_grad_batches=accumulate
    )
    trainer.fit(Regression(), DataLoader(UnlikeRanks(), batch_size=None))
    return noise.rule.measured


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accumulate", "measured"), [(1, 1), (2, 2)])
def test_updates_of_ranks_with_unlike_batches_are_left_out(accumulate: int, measured: int, tmp_path: Path) -> None:
    assert run_on_ranks(train_on_unlike_ranks, tmp_path, accumulate) == [measured] * 2


# ---------------------------------------------------------------------------------------------------------- tell


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    findings: list[Any] = []
    monkeypatch.setattr(module_under_test, "tell", lambda trainer, finding: findings.append(finding))
    return findings


def test_it_logs_and_concludes(tmp_path: Path, told: list[Any]) -> None:
    noise = GradientNoiseScale()
    trainer = fit(tmp_path, Regression(), noise, loader=regression_data(240), accumulate_grad_batches=2)
    scale = noise.rule.estimate()
    (finding,) = told
    assert finding.rule == "gradient noise scale"
    assert finding.evidence["effective_batch_size"] == 16
    assert f"was {scale.text}" in finding.message
    logged = trainer.callback_metrics
    assert logged["gradient_noise_scale_at_least"] > 0
    assert ("gradient_noise_scale" in logged) == scale.is_certain
    assert finding.step == 120


def test_where_it_cannot_be_measured_it_says_so_once(tmp_path: Path, told: list[Any]) -> None:
    for module in (Regression(), Adversaries()):
        trainer = fit(tmp_path, module, GradientNoiseScale())
        assert "gradient_noise_scale_at_least" not in trainer.callback_metrics
        assert [(finding.rule, finding.severity) for finding in told] == [("noise scale not measured", "info")]
        told.clear()
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    noise = GradientNoiseScale()
    fit(tmp_path, Regression(), scheduler, noise, max_epochs=2)
    assert told == []
    assert noise.rule.measured == 4


def test_what_is_not_read_yet_is_saved_and_a_second_training_starts_anew(tmp_path: Path) -> None:
    noise, states = GradientNoiseScale(), []

    class Saves(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(noise.state_dict())

    for _ in range(2):
        trainer = fit(tmp_path, Regression(), noise, Saves(), accumulate_grad_batches=3, log_every_n_steps=1000)
        assert trainer.global_step == noise.rule.measured == 4
    torch.save(states[7], tmp_path / "state")
    restored = GradientNoiseScale(window=3)
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert (len(restored._unread), restored.rule.measured) == (2, 0)
    restored._read()
    assert list(restored.rule.pairs) == list(noise.rule.pairs)[:2]


@pytest.mark.parametrize(
    "strategy", [DeepSpeedStrategy, pl.strategies.FSDPStrategy, pl.strategies.ModelParallelStrategy]
)
def test_where_gradients_are_hidden_it_is_refused(strategy: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.__class__ = strategy
    with pytest.raises(MisconfigurationException, match=f"cannot see the local gradients of {strategy.__name__}"):
        GradientNoiseScale().on_fit_start(trainer, Regression())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"window": 1}, ValueError),
        ({"window": 2.5}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"batch_size": "8"}, TypeError),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: type[Exception]) -> None:
    (name,) = arguments
    with pytest.raises(error, match=f"{name} must be a whole number"):
        GradientNoiseScale(**arguments)
