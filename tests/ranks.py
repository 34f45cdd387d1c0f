"""Run a function on several gloo ranks, each a fork of this process; a process, to be killed or waited for."""

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT = 120  # seconds until a rank that hangs fails the test


def run_on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Return what ``function(*args)`` returns on each rank; an error on one of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = context.Process(target=_report, args=(sender, environment, function, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    outcomes = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} said nothing for {TIMEOUT} s")
            try:
                outcomes.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
            except EOFError:
                outcomes.append((False, "without a word"))
    finally:
        for process in processes:
            process.kill() if len(outcomes) < ranks else process.join(TIMEOUT)
    failed = [f"rank {rank} died: {outcome}" for rank, (succeeded, outcome) in enumerate(outcomes) if not succeeded]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [outcome for _, outcome in outcomes]


def _report(sender: Any, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    outcome = io.BytesIO()
    try:
        torch.save((True, function(*args)), outcome)
    except BaseException:
        torch.save((False, traceback.format_exc()), outcome)
    sender.send_bytes(outcome.getvalue())
    os._exit(0)  # nothing that belongs to the parent is to be cleaned up here


def run_until_killed(function: Callable[..., Any], *args: Any) -> int:
    """Run ``function(*args)`` in a fork that is expected to kill itself; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still alive after {TIMEOUT} s")
    return process.exitcode
