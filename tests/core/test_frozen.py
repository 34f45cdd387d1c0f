import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_recipes.core.frozen import untrained


def test_frozen_layers_that_nobody_has_trained() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(100, 20), nn.Linear(100, 20), nn.Linear(4, 4))
    assert untrained(net) == []
    assert untrained(net.requires_grad_(False)) == ["0", "1", "2"]  # of 16 weights it cannot be told
    with torch.no_grad():
        net[0].weight.mul_(1.2)
        net[1].weight.add_(0.02 * torch.randn(20, 100))
        net[2].weight.normal_(std=0.03).clamp_(-0.1, 0.1)
    assert untrained(net) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GRU(8, 20),
        lambda: nn.LSTM(8, 20, num_layers=2, bidirectional=True),
        lambda: nn.MultiheadAttention(24, 2),
        lambda: nn.ConvTranspose2d(8, 8, 3),
    ],
)
def test_of_every_kind_of_layer(make: Any) -> None:
    torch.manual_seed(0)
    layer = make()
    assert untrained(nn.Sequential(layer)) == []
    assert "0" in untrained(nn.Sequential(layer.requires_grad_(False)))
    with torch.no_grad():
        next(layer.parameters()).mul_(1.2)
    assert "0" not in untrained(nn.Sequential(layer))


def test_the_target_of_a_critic_is_no_frozen_layer() -> None:
    critic = nn.Linear(100, 20)
    target = copy.deepcopy(critic).requires_grad_(False)
    assert untrained(nn.ModuleList([critic, target])) == []


def test_a_weight_that_is_computed_or_not_there_is_left_alone() -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(100, 20))
    before = copy.deepcopy(normed.state_dict())
    assert untrained(nn.ModuleList([normed.requires_grad_(False), nn.LazyLinear(20)])) == []
    after = normed.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def even(bound: float, shape: tuple[int, ...] = (10, 10)) -> nn.Linear:
    """A frozen layer whose weights fill an interval evenly."""
    layer = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-bound, bound, layer.weight.numel()).view(shape))
    return layer


@pytest.mark.parametrize(
    ("bound", "shape", "found"),
    [
        (10**-0.5, (10, 10), True),
        (10**-0.5, (11, 9), False),  # of 99 weights it cannot be told
        (1.0009 * 10**-0.5, (10, 10), True),
        (1.0011 * 10**-0.5, (10, 10), False),  # beyond
        (0.93 * 10**-0.5, (10, 10), False),  # nothing near the bound
        (0.95 * 10**-0.5, (10, 10), True),
        (0.95 * 100**-0.5, (100, 100), False),  # of so many weights that is too narrow
    ],
)
def test_weights_as_made_fill_their_interval(bound: float, shape: tuple[int, int], found: bool) -> None:
    assert untrained(nn.Sequential(even(bound, shape))) == (["0"] if found else [])


def test_a_layer_is_as_made_if_all_of_its_weights_are() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(8, 20).requires_grad_(False)
    layer.weight_hh_l0.requires_grad_(True)
    assert untrained(nn.Sequential(layer)) == []
    with torch.no_grad():
        layer.requires_grad_(False).weight_hh_l0.mul_(1.2)
    assert untrained(nn.Sequential(layer)) == []
