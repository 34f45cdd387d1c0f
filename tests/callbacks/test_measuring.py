from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Derived
from torch import nn

from lightning_recipes.callbacks.measuring import around_each_step


@pytest.mark.parametrize("make", [torch.optim.SGD, Derived])
def test_what_is_around_a_step_is_there_once(make: Callable[..., torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = make([weight], 0.5)
    called: list[Any] = []
    end = around_each_step(
        optimizer, lambda: called.append(("done", weight.item())), lambda *_: called.append(("before", weight.item()))
    )
    weights = [1.0]
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
        weights.append(weight.item())
    assert called == [("before", weights[0]), ("done", weights[1]), ("before", weights[1]), ("done", weights[2])]
    end()
    optimizer.step()
    assert len(called) == 4
