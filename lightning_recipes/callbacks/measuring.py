"""What callbacks measure: the gradient norm of an update, once however many ask, and means over the ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.optim import Optimizer

from lightning_recipes.callbacks.sharding import shard_group
from lightning_recipes.callbacks.tracking import gradients_of
from lightning_recipes.core.clipping import HALF_PRECISION, total_norm

# For each optimizer the newest norm and who has seen it: whoever asks for it again is at the next update.
_newest: WeakKeyDictionary[Optimizer, "_Norm"] = WeakKeyDictionary()


@dataclass(slots=True)
class _Norm:
    value: float | Tensor | None
    seen: set[int]


def index_of(trainer: pl.Trainer, optimizer: Optimizer) -> int:
    """The optimizer's place among those of the trainer."""
    optimizers = trainer.optimizers
    return 0 if optimizers[0] is optimizer else next(i for i, each in enumerate(optimizers) if each is optimizer)


def examples_in(batch: Any) -> int:
    """First dimension of the first tensor in a batch that has more than one; 1 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1  # len(batch) takes four times as long
    if not isinstance(batch, (list, tuple)):  # asked first: it is what most batches are
        batch = batch.values() if isinstance(batch, Mapping) else ()
    for part in batch:
        size = examples_in(part)
        if size > 1:
            return size
    return 1


def around_each_step(
    optimizer: Optimizer, done: Callable[[], None], before: Callable[[Any, Any], None] | None = None
) -> Callable[[], None]:
    """Have ``done`` called behind each step of an optimizer; once where its ``step`` calls the one that it overrides.

    Args:
        optimizer: A ``torch.optim.Optimizer``, which has step hooks.
        done: What to call.
        before: What to call before, with the arguments of the step.

    Returns:
        What ends it.
    """
    depth = 0

    def enter(_: object, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1 and before is not None:
            before(args, kwargs)

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            done()

    handles = optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def scaler_of(trainer: pl.Trainer) -> Any:
    """The GradScaler of a training in half precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def gradient_norm(trainer: pl.Trainer, optimizer: Optimizer, asker: object) -> float | Tensor | None:
    """L2 norm of the unclipped, unscaled, reduced gradients that an optimizer is about to use, over all shards.

    For ``on_before_optimizer_step``. A number where it is free to read, else a scalar tensor, not read back; None if
    there is no gradient. Callbacks that ask after another has clipped get the norm from before.
    """
    norm = _newest.get(optimizer)
    if norm is None:
        norm = _newest[optimizer] = _Norm(None, {id(asker)})
    if id(asker) in norm.seen:
        norm.value = _measure(trainer, optimizer)
        norm.seen.clear()
    norm.seen.add(id(asker))
    return norm.value


def _measure(trainer: pl.Trainer, optimizer: Optimizer) -> float | Tensor | None:
    gradients = gradients_of(optimizer)
    group = shard_group(trainer)
    if not gradients and group is None:
        return None
    norm = whole_norm(gradients, group, trainer.strategy.root_device)
    scaler = scaler_of(trainer)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        norm = norm / scaler.scale(torch.ones_like(norm))  # a fused optimizer unscales only inside its step
    return read_if_free(norm)


def forget_norms(trainer: pl.Trainer) -> None:
    """For the start of a fit: an optimizer that an earlier one has used has a norm and askers of then."""
    for optimizer in trainer.optimizers:
        _newest.pop(optimizer, None)


def cancel_(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Have the update that an optimizer is about to make change nothing; for ``on_before_optimizer_step``.

    A fused optimizer under a GradScaler is skipped by it: without any gradient the scaler would raise an error.
    """
    if scaler_of(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        for gradient in gradients_of(optimizer):
            gradient.fill_(torch.inf)
    else:
        optimizer.zero_grad(set_to_none=True)


def loss_of_update(trainer: pl.Trainer, losses: list[Tensor]) -> Tensor:
    """The mean over an update's micro-batches of what ``training_step`` returned.

    Args:
        trainer: The trainer.
        losses: What ``on_before_backward`` was given since the last update: scaled by a GradScaler and divided by the
            micro-batches.
    """
    total = losses[0] if len(losses) == 1 else torch.stack([loss.float().mean() for loss in losses]).sum()
    scaler, share = scaler_of(trainer), trainer.accumulate_grad_batches / len(losses)
    if scaler is not None:
        total = total / scaler.scale(torch.ones_like(total))
    return total if share == 1 else total * share


def whole_norm(tensors: list[Tensor], group: Any, device: torch.device) -> Tensor:
    """The norm over all shards; every rank of the group has to call, one that has no shard at all too."""
    norm = total_norm(tensors)
    if group is not None:
        squares = norm.to(device) ** 2
        torch.distributed.all_reduce(squares, group=group)
        norm = squares.sqrt()
    return norm


def share_before_save(
    trainer: pl.Trainer, callback: pl.Callback, checkpoint: dict[str, Any], share: Callable[[pl.Trainer], None]
) -> None:
    """Save what all ranks have measured, not what rank zero has; for ``on_save_checkpoint``.

    Nothing is shared where a rank may be missing: when a training that has failed is saved.

    Args:
        trainer: The trainer.
        callback: Whose state is in the checkpoint.
        checkpoint: What is about to be written.
        share: Replaces what each rank has by the mean over the ranks, all of which call it.
    """
    if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:
        share(trainer)
        checkpoint["callbacks"][callback.state_key] = callback.state_dict()


def free_to_read(tensor: Tensor) -> bool:
    """Whether the host can read the tensor without waiting for a device."""
    return tensor.is_cpu


def read_if_free(value: Tensor) -> float | Tensor:
    """A loss or norm as a number where that is free to read, else as a scalar tensor; of several values their mean."""
    if value.numel() != 1 or value.dtype in HALF_PRECISION:
        value = value.detach().float().mean()
    return value.item() if free_to_read(value) else value.detach().reshape(())


def read_at_once(values: Sequence[float | Tensor]) -> list[float]:
    """The numbers; waits for the device once for all scalars on it: for now and then, not for every update."""
    tensors = [value.float() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack([each.to(tensors[0].device) for each in tensors]).tolist() if tensors else ())
    return [next(read) if isinstance(value, Tensor) else value for value in values]


def means_over_ranks(trainer: pl.Trainer, values: Sequence[float | Tensor]) -> list[float]:
    """Likewise the means over the ranks, all of which have to ask; of as many values."""
    if trainer.world_size == 1 or not values:
        return read_at_once(values)
    device = trainer.strategy.root_device
    dtype = torch.float64 if device.type == "cpu" else torch.float32  # not every device has the former
    together = torch.stack([torch.as_tensor(value, device=device, dtype=dtype) for value in values])
    means: list[float] = trainer.strategy.reduce(together, reduce_op="mean").tolist()
    return means


def mean_over_ranks(trainer: pl.Trainer, value: Tensor) -> Tensor:
    """The mean over the ranks, all of which have to ask."""
    if trainer.world_size == 1:
        return value
    mean: Tensor = trainer.strategy.reduce(value.to(trainer.strategy.root_device, torch.float32), reduce_op="mean")
    return mean
