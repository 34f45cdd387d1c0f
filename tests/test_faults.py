"""A disk that is full, read-only, or another one than that of temporary files costs a training no more than the file.

Each recipe, and all together, trains twice in one folder: on a sound disk and on one that is not. Both end with the
same weights bit for bit; what could not be written is said once; and every file there is whole.
"""

import json
import os
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from matrix import ALL, ARGUMENTS, RECIPES
from models import Regression, quiet_trainer, regression_data, same, weights_of
from ranks import run_on_ranks

import lightning_recipes
from lightning_recipes.callbacks.telling import spared
from lightning_recipes.core.files import put
from lightning_recipes.core.schedules import ReduceOnPlateau

pytest.importorskip("matplotlib.figure")  # looks for fonts once, not on a full disk
BATCHES, EPOCHS = 12, 3
WRITES: dict[str, dict[str, Any]] = {  # with these they leave all files that they can
    "LearningRateSchedule": {"schedule": ReduceOnPlateau("val_loss", patience=1, gamma=0.5)},
    "SnapshotEnsemble": {"cycles": 2, "storage": "files"},
    "TrainingReport": {"every_n_seconds": 1e-9},
    "WarmupSweep": {"base_learning_rate": 0.02, "max_steps": 100, "seeds": 1},
}
REASONS = "File too large|Permission denied|Operation not permitted|Not a directory|Read-only file system"


class Nowhere(DummyLogger):
    """A logger that keeps nothing, of a run that has a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    @property
    def save_dir(self) -> str:
        return self.folder


# ------------------------------------------------------------------------------ disks


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def temporary_files_in(folder: str) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


READ_ONLY = Path("/sys/kernel")  # to root, too
NO_FOLDER = Path(os.devnull) / "run"
DISKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "full": lambda: room_for(0),
    "full after 100 bytes": lambda: room_for(100),
    "full after 10 kB": lambda: room_for(10_000),
    "read-only": nullcontext,
    "no folder": nullcontext,
    "temporary files on another one": lambda: temporary_files_in("/dev/shm"),
    "no temporary files": lambda: temporary_files_in(str(NO_FOLDER)),
}
PLACES = {"read-only": READ_ONLY, "no folder": NO_FOLDER}
SAMPLE = ("full after 100 bytes", "read-only", "no temporary files")
SOUND = ("temporary files on another one", "no temporary files")  # for all that is to stay


# ------------------------------------------------------------------------------ runs


def make(name: str) -> Any:
    return getattr(lightning_recipes, name)(**WRITES.get(name, ARGUMENTS.get(name, {})))


def train(recipes: list[pl.Callback], folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Train; return what it ends with, and what it has said."""
    torch.manual_seed(7)
    trainer = quiet_trainer(
        folder,
        max_epochs=EPOCHS,
        callbacks=recipes,
        log_every_n_steps=4,
        logger=Nowhere(folder),
        num_sanity_val_steps=0,
    )
    module = Regression(dropout=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, regression_data(BATCHES), regression_data(2))
    assert trainer.global_step == BATCHES * EPOCHS
    return weights_of(module), [str(each.message) for each in said]


def is_whole(path: Path) -> bool:
    content = path.read_bytes()
    if path.suffix == ".pt":
        return bool(torch.load(path, weights_only=True))
    if path.suffix in (".json", ".yaml"):
        return bool(yaml.safe_load(content))
    if path.suffix == ".jsonl":
        return all(json.loads(line) for line in content.splitlines())
    return content.endswith({".png": b"IEND\xaeB`\x82", ".html": b"</html>", ".md": b"\n", ".csv": b"\n"}[path.suffix])


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """The folder that recipes leave on a sound disk, and the weights that they train."""

    @cache
    def trained(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("sound")
        weights, said = train(attached(name), folder)
        assert not [each for each in said if "could not" in each]
        return folder, weights

    return trained


def attached(name: str) -> list[pl.Callback]:
    return [make(each) for each in (RECIPES if name == ALL else [name])]


def check(recipes: list[pl.Callback], disk: str, before: Path, expected: dict[str, torch.Tensor], folder: Path) -> None:
    shutil.copytree(before, folder)
    files = files_in(folder)
    for path in files:
        os.utime(path, (0, 0))
    with DISKS[disk]():
        trained, said = train(recipes, PLACES.get(disk, folder))
    assert same(trained, expected), "the training is another one"
    assert files_in(folder) == files, "something is left behind"
    for path in files:
        lost = [each for each in said if f"{path.relative_to(folder)} could not be written" in each]
        written = disk not in PLACES and path.stat().st_mtime > 0
        assert len(lost) <= 1, "said again and again"
        assert lost or written, "lost without a word"
        assert not (lost and disk in SOUND)
        assert all(
            re.search(f"^{PLACES.get(disk, folder)}.* could not be written .({REASONS}).: ", each) for each in lost
        )
        assert (path.suffix == ".jsonl" and lost) or is_whole(path), f"half a {path.name}"


CELLS = [
    pytest.param(name, disk, marks=[] if name == ALL and disk in SAMPLE else [pytest.mark.everything])
    for name in (*RECIPES, ALL)
    for disk in DISKS
]


@pytest.mark.parametrize(("name", "disk"), CELLS)
def test_a_training_survives(name: str, disk: str, sound: Any, tmp_path: Path) -> None:
    check(attached(name), disk, *sound(name), tmp_path / "run")


# ------------------------------------------------------------------------------ the check can fail


class Writes(pl.Callback):
    """A recipe that writes when the training ends, as ``put`` does."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(str(trainer.log_dir), "told.md")
        for _ in range(2):
            with spared(trainer, path):
                self.write(trainer, pl_module, path)

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        put(path, TEXT)


class Careless(Writes):
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        try:
            put(path, TEXT)
        except OSError as error:
            raise RuntimeError("lost") from error


class InPlace(Writes):
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        path.write_text(TEXT)


class Silent(Writes):
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        with suppress(OSError):
            put(path, TEXT)


class Repeats(Writes):
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        try:
            put(path, TEXT)
        except OSError:
            warnings.warn(f"{path} could not be written (File too large): again.", stacklevel=2)


class LeavesParts(Writes):
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        try:
            put(path, TEXT)
        except OSError:
            path.with_suffix(".part").touch()
            raise


class TrainsOtherwise(Writes):
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        try:
            put(path, TEXT)
        except OSError:
            pl_module.net[0].bias.data.zero_()
            raise


TEXT = "All is well.\n" * 100


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Writes, None),
        (Careless, "lost"),
        (InPlace, "half a told.md"),
        (Silent, "lost without a word"),
        (Repeats, "said again and again"),
        (LeavesParts, "something is left behind"),
        (TrainsOtherwise, "the training is another one"),
    ],
)
def test_a_recipe_that_is_not_careful_is_found_out(broken: type[Writes], said: str | None, tmp_path: Path) -> None:
    weights, _ = train([Writes()], tmp_path / "sound")
    fails: Any = nullcontext() if said is None else pytest.raises((AssertionError, RuntimeError), match=said)
    with fails:
        check([broken()], "full after 100 bytes", tmp_path / "sound", weights, tmp_path / "run")


# ------------------------------------------------------------------------------ several ranks


def suffer(folder: Path, recipes: list[str], disk: str) -> list[Any]:
    torch.manual_seed(7)
    with DISKS[disk](), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = quiet_trainer(
            PLACES.get(disk, folder),
            max_epochs=EPOCHS,
            callbacks=[make(name) for name in recipes],
            log_every_n_steps=4,
            logger=Nowhere(PLACES.get(disk, folder)),
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
            devices=2,
        )
        module = Regression(dropout=0.1)
        trainer.fit(module, regression_data(2 * BATCHES), regression_data(2))
    return [weights_of(module), sum("could not be written" in str(each.message) for each in said)]


@pytest.mark.parametrize(
    ("name", "disk"),
    [
        ("SnapshotEnsemble", "full after 100 bytes"),
        pytest.param("SnapshotEnsemble", "no folder", marks=pytest.mark.everything),
        pytest.param(ALL, "full after 100 bytes", marks=pytest.mark.everything),
        pytest.param(ALL, "no folder", marks=pytest.mark.everything),
    ],
)
def test_ranks_stay_together_and_one_of_them_speaks(name: str, disk: str, tmp_path: Path) -> None:
    recipes = [each for each in RECIPES if name in (each, ALL)]
    (tmp_path / "sound").mkdir()
    sound = run_on_ranks(suffer, tmp_path / "sound", recipes, "temporary files on another one")
    first, second = run_on_ranks(suffer, tmp_path / "run", recipes, disk)
    assert same(first[0], second[0])
    assert same(first[0], sound[0][0])
    assert (sound[0][1], second[1]) == (0, 0)
    assert first[1] > 1
