"""Run a function on several gloo ranks, each a fork of this process; a process, to be killed or waited for."""

import gc
import io
import itertools
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What ranks import as they train: here once, and not in each of them.
import torch.distributed.algorithms.ddp_comm_hooks
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.experimental
import torch.profiler._cupti_monitor

TIMEOUT = 120  # seconds until a rank that hangs fails the test
ROOM = 100_000  # values on the stack of frames

_tried = itertools.count()


def run_on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Return what ``function(*args)`` returns on each rank; an error on one of them is raised here."""
    port, guard = _reserved()
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        environment = {
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(_forked(_report, sender, environment, function, args))
        sender.close()
        pipes.append(receiver)
    outcomes = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} said nothing for {TIMEOUT} s; those before it: {outcomes}")
            try:
                outcomes.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
            except EOFError:
                outcomes.append((False, "without a word"))
    finally:
        for process in processes:
            process.kill() if len(outcomes) < ranks else process.join(TIMEOUT)
        guard.close()
    failed = [f"rank {rank} died: {outcome}" for rank, (succeeded, outcome) in enumerate(outcomes) if not succeeded]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [outcome for _, outcome in outcomes]


def _forked(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """A fork that runs ``function(*args)``; its garbage collector leaves alone what was there, which it would copy."""
    process = multiprocessing.get_context("fork").Process(target=_with_room, args=(function, *args), daemon=True)
    gc.freeze()
    process.start()
    gc.unfreeze()
    return process


def _with_room(function: Callable[..., Any], *args: Any) -> None:
    function(*args)


# Python has its frames in pieces of 16 kB. Where a loop calls across the end of one, the next is taken from the system
# and given back at each call, which was a third of what some ranks cost; behind a frame that is large there is room.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=ROOM)


def _reserved() -> tuple[int, socket.socket]:
    """A port, and what holds the next one and so keeps the tests of other workers from both.

    No connection is given it in the meantime, as those from 32,768 on are.
    """
    while True:
        port = 10_000 + 2 * ((97 * os.getpid() + next(_tried)) % 10_000)
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", port + 1))
            with socket.socket() as free:
                free.bind(("127.0.0.1", port))
            return port, guard
        except OSError:
            guard.close()


def _report(sender: Any, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    outcome = io.BytesIO()
    try:
        torch.save((True, function(*args)), outcome)
    except BaseException:
        torch.save((False, traceback.format_exc()), outcome)
    sender.send_bytes(outcome.getvalue())
    os._exit(0)  # nothing that belongs to the parent is to be cleaned up here


def output_of(function: Callable[[], Any], arguments: list[str], folder: Path) -> str:
    """What a script would print, run in a fork, which has imported already what takes longer than most of them."""

    def run() -> None:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = arguments
        warnings.resetwarnings()  # the tests make errors of them
        warnings.simplefilter("ignore")
        function()
        sys.stdout.flush()

    process = _forked(run)
    process.join(5 * TIMEOUT)
    printed = (folder / "output").read_text()
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.exitcode}: {printed}")
    return printed


def run_until_killed(function: Callable[..., Any], *args: Any) -> int:
    """Run ``function(*args)`` in a fork that is expected to kill itself; return its exit code."""
    process = _forked(function, *args)
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still alive after {TIMEOUT} s")
    return process.exitcode
