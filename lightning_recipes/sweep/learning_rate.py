"""Find the learning rate to train at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_recipes.callbacks.trials import progress
from lightning_recipes.core.arguments import check_list
from lightning_recipes.core.learning_rate import GRID, LearningRateSearch
from lightning_recipes.core.trials import SweepResult
from lightning_recipes.sweep.running import Make, Runner, in_this_process, refuse_data, refuse_unknown, trials_of


def learning_rate_sweep(
    make: pl.LightningModule | Make,
    learning_rates: Sequence[float] = GRID,
    steps: int = 100,
    seeds: int = 1,
    max_steps: int = 500,
    monitor: str | None = None,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    path: str | Path | None = None,
    runner: Runner = in_this_process,
    show_progress: bool = True,
    **trainer_settings: Any,
) -> SweepResult:
    """Find the learning rate that a training of ``max_steps`` ends best at.

    Trains for some steps at each learning rate of a grid, from one start and in one order of the data; then with the
    best one and those around it, at least three and at most eight, for ``max_steps``. ``result.best`` is the one to
    train at, by the validation loss in the end if there is one (of a function, or the ``monitor``), and else by the
    training loss; besides it says from where on the training is unstable, and whether the best lies at that edge.
    ``result.summary`` has Wortsman's learning-rate sensitivity (of the short trials); ``result.plot()`` draws the loss
    over the learning rate, ``result.plot_curves()`` the training curves of the best one and those above it.

    By default this takes 5,600 steps at most, typically 3,500, which are announced. What it says is true of constant
    learning rates and runs of ``max_steps``: for one four times as long it is off by a step or two of the grid as often
    as not, because the longer a run, the lower its best rate. The training loss is lowest at a higher rate than the
    validation loss where a network can learn its examples by heart (``benchmarks/LOG.md``).

    Args:
        make: What to train, as for :func:`~lightning_recipes.sweep.warmup_sweep`. A function may return one more
            function, which computes the loss on the validation data.
        learning_rates: Rising, at least two, above 0: of the first parameter group that has one; the others keep their
            ratio to it.
        steps: Updates of each, at least 20.
        seeds: How many long trials for each, at least 1.
        max_steps: Updates of the long ones, at least 20: the length of the run, if that can be afforded.
        monitor: For a LightningModule: a validation loss that it logs, ``"val_loss"``; None for the training loss.
        train_dataloaders: For a LightningModule, as for ``Trainer.fit``.
        val_dataloaders: Likewise, with a ``monitor``; None for those of the data module or of the module.
        datamodule: Likewise.
        path: A JSON file that has all outcomes after each trial: a sweep that was cut goes on with those.
        runner: Who runs the trials: see :mod:`lightning_recipes.sweep.running`.
        show_progress: Show a progress bar, where the output is a terminal.
        trainer_settings: For a LightningModule, arguments of the Trainers: ``accelerator``, ``precision``,
            ``gradient_clip_val``... Of ``callbacks`` each trial has copies: give those that the gradients go through.
            ``max_epochs`` is for modules that make a schedule of it; a trial ends by its steps.

    Raises:
        TypeError: If an argument is not of its kind, or one that a Trainer has not.
        ValueError: If it is out of its range; if there are ``val_dataloaders`` and no ``monitor``, or a ``monitor`` and
            no validation; if all learning rates of the optimizer are 0; if the file is none of a sweep.

    Example:
        >>> import torch
        >>> def make(seed):
        ...     weight = torch.nn.Parameter(torch.ones(1))
        ...     return torch.optim.SGD([weight], lr=0.5), lambda: (weight**2).sum()
        >>> learning_rate_sweep(make, [0.001, 0.01, 0.1, 1.0, 10.0]).best.learning_rate
        0.01

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """
    refuse_data("learning_rates", learning_rates)
    refuse_unknown(learning_rate_sweep, trainer_settings)
    search = LearningRateSearch(check_list("learning_rates", learning_rates, "numbers"), steps, seeds, max_steps)
    train = trials_of(make, train_dataloaders, datamodule, trainer_settings, val_dataloaders, monitor)
    with progress("learning-rate sweep", search.most_steps, show_progress) as told:
        return search.result(runner(search, train, path, told))
