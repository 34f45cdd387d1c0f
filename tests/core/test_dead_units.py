"""Which units give nothing but 0, whatever is shown."""

import pytest
import torch
from torch import Tensor, nn

from lightning_recipes.core.dead_units import DeadUnits


class Functional(nn.Module):
    """Rectifies by functions, in place, and in a part that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu_(self.second(nn.functional.relu(self.first(inputs)))).sum(1)


def kill(layer: nn.Linear | nn.Conv2d, units: slice) -> None:
    with torch.no_grad():
        layer.weight[units], layer.bias[units] = 0.0, -1.0  # type: ignore[index]  # it has one


def test_the_units_of_a_layer_are_counted_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU6(), nn.Linear(10, 2)
    )
    kill(net[0], slice(3))  # type: ignore[arg-type]  # a convolution
    kill(net[3], slice(9))  # type: ignore[arg-type]  # a linear layer
    images = torch.randn(64, 3, 6, 6)
    with DeadUnits(net) as units:
        net(images)
    hidden = net[:5](images)
    assert units.found == {"1": (3, 8), "4": (int((hidden == 0).all(0).sum()), 10)}
    assert units.worst == ("4", 9, 10)


def test_tokens_have_their_units_last() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    kill(net[0], slice(5))  # type: ignore[arg-type]  # a linear layer
    with DeadUnits(net) as units:
        net(torch.randn(3, 7, 4))
    assert units.worst == ("1", 5, 5)


def test_functions_are_named_by_the_module_that_calls_them_and_the_worst_one_counts() -> None:
    torch.manual_seed(1)
    net = nn.ModuleDict({"body": Functional()})
    kill(net["body"].second, slice(6))  # type: ignore[arg-type]  # a linear layer
    with DeadUnits(net) as units:
        net["body"](torch.randn(64, 4))
    assert units.worst == ("body", 6, 6)


def test_what_is_no_layer_is_not_looked_at() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    with DeadUnits(net) as units:
        torch.relu(-torch.ones(8, 3))  # outside of any forward pass: a penalty that is met
        net(torch.randn(1, 4))  # of one example nothing can be told
    assert units.found == {}
    assert units.worst is None


def test_hooks_are_gone_afterwards_and_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    kill(net[0], slice(5))  # type: ignore[arg-type]  # a linear layer
    with pytest.raises(RuntimeError), DeadUnits(net) as units:
        net(torch.randn(8, 3))
    net(torch.randn(8, 4))
    assert units.found == {}
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks
