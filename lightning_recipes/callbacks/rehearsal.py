"""Train a copy of the module for a few steps before training starts, as the run would, and leave no trace of it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.telling import tell
from lightning_recipes.callbacks.trials import (
    configure_as_in,
    fit_quietly,
    hold_schedules,
    nothing,
    of_its_own,
    quiet,
    same_loaders,
    settings_of,
)
from lightning_recipes.callbacks.unchanged import isolate_rng
from lightning_recipes.core.findings import Finding


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

    Nothing comes from loaders that can be read only once.
    """
    loaders = trainer.train_dataloader
    if any(isinstance(each, Iterator) or isinstance(_data(each), Iterator) for each in tree_leaves(loaders)):
        yield ()
        return
    with isolate_rng(), quiet(), same_loaders(0, loaders, None):
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
    if any(isinstance(each, Iterator) or isinstance(_data(each), Iterator) for each in loaders):
        loaders = []
    with isolate_rng(), quiet(), same_loaders(0, loaders, None):
        yield (on_device(trainer, pl_module, batch) for each in loaders for batch in of_its_own(each))


def _data(loader: Any) -> Any:
    return getattr(loader, "dataset", None)


def on_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch as the training step gets it."""
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
        module: Any = copy.deepcopy(pl_module)
        module.configure_callbacks = list
        module.prepare_data = module.setup = module.configure_model = nothing  # it is set up
        configure_as_in(trainer, module)
        module.on_before_batch_transfer = module.transfer_batch_to_device = module.on_after_batch_transfer = _as_it_is
        prepare(module)
        own = {
            "max_epochs": 1,
            "limit_train_batches": 1.0,
            "accumulate_grad_batches": len(batches) if module.automatic_optimization else 1,
            "callbacks": [_NoSchedules(), watch],
        }
        fit_quietly(module, {**settings_of(trainer), **own}, Repeated(batches, steps))


class _NoSchedules(pl.Callback):
    """Keeps schedules where they begin."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        hold_schedules(trainer)


def _as_it_is(batch: Any, *_: object, **__: object) -> Any:
    return batch


class Repeated:
    """The same batches, over and over.

    Args:
        batches: What is repeated.
        times: How often.
    """

    def __init__(self, batches: Sequence[Any], times: int) -> None:
        self.batches, self.times = batches, times

    def __len__(self) -> int:
        return len(self.batches) * self.times

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from self.batches
