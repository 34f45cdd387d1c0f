"""Several networks from one training: a snapshot at the end of each cycle of the learning rate."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.ensembling import (
    BY_TASK,
    COMBINES,
    HeldOut,
    Split,
    can_average,
    held_out,
    judge,
    pair,
    rounding,
    with_state,
)
from lightning_recipes.callbacks.learning_rates import length_of, let_go, renew, take_hold
from lightning_recipes.callbacks.measuring import around_each_step, scaler_of
from lightning_recipes.callbacks.replay import without_trace
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.substitute import substitute
from lightning_recipes.callbacks.telling import log_scalars, log_text, run_folder, spared, tell
from lightning_recipes.callbacks.tracking import share_
from lightning_recipes.callbacks.unused import pass_over, pass_over_unused
from lightning_recipes.core.arguments import check_choice, check_count, check_flag, check_name
from lightning_recipes.core.ensembles import Ensemble
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.learning_rates import LearningRates
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.schedules import CyclicCosine, Run
from lightning_recipes.core.selection import HOW, Report
from lightning_recipes.core.snapshots import SnapshotRule

HUANG = "Huang et al. 2017, https://arxiv.org/abs/1704.00109"
EXACT = 1e-3  # change of a predicted probability that half precision may make


class SnapshotEnsemble(pl.Callback):
    """Train one network, get several: restart a cosine of the learning rate, keep what each cycle ends in.

    At every update of each optimizer its learning rates are multiplied by a
    :class:`~lightning_recipes.core.schedules.CyclicCosine`, so that a whole number of cycles fits the run; after the
    last update of a cycle, before the learning rate restarts, the weights are kept. When training ends, the snapshots
    are weighed on the validation data, in such a way that the ensemble is no worse than its best member; the report is
    told, and says whether the ensemble helps at all. The module keeps the weights that training ends with.

    The restarts have to be high, or the network stays where it is and the snapshots hardly differ: give the optimizer
    about twice the learning rate of a single run. A training that is stopped before the end (by a time limit or
    :class:`~lightning_recipes.EarlyStopping`) has the snapshots of the cycles that were over; with a time limit it is
    stopped at the end of a cycle if there is no time for another one.

    Cost: nothing in an update; a copy of the weights for each cycle, in CPU memory and in every checkpoint, or in a
    file; when training ends a copy for each on the device, and the validation data four times.

    Logged when training ends: ``ensemble/loss``, ``ensemble/gain`` (over the best member), ``ensemble/disagreement``,
    and for classification ``ensemble/accuracy`` and ``ensemble/calibration_error``.

    Attributes:
        rule: The :class:`~lightning_recipes.core.snapshots.SnapshotRule`.
        ensemble: An :class:`~lightning_recipes.core.ensembles.Ensemble`, one ``nn.Module`` that can be saved, when
            training has ended; None before.
        report: A :class:`~lightning_recipes.core.selection.Report`; None before, or without validation data.

    Args:
        cycles: How many cycles, at least 1.
        cycle_steps: Updates of each cycle, at least 1: the training ends after the last one. None to divide the run.
        warmup_steps: Updates in which each cycle rises to its top, at least 0.
        reset_momentum: Whether momentum (the first moment in Adam) is 0 when a cycle starts.
        weights: ``"raw"``, or ``"average"`` for those that ``EMAWeights`` has beside.
        storage: Where snapshots are kept: ``"memory"`` (and in checkpoints), or ``"files"`` in the run's folder, with
            the ensemble as ``ensemble.pt``; a run is resumed with the files where they are.
        dtype: Number format of what is kept: ``"same"``, ``"bfloat16"`` or ``"float16"``, which takes half the memory.
        weighting: How the validation data weighs the snapshots: the ``"best"`` alone, all alike (``"uniform"``), those
            that help most (``"greedy"``), the convex weights of the lowest loss (``"simplex"``), or ``"auto"``: which
            of these does best on held-out samples, beyond noise; see ``lightning_recipes.core.selection.select``.
        combine: What the outputs are, to take their mean as probabilities or as they are: ``"logits"`` of classes,
            ``"binary logits"``, ``"mean"`` for anything else, ``"auto"`` to tell by the targets, or a function; see
            ``lightning_recipes.core.ensembles.Ensemble``.
        module: Name of the submodule that makes the predictions, such as ``"net"``; None for the module itself, or its
            only submodule where it has no ``forward``.
        split_batch: Makes inputs and targets of a batch; None where a batch is such a pair. The submodule is called
            with the inputs alone.
        evaluate: Whether ``Trainer.test``, ``predict`` and ``validate`` use the ensemble where they call the submodule.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.
        MisconfigurationException: When fit starts, for a model in shards; if nobody knows the length of the run; or if
            the cycles do not fit in.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SnapshotEnsemble(cycles=5)], logger=False)

    References:
        Huang et al., Snapshot ensembles: train 1, get M for free, 2017: https://arxiv.org/abs/1704.00109
    """

    def __init__(
        self,
        cycles: int = 5,
        cycle_steps: int | None = None,
        warmup_steps: int = 0,
        reset_momentum: bool = False,
        weights: Literal["raw", "average"] = "raw",
        storage: Literal["memory", "files"] = "memory",
        dtype: Literal["same", "bfloat16", "float16"] = "same",
        weighting: Literal["auto", "best", "uniform", "greedy", "simplex"] = "auto",
        combine: str | Callable[[Any, Any], Any] = "auto",  # of Tensor the command line's help shows all subclasses
        module: str | None = None,
        split_batch: Callable[[Any], Any] | None = None,
        evaluate: bool = False,
    ) -> None:
        self.schedule = CyclicCosine(cycles, warmup_steps)
        self.cycle_steps = None if cycle_steps is None else check_count("cycle_steps", cycle_steps, 1)
        if cycle_steps is not None and cycle_steps <= warmup_steps:
            raise ValueError(f"cycle_steps must be above warmup_steps, {warmup_steps}, got {cycle_steps}")
        self.reset_momentum = check_flag("reset_momentum", reset_momentum)
        self.weights = check_choice("weights", weights, ("raw", "average"))
        self.storage = check_choice("storage", storage, ("memory", "files"))
        self.dtype = dtype
        self.weighting = check_choice("weighting", weighting, HOW)
        self.combine = combine if callable(combine) else check_choice("combine", combine, COMBINES)
        self.module = None if module is None else check_name("module", module, "a submodule, or None")
        if split_batch is not None and not callable(split_batch):
            raise TypeError(f"split_batch must be a function of a batch, or None, got {split_batch!r}")
        self.split_batch = split_batch
        self.evaluate = check_flag("evaluate", evaluate)
        self._forget()

    def _forget(self) -> None:
        """Start anew."""
        self.rule = SnapshotRule(self.dtype)
        self.rates: PerOptimizer[LearningRates] = PerOptimizer(LearningRates)
        self.ensemble: Ensemble | None = None
        self.report: Report | None = None
        self._chosen: dict[str, Any] | None = None  # how the snapshots in a checkpoint predict together
        self._likely = "mean"  # how predictions go together, by the training data
        self._used = False
        self._exact: dict[str, Tensor] = {}  # the last snapshot before it was rounded
        self._folder = ""
        self._planned: list[int] = []  # ends of all cycles, had they been those of a run from the start
        self._since = 0.0  # seconds left when the cycle began
        self._put_back: list[Callable[[], None]] = []

    # ---------------------------------------------------------------------------------- fit: start and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            renew(self.rates) if trainer.global_step else self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if is_sharded(trainer) or isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(f"{name} cannot keep a model in shards ({type(trainer.strategy).__name__})")
        self._submodule(pl_module)
        if self.weights == "average" and not _averaging(trainer):
            raise MisconfigurationException(f"{name}(weights='average') needs EMAWeights beside it")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer) if self.storage == "files" else None
        self._folder = trainer.strategy.broadcast("" if folder is None else str(folder / "snapshots"))
        self._since = _seconds_left(trainer)
        take_hold(type(self).__name__, trainer, self.rates)
        planned = self.schedule.ends(self._run(trainer))
        if planned != self._planned:  # or it goes on
            self._planned, self.ensemble, self.report, self._chosen = planned, None, None, None
            self._plan(trainer)
        for index, optimizer in enumerate(trainer.optimizers):
            self.rates[index].lay(lambda step: self.schedule.at(step, self.rule.ends))
            self.rates[index].start(optimizer)

    def _plan(self, trainer: pl.Trainer) -> None:
        """Have the cycles that are not over yet end with the run."""
        self.rule.plan(self._planned, self._updates(trainer), self._done)

    def _updates(self, trainer: pl.Trainer) -> int:
        """Of all cycles, without those that a GradScaler has skipped, or were made before."""
        missed = trainer.global_step - self.rates[0].step if len(trainer.optimizers) == 1 else 0
        return self._planned[-1] - missed

    @property
    def _done(self) -> int:
        """Updates of the optimizer that has made the fewest."""
        return min(self.rates[index].behind_warmup for index in self.rates)

    def _run(self, trainer: pl.Trainer) -> Run:
        """The length of the cycles together."""
        asked: Any = trainer  # connectors set some attributes
        name, cycles = type(self).__name__, self.schedule.cycles
        run = length_of(trainer)
        if self.cycle_steps is not None:
            if run.steps < self.cycle_steps * cycles and not asked.fast_dev_run:
                raise MisconfigurationException(
                    f"{name}: {cycles} cycles of {self.cycle_steps:,} updates do not fit into a run of {run.steps:,.0f}"
                )
            run = Run(self.cycle_steps * cycles, run.steps_per_epoch)
        try:
            fitting = len(self.schedule.ends(run))
        except ValueError:
            raise MisconfigurationException(
                f"{name} needs the length of the run, which is not known here (a loader without length, or only a"
                " time limit): give cycle_steps"
            ) from None
        if fitting < cycles and not asked.fast_dev_run:
            raise MisconfigurationException(
                f"{name}: {cycles} cycles"
                + (f" with {self.schedule.warmup_steps} updates of warmup each" if self.schedule.warmup_steps else "")
                + f" do not fit into a run of {run.steps:,.0f} updates: train longer"
                + (f", or take {fitting}" if fitting else "")
            )
        return run

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._put_back:
            return
        self._likely = _likely(self.split_batch or pair, batch)
        # Not in on_train_start: behind the hooks of all other callbacks, an average of the weights above all.
        for index, optimizer in enumerate(trainer.optimizers):
            stepped = partial(self._update, trainer, pl_module, optimizer, index)
            self._put_back.append(around_each_step(optimizer, stepped))
        pass_over(trainer, self, SnapshotEnsemble, ["on_train_batch_start"])

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, index: int) -> None:
        if self.reset_momentum and self.rates[index].behind_warmup in self.rule.ends[:-1]:
            _forget_momentum(optimizer)
        if self.rule.update(self._done):
            self._keep(trainer, pl_module)
            self._stop_if_over(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if scaler_of(trainer) is not None and self._updates(trainer) != self.rule.ends[-1]:
            self._plan(trainer)
            self.rates[0].start(trainer.optimizers[0])
        if len(self.rule.kept) == len(self.rule.ends):
            self._conclude(trainer, pl_module)  # so that the checkpoints of the last epoch know how they predict

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        averaging = _averaging(trainer) if self.weights == "average" else None
        with nullcontext() if averaging is None else averaging.average_weights(pl_module):
            module = self._submodule(pl_module)
            state = module.state_dict()
            buffers = {name: state[name].clone() for name, _ in module.named_buffers() if name in state}
            share_(buffers.values())
            state.update(buffers)
            if self.dtype != "same":
                self._exact = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            taken = len(self.rule.kept)
            with spared(trainer, Path(self._folder, f"snapshot_{taken + 1}.pt"), "it is kept in memory"):
                self.rule.keep(state, self._folder or None, trainer.is_global_zero)
            if len(self.rule.kept) == taken:
                self.rule.keep(state)

    def _stop_if_over(self, trainer: pl.Trainer) -> None:
        """End with the last cycle, or with this one if there is no time for the next."""
        left = _seconds_left(trainer)
        took, self._since = self._since - left, left
        over = len(self.rule.kept) == len(self.rule.ends) and self.cycle_steps is not None
        if left < math.inf:
            over = trainer.strategy.reduce_boolean_decision(over or left < took, all=False)
        trainer.should_stop = trainer.should_stop or over

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ended = trainer.global_step >= self._planned[-1] * len(trainer.optimizers)
        if ended and len(self.rule.kept) == len(self.rule.ends) - 1:
            self._keep(trainer, pl_module)  # a GradScaler has skipped the very last update
        self._conclude(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" and self._put_back and not self._used:
            tell(trainer, _unused(TrainerFn(stage).value, self.module, trainer.global_step))
        self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        while self._put_back:
            self._put_back.pop()()
        let_go(trainer)
        if self.ensemble is not None:
            self.ensemble.cpu()  # as Lightning does with the module

    # ---------------------------------------------------------------------------------- the ensemble

    def _submodule(self, pl_module: pl.LightningModule) -> nn.Module:
        """What makes the predictions."""
        if self.module is not None:
            try:
                return pl_module.get_submodule(self.module)
            except AttributeError as error:
                names = [name for name, _ in pl_module.named_children()]
                raise MisconfigurationException(f"{type(self).__name__}: {error}; there are: {names}") from None
        children = [child for child in pl_module.children() if next(child.parameters(), None) is not None]
        if type(pl_module).forward is pl.LightningModule.forward and len(children) == 1:
            return children[0]
        return pl_module

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weigh the snapshots, once; whatever goes wrong, the training is not lost."""
        run: Any = trainer  # connectors set some attributes
        if run.fast_dev_run or self.ensemble is not None or not self.rule.kept:
            return
        taken, cycles = len(self.rule.kept), len(self.rule.ends)
        step = self.rule.ends[taken - 1]
        if taken < cycles:
            tell(trainer, _cut_short(taken, cycles, step))
        states, problem = self._states(trainer)
        if problem:
            tell(trainer, _not_made(problem, step))
            return
        try:
            self.ensemble, findings = self._weigh(trainer, pl_module, states, step)
        except Exception as error:
            tell(trainer, _not_made(f"the module cannot be copied ({type(error).__name__}: {error})", step))
            return
        weights = [1 / taken] * taken if self.report is None else list(self.report.selection.weights)
        combine = None if callable(self.ensemble.combine) else self.ensemble.combine
        self._chosen = {"weights": weights, "combine": combine, "dim": self.ensemble.dim}
        if self._folder and trainer.is_global_zero:
            path = Path(self._folder).parent / "ensemble.pt"
            with spared(trainer, path):
                self.ensemble.save(path)
        for finding in findings:
            tell(trainer, finding)

    def _states(self, trainer: pl.Trainer) -> tuple[list[dict[str, Tensor]], str]:
        """Of the snapshots, or why they cannot be read; of those in files rank zero knows."""
        if not self._folder:
            return self.rule.states(), ""
        states, problem = list[dict[str, Tensor]](), ""
        if trainer.is_global_zero:
            try:
                states = self.rule.states()
            except Exception as error:  # a file is gone, or damaged
                problem = f"the snapshots cannot be read ({type(error).__name__}: {error})"
        return trainer.strategy.broadcast((states, problem))

    def _weigh(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, states: list[dict[str, Tensor]], step: int
    ) -> tuple[Ensemble, list[Finding]]:
        """Make the ensemble, judged if that can be, and say what was seen."""
        module, data = self._submodule(pl_module), self._held_out(trainer, pl_module)
        problem, findings = "" if data is not None else "there is no validation data", list[Finding]()
        members = [with_state(module, state) for state in states]
        if data is not None:
            try:
                with without_trace(pl_module):
                    for finding in self._judge(module, members, states, data, step):
                        findings.append(finding)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        if self.report is not None:
            self._log(trainer, self.report)
        ensemble = self.ensemble
        if ensemble is None:
            ensemble = Ensemble(members, None, self.combine if self.combine != "auto" else self._likely)
        if problem:
            findings.append(_not_judged(problem, ensemble, step))
        return ensemble, findings

    def _judge(
        self,
        module: nn.Module,
        members: list[nn.Module],
        states: list[dict[str, Tensor]],
        data: HeldOut,
        step: int,
    ) -> Iterator[Finding]:
        """Make ensemble and report, and say what was seen."""
        names = [f"snapshot {cycle + 1}" for cycle in range(len(members))]
        self.ensemble, self.report = judge(members, data, self.weighting, self.combine, names, step)
        yield self.report.finding
        if len(members) > 1:
            yield can_average(module, states, self.ensemble, data, step)
        if self._exact:
            change = rounding([with_state(module, self._exact), members[-1]], data)
            if change > EXACT:
                yield _rounded(self.dtype, change, step)

    def _log(self, trainer: pl.Trainer, made: Report) -> None:
        scalars = {
            "ensemble/loss": made.selection.loss,
            "ensemble/gain": made.selection.gain,
            "ensemble/disagreement": made.disagreement,
            "ensemble/accuracy": made.accuracy,
            "ensemble/calibration_error": made.calibration_error,
        }
        log_scalars(trainer, {name: value for name, value in scalars.items() if not math.isnan(value)})
        log_text(trainer, "ensemble", made.to_markdown())

    def _held_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> HeldOut | None:
        """The validation data of the run, if it has any."""
        return held_out(trainer, pl_module, self.split_batch or pair, self.combine == "mean")

    # ---------------------------------------------------------------------------------- evaluation with the ensemble

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._take_the_place(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_the_place(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_the_place(pl_module)

    def _take_the_place(self, pl_module: pl.LightningModule) -> None:
        """Of the submodule, until teardown."""
        if not self.evaluate or not self.rule.kept:
            return
        module = self._submodule(pl_module)
        if self.ensemble is None:
            chosen = self._chosen or {"weights": None, "combine": None, "dim": None}
            members = [with_state(module, state) for state in self.rule.states()]
            combine = chosen["combine"] or (self._likely if self.combine == "auto" else self.combine)
            self.ensemble = Ensemble(members, chosen["weights"], combine, chosen["dim"])
        self._used = False
        ensemble = self.ensemble.to(pl_module.device)

        def predict(*inputs: Any, **named: Any) -> Tensor:
            self._used = True
            prediction: Tensor = ensemble(*inputs, **named)
            return prediction

        self._put_back.append(substitute(module, "forward", predict))

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule.state_dict(),
            "rates": self.rates.state_dict(),
            "planned": self._planned,
            "chosen": self._chosen,
            "likely": self._likely,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self.rates.load_state_dict(state_dict["rates"])
        self._planned, self._chosen = list(state_dict["planned"]), state_dict["chosen"]
        self._likely = state_dict["likely"]


def _averaging(trainer: pl.Trainer) -> Any:
    """The callback that has averaged weights beside, or None."""
    run: Any = trainer  # connectors set some attributes
    return next((callback for callback in run.callbacks if hasattr(callback, "average_weights")), None)


def _seconds_left(trainer: pl.Trainer) -> float:
    """Until a Timer ends the training."""
    run: Any = trainer  # connectors set some attributes
    left = [callback.time_remaining() for callback in run.callbacks if isinstance(callback, Timer)]
    return min((seconds for seconds in left if seconds is not None), default=math.inf)


def _forget_momentum(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(name), Tensor):
                state[name].zero_()


def _cut_short(taken: int, cycles: int, step: int) -> Finding:
    return Finding(
        rule="cycles cut short",
        severity="warning",
        message=f"The training ended in cycle {taken + 1} of {cycles}: there are {taken} snapshots.",
        advice="What was trained after the last snapshot is in no member; give the run the time for all cycles.",
        step=step,
        evidence={"snapshots": taken, "cycles": cycles},
        source=HUANG,
    )


def _not_made(problem: str, step: int) -> Finding:
    return Finding(
        rule="ensemble not made",
        severity="warning",
        message=f"There is no ensemble: {problem}.",
        advice="Put a file back that is gone, keep no locks in the module; or weigh what there is with"
        " lightning_recipes.sweep.ensemble_from_checkpoints.",
        step=step,
        source=HUANG,
    )


def _not_judged(problem: str, ensemble: Ensemble, step: int) -> Finding:
    return Finding(
        rule="ensemble not judged",
        severity="warning",
        message=f"The snapshots could not be judged ({problem}): {len(ensemble.members)} are in the ensemble.",
        advice="Give the Trainer validation data that no snapshot was trained on, or module= and split_batch=.",
        step=step,
        source=HUANG,
    )


def _unused(stage: str, module: str | None, step: int) -> Finding:
    return Finding(
        rule="ensemble not used",
        severity="warning",
        message=f"Nothing in trainer.{stage} has called {'the module' if module is None else repr(module)}, which the"
        " ensemble stands for: the figures are of the single network.",
        advice="Name the submodule that makes the predictions: module='net'.",
        step=step,
    )


def _likely(split: Split, batch: Any) -> str:
    """How predictions go together, by the targets of a batch."""
    try:
        _, targets = split(batch)
    except Exception:
        return "mean"
    task = (
        "regression" if targets.is_floating_point() else "binary" if targets.dtype == torch.bool else "classification"
    )
    return BY_TASK[task]


def _rounded(dtype: str, change: float, step: int) -> Finding:
    return Finding(
        rule="snapshots rounded",
        severity="warning",
        message=f"Kept as {dtype}, the last snapshot predicts probabilities that differ by up to {change:.2g}.",
        advice="Keep them with dtype='float16', which is more exact than bfloat16, or 'same'.",
        step=step,
        evidence={"change": change},
    )
