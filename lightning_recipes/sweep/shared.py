"""Runners that share the trials of a sweep among processes and machines: by an Optuna storage, or by Ray."""

import importlib
import itertools
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning_recipes.callbacks.trials import keeper
from lightning_recipes.core.arguments import check_count, check_real
from lightning_recipes.core.trials import (
    Outcome,
    Search,
    Trial,
    load_outcomes,
    outcome_as_data,
    outcome_from_data,
)

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, TrialState

LONGEST_WAIT = 1.0  # seconds, until the storage is looked at again
OPENINGS = 3  # of a database, that may fail
DEATHS = 3  # actors that a trial may take with it


@dataclass(frozen=True)
class OptunaRunner:
    """Shares the trials of a sweep among all processes that run the same script; a
    :class:`~lightning_recipes.sweep.running.Runner`.

    They meet in a storage of Optuna: each trial counts once, and all return the same outcomes. Processes may come late,
    and go: a trial that shows no sign of life is run again by another. A trial that is not needed any more when the
    search is over does not count. A process may be a job of several ranks, which run its trials together: rank zero
    takes them from the storage. Needs the extra ``sweep``.

    Args:
        storage: Path of a journal file on a disk that all see, URL of a database, or a storage of Optuna. SQLite locks
            no rows: there two processes may, rarely, run the same trial, of which one counts.
        study_name: Of this sweep; another sweep in the same storage needs another one.
        heartbeat_seconds: Time between signs of life of a trial, above 0.
        grace_seconds: Time without one after which a trial is given up for dead, above ``heartbeat_seconds``.

    Raises:
        ImportError: If Optuna is not installed.
        TypeError: If a time is not a number.
        ValueError: If it is out of its range.
    """

    storage: "str | Path | BaseStorage"
    study_name: str = "sweep"
    heartbeat_seconds: float = 5.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        _import("optuna", "sweep")
        least = check_real("heartbeat_seconds", self.heartbeat_seconds, 0, math.inf)
        check_real("grace_seconds", self.grace_seconds, least, math.inf)

    def __call__(
        self,
        search: Search,
        train: Callable[[Trial], Outcome],
        path: str | Path | None,
        told: Callable[[Trial, Outcome], None],
    ) -> dict[Trial, Outcome]:
        """Return all outcomes; see :class:`~lightning_recipes.sweep.running.Runner`."""
        ranks = _Ranks(train)
        if not ranks.lead:
            return ranks.follow()
        study = _Study(self.storage, self.study_name, self.grace_seconds)
        before, keep = {} if path is None else load_outcomes(path), keeper(path)
        while True:
            live = study.live()
            outcomes = before | {
                trial: outcome_from_data(each.user_attrs["outcome"])
                for trial, each in live.items()
                if each.state.is_finished()
            }
            wanted = search.ask(outcomes)
            # Every change is looked at anew: what others have done meanwhile counts, and all see it in the same order.
            if not wanted:
                if all(each.state.is_finished() for each in live.values()):
                    break
                study.close(live)
            elif any(trial not in live for trial in wanted):
                study.plan([trial for trial in wanted if trial not in live])
            elif claimed := next((trial for trial in wanted if study.claim(live[trial])), None):
                ranks.say(claimed)
                outcome = self._run(study, live[claimed].number, claimed, train)
                if study.finish(live[claimed].number, outcome):
                    outcomes[claimed] = outcome
                    keep(outcomes)
                    told(claimed, outcome)
            else:
                ranks.say()  # or they would give rank zero up
                time.sleep(min(LONGEST_WAIT, self.heartbeat_seconds))
        keep(outcomes)
        ranks.say(outcomes)
        return outcomes

    def _run(self, study: "_Study", number: int, trial: Trial, train: Callable[[Trial], Outcome]) -> Outcome:
        try:
            with _beating(study, number, self.heartbeat_seconds):
                return train(trial)
        except BaseException as error:
            study.fail(number, repr(error))
            raise


class _Ranks:
    """The ranks of this job, of which rank zero says what they do; it may be the only one.

    Args:
        train: What they will run. A strategy makes them at its first training, which finds out the learning rate.
    """

    def __init__(self, train: Callable[[Trial], Outcome]) -> None:
        getattr(train, "learning_rate", None)
        self._train = train
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.lead = not self._several or dist.get_rank() == 0

    def say(self, what: Trial | Mapping[Trial, Outcome] | None = None) -> Trial | Mapping[Trial, Outcome] | None:
        """The next trial, or nothing yet, or all outcomes, from rank zero to the others."""
        said = [what]
        if self._several:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def follow(self) -> dict[Trial, Outcome]:
        """Do what rank zero says, and return its outcomes."""
        while not isinstance(said := self.say(), Mapping):
            if said is not None:
                self._train(said)
        return dict(said)


class _Study:
    """The trials of a sweep in a storage, each a trial of Optuna with what is to be done as an attribute.

    Of several of the same trial that are not failed, the one with the lowest number counts: the storage gives the
    numbers, so that all agree.
    """

    def __init__(self, storage: "str | Path | BaseStorage", name: str, grace_seconds: float) -> None:
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection
        from optuna.trial import TrialState

        self.storage = storage = _open(str(storage)) if isinstance(storage, str | Path) else storage
        self.grace_seconds, self.states = grace_seconds, TrialState
        self._seen: dict[int, tuple[int, float]] = {}  # by number: the last sign of life, and when it was first seen
        try:
            self._id = storage.create_new_study([StudyDirection.MINIMIZE], name)
        except DuplicatedStudyError:
            self._id = storage.get_study_id_from_name(name)

    def live(self) -> "dict[Trial, FrozenTrial]":
        """Those that count; duplicates and dead ones are failed."""
        live: dict[Trial, FrozenTrial] = {}
        for each in self.storage.get_all_trials(self._id, deepcopy=False):
            if each.state == self.states.FAIL:
                continue
            trial = Trial(**each.user_attrs["trial"])
            if trial in live:  # another process has planned it at the same moment
                self.fail(each.number, "planned twice")
            elif each.state == self.states.RUNNING and self._is_dead(each):
                self.fail(each.number, "no sign of life")
            else:
                live[trial] = each
        return live

    def _is_dead(self, each: "FrozenTrial") -> bool:
        beat, now = each.user_attrs.get("heartbeat", 0), time.monotonic()  # clocks of other machines say nothing
        if each.number not in self._seen or self._seen[each.number][0] != beat:
            self._seen[each.number] = beat, now
        return now - self._seen[each.number][1] > self.grace_seconds

    def plan(self, trials: list[Trial]) -> None:
        from optuna.trial import create_trial

        for trial in trials:
            template = create_trial(state=self.states.WAITING, user_attrs={"trial": asdict(trial)})
            self.storage.create_new_trial(self._id, template)

    def claim(self, each: "FrozenTrial") -> bool:
        """Whether it waits, and no other process was faster."""
        return each.state == self.states.WAITING and self._turn(each.number, self.states.RUNNING)

    def finish(self, number: int, outcome: Outcome) -> bool:
        """Whether the outcome counts: not if the trial has been given up."""
        value = outcome.loss if outcome.stable else math.inf  # Optuna takes no NaN
        return self._turn(number, self.states.COMPLETE, [value], outcome=outcome_as_data(outcome))

    def fail(self, number: int, reason: str) -> None:
        self._turn(number, self.states.FAIL, reason=reason)

    def close(self, live: "Mapping[Trial, FrozenTrial]") -> None:
        """Fail those that have not come to their end."""
        for each in live.values():
            if not each.state.is_finished():
                self.fail(each.number, "not wanted any more")

    def write(self, number: int, name: str, value: Any) -> None:
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._id, number)
        self.storage.set_trial_user_attr(trial_id, name, value)

    def _turn(self, number: int, state: "TrialState", values: list[float] | None = None, **attributes: Any) -> bool:
        """Whether a trial that had not come to its end is now in this state."""
        from optuna.exceptions import UpdateFinishedTrialError

        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._id, number)
        with suppress(UpdateFinishedTrialError):
            for name, value in attributes.items():
                self.write(number, name, value)
            return self.storage.set_trial_state_values(trial_id, state, values)
        return False


def _open(storage: str) -> "BaseStorage":
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import DBAPIError

    if "://" not in storage:
        return JournalStorage(JournalFileBackend(storage))
    for _ in range(OPENINGS):  # processes that make the tables of a new database at once disturb each other
        with suppress(DBAPIError):
            return RDBStorage(storage)
        time.sleep(LONGEST_WAIT)
    return RDBStorage(storage)


@contextmanager
def _beating(study: _Study, number: int, seconds: float) -> Iterator[None]:
    """Show signs of life of a trial meanwhile."""
    from optuna.exceptions import OptunaError

    over = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if over.wait(seconds):
                return
            with suppress(OptunaError, OSError):  # the next one may come through
                study.write(number, "heartbeat", count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class RayRunner:
    """Runs the trials of a sweep in actors of Ray, on all its machines; a
    :class:`~lightning_recipes.sweep.running.Runner`.

    Uses the cluster that ``ray.init`` has connected to, or else connects to one or starts one for the sweep. What is
    trained travels by pickling. A trial whose actor dies is run again, twice at most. Needs the extra ``ray``.

    Args:
        trials_at_once: At least 1; None for as many as the cluster has room for.
        resources_per_trial: Options of an actor: ``num_cpus``, ``num_gpus``, ``resources``...; None for one CPU.

    Raises:
        ImportError: If Ray is not installed.
        TypeError: If the number is not an integer.
        ValueError: If it is below 1.
    """

    trials_at_once: int | None = None
    resources_per_trial: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _import("ray", "ray")
        if self.trials_at_once is not None:
            check_count("trials_at_once", self.trials_at_once, 1)

    def __call__(
        self,
        search: Search,
        train: Callable[[Trial], Outcome],
        path: str | Path | None,
        told: Callable[[Trial, Outcome], None],
    ) -> dict[Trial, Outcome]:
        """Return all outcomes; see :class:`~lightning_recipes.sweep.running.Runner`."""
        ray = _import("ray", "ray")
        starts = not ray.is_initialized()
        if starts:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(include_dashboard=False)
        options = {"num_cpus": 1} if self.resources_per_trial is None else dict(self.resources_per_trial)
        at_once = self.trials_at_once or _room(ray.cluster_resources(), options)
        actor, what = ray.remote(_Actor).options(**options), ray.put(train)
        outcomes, keep = {} if path is None else load_outcomes(path), keeper(path)
        running: dict[Any, tuple[Trial, Any]] = {}
        idle: list[Any] = []
        deaths: Counter[Trial] = Counter()
        try:
            while wanted := search.ask(outcomes):
                given = {trial for trial, _ in running.values()}
                for trial in [trial for trial in wanted if trial not in given][: at_once - len(running)]:
                    one = idle.pop() if idle else actor.remote(what)
                    running[one.run.remote(trial)] = trial, one
                (done,), _ = ray.wait(list(running))
                trial, one = running.pop(done)
                try:
                    outcomes[trial] = ray.get(done)
                except ray.exceptions.RayActorError:
                    deaths[trial] += 1
                    if deaths[trial] == DEATHS:
                        raise
                    continue
                idle.append(one)
                keep(outcomes)
                told(trial, outcomes[trial])
        finally:
            for one in [*idle, *(one for _, one in running.values())]:
                ray.kill(one)
            if starts:
                ray.shutdown()
        return outcomes


class _Actor:
    def __init__(self, train: Callable[[Trial], Outcome]) -> None:
        self.train = train

    def run(self, trial: Trial) -> Outcome:
        return self.train(trial)


def _room(cluster: Mapping[str, float], options: Mapping[str, Any]) -> int:
    """Actors that a cluster has room for, at least one."""
    each = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **options.get("resources", {})}
    return max(1, min((int(cluster.get(name, 0) / need) for name, need in each.items() if need), default=1))


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this runner needs {name}: pip install 'lightning-recipes[{extra}]'") from error
