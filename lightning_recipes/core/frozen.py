"""Frozen layers that nobody has trained."""

import math
from itertools import starmap

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

MADE = 50  # weights, of which twice as many tell how they were made


def untrained(module: nn.Module) -> list[str]:
    """Frozen layers, by name, whose weights are distributed just as torch initialises them: nobody has trained them.

    Copies of parameters that are trained are left out: the target of a critic begins as one.

    Example:
        >>> module = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10).requires_grad_(False))
        >>> untrained(module)
        ['1']
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad and not is_lazy(parameter)]

    def is_untrained(weight: Tensor, bound: float) -> bool:
        return (
            not weight.requires_grad
            and _is_as_made(weight, bound)
            and not any(other.shape == weight.shape and torch.equal(other, weight) for other in trained)
        )

    bounded = {name: _bounded(each) for name, each in module.named_modules()}
    return [name for name, weights in bounded.items() if weights and all(starmap(is_untrained, weights))]


def _bounded(layer: nn.Module) -> list[tuple[Tensor, float]]:
    """Its weights that torch draws evenly from an interval, each with the bound of that."""
    own = {name: weight for name, weight in layer.named_parameters(recurse=False) if not is_lazy(weight)}
    if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and "weight" in own:  # which a parametrization computes
        return [(own["weight"], 1 / math.sqrt(own["weight"][0].numel()))]
    if isinstance(layer, nn.RNNBase):
        weights = [weight for name, weight in own.items() if name.startswith("weight")]
        return [(weight, 1 / math.sqrt(layer.hidden_size)) for weight in weights]
    if isinstance(layer, nn.MultiheadAttention) and "in_proj_weight" in own:
        return [(own["in_proj_weight"], math.sqrt(6 / sum(own["in_proj_weight"].shape)))]
    return []


def _is_as_made(weight: Tensor, bound: float) -> bool:
    """Whether weights fill the interval evenly, and nothing beyond."""
    count = weight.numel()
    if count < 2 * MADE:
        return False
    share = weight.detach().float().abs() / bound  # uniform from 0 to 1, whose variance of squares is 4 / 45
    off = abs(float(share.square().mean()) - 1 / 3) / math.sqrt(4 / 45 / count)
    return float(share.max()) <= 1 + 1e-3 and float((share > 1 - 3 / MADE).float().sum()) > 0 and off < 4
