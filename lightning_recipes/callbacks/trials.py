"""Run the trials of a sweep with copies of a module, and leave no trace of them."""

import copy
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_recipes.callbacks.learning_rates import let_go, take_hold
from lightning_recipes.callbacks.measuring import gradient_norm, index_of, loss_of_update, scaler_of
from lightning_recipes.core.clipping import total_norm
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.schedules import LearningRates
from lightning_recipes.core.trials import Outcome, Search, Trial, TrialRule, load_outcomes, save_outcomes

FOREVER = 10**12  # updates: schedulers are held throughout a trial


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
    while wanted := search.ask(outcomes):
        trial = wanted[0]
        outcomes[trial] = train(trial)
        if path is not None:
            save_outcomes(path, outcomes)
        if told is not None:
            told(trial, outcomes[trial])
    return outcomes


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


class LoopTrials:
    """Trials of a training in plain torch.

    Args:
        make: Given a seed, makes the model anew and returns its optimizer and a function that computes the loss of the
            next batch.
    """

    def __init__(self, make: Callable[[int], tuple[Optimizer, Callable[[], Tensor]]]) -> None:
        self.make = make
        with isolate_rng():
            optimizer, _ = self._start(0)
        self.learning_rate = peak_rate(optimizer.param_groups[0])

    def _start(self, seed: int) -> tuple[Optimizer, Callable[[], Tensor]]:
        seed_all(seed)
        return self.make(seed)

    def __call__(self, trial: Trial) -> Outcome:
        with isolate_rng():
            optimizer, next_loss = self._start(trial.seed)
            rule, groups = TrialRule(trial.steps), optimizer.param_groups
            scale = trial.learning_rate / self.learning_rate
            rates = [peak_rate(group) * scale for group in groups]
            parameters = [parameter for group in groups for parameter in group["params"]]
            for step in range(trial.steps):
                factor = trial.factor(step)
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * factor
                optimizer.zero_grad()
                loss = next_loss()
                torch.autograd.backward(loss)
                norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
                if rule.update(float(loss.detach()), float(norm), rates[0] * factor):
                    break
                optimizer.step()
        return rule.outcome()


class ModuleTrials:
    """Trials of a LightningModule, each by a Trainer of its own on a copy.

    Seed 0 are the random numbers as they are: the order of the data and the noise that the run itself would have. The
    module, the loaders (generators, positions, workers), all random states, the environment and the run's folder are
    left as they are. Schedulers of the module do not move in a trial, and callbacks of the run are not in it.

    Args:
        make: Gives the module to train for a seed; a copy of it is trained.
        train_dataloaders: As for ``Trainer.fit``.
        datamodule: Likewise.
        settings: Of the Trainers; of a function what it returns.
        learning_rate: Of the first parameter group; None to find out.
    """

    def __init__(
        self,
        make: Callable[[int], pl.LightningModule],
        train_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        settings: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        self.make, self.train_dataloaders, self.datamodule = make, train_dataloaders, datamodule
        self.settings = dict(settings or {})
        self._own = learning_rate

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, by itself."""
        if self._own is None:
            self._fit(_Run(Trial(1.0, 0), self))
        assert self._own is not None  # known since fit has started
        return self._own

    def __call__(self, trial: Trial) -> Outcome:
        watch = _Run(trial, self)
        self._fit(watch)
        return watch.outcome()

    def _fit(self, watch: "_Run") -> None:
        seed = watch.trial.seed
        with ExitStack() as put_back:
            put_back.enter_context(isolate_rng())
            put_back.enter_context(quiet())
            put_back.enter_context(same_environment())
            put_back.enter_context(same_loaders(seed, self.train_dataloaders, self.datamodule))
            folder = put_back.enter_context(tempfile.TemporaryDirectory())
            if seed:
                seed_all(seed)
            module = copy.deepcopy(self.make(seed))
            settings = {name: value() if callable(value) else value for name, value in self.settings.items()}
            trainer = pl.Trainer(
                **{
                    "max_epochs": -1,
                    "limit_val_batches": 0,
                    "num_sanity_val_steps": 0,
                    "logger": DummyLogger(),
                    "log_every_n_steps": 0,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "default_root_dir": folder,
                    **settings,
                    "callbacks": [watch],
                }
            )
            loaders = tree_map(of_its_own, self.train_dataloaders)
            trainer.fit(module, loaders, datamodule=copy.copy(self.datamodule))


class _Run(pl.Callback):
    """Gives a trial its learning rates, and judges and ends it.

    Args:
        trial: What to do.
        trials: What it is one of, and is told the learning rate that the module has by itself.
    """

    def __init__(self, trial: Trial, trials: ModuleTrials) -> None:
        self.trial, self.trials = trial, trials
        self.rules: dict[int, TrialRule] = {}
        self.rates: PerOptimizer[LearningRates] = PerOptimizer(LearningRates)
        self._losses: list[Tensor] = []

    def outcome(self) -> Outcome:
        """Of the first optimizer whose training is not stable, or else of the first."""
        outcomes = [rule.outcome() for rule in self.rules.values()]
        return next((outcome for outcome in outcomes if not outcome.stable), outcomes[0])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.trial.steps * len(trainer.optimizers)
        if self.trials._own is None:
            self.trials._own = peak_rate(trainer.optimizers[0].param_groups[0])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        take_hold("a sweep", trainer, self.rates)
        for index, optimizer in enumerate(trainer.optimizers):
            self.rules[index] = TrialRule(self.trial.steps)
            scale = self.trial.learning_rate / self.trials.learning_rate
            rates = self.rates[index]
            rates.base = [peak_rate(group) * scale for group in optimizer.param_groups]
            rates.lay(self.trial.factor, added_steps=FOREVER)
            rates.start(optimizer)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        index = index_of(trainer, optimizer)
        rule = self.rules[index]
        norm = gradient_norm(trainer, optimizer, self)
        if norm is None or not losses or trainer.should_stop:
            return
        loss = loss_of_update(trainer, losses)
        if trainer.world_size > 1:
            both = torch.stack([loss.float(), norm.float()]).to(trainer.strategy.root_device)
            loss, norm = trainer.strategy.reduce(both, reduce_op="mean")  # alike on all ranks
        rate = optimizer.param_groups[0]["lr"]
        scaled = scaler_of(trainer) is not None
        if rule.update(float(loss), float(norm), rate if isinstance(rate, float) else 0.0, scaled):
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        let_go(trainer)


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
    torch.manual_seed(seed)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes that a Trainer makes of itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
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
    """Seed generators (but for seed 0), and leave them, and loaders that can say where they are, as they are."""
    generators = {id(each): each for loader in (*tree_leaves(loaders), datamodule) for each in _generators(loader)}
    drawn = [(generator, generator.get_state()) for generator in generators.values()]
    stateful = [each for each in (*tree_leaves(loaders), datamodule) if _keeps_state(each)]
    places = [(each, copy.deepcopy(each.state_dict())) for each in stateful]
    try:
        for generator, _ in drawn if seed else ():
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in drawn:
            generator.set_state(state)
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
