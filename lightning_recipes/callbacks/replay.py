"""Run a training step once more, for what can be seen on the way, and leave no trace of it."""

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_recipes.callbacks.substitute import substituted
from lightning_recipes.callbacks.unchanged import isolate_rng, unchanged


@contextmanager
def without_trace(pl_module: pl.LightningModule, but: Set[nn.Module] = frozenset()) -> Iterator[None]:
    """Within the context no gradient is taken and nothing is logged; when it ends, random states and whatever the
    module holds but its parameters (and the buffers of the modules ``but``) are as they were.
    """
    trainer = pl_module._trainer
    with ExitStack() as put_back:
        put_back.enter_context(torch.no_grad())
        put_back.enter_context(isolate_rng())
        put_back.enter_context(unchanged(pl_module, but=but))
        put_back.enter_context(substituted(pl_module, log=_drop, log_dict=_drop))
        if trainer is not None:
            put_back.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield


@contextmanager
def on_copies(pl_module: pl.LightningModule) -> Iterator[dict[int, nn.Parameter]]:
    """Within the context the module has copies in the place of its parameters and buffers, in float32 if it is trained
    in less.

    Yields:
        The copy of each parameter, by the ``id`` of the parameter.
    """
    copies: dict[int, Any] = {}
    before = [
        (held, name, tensor)
        for module in pl_module.modules()
        for held in (cast(dict[str, Any], module._parameters), module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    try:
        for held, name, tensor in before:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor)
            held[name] = copies[id(tensor)]
        yield {id(tensor): copies[id(tensor)] for *_, tensor in before if isinstance(tensor, nn.Parameter)}
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def in_full(value: Tensor) -> Tensor:
    """The tensor in float32 if it holds less."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def step_arguments(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What ``training_step`` is called with."""
    numbered = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    return (batch, batch_idx) if numbered else (batch,)


def first_broken_module(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> str:
    """Name and kind of the first module whose output is not finite; empty if none is, this time."""
    broken: list[str] = []

    def look(name: str, module: nn.Module, _: Any, output: Any) -> None:
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                broken.append(f"{name} ({type(module).__name__})")

    leaves = [(name, module) for name, module in pl_module.named_modules() if name and not list(module.children())]
    handles = [module.register_forward_hook(partial(look, name)) for name, module in leaves]
    try:
        with without_trace(pl_module), pl_module.trainer.precision_plugin.train_step_context():
            pl_module.training_step(*step_arguments(pl_module, batch, batch_idx))
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else ""


def _drop(*_: object, **__: object) -> None:
    """In the place of a method whose effect is not wanted."""


def _copy(tensor: Tensor) -> Tensor:
    copied = in_full(tensor.detach()).clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
