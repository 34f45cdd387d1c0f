"""Evaluate and save an average of the weights, go on training with the raw ones."""

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.batch_norm import recompute_, statistics
from lightning_recipes.callbacks.learning_rates import length_of
from lightning_recipes.callbacks.measuring import around_each_step
from lightning_recipes.callbacks.sharding import copied, is_sharded, load_beside, reshard_, save_beside
from lightning_recipes.callbacks.substitute import substitute, substituted
from lightning_recipes.callbacks.tracking import Tracked, same_tensors, share_, track
from lightning_recipes.callbacks.unchanged import isolate_rng
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_choice, check_flag
from lightning_recipes.core.averaging import ExponentialMovingAverage, decay_from_half_life, local
from lightning_recipes.core.durations import parse_duration
from lightning_recipes.core.per_optimizer import PerOptimizer

RAW, AVERAGE = "raw_weights", "average_weights"  # beside state_dict in a checkpoint
RECOMPUTE_BATCHES = 100


class EMAWeights(pl.Callback):
    """Validate, test, predict and save with an exponential moving average of the weights; train with the raw ones.

    After each update that an optimizer makes (one that a GradScaler skips is none, nor is a micro-batch), its
    parameters are averaged by :class:`~lightning_recipes.core.averaging.ExponentialMovingAverage`: the decay starts
    low, so that the first updates are forgotten soon. Each optimizer counts its own updates. Parameters that no
    optimizer has are not averaged; those that are frozen, shared, unfrozen or added later need nothing special.

    From ``on_validation_start`` to ``on_validation_end`` of a fit the model holds the average, and it is put back on
    an exception or Ctrl-C. After fit the model holds the average, for ``test``, ``predict`` and whatever comes; a
    further fit takes up the raw weights again. :meth:`average_weights` and :meth:`raw_weights` give either at any
    time. Before the first average exists nothing of this happens.

    A checkpoint written at any moment has the average in ``state_dict``, one with ``save_weights_only=True`` too, so
    ``load_from_checkpoint`` gives the good weights. The raw ones are beside it, and ``fit(ckpt_path=...)`` goes on
    with them bit for bit (under FSDP and ModelParallel shard by shard). A training resumed without this callback goes
    on from the average. DDP needs no communication but that of buffers at a validation. One EMAWeights a Trainer.

    Costs one pass of ``torch._foreach_lerp_`` an update and reads nothing back but once at the start. Memory is one
    copy of what is averaged (two bytes more a half-precision element, whose average is kept in single precision). On
    another ``device`` each update copies the weights there, which waits for it: take a stride then.

    Averaging gains nothing under a learning rate that decays to zero: it takes the place of the decay.

    Attributes:
        rule: The averages, an :class:`~lightning_recipes.core.averaging.ExponentialMovingAverage` for each optimizer.

    Args:
        decay: What the average keeps of itself at an update, above 0 and below 1; 0.999 if ``half_life`` is not given
            either. With a batch ``k`` times as large take ``decay ** k``.
        half_life: The same said differently: after how many updates a weight's share has halved. A number of
            updates, ``"2 epochs"`` or ``"0.1 of the run"``. 0.999 is a half-life of 693 updates.
        every_n_steps: Updates from one move of the average to the next, at least 1. The memory in updates stays.
        start_step: Updates before the first that is averaged, at least 0.
        buffers: Where the persistent floating-point buffers that go with the average come from: ``"average"`` them
            too; ``"copy"`` the live ones; ``"recompute"`` the statistics of BatchNorm in a pass over at most 100
            training batches whenever the average comes into use after an update, other buffers as with ``"copy"``.
            Integer buffers are always the live ones. What a validation writes into a buffer stays.
        device: Where to keep the average, ``"cpu"`` say; None for where the weights are.
        validate_raw: Validate the raw weights too, before the average, and log what the module logs with ``_raw``
            behind its name; doubles the time of validation. Callbacks do not see that pass.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown, if ``decay`` and ``half_life`` are both given or if the
            device is not there.
        MisconfigurationException: When fit starts, if there is nothing to average, under DeepSpeed (whose engine keeps
            the weights), or if an optimizer has no step hooks to count its updates by.

    Example:
        >>> trainer = pl.Trainer(callbacks=[EMAWeights(half_life="0.1 of the run")], logger=False)

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992
        Busbridge et al., How to Scale Your EMA, 2023: https://arxiv.org/abs/2307.13813
    """

    def __init__(
        self,
        decay: float | None = None,
        half_life: int | float | str | None = None,
        every_n_steps: int = 1,
        start_step: int = 0,
        buffers: Literal["average", "copy", "recompute"] = "average",
        device: str | torch.device | None = None,
        validate_raw: bool = False,
    ) -> None:
        if decay is not None and half_life is not None:
            raise ValueError(f"give decay or half_life, not both: got decay={decay!r} and half_life={half_life!r}")
        self.half_life = None if half_life is None else parse_duration("half_life", half_life)
        self.buffers = check_choice("buffers", buffers, ("average", "copy", "recompute"))
        self.validate_raw = check_flag("validate_raw", validate_raw)
        make: Callable[..., ExponentialMovingAverage] = partial(
            ExponentialMovingAverage,
            decay=0.999 if decay is None else decay,
            every_n_steps=every_n_steps,
            start_step=start_step,
            device=None if device is None else _present(device),
        )
        make()  # refuses bad arguments
        self.rule = PerOptimizer(make)
        self._tracked: list[Tracked] = []  # what changes with each optimizer, during fit
        self._follow_optimizers: Callable[[], None] = _nothing
        self._put_back: list[Callable[[], None]] = []  # takes away hooks and substitutes when fit ends
        self._statistics: dict[str, Tensor] = {}  # of BatchNorm, those that the model does not hold at the moment
        self._shown: list[tuple[Tensor, Tensor]] = []  # the buffers of the average, and copies, during a validation
        self._recomputed_at = -1  # updates at which those of the average were recomputed
        self._left: Tensor | None = None  # norms of the weights as the last fit left them
        self._loaded: dict[str, Tensor] | None = None  # averages from a checkpoint, until training starts
        self._fitting, self._failed = True, False

    @property
    def has_average(self) -> bool:
        """Whether there is an average yet."""
        return any(self.rule[index].exists for index in self.rule)

    @contextmanager
    def average_weights(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Within the context the module holds the average, whatever it held before and holds again after.

        Raises:
            RuntimeError: If there is no average yet.
        """
        if not self.has_average:
            raise RuntimeError("there is no average yet: no update has been averaged")
        with self._holding(pl_module, average=True):
            yield

    @contextmanager
    def raw_weights(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Within the context the module holds the raw weights, whatever it held before and holds again after."""
        with self._holding(pl_module, average=False):
            yield

    # ---------------------------------------------------------------------------------- fit: start, update, end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        self._loaded, self._fitting, self._failed = None, trainer.state.fn == TrainerFn.FITTING, False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_conflicts(trainer, pl_module)
        self._finish()
        self._track(trainer, pl_module)
        if not any(tensor.requires_grad for tracked in self._tracked for tensor in tracked.tensors.values()):
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to average: no optimizer has a parameter of the model that"
                " requires a gradient"
            )
        self._substitute(trainer, pl_module)

    def _refuse_conflicts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{name} cannot average the weights of DeepSpeed, whose engine keeps them: use FSDP or ModelParallel"
            )
        run: Any = trainer  # connectors set some attributes
        others = [each for each in run.callbacks if isinstance(each, WeightAveraging | StochasticWeightAveraging)]
        if others:
            raise MisconfigurationException(
                f"{name} and {type(others[0]).__name__} both put averaged weights into the model and into checkpoints:"
                " keep one of them"
            )
        if any(isinstance(each, ModelPruning) for each in run.callbacks):
            raise MisconfigurationException(
                f"{name} and ModelPruning do not go together: the average has no zeros where the weights have, and"
                " pruning gives them other names: keep one of them"
            )
        if self.buffers == "recompute" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{name}(buffers='recompute') runs training_step without its update, which manual optimization makes"
                " inside of it: use buffers='average'"
            )
        for optimizer in trainer.optimizers:
            if not hasattr(optimizer, "register_step_post_hook"):
                raise MisconfigurationException(
                    f"{name} counts updates by step hooks, which {type(optimizer).__name__} does not have: derive it"
                    " from torch.optim.Optimizer"
                )

    def _track(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reshard_(pl_module)
        self._tracked = track(pl_module, trainer.optimizers, buffers=self.buffers == "average")
        self.rule.rules = {index: self.rule[index] for index in self.rule if index < len(self._tracked)}
        for index in self.rule:
            self.rule[index].adapt(self._tracked[index].tensors)

    def _set_decay(self, trainer: pl.Trainer) -> None:
        if self.half_life is None:
            return
        if self.half_life.unit == "updates":
            half_life = self.half_life.amount
        else:
            run = length_of(trainer)
            half_life = self.half_life.in_updates(run.steps_per_epoch, run.steps)
        decay = decay_from_half_life(half_life)
        for index in range(len(trainer.optimizers)):
            self.rule[index].decay = decay

    def _substitute(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have every checkpoint take the average, and validation run twice if asked to."""
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop.val_loop
        gather, run = strategy.lightning_module_state_dict, loop.run

        def averaged_state_dict() -> dict[str, Any]:
            if is_sharded(trainer):
                with self._holding(pl_module, average=True):
                    return copied(gather())
            return self._averaged(pl_module, gather())

        def run_twice() -> Any:
            if self.has_average and not trainer.sanity_checking:
                with _unnoticed(trainer, pl_module):
                    run()
            return run()

        self._put_back.append(substitute(strategy, "lightning_module_state_dict", averaged_state_dict))
        if self.validate_raw:
            self._put_back.append(substitute(loop, "run", run_twice))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set_decay(trainer)
        self._track(trainer, pl_module)  # once more: other callbacks may have added groups, and the model its buffers
        if self._loaded is not None:
            for index, tracked in enumerate(self._tracked):
                self.rule[index].averages = {
                    name: self._loaded[name] for name in tracked.tensors if name in self._loaded
                }
            self._loaded = None
        elif self.has_average:
            self._take_up(trainer, pl_module)
        self._watch(trainer, pl_module)

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take in the updates of the present optimizers, and of those that may come in their place."""
        hooks: list[Callable[[], None]] = []
        optimizers: list[Optimizer] = []

        def unhook() -> None:
            while hooks:
                hooks.pop()()

        def hook() -> None:
            unhook()
            optimizers[:] = trainer.optimizers
            for index, optimizer in enumerate(optimizers):
                done = partial(self._update, trainer, pl_module, optimizer, index)
                hooks.append(around_each_step(optimizer, done))

        def follow() -> None:
            if trainer.optimizers != optimizers:
                hook()
                self._track(trainer, pl_module)

        hook()
        self._follow_optimizers = follow
        self._put_back.append(unhook)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._follow_optimizers()

    def _take_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from an earlier fit with its raw weights, or start anew if the weights are not those it left."""
        left, now = self._left, _norms(self._tracked)
        same = left is not None and left.shape == now.shape and torch.allclose(left, now, rtol=1e-6, equal_nan=True)
        if not trainer.strategy.reduce_boolean_decision(same, all=True):
            self.rule.rules, self._statistics = {}, {}
        self._hold(pl_module, average=False)

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, index: int) -> None:
        if not self._tracked[index].is_current(optimizer):
            self._track(trainer, pl_module)
        tensors = self._tracked[index].tensors
        cancelled = all(tensor.grad is None for tensor in tensors.values()) and not is_sharded(trainer)
        if not cancelled:
            self.rule[index].update(tensors, skipped=getattr(optimizer, "found_inf", None))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            if getattr(trainer.model, "broadcast_buffers", False):  # as DDP does with those that it finds in validation
                share_(pl_module.buffers())
            self._hold_together(trainer, pl_module)
            self._shown = [(buffer, buffer.clone()) for tracked in self._tracked for *_, buffer in tracked.buffers]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            written = [(buffer, buffer != shown, buffer.clone()) for buffer, shown in self._shown]
            self._shown = []
            self._hold(pl_module, average=False)
            for buffer, where, value in written:  # a threshold, say, which is then of the raw weights, too
                buffer.copy_(torch.where(where, value, buffer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold_together(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._failed = True
            self._hold(pl_module, average=False)
            self._left = _norms(self._tracked)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._left = _norms(self._tracked)
            self._finish()

    def _finish(self) -> None:
        """Take hooks and substitutes away and let go of the module's tensors."""
        while self._put_back:
            self._put_back.pop()()
        self._follow_optimizers = _nothing
        self._tracked, self._shown = [], []
        for index in self.rule:
            self.rule[index].forget()

    # ---------------------------------------------------------------------------------- which weights the model holds

    @property
    def _exchanged(self) -> bool:
        return any(self.rule[index].exchanged for index in self.rule)

    @property
    def _updates(self) -> int:
        return sum(self.rule[index].updates for index in self.rule)

    @property
    def _stale(self) -> bool:
        """Whether the statistics of BatchNorm for the average are to be recomputed before its use."""
        in_training = bool(self._tracked) and not self._failed
        return self.buffers == "recompute" and in_training and self._recomputed_at != self._updates

    def _hold_together(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module on all ranks, with the buffers of rank zero, which a checkpoint has."""
        self._hold(pl_module, average=True)
        if self._exchanged and not is_sharded(trainer):
            averaged = (buffer for tracked in self._tracked for *_, buffer in tracked.buffers)
            share_(statistics(pl_module).values() if self.buffers == "recompute" else averaged)

    @contextmanager
    def _holding(self, pl_module: pl.LightningModule, average: bool) -> Iterator[None]:
        before = self._exchanged
        try:
            self._hold(pl_module, average)
            yield
        finally:
            self._hold(pl_module, before)

    def _hold(self, pl_module: pl.LightningModule, average: bool) -> None:
        if self._exchanged != average and self.has_average:
            self._exchange(pl_module)

    def _exchange(self, pl_module: pl.LightningModule) -> None:
        """Put the average into the module and keep the raw weights, or the other way round."""
        reshard_(pl_module)
        self._follow(pl_module)
        with _uninterrupted():
            for index in self.rule:
                self.rule[index].exchange_(self._tensors(pl_module, index))
            if self.buffers == "recompute":
                self._exchange_statistics(pl_module)
        if self._exchanged and self._stale:
            recompute_(pl_module.trainer, pl_module, RECOMPUTE_BATCHES)
            self._recomputed_at = self._updates

    def _follow(self, pl_module: pl.LightningModule) -> None:
        """Have averages of the tensors that the module has now, whatever became of those at the last update."""
        if self._tracked and not self._exchanged:
            trainer = pl_module.trainer
            pairs = zip(self._tracked, trainer.optimizers, strict=False)
            if not all(tracked.is_current(optimizer) for tracked, optimizer in pairs):
                self._track(trainer, pl_module)

    @torch.no_grad()
    def _exchange_statistics(self, pl_module: pl.LightningModule) -> None:
        for name, held in statistics(pl_module).items():
            kept = self._statistics.get(name, held)
            self._statistics[name] = held.clone()
            held.copy_(kept)

    def _tensors(self, pl_module: nn.Module, index: int) -> dict[str, Tensor]:
        if self._tracked:
            return self._tracked[index].tensors
        named = dict([*pl_module.named_parameters(), *pl_module.named_buffers()])
        return {name: named[name] for name in self.rule[index].averages}

    def _averages(self, pl_module: nn.Module) -> dict[str, Tensor]:
        sets = [self.rule[index].average(self._tensors(pl_module, index)) for index in self.rule]
        return {name: tensor for averages in sets for name, tensor in averages.items()}

    # ---------------------------------------------------------------------------------- checkpoints

    def _averaged(self, pl_module: pl.LightningModule, state: dict[str, Any]) -> dict[str, Any]:
        """The module's state dict with the average in it, under every name that a shared tensor has."""
        if self._exchanged or not self.has_average:
            return state
        if self._stale:
            with self.average_weights(pl_module):
                pass  # recomputes
        self._follow(pl_module)
        averages = {**self._statistics, **self._averages(pl_module)}
        for name, first in same_tensors(pl_module).items():
            if name in state and first in averages:
                state[name] = averages[first].to(state[name].dtype)
        return state

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self.has_average:
            return
        if is_sharded(trainer):
            with self._holding(pl_module, average=False):
                save_beside(trainer, checkpoint, RAW)
            return
        self._follow(pl_module)
        raw = dict(self._statistics if self._exchanged else statistics(pl_module)) if self._statistics else {}
        for index in self.rule:
            raw |= self.rule[index].raw(self._tensors(pl_module, index))
        checkpoint[AVERAGE], checkpoint[RAW] = self._averages(pl_module), raw

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        if not self._fitting:
            return
        if not is_sharded(trainer):
            _fill_(pl_module, checkpoint.get(RAW, {}))
            self._loaded = checkpoint.get(AVERAGE)
        elif RAW in checkpoint:
            # The model has been given the average: keep it, then give it the raw weights.
            reshard_(pl_module)
            tensors = [pair for tracked in self._tracked for pair in tracked.tensors.items()]
            self._loaded = {name: local(tensor).detach().clone() for name, tensor in tensors}
            load_beside(trainer, checkpoint, RAW)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rule": {index: {**state, "averages": {}} for index, state in self.rule.state_dict().items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:  # not where a checkpoint is only evaluated
            self.rule.load_state_dict(state_dict["rule"])


def _nothing() -> None:
    """There is no training."""


def _present(device: str | torch.device) -> torch.device:
    """The device, if this machine has it; nothing is started on it."""
    try:
        found = torch.device(device)
        there = found.type == "cpu" or (found.index or 0) < torch.get_device_module(found).device_count()
    except (RuntimeError, TypeError, AttributeError):
        there = False
    if not there:
        raise ValueError(f"device must be one that this machine has, such as 'cpu', got {device!r}")
    return found


@torch.no_grad()
def _fill_(module: nn.Module, values: dict[str, Tensor]) -> None:
    named = dict([*module.named_parameters(), *module.named_buffers()])
    for name, value in values.items():
        named[name].copy_(value)


def _norms(tracked: list[Tracked]) -> Tensor:
    """The norm of each tensor, to recognise the weights by."""
    tensors = [local(tensor).detach() for each in tracked for tensor in each.tensors.values() if not is_lazy(tensor)]
    return torch.stack([norm.cpu() for norm in torch._foreach_norm(tensors)]) if tensors else torch.zeros(0)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the context ends: half of the weights exchanged would be no weights at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


@contextmanager
def _unnoticed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """A validation within the context is seen by no callback, and what it logs has ``_raw`` behind its name."""
    run: Any = trainer  # connectors set some attributes
    loop, log = trainer.fit_loop.epoch_loop.val_loop, pl_module.log

    def log_raw(name: str, *args: Any, **kwargs: Any) -> None:
        log(f"{name}_raw", *args, **kwargs)

    callbacks, progress = run.callbacks, copy.deepcopy(loop.batch_progress)
    run.callbacks = []
    try:
        with isolate_rng(), substituted(pl_module, log=log_raw):
            yield
    finally:
        run.callbacks, loop.batch_progress = callbacks, progress
