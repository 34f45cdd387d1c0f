"""Recompute the running statistics of BatchNorm for the weights that the model holds."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_recipes.callbacks.replay import step_arguments, without_trace
from lightning_recipes.callbacks.substitute import substituted


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running mean, variance and batch count of every BatchNorm that keeps them, by their names in the model."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, layer in _layers(model).items()
        for name, buffer in layer.named_buffers(recurse=False)
    }


class KeptStatistics:
    """The running statistics of BatchNorm as they were after the last update, for those that are cancelled.

    Args:
        model: Whose they are. Without a model, or such layers, nothing is kept.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.held = [*statistics(model).values()] if model else []
        self.kept = [each.clone() for each in self.held]

    def keep(self) -> None:
        if self.held:
            torch._foreach_copy_(self.kept, self.held)

    def put_back(self) -> None:
        if self.held:
            torch._foreach_copy_(self.held, self.kept)


def recompute_(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> None:
    """Replace the running statistics by their means over training batches, and leave no other trace.

    Runs ``training_step`` in training mode, which may differentiate within, on the first ``batches`` batches of a new
    pass over the training data; what it logs is dropped. Random states, the loaders' generators, the other buffers and
    torchmetrics are put back.
    """
    layers = _layers(pl_module).values()
    with ExitStack() as put_back:
        put_back.enter_context(without_trace(pl_module, but=set(layers)))
        for layer in layers:
            layer.reset_running_stats()
            put_back.callback(setattr, layer, "momentum", layer.momentum)
            layer.momentum = None  # the mean over all batches instead of a moving average
        pl_module.train()
        step = torch.enable_grad()(pl_module.training_step)  # DDP's own forward stays without: no backward follows it
        put_back.enter_context(substituted(pl_module, training_step=step))
        for index, batch in enumerate(put_back.enter_context(_training_batches(trainer, batches))):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.strategy.batch_to_device(pl_module._on_before_batch_transfer(batch, dataloader_idx=0))
            trainer.strategy.training_step(*step_arguments(pl_module, batch, index))


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not is_lazy(module.running_mean)
    }


@contextmanager
def _training_batches(trainer: pl.Trainer, most: int) -> Iterator[Iterator[Any]]:
    """A new pass over the training data, beside the one that is under way."""
    own = trainer.fit_loop._combined_loader
    assert own is not None  # set up before the first training batch
    beside = CombinedLoader(trainer.train_dataloader, own._mode)
    beside.flattened = [_another(loader) for loader in beside.flattened]
    generators = [generator for loader in beside.flattened for generator in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    try:
        length = min(most, trainer.num_training_batches)
        yield (batch for batch, *_ in islice(iter(beside), int(length)))
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _another(loader: Any) -> Any:
    """A loader of the same data that may be gone through while the other one is."""
    another = copy.copy(loader)
    if getattr(another, "_iterator", None) is not None:  # persistent workers, busy with the pass under way
        another._iterator = None
    return another


def _generators(loader: Any) -> list[Generator]:
    owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    owners.append(getattr(owners[-1], "sampler", None))
    found = {id(owner.generator): owner.generator for owner in owners if getattr(owner, "generator", None) is not None}
    return [generator for generator in found.values() if isinstance(generator, Generator)]
