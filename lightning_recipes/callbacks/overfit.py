"""Learn a handful of examples by heart before training starts: what cannot do that has a bug."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from itertools import islice
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.measuring import around_each_step, mean_over_ranks
from lightning_recipes.callbacks.rehearsal import (
    first_batches,
    first_validation_batches,
    is_fresh,
    refuse_shards,
    rehearse,
    unharmed,
)
from lightning_recipes.callbacks.replay import step_arguments, without_trace
from lightning_recipes.callbacks.substitute import substituted
from lightning_recipes.callbacks.telling import tell
from lightning_recipes.callbacks.tracking import parameters_of
from lightning_recipes.callbacks.trials import peak_rate, seed_all
from lightning_recipes.callbacks.unchanged import unchanged
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.criteria import Criterion, Watch, loss_of
from lightning_recipes.core.dead_units import DeadUnits
from lightning_recipes.core.dependence import (
    Dependence,
    Run,
    examples_of,
    first_examples,
    labels_alike,
    look,
    varied_examples,
)
from lightning_recipes.core.fits import LEARNT, Fit, FitRule, fit_of, flipped, helps, mean_loss, other_factors
from lightning_recipes.core.frozen import untrained
from lightning_recipes.core.overfit import Symptoms, activation_of, judge, narrowest, nothing_to_train, shrinks
from lightning_recipes.core.repeats import Repeats, repeats, target_column

BATCH_NORM, DROPOUT = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
MOST_VALIDATED = 50  # batches that training examples are looked for in
MOST_BATCHES = 32
WARMUP = 10  # updates
LONGER = 3  # times max_steps, where that was not enough
SEED = 0

T = TypeVar("T")


class OverfitCheck(pl.Callback):
    """Check, before training starts, that the network can learn a handful of examples by heart; if not, say why.

    A copy of the module is trained on one fixed sample, by its own ``training_step`` and optimizers, at the peak of its
    learning rate (after 10 updates of warmup where the run has one), with the same random numbers in every step and
    without dropout and weight decay, until no more than 3 % is left of the loss of the best constant output. If it does
    not get there in ``max_steps`` it has three times as many, and other learning rates are tried, so that the finding
    can say which would do.
    Beside, it is seen whether every trainable parameter is in one optimizer, has a gradient and moves; whether frozen
    layers have their first random weights; whether gradients are set to zero; whether the outputs depend on the inputs,
    on other examples of the batch (in evaluation mode, in which BatchNorm does not mix them), on tokens that are to be
    predicted; whether targets are inputs, or a column of them tells the target; and whether an activation stands
    between the logits and the loss.

    What cannot be seen before training: labels that do not belong to their inputs (they are learnt by heart, too), data
    whose noise hides the signal, a network that is too small for more than the sample, and layers that share weights by
    mistake, as some networks do on purpose.

    Findings are warnings where the network surely has a defect; where the loss is of another kind, has other terms, or
    belongs to several optimizers, they are information. The training that follows is bit for bit the one without this
    callback. The check is skipped on resume, with ``fast_dev_run``, and where data can be read only once. Costs up to
    ``3 * max_steps`` updates with the sample, five times that after a failure, and a copy of the module and its
    optimizer while it runs.

    Attributes:
        fits: A :class:`~lightning_recipes.core.fits.Fit` for each learning rate that was tried.
        symptoms: The :class:`~lightning_recipes.core.overfit.Symptoms`.

    Args:
        examples: How many to learn by heart, at least 2; the first ones of training. Where it is not clear how to take
            them from a batch it is the whole batch.
        max_steps: Updates in which they should be learnt, at least 10.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.
        MisconfigurationException: When fit starts, of a model in shards or under DeepSpeed.

    Example:
        >>> trainer = pl.Trainer(callbacks=[OverfitCheck()], logger=False)

    References:
        Karpathy, A recipe for training neural networks, 2019: http://karpathy.github.io/2019/04/25/recipe/
    """

    def __init__(self, examples: int = 16, max_steps: int = 100) -> None:
        self.examples = check_count("examples", examples, 2)
        self.max_steps = check_count("max_steps", max_steps, 10)
        self._forget()

    def _forget(self) -> None:
        """Start anew."""
        self.fits: list[Fit] = []
        self.symptoms = Symptoms()
        self._done = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
            self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_shards(type(self).__name__, trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_fresh(trainer) and not self._done:
            with unharmed(trainer, type(self).__name__):
                self._check(trainer, pl_module)
        self._done = True

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = {True: 0, False: 0}
        for parameter in pl_module.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        if not counts[True]:
            tell(trainer, nothing_to_train(counts[False]))
            return
        sample = self._sample(trainer, pl_module)
        if not sample:
            return
        batch_norm = any(isinstance(module, BATCH_NORM) for module in pl_module.modules())
        examples = sum(map(examples_of, sample))
        seen = Symptoms(examples, trainable=counts[True], frozen=counts[False], batch_norm=batch_norm)
        seen.untrained = untrained(pl_module)
        seen.narrowest = narrowest(pl_module)
        seen.repeats = self._repeats(trainer, pl_module)
        with first_batches(trainer, pl_module) as batches:
            seen.column = target_column(islice(batches, MOST_BATCHES))
        first = self._fit(trainer, pl_module, sample, 1.0, seen)
        self.fits, self.symptoms = [first], seen
        explained = first.learnt or flipped(self.fits) or seen.explained or not any(map(_rated, trainer.optimizers))
        if not trainer.strategy.reduce_boolean_decision(explained, all=False):
            for factor in other_factors(first):
                self.fits.append(self._fit(trainer, pl_module, sample, factor, None))
                if helps(self.fits[-1], first):
                    break
        for finding in judge(self.fits, seen):
            tell(trainer, finding)

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Any]:
        """The first examples, in one batch if they fit into it."""
        sample: list[Any] = []
        there = 0
        with first_batches(trainer, pl_module) as batches:
            read = []
            for batch in batches:
                read.append(batch)
                sample.append(first_examples(batch, self.examples - there))
                there += examples_of(sample[-1]) or self.examples
                if there >= self.examples or len(sample) == self.examples:
                    break
            if len(sample) == 1 and labels_alike(sample[0]):
                read += islice(batches, MOST_BATCHES - 1)
                sample = [varied_examples(read, self.examples)]
        return sample

    def _repeats(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Repeats:
        """Of the first training batches among the first validation batches, if validation has been set up."""
        run: Any = trainer  # connectors set some attributes
        if run.overfit_batches:
            return Repeats()
        with first_batches(trainer, pl_module) as train, first_validation_batches(trainer, pl_module) as val:
            return repeats(islice(train, MOST_BATCHES), islice(val, MOST_VALIDATED))

    def _fit(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        sample: list[Any],
        factor: float,
        seen: Symptoms | None,
    ) -> Fit:
        run: Any = trainer  # connectors set some attributes
        drive = _Drive(pl_module, sample, factor, seen, any(map(_warms_up, run.callbacks)))
        rehearse(trainer, pl_module, sample, LONGER * self.max_steps, drive, drive.prepare)
        return fit_of(drive.rule, factor)

    @override
    def state_dict(self) -> dict[str, Any]:
        fits = [{"factor": fit.factor, "steps": fit.steps, "excess": fit.excess} for fit in self.fits]
        return {"done": self._done, "fits": fits}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]
        self.fits = [Fit(**each, learnt=each["excess"] <= LEARNT, stuck=False) for each in state_dict["fits"]]


class _Drive(pl.Callback):
    """Trains a copy on a sample, looks, and ends it.

    Args:
        original: The module that is copied.
        sample: Its batches.
        factor: Of the learning rate.
        seen: To be filled in; None to look at the loss alone.
        warms_up: Whether the run has a warmup that its schedulers do not know of.
    """

    def __init__(
        self,
        original: pl.LightningModule,
        sample: list[Any],
        factor: float,
        seen: Symptoms | None,
        warms_up: bool,
    ) -> None:
        self.original, self.sample, self.factor, self.seen = original, sample, factor, seen
        self.warms_up = warms_up
        self.rule = FitRule()
        self._losses: list[Tensor | None] = []
        self._criteria: list[Criterion] = []
        self._looks = False
        self._steps: dict[int, int] = {}
        self._used: dict[int, _Used] = {}
        self._without: dict[str, nn.Parameter] = {}
        self._unowned: dict[str, nn.Parameter] = {}
        self._dependence: Dependence | None = None
        self._last: list[Criterion] = []

    def prepare(self, module: pl.LightningModule) -> None:
        """Take away what is noise, and watch the training step."""
        for each in module.modules():
            if isinstance(each, DROPOUT):
                each.p = 0.0
            elif isinstance(each, nn.RNNBase | nn.MultiheadAttention):
                each.dropout = 0.0
        step = module.training_step

        @wraps(step)
        def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self._looks:
                return step(batch, *args, **kwargs)
            seed_all(SEED)
            with Watch() as seen:
                output = step(batch, *args, **kwargs)
            loss = loss_of(output)
            self._losses.append(None if loss is None else loss.detach())
            self._criteria += seen.part_of(loss)
            return output

        module.training_step = watched  # type: ignore[method-assign]  # and back again

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            rates = [peak_rate(group) * self.factor for group in _rated(optimizer)]
            now = [float(group["lr"]) * self.factor for group in _rated(optimizer)]
            warms_up = self.warms_up or any(one < 0.9 * peak for one, peak in zip(now[:1], rates, strict=False))
            self._steps[index] = 0
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    if self.seen is not None and group.get("lr") is not None:
                        self.seen.shrinks = max(self.seen.shrinks, shrinks(optimizer, group, peak_rate(group)))
                    group["weight_decay"] = 0.0

            before = partial(self._warm_up, optimizer, index, rates, WARMUP if warms_up else 1)
            around_each_step(optimizer, partial(self._note_step, optimizer, index), before)

    def _warm_up(self, optimizer: Optimizer, index: int, rates: list[float], warmup: int, *_: object) -> None:
        warm = min(1.0, (self._steps[index] + 1) / warmup)
        for group, rate in zip(_rated(optimizer), rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * warm)
            else:
                group["lr"] = rate * warm

    def _note_step(self, optimizer: Optimizer, index: int) -> None:
        self._steps[index] += 1
        self._note_gradients(optimizer, index)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.seen is None:
            return
        self.seen.optimizers = len(trainer.optimizers)
        owned = Counter(id(each) for optimizer in trainer.optimizers for each in parameters_of(optimizer))
        for name, parameter in pl_module.named_parameters():
            self.seen.shared += [name] if owned[id(parameter)] > 1 else []
            if parameter.requires_grad and id(parameter) in owned:
                self._without[name] = parameter
            elif parameter.requires_grad:
                self.seen.unowned[name] = False
                self._unowned[name] = parameter
        self._dependence = self._look(trainer, pl_module)
        self.rule = FitRule(self._dependence.least_loss)

    def _beside(self, trainer: pl.Trainer, pl_module: pl.LightningModule, do: Callable[[Run], T]) -> T:
        """Do something with a function that runs the training step without updates; the module is left as it was."""

        def run(batch: Any) -> list[Criterion]:
            seed_all(SEED)
            watch = Watch()
            with watch, trainer.precision_plugin.train_step_context():
                output = pl_module.training_step(*step_arguments(pl_module, copy.deepcopy(batch), 0))
            return watch.part_of(loss_of(output))

        self._looks = True
        try:
            with without_trace(pl_module), torch.enable_grad(), _only_compute(trainer):
                return do(run)
        finally:
            self._looks = False
            pl_module.zero_grad()

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Dependence:
        """What outputs depend on, in evaluation mode."""

        def see(run: Run) -> Dependence:
            def run_alike(batch: Any) -> Sequence[Criterion]:
                with unchanged(pl_module):  # or random numbers of its own would be others each time
                    return run(batch)

            pl_module.eval()
            if self.seen is not None and self._dependence is None:
                with DeadUnits(pl_module) as units:
                    run(self.sample[0])
                self.seen.dead = units.worst
            return look(run_alike, self.sample[0])

        return self._beside(trainer, pl_module, see)

    def _alone(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """The excess in evaluation mode, where BatchNorm has the mean statistics of the batches as they are now."""

        def see(run: Run) -> list[Criterion]:
            for module in pl_module.modules():
                if isinstance(module, BATCH_NORM) and module.training:
                    module.reset_running_stats()
                    module.momentum = None
            for batch in self.sample:
                run(batch)
            pl_module.eval()
            return [call for batch in self.sample for call in run(batch)]

        excess = self.rule.measure(math.nan, self._beside(trainer, pl_module, see))
        self.rule.losses.pop()
        return excess

    def _note_gradients(self, optimizer: Optimizer, index: int) -> None:
        if self.seen is None:
            return
        first = next((each for each in parameters_of(optimizer) if each.grad is not None), None)
        if first is not None:
            before = self._used.get(index)
            if before is not None and before.stale and first.grad is before.gradient:
                before.times += 1
                self.seen.carried |= before.times > 1
            times = before.times if before is not None else 0
            self._used[index] = _Used(first, times)
        for name, parameter in self._unowned.items():
            self.seen.unowned[name] |= parameter.grad is not None
        for name, parameter in list(self._without.items()):
            if parameter.grad is not None and bool(parameter.grad.any()):
                del self._without[name]

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        for used in self._used.values():
            used.stale &= used.is_as_it_was

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for used in self._used.values():
            used.follow()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % len(self.sample):
            return
        criteria, losses, self._criteria, self._losses = self._criteria, self._losses, [], []
        excess = self.rule.measure(mean_loss(losses), criteria)
        if self.seen is not None and len(self.rule.losses) == 1:
            self._note_modes(self.seen, pl_module)
            self.seen.known, self.seen.one_label, self.seen.far = self.rule.known, self.rule.one_label, self.rule.far
            self.seen.activation = activation_of(criteria)
            self.seen.outputs = max((call.rows.shape[1] for call in criteria), default=0)
        self._last = criteria
        if self.rule.follow(float(mean_over_ranks(trainer, torch.tensor(excess)))):
            trainer.should_stop = True

    def _note_modes(self, seen: Symptoms, pl_module: pl.LightningModule) -> None:
        """Of layers that train differently, beside weights that are trained."""
        for name, module in pl_module.named_modules():
            beside = module if isinstance(module, BATCH_NORM) else pl_module.get_submodule(name.rpartition(".")[0])
            own: Any = self.original.get_submodule(name)  # in the copy nothing is dropped
            drops = isinstance(module, DROPOUT) and own.p > 0
            trained = any(parameter.requires_grad for parameter in beside.parameters())
            seen.drops = max(seen.drops, float(own.p)) if drops else seen.drops
            if trained and (drops or isinstance(module, BATCH_NORM)):
                seen.awake |= module.training
                if not module.training:
                    seen.asleep.append(name)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seen, rule = self.seen, self.rule
        if seen is None or self._dependence is None:
            return
        values = sum(call.mean for call in self._last) / max(1, len(self.sample))
        beyond = abs(rule.losses[-1] - values)
        if rule.known and math.isfinite(beyond):
            seen.penalty = beyond / max(abs(rule.losses[0]), 1e-12)
        seen.dependence = self._dependence
        seen.without_gradient = list(self._without)
        original = dict(self.original.named_parameters())
        seen.zeros = [name for name in self._without if original[name].dim() > 1 and not bool(original[name].any())]
        for name, parameter in pl_module.named_parameters():
            untouched = parameter.requires_grad and name not in self._without and name not in seen.unowned
            if untouched and torch.equal(parameter, original[name]):
                seen.unmoved.append(name)
        if math.isfinite(rule.excess):
            now = self._look(trainer, pl_module)
            seen.dependence.or_(now)
            if abs(rule.excess) <= LEARNT and not rule.one_label and now.zeroed and len(self.sample) == 1:
                seen.leaked = rule.measure(math.nan, now.zeroed) <= LEARNT
                rule.losses.pop()
            if rule.learnt and rule.known and seen.batch_norm and len(self.sample) > 1:
                seen.alone = self._alone(trainer, pl_module)


class _Used:
    """The gradient of a parameter that an update has used, to see whether it is set to zero before the next."""

    def __init__(self, parameter: Tensor, times: int) -> None:
        self.parameter, self.gradient, self.times, self.stale = parameter, parameter.grad, times, True
        self.version = self._version

    @property
    def _version(self) -> int:
        return -1 if self.parameter.grad is None else self.parameter.grad._version

    @property
    def is_as_it_was(self) -> bool:
        """Whether nothing has been written into it."""
        return self.parameter.grad is self.gradient and self._version == self.version

    def follow(self) -> None:
        """A backward pass has added to it."""
        if self.stale:
            self.version = self._version


def _rated(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups that have a learning rate."""
    return [group for group in optimizer.param_groups if group.get("lr") is not None]


def _warms_up(callback: pl.Callback) -> bool:
    """Whether a callback of ours is about to warm the learning rate up."""
    schedule = getattr(callback, "schedule", callback)
    return bool(getattr(schedule, "warmup_steps", 0)) or bool(getattr(callback, "warmup_steps", 0))


def _only_compute(trainer: pl.Trainer) -> Any:
    """Within the context optimizers update nothing."""
    stack = ExitStack()
    for optimizer in trainer.optimizers:
        stack.enter_context(substituted(optimizer, step=_compute))
    return stack


def _compute(closure: Any = None, **_: object) -> Any:
    return None if closure is None else closure()
