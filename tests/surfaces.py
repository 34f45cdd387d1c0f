"""A small loss surface, and its Hessian by definition."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_recipes.core.hessian import LossSurface


def network(seed: int = 0) -> tuple[nn.Module, list[Any], LossSurface]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(6, 3).double(), torch.randint(2, (6,))) for _ in range(5)]
    losses = [lambda batch=batch: functional.cross_entropy(model(batch[0]), batch[1]) for batch in batches]
    return model, batches, LossSurface(losses, model.parameters())


def slow_hessian(model: nn.Module, batches: list[Any]) -> Tensor:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}
        each = [functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y) for x, y in batches]
        return torch.stack(each).mean()

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call,no-any-return]
