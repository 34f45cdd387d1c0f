"""Which tensors of a module an optimizer's updates change."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer


@dataclass
class Tracked:
    """The tensors that change with one optimizer.

    Args:
        tensors: Its parameters, and the buffers beside them, by their names in the module.
        groups: The parameters in each of its groups: the list itself, and how long it was.
        buffers: Where each buffer stands, and what stood there.
    """

    tensors: dict[str, Tensor]
    groups: list[tuple[list[Tensor], int]]
    buffers: list[tuple[nn.Module, str, Tensor]]

    def is_current(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the same lists of parameters, as long as they were, and the module its buffers."""
        groups = optimizer.param_groups
        return (
            len(groups) == len(self.groups)
            and all(
                group["params"] is parameters and len(parameters) == length
                for group, (parameters, length) in zip(groups, self.groups, strict=True)
            )
            and all(module._buffers.get(name) is buffer for module, name, buffer in self.buffers)
        )


def track(module: nn.Module, optimizers: Sequence[Optimizer], buffers: bool) -> list[Tracked]:
    """Find the tensors of every optimizer; each tensor belongs to the first optimizer that has it.

    Args:
        module: The module whose tensors are wanted; others that an optimizer has are left out.
        optimizers: Its optimizers.
        buffers: Whether to take the persistent floating-point buffers, too: each with the optimizer of the nearest
            parameter. Left out are sparse ones, lazy ones without a shape, and those that hold an infinity or NaN, as
            attention masks do (one host read for all).
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    owners: dict[str, int] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter in parameters_of(optimizer):
            if id(parameter) in names:
                owners.setdefault(names[id(parameter)], index)
    nearest: dict[str, int] = {}  # the first optimizer with a parameter under a prefix
    for name, index in owners.items():
        while name:
            name = name.rpartition(".")[0]
            nearest[name] = min(index, nearest.get(name, index))

    tracked = [
        Tracked({}, [(group["params"], len(group["params"])) for group in optimizer.param_groups], [])
        for optimizer in optimizers
    ]
    named = dict(module.named_parameters())
    for name, index in owners.items():
        tracked[index].tensors[name] = named[name]
    if buffers and nearest:
        for prefix, owner, key, buffer in _averageable_buffers(module):
            at = prefix
            while at not in nearest:
                at = at.rpartition(".")[0]
            tracked[nearest[at]].tensors[f"{prefix}.{key}".lstrip(".")] = buffer
            tracked[nearest[at]].buffers.append((owner, key, buffer))
    return tracked


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Those that the parameters of an optimizer have."""
    return [
        gradient
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (gradient := parameter.grad) is not None
    ]


def same_tensors(module: nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, under each name that it has: shared tensors have several."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        names[name] = first.setdefault(id(tensor), name)
    return names


def share_(buffers: Iterable[Tensor]) -> None:
    """Give all ranks the buffers of rank zero, which a checkpoint has; all have to call.

    DDP does likewise before the next forward pass in training.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in buffers:
            torch.distributed.broadcast(buffer, 0)


def _averageable_buffers(module: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    found = [
        (prefix, owner, key, buffer)
        for prefix, owner in module.named_modules()
        for key, buffer in owner.named_buffers(recurse=False)
        if buffer.is_floating_point()
        and buffer.layout is torch.strided
        and not is_lazy(buffer)
        and key not in owner._non_persistent_buffers_set
    ]
    if not found:
        return []
    finite = torch.stack([buffer.isfinite().all().to(found[0][3].device) for *_, buffer in found]).tolist()
    return [buffer for buffer, is_finite in zip(found, finite, strict=True) if is_finite]
