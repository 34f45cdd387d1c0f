"""A checkpoint is whole or not there, whatever happens while it is written, and a damaged one is never used."""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from models import Regression, quiet_trainer, regression_data, same, weights_of
from ranks import run_until_killed

from lightning_recipes import AtomicCheckpointIO
from lightning_recipes.checkpointing import damage_of


def checkpoint(step: int, size: int = 100_000) -> dict[str, Any]:
    """Whose content tells its step everywhere."""
    return {"step": step, "weights": torch.full((size,), float(step))}


def is_whole(loaded: dict[str, Any]) -> bool:
    return bool((loaded["weights"] == loaded["step"]).all())


def saved(folder: Path, *steps: int) -> list[Path]:
    """Files of these steps, each a second younger than the one before."""
    paths = [folder / f"step={step}.ckpt" for step in steps]
    for number, (step, path) in enumerate(zip(steps, paths, strict=True)):
        AtomicCheckpointIO().save_checkpoint(checkpoint(step), path)
        os.utime(path, (1000 + number, 1000 + number))
    return paths


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    rewrite(path, bytes(content))


def rewrite(path: Path, content: bytes) -> None:
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "cut": lambda path: rewrite(path, path.read_bytes()[:-2000]),
    "the first half": lambda path: rewrite(path, path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: rewrite(path, b""),
    "zeros": lambda path: rewrite(path, bytes(path.stat().st_size)),
    "a block of zeros": lambda path: rewrite(path, path.read_bytes()[:4096] + bytes(4096) + path.read_bytes()[8192:]),
}


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    (path,) = saved(tmp_path / "new" / "folder", 3)
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert loaded["step"] == 3
    assert is_whole(loaded)
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_passed_over_for_the_last_good_one(damage: str, tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2, 3, 4, 5)
    DAMAGES[damage](paths[3])
    flip(paths[2])
    with pytest.warns(UserWarning, match=r"step=4.ckpt is (torn|empty|damaged).*step=2.ckpt is loaded in its place"):
        loaded = AtomicCheckpointIO().load_checkpoint(paths[3])
    assert loaded["step"] == 2  # not 5, which is newer than what was asked for
    assert is_whole(loaded)


def test_a_damaged_file_with_no_good_one_before_it_is_an_error(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2)
    flip(paths[0])
    with pytest.raises(OSError, match=r"step=1.ckpt is damaged \(the checksum of .* is wrong\), and there is no good"):
        AtomicCheckpointIO().load_checkpoint(paths[0])


def test_one_that_a_training_can_go_on_from_comes_before_one_with_weights_alone(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2, 3)
    AtomicCheckpointIO().save_checkpoint({**checkpoint(1), "optimizer_states": []}, paths[0])
    os.utime(paths[0], (1000, 1000))
    flip(paths[2])
    with pytest.warns(UserWarning, match=r"step=1\.ckpt is loaded in its place"):
        assert AtomicCheckpointIO().load_checkpoint(paths[2])["step"] == 1
    flip(paths[0])
    with pytest.warns(UserWarning, match=r"step=2\.ckpt is loaded in its place"):
        assert AtomicCheckpointIO().load_checkpoint(paths[2])["step"] == 2


@pytest.mark.parametrize("name", ["last.ckpt", "x" * 250 + ".ckpt"])
def test_it_saves_where_lightnings_own_does(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir()
    (path / "shard").touch()
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(checkpoint(step), path)
        assert AtomicCheckpointIO().load_checkpoint(path)["step"] == step
    assert list(tmp_path.iterdir()) == [path]


def test_lightnings_own_loads_a_flipped_bit(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    flip(path)
    assert not is_whole(TorchCheckpointIO().load_checkpoint(path))


def test_missing_and_legacy_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not found"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
    torch.save(checkpoint(1), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert damage_of(tmp_path / "old.ckpt") is None
    assert is_whole(AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt"))


def test_checksums_are_written_whatever_is_set(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        (path,) = saved(tmp_path, 1)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert damage_of(path) is None


def test_storage_options_are_refused_as_lightning_does(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})


def test_a_remote_path_is_left_to_lightning() -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(2), "memory://folder/x.ckpt")
    assert is_whole(AtomicCheckpointIO().load_checkpoint("memory://folder/x.ckpt"))


# ------------------------------------------------------------------------------ while it is written


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file(full_disk: Callable[[int], None], tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    full_disk(path.stat().st_size // 2)
    with pytest.raises(OSError, match="File too large"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    assert [*tmp_path.iterdir()] == [path]
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 1


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "x.ckpt")


def test_an_interrupt_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    class Interrupts:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    (path,) = saved(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"first": torch.ones(1000), "then": Interrupts()}, path)
    assert [*tmp_path.iterdir()] == [path]
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 1


def save_for_ever(io: Any, path: Path) -> None:
    for step in range(10**6):
        io.save_checkpoint(checkpoint(step, 1_000_000), path)


def torn(io: Any, folder: Path, storms: int) -> int:
    """How often a file was not whole, or gone, after a kill at a random moment."""
    path, draws, found = folder / "last.ckpt", random.Random(0), 0
    io.save_checkpoint(checkpoint(1), path)
    for _ in range(storms):

        def until_killed(moment: float = draws.uniform(0.01, 0.08)) -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, moment)
            save_for_ever(io, path)

        assert run_until_killed(until_killed) == -signal.SIGALRM
        try:
            found += damage_of(path) is not None or not is_whole(torch.load(path, weights_only=True))
        except (OSError, RuntimeError, EOFError):
            found += 1
    return found


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    assert torn(AtomicCheckpointIO(), tmp_path, 25) == 0


def test_the_kills_are_seen_by_one_that_writes_in_place(tmp_path: Path) -> None:
    class InPlace(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            torch.save(checkpoint, path)

    assert torn(InPlace(), tmp_path, 25) > 0


# ------------------------------------------------------------------------------ in a Trainer


def fit(folder: Path, max_epochs: int, **kwargs: Any) -> pl.Trainer:
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, save_last=True, filename="{epoch}")
    trainer = quiet_trainer(
        folder, max_epochs=max_epochs, callbacks=[checkpoints], plugins=[AtomicCheckpointIO()], deterministic=True
    )
    trainer.fit(Regression(), regression_data(), **kwargs)
    return trainer


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_goes_on_from_the_last_good_checkpoint_and_ends_where_it_would_have(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "cut", 3)
    now = time.time()
    for number, name in enumerate(["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]):
        os.utime(tmp_path / "cut" / name, (now + number, now + number))
    for name in ("last.ckpt", "epoch=2.ckpt"):
        flip(tmp_path / "cut" / name)
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged .*epoch=1.ckpt is loaded in its place"):
        resumed = fit(tmp_path / "cut", 4, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert same(weights_of(resumed.lightning_module), weights_of(whole.lightning_module))


def test_it_is_asked_for_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    arguments = [
        "--seed_everything=1",
        "--trainer.accelerator=cpu",
        "--trainer.plugins+=lightning_recipes.AtomicCheckpointIO",
    ]
    command = LightningCLI(Regression, run=False, args=arguments, save_config_callback=None)
    assert isinstance(command.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
