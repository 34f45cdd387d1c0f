import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Regression, regression_data, same, weights_of
from torch import nn

from lightning_recipes.sweep import compare_capacity


class Deep(Regression):
    """With sigmoids, through which hardly a gradient gets."""

    def __init__(self, depth: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
        self.net = nn.Sequential(*hidden, nn.Linear(8, 1))


def of(depth: int) -> Callable[[int], Deep]:
    return lambda seed: Deep(depth, seed)


def compare(deep: Any, shallow: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    return compare_capacity(deep, shallow, 60, 2, train_dataloaders=regression_data(shuffle=True), **settings, **more)


def test_a_deep_network_that_cannot_be_trained_has_an_optimization_problem() -> None:
    compared = compare(of(12), of(0))
    assert compared.verdict == "optimization"
    assert compared.constant_loss == pytest.approx(8.1, abs=0.8)  # the variance of a sum of eight normals
    assert compared.model_loss > 0.9 * compared.constant_loss > compared.baseline_loss


def test_a_network_that_gets_further_than_a_constant_does_not() -> None:
    class Nothing(Regression):
        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.mse_loss(self.net(0 * batch[0]), batch[1])

    module = Regression()
    before, state = weights_of(module), torch.get_rng_state()
    compared = compare(module, Nothing())
    assert compared.verdict == "capacity"
    assert same(weights_of(module), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_known_has_no_constant() -> None:
    def make(seed: int) -> Any:
        weight = nn.Parameter(torch.ones(1))
        return torch.optim.SGD([weight], 0.1), lambda: (weight**4).sum()

    compared = compare_capacity(make, make, 20, 2)
    assert math.isnan(compared.constant_loss)
    assert compared.verdict == "alike"


@pytest.mark.parametrize("asked", [{"steps": 19}, {"seeds": 1}])
def test_bad_arguments_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))} must be"):
        compare_capacity(Regression(), Regression(), **asked)
