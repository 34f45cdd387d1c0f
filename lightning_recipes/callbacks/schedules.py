"""Lay a learning rate schedule on a training."""

from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_recipes.callbacks.learning_rates import (
    length_of,
    lengthen_by,
    let_go,
    renew,
    take_hold,
)
from lightning_recipes.callbacks.measuring import mean_over_ranks
from lightning_recipes.callbacks.telling import run_folder, spared, tell
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_choice, check_count
from lightning_recipes.core.durations import parse_duration
from lightning_recipes.core.files import put
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.learning_rates import LearningRates
from lightning_recipes.core.names import doubt
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.schedules import (
    SCHEDULES,
    Constant,
    PlateauRule,
    ReduceOnPlateau,
    Run,
    Schedule,
    Warmup,
)

RECORD = """\
# Trains with the learning rates of the run that wrote this: one of the Trainer's callbacks.
class_path: lightning_recipes.LearningRateSchedule
init_args:
  schedule:
    class_path: lightning_recipes.core.schedules.PiecewiseConstant
    init_args:
      milestones: {milestones}
      factors: {factors}
  warmup_steps: {warmup_steps}
  warmup: {warmup}
"""


class LearningRateSchedule(pl.Callback):
    """Multiply the learning rates of a training by a schedule, at every update.

    Of any module, whatever it does about its learning rates itself: automatic or manual optimization, several
    optimizers (each by its own updates), parameter groups (their ratios stay). With a scheduler that the module has, of
    whatever kind, the effective learning rate is the product of both: the parameter groups, and so
    ``LearningRateMonitor``, have it at every update, and the scheduler steps as if it were alone. An update that a
    GradScaler skips does not count (under a fused optimizer it does: to know would cost a synchronisation).

    With a prepended warmup (the playbook's) the run gets longer by ``warmup_steps``, and everything else, the module's
    schedulers included, starts at its own step 0 when the warmup is done. One that the module steps once an epoch waits
    for the end of the first epoch behind the warmup.

    A :class:`~lightning_recipes.core.schedules.ReduceOnPlateau` watches a validation metric (its mean over the ranks).
    The schedule it makes is written to ``schedule.yaml`` in the run's folder, for LightningCLI: with it another run has
    exactly the same learning rates. It tells of a warmup overlaid on a run that is too short for it, and of a mode that
    the metric's name speaks against. Costs two microseconds an update and no memory.

    Attributes:
        rule: The :class:`~lightning_recipes.core.learning_rates.LearningRates` of each optimizer.
        plateau: The :class:`~lightning_recipes.core.schedules.PlateauRule` of a ``ReduceOnPlateau``, or None.

    Args:
        schedule: One of those in ``lightning_recipes.core.schedules``, your own, or the name of one of them with its
            default arguments: ``"constant"``, ``"cosine"``, ``"cyclic cosine"``, ``"inverse square root"``,
            ``"linear"``, ``"one cycle"``, ``"polynomial"``, ``"step decay"``, ``"warmup stable decay"``.
        warmup_steps: Length of a warmup: updates, ``"2 epochs"``, ``"0.1 of the run"``, or 0 for none.
        warmup: ``"prepended"`` to the run, which gets longer by it, or ``"overlaid"`` over its first updates.
        steps: Updates of each optimizer that the schedule is for, at least 1; None for those of the run.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.
        MisconfigurationException: When fit starts, under DeepSpeed; if the schedule needs the length of the run and
            nobody knows it; or if it moves the momentum of an optimizer that has none.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LearningRateSchedule("cosine", warmup_steps=100)], logger=False)

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """

    def __init__(
        self,
        schedule: Schedule | ReduceOnPlateau | str = "cosine",
        warmup_steps: float | str = 0,
        warmup: Literal["prepended", "overlaid"] = "prepended",
        steps: int | None = None,
    ) -> None:
        if isinstance(schedule, str):
            schedule = _named(schedule)
        elif not isinstance(schedule, Schedule | ReduceOnPlateau):
            raise TypeError(f"schedule must be one of lightning_recipes.core.schedules, or a name, got {schedule!r}")
        if warmup_steps != 0:
            parse_duration("warmup_steps", warmup_steps)
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.warmup: Any = check_choice("warmup", warmup, ("prepended", "overlaid"))
        self.steps = None if steps is None else check_count("steps", steps, 1)
        self._forget()

    def _forget(self) -> None:
        """Start anew."""
        self.rule: PerOptimizer[LearningRates] = PerOptimizer(LearningRates)
        self.plateau = PlateauRule(self.schedule) if isinstance(self.schedule, ReduceOnPlateau) else None
        self._seen: Any = None  # the metric at the last check: Lightning never lets go of an old one

    @property
    def _whole(self) -> Schedule:
        """The schedule with its warmup, but for a plateau's cuts."""
        schedule = self.schedule if isinstance(self.schedule, Schedule) else Constant()
        return schedule if self.warmup_steps == 0 else Warmup(self.warmup_steps, schedule, self.warmup)

    # ---------------------------------------------------------------------------------- fit: start and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            renew(self.rule) if trainer.global_step else self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            name = type(self).__name__
            raise MisconfigurationException(f"{name} cannot see the updates of DeepSpeed: use its own scheduler")
        lengthen_by(trainer, lambda: self._whole.added_steps(self._run(trainer)))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run, whole = self._run(trainer), self._whole
        if self.plateau is not None:
            self._doubt(trainer, self.plateau.asked)
        warmup, steps = whole.overlaid_steps(run), length_of(trainer).steps
        settings: Any = trainer  # connectors set some attributes
        if 0 < steps <= warmup and not settings.fast_dev_run:
            tell(trainer, _too_long(warmup, int(steps)))
        moves = whole.momentum(0, run) is not None
        for optimizer in trainer.optimizers:
            if moves and not {"momentum", "betas"} & {*optimizer.param_groups[0]}:
                raise MisconfigurationException(
                    f"{type(self).__name__}({self.schedule!r}) moves the momentum, which {type(optimizer).__name__}"
                    " does not have: set cycle_momentum=False"
                )
        take_hold(type(self).__name__, trainer, self.rule)
        added = whole.added_steps(run)
        for index, optimizer in enumerate(trainer.optimizers):
            rates = self.rule[index]
            rates.lay(partial(whole.factor, run=run), added, partial(whole.momentum, run=run) if moves else None)
            if self.plateau is not None:
                rates.lay(self._cut)
            rates.start(optimizer)

    def _doubt(self, trainer: pl.Trainer, asked: ReduceOnPlateau) -> None:
        """Say what may keep a plateau from being seen as it is."""
        if not trainer.enable_validation:
            tell(trainer, _never(asked))
        harm = "cut the learning rate while the metric improves"
        doubtful = doubt(asked.monitor, asked.mode, type(asked).__name__, harm)
        if doubtful is not None:
            tell(trainer, doubtful)

    def _run(self, trainer: pl.Trainer) -> Run:
        """The length that the schedule is for."""
        run, whole = length_of(trainer), self._whole
        run = Run(run.steps if self.steps is None else self.steps, run.steps_per_epoch)
        try:
            whole.check(run)
            whole.added_steps(run)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from None
        return run

    def _cut(self, step: int) -> float:
        """By the plateaus so far; every optimizer by the same, whatever its own step is."""
        assert self.plateau is not None
        return float(self.plateau.asked.gamma ** len(self.plateau.milestones))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        let_go(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        let_go(trainer)

    # ---------------------------------------------------------------------------------- a plateau

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plateau is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        asked, metrics = self.plateau.asked, trainer.callback_metrics
        if not trainer.strategy.reduce_boolean_decision(asked.monitor in metrics, all=True):
            there = [name for name in metrics if name != asked.monitor]  # which one rank may have
            raise RuntimeError(
                f"{type(self).__name__} watches {asked.monitor!r}, which was not logged; there are: {there}"
            )
        value = metrics[asked.monitor]
        if value is self._seen:
            return
        self._seen = value
        rates = self.rule[0]
        step = rates.step - rates.added_steps
        if self.plateau.update(float(mean_over_ranks(trainer, value.squeeze())), step, counts=step > 0):
            for index in self.rule:
                self.rule[index].start(trainer.optimizers[index])
            self._record(trainer)
            tell(trainer, _finding(asked, rates))

    def _record(self, trainer: pl.Trainer) -> None:
        folder = run_folder(trainer)
        if folder is not None and self.plateau is not None:
            made = self.plateau.schedule
            text = RECORD.format(
                milestones=[*made.milestones],
                factors=[*made.factors],
                warmup_steps=self.warmup_steps,
                warmup=self.warmup,
            )
            with spared(trainer, folder / "schedule.yaml"):
                put(folder / "schedule.yaml", text)

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule.state_dict(),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        if self.plateau is not None and state_dict["plateau"] is not None:
            self.plateau.load_state_dict(state_dict["plateau"])


def _named(name: str) -> Schedule:
    try:
        return SCHEDULES[check_choice("schedule", name, tuple(SCHEDULES))]
    except ValueError as error:
        raise ValueError(
            f"{error}. One with arguments of its own is given as an object, such as"
            " lightning_recipes.core.schedules.ReduceOnPlateau('val_loss')"
        ) from None


def _never(asked: ReduceOnPlateau) -> Finding:
    return Finding(
        rule="learning rate never cut",
        severity="warning",
        message=f"There is no validation, at the end of which {asked.monitor} is looked at: no plateau will be seen.",
        advice="Give the Trainer validation data, or a schedule that goes by steps.",
        step=0,
    )


def _too_long(warmup: int, steps: int) -> Finding:
    return Finding(
        rule="warmup longer than the run",
        severity="warning",
        message=f"A warmup of {warmup:,} updates lies over a run of {steps:,}: the learning rate will reach no more"
        f" than {steps / (warmup + 1):.0%} of its peak.",
        advice="Make the warmup shorter, such as '0.05 of the run', or prepend it: that makes the run longer.",
        step=0,
        evidence={"warmup_steps": warmup, "steps": steps},
    )


def _finding(asked: ReduceOnPlateau, rates: LearningRates) -> Finding:
    return Finding(
        rule="learning rate cut",
        severity="info",
        message=f"{asked.monitor} has not improved in {asked.patience} checks: the learning rate was multiplied by"
        f" {asked.gamma:g} and is {float(rates.base[0]) * rates.factor:.3g} now.",
        advice="schedule.yaml in the run's folder repeats the schedule exactly, whatever another run measures.",
        step=rates.step,
        evidence={"learning_rate": float(rates.base[0]) * rates.factor, "gamma": asked.gamma},
    )
