"""Learning rates of a training under Lightning: factors laid on them, and runs made longer by a warmup."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_recipes.core.learning_rates import LearningRates
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.schedules import Run


@dataclass(slots=True)
class _Held:
    """What lies on the learning rates of an optimizer, who has laid it there, and what takes it away again."""

    rates: LearningRates = field(default_factory=LearningRates)
    names: list[str] = field(default_factory=list)
    put_back: list[Callable[[], None]] = field(default_factory=list)


_on: WeakKeyDictionary[Optimizer, _Held] = WeakKeyDictionary()
# Epochs and steps that were to end a run that is made longer, and by how many updates it is.
_ends: WeakKeyDictionary[pl.Trainer, tuple[int | None, int, int]] = WeakKeyDictionary()


def scale_learning_rates(trainer: pl.Trainer, factor: float) -> None:
    """Multiply the learning rates of all optimizers, and those that the schedulers go by."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
                if name in group:
                    group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def length_of(trainer: pl.Trainer) -> Run:
    """The length of the run as it was asked for, in updates of each optimizer.

    For ``on_train_start`` or later: to set the loaders up sooner would lose the place from which a resumed run goes on
    in them. Where several optimizers are stepped by hand, each is taken to be stepped once a batch.
    """
    epochs, steps, _ = _ends.get(trainer, (trainer.max_epochs, trainer.max_steps, 0))
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    per_epoch = math.ceil(batches) if batches < math.inf else math.inf
    by_epochs = math.inf if epochs is None or epochs < 0 else per_epoch * epochs
    by_steps = math.inf if steps < 0 else steps / max(1, len(trainer.optimizers))
    return Run(min(by_epochs, by_steps), per_epoch)


def leave_end_open(trainer: pl.Trainer) -> None:
    """For ``on_fit_start``, if :func:`lengthen` may follow: a run that is resumed behind its old end is not over.

    One that is asked for no update at all is, and gets no longer.
    """
    if trainer not in _ends and 0 not in (trainer.max_epochs, trainer.max_steps):
        _ends[trainer] = trainer.max_epochs, trainer.max_steps, 0
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, -1


@contextmanager
def end_as_asked(trainer: pl.Trainer) -> Iterator[None]:
    """Within the context the trainer has the end that was asked for, whether it is left open or not."""
    loop = trainer.fit_loop
    now = loop.max_epochs, loop.epoch_loop.max_steps
    loop.max_epochs, loop.epoch_loop.max_steps, _ = _ends.get(trainer, (*now, 0))
    try:
        yield
    finally:
        loop.max_epochs, loop.epoch_loop.max_steps = now


def lengthen(trainer: pl.Trainer, updates: int) -> None:
    """Make a run longer by so many updates of each optimizer, for ``on_train_start``, until :func:`let_go`.

    Whatever ends it: a number of steps, of epochs, or both. A run that a time ends is left alone. Where several
    optimizers are stepped by hand and epochs end the run, it gets longer by whole epochs.

    Raises:
        MisconfigurationException: If somebody else has made it longer.
    """
    epochs, steps, before = _ends[trainer]
    if updates and before:
        raise MisconfigurationException(
            "Two warmups make the run longer: leave out the warmup_steps of one, or overlay it (warmup='overlaid')"
        )
    added = before + updates
    _ends[trainer] = epochs, steps, added
    run, loop, optimizers = length_of(trainer), trainer.fit_loop, max(1, len(trainer.optimizers))
    loop.max_epochs, loop.epoch_loop.max_steps = epochs, steps
    if updates:
        rank_zero_info(f"The warmup makes the run {updates:,} updates longer.")
    if added and epochs is not None and epochs >= 0 and run.steps_per_epoch < math.inf:
        loop.max_epochs = epochs + math.ceil(added / run.steps_per_epoch)
    if added and steps >= 0:
        loop.epoch_loop.max_steps = steps + added * optimizers
    if added and optimizers == 1 and run.steps < math.inf:
        loop.epoch_loop.max_steps = int(run.steps) + added


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

            def stepped(*_: object, rates: LearningRates = held.rates) -> None:
                rates.update()

            held.put_back.append(optimizer.register_step_post_hook(stepped).remove)
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


def let_go(trainer: pl.Trainer) -> None:
    """Give the optimizers their own learning rates back, and the run its own end; harmless if that has been done."""
    if trainer in _ends:
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps, _ = _ends.pop(trainer)
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
