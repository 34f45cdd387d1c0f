import errno
import hashlib
import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_recipes.core.files import append_line, put, replaced


@pytest.fixture
def _room_for_100_bytes() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_new_contents_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    put(path, "old")
    with replaced(path) as file:
        file.write(b"n\xc3\xa9w")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "n\u00e9w"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.usefixtures("_room_for_100_bytes")
@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_a_full_disk_leaves_the_old_file_and_says_why(size: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(OSError, match="File too large"), replaced(path) as file:
        torch.save(torch.ones(size), file)  # hides it behind a RuntimeError of its own
    with pytest.raises(OSError, match="File too large"):
        put(path, "x" * size * 101)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "x"):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="own"), replaced(tmp_path / "x"):
        raise RuntimeError("its own")
    assert not [*tmp_path.iterdir()]


def test_it_is_on_the_disk_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "x", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with replaced(path, sync=True) as file:
        file.write(b"x")
    with replaced(path) as file:
        file.write(b"x")
    assert synced == [False]


def test_a_line_that_was_cut_off_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines"
    append_line(path, "1")
    with path.open("a") as file:
        file.write("cut o")
    append_line(path, "2")
    append_line(path, "3")
    assert path.read_text() == "1\ncut o\n2\n3\n"


@pytest.mark.usefixtures("_room_for_100_bytes")
def test_lines_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, json.dumps("a" * 40))
    for _ in range(2):
        with pytest.raises(OSError, match="File too large"):
            append_line(path, json.dumps("b" * 80))
    assert json.loads(path.read_text().splitlines()[0]) == "a" * 40


@pytest.mark.parametrize(("length", "beside"), [(249, ".{name}.part"), (250, ".{digest}.part")])
def test_a_long_name_has_a_short_one_beside_it(length: int, beside: str, tmp_path: Path) -> None:
    name = "x" * length
    digest = hashlib.sha256(name.encode()).hexdigest()
    with replaced(str(tmp_path / name)) as file:
        assert [each.name for each in tmp_path.iterdir()] == [beside.format(name=name, digest=digest)]
        file.write(b"x")
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_the_file_beside_has_the_name_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / ".weights.rank0").write_bytes(b"left by a process that was killed")
    with replaced(tmp_path / "weights", by="rank0") as file:
        assert (tmp_path / ".weights.rank0").read_bytes() == b""
        file.write(b"x")
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


def fail_as_torch_does() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("unexpected pos") from None


def test_a_folder_that_cannot_be_made_is_told_by_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x"
    for write in (put, append_line):
        with pytest.raises(OSError, match=re.escape(f"'{path}'")):
            write(path, "text")
    path = tmp_path / "x"
    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{path}'")), replaced(path):
        fail_as_torch_does()
    words = OSError("the cloud has words of its own")
    with pytest.raises(OSError, match="^the cloud has words of its own$"), replaced(path):
        raise words
    assert words.filename is None


def test_what_no_file_can_have_is_written_as_a_question_mark(tmp_path: Path) -> None:
    put(tmp_path / "x", "a\udc80b")
    assert (tmp_path / "x").read_text() == "a?b"


def test_folders_are_made_as_deep_as_need_be(tmp_path: Path) -> None:
    put(tmp_path / "a" / "b" / "x", "1")
    append_line(tmp_path / "c" / "d" / "x", "1")
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert (tmp_path / "c" / "d" / "x").read_text() == "1\n"


def test_each_process_has_a_file_beside_of_its_own(tmp_path: Path) -> None:
    (tmp_path / f".x.{os.getpid()}").mkdir()
    with pytest.raises(IsADirectoryError):
        put(tmp_path / "x", "text")
    assert not (tmp_path / "x").exists()
