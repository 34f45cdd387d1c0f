"""Train a copy of the module for a few steps before training starts, as the run would, and leave no trace of it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_recipes.callbacks.replay import without_trace
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.telling import tell
from lightning_recipes.callbacks.trials import (
    ENDS,
    configure_as_in,
    copy_of,
    disable,
    fit_quietly,
    hold_schedules,
    of_its_own,
    quiet,
    same_loaders,
    settings_of,
    show_datamodule,
)
from lightning_recipes.callbacks.unchanged import isolate_rng
from lightning_recipes.core.findings import Finding

BEFORE = ("prepare_data", "setup", "configure_model")  # the copy is set up


def refuse_shards(name: str, trainer: pl.Trainer) -> None:
    """Refuse a model in shards, which has no copies."""
    if is_sharded(trainer) or isinstance(trainer.strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{name} cannot train copies of a model in shards ({type(trainer.strategy).__name__}): check it on one"
            " device, at a small size if need be, and train without this callback"
        )


def is_fresh(trainer: pl.Trainer) -> bool:
    """Whether a run starts that is worth a check: not one that is resumed, nor ``fast_dev_run``."""
    run: Any = trainer  # connectors set some attributes
    return not (trainer.ckpt_path or trainer.global_step or run.fast_dev_run)


@contextmanager
def unharmed(trainer: pl.Trainer, name: str) -> Iterator[None]:
    """Within the context a check that fails costs the run no more than the check, which is told: if it is the module
    that fails, the training will say so. Of several ranks one may wait for another, so that the run ends with them.
    """
    try:
        yield
    except Exception as error:
        if trainer.world_size > 1:
            raise
        tell(
            trainer,
            Finding(
                "not checked",
                "warning",
                f"{name} could not train a copy of the module: {type(error).__name__}: {error}.",
                "The training goes on without the check; leave it out if the training itself succeeds.",
                trainer.global_step,
            ),
        )


@contextmanager
def first_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Iterable[Any]]:
    """The batches that training will begin with, on the device, read from loaders that are left as they are.

    Nothing comes from loaders that can be read only once, or streams that go on where they were.
    """
    loaders = trainer.train_dataloader
    with _as_they_were(trainer, pl_module, loaders):
        if any(map(_is_read_once, tree_leaves(loaders))):
            yield ()
            return
        combined = CombinedLoader(tree_map(of_its_own, loaders), trainer.fit_loop._combined_loader._mode)  # type: ignore[union-attr]  # the loop has its loaders by now
        most = trainer.num_training_batches
        yield (
            on_device(trainer, pl_module, batch)
            for batch, *_ in islice(combined, None if most == float("inf") else int(most))
        )


@contextmanager
def first_validation_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Iterable[Any]]:
    """The batches of validation likewise; none if the loaders are not there yet, for others must not ask for them."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    with _as_they_were(trainer, pl_module, loaders):
        read = () if any(map(_is_read_once, loaders)) else loaders
        yield (on_device(trainer, pl_module, batch) for each in read for batch in of_its_own(each))


@contextmanager
def _as_they_were(trainer: pl.Trainer, pl_module: pl.LightningModule, loaders: Any) -> Iterator[None]:
    """Within the context loaders may be read, and hooks prepare what they give."""
    run: Any = trainer  # connectors set some attributes
    with quiet(), without_trace(pl_module), same_loaders(0, [loaders, run.datamodule], None):
        yield


def _is_read_once(loader: Any) -> bool:
    """Whether its data are gone when they have been read; asks a stream for iterators, which it may remember."""
    data = getattr(loader, "dataset", None)
    if isinstance(loader, Iterator) or isinstance(data, Iterator):
        return True
    if not isinstance(data, IterableDataset):
        return False
    return any(isinstance(value, Iterator) for value in vars(data).values()) or iter(data) is iter(data)


def on_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch as the training step gets it."""
    with torch.enable_grad():  # as in training
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def rehearse(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: Sequence[Any],
    steps: int,
    watch: pl.Callback,
    prepare: Callable[[pl.LightningModule], None],
) -> None:
    """Train a copy on the same batches again and again, by a Trainer of its own; an update takes all of them.

    Args:
        trainer: Of the run.
        pl_module: To be copied.
        batches: On the device.
        steps: Updates at most.
        watch: The only callback but for one that keeps schedules from going on.
        prepare: Is given the copy first.
    """
    with isolate_rng():
        module: Any = copy_of(pl_module)
        module.configure_callbacks = list
        disable(module, *BEFORE, "on_train_epoch_end", *ENDS)
        configure_as_in(trainer, module)
        module.on_before_batch_transfer = module.transfer_batch_to_device = module.on_after_batch_transfer = _as_it_is
        prepare(module)
        own = {
            "max_epochs": 1,
            "limit_train_batches": 1.0,
            "accumulate_grad_batches": len(batches) if module.automatic_optimization else 1,
            "callbacks": [_AsInTheRun(trainer), watch],
        }
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        fit_quietly(module, {**settings_of(trainer), **own}, Repeated(batches, steps, dataset))


class _AsInTheRun(pl.Callback):
    """Keeps schedules where they begin, and shows the copy the datamodule.

    Args:
        run: The trainer of the run.
    """

    def __init__(self, run: pl.Trainer) -> None:
        self.run = run

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        hold_schedules(trainer)
        show_datamodule(self.run, trainer)


def _as_it_is(batch: Any, *_: object, **__: object) -> Any:
    return batch


class Repeated:
    """Copies of the same batches, over and over.

    Args:
        batches: What is repeated.
        times: How often.
        dataset: Where they are from, for a step that asks.
    """

    def __init__(self, batches: Sequence[Any], times: int, dataset: Any = None) -> None:
        self.batches, self.times, self.dataset = batches, times, dataset

    def __len__(self) -> int:
        return len(self.batches) * self.times

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from map(copy.deepcopy, self.batches)  # a step may change what it is given
