"""Put back what code has changed that a training must not notice: random states, and what objects hold."""

import operator
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

MANY = 100  # entries: what a longer container holds are data, each of which stays as it is
PLAIN = {type(None), bool, int, float, str}
CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, random.SystemRandom)
LEFT_ALONE = (*CODE, pl.Trainer, Logger, Optimizer, _BaseDataLoaderIter)
DATA = (Dataset, DataLoader, pl.LightningDataModule)
RANDOM = (torch.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
SHARED = (type(threading.Lock()), type(threading.RLock()), threading.Thread)  # what has one is used by others meanwhile


@contextmanager
def isolate_rng() -> Iterator[None]:
    """Put the random states back when the context ends, by an exception too, which Lightning's own does not."""
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)


@contextmanager
def unchanged(*roots: object, data: bool = False, but: Set[nn.Module] = frozenset()) -> Iterator[None]:
    """When the context ends, objects, and what they hold, are as they were: attributes, containers, generators of
    random numbers, buffers and other tensors and arrays.

    Not so parameters, trainers, loggers, optimizers, what other threads use, and what iterators have read.

    Args:
        roots: The objects.
        data: Whether they are data and what reads them: tensors and arrays are then not copied, and taken for constant.
            Else data among what they hold are passed over.
        but: Modules whose buffers keep their new values.
    """
    passed = {id(buffer): buffer for module in but for buffer in module.buffers(recurse=False)}
    restores = [*_restores([*roots], data, passed)]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restores(left: list[Any], data: bool, seen: dict[int, Any]) -> Iterator[Callable[[], object]]:
    while left:
        each = left.pop()
        if type(each) in PLAIN or id(each) in seen or isinstance(each, LEFT_ALONE):
            continue
        if not data and isinstance(each, DATA):
            continue
        seen[id(each)] = each  # for as long as an id must not come again
        if isinstance(each, Tensor | np.ndarray):
            if not data and _is_writable(each):
                yield _same_values(each)
            continue
        if isinstance(each, RANDOM):
            yield _same_random(each)
        held = _held_by(each)
        left += _parts_of(each, held)
        if held is not None:
            yield partial(_refill, held, _contents(held))


def _held_by(each: Any) -> Any:
    """What can be put back into it: its entries or attributes."""
    if isinstance(each, list | dict | set | deque):
        return each
    attributes = getattr(each, "__dict__", None)
    if not isinstance(attributes, dict) or type(each).__module__.startswith(("torch._dynamo", "torch.distributed")):
        return None
    return None if any(isinstance(value, SHARED) for value in attributes.values()) else attributes


def _parts_of(each: Any, held: Any) -> list[Any]:
    """Where to look on."""
    if isinstance(each, nn.Module):
        others = [value for name, value in (held or {}).items() if name != "_parameters"]  # which change in shards
        return [*each.children(), *each.buffers(recurse=False), *others]
    if isinstance(each, np.random.Generator):
        return [each.bit_generator]
    inside = each if isinstance(each, tuple | frozenset) else held
    if inside is None or (inside is each and len(each) > MANY):
        return []
    return _contents(inside)


def _same_random(generator: Any) -> Callable[[], object]:
    if isinstance(generator, np.random.BitGenerator):
        return partial(setattr, generator, "state", generator.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def _is_writable(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.flags.writeable and not isinstance(value, np.memmap)
    if value.is_inference() or isinstance(value, nn.Parameter) or is_lazy(value):
        return False
    return value.layout is not torch.strided or 0 not in value.stride()  # one is expanded


def _same_values(value: Any) -> Callable[[], object]:
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    return partial(value.data.copy_, value.detach().clone())  # as data, or a graph that has it would notice


def _contents(held: Any) -> list[Any]:
    return [*held, *held.values()] if isinstance(held, dict) else [*held]


def _refill(held: Any, before: list[Any]) -> None:
    now = _contents(held)
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return
    held.clear()
    if isinstance(held, dict):
        half = len(before) // 2
        for key, value in zip(before[:half], before[half:], strict=True):
            held[key] = value
    else:
        (held.extend if isinstance(held, list | deque) else held.update)(before)
