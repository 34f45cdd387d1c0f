"""Run the trials of a sweep with copies of a module, and leave no trace of them."""

import copy
import importlib
import inspect
import logging
import os
import random
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_recipes.callbacks.learning_rates import end_as_asked
from lightning_recipes.callbacks.measuring import (
    gradient_norm,
    index_of,
    loss_of_update,
    mean_over_ranks,
    scaler_of,
)
from lightning_recipes.callbacks.tracking import parameters_of
from lightning_recipes.callbacks.unchanged import isolate_rng, unchanged
from lightning_recipes.callbacks.unused import OF_EVERY_BATCH, Unprofiled, pass_over_hooks_of, pass_over_unused
from lightning_recipes.core.clipping import total_norm
from lightning_recipes.core.trials import Outcome, Readings, Search, Trial, TrialRule, load_outcomes, save_outcomes

FOREVER = 10**12  # batches: a trial is validated in the end
ENDS = ("on_train_end", "on_fit_end", "teardown")  # of a copy: the run goes on, and needs what they would take away
SOME = 100  # updates that schedules are made for where only the learning rate is asked


def run_trials(
    search: Search,
    train: Callable[[Trial], Outcome],
    path: str | Path | None = None,
    told: Callable[[Trial, Outcome], None] | None = None,
    known: Mapping[Trial, Outcome] | None = None,
) -> dict[Trial, Outcome]:
    """Run what a search asks for, one trial after the other in this process.

    Args:
        search: Plans the trials.
        train: Runs one.
        path: A JSON file that has all outcomes after each trial; None for no file.
        told: Called with every outcome.
        known: Outcomes to go on from; None for those in the file.
    """
    outcomes = dict(known) if known is not None else {} if path is None else load_outcomes(path)
    keep = keeper(path)
    with without_notes():
        while wanted := search.ask(outcomes):
            trial = wanted[0]
            outcomes[trial] = train(trial)
            keep(outcomes)
            if told is not None:
                told(trial, outcomes[trial])
    return outcomes


def keeper(path: str | Path | None) -> Callable[[Mapping[Trial, Outcome]], None]:
    """Make what writes the outcomes of a sweep as JSON: a sweep is worth more than its file, so that it goes on where
    that cannot be written, and says so once.

    Args:
        path: Of the file; None for none.
    """
    told = path is None

    def keep(outcomes: Mapping[Trial, Outcome]) -> None:
        nonlocal told
        try:
            if path is not None:
                save_outcomes(path, outcomes)
        except OSError as error:
            if not told:
                rank_zero_warn(
                    f"{path} could not be written ({error.strerror or error}): the sweep goes on without it."
                )
            told = True

    return keep


@contextmanager
def progress(name: str, most_steps: int, shown: bool = True) -> Iterator[Callable[[Trial, Outcome], None]]:
    """Say what a sweep will cost, and show a bar with the best trial so far beside it; yields what it is to be told.

    Args:
        name: Of the sweep.
        most_steps: Updates that it cannot exceed.
        shown: Whether to show the bar (never where the output is no terminal).
    """
    rank_zero_info(f"The {name} makes {most_steps:,} steps at most; unstable trials end at once.")
    bar = tqdm(total=most_steps, desc=name, unit="step", disable=None if shown else True, leave=False)
    best: list[tuple[float, float, int]] = []

    def told(trial: Trial, outcome: Outcome) -> None:
        bar.update(outcome.steps)
        if outcome.stable:
            best.append((outcome.loss, trial.learning_rate, trial.warmup_steps))
            loss, rate, warmup = min(best)
            bar.set_postfix_str(f"best so far: loss {loss:.3g} at {rate:.2g}, warmup {warmup}")

    try:
        yield told
    finally:
        bar.close()


def peak_rate(group: Mapping[str, Any]) -> float:
    """The learning rate that a parameter group is meant to have, wherever a scheduler has put it."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def own_rate(optimizer: Optimizer) -> float:
    """The learning rate that is not 0 of the first parameter group with one."""
    return _first(map(peak_rate, optimizer.param_groups))


def _first(rates: Iterable[float]) -> float:
    return next(filter(None, rates), 0.0)


def _scale(trial: Trial, own: float) -> float:
    """What a trial multiplies all learning rates by."""
    if not own:
        raise ValueError("all learning rates of the optimizer are 0: give it one, to which the others keep their ratio")
    return trial.learning_rate / own


class LoopTrials:
    """Trials of a training in plain torch.

    Args:
        make: Given a seed, makes the model anew and returns its optimizer and a function that computes the loss of the
            next batch; and, if there are validation data, one that computes the loss on them.
    """

    def __init__(self, make: Callable[[int], tuple[Any, ...]]) -> None:
        self.make = make
        with isolate_rng():
            optimizer, *_ = self._start(0)
        self.learning_rate = own_rate(optimizer)

    def _start(self, seed: int) -> tuple[Any, ...]:
        seed_all(seed)
        return self.make(seed)

    def __call__(self, trial: Trial) -> Outcome:
        readings, val_loss = Readings(TrialRule(trial.steps)), None
        with isolate_rng():
            optimizer, next_loss, *validate = self._start(trial.seed)
            try:
                self._train(trial, optimizer, next_loss, readings)
            except Exception:
                if not readings.read():
                    raise
            if trial.validates and validate and not readings.read():
                with torch.no_grad():
                    val_loss = float(validate[0]())
        readings.read()
        return readings.rule.outcome(val_loss)

    def _train(self, trial: Trial, optimizer: Optimizer, next_loss: Callable[[], Tensor], readings: Readings) -> None:
        scale = _scale(trial, self.learning_rate)
        rates = [peak_rate(group) * scale for group in optimizer.param_groups]
        parameters = parameters_of(optimizer)
        for step in range(trial.steps):
            factor = trial.factor(step)
            set_rates(optimizer, rates, factor)
            optimizer.zero_grad()
            loss = next_loss()
            torch.autograd.backward(loss)
            norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if readings.add(loss.detach(), norm, _first(rates) * factor) and readings.read():
                return
            optimizer.step()


class ModuleTrials:
    """Trials of a LightningModule, each by a Trainer of its own on a copy.

    Seed 0 are the random numbers as they are: the order of the data and the noise that the run itself would have. The
    module, the loaders (generators, positions, workers), all random states, the environment and the run's folder are
    left as they are. Schedulers of the module do not move in a trial. Of callbacks only those in ``settings`` are in
    it, as copies.

    Args:
        make: Gives the module to train for a seed; a copy of it is trained.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: Likewise.
        settings: Of the Trainers; of a function what it returns.
        learning_rate: Of the first parameter group that has one; None to find out.
        val_dataloaders: As for ``Trainer.fit``.
        monitor: The validation loss, as it is logged; None for no validation.
        run: The trainer of the run whose length the module makes its schedules for; None for that of a trial.
    """

    def __init__(
        self,
        make: Callable[[int], pl.LightningModule],
        train_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        settings: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
        val_dataloaders: Any = None,
        monitor: str | None = None,
        run: pl.Trainer | None = None,
    ) -> None:
        self.run = run
        self.make, self.train_dataloaders, self.datamodule = make, train_dataloaders, datamodule
        self.settings = dict(settings or {})
        self.val_dataloaders, self.monitor = val_dataloaders, monitor
        self._own = learning_rate

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group that has one, by itself."""
        if self._own is None:
            self._fit(_Run(Trial(1.0, 0), self))
        assert self._own is not None  # known since fit has started
        return self._own

    def __call__(self, trial: Trial) -> Outcome:
        run = _Run(trial, self)
        try:
            self._fit(run)
        except Exception:
            if not run.is_broken:
                raise
        return run.outcome()

    def _fit(self, run: "_Run") -> None:
        seed, settings = run.trial.seed, {"max_steps": run.trial.steps or SOME, **self.settings}
        loaders = self.train_dataloaders, self.val_dataloaders if run.validates else None
        if run.validates:  # once, when the trial is over
            settings = {
                "limit_val_batches": 1.0,
                **settings,
                "check_val_every_n_epoch": None,
                "val_check_interval": FOREVER,
            }
        with isolate_rng(), same_loaders(seed, loaders, self.datamodule):
            if seed:
                seed_all(seed)
            module = copy_of(self.make(seed))
            if self.run is not None:
                configure_as_in(self.run, module)
                disable(module, *ENDS)
            train, val = tree_map(of_its_own, loaders)
            fit_quietly(
                module, {**settings, "callbacks": [run, *given_callbacks(settings)]}, train, val, self.datamodule
            )


class _Run(pl.Callback):
    """Gives a trial its learning rates, and judges and ends it.

    Args:
        trial: What to do.
        trials: What it is one of, and is told the learning rate that the module has by itself.
    """

    def __init__(self, trial: Trial, trials: ModuleTrials) -> None:
        self.trial, self.trials = trial, trials
        self.validates = trial.validates and trials.monitor is not None
        self.readings: list[Readings] = []  # of each optimizer
        self._rates: list[list[float]] = []
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._val_loss: float | None = None
        self._alone = True

    def outcome(self) -> Outcome:
        """Of the first optimizer whose training is not stable, or else of the first."""
        outcomes = [readings.rule.outcome(self._val_loss) for readings in self.readings]
        return next((outcome for outcome in outcomes if not outcome.stable), outcomes[0])

    @property
    def is_broken(self) -> bool:
        """Whether the training was unstable when it raised."""
        return self._alone and any(readings.read() for readings in self.readings)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass_over_unused(trainer, self)
        if self.trials.run is not None:
            show_datamodule(self.trials.run, trainer)
        if not self.validates:
            vars(self)["on_train_batch_end"] = None
        trainer.fit_loop.max_epochs = -1  # what the settings say is what schedules are made for
        trainer.fit_loop.epoch_loop.max_steps = self.trial.steps * len(trainer.optimizers)
        if self.trials._own is None:
            self.trials._own = own_rate(trainer.optimizers[0])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._alone = trainer.world_size == 1
        scale = _scale(self.trial, self.trials.learning_rate)
        for optimizer in trainer.optimizers:
            self.readings.append(Readings(TrialRule(self.trial.steps)))
            self._rates.append([peak_rate(group) * scale for group in optimizer.param_groups])
            self._steps.append(0)
        hold_schedules(trainer)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        index = index_of(trainer, optimizer)
        rates, factor = self._rates[index], self.trial.factor(self._steps[index])
        set_rates(optimizer, rates, factor)
        self._steps[index] += 1
        norm = gradient_norm(trainer, optimizer, self)
        if norm is None or not losses or trainer.should_stop:
            return
        readings, scaled = self.readings[index], scaler_of(trainer) is not None
        if readings.add(loss_of_update(trainer, losses), norm, _first(rates) * factor, scaled):
            self._read(trainer, readings)

    def _read(self, trainer: pl.Trainer, *readings: Readings) -> None:
        """Judge, alike on all ranks, and end the trial if it is not stable."""
        mean = None if self._alone else partial(mean_over_ranks, trainer)
        if any(each.read(mean) for each in readings):
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.validates and trainer.global_step >= trainer.max_steps:
            self._read(trainer, *self.readings)
            trainer.should_stop = True  # by which it is validated now

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics, monitor = trainer.callback_metrics, self.trials.monitor
        if monitor not in metrics:
            raise MisconfigurationException(
                f"the validation logs no {monitor!r}, but {', '.join(metrics) or 'nothing'}"
            )
        self._val_loss = float(metrics[monitor])

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(trainer, *self.readings)


def set_rates(optimizer: Optimizer, rates: list[float], factor: float) -> None:
    """Give each parameter group its learning rate, times a factor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * factor)
        else:
            group["lr"] = rate * factor


def hold_schedules(trainer: pl.Trainer) -> None:
    """Keep the schedules of a copy where they begin: they are made for another number of updates, and for metrics."""
    for config in trainer.lr_scheduler_configs:
        config.scheduler.step, config.strict = nothing, False  # type: ignore[method-assign]  # of a copy


def nothing(*_: object, **__: object) -> None:
    """In the place of what a copy is not to do."""


def disable(copied: Any, *hooks: str) -> None:
    """Have hooks of a copy do nothing."""
    for hook in hooks:
        setattr(copied, hook, nothing)


def show_datamodule(run: pl.Trainer, trainer: pl.Trainer) -> None:
    """Give the trainer of a copy the datamodule of the run, which steps may ask; its hooks are for the run alone."""
    own: Any = trainer  # connectors set some attributes
    own.datamodule = copy.copy(run.datamodule)  # type: ignore[attr-defined]  # likewise
    if own.datamodule is not None:
        disable(own.datamodule, "teardown", "on_exception")


def copy_of(module: Any) -> Any:
    """A copy of a module, and not compiled: the functions that compile its steps are of the original."""
    copied = copy.deepcopy(module)
    for name, function in (copied._compiler_ctx or {}).items():
        if name.startswith("original_"):
            setattr(copied, name.removeprefix("original_"), function)
    copied._compiler_ctx = None
    return copied


def configure_as_in(trainer: pl.Trainer, module: Any) -> None:
    """Have a copy of the module make optimizers and schedules for a run, whose trainer knows how long it will be."""
    configure = module.configure_optimizers

    def configure_as_in_the_run() -> Any:
        own, module._trainer = module._trainer, trainer
        try:
            with end_as_asked(trainer):
                return configure()
        finally:
            module._trainer = own

    module.configure_optimizers = configure_as_in_the_run


def fit_quietly(
    module: pl.LightningModule,
    settings: Mapping[str, Any],
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
) -> None:
    """Train by a Trainer of its own that shows, logs and keeps nothing; the environment is left as it is.

    What the module writes into the folder of its logger, or of its checkpoints, is gone with it.

    Args:
        module: A copy: it is trained.
        settings: Of the Trainer; of a function what it returns.
        train_dataloaders: As for ``Trainer.fit``.
        val_dataloaders: Likewise; it validates only if ``settings`` say so.
        datamodule: Likewise.
    """
    core = next(each.__module__ for each in type(module).__mro__ if each.__module__.endswith(".core.module"))
    package = importlib.import_module(core.removesuffix(".core.module"))  # or pytorch_lightning, another class tree
    pass_over_hooks_of(module, package.LightningModule)
    with quiet(), same_environment(), unmade_folder() as folder:
        asked = {
            "max_epochs": -1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": FolderLogger(folder),
            "log_every_n_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "profiler": Unprofiled(),
            **{name: value() if callable(value) else value for name, value in settings.items()},
        }
        if asked.setdefault("enable_checkpointing", True):
            checkpoints = package.callbacks.ModelCheckpoint(folder, save_top_k=0)
            vars(checkpoints).update(dict.fromkeys(OF_EVERY_BATCH))  # hooks that are not called
            asked["callbacks"] = [*asked.get("callbacks", []), checkpoints]
        trainer = package.Trainer(**asked)
        trainer.fit(module, train_dataloaders, val_dataloaders, datamodule=copy.copy(datamodule))


class FolderLogger(DummyLogger):
    """Logs nothing, but has a folder, made when somebody asks for it.

    Args:
        folder: Its path.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    @property
    @override
    def save_dir(self) -> str:
        with suppress(OSError):
            os.makedirs(self._folder, exist_ok=True)
        return self._folder

    @property
    @override
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @override
    def root_dir(self) -> str:
        return self.save_dir


@contextmanager
def unmade_folder() -> Iterator[str]:
    """A folder for what a Trainer may leave, made by whoever writes there, so that no disk has to have room for it."""
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError:  # a container without a place to write to
        parent = os.devnull
    folder = os.path.join(parent, f"lightning_recipes-{uuid.uuid4().hex}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def given_callbacks(settings: Mapping[str, Any]) -> list[pl.Callback]:
    """Copies of the callbacks among the settings of a Trainer."""
    given = settings.get("callbacks") or []
    return copy.deepcopy(given if isinstance(given, list) else [given])


def settings_of(trainer: pl.Trainer) -> dict[str, Any]:
    """How a Trainer of a trial trains as this one does."""
    run: Any = trainer  # connectors set some attributes
    return {
        "strategy": lambda: _like(trainer.strategy),
        "accelerator": trainer.strategy.root_device.type,
        "devices": trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "limit_train_batches": run.limit_train_batches,
        "use_distributed_sampler": False,  # the loaders have it
    }


def _like(strategy: Any) -> Any:
    """A strategy on the same devices, and processes, with a model of its own."""
    own = copy.copy(strategy)
    for name in [name for name in vars(own) if inspect.isfunction(getattr(type(own), name, None))]:
        delattr(own, name)  # the run's own, that somebody has put in a method's place
    own._precision_plugin = copy.deepcopy(strategy._precision_plugin)
    own._model = own._lightning_module = own._launcher = own._accelerator = None
    own._optimizers, own._lightning_optimizers, own.lr_scheduler_configs = [], [], []
    own._forward_redirection = copy.copy(strategy._forward_redirection)
    own._configure_launcher = lambda: None  # the processes are there
    return own


def seed_all(seed: int) -> None:
    """Seed all random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, without noting for each kind of device who has asked, which takes longer than a small step
        torch.default_generator.manual_seed(seed)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes that a Trainer makes of itself, and without warnings."""
    with without_notes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def without_notes() -> Iterator[None]:
    """Without the notes that a Trainer makes of itself; costs nothing within another one, and else a millisecond."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [(logger, logger.level) for logger in loggers if logger.level != logging.ERROR]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


@contextmanager
def same_environment() -> Iterator[None]:
    """Put back what a strategy takes away when it is done; by what it adds the next one knows that ranks are there."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.update(before)


def of_its_own(loader: Any) -> Any:
    """A loader with the same data and order, but workers of its own."""
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    own._iterator = None
    return own


@contextmanager
def same_loaders(seed: int, loaders: Any, datamodule: Any) -> Iterator[None]:
    """Seed generators (but for seed 0), and leave them, loaders, and what they read as they are."""
    leaves = [*tree_leaves(loaders), datamodule]
    stateful = [each for each in leaves if _keeps_state(each)]
    places = [(each, copy.deepcopy(each.state_dict())) for each in stateful]
    try:
        with unchanged(leaves, data=True):
            for generator in [each for loader in leaves for each in _generators(loader)] if seed else ():
                generator.manual_seed(seed)
            yield
    finally:
        for each, place in places:
            each.load_state_dict(place)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    parts = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    parts.append(getattr(parts[2], "sampler", None))
    for part in parts:
        for value in getattr(part, "__dict__", {}).values():
            if isinstance(value, torch.Generator):
                yield value


def _keeps_state(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
