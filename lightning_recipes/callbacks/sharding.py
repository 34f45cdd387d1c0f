"""What strategies that shard the model (FSDP, ModelParallel) ask of a callback that touches weights or gradients."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each rank may hold only a part of the weights; such strategies restore a checkpoint after setup."""
    return trainer.strategy.restore_checkpoint_after_setup


def shard_group(trainer: pl.Trainer) -> Any:
    """The process group over which FSDP (1) shards gradients, which it keeps as plain tensors; None elsewhere."""
    if not isinstance(trainer.strategy, FSDPStrategy):
        return None
    model: Any = trainer.strategy.model
    return None if model.sharding_strategy.name == "NO_SHARD" else model.process_group


def reshard_(pl_module: pl.LightningModule) -> None:
    """Free the full weights that a forward pass has left gathered, so that the shards are the weights again.

    After an evaluation the root stays gathered: its parameters are not those of the optimizer, and FSDP (1) would go
    on with the gathered copy whatever is written into the shards.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    strategy = pl_module.trainer.strategy if pl_module._trainer is not None else None
    model = strategy.model if strategy is not None and strategy.model is not None else pl_module  # FSDP wraps it
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle: Any = module._handle
            started = handle is not None and hasattr(handle.flat_param, "_full_param_padded")
            if started and not handle.needs_unshard():
                handle.reshard(True)
                handle.post_reshard()


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of its own memory: what a strategy gathers may be the live weights."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def save_beside(trainer: pl.Trainer, checkpoint: dict[str, Any], name: str) -> None:
    """Put the weights that the sharded model holds into a checkpoint, beside the ``state_dict`` that is in it.

    A distributed checkpoint saves shards of what is in ``state_dict`` alone: there they stand under ``<name>.<key>``,
    and ``checkpoint[name]`` is None. A single file has the whole tensors in ``checkpoint[name]``.
    """
    strategy = trainer.strategy
    weights = copied(type(strategy).lightning_module_state_dict(strategy))  # without a substitute of ours
    if _saves_shards(strategy):
        checkpoint["state_dict"].update({f"{name}.{key}": value for key, value in weights.items()})
        checkpoint[name] = None
    else:
        checkpoint[name] = weights


def load_beside(trainer: pl.Trainer, checkpoint: dict[str, Any], name: str) -> None:
    """Give the sharded model the weights that :func:`save_beside` has put into a checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    model = trainer.strategy.model
    assert model is not None  # the strategy sets it up before it loads a checkpoint
    weights = checkpoint[name]
    whole = weights is not None
    if not whole:
        weights = get_model_state_dict(model)
        key = "model" if isinstance(trainer.strategy, FSDPStrategy) else "state_dict"  # as these strategies save it
        beside = {f"{name}.{key}": value for key, value in weights.items()}
        load({key: beside}, checkpoint_id=str(trainer.ckpt_path))
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=whole, strict=False))


def _saves_shards(strategy: Any) -> bool:
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return bool(strategy._save_distributed_checkpoint)
