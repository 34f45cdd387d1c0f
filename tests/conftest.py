"""One thread, no chatter, no files outside the test's own folder."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401  # sets its loggers up, which the next lines turn down
import pytest
import torch

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    torch.manual_seed(0)
    torch.set_printoptions(precision=17, threshold=10**6)  # so that states may be compared as they print
    yield
    torch.set_printoptions(profile="default")
    for key in os.environ.keys() - environment.keys():
        del os.environ[key]
    os.environ.update(environment)


@pytest.fixture(autouse=True)
def _own_sigint() -> Iterator[None]:
    """Python's, also in a shell's background; Lightning ignores the signal for good when a training was interrupted."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
