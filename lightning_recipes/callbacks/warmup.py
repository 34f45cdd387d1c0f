"""Find the warmup that a training needs before it starts, and use it."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_recipes.callbacks.learning_rates import (
    length_of,
    lengthen,
    lengthen_by,
    let_go,
    renew,
    scale_learning_rates,
    take_hold,
)
from lightning_recipes.callbacks.outlets import Files
from lightning_recipes.callbacks.rehearsal import unharmed
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.telling import run_folder, show, spared, tell
from lightning_recipes.callbacks.trials import ModuleTrials, own_rate, progress, run_trials, settings_of
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_count, check_flag, check_name
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.learning_rates import LearningRates
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.trials import Outcome, SweepResult, Trial, load_outcomes
from lightning_recipes.core.warmup import LEAST, WarmupSearch

FILE = "warmup_sweep.json"


class WarmupSweep(pl.Callback):
    """Find the shortest warmup that makes a high learning rate stable, before training starts, and train with it.

    The playbook's procedure (:class:`~lightning_recipes.core.warmup.WarmupSearch`): short trainings of copies of the
    module, with the loaders of the run, each ended at the first certain sign of instability. The first one is what the
    run itself would see; other seeds have other orders of the data and other noise. Then the run goes on from where it
    was: with the learning rate that was made stable, times what the module's schedulers say, behind the warmup, by
    which the run gets longer (10,000 + 1,000 steps are 11,000); everything else starts at its own step 0 when the
    warmup is done. If no warmup helps, or none is needed, the run is the same bit for bit as without this callback.

    The sweep is announced with the steps that it takes at most, and leaves ``warmup_sweep.json`` (after each trial) and
    a map of learning rates and warmups, ``warmup_sweep.png`` and in TensorBoard, in the run's folder. It is skipped on
    resume, whose checkpoint has its result, and with ``fast_dev_run``. What a gradient goes through decides what is
    stable: the trials have the Trainer's ``gradient_clip_val``, and copies of those of its callbacks that have an
    attribute ``in_trials`` which is true, as :class:`~lightning_recipes.PercentileGradientClipping` has. They have no
    others and no validation, and the module's schedulers stand still. Costs a copy of the module while it runs, and of
    one that ``ModelParallelStrategy`` puts into shards another, whole on each rank, from ``setup`` until then.

    Attributes:
        result: A :class:`~lightning_recipes.core.trials.SweepResult`, or None if nothing was swept.
        warmup_steps: Of this run, 0 for none.
        rule: The :class:`~lightning_recipes.core.learning_rates.LearningRates` of each optimizer.

    Args:
        base_learning_rate: The learning rate to be made stable, above 0 (of the first parameter group; the others keep
            their ratio); None for ``times`` the lowest unstable one.
        unstable_base_learning_rate: The lowest that is unstable without a warmup, above 0; None to find it.
        times: How many times the lowest unstable learning rate to make stable if ``base_learning_rate`` is not given,
            at least 1; 10, or 100 in a second sweep.
        seeds: With how many a warmup has to be stable, at least 1; of eight, seven will do.
        exhaustive: Try every warmup with every seed instead of bisecting.
        max_steps: Length of the run, at least 100 updates of each optimizer; None for that of the Trainer.
        path: A JSON file of the outcomes to go on from, if it is there, and to keep them in; None for one in the run's
            folder, to look at.
        show_progress: Show a progress bar, where the output is a terminal.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range, or two contradict each other.
        MisconfigurationException: When fit starts, of a model under FSDP or DeepSpeed, beside another prepended
            warmup, or if nobody knows how long the run is. (One of less than 100 updates is not swept.)

    Example:
        >>> trainer = pl.Trainer(max_steps=10_000, callbacks=[WarmupSweep()], logger=False)

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """

    def __init__(
        self,
        base_learning_rate: float | None = None,
        unstable_base_learning_rate: float | None = None,
        times: float = 10.0,
        seeds: int = 3,
        exhaustive: bool = False,
        max_steps: int | None = None,
        path: str | None = None,
        show_progress: bool = True,
    ) -> None:
        asked = (base_learning_rate, unstable_base_learning_rate, times, seeds, exhaustive)
        WarmupSearch(1.0, LEAST if max_steps is None else check_count("max_steps", max_steps, LEAST), *asked)
        check_flag("exhaustive", exhaustive)
        self._asked = asked
        self.max_steps = max_steps
        self.path = None if path is None else check_name("path", path, "a file, or None")
        self.show_progress = check_flag("show_progress", show_progress)
        self._forget()

    def _forget(self) -> None:
        """Start anew."""
        self.result: SweepResult | None = None
        self.warmup_steps = 0
        self.rule: PerOptimizer[LearningRates] = PerOptimizer(LearningRates)
        self._done = False
        self._factor = 1.0  # of the learning rates that the optimizers were given
        self._scaled = False  # whether those of this fit have it
        self._in_trials: list[pl.Callback] = []
        self._whole: pl.LightningModule | None = None  # a model that will be in shards, before it is

    # ---------------------------------------------------------------------------------- fit: start and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._scaled = False
        if trainer.global_step:
            renew(self.rule)
        else:
            self._forget()
            run: Any = trainer  # connectors set some attributes
            self._in_trials = copy.deepcopy([each for each in run.callbacks if getattr(each, "in_trials", False)])
            self._whole = copy.deepcopy(pl_module) if is_sharded(trainer) else None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot train copies of a model in the shards of"
                f" {type(trainer.strategy).__name__}: use ModelParallelStrategy, or call"
                " lightning_recipes.sweep.warmup_sweep with a function that makes the model"
            )
        lengthen_by(trainer, lambda: self.warmup_steps)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run: Any = trainer  # connectors set some attributes
        if not (self._done or trainer.ckpt_path or trainer.global_step or run.fast_dev_run):
            self._sweep(trainer, pl_module)
            lengthen(trainer, self.warmup_steps)
        self._done, self._whole = True, None
        if not self._scaled:
            scale_learning_rates(trainer, self._factor)
        if not self.warmup_steps:
            return
        take_hold(type(self).__name__, trainer, self.rule)
        for index, optimizer in enumerate(trainer.optimizers):
            self.rule[index].prepend_warmup(self.warmup_steps)
            self.rule[index].start(optimizer)

    def _sweep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = length_of(trainer).steps if self.max_steps is None else self.max_steps
        if steps == torch.inf:
            raise MisconfigurationException(
                f"{type(self).__name__} needs the length of the run, which is not known here: give max_steps"
            )
        if steps < LEAST:
            tell(trainer, _too_short(int(steps)))
            return
        own = own_rate(trainer.optimizers[0])
        search = WarmupSearch(own, int(steps), *self._asked)
        path, known = self._prepare(trainer)
        settings = {**settings_of(trainer), "callbacks": self._in_trials}
        module = self._whole or pl_module
        train = ModuleTrials(lambda _: module, trainer.train_dataloader, None, settings, own, run=trainer)
        shown = progress("warmup sweep", search.most_steps, self.show_progress and trainer.is_global_zero)
        with unharmed(trainer, type(self).__name__):
            with shown as told:
                self.result = search.result(run_trials(search, train, path, told, known))
            self._report(trainer, self.result)
            best = self.result.best
            if best is not None:
                self.warmup_steps, self._factor = best.warmup_steps, best.learning_rate / own

    def _prepare(self, trainer: pl.Trainer) -> tuple[Path | None, dict[Trial, Outcome]]:
        """The file for the outcomes, which rank zero writes, and those to go on from, the same on every rank."""
        if self.path is None:
            folder = run_folder(trainer)
            return None if folder is None else folder / FILE, {}
        path = Path(self.path) if trainer.is_global_zero else None
        known = {} if path is None else load_outcomes(path)
        return path, known if trainer.world_size == 1 else trainer.strategy.broadcast(known)

    def _report(self, trainer: pl.Trainer, result: SweepResult) -> None:
        tell(trainer, result.finding)
        folder = run_folder(trainer)
        if folder is not None and importlib.util.find_spec("matplotlib") is not None:
            with spared(trainer, folder):
                figure, _ = result.plot()
                Files(folder).figure("warmup_sweep", figure, trainer.global_step)
                show(trainer, "warmup_sweep", lambda: figure)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        let_go(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        let_go(trainer)

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        seen = {"warmup_steps": self.warmup_steps, "factor": self._factor, "done": self._done}
        return {"rule": self.rule.state_dict(), **seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self.warmup_steps, self._factor, self._done = (state_dict[name] for name in ("warmup_steps", "factor", "done"))
        self._scaled = True  # as the optimizers that were saved with it are


def _too_short(steps: int) -> Finding:
    return Finding(
        rule="too short for a warmup sweep",
        severity="info",
        message=f"The run has {steps} updates, and a warmup should have a tenth of them at most: nothing was swept.",
        advice=f"Sweep for a run of {LEAST} updates or more, or give WarmupSweep(max_steps=...).",
        step=0,
    )
