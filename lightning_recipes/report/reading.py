"""Read what a training left in its folder: that of any Lightning run, whole or cut off in the middle of a line."""

import base64
import csv
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.names import trains
from lightning_recipes.core.report import Record
from lightning_recipes.report.numbers import duration
from lightning_recipes.report.run import LARGEST_STEP, Run, finding_of
from lightning_recipes.report.story import read_curves

STATE = "report.json"  # what TrainingReport keeps beside the page
FINDINGS = "findings.jsonl"
EVENTS = "events.out.tfevents"
SETTINGS = "hparams.yaml"
TRACES = (STATE, FINDINGS, "metrics.csv")
LARGEST_PICTURE = 2_000_000  # bytes
LARGEST_TEXT = 200  # characters of a value
LARGEST_PART = 50  # settings
GROWING = ("wall time", "updates per second, validation included")  # costs that a killed run does not know


class NoRun(ValueError):
    """Raised where no training has left anything."""


def find_run(folder: Path) -> tuple[Path, int]:
    """The folder of the newest run in or below a folder, and how many there are.

    Event files below a run that have no ``hparams.yaml`` beside them are of the run itself (``add_scalars``).

    Raises:
        NoRun: If there is none.
    """
    if not folder.exists():
        raise NoRun(f"{folder} does not exist: give the folder of a run, such as lightning_logs/version_0")
    if not folder.is_dir():
        raise NoRun(f"{folder} is a file: give the folder that it is in")
    newest: dict[Path, float] = {}
    for path in (Path(name) for name, _, _ in os.walk(folder)):
        traces = _traces(path)
        only_events = all(trace.name.startswith(EVENTS) for trace in traces) and not (path / SETTINGS).is_file()
        if traces and not (only_events and any(above in newest for above in path.parents)):
            newest[path] = max(trace.stat().st_mtime for trace in traces)
    if not newest:
        raise NoRun(
            f"Nothing of a training in {folder} or below: looked for {EVENTS}* (TensorBoardLogger), metrics.csv"
            f" (CSVLogger), {FINDINGS} and {STATE}"
        )
    return max(newest, key=newest.__getitem__), len(newest)


def read_run(folder: Path) -> Run:
    """All that the files in a folder say; what is damaged is left out, and said in the notes."""
    run, offset = _state(folder)
    run.name = run.name or _name(folder)
    killed = run.ended == "running"
    if killed:
        run.ended = ""
        run.costs = {name: cost for name, cost in run.costs.items() if name not in GROWING}
        run.notes.append("The training goes on, or it was killed: it had not ended when it wrote its last page.")
    record, tags = Record(), set[str]()
    record.series = run.series  # what the files have again takes the place of what was kept
    for path in sorted(folder.glob(f"{EVENTS}*")):  # their names begin with when they were begun
        tags |= _read_events(path, run, record)
    if (folder / "metrics.csv").is_file():
        _read_csv(folder / "metrics.csv", run, record, tags)
    note_left_out(record, run.notes)
    if killed:
        known, run.steps = run.steps, 0
        run.steps = max(known, run.updates)
    run.findings += read_findings(folder / FINDINGS, offset, run.notes)
    if (folder / FINDINGS).is_file():
        run.sources.append(FINDINGS)
    run.hyperparameters = run.hyperparameters or _hyperparameters(folder / SETTINGS, run.notes)
    read_extras(folder, run)
    found = read_curves(run) if not run.findings else None
    if found is not None:
        run.findings.append(found)
    if not run.series and not run.findings:
        run.notes.append("The files hold neither a scalar nor a finding.")
    return run


def read_extras(folder: Path, run: Run) -> None:
    """What others have left beside: the table of an ensemble, pictures of sweeps."""
    ensemble = folder / "ensemble.md"
    run.ensemble = ensemble.read_text(encoding="utf-8", errors="replace") if ensemble.is_file() else ""
    for name, title in (("warmup_sweep.png", "Warmup sweep: which warmups make which learning rates stable"),):
        path = folder / name
        if path.is_file() and path.stat().st_size <= LARGEST_PICTURE:
            run.pictures[title] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def note_left_out(record: Record, notes: list[str]) -> None:
    """Say that more was logged than is kept."""
    if record.left_out:
        notes.append(f"More names were logged than are kept: {record.left_out:,} values are left out.")


def read_findings(path: Path, offset: int = 0, notes: list[str] | None = None) -> list[Finding]:
    """The findings in the lines behind ``offset`` bytes, each line once: what a resumed run told again is the same.

    Lines that are damaged are counted in ``notes``.
    """
    findings, damaged = [], 0
    if path.exists():
        with path.open("rb") as lines:
            lines.seek(offset if offset <= path.stat().st_size else 0)
            for line in dict.fromkeys(lines):
                try:
                    findings.append(finding_of(json.loads(line)))
                except (ValueError, TypeError, RecursionError):  # UnicodeDecodeError is one, too
                    damaged += bool(line.strip())
    if damaged and notes is not None:
        notes.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} of {path.name} left out.")
    return findings


def plain(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of names and short texts; a part of more than 50 is one text.

    Example:
        >>> plain({"lr": 0.1, "net": {"width": 8, "depth": None}})
        {'lr': '0.1', 'net.width': '8', 'net.depth': 'None'}
    """
    if isinstance(values, dict) and (0 < len(values) <= LARGEST_PART or not prefix):
        parts = (plain(value, f"{prefix}.{name}" if prefix else str(name)) for name, value in values.items())
        return dict(chain.from_iterable(part.items() for part in parts))
    return {prefix: cut(str(values))}


def cut(text: str) -> str:
    """At most 200 characters of a text."""
    return text if len(text) <= LARGEST_TEXT else f"{text[: LARGEST_TEXT - 1]}…"


def _traces(folder: Path) -> list[Path]:
    return [path for name in (*TRACES, f"{EVENTS}*") for path in folder.glob(name) if path.is_file()]


def _name(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:]).lstrip("/")


def _state(folder: Path) -> tuple[Run, int]:
    """What a TrainingReport knew, and from where in the file of findings its own are."""
    path = folder / STATE
    if not path.is_file():
        return Run(), 0
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        run, offset = Run.of_dict(values), values["findings_from"]
        if not isinstance(offset, int) or offset < 0:
            raise ValueError("no offset")
    except Exception:  # of whatever kind, from whatever tool
        return Run(notes=[f"{STATE} is damaged, or not of a TrainingReport, and was left out."]), 0
    run.sources.append(STATE)
    return run, offset


# ---------------------------------------------------------------------------------- what loggers write


def _read_events(path: Path, run: Run, record: Record) -> set[str]:
    """Add the scalars of a TensorBoard file, and the newest histogram of gradient norms; return their names."""
    first = last = 0.0
    tags, began = set[str](), -1
    for event in _events(path, run.notes):
        first, last = first or event.wall_time, event.wall_time
        for value in event.summary.value:
            scalar = _scalar(value)
            if scalar is not None:
                _add(record, tags, value.tag, event.step, scalar)
                if trains(value.tag):
                    began = event.step if began < 0 else min(began, event.step)
            elif value.tag == "grad_norm" and value.HasField("histo"):
                edges = [value.histo.min, *value.histo.bucket_limit]
                run.bins = list(zip(edges, edges[1:], value.histo.bucket, strict=False))
    if not tags:
        return tags
    if began > 0 and STATE not in run.sources and any(source.startswith(EVENTS) for source in run.sources):
        run.resumed.append(began)
    run.sources.append(path.name)
    if last > first:
        run.costs.setdefault("time from first to last entry", duration(last - first))
    return tags


def _add(record: Record, names: set[str], name: str, step: int, value: float) -> None:
    """Add a value of a file, whose ``names`` take the place of what was known from their first step on."""
    if name not in names and name in record.series:
        record.series[name].forget(step)
    names.add(name)
    record.update(name, step, value)


def _events(path: Path, notes: list[str]) -> Iterator[Any]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError:  # a dependency of this package, but not of what others install it with
        notes.append(f"{path.name} cannot be read without tensorboard: pip install tensorboard")
        return
    read, why = 0, ""
    try:
        for record in RawEventFileLoader(str(path)).Load():  # ends where a file is damaged
            yield Event.FromString(record)
            read += len(record) + 16  # bytes of its length and of two checksums
    except Exception as error:  # of whatever kind, from a damaged file
        why = f" ({type(error).__name__})"
    left = path.stat().st_size - read
    if left > 0:
        notes.append(f"{path.name} is damaged or cut off: its last {left:,} bytes could not be read{why}.")


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
        from tensorboard.util.tensor_util import make_ndarray

        return float(make_ndarray(value.tensor).item())
    return None


def _read_csv(path: Path, run: Run, record: Record, known: set[str]) -> None:
    """Add the columns of CSVLogger's file that no other logger has."""
    names = set[str]()
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(_without_nul(lines))
        try:
            for row in rows:
                step = _number(row.get("step"))
                if step is None or not abs(step) < LARGEST_STEP:
                    continue
                for name, text in row.items():
                    value = _number(text)
                    if name not in (None, "step") and name not in known and value is not None:
                        _add(record, names, name, int(step), value)
        except csv.Error as error:
            run.notes.append(f"{path.name} is damaged: read up to line {rows.line_num:,} ({error}).")
    run.sources.append(path.name)


def _without_nul(lines: Any) -> Iterator[str]:
    return (line.replace("\0", "") for line in lines)  # a file system may leave them behind a crash


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _hyperparameters(path: Path, notes: list[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        values = yaml.load(path.read_text(encoding="utf-8", errors="replace"), Loader=_Tolerant)
        return plain(values) if isinstance(values, dict) else {}
    except Exception:  # of whatever kind: an impossible date, a part of itself
        notes.append(f"{path.name} is damaged and was left out.")
        return {}


class _Tolerant(yaml.SafeLoader):  # type: ignore[misc] # has no types
    """Loads nothing but plain values; of other objects it makes their text."""


def _as_text(loader: Any, tag: str, node: Any) -> Any:
    make: Callable[[Any], Any] = {
        yaml.MappingNode: lambda node: loader.construct_mapping(node, deep=True),
        yaml.SequenceNode: lambda node: loader.construct_sequence(node, deep=True),
        yaml.ScalarNode: loader.construct_scalar,
    }[type(node)]
    made = make(node)
    return made if "tuple" in tag else f"{tag.rpartition(':')[2]} {made if made else ''}".strip()


_Tolerant.add_multi_constructor("", _as_text)
