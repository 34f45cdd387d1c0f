"""Everything that is known of a training on one page, while it goes on and when it is over."""

import inspect
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.measuring import index_of, read_at_once, read_if_free
from lightning_recipes.callbacks.substitute import substitute
from lightning_recipes.callbacks.telling import logger_step, run_folder, spared, time_to_log
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_real
from lightning_recipes.core.files import put
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.report import Record
from lightning_recipes.report.numbers import duration, shown, size
from lightning_recipes.report.page import PAGE, TEXT, render
from lightning_recipes.report.reading import FINDINGS, STATE, cut, note_left_out, plain, read_extras, read_findings
from lightning_recipes.report.run import STEP_LOSS, Run, finding_of

UNREAD = 1000  # values that wait on their device until they are read together
KEPT = 500  # findings of earlier parts of a run that a checkpoint has


class TrainingReport(pl.Callback):
    """Write one page of the training into the run's folder: how it went, what was found, what to do, all the curves.

    ``report.html`` needs nothing but itself (no network, no script) and reads well on a phone, in print, in light and
    dark, and with a screen reader; ``report.md`` says the same; ``report.json`` keeps what the page was made of, so
    that ``python -m lightning_recipes report RUN_DIR`` can make it anew, of a run that was killed, too.

    On it are a verdict in three lines; the findings of the other recipes, the most severe first; the loss of every
    step as mean and spread with the validation on the same axes; everything else that is logged, with or without a
    logger; the learning rates as applied; marks where something happened (skipped updates, rewinds, cuts and restarts
    of the learning rate, the best validation); the gradient norm with its threshold and histogram, update ratios, the
    members of an ensemble; hyper-parameters, callbacks, versions, devices and costs.

    It is written by rank zero when the training begins, when a validation ends, not more often than
    ``every_n_seconds``, and when the training ends, by an exception or Ctrl-C, too; with ``fast_dev_run``, or where
    nothing is left to train, not at all. The training is the same bit for bit. The page of a resumed run shows the
    parts before, which are in the checkpoint. Losses and metrics are those of rank zero unless the module reduces them.

    Cost: some 10 microseconds a step; what is logged is read back 1,000 values together, before a page and a save.
    Each series is kept in 256 bins at most, 20 kB of every checkpoint. Writing the page takes some tenths of a second.

    Logs nothing.

    Attributes:
        rule: The :class:`~lightning_recipes.core.report.Record` of everything that was logged.
        path: Of the page, or None before it is written.

    Args:
        every_n_seconds: Seconds from one page to the next while the training goes on, above 0.

    Raises:
        TypeError: If the argument is not a number.
        ValueError: If it is out of its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[TrainingReport()], logger=False)

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023, examining the training curves:
        https://github.com/google-research/tuning_playbook
        Okabe and Ito, Color universal design, 2008: https://jfly.uni-koeln.de/color/
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        self.every_n_seconds = check_real("every_n_seconds", every_n_seconds, 0, float("inf"))
        self._put_back: Callable[[], None] | None = None
        self._forget()

    def _forget(self) -> None:
        """Start anew."""
        self.rule = Record()
        self.path: Path | None = None
        self._folder: Path | None = None  # None where nothing is to be written
        self._from = 0  # where in the file of findings those of this run begin
        self._earlier: list[Finding] = []  # of the parts before
        self._resumed: list[int] = []
        self._seconds = 0.0  # of the parts before
        self._ended = "running"
        self._started: float | None = None  # while the training goes on
        self._written = 0.0
        self._began_at, self._before = 0, 0.0  # updates and seconds of the parts before
        self._unread: list[tuple[str, int, float | Tensor]] = []
        self._seen: dict[str, Any] = {}  # the newest value of each metric, old or new
        self._rates: set[str] = set()  # names of the learning rates
        self._late: int | None = None  # the step at which others may still log

    # ---------------------------------------------------------------------------------- fit: start and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        earlier = self._findings()
        if trainer.global_step == 0:
            self._forget()
            earlier = []
        self._ended, self._earlier = "running", earlier
        self._folder = run_folder(trainer)
        if self._folder is not None:
            self._from = 0
            with suppress(OSError):  # there are none yet
                self._from = (self._folder / FINDINGS).stat().st_size

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._folder is None:
            return
        self._finish()
        connector = trainer._logger_connector
        update = connector.update_train_epoch_metrics  # what on_train_epoch_end of the module logs is known only here

        def collect_and_update() -> None:
            self._collect(trainer, logger_step(trainer))
            update()

        self._put_back = substitute(connector, "update_train_epoch_metrics", collect_and_update)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._written = time.monotonic()
        self._began_at, self._before = _updates(trainer), self._seconds
        self._seen = dict(trainer.callback_metrics) if self._folder is not None else {}
        if self._began_at and self._folder is not None:
            self._resumed.append(self._began_at)
        self._write(trainer, pl_module)  # or a killed run would have the page of the one before it

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect_late(trainer)
        self._seconds, self._started = self._elapsed(), None
        reasons = [getattr(each, "stopping_reason_message", None) for each in trainer.early_stopping_callbacks]
        reason = next((f" ({each})" for each in reasons if each), "")
        self._ended = f"stopped early{reason}" if trainer.should_stop else "finished"

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._ended == "running":
            said = cut(str(exception).strip().split("\n")[0])
            how = "interrupted" if isinstance(exception, KeyboardInterrupt | SIGTERMException) else "failed"
            self._ended = f"{how} by {type(exception).__name__}" + (f": {said}" if said else "")
            self._write(trainer, pl_module)
        self._finish()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trained = self._ended != "running"  # else nothing was left to do
        if trainer.state.fn == TrainerFn.FITTING and self._folder is not None and trained:
            self._write(trainer, pl_module)
            if self.path is not None:
                rank_zero_info(f"Training report: {self.path}")
        self._finish()

    def _finish(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    # ---------------------------------------------------------------------------------- measure

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._collect_late(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._folder is None or not time_to_log(trainer):
            return
        name = _optimizer_name(trainer, optimizer)
        for index, group in enumerate(optimizer.param_groups):
            rate = group["lr"]
            part = group.get("name", "" if len(optimizer.param_groups) == 1 else f"pg{index + 1}")
            label = f"{name}/{part}" if part else name
            self._rates.add(label)
            self._take(label, logger_step(trainer), rate.detach().clone() if isinstance(rate, Tensor) else rate)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._folder is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            share = trainer.accumulate_grad_batches  # by which Lightning has divided it
            value = read_if_free(loss)
            self._take(STEP_LOSS, logger_step(trainer), value if share == 1 else value * share)
        if time_to_log(trainer) and not trainer.fit_loop._should_accumulate():
            self._late = logger_step(trainer)
            self._collect(trainer, self._late)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._folder is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._collect(trainer, logger_step(trainer))
        if time.monotonic() - self._written >= self.every_n_seconds:
            self._write(trainer, pl_module)

    def _collect_late(self, trainer: pl.Trainer) -> None:
        """Take what callbacks behind this one have logged at the step before."""
        if self._late is not None:
            late, self._late = self._late, None
            self._collect(trainer, late)

    def _collect(self, trainer: pl.Trainer, step: int) -> None:
        """Take the metrics that are new; Lightning keeps the old ones for ever."""
        if self._folder is None:
            return
        metrics = dict(trainer.callback_metrics)
        for name, value in metrics.items():
            forked = any(_is_same(value, metrics.get(f"{name}_{part}")) for part in ("step", "epoch"))
            own = name in self._rates  # LearningRateMonitor has it, too
            if isinstance(value, Tensor) and not _is_same(value, self._seen.get(name)) and not forked and not own:
                self._take(name, step, value)
        self._seen = metrics

    def _take(self, name: str, step: int, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            value = read_if_free(value)
        self._unread.append((name, step, value))
        if len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        """Remember what waits on its device, read at once."""
        unread, self._unread = self._unread, []
        for (name, step, _), value in zip(unread, read_at_once([value for *_, value in unread]), strict=True):
            self.rule.update(name, step, value)

    # ---------------------------------------------------------------------------------- tell

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page; a training is worth more than its report, so no error ends it."""
        if self._folder is None:
            return
        try:
            run = self._run(trainer, pl_module)
            state = {**run.as_dict(), "findings": [each.as_dict() for each in self._earlier]}
            html, markdown = render(run, time.strftime("%Y-%m-%d %H:%M"))
            kept = json.dumps({**state, "findings_from": self._from}, default=str)
            for name, text in ((STATE, kept), (TEXT, markdown), (PAGE, html)):
                path = self._folder / name
                with spared(trainer, path):
                    put(path, text)
                    self.path = path if name == PAGE else self.path
        except Exception as error:
            rank_zero_warn(f"{type(self).__name__} could not write its page: {type(error).__name__}: {error}")
        self._written = time.monotonic()

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Run:
        assert self._folder is not None  # seen to by who asks
        self._read()
        run = Run(
            name="/".join(self._folder.resolve().parts[-2:]),
            ended=self._ended,
            series=dict(self.rule.series),
            findings=self._findings(),
            steps=_updates(trainer),
            resumed=self._resumed,
            hyperparameters=_hyperparameters(trainer, pl_module),
            callbacks=_callbacks(trainer),
            setup=_setup(trainer),
            costs=self._costs(trainer),
        )
        note_left_out(self.rule, run.notes)
        read_extras(self._folder, run)
        return run

    def _findings(self) -> list[Finding]:
        """Of the parts before, and what all recipes have told since."""
        if self._folder is None:
            return list(self._earlier)
        with suppress(OSError):
            return [*self._earlier, *read_findings(self._folder / FINDINGS, self._from)]
        return list(self._earlier)

    def _elapsed(self) -> float:
        """Seconds of training, those of the parts before included."""
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def _costs(self, trainer: pl.Trainer) -> dict[str, str]:
        costs = {"wall time": duration(self._elapsed())}
        updates, seconds = _updates(trainer) - self._began_at, self._elapsed() - self._before
        if updates and seconds:
            costs["updates per second, validation included"] = shown(updates / seconds)
        if trainer.strategy.root_device.type == "cuda":
            costs["peak memory of the device"] = size(torch.cuda.max_memory_allocated(trainer.strategy.root_device))
        if sys.platform != "win32":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            costs["peak memory of the process"] = size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        return costs

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {
            "rule": self.rule.state_dict(),
            "findings": [finding.as_dict() for finding in self._findings()[-KEPT:]],
            "resumed": list(self._resumed),
            "seconds": self._elapsed(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self._earlier = [finding_of(each) for each in state_dict["findings"]]
        self._resumed, self._seconds = list(state_dict["resumed"]), state_dict["seconds"]


def _updates(trainer: pl.Trainer) -> int:
    """How many were made; Lightning counts that of a batch behind its hooks and its validation."""
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    uncounted = trainer.validating or batches.processed > batches.completed
    return logger_step(trainer) + (uncounted and not loop._should_accumulate())


def _is_same(value: Tensor, seen: Any) -> bool:
    """Whether a metric is one that has been seen; Lightning gives another view of it each time."""
    return isinstance(seen, Tensor) and value.data_ptr() == seen.data_ptr()


def _optimizer_name(trainer: pl.Trainer, optimizer: Optimizer) -> str:
    """As LearningRateMonitor calls it."""
    index, kind = index_of(trainer, optimizer), type(optimizer).__name__
    before = sum(type(each).__name__ == kind for each in trainer.optimizers[:index])
    return f"lr-{kind}-{before}" if before else f"lr-{kind}"


def _hyperparameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
    datamodule: Any = getattr(trainer, "datamodule", None)
    values = {**getattr(datamodule, "hparams", {}), **pl_module.hparams}
    run: Any = trainer  # connectors set some attributes
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
    asked = {name: getattr(run, name, None) for name in names}
    optimizers = {
        f"optimizer {index}" if index else "optimizer": _optimizer(each) for index, each in enumerate(run.optimizers)
    }
    trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
    return {
        **plain(values),
        **{f"Trainer.{name}": str(value) for name, value in asked.items() if value not in (None, -1)},
        **optimizers,
        "parameters trained": f"{trained:,}",
    }


def _optimizer(optimizer: Optimizer) -> str:
    changed = {
        name: value
        for name, value in optimizer.defaults.items()
        if isinstance(value, int | float | tuple) and value is not False
    }
    return f"{type(optimizer).__name__}({', '.join(f'{name}={value}' for name, value in changed.items())})"


def _callbacks(trainer: pl.Trainer) -> dict[str, str]:
    callbacks: list[Any] = list(getattr(trainer, "callbacks", ()))
    made: dict[str, str] = {}
    for callback in callbacks:
        name, number = type(callback).__name__, 1
        while f"{name} {number}".removesuffix(" 1") in made:
            number += 1
        made[f"{name} {number}".removesuffix(" 1")] = _arguments(callback) or "with its defaults"
    return made


def _arguments(callback: Any) -> str:
    """The arguments that differ from the defaults, as far as its rule or the callback has attributes of their names."""
    holders = [each for each in (getattr(callback, "rule", None), callback) if hasattr(each, "__dict__")]
    given = []
    for name, parameter in inspect.signature(type(callback).__init__).parameters.items():
        held = [getattr(each, own) for each in holders for own in (name, f"_{name}") if own in vars(each)]
        if held and not callable(held[0]) and str(held[0]) != str(parameter.default):
            given.append(f"{name}={cut(repr(held[0]) if isinstance(held[0], str) else str(held[0]))}")
    return ", ".join(given)


def _setup(trainer: pl.Trainer) -> dict[str, str]:
    strategy, device = trainer.strategy, trainer.strategy.root_device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
    }
    with suppress(metadata.PackageNotFoundError):  # used from its sources
        versions["lightning-recipes"] = metadata.version("lightning-recipes")
    return {
        **versions,
        "system": platform.platform(terse=True),
        "device": f"{trainer.world_size} x {on}",
        "strategy": type(strategy).__name__,
        "precision": str(trainer.precision),
    }
