import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from models import Regression, regression_data
from torch.utils.data import DataLoader

from lightning_recipes.callbacks.trials import copy_of, same_loaders, seed_all


@pytest.mark.parametrize("available", [False, True])
def test_every_source_of_random_numbers_is_seeded(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    seed_all(3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_the_copy_of_a_compiled_module_computes_with_its_own_weights() -> None:
    module: Any = from_compiled(torch.compile(Regression(), backend="eager"))  # type: ignore[arg-type]
    copied = copy_of(module)
    batch = next(iter(regression_data()))
    loss = module.training_step(batch, 0).item()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied.training_step(batch, 0).item() == batch[1].square().mean().item()
    assert module.training_step(batch, 0).item() == loss
    assert copied._compiler_ctx is None


def test_data_of_trials_are_left_as_they_are() -> None:
    class Order:
        def __init__(self) -> None:
            self.random, self.passes = random.Random(0), 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([self.random.sample(range(96), 8)])

    order: Any = Order()
    loader = DataLoader(regression_data().dataset, batch_sampler=order)
    with same_loaders(1, [loader], None):
        first = list(loader)
    assert order.passes == 0
    assert torch.equal(first[0][0], next(iter(loader))[0])
