"""Checkpoint files that are whole or not there, and are looked at before they are used."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_recipes.core.files import replaced

LEGACY = b"\x80"  # a pickle, as torch wrote before 1.6: has no checksums


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint whole or not at all, verify it when it is loaded, and fall back to the last good one.

    A Trainer writes to the folder for temporary files and moves the file from there: where that is another file system,
    a kill or a full disk in the middle leaves a torn file under the final name, in place of the good one that had it.
    This writes ``.<name>.part`` beside the target, syncs it to the disk, and puts it in place with one atomic rename:
    at any moment the name has the old file or the new one, whole. A folder of that name makes room when the new file
    is written.

    A flipped bit loads without a word otherwise. Here the checksums of all records are compared first; a file that is
    damaged is passed over with a warning, and the newest good ``*.ckpt`` of its folder that is not newer takes its
    place: of those that a training can go on from, or else of those with weights alone. Costs one more reading of the
    file, and one sync for each save.

    Remote paths (``s3://``...) and checkpoints in shards, which are folders, are left to Lightning. One training at a
    time may write to a name. What torch saved elsewhere under ``set_crc32_options(False)`` counts as damaged.

    Raises:
        OSError: On saving, if the file cannot be written; the one that had the name is still there. On loading, if the
            file is damaged and there is no good one before it.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(plugins=[AtomicCheckpointIO()], logger=False)

    References:
        Pillai et al., All File Systems Are Not Created Equal: On the Complexity of Crafting Crash-Consistent
        Applications, 2014: https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = _local(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replaced(target, sync=True) as file, _checksums():
            torch.save(checkpoint, file)
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
        _sync_folder(target.parent)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        target = _local(path)
        damage = damage_of(target) if target is not None and target.is_file() else None
        if target is not None and damage is not None:
            path = _last_good(target, damage)
            rank_zero_warn(f"{target} {damage}: {path} is loaded in its place")
        return super().load_checkpoint(path, *args, **kwargs)


def damage_of(path: Path) -> str | None:
    """What is wrong with a file that torch has saved, None if nothing is; a format without checksums passes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "torn.ckpt")
        ...     torch.save({"step": 1}, file)
        ...     before = damage_of(file)
        ...     _ = file.write_bytes(file.read_bytes()[:500])
        ...     before, damage_of(file)
        (None, 'is torn')
    """
    with path.open("rb") as file:
        start = file.read(1)
    if start == LEGACY:
        return None
    if not start:
        return "is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError):
        return "is torn"
    return None if record is None else f"is damaged (the checksum of {record} is wrong)"


def _last_good(target: Path, damage: str) -> Path:
    written = target.stat().st_mtime_ns
    others = [each for each in target.parent.glob("*.ckpt") if each.is_file() and not each.samefile(target)]
    others = [each for each in others if each.stat().st_mtime_ns <= written]
    for other in sorted(others, key=lambda each: (_resumes(each), each.stat().st_mtime_ns), reverse=True):
        if damage_of(other) is None:
            return other
    raise OSError(f"{target} {damage}, and there is no good checkpoint in its folder that is not newer")


def _resumes(path: Path) -> bool:
    """Whether a training can go on from it: without ``save_weights_only``, as far as its names say."""
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return any(b"optimizer_states" in archive.read(name) for name in archive.namelist() if "data.pkl" in name)
    return False


def _local(path: str | Path) -> Path | None:
    """The path on a file system of this machine."""
    files, local = url_to_fs(str(path))
    return Path(local) if isinstance(files, LocalFileSystem) else None


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """Have torch write them, whatever was set."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a loss of power, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
