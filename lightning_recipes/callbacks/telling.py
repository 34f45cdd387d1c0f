"""Tell the person: scalars and figures to the loggers, findings to everyone who may look, the same one once a fit.

Nothing here is a collective: what one rank has to say must not wait for the others. Rank zero speaks.
"""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from lightning_recipes.callbacks.outlets import Bin, Files, Outlet, outlet_of
from lightning_recipes.core.files import append_line
from lightning_recipes.core.findings import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WITHOUT = "the training goes on without it"
NO_FIGURES = Finding(
    rule="no figures",
    severity="info",
    message="Figures are not drawn: matplotlib is not installed.",
    advice="pip install 'lightning-recipes[plots]'",
    step=0,
)
# What was said in a fit, which has optimizers of its own, and the finding of it if it was one.
# An optimizer may be used again, by another trainer.
_told: WeakKeyDictionary[Optimizer, tuple[ReferenceType[pl.Trainer], dict[str, Finding | None]]] = WeakKeyDictionary()


def logger_step(trainer: pl.Trainer) -> int:
    """The x-axis of everything that Lightning logs: batches that ended in an update."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def time_to_log(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the update that is under way."""
    run: Any = trainer  # connectors set some attributes
    every: int = run.log_every_n_steps
    return every > 0 and (logger_step(trainer) + 1) % every == 0


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float | Tensor]) -> None:
    """Hand scalars to every logger at the step that Lightning's own metrics have, and to ``callback_metrics``.

    Not ``LightningModule.log``, which costs half a millisecond a key at every step whether it is logged or not.
    """
    values = {name: float(value) for name, value in scalars.items()}
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=logger_step(trainer))


def tell(trainer: pl.Trainer, finding: Finding) -> None:
    """Warn of a finding (or just say it), append it to ``findings.jsonl`` in the run's folder, log it as text.

    Not if the same but for the step was told in this fit before, by whatever callback.
    """
    if _is_new(trainer, _said(finding), finding):
        (rank_zero_info if finding.severity == "info" else _warn)(finding.text)
        _write(trainer, finding)


@rank_zero_only
def _warn(text: str) -> None:
    """Warn each time: what was warned of in one fit Python would not show in the next one of a notebook."""
    warnings.warn_explicit(text, UserWarning, "lightning_recipes", 1, module=__name__, registry={})


def note(trainer: pl.Trainer, finding: Finding) -> None:
    """Append a finding to ``findings.jsonl`` and log it as text, without a warning; likewise."""
    if _is_new(trainer, _said(finding), finding):
        _write(trainer, finding)


@contextmanager
def spared(trainer: pl.Trainer, path: Path, instead: str = WITHOUT) -> Iterator[None]:
    """Within the context a file that cannot be written, on a full or read-only disk, costs the training no more than
    the file; that is told, once a fit.

    Args:
        trainer: Of the training.
        path: Of the file, where the error does not say it.
        instead: What happens without it.
    """
    try:
        yield
    except OSError as error:
        _warn_once(trainer, f"{error.filename or path} could not be written ({error.strerror or error}): {instead}.")


def _warn_once(trainer: pl.Trainer, text: str) -> None:
    if _is_new(trainer, text):
        _warn(text)


def _said(finding: Finding) -> str:
    return repr(replace(finding, step=0))


def _is_new(trainer: pl.Trainer, said: str, finding: Finding | None = None) -> bool:
    if not trainer.optimizers:
        return True
    before = _findings(trainer)
    is_new = said not in before
    before[said] = finding
    return is_new


def _findings(trainer: pl.Trainer) -> dict[str, Finding | None]:
    optimizer = trainer.optimizers[0]
    if optimizer not in _told or _told[optimizer][0]() is not trainer:
        _told[optimizer] = ref(trainer), {}
    return _told[optimizer][1]


def told(trainer: pl.Trainer) -> list[Finding]:
    """The findings of the trainer's last fit, whichever callbacks they are of."""
    said = _findings(trainer) if trainer.optimizers else {}
    return [finding for finding in said.values() if finding is not None]


def _write(trainer: pl.Trainer, finding: Finding) -> None:
    def append(folder: Path) -> None:
        append_line(folder / "findings.jsonl", json.dumps(finding.as_dict(), allow_nan=False))

    name, text = f"findings/{finding.rule}", f"{finding.message} **{finding.advice}**"
    _publish(trainer, lambda outlet: outlet.text(name, text, finding.step), append, "findings are told, and not kept")


def show(trainer: pl.Trainer, name: str, draw: "Callable[[], Figure]") -> None:
    """Draw a figure for every logger; ``<name>.png`` in the run's folder is for those that show no figures.

    Where matplotlib is not installed, that is told.
    """
    if not trainer.loggers or not _may_write(trainer):
        return
    if importlib.util.find_spec("matplotlib") is None:
        tell(trainer, NO_FIGURES)
        return
    with spared(trainer, Path(name)):  # matplotlib itself wants to write when it is first used
        figure, step = draw(), logger_step(trainer)
        _publish(trainer, lambda outlet: outlet.figure(name, figure, step))


def log_histogram(trainer: pl.Trainer, name: str, bins: Sequence[Bin]) -> None:
    """Hand a histogram to every logger; ``<name>.csv`` in the run's folder is for those that show no histograms."""
    if bins and trainer.loggers:
        _publish(trainer, lambda outlet: outlet.histogram(name, bins, logger_step(trainer)))


def log_text(trainer: pl.Trainer, name: str, text: str) -> None:
    """Write Markdown into ``<name>.md`` in the run's folder, and hand it to the loggers that show texts."""

    def put(outlet: Outlet) -> None:
        outlet.text(name, text, logger_step(trainer))

    _publish(trainer, put, lambda folder: put(Files(folder)))


def _publish(
    trainer: pl.Trainer,
    put: Callable[[Outlet], None],
    write: Callable[[Path], None] | None = None,
    instead: str = WITHOUT,
) -> None:
    """Put it into every logger, and write it; without ``write`` there are files for the loggers that do not show it.

    A training is worth more than what is told of it: an error of a logger, or of the disk, is a warning.
    """
    if not _may_write(trainer):
        return
    shown = [_is_shown(trainer, logger, put) for logger in trainer.loggers]
    folder = run_folder(trainer)
    if folder is None or (write is None and all(shown)):
        return
    with spared(trainer, folder, instead):
        if write is None:
            put(Files(folder))
        else:
            write(folder)


def _is_shown(trainer: pl.Trainer, logger: Any, put: Callable[[Outlet], None]) -> bool:
    try:
        outlet = outlet_of(logger)
        if outlet is not None:
            put(outlet)
    except Exception as error:  # whatever a logger, its client and its server may raise
        _warn_once(trainer, f"{type(logger).__name__} did not take all: {type(error).__name__}: {error}")
        return False
    return outlet is not None


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of the run, which need not be there yet, on rank zero; None where it is remote or nothing is to be
    left behind.

    That of the first logger, in which Lightning has the folder of checkpoints; ``default_root_dir`` without a logger.
    """
    run: Any = trainer  # connectors set some attributes
    logger: Any = trainer.logger
    folder: str | None = getattr(logger, "log_dir", None)
    if folder is None:
        folder = getattr(logger, "save_dir", None) or run.default_root_dir
        if logger is not None:  # of W&B or MLflow: many runs in a folder
            version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
            folder = os.path.join(folder, *(str(part) for part in (logger.name, version) if part is not None))
    if not _may_write(trainer) or "://" in folder:
        return None
    return Path(folder)


def _may_write(trainer: pl.Trainer) -> bool:
    """Whether this rank leaves something behind, in this kind of run."""
    run: Any = trainer  # connectors set some attributes
    return trainer.is_global_zero and not run.fast_dev_run and not run.barebones
