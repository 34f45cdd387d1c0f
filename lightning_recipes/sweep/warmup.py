"""Find the shortest warmup that makes a high learning rate stable."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_recipes.callbacks.trials import progress
from lightning_recipes.core.trials import SweepResult
from lightning_recipes.core.warmup import WarmupSearch
from lightning_recipes.sweep.running import Make, Runner, in_this_process, refuse_data, refuse_unknown, trials_of


def warmup_sweep(
    make: pl.LightningModule | Make,
    max_steps: int,
    base_learning_rate: float | None = None,
    unstable_base_learning_rate: float | None = None,
    times: float = 10.0,
    seeds: int = 8,
    exhaustive: bool = False,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    path: str | Path | None = None,
    runner: Runner = in_this_process,
    show_progress: bool = True,
    **trainer_settings: Any,
) -> SweepResult:
    """Find the shortest warmup that makes a high learning rate stable, and report; nothing is changed.

    The playbook's procedure, as :class:`~lightning_recipes.core.warmup.WarmupSearch` describes it: short trainings,
    each ended at the first certain sign of instability.

    Args:
        make: What to train. A function of a seed that makes the training anew and returns its optimizer and a function
            that computes the loss of the next batch (trained in a plain loop), or a LightningModule (by a Trainer); or
            a LightningModule, of which copies are trained, with the data in other orders for other seeds.
        max_steps: Length of the run that the warmup is for, at least 100 updates.
        base_learning_rate: The learning rate to be made stable; None for ``times`` the lowest unstable one.
        unstable_base_learning_rate: The lowest unstable one; None to find it.
        times: 10, or 100 in a second sweep.
        seeds: With how many a warmup has to be stable, at least 1; of eight, seven will do.
        exhaustive: Try every warmup with every seed instead of bisecting.
        train_dataloaders: For a LightningModule, as for ``Trainer.fit``.
        datamodule: Likewise.
        path: A JSON file that has all outcomes after each trial: a sweep that was cut goes on with those.
        runner: Who runs the trials: see :mod:`lightning_recipes.sweep.running`.
        show_progress: Show a progress bar, where the output is a terminal.
        trainer_settings: For a LightningModule, arguments of the Trainers: ``accelerator``, ``precision``,
            ``gradient_clip_val``... Of ``callbacks`` each trial has copies: give those that the gradients go through.

    Raises:
        TypeError: If an argument is not of its kind, or one that a Trainer has not.
        ValueError: If it is out of its range.

    Example:
        >>> import torch
        >>> def make(seed):
        ...     weight = torch.nn.Parameter(torch.ones(1))
        ...     return torch.optim.SGD([weight], lr=0.5), lambda: (weight**2).sum()
        >>> print(warmup_sweep(make, max_steps=1000, base_learning_rate=0.5, seeds=2).finding.message)
        Without a warmup the training is stable up to a learning rate of 0.5.

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """
    refuse_data("max_steps", max_steps)
    refuse_unknown(warmup_sweep, trainer_settings)
    train = trials_of(make, train_dataloaders, datamodule, trainer_settings)
    search = WarmupSearch(
        train.learning_rate,
        max_steps,
        base_learning_rate,
        unstable_base_learning_rate,
        times,
        seeds,
        exhaustive,
    )
    with progress("warmup sweep", search.most_steps, show_progress) as told:
        return search.result(runner(search, train, path, told))
