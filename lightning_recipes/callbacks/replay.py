"""Run a training step once more, for what can be seen on the way, and leave no trace of it."""

import copy
from collections import deque
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_recipes.callbacks.substitute import substituted
from lightning_recipes.callbacks.unchanged import isolate_rng


@contextmanager
def without_trace(pl_module: pl.LightningModule, but: Set[nn.Module] = frozenset()) -> Iterator[None]:
    """Within the context no gradient is taken and nothing is logged; when it ends, random states, training and
    evaluation modes, buffers (but those of the modules ``but``) and torchmetrics are as they were.
    """
    with ExitStack() as put_back:
        put_back.enter_context(torch.no_grad())
        put_back.enter_context(isolate_rng())
        put_back.enter_context(substituted(pl_module, log=_drop, log_dict=_drop))
        put_back.enter_context(_same_modes(pl_module))
        put_back.enter_context(_same_buffers(pl_module, but))
        for module in pl_module.modules():
            if isinstance(module, Metric):
                put_back.enter_context(_same_metric(module))
        yield


@contextmanager
def on_copies(pl_module: pl.LightningModule) -> Iterator[dict[int, nn.Parameter]]:
    """Within the context the module has copies in the place of its parameters and buffers, in float32 if it is trained
    in less; when it ends, these and all other attributes, and what lists and dicts among them held, are as they were.

    Yields:
        The copy of each parameter, by the ``id`` of the parameter.
    """
    copies: dict[int, Any] = {}
    kept: list[Tensor] = []  # or an id might come again
    with _same_attributes(pl_module):
        for module in pl_module.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor)
                        kept.append(tensor)
                    held[name] = None if tensor is None else copies[id(tensor)]
        yield {id(tensor): copies[id(tensor)] for tensor in kept if isinstance(tensor, nn.Parameter)}


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


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [
        (value, copy.copy(value))
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, list | dict | set | deque)
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for value, contents in held:
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(contents)


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _same_buffers(model: nn.Module, but: Set[nn.Module]) -> Iterator[None]:
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module not in but
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            setattr(module, name, buffer.copy_(value))


@contextmanager
def _same_metric(metric: Metric) -> Iterator[None]:
    states = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    before = {state: copy.deepcopy(getattr(metric, state)) for state in states}
    try:
        yield
    finally:
        for state, value in before.items():
            setattr(metric, state, value)
