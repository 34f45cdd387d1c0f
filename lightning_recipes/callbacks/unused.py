"""Spare a run what does nothing at every batch: hooks that nobody overrides, and a profiler that measures nothing."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler
from typing_extensions import override

OF_TRAINING = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
OF_EVERY_BATCH = (*OF_TRAINING, "on_validation_batch_start", "on_validation_batch_end")


class Unprofiled(PassThroughProfiler):
    """Measures nothing, as Lightning's own, but without a generator at each of twenty places of an update."""

    _nothing = nullcontext()

    @override
    def profile(self, action_name: str) -> Any:  # a context manager
        return self._nothing


def pass_over_unused(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Have the trainer pass over those hooks of every batch that a callback does not override, and over profiling.

    Lightning takes two microseconds to call a hook that does nothing, six times an update, but calls only what is
    callable. A callback that is not in the trainer's own list is called by somebody else, and stays as it is. Two
    microseconds more go to the default profiler for every hook of every callback.
    """
    run: Any = trainer  # connectors set some attributes
    if type(run.profiler) is PassThroughProfiler:
        run.profiler = Unprofiled()
    for name in OF_EVERY_BATCH:
        if vars(callback).get(name, callback) is None:
            del vars(callback)[name]
    pass_over(trainer, callback, pl.Callback, OF_EVERY_BATCH)


def pass_over(trainer: pl.Trainer, callback: pl.Callback, base: type, hooks: Iterable[str]) -> None:
    """Likewise those that a callback has from ``base`` and that have nothing to do, until it is set up again."""
    run: Any = trainer
    if any(each is callback for each in run.callbacks):
        _pass_over(callback, base, hooks)


def pass_over_hooks_of(copied: pl.LightningModule, base: type) -> None:
    """Likewise the hooks that the copy of a module has from ``base``: of a copy nobody else calls them."""
    _pass_over(copied, base, OF_TRAINING)  # those of validation are asked for their arguments


def _pass_over(callee: object, base: type, hooks: Iterable[str]) -> None:
    for name in hooks:
        if getattr(type(callee), name) is getattr(base, name):
            vars(callee).setdefault(name, None)
