"""Is the training loss high because the network is too small, or because the optimization does not get there."""

import math
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.capacity import CapacityComparison, compare
from lightning_recipes.core.criteria import Watch
from lightning_recipes.core.initial_loss import InitialLossRule
from lightning_recipes.core.trials import Outcome, Trial
from lightning_recipes.sweep.running import Make, refuse_unknown, trials_of

FIRST = 10  # updates whose targets the best constant output is taken from


def compare_capacity(
    make: pl.LightningModule | Make,
    baseline: pl.LightningModule | Make,
    steps: int = 500,
    seeds: int = 5,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    **trainer_settings: Any,
) -> CapacityComparison:
    """Train a network and a smaller one (shallower, or linear) alike, and say which reaches the lower training loss.

    A larger network contains the smaller one. If its training loss is the higher one nevertheless, the optimization is
    to blame and not the size. Each is trained for the same updates, with the same seeds, on the same data in the same
    order, at the learning rate that it asks for (schedulers stand still); what counts is the mean loss of the last
    tenth, and whether the difference is beyond the noise over the seeds. Beside it stands what the best output gives
    that does not look at the input, taken from the targets of the first ten updates.

    Args:
        make: The network, as for :func:`~lightning_recipes.sweep.warmup_sweep`. Functions of a seed are better than a
            module, of which copies are trained: they make other initial weights for every seed.
        baseline: The smaller one, with the same loss; likewise.
        steps: Updates of each training, at least 20.
        seeds: How many trainings of each, at least 2.
        train_dataloaders: For a LightningModule, as for ``Trainer.fit``.
        datamodule: Likewise.
        trainer_settings: For a LightningModule, arguments of the Trainers: ``accelerator``, ``precision``...

    Raises:
        TypeError: If an argument is not of its kind, or one that a Trainer has not.
        ValueError: If it is out of its range.

    Example:
        >>> import torch
        >>> def network(depth):
        ...     def make(seed):
        ...         layers = [layer for _ in range(depth) for layer in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())]
        ...         net = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1))
        ...         data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        ...         loss = lambda: torch.nn.functional.mse_loss(net(data), data.sum(1, keepdim=True))
        ...         return torch.optim.SGD(net.parameters(), 0.02), loss
        ...
        ...     return make
        >>> compare_capacity(network(12), network(0), steps=100, seeds=2).verdict
        'optimization'

    References:
        He et al., Deep residual learning for image recognition, 2016: https://arxiv.org/abs/1512.03385
    """
    check_count("steps", steps, 20)
    check_count("seeds", seeds, 2)
    refuse_unknown(compare_capacity, trainer_settings)
    losses = []
    constant = math.nan
    for each in (make, baseline):
        train = trials_of(each, train_dataloaders, datamodule, trainer_settings)
        rate = train.learning_rate
        if math.isnan(constant):
            constant = _constant(train, rate)
        losses.append([_loss(train(Trial(rate, steps, seed=seed + 1))) for seed in range(seeds)])
    return compare(losses[0], losses[1], constant, steps)


def _loss(outcome: Outcome) -> float:
    """At the end; of a training that got stuck where it got stuck, and infinite of one that blew up."""
    if outcome.stable:
        return outcome.loss
    last = outcome.losses[-max(1, len(outcome.losses) // 10) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) and mean < 2 * abs(outcome.losses[0]) else math.inf


def _constant(train: Any, rate: float) -> float:
    """The loss of the best constant output, NaN if the loss is not made of one known criterion."""
    with _First() as watch:
        train(Trial(rate, FIRST))
    rule = InitialLossRule()
    for call in watch.seen:
        rule.update(None, [call])
    results = rule.results()
    return results[0].constant if len(results) == 1 else math.nan


class _First(Watch):
    """Notes the first criteria that can be learnt from, without their graphs."""

    @override
    def _note(self, *call: Any) -> None:
        before = len(self.seen)
        if before < FIRST:
            super()._note(*call)
        if len(self.seen) > before and not self.seen[-1].value.requires_grad:
            self.seen.pop()  # only looked at
        for each in self.seen[before:]:
            each.detach_()
