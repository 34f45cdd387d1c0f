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
def _sigint_as_it_was() -> Iterator[None]:
    """Lightning ignores SIGINT for good when a training was interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
