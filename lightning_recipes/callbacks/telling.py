"""Tell the person: scalars and figures to the loggers, findings to everyone who may look, the same one once a fit.

Nothing here is a collective: what one rank has to say must not wait for the others. Rank zero speaks.
"""

import importlib.util
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_recipes.core.files import append_line, replaced
from lightning_recipes.core.findings import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NO_FIGURES = Finding(
    rule="no figures",
    severity="info",
    message="Figures are not drawn: matplotlib is not installed.",
    advice="pip install 'lightning-recipes[plots]'",
    step=0,
)
_told: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()  # in a fit, which has optimizers of its own


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
    if _is_new(trainer, _said(finding)):
        (rank_zero_info if finding.severity == "info" else rank_zero_warn)(finding.text)
        _write(trainer, finding)


def note(trainer: pl.Trainer, finding: Finding) -> None:
    """Append a finding to ``findings.jsonl`` and log it as text, without a warning; likewise."""
    if _is_new(trainer, _said(finding)):
        _write(trainer, finding)


@contextmanager
def spared(trainer: pl.Trainer, path: Path, instead: str = "the training goes on without it") -> Iterator[None]:
    """Within the context a file that cannot be written, on a full or read-only disk, costs the training no more than
    the file; that is told, once a fit.

    Args:
        trainer: Of the training.
        path: Of the file.
        instead: What happens without it.
    """
    try:
        yield
    except OSError as error:
        said = f"{path} could not be written ({error.strerror or error}): {instead}."
        if _is_new(trainer, said):
            rank_zero_warn(said)


def _said(finding: Finding) -> str:
    return repr(replace(finding, step=0))


def _is_new(trainer: pl.Trainer, said: str) -> bool:
    told = _told.setdefault(trainer.optimizers[0], set()) if trainer.optimizers else set()
    is_new = said not in told
    told.add(said)
    return is_new


def _write(trainer: pl.Trainer, finding: Finding) -> None:
    folder = run_folder(trainer)
    if folder is None:
        return
    path = folder / "findings.jsonl"
    with spared(trainer, path, "findings are told, and not kept"):
        append_line(path, json.dumps(finding.as_dict(), allow_nan=False))
    for experiment in _experiments(trainer, "add_text"):
        experiment.add_text(f"findings/{finding.rule}", f"{finding.message} **{finding.advice}**", finding.step)


def show(trainer: pl.Trainer, name: str, draw: "Callable[[], Figure]") -> None:
    """Draw a figure for the loggers that show figures; if none does, write ``<name>.png`` beside the logs.

    Where matplotlib is not installed, that is told.
    """
    folder = run_folder(trainer)
    if folder is None or not trainer.loggers:
        return
    if importlib.util.find_spec("matplotlib") is None:
        tell(trainer, NO_FIGURES)
        return
    experiments, path = _experiments(trainer, "add_figure"), folder / f"{name.replace('/', '_')}.png"
    with spared(trainer, path):  # matplotlib itself wants to write when it is first used
        figure = draw()
        for experiment in experiments:
            experiment.add_figure(name, figure, logger_step(trainer))
        if not experiments:
            save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, all at once."""
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=120)


def log_histogram(trainer: pl.Trainer, name: str, bins: Sequence[tuple[float, float, int]]) -> None:
    """Hand a histogram, bins of ``(lower edge, upper edge, count)``, to the loggers that show histograms."""
    if not trainer.is_global_zero or not bins:
        return
    middles = [(low + high) / 2 for low, high, _ in bins]
    counts = [count for _, _, count in bins]
    for experiment in _experiments(trainer, "add_histogram_raw"):
        experiment.add_histogram_raw(
            name,
            min=bins[0][0],
            max=bins[-1][1],
            num=sum(counts),
            sum=sum(map(operator.mul, middles, counts)),
            sum_squares=sum(middle**2 * count for middle, count in zip(middles, counts, strict=True)),
            bucket_limits=[high for _, high, _ in bins],
            bucket_counts=counts,
            global_step=logger_step(trainer),
        )


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of the run, which need not be there yet, on rank zero; None where it is remote or nothing is to be
    left behind.

    That of ``Trainer.log_dir``, which asks all ranks.
    """
    run: Any = trainer  # connectors set some attributes
    logger: Any = trainer.logger
    folder: str = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or run.default_root_dir
    if not trainer.is_global_zero or run.fast_dev_run or run.barebones or "://" in folder:
        return None
    return Path(folder)


def _experiments(trainer: pl.Trainer, method: str) -> list[Any]:
    """The loggers' own objects that have a method, TensorBoard's writer above all."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if callable(getattr(experiment, method, None))]
