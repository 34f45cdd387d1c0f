"""Every recipe, alone and all together, in every pair of circumstances: what it promises holds in each run.

A run is stopped in every way there is and resumed, and ends where the uninterrupted one ends, bit for bit; all ranks
agree; and a recipe that only watches leaves the training as it would be without. ``make test`` takes a sample of the
table, ``make test-all`` all of it.
"""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from matrix import (
    ALL,
    ARGUMENTS,
    CHANGE_TRAINING,
    MODULES,
    RECIPES,
    REFUSE_SHARDS,
    SHARDED,
    Cell,
    Loader,
    SaveOften,
    Stop,
    cells,
    make,
    same,
    strategy_of,
    what_it_ends_with,
    whole,
)
from models import Regression, SeedEachStep, fp16, quiet_trainer, regression_data
from ranks import run_on_ranks

from lightning_recipes import EMAWeights, LearningCurves

pytestmark = pytest.mark.filterwarnings("ignore")  # toys, and torch.distributed warns of much that is not ours
SAMPLE = 30, 8  # the second where all are together
BATCHES, EPOCHS = 11, 3
VALIDATE_EVERY = 4
FIRST_STOP, SECOND_STOP = 16, 26  # batches
TIMEOUT = timedelta(seconds=60)


def validation_of(cell: Cell) -> dict[str, Any]:
    return {
        "in the epoch": {"val_check_interval": VALIDATE_EVERY, "check_val_every_n_epoch": None},
        "at its end": {},
        "none": {"limit_val_batches": 0},
        "empty": {},
    }[cell.validation]


def train(cell: Cell, folder: Path, recipes: list[str], stop_at: int | None, resume: bool) -> dict[str, Any]:
    """Train; return all that the run ends with."""
    attached = {name: make(name) for name in recipes}
    path = folder / "last.ckpt"
    save: pl.Callback = SaveOften(path, VALIDATE_EVERY)
    if cell.stop == "at an epoch's end":
        save = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    stop = [] if stop_at is None else [Stop(cell.stop, stop_at)]
    trainer = quiet_trainer(
        folder,
        max_epochs=EPOCHS,
        callbacks=[SeedEachStep(), *attached.values(), save, *stop],
        plugins=[fp16(2.0**20)] if cell.precision == "fp16" else None,
        accumulate_grad_batches=cell.accumulate,
        strategy=strategy_of(cell, TIMEOUT),
        devices=1 if cell.ranks == "alone" else 2,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=7,
        **validation_of(cell),
        **({} if cell.precision == "fp16" else {"precision": cell.precision}),
    )
    torch.manual_seed(7)
    module = (SHARDED if cell.ranks == "shards" else MODULES)[cell.module]()
    validation = regression_data(2) if cell.validation != "empty" else []
    loader = Loader(regression_data(batches=BATCHES), seed=100 * trainer.global_rank)
    trainer.fit(module, loader, validation, ckpt_path=path if resume else None)
    return what_it_ends_with(trainer, module, attached, alone=cell.recipe != ALL)


def run(cell: Cell, folder: Path, recipes: list[str], stop_at: int | None = None, resume: bool = False) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    ranks = 1 if cell.ranks == "alone" else 2
    return run_on_ranks(train, cell, folder, recipes, stop_at, resume, ranks=ranks)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell, id=str(cell), marks=[] if number % SAMPLE[cell.recipe == ALL] == 0 else [pytest.mark.everything]
        )
        for number, cell in enumerate(cells())
    ],
)
def test_what_a_recipe_promises(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


def check(cell: Cell, folder: Path) -> None:
    uninterrupted = run(cell, folder / "whole", cell.recipes)
    for rank in uninterrupted:
        assert all(value.isfinite().all() for value in rank["final"].values())
        own_buffers = cell.module == "batch norm and dropout"
        assert own_buffers or same(rank["raw"], uninterrupted[0]["raw"]), "the ranks differ"
    if not CHANGE_TRAINING & set(cell.recipes):
        for watched, bare in zip(uninterrupted, run(cell, folder / "bare", []), strict=True):
            assert same(watched["raw"], bare["raw"]), "the training is another one"
            assert watched["optimizers"] == bare["optimizers"]
    for number, stop_at in enumerate([FIRST_STOP, SECOND_STOP] if cell.stop == "twice" else [FIRST_STOP]):
        with pytest.raises(RuntimeError, match="without a word|on purpose|SystemExit|SIGTERM|KeyboardInterrupt"):
            run(cell, folder / "cut", cell.recipes, stop_at, resume=number > 0)
    for rank, expected in zip(run(cell, folder / "cut", cell.recipes, resume=True), uninterrupted, strict=True):
        for key, value in expected.items():
            assert same(rank[key], value), f"resumed, {key}"


# ------------------------------------------------------------------------------ the check can fail


class Forgets(LearningCurves):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class StartsAnew(EMAWeights):
    def on_load_checkpoint(self, *_: Any) -> None:
        pass


class StaysSwapped(EMAWeights):
    def on_validation_end(self, *_: Any) -> None:
        pass


class Draws(LearningCurves):
    def on_train_batch_start(self, *args: Any) -> None:
        torch.rand(())
        super().on_train_batch_start(*args)


class DecidesAlone(LearningCurves):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("broken", "name", "said"),
    [
        (Forgets, "LearningCurves", "resumed, states"),
        (StartsAnew, "EMAWeights", "resumed, final"),
        (StaysSwapped, "EMAWeights", "the training is another one"),
        (Draws, "LearningCurves", "the training is another one"),
        (DecidesAlone, "LearningCurves", "the ranks differ"),
    ],
)
def test_a_recipe_that_breaks_a_promise_is_found_out(
    broken: type[pl.Callback], name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, module = ("ddp", "plain") if broken is DecidesAlone else ("alone", "batch norm and dropout")
    cell = Cell(name, module, "32-true", 1, ranks, "in the epoch", "SIGKILL")
    monkeypatch.setitem(globals(), "make", lambda _: broken(**ARGUMENTS.get(name, {})))
    with pytest.raises(AssertionError, match=said):
        check(cell, tmp_path)


# ------------------------------------------------------------------------------ trouble on one of two ranks


class Trouble(pl.Callback):
    """Of one rank, in the middle of the run."""

    def __init__(self, kind: str, rank: int) -> None:
        self.kind, self.rank = kind, rank

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank != self.rank or trainer.fit_loop.epoch_loop.total_batch_idx != FIRST_STOP:
            return
        if self.kind == "exception":
            raise RuntimeError(f"on purpose on rank {self.rank}")
        os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        here = self.trainer.global_rank == 1 and self.trainer.fit_loop.epoch_loop.total_batch_idx == FIRST_STOP
        return loss * torch.nan if here else loss


def suffer(folder: Path, recipes: list[str], kind: str, rank: int) -> list[Any]:
    attached = [make(name) for name in recipes]
    trainer = quiet_trainer(
        folder,
        max_epochs=EPOCHS,
        callbacks=[*attached, *([] if kind == "NaN" else [Trouble(kind, rank)])],
        strategy=DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT),
        devices=2,
        log_every_n_steps=7,
    )
    module = Poisoned() if kind == "NaN" else Regression()
    trainer.fit(module, regression_data(2 * BATCHES), regression_data(2))
    return [trainer.global_step, str(whole(module.state_dict()))]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "said"), [("exception", "on purpose on rank {}"), ("SIGKILL", "rank {} died: without a word")]
)
def test_nobody_hangs_when_a_rank_fails_and_the_error_names_it(kind: str, said: str, rank: int, tmp_path: Path) -> None:
    recipes = [name for name in RECIPES if name not in ("OverfitCheck", "WarmupSweep")]
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=said.format(rank)):
        run_on_ranks(suffer, tmp_path, recipes, kind, rank)
    assert time.monotonic() - started < TIMEOUT.seconds


@pytest.mark.parametrize(
    "name",
    [
        ALL,
        *(pytest.param(name, marks=[pytest.mark.everything] * (name != "InstabilityDetector")) for name in RECIPES),
    ],
)
def test_a_nan_on_one_rank_is_everybodys(name: str, tmp_path: Path) -> None:
    first, second = run_on_ranks(suffer, tmp_path, RECIPES if name == ALL else [name], "NaN", 1)
    assert first == second


@pytest.mark.parametrize("name", sorted(REFUSE_SHARDS))
def test_what_needs_whole_weights_says_so_of_shards(name: str, tmp_path: Path) -> None:
    cell = next(each for each in cells([ALL]) if each.ranks == "shards")
    with pytest.raises(RuntimeError, match=f"{name} .*(shards|of ModelParallelStrategy)|restore_best_weights=False"):
        run(cell, tmp_path / name, [name])


def test_the_table_has_every_recipe() -> None:
    assert {cell.recipe for cell in cells()} == {*RECIPES, ALL}
