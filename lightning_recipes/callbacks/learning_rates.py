"""Change the learning rates of a training that is under way."""

from typing import Any

import lightning.pytorch as pl


def scale_learning_rates(trainer: pl.Trainer, factor: float) -> None:
    """Multiply the learning rates of all optimizers, and those that the schedulers go by."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
