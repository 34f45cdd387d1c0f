"""Learning rates of a training under Lightning: factors laid on them, and runs made longer by a warmup."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_recipes.callbacks.measuring import around_each_step
from lightning_recipes.callbacks.substitute import substitute
from lightning_recipes.core.learning_rates import LearningRates
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.schedules import Run


@dataclass(slots=True)
class _Held:
    """What lies on the learning rates of an optimizer, who has laid it there, and what takes it away again."""

    rates: LearningRates = field(default_factory=LearningRates)
    names: list[str] = field(default_factory=list)
    put_back: list[Callable[[], None]] = field(default_factory=list)


@dataclass(slots=True)
class _End:
    """What was to end a run that may be made longer, who asks for how many updates more, and what takes them away."""

    epochs: int | None
    steps: int
    asked: list[Callable[[], int]] = field(default_factory=list)
    added: int = 0
    put_back: list[Callable[[], None]] = field(default_factory=list)


_on: WeakKeyDictionary[Optimizer, _Held] = WeakKeyDictionary()
_ends: WeakKeyDictionary[pl.Trainer, _End] = WeakKeyDictionary()


def scale_learning_rates(trainer: pl.Trainer, factor: float) -> None:
    """Multiply the learning rates of all optimizers, and those that the schedulers go by."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
                if name in group:
                    group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        _scale(config.scheduler, factor)


def _scale(scheduler: Any, factor: float) -> None:
    for name in ("base_lrs", "max_lrs"):  # the second is CyclicLR's
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    for inner in getattr(scheduler, "_schedulers", ()):  # of SequentialLR and ChainedScheduler
        _scale(inner, factor)


def length_of(trainer: pl.Trainer) -> Run:
    """The length of the run as it was asked for, in updates of each optimizer.

    For ``on_train_start`` or later: to set the loaders up sooner would lose the place from which a resumed run goes on
    in them. Where several optimizers are stepped by hand, each is taken to be stepped once a batch.
    """
    end = _ends.get(trainer, _End(trainer.max_epochs, trainer.max_steps))
    batches = trainer.num_training_batches
    per_epoch = _updates(batches, trainer, trainer.current_epoch)
    by_epochs = math.inf
    if end.epochs is not None and end.epochs >= 0:
        by_epochs = sum(_updates(batches, trainer, epoch) for epoch in range(end.epochs))
        per_epoch = by_epochs / end.epochs if end.epochs else per_epoch
    by_steps = math.inf if end.steps < 0 else end.steps / max(1, len(trainer.optimizers))
    return Run(min(by_epochs, by_steps), per_epoch)


def _updates(batches: float, trainer: pl.Trainer, epoch: int) -> float:
    """Of an epoch, as GradientAccumulationScheduler will have it, which says so only when the epoch begins."""
    run: Any = trainer  # connectors set some attributes
    schedulers = (each for each in run.callbacks if isinstance(each, GradientAccumulationScheduler))
    scheduler = next(schedulers, None)
    accumulated = trainer.accumulate_grad_batches if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)
    return math.ceil(batches / accumulated) if batches < math.inf else math.inf


def lengthen_by(trainer: pl.Trainer, updates: Callable[[], int]) -> None:
    """For ``on_fit_start``: :func:`lengthen` a run by what is asked for as soon as its loaders are known.

    That is before it is looked whether the run is over, as one that is resumed behind its old end is not. One that is
    asked for no update at all gets no longer.
    """
    if trainer not in _ends:
        end = _ends[trainer] = _End(trainer.max_epochs, trainer.max_steps)
        loop = trainer.fit_loop
        train = loop.run

        def run() -> None:
            loop.setup_data()
            if trainer.limit_train_batches != 0 and length_of(trainer).steps:
                for ask in end.asked:
                    lengthen(trainer, ask())
            train()

        end.put_back.append(substitute(loop, "run", run))
    _ends[trainer].asked.append(updates)


@contextmanager
def end_as_asked(trainer: pl.Trainer) -> Iterator[None]:
    """Within the context the trainer has the end that was asked for, whether it is left open or not."""
    loop = trainer.fit_loop
    now = loop.max_epochs, loop.epoch_loop.max_steps
    end = _ends.get(trainer, _End(*now))
    loop.max_epochs, loop.epoch_loop.max_steps = end.epochs, end.steps
    try:
        yield
    finally:
        loop.max_epochs, loop.epoch_loop.max_steps = now


def lengthen(trainer: pl.Trainer, updates: int) -> None:
    """Make a run longer by so many updates of each optimizer, until :func:`let_go`.

    Whatever ends it: a number of steps, of epochs, or both. A run that a time ends is left alone, and so is one with
    ``fast_dev_run``. Where several optimizers are stepped by hand and epochs end the run, it gets longer by whole
    epochs. One that was to end with an epoch, and so with a validation, ends with a validation.

    Raises:
        MisconfigurationException: If somebody else has made it longer.
    """
    asked: Any = trainer  # connectors set some attributes
    end = _ends[trainer]
    if not updates or asked.fast_dev_run:
        return
    if end.added:
        raise MisconfigurationException(
            "Two warmups make the run longer: leave out the warmup_steps of one, or overlay it (warmup='overlaid')"
        )
    end.added = updates
    run, loop, optimizers = length_of(trainer), trainer.fit_loop, max(1, len(trainer.optimizers))
    rank_zero_info(f"The warmup makes the run {updates:,} updates longer.")
    if end.epochs is not None and end.epochs >= 0 and run.steps_per_epoch < math.inf:
        loop.max_epochs = end.epochs + math.ceil(updates / run.steps_per_epoch)
    if end.steps >= 0:
        loop.epoch_loop.max_steps = end.steps + updates * optimizers
    if optimizers == 1 and run.steps < math.inf:
        loop.epoch_loop.max_steps = int(run.steps) + updates
        if run.steps % run.steps_per_epoch == 0:
            end.put_back.append(_validate_at_the_end(trainer))


def _validate_at_the_end(trainer: pl.Trainer) -> Callable[[], None]:
    """Have a run that ends in the midst of an epoch validate there, as it would at the end of one."""
    loop = trainer.fit_loop.epoch_loop
    is_due = loop._should_check_val_fx

    def is_due_or_over(data_fetcher: Any) -> bool:
        return is_due(data_fetcher) or (trainer.enable_validation and trainer.global_step >= loop.max_steps)

    return substitute(loop, "_should_check_val_fx", is_due_or_over)


def take_hold(name: str, trainer: pl.Trainer, rule: PerOptimizer[LearningRates]) -> None:
    """Have ``rule`` say what lies on the learning rates of each optimizer; what it has loaded is taken over.

    For ``on_train_start``, when everything is restored. Several callbacks may, which is told; each has to let go again.
    From then on the parameter groups have the product, at every moment but while a scheduler of the module is stepped.

    Raises:
        MisconfigurationException: If an optimizer has no step hooks.
    """
    for index, optimizer in enumerate(trainer.optimizers):
        if not hasattr(optimizer, "register_step_post_hook"):
            raise MisconfigurationException(
                f"{name} counts updates by step hooks, which {type(optimizer).__name__} does not have: derive it from"
                " torch.optim.Optimizer"
            )
        if optimizer not in _on:
            held = _on[optimizer] = _Held()
            held.put_back.append(around_each_step(optimizer, held.rates.update))
            for config in trainer.lr_scheduler_configs:
                if getattr(config.scheduler, "optimizer", None) is optimizer:
                    held.put_back.append(_unscaled(config.scheduler, held.rates))
        held = _on[optimizer]
        held.names.append(name)
        if len(held.names) > 1 and not index:
            rank_zero_info(f"The learning rate is the product of what {' and '.join(held.names)} make of it.")
        if index in rule.rules:
            held.rates.load_state_dict(rule[index].state_dict())
        rule.rules[index] = held.rates


def renew(rule: PerOptimizer[LearningRates]) -> None:
    """For ``setup`` of another fit, whose optimizers are new: what counts is the learning rates that they have."""
    for index in rule:
        rule[index].base = []


def let_go(trainer: pl.Trainer) -> None:
    """Give the optimizers their own learning rates back, and the run its own end; harmless if that has been done."""
    if trainer in _ends:
        end, loop = _ends.pop(trainer), trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps = end.epochs, end.steps
        while end.put_back:
            end.put_back.pop()()
    for optimizer in trainer.optimizers:
        if optimizer in _on:
            held = _on.pop(optimizer)
            held.rates.finish()
            while held.put_back:
                held.put_back.pop()()


def _unscaled(scheduler: Any, rates: LearningRates) -> Callable[[], None]:
    """Have a scheduler step from the learning rates by themselves, and not at all within a prepended warmup.

    By a class of its own: an attribute of the scheduler would get into its ``state_dict``.
    """
    kind = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        if not rates.holds_schedulers:
            with rates.unscaled():
                kind.step(self, *args, **kwargs)

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})

    def restore() -> None:
        scheduler.__class__ = kind

    return restore
