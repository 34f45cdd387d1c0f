import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from lightning_recipes.callbacks.trials import run_trials
from lightning_recipes.core.trials import Outcome, Trial, load_outcomes, outcome_as_data, save_outcomes
from lightning_recipes.core.warmup import WarmupSearch
from lightning_recipes.sweep import OptunaRunner, RayRunner, shared, warmup_sweep

SEARCH = WarmupSearch(1.0, 10_000, seeds=4)  # finds a warmup of 1000 steps at 30, the unstable rate being 3


@dataclass
class Grid:
    """Wants all its trials at once."""

    size: int

    def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
        return [trial for seed in range(self.size) if (trial := Trial(1.0, 100, seed=seed)) not in outcomes]


def arithmetic(trial: Trial) -> Outcome:
    stable = trial.learning_rate <= 1 + trial.warmup_steps / 20
    loss = trial.seed + 1 / trial.learning_rate if stable else float("nan")
    return Outcome(stable, loss, trial.steps, "" if stable else "too high", (1.0, float("inf")))


def slow(trial: Trial) -> Outcome:
    time.sleep(0.05)
    return arithmetic(trial)


def untold(trial: Trial, outcome: Outcome) -> None:
    pass


def data(outcomes: Mapping[Trial, Outcome]) -> dict[Trial, Any]:
    return {trial: outcome_as_data(outcome) for trial, outcome in outcomes.items()}  # NaN does not equal NaN


def make(seed: int) -> Any:
    weight = torch.nn.Parameter(torch.ones(1))
    return torch.optim.SGD([weight], lr=0.5), lambda: (weight**2).sum()


# -------------------------------------------------------------------------------------------------- Optuna


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    pytest.importorskip("optuna")
    return tmp_path / "sweep.log"


def trials_in(journal: Path) -> list[Any]:
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    return list(storage.get_all_trials(storage.get_study_id_from_name("sweep")))


def completed(journal: Path) -> list[Trial]:
    return [Trial(**each.user_attrs["trial"]) for each in trials_in(journal) if each.state.name == "COMPLETE"]


def reasons(journal: Path) -> Counter[str]:
    return Counter(each.user_attrs["reason"] for each in trials_in(journal) if each.state.name != "COMPLETE")


def share(
    storage: str | Path, search: Any, train: Callable[[Trial], Outcome] = slow
) -> tuple[dict[Trial, Any], list[Trial]]:
    """All outcomes, and the trials that this process has run."""
    own: list[Trial] = []
    outcomes = OptunaRunner(storage, heartbeat_seconds=0.1, grace_seconds=2)(
        search, train, None, lambda trial, _: own.append(trial)
    )
    return data(outcomes), own


@pytest.mark.parametrize("storage", ["sweep.log", "sqlite:///sweep.db"])
def test_alone_it_runs_what_one_process_runs(storage: str, journal: Path) -> None:
    alone, told = run_trials(SEARCH, arithmetic), []
    runner = OptunaRunner(storage)
    outcomes = runner(SEARCH, arithmetic, "outcomes.json", lambda trial, _: told.append(trial))
    assert data(outcomes) == data(alone) == data(load_outcomes("outcomes.json"))
    assert told == list(alone)
    assert SEARCH.result(outcomes).best == SEARCH.result(alone).best
    told.clear()
    assert data(runner(SEARCH, arithmetic, None, lambda trial, _: told.append(trial))) == data(alone)
    assert not told  # nothing was left to do


def test_a_real_training_comes_out_alike(journal: Path) -> None:
    alone = warmup_sweep(make, max_steps=1000, seeds=2)
    both = warmup_sweep(make, max_steps=1000, seeds=2, runner=OptunaRunner(journal))
    assert data(both.outcomes) == data(alone.outcomes)
    assert both.to_markdown() == alone.to_markdown()


def test_it_goes_on_from_a_file(journal: Path) -> None:
    save_outcomes("outcomes.json", {trial: arithmetic(trial) for trial in Grid(3).ask({})})
    outcomes = OptunaRunner(journal)(Grid(5), arithmetic, "outcomes.json", untold)
    assert len(outcomes) == 5
    assert len(completed(journal)) == 2


def test_three_processes_share_the_trials(journal: Path) -> None:
    results = run_on_ranks(share, journal, Grid(24), ranks=3)
    assert all(outcomes == data(run_trials(Grid(24), arithmetic)) for outcomes, _ in results)
    assert sorted(completed(journal), key=str) == sorted(Grid(24).ask({}), key=str)
    assert sorted((trial for _, own in results for trial in own), key=str) == sorted(Grid(24).ask({}), key=str)
    assert sum(bool(own) for _, own in results) > 1
    assert set(reasons(journal)) <= {"planned twice"}


def test_three_processes_meet_in_a_new_database(journal: Path) -> None:
    results = run_on_ranks(share, "sqlite:///sweep.db", Grid(6), ranks=3)
    assert all(outcomes == data(run_trials(Grid(6), arithmetic)) for outcomes, _ in results)


def test_three_processes_find_what_one_does(journal: Path) -> None:
    results = run_on_ranks(share, journal, SEARCH, ranks=3)
    outcomes = results[0][0]
    assert all(each == outcomes for each, _ in results)
    assert sorted(completed(journal), key=str) == sorted(outcomes, key=str)
    assert set(reasons(journal)) <= {"planned twice", "not wanted any more"}
    best = SEARCH.result({trial: arithmetic(trial) for trial in outcomes}).best
    assert best == SEARCH.result(run_trials(SEARCH, arithmetic)).best


JOB = """
import os
import sys
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from lightning_recipes.sweep import OptunaRunner, learning_rate_sweep


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


torch.manual_seed(0)
x = torch.randn(256, 8)
loader = DataLoader(TensorDataset(x, x.argmax(1) % 3), 16)
shared = {"runner": OptunaRunner(sys.argv[1])} if len(sys.argv) > 1 else {}
ranks = {"accelerator": "cpu", "strategy": "ddp", "devices": 2}
result = learning_rate_sweep(Classifier(), [0.01, 0.1, 1e4], max_steps=30, train_dataloaders=loader, **shared, **ranks)
found = sorted((trial.learning_rate, outcome.loss) for trial, outcome in result.outcomes.items())
os.write(1, f"found {found}\\n".encode())  # at once: the ranks share the pipe
"""


@pytest.mark.parametrize("sharing", [False, pytest.param(True, marks=pytest.mark.everything)])
def test_a_process_may_be_a_job_of_two_ranks(sharing: bool, journal: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    command = [sys.executable, "job.py", *([str(journal)] if sharing else [])]
    job = {"cwd": tmp_path, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, **job) for _ in range(1 + sharing)]  # type: ignore[call-overload]
    found = [line for each in jobs for line in each.communicate(timeout=100)[0].splitlines() if "found" in line]
    assert len(found) == 2 * len(jobs)
    assert len(set(found)) == 1
    if sharing:
        assert sorted(trial.learning_rate for trial in completed(journal)) == [0.01, 0.1, 1e4]


def test_what_a_killed_process_has_begun_is_run_by_another(journal: Path) -> None:
    def killed(trial: Trial) -> Outcome:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def doomed() -> None:  # shows no sign of life, lest it die while it holds the lock of the journal
        OptunaRunner(journal, heartbeat_seconds=60, grace_seconds=100)(Grid(24), killed, None, untold)

    process = multiprocessing.get_context("fork").Process(target=doomed, daemon=True)
    process.start()
    process.join()
    results = run_on_ranks(share, journal, Grid(24))
    assert process.exitcode == -signal.SIGKILL
    assert all(outcomes == data(run_trials(Grid(24), arithmetic)) for outcomes, _ in results)
    assert sorted(completed(journal), key=str) == sorted(Grid(24).ask({}), key=str)
    assert reasons(journal)["no sign of life"] >= 1


def test_a_long_trial_that_shows_signs_of_life_is_left_to_its_process(journal: Path) -> None:
    def long(trial: Trial) -> Outcome:
        time.sleep(3)
        return arithmetic(trial)

    results = run_on_ranks(share, journal, Grid(1), long)
    assert sorted(len(own) for _, own in results) == [0, 1]
    assert set(reasons(journal)) <= {"planned twice"}


@pytest.mark.parametrize("first", ["WAITING", "RUNNING"])
def test_a_trial_that_two_processes_have_planned_is_run_once(first: str, journal: Path) -> None:
    import optuna

    storage = optuna.storages.InMemoryStorage()
    study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "sweep")
    for state in (first, "WAITING"):
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state], user_attrs={"trial": asdict(Trial(1.0, 100))}
        )
        storage.create_new_trial(study, template)
    told: list[Trial] = []
    runner = OptunaRunner(storage, heartbeat_seconds=0.05, grace_seconds=0.3)
    runner(Grid(1), arithmetic, None, lambda trial, _: told.append(trial))
    assert told == [Trial(1.0, 100)]
    states = [each.state.name for each in storage.get_all_trials(study)]
    assert states == (["COMPLETE", "FAIL"] if first == "WAITING" else ["FAIL", "FAIL", "COMPLETE"])


def test_what_is_not_wanted_any_more_does_not_count(journal: Path) -> None:
    class First:
        def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
            return [] if outcomes else Grid(3).ask({})

    def second_is_long(trial: Trial) -> Outcome:
        time.sleep(trial.seed)
        return arithmetic(trial)

    results = run_on_ranks(share, journal, First(), second_is_long)
    assert all(list(outcomes) == [Trial(1.0, 100)] for outcomes, _ in results)
    assert sorted(len(own) for _, own in results) == [0, 1]
    assert reasons(journal)["not wanted any more"] >= 2


def test_an_error_of_a_trial_is_raised_and_noted(journal: Path) -> None:
    def fails(trial: Trial) -> Outcome:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        OptunaRunner(journal)(Grid(1), fails, None, untold)
    assert reasons(journal) == {"RuntimeError('no memory')": 1}
    assert len(OptunaRunner(journal)(Grid(1), arithmetic, None, untold)) == 1


# ----------------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def ray() -> Any:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which the actors cannot import
    return ray


@pytest.fixture
def cluster(ray: Any) -> Iterator[Any]:
    ray.init(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_one_actor_runs_what_one_process_runs(ray: Any) -> None:
    alone = warmup_sweep(make, max_steps=1000, seeds=2)
    both = warmup_sweep(make, max_steps=1000, seeds=2, runner=RayRunner(trials_at_once=1))
    assert data(both.outcomes) == data(alone.outcomes)
    assert both.to_markdown() == alone.to_markdown()
    assert not ray.is_initialized()  # the runner had started it


def test_actors_find_what_one_process_does(cluster: Any, tmp_path: Path) -> None:
    def train(trial: Trial) -> Outcome:
        with (tmp_path / f"{trial}").open("x"):  # once
            return slow(trial)

    alone, told = run_trials(SEARCH, arithmetic), []
    outcomes = RayRunner()(SEARCH, train, "outcomes.json", lambda trial, _: told.append(trial))
    assert data(alone).items() <= data(outcomes).items()
    assert data(outcomes) == data(load_outcomes("outcomes.json"))
    assert sorted(told, key=str) == sorted(outcomes, key=str)
    assert SEARCH.result(outcomes).best == SEARCH.result(alone).best
    assert cluster.is_initialized()


def test_the_trial_of_an_actor_that_dies_is_run_again(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(trial: Trial) -> Outcome:
        (tmp_path / f"{trial.seed} {os.getpid()}").touch(exist_ok=False)
        if trial.seed == 2:
            raise RuntimeError("no memory")
        if trial.seed == 1 and len(list(tmp_path.glob("1 *"))) == 1:
            os._exit(1)
        return arithmetic(trial)

    runner = RayRunner(trials_at_once=1)
    assert data(runner(Grid(2), train, None, untold)) == data(run_trials(Grid(2), arithmetic))
    assert sorted(path.name[0] for path in tmp_path.glob("? *")) == ["0", "1", "1"]
    with pytest.raises(RuntimeError, match="no memory"):
        runner(Grid(3), train, None, untold)
    monkeypatch.setattr(shared, "DEATHS", 1)
    with pytest.raises(cluster.exceptions.RayActorError):
        runner(Grid(1), lambda _: os._exit(1), None, untold)


def test_there_are_as_many_actors_as_the_cluster_has_room_for() -> None:
    cluster = {"CPU": 8.0, "GPU": 2.0, "node": 1.0}
    assert shared._room(cluster, {"num_cpus": 1}) == 8
    assert shared._room(cluster, {"num_cpus": 2, "num_gpus": 0.5}) == 4
    assert shared._room(cluster, {"num_gpus": 4}) == shared._room(cluster, {}) == 1
    assert shared._room(cluster, {"num_cpus": 0, "resources": {"node": 0.5}}) == 2


# --------------------------------------------------------------------------------------------- both, refused


@pytest.mark.parametrize(
    ("runner", "name", "extra"),
    [(lambda: OptunaRunner("sweep.log"), "optuna", "sweep"), (RayRunner, "ray", "ray")],
)
def test_what_is_not_installed_is_named(
    runner: Callable[[], Any], name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'lightning-recipes\[{extra}\]'"):
        runner()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heartbeat_seconds": 0}, "heartbeat_seconds must be a number above 0, got 0"),
        ({"grace_seconds": 5}, "grace_seconds must be a number above 5, got 5"),
    ],
)
def test_bad_times_are_refused(arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=message):
        OptunaRunner("sweep.log", **arguments)
