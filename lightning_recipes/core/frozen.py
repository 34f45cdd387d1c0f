"""Frozen layers that nobody has trained."""

import math

import torch
from torch import Tensor, nn

MADE = 50  # weights, of which twice as many tell how they were made


def untrained(module: nn.Module) -> list[str]:
    """Frozen layers, by name, whose weights are distributed just as torch initialises them: nobody has trained them.

    Copies of parameters that are trained are left out: the target of a critic begins as one.

    Example:
        >>> module = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10).requires_grad_(False))
        >>> untrained(module)
        ['1']
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        name
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear | nn.modules.conv._ConvNd)
        and not each.weight.requires_grad
        and _is_as_made(each.weight)
        and not any(other.shape == each.weight.shape and torch.equal(other, each.weight) for other in trained)
    ]


def _is_as_made(weight: Tensor) -> bool:
    """Whether weights fill the interval of 1 over the root of the fan-in evenly, and nothing beyond."""
    count, bound = weight.numel(), 1 / math.sqrt(weight[0].numel())
    if count < 2 * MADE:
        return False
    share = weight.detach().float().abs() / bound  # uniform from 0 to 1, whose variance of squares is 4 / 45
    off = abs(float(share.square().mean()) - 1 / 3) / math.sqrt(4 / 45 / count)
    return float(share.max()) <= 1 + 1e-3 and float((share > 1 - 3 / MADE).float().sum()) > 0 and off < 4
