"""Which units give nothing but 0, whatever is shown."""

from typing import Any

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


@pytest.mark.parametrize(
    ("rectify", "seen"),
    [
        (torch.relu, True),
        (torch.relu_, True),
        (Tensor.relu, True),
        (nn.functional.relu6, True),
        (nn.functional.hardtanh, True),
        (torch.tanh, False),
        (nn.functional.softplus, False),
    ],
)
def test_what_a_rectifier_is(rectify: Any, seen: bool) -> None:
    class Rectified(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            rectified: Tensor = rectify(inputs)
            return rectified

    net = nn.Sequential(Rectified())
    inputs = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    with DeadUnits(net) as units:
        net(inputs.clone())
    assert units.found == ({"0": (1, 3)} if seen else {})


def counted(net: nn.Module, *batches: Tensor) -> DeadUnits:
    with DeadUnits(net) as units:
        for batch in batches:
            net(batch)
    return units


def test_nine_tenths_of_a_layer_are_worth_a_word() -> None:
    for dead in (17, 18):
        inputs = torch.ones(2, 20)
        inputs[:, :dead] = -1.0
        units = counted(nn.Sequential(nn.ReLU()), inputs)
        assert units.found == {"0": (dead, 20)}
        assert units.worst == (("0", 18, 20) if dead == 18 else None)
    dead_too = torch.zeros(2, 20)
    assert counted(nn.Sequential(nn.ReLU(), nn.ReLU()), dead_too).worst == ("0", 20, 20)  # the first one
    assert counted(nn.ReLU(), dead_too).worst == ("", 20, 20)


def test_of_several_passes_the_worst_share_counts() -> None:
    net = nn.Sequential(nn.ReLU())
    half, third = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[1.0, 0.0, 1.0]] * 2)
    for batches in ((half, third), (third, half)):
        assert counted(net, *batches).found == {"0": (1, 2)}
    alike = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 2)
    assert counted(net, half, alike).found == {"0": (1, 2)}  # the first of such


def test_units_are_columns_channels_or_the_last_dimension() -> None:
    ones = torch.ones(2, 3, 4, 5)
    for shape, dead in (((2, 3), 0), ((2, 3, 4), 2), ((2, 3, 4, 5), 1), ((2, 3, 4, 5, 6), 4)):
        inputs = torch.ones(shape)
        inputs.movedim(1 if len(shape) == 4 else -1, 0)[:dead] = 0.0
        units = shape[1] if len(shape) == 4 else shape[-1]
        assert counted(nn.Sequential(nn.ReLU()), inputs).found == {"0": (dead, units)}
    assert counted(nn.Sequential(nn.ReLU()), ones[0, 0, 0], ones[:1]).found == {}


def test_a_part_that_is_not_in_the_module_has_the_name_of_what_calls_it() -> None:
    class Hidden(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            rectified: Tensor = nn.ReLU()(inputs)
            return rectified

    net = nn.ModuleDict({"body": Hidden()})
    with DeadUnits(net) as units:
        net["body"](torch.zeros(2, 3))
        nn.ReLU()(torch.zeros(2, 5))  # of no part of it
    assert units.found == {"body": (3, 3), "": (5, 5)}
