"""Files that are whole or not there, on a disk that may be full."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LONGEST_NAME = 255  # bytes


@contextlib.contextmanager
def replaced(path: str | Path, by: str = "part", sync: bool = False) -> Iterator[IO[bytes]]:
    """Give a file new contents, all at once: what is written into the file that this yields takes its place when the
    context ends; if that fails, whatever stood there stays, and nothing else is left. Makes the folder if need be.

    Args:
        path: Of the file.
        by: Part of the name of the file beside it. What a killed process has left there is overwritten by the next of
            this name; processes that may write to one path at a time need one each.
        sync: Whether to wait until the contents are on the disk, so that they survive a loss of power.

    Raises:
        OSError: If it cannot be written; also where ``torch.save`` hides that behind an error of its own.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "new", "numbers.txt")
        ...     with replaced(path) as file:
        ...         _ = file.write(b"1 2")
        ...     path.read_text(), [each.name for each in path.parent.iterdir()]
        ('1 2', ['numbers.txt'])
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{by}")
    if len(os.fsencode(beside.name)) > LONGEST_NAME:
        beside = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.{by}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error says more
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # else it has a text of its own
            error.filename = str(path)
        hidden = error.__context__
        if isinstance(error, RuntimeError) and isinstance(hidden, OSError):
            raise OSError(hidden.errno, hidden.strerror, str(path)) from error
        raise


def put(path: Path, text: str) -> None:
    """Give a text file new contents, all at once."""
    with replaced(path, by=str(os.getpid())) as file:
        file.write(text.encode(errors="replace"))


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file: a line of its own, even if a full disk or a kill has cut off the one before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            start = b"\n" if file.read(1) not in (b"", b"\n") else b""
            file.write(start + line.encode() + b"\n")
    except OSError as error:
        error.filename = str(path)
        raise
