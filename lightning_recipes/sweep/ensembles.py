"""Ensembles of networks that were trained independently."""

import copy
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_recipes.callbacks.ensembling import HeldOut, Split, held_out, judge, pair, with_state
from lightning_recipes.callbacks.trials import ModuleTrials, fit_quietly, nothing, of_its_own, same_loaders, seed_all
from lightning_recipes.callbacks.unchanged import isolate_rng
from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.ensembles import Combination, Ensemble
from lightning_recipes.core.files import replaced
from lightning_recipes.core.selection import Report
from lightning_recipes.core.soups import Soup, greedy_soup
from lightning_recipes.core.trials import Outcome, Trial, load_outcomes, save_outcomes
from lightning_recipes.sweep.running import Runner, in_this_process, refuse_unknown

LAST = 50  # losses whose mean is the training loss in the end
FILE = "ensemble.json"
NOT_WEIGHING = ("validation_step", "configure_optimizers", "configure_callbacks", "on_fit_start", "on_fit_end")


@dataclass(frozen=True)
class JudgedEnsemble:
    """An ensemble and what it is worth.

    Attributes:
        ensemble: One module.
        report: On the held-out data.
        soup: The average of the weights, if it was asked for: one network, for members that were fine-tuned from the
            same weights.
    """

    ensemble: Ensemble
    report: Report
    soup: Soup | None = None


def ensemble_from_checkpoints(
    paths: Sequence[str | Path],
    module: nn.Module,
    val_dataloaders: Iterable[Any],
    weighting: str = "auto",
    combine: str | Combination = "auto",
    split_batch: Split | None = None,
    soup: bool = False,
) -> JudgedEnsemble:
    """Weigh trained networks of one architecture on held-out data, and let those that help predict together.

    Args:
        paths: Of checkpoints of Lightning, or files with a state dict, at least one.
        module: Of their architecture, with any weights, on the device where it is to run. It is called with the inputs
            of a batch; a LightningModule needs a ``forward``.
        val_dataloaders: Batches that no network was trained on, in the same order each time: a loader that does not
            shuffle. They are gone through twice, and with ``soup`` about twice more for each network.
        weighting: ``"auto"``, ``"best"``, ``"uniform"``, ``"greedy"`` or ``"simplex"``; see
            :func:`~lightning_recipes.core.selection.select`.
        combine: ``"auto"`` (by the targets), ``"logits"``, ``"binary logits"``, ``"mean"`` or a function; see
            :class:`~lightning_recipes.core.ensembles.Ensemble`.
        split_batch: Makes inputs and targets of a batch; None where a batch is such a pair.
        soup: Whether to average weights, too.

    Raises:
        TypeError: If a batch is no pair and nothing was given that makes one.
        ValueError: If there is no path, or a state does not fit the module, or a file holds objects of classes that
            torch does not load before they are allowed.

    References:
        Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles, 2017:
        https://arxiv.org/abs/1612.01474
        Wortsman et al., Model soups, 2022: https://arxiv.org/abs/2203.05482
    """
    if not paths:
        raise ValueError("an ensemble needs at least one checkpoint, got none")
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))

    def batches() -> Iterator[Any]:
        for batch in val_dataloaders:
            yield move_data_to_device(batch, device)

    data = HeldOut(batches, split_batch or pair, probabilities=combine == "mean")
    return _weigh(paths, module, data, weighting, combine, soup)


def _weigh(
    paths: Sequence[str | Path],
    module: nn.Module,
    data: HeldOut,
    weighting: str,
    combine: str | Combination,
    soup: bool = False,
) -> JudgedEnsemble:
    states = [_state(path) for path in paths]
    members = []
    for path, state in zip(paths, states, strict=True):
        try:
            members.append(with_state(module, state))
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit {type(module).__name__}: {error}") from None

    def losses_of(state: Mapping[str, Tensor]) -> Tensor:
        network = with_state(module, state)
        return data.evidence(lambda inputs: network(inputs)[None]).losses()[0]

    with isolate_rng():
        ensemble, report = judge(members, data, weighting, combine, _names(paths))
        return JudgedEnsemble(ensemble, report, greedy_soup(losses_of, states) if soup else None)


def train_ensemble(
    make: Callable[[int], pl.LightningModule],
    folder: str | Path,
    seeds: int = 5,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    weighting: str = "auto",
    combine: str | Combination = "auto",
    split_batch: Split | None = None,
    runner: Runner = in_this_process,
    show_progress: bool = True,
    **trainer_settings: Any,
) -> JudgedEnsemble:
    """Train a network for each seed, from its own start and in its own order of the data, and weigh them.

    What was trained is in the folder, ``seed_0.pt`` and so on: when the call is repeated, it goes on with what is
    missing. The networks are weighed on the CPU in single precision, on all validation data, as a Trainer would give
    them: with the batch hooks of the data module or the module.

    Args:
        make: Makes the module for a seed.
        folder: For the weights and the logs of each run; where several processes or machines train, one that all see.
        seeds: How many networks, at least 1.
        train_dataloaders: As for ``Trainer.fit``.
        val_dataloaders: Likewise, on which the networks are weighed: one loader or several that do not shuffle.
        datamodule: In the place of both.
        weighting: As for :func:`ensemble_from_checkpoints`.
        combine: Likewise.
        split_batch: Likewise.
        runner: Who trains: see :mod:`lightning_recipes.sweep.running`.
        show_progress: Show how many are done, where the output is a terminal.
        trainer_settings: Arguments of the Trainers: ``max_epochs``, ``callbacks`` (each run has copies)...

    Raises:
        TypeError: If a batch is no pair and nothing was given that makes one, or a Trainer does not have an argument.
        ValueError: If ``seeds`` is out of its range, or there is no validation data.
        FileNotFoundError: If weights are gone that the runner knows to be trained.
    """
    check_count("seeds", seeds, 1)
    refuse_unknown(train_ensemble, trainer_settings)
    if val_dataloaders is None and datamodule is None:
        raise ValueError("networks are weighed on validation data: give val_dataloaders or a datamodule")
    folder = Path(folder)
    train = _WholeRuns(make, folder, train_dataloaders, val_dataloaders, datamodule, trainer_settings)
    train.forget_lost()
    search = _Seeds(seeds, train.learning_rate)
    with tqdm(total=seeds, desc="ensemble", unit="run", disable=None if show_progress else True, leave=False) as bar:
        runner(search, train, folder / FILE, lambda *_: bar.update() and None)
    paths = [train.path(seed) for seed in range(seeds)]
    lost = [str(path) for path in paths if not path.exists()]
    if lost:
        raise FileNotFoundError(
            f"{', '.join(lost)}: trained, but gone; put them back, or give the runner another study"
        )
    with isolate_rng():
        return train.weigh(lambda module, data: _weigh(paths, module, data, weighting, combine), split_batch, combine)


@dataclass(frozen=True)
class _Seeds:
    """Plans one whole run for each seed."""

    seeds: int
    learning_rate: float

    def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
        planned = [Trial(self.learning_rate, 1, seed=seed) for seed in range(self.seeds)]
        return [trial for trial in planned if trial not in outcomes]


class _WholeRuns:
    """Trains for a seed with the Trainer that is asked for, and leaves the weights in a file."""

    def __init__(
        self,
        make: Callable[[int], pl.LightningModule],
        folder: Path,
        train_dataloaders: Any,
        val_dataloaders: Any,
        datamodule: pl.LightningDataModule | None,
        settings: dict[str, Any],
    ) -> None:
        self.make, self.folder, self.datamodule = make, folder, datamodule
        self.loaders, self.settings = (train_dataloaders, val_dataloaders), settings
        alone = {name: value for name, value in settings.items() if name not in ("callbacks", "logger")}
        self.learning_rate = ModuleTrials(make, train_dataloaders, datamodule, alone).learning_rate

    def path(self, seed: int) -> Path:
        """Where the weights of a run are."""
        return self.folder / f"seed_{seed}.pt"

    def forget_lost(self) -> None:
        """Have those runs trained again whose weights are gone."""
        outcomes = load_outcomes(self.folder / FILE)
        there = {trial: outcome for trial, outcome in outcomes.items() if self.path(trial.seed).exists()}
        if len(there) < len(outcomes):
            save_outcomes(self.folder / FILE, there)

    def weigh(
        self,
        judge: Callable[[pl.LightningModule, HeldOut], JudgedEnsemble],
        split_batch: Split | None,
        combine: str | Combination,
    ) -> JudgedEnsemble:
        """Judge on the validation data that a Trainer gives."""
        module = self.make(0)
        host: Any = copy.deepcopy(module)
        for hook in NOT_WEIGHING:
            setattr(host, hook, nothing)
        judging = _Judging(lambda data: judge(module, data), split_batch or pair, combine == "mean")
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "limit_train_batches": 0,
            "limit_val_batches": 1.0,
            "callbacks": [judging],
        }
        train, val = tree_map(of_its_own, self.loaders)
        with same_loaders(0, self.loaders, self.datamodule):
            fit_quietly(host, settings, train, val, self.datamodule)
        return judging.judged

    def __call__(self, trial: Trial) -> Outcome:
        losses = _Losses()
        with isolate_rng(), same_loaders(trial.seed, self.loaders, self.datamodule):
            seed_all(trial.seed)
            module = self.make(trial.seed)
            settings = {"default_root_dir": self.folder / f"seed_{trial.seed}", **self.settings}
            callbacks = copy.deepcopy(settings.pop("callbacks", None) or [])
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            trainer = pl.Trainer(**settings, callbacks=[*callbacks, losses])
            train, val = tree_map(of_its_own, self.loaders)
            trainer.fit(module, train, val, datamodule=copy.copy(self.datamodule))
        if trainer.is_global_zero:
            self._save(module, self.path(trial.seed))
        trainer.strategy.barrier()
        finite = math.isfinite(losses.mean) and all(bool(tensor.isfinite().all()) for tensor in module.parameters())
        return Outcome(
            stable=finite,
            loss=losses.mean if finite else math.nan,
            steps=trainer.global_step,
            reason="" if finite else "the weights or the training loss are no numbers",
        )

    def _save(self, module: nn.Module, path: Path) -> None:
        state = module.state_dict()
        with replaced(path) as file:
            torch.save({name: each.cpu() if isinstance(each, Tensor) else each for name, each in state.items()}, file)


class _Judging(pl.Callback):
    """Judges before anything is trained."""

    judged: JudgedEnsemble

    def __init__(self, judge: Callable[[HeldOut], JudgedEnsemble], split: Split, probabilities: bool) -> None:
        self.judge, self.split, self.probabilities = judge, split, probabilities

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = held_out(trainer, pl_module, self.split, self.probabilities)
        if data is None:
            raise ValueError("networks are weighed on validation data: the datamodule has none")
        self.judged = self.judge(data)


class _Losses(pl.Callback):
    """The last training losses."""

    def __init__(self) -> None:
        self.last: deque[Tensor] = deque(maxlen=LAST)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            self.last.append(outputs["loss"].detach())

    @property
    def mean(self) -> float:
        return float(torch.stack([*self.last]).mean()) if self.last else math.nan


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Of the files; where two have the same, with as much of their folders as differs."""
    names = [Path(path).stem for path in paths]
    if len(set(names)) == len(names):
        return names
    whole = [Path(path).absolute() for path in paths]
    common = os.path.commonpath([path.parent for path in whole])
    return [path.relative_to(common).as_posix() for path in whole]


def _state(path: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        classes = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        raise ValueError(
            f"{path} has more in it than tensors and plain values ({classes}), of hyper-parameters perhaps: if you"
            f" trust it, call this within `with torch.serialization.safe_globals([{classes}]):`"
        ) from error
    return cast("Mapping[str, Tensor]", saved.get("state_dict", saved))
