import random
import threading
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_recipes.callbacks.unchanged import isolate_rng, unchanged


def test_random_states_are_put_back_after_an_exception_too() -> None:
    def state() -> str:
        return str([torch.get_rng_state(), np.random.get_state(), random.getstate()])

    before = state()
    with pytest.raises(ValueError, match="drawn"), isolate_rng():
        raise ValueError(f"drawn {torch.rand(())}, {np.random.rand()}, {random.random()}")
    assert state() == before


class Holds:
    """Everything that a step or a dataset may change."""

    def __init__(self) -> None:
        self.generators = [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]
        self.count, self.itself = 0, self
        self.held = {"inner": [deque([1]), {2}, OrderedDict(a=1), Counter("a")]}

    def change(self) -> list[float]:
        """Change all of it, and return what is drawn."""
        of_torch, of_numpy, old, of_python = self.generators
        deque_, set_, ordered, counter = self.held["inner"]
        self.count += 1
        self.new = [self]
        deque_.append(2)
        set_.add(3)
        ordered["b"] = 2
        counter.update("ab")
        self.held["inner"].append(None)
        return [float(torch.rand((), generator=of_torch)), of_numpy.random(), old.rand(), of_python.random()]


@pytest.mark.parametrize("data", [False, True])
def test_what_an_object_holds_is_put_back(data: bool) -> None:
    holds: Any = Holds()
    held, inner = holds.held, holds.held["inner"][0]
    with unchanged([holds], data=data):
        drawn = holds.change()
    assert (holds.count, hasattr(holds, "new")) == (0, False)
    assert held is holds.held
    assert holds.held == {"inner": [deque([1]), {2}, {"a": 1}, {"a": 1}]}
    assert inner is holds.held["inner"][0]
    assert holds.change() == drawn


def test_values_of_a_module_but_not_its_parameters_nor_its_data() -> None:
    module: Any = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module.register_buffer("wide", torch.ones(2).expand(3, 2))  # which cannot be written into
    module.mean, module.array = torch.zeros(2), np.zeros(2)
    module.data = TensorDataset(torch.zeros(2))
    module.hidden = (2 * module[2].weight).exp()
    mean = module.mean
    with unchanged(module, but={module[1]}):
        module(torch.randn(4, 2))
        module.eval()
        module.mean.add_(1)
        module.array += 1
        module.data.tensors[0].add_(1)
        with torch.no_grad():
            module[2].weight.zero_()
    assert module[0].running_mean.tolist() == [0.0, 0.0]
    assert module[1].running_mean.tolist() != [0.0, 0.0]
    assert module[0].training
    assert module.mean is mean
    assert (mean.tolist(), module.array.tolist()) == ([0.0, 0.0], [0.0, 0.0])
    assert module.data.tensors[0].tolist() == [1.0, 1.0]
    assert not module[2].weight.any()
    module.hidden.sum().backward()  # the graph of which has not noticed


def test_what_other_threads_use_is_left_alone() -> None:
    shared = Holds()
    shared.lock = threading.Lock()  # type: ignore[attr-defined]
    with unchanged(shared):
        shared.change()
    assert shared.count == 1
