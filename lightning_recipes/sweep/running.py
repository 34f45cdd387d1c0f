"""Who runs the trials of a sweep: this process, several processes or machines that share a storage, or Ray.

All run the same trials with the same results: what is planned depends on the outcomes so far alone, and a trial on
nothing but itself.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_recipes.callbacks.trials import LoopTrials, ModuleTrials, run_trials, seed_all
from lightning_recipes.callbacks.unchanged import isolate_rng
from lightning_recipes.core.trials import Outcome, Search, Trial

Loss = Callable[[], Tensor]
Make = Callable[[int], pl.LightningModule | tuple[Optimizer, Loss] | tuple[Optimizer, Loss, Callable[[], Any]]]


class Runner(Protocol):
    """Runs what a search asks for, until it asks no more."""

    def __call__(
        self,
        search: Search,
        train: Callable[[Trial], Outcome],
        path: str | Path | None,
        told: Callable[[Trial, Outcome], None],
    ) -> dict[Trial, Outcome]:
        """Return all outcomes.

        Args:
            search: Plans the trials.
            train: Runs one.
            path: A JSON file to keep the outcomes in, and to go on from; or None.
            told: To be called with every outcome.
        """


in_this_process: Runner = run_trials


def refuse_data(name: str, given: object) -> None:
    """Say of data at the place of another argument where they belong.

    Raises:
        TypeError: If it is a loader, a dataset or a data module.
    """
    if isinstance(given, DataLoader | Dataset | pl.LightningDataModule):
        raise TypeError(
            f"{name} comes here, got {type(given).__name__}: give data by name, as train_dataloaders=..."
            " or datamodule=..."
        )


def refuse_unknown(sweep: Callable[..., Any], settings: Iterable[str]) -> None:
    """Say of the settings of a Trainer that it has no such argument.

    Raises:
        TypeError: If one is an argument of neither ``sweep`` nor a Trainer.
    """
    known = [*inspect.signature(sweep).parameters, *inspect.signature(pl.Trainer).parameters]
    for name in settings:
        if name not in known:
            close = "".join(f": did you mean {each}?" for each in difflib.get_close_matches(name, known, 1))
            raise TypeError(f"{name} is an argument of neither {sweep.__name__} nor a Trainer{close}")


def trials_of(
    make: Any,
    train_dataloaders: Any,
    datamodule: Any,
    settings: dict[str, Any],
    val_dataloaders: Any = None,
    monitor: str | None = None,
) -> Any:
    """What runs the trials of what a person wants trained."""
    if val_dataloaders is not None and monitor is None:
        raise ValueError("val_dataloaders need a monitor, the name of the validation loss: give monitor='val_loss'")
    data = train_dataloaders, datamodule, settings, None, val_dataloaders, monitor
    if isinstance(make, pl.LightningModule):
        _check_validation(make, datamodule, val_dataloaders, monitor)
        return ModuleTrials(lambda _: make, *data)
    if not callable(make):
        raise TypeError(f"make must be a LightningModule or a function of a seed, got {make!r}")
    with isolate_rng():
        seed_all(0)
        made = make(0)
    if isinstance(made, pl.LightningModule):
        _check_validation(made, datamodule, val_dataloaders, monitor)
        return ModuleTrials(make, *data)
    functions = made[1:] if isinstance(made, tuple) else ()
    if not (len(functions) in (1, 2) and isinstance(made[0], Optimizer) and all(map(callable, functions))):
        raise TypeError(f"make(seed) must return a LightningModule, or an optimizer and a function, got {made!r}")
    if settings or any(each is not None for each in (train_dataloaders, datamodule, val_dataloaders, monitor)):
        raise TypeError("loaders, a datamodule, a monitor and settings of a Trainer are for a LightningModule")
    return LoopTrials(make)


def _check_validation(
    module: pl.LightningModule, datamodule: pl.LightningDataModule | None, val_dataloaders: Any, monitor: str | None
) -> None:
    """Refuse a ``monitor`` that nothing would log: without validation a sweep would judge by the training loss."""
    if monitor is None:
        return
    own = any(each is not None and is_overridden("val_dataloader", each) for each in (datamodule, module))
    if val_dataloaders is None and not own:
        raise ValueError(
            f"monitor={monitor!r} needs validation data: give val_dataloaders, or a datamodule with a val_dataloader;"
            " or monitor=None to judge by the training loss"
        )
    if not is_overridden("validation_step", module):
        raise ValueError(f"monitor={monitor!r} needs a validation_step, which {type(module).__name__} has not")
