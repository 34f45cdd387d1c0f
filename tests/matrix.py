"""The table of runs that the generic tests go over: what a recipe may meet, paired so that each two meet once."""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import Adversaries, Regression, Resumable
from torch import Tensor, nn

import lightning_recipes

ALL = "all together"
REFUSE_SHARDS = {  # with a clear error when fit starts: they need the whole model, or gradients that are not summed
    "CriticalPointProbe",
    "EarlyStopping",
    "GradientNoiseScale",
    "InitialLossCheck",
    "OverfitCheck",
    "SnapshotEnsemble",
}
CHANGE_TRAINING = {"EarlyStopping", "LearningRateSchedule", "PercentileGradientClipping", "SnapshotEnsemble"}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "CriticalPointProbe": {"every_n_steps": 10, "max_products": 5, "batches": 3},
    "EMAWeights": {"half_life": 5, "every_n_steps": 2},
    "EarlyStopping": {"monitor": "val_loss", "patience": 1000, "strict": False},
    "GradientNoiseScale": {"window": 5},
    "LearningRateSchedule": {"schedule": "cosine", "warmup_steps": 5},
    "OverfitCheck": {"max_steps": 10},
    "PercentileGradientClipping": {"window": 10, "warmup_steps": 3},
    "SnapshotEnsemble": {"cycles": 2},
    "UpdateRatioMonitor": {"every_n_steps": 2},
}
RECIPES = [name for name in lightning_recipes.__all__ if issubclass(getattr(lightning_recipes, name), pl.Callback)]


def make(name: str) -> Any:
    """A recipe with arguments under which it does something in a run of thirty batches."""
    return getattr(lightning_recipes, name)(**ARGUMENTS.get(name, {}))


# ------------------------------------------------------------------------------ what is trained


class Tied(Regression):
    """Two layers with one weight."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        second.weight = first.weight
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Linear(8, 1))


class Unfreezes(Regression):
    """Its first layer is frozen in the first epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


class Sharded(Regression):
    """In shards under ModelParallel."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[-1]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def _adamw(**kwargs: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.05, **kwargs)


def _frozen() -> Regression:
    module = Regression(schedule=True)
    module.net[0].requires_grad_(False)
    return module


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "plain": lambda: Regression(make_optimizer=_adamw(), schedule=True),
    "batch norm and dropout": lambda: Regression(batch_norm=True, dropout=0.2, schedule=True),
    "fused": lambda: Regression(make_optimizer=_adamw(fused=True), schedule=True),
    "momentum": lambda: Regression(make_optimizer=_momentum),
    "frozen": _frozen,
    "tied": Tied,
    "unfrozen later": Unfreezes,
    "two optimizers": Adversaries,
}
SHARDED: dict[str, Callable[[], pl.LightningModule]] = {
    "plain": lambda: Sharded(make_optimizer=_adamw(), schedule=True),
    "momentum": lambda: Sharded(make_optimizer=_momentum),
}


# ------------------------------------------------------------------------------ how it is trained, cut and compared


class Loader(Resumable):
    """Told its epoch by the Trainer, as the samplers of torch are: not all checkpoints have the state of a loader."""

    @property
    def sampler(self) -> "Loader":
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0  # not all of an epoch may have been asked for

    def __iter__(self) -> Any:
        if self.position >= len(self.batches):
            self.position = 0
        order = self.order()
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[order[self.position - 1]]

    def order(self) -> list[int]:
        """Of this epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.batches), generator=generator).tolist()


class SaveOften(pl.Callback):
    """Save where Lightning alone resumes exactly: in the middle of an epoch, not where it validates."""

    def __init__(self, path: Path, validate_every: int) -> None:
        self.path, self.step, self.validate_every = path, 0, validate_every

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return  # the gradients that are accumulated would be lost
        last = batch_idx + 1 == trainer.num_training_batches
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        validates = done % self.validate_every == 0  # not made up for on resume
        if trainer.global_step % 2 == 0 and not last and not validates:  # of a resumed run, too: ranks share then
            trainer.save_checkpoint(self.path)


class Stop(pl.Callback):
    """End the run in the middle of an update."""

    def __init__(self, kind: str, batch: int) -> None:
        self.kind, self.batch = kind, batch

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx < self.batch:
            return
        if self.kind == "exception":
            raise RuntimeError("on purpose")
        if self.kind == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM if self.kind == "SIGTERM" else signal.SIGKILL)


def what_it_ends_with(
    trainer: pl.Trainer, module: pl.LightningModule, recipes: Mapping[str, Any], alone: bool
) -> dict[str, Any]:
    """All that a run ends with, and a resumed run ends with as well: weights, states of optimizers and recipes."""
    average = recipes.get("EMAWeights")
    ended = {"final": whole(module.state_dict())}
    if average is None:
        ended["raw"] = ended["final"]
    else:
        with average.raw_weights(module):
            ended["raw"] = whole(module.state_dict())
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    return {
        **ended,
        "optimizers": str([_plain(optimizer.state_dict()) for optimizer in trainer.optimizers]),
        "states": {
            name: str(_lasting(recipe.state_dict()))
            for name, recipe in recipes.items()
            if name not in ("InitialLossCheck", "TrainingReport")  # which speak for rank zero
            or (trainer.is_global_zero and alone)  # and draw what the others say of other batches
        },
        "step": trainer.global_step,
    }


def _plain(state: Any) -> Any:
    """With every tensor in full, and lists for tuples, which a checkpoint of shards makes of them."""
    if isinstance(state, torch.Tensor):
        return state.full_tensor() if hasattr(state, "full_tensor") else state
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return [_plain(each) for each in state] if isinstance(state, (list, tuple)) else state


def _lasting(state: Any) -> Any:
    """Without what is a run's own: how long it took, that it was resumed, and which batches it looked at again."""
    own = ("seconds", "resumed", "findings", "told", "spent")
    if isinstance(state, dict):
        return {key: _lasting(value) for key, value in state.items() if key not in own}
    return state


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


# ------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Cell:
    """One run: a recipe and what it meets."""

    recipe: str
    module: str
    precision: str
    accumulate: int
    ranks: str
    validation: str
    stop: str

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in vars(self).values())

    @property
    def recipes(self) -> list[str]:
        """The names of those that are attached."""
        if self.recipe != ALL:
            return [self.recipe]
        return [name for name in RECIPES if self.ranks != "shards" or name not in REFUSE_SHARDS]

    @property
    def is_possible(self) -> bool:
        """Whether Lightning has it, and a recipe does not refuse it."""
        if self.module == "two optimizers" and self.accumulate > 1:
            return False  # Lightning: no accumulation under manual optimization
        if self.ranks == "shards":
            if self.recipe in REFUSE_SHARDS:
                return False
            # fully_shard keeps no weight tied, and ModelParallel takes no GradScaler of ours
            return self.module in SHARDED and self.precision in ("32-true", "bf16-mixed")
        return True


VALUES: dict[str, Sequence[Any]] = {
    "module": list(MODULES),
    "precision": ["32-true", "bf16-mixed", "bf16-true", "fp16"],
    "accumulate": [1, 3],  # of eleven batches an epoch: the last window is short
    "ranks": ["alone", "ddp", "shards"],  # the cheapest first
    "validation": ["in the epoch", "at its end", "none", "empty"],
    "stop": ["SIGKILL", "SIGTERM", "exception", "Ctrl-C", "twice", "at an epoch's end"],
}


def covering(values: Mapping[str, Sequence[Any]], is_possible: Callable[[dict[str, Any]], bool], seed: int = 0) -> Any:
    """Rows in which every possible pair of values of two columns is found at least once; greedy, by one rank rather."""
    draws = random.Random(seed)
    columns = list(values)
    wanted = set()
    every = [dict(zip(columns, row, strict=True)) for row in itertools.product(*values.values())]
    every = [row for row in every if is_possible(row)]
    for row in every:
        wanted |= _pairs(row)
    rows = []
    while wanted:
        sample = draws.sample(every, min(400, len(every)))
        row = max(sample, key=lambda each: (len(_pairs(each) & wanted), -values["ranks"].index(each["ranks"])))
        gained = _pairs(row) & wanted
        if not gained:  # what is left is rare: look for it
            pair = next(iter(sorted(wanted, key=str)))
            row = next(each for each in every if pair in _pairs(each))
            gained = _pairs(row) & wanted
        wanted -= gained
        rows.append(row)
    return rows


def _pairs(row: Mapping[str, Any]) -> set[Any]:
    return set(itertools.combinations(row.items(), 2))


def cells(recipes: Iterable[str] = (*RECIPES, ALL)) -> list[Cell]:
    """All cells of the table, the same each time."""
    found = []
    for number, recipe in enumerate(recipes):
        rows = covering(VALUES, lambda row, recipe=recipe: Cell(recipe, **row).is_possible, seed=number)
        found += [Cell(recipe, **row) for row in rows]
    return found


def strategy_of(cell: Cell, timeout: Any) -> Any:
    """For the Trainer."""
    if cell.ranks == "alone":
        return "auto"
    if cell.ranks == "ddp":
        return DDPStrategy(
            process_group_backend="gloo",
            timeout=timeout,
            find_unused_parameters=cell.module in ("unfrozen later", "two optimizers"),
        )
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        timeout=timeout,
        save_distributed_checkpoint=False,
    )


def whole(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor in full, detached."""
    full = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()
    }
    return {name: tensor.detach().clone() for name, tensor in full.items()}
