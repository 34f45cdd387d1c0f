"""Find the learning rate to train at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_recipes.callbacks.trials import progress
from lightning_recipes.core.learning_rate import GRID, LearningRateSearch
from lightning_recipes.core.trials import SweepResult
from lightning_recipes.sweep.running import Make, Runner, in_this_process, trials_of


def learning_rate_sweep(
    make: pl.LightningModule | Make,
    learning_rates: Sequence[float] = GRID,
    steps: int = 100,
    seeds: int = 1,
    max_steps: int | None = None,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    path: str | Path | None = None,
    runner: Runner = in_this_process,
    show_progress: bool = True,
    **trainer_settings: Any,
) -> SweepResult:
    """Train for some steps at each learning rate of a grid, from one start and in one order of the data.

    Says at which one the loss is lowest, from where on the training is unstable, and whether the lowest lies at that
    edge. ``result.best`` is the one to train at: for a long run about half of that with the lowest loss, and well below
    the edge; ``result.summary`` has Wortsman's learning-rate sensitivity; ``result.plot()`` draws the loss over the
    learning rate, ``result.plot_curves()`` the training curves of the best one and those above it.

    Args:
        make: What to train, as for :func:`~lightning_recipes.sweep.warmup_sweep`.
        learning_rates: Rising, at least two, above 0: of the first parameter group; the others keep their ratio to it.
        steps: Updates of each, at least 20.
        seeds: How many trials for each, at least 1.
        max_steps: Length of the run that the rate is for, at least 1; None for a long one.
        train_dataloaders: For a LightningModule, as for ``Trainer.fit``.
        datamodule: Likewise.
        path: A JSON file that has all outcomes after each trial: a sweep that was cut goes on with those.
        runner: Who runs the trials: see :mod:`lightning_recipes.sweep.running`.
        show_progress: Show a progress bar, where the output is a terminal.
        trainer_settings: For a LightningModule, arguments of the Trainers: ``accelerator``, ``precision``...

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.

    Example:
        >>> import torch
        >>> def make(seed):
        ...     weight = torch.nn.Parameter(torch.ones(1))
        ...     return torch.optim.SGD([weight], lr=0.5), lambda: (weight**2).sum()
        >>> learning_rate_sweep(make, [0.001, 0.01, 0.1, 1.0, 10.0]).best.learning_rate
        0.1

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """
    search = LearningRateSearch(tuple(learning_rates), steps, seeds, max_steps)
    train = trials_of(make, train_dataloaders, datamodule, trainer_settings)
    with progress("learning-rate sweep", search.most_steps, show_progress) as told:
        return search.result(runner(search, train, path, told))
