"""The table of runs that the generic tests go over: what a recipe may meet, paired so that each two meet once."""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import Adversaries, Regression
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
    "ranks": ["alone", "ddp", "shards"],
    "validation": ["in the epoch", "at its end", "none", "empty"],
    "stop": ["SIGKILL", "SIGTERM", "exception", "Ctrl-C", "twice", "at an epoch's end"],
}


def covering(values: Mapping[str, Sequence[Any]], is_possible: Callable[[dict[str, Any]], bool], seed: int = 0) -> Any:
    """Rows in which every possible pair of values of two columns is found at least once; greedy."""
    draws = random.Random(seed)
    columns = list(values)
    wanted = set()
    every = [dict(zip(columns, row, strict=True)) for row in itertools.product(*values.values())]
    every = [row for row in every if is_possible(row)]
    for row in every:
        wanted |= _pairs(row)
    rows = []
    while wanted:
        row = max(draws.sample(every, min(400, len(every))), key=lambda each: len(_pairs(each) & wanted))
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
