import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_recipes.core.trials import Outcome, Trial
from lightning_recipes.core.warmup import WarmupSearch


def sweep(search: WarmupSearch, is_stable: Callable[[Trial], bool]) -> Any:
    """Run it against a training that is known; return the result and the trials in order."""
    outcomes: dict[Trial, Outcome] = {}
    while wanted := search.ask(outcomes):
        assert len({*wanted}) == len(wanted)
        assert not {*wanted} & {*outcomes}
        stable = is_stable(wanted[0])
        outcomes[wanted[0]] = Outcome(stable, 0.1 if stable else math.nan, wanted[0].steps if stable else 5)
    result = search.result(outcomes)
    assert result.steps <= search.most_steps
    return result


def edge(stable_up_to: float, warmup_for: Callable[[float], float]) -> Callable[[Trial], bool]:
    return lambda trial: (
        trial.learning_rate <= stable_up_to * (1 + 1e-9) or trial.warmup_steps >= warmup_for(trial.learning_rate)
    )


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("needed", [10, 30, 100, 300, 1000])
def test_the_shortest_warmup_at_ten_times_the_unstable_rate(needed: int, seeds: int, exhaustive: bool) -> None:
    search = WarmupSearch(0.01, 10_000, seeds=seeds, exhaustive=exhaustive)
    result = sweep(search, edge(0.05, lambda rate: needed))
    assert result.best == Trial(1.0, max(100, 3 * needed), needed)
    assert result.summary["unstable_base_learning_rate"] == pytest.approx(0.1)
    assert result.summary["gain"] == pytest.approx(1.0 / 0.03)
    assert result.finding.rule == "warmup found"
    assert f"train {10_000 + needed:,} steps" in result.finding.advice
    assert ("may have to grow" in result.finding.advice) == (needed > 500)
    tried = {trial for trial in result.outcomes if trial.learning_rate == 1.0}
    if exhaustive:
        assert len(tried) == 5 * seeds
    else:
        full = seeds * sum(max(100, 3 * warmup) for warmup in search.warmups)
        assert sum(result.outcomes[trial].steps for trial in tried) <= full / 2 or needed == 1000
    confirmed = [trial.seed for trial in tried if trial.warmup_steps == needed]
    assert sorted(confirmed) == [*range(seeds)]


def test_a_warmup_is_only_as_good_as_its_worst_seed() -> None:
    result = sweep(
        WarmupSearch(0.1, 10_000, base_learning_rate=1.0, seeds=5),
        lambda trial: trial.warmup_steps >= (30 if trial.seed < 4 else 300),
    )
    assert result.best.warmup_steps == 300


def test_one_seed_in_eight_may_fail_with_a_warmup_but_not_without() -> None:
    result = sweep(
        WarmupSearch(0.1, 10_000, base_learning_rate=1.0, seeds=8),
        lambda trial: trial.warmup_steps >= 30 and not (trial.seed == 3 and trial.warmup_steps < 1000),
    )
    assert result.best.warmup_steps == 30
    assert "with 7 of 8 seeds, so in 53% of all runs or more" in result.finding.message
    lucky = WarmupSearch(0.1, 10_000, base_learning_rate=1.0, seeds=8)
    assert sweep(lucky, lambda trial: trial.warmup_steps >= 30 or trial.seed < 7).best.warmup_steps == 10


def test_the_rate_in_use_may_be_unstable() -> None:
    result = sweep(WarmupSearch(1.0, 10_000, seeds=2), edge(0.02, lambda rate: 100))
    assert result.summary["unstable_base_learning_rate"] == pytest.approx(0.03)
    assert result.best.learning_rate == pytest.approx(0.3)


def test_what_is_known_is_not_looked_for() -> None:
    result = sweep(WarmupSearch(0.01, 1000, unstable_base_learning_rate=0.2, seeds=2), edge(0.1, lambda rate: 30))
    assert result.best == Trial(2.0, 100, 30)
    assert all(trial.learning_rate == 2.0 for trial in result.outcomes)


def test_if_no_warmup_helps_what_is_between_is_tried() -> None:
    result = sweep(WarmupSearch(0.01, 1000, seeds=2), edge(0.05, lambda rate: 100 if rate < 0.5 else math.inf))
    assert result.best == Trial(pytest.approx(0.3), 300, 100)  # type: ignore[arg-type]
    assert "none of up to 100 does at 1." in result.finding.message


def test_it_says_that_a_warmup_does_not_help_or_is_not_needed() -> None:
    result = sweep(WarmupSearch(0.1, 1000, seeds=2), edge(0.1, lambda rate: math.inf))
    assert (result.best, result.finding.rule, result.finding.severity) == (None, "warmup does not help", "info")
    assert result.finding.step == 0  # of the training
    assert result.finding.evidence["steps_of_trials"] == sum(each.steps for each in result.outcomes.values())
    assert (
        "No warmup of up to 100 steps makes a learning rate of 0.3 to 3 stable and better than 0.1 without one."
        in result.finding.message
    )
    result = sweep(WarmupSearch(0.1, 1000, base_learning_rate=0.5, seeds=2), edge(0.2, lambda rate: math.inf))
    assert (result.best, result.finding.rule, result.finding.severity) == (None, "warmup does not help", "warning")
    assert "of 0.5 stable and better than 0.15 without one." in result.finding.message
    result = sweep(WarmupSearch(0.1, 1000, base_learning_rate=0.5, seeds=2), lambda trial: False)
    assert (result.best, result.finding.rule) == (None, "warmup does not help")
    result = sweep(WarmupSearch(0.1, 1000, seeds=2), lambda trial: True)
    assert (result.best, result.finding.rule) == (None, "no warmup needed")
    assert "stable up to a learning rate of 100" in result.finding.message
    result = sweep(WarmupSearch(0.1, 1000, base_learning_rate=0.5, seeds=2), lambda trial: True)
    assert (result.best, result.finding.rule) == (Trial(0.5, 100), "no warmup needed")
    result = sweep(WarmupSearch(0.1, 1000, seeds=2), lambda trial: False)
    assert (result.finding.rule, result.finding.severity) == ("warmup does not help", "warning")


def test_a_rate_at_which_nothing_is_learned_is_not_worth_a_warmup() -> None:
    search, outcomes = WarmupSearch(0.01, 1000, seeds=2), dict[Trial, Outcome]()
    stable = edge(0.05, lambda rate: 30)
    while wanted := search.ask(outcomes):
        rate, holds = wanted[0].learning_rate, stable(wanted[0])
        loss = 2.3 if rate > 0.5 else 0.05 if rate > 0.2 else 0.2
        outcomes[wanted[0]] = Outcome(holds, loss if holds else math.nan, wanted[0].steps)
    assert sorted({trial.learning_rate for trial in outcomes if trial.warmup_steps}) == pytest.approx([0.3, 1.0])
    assert search.result(outcomes).best == Trial(pytest.approx(0.3), 100, 30)  # type: ignore[arg-type]
    never = {trial: replace(outcome, loss=outcome.loss + trial.warmup_steps) for trial, outcome in outcomes.items()}
    while wanted := search.ask(never):
        never[wanted[0]] = Outcome(True, 2.3, wanted[0].steps)
    assert search.result(never).finding.rule == "warmup does not help"


def test_a_hundred_times_on_request() -> None:
    result = sweep(WarmupSearch(0.01, 10_000, seeds=1, times=100), edge(0.05, lambda rate: 100 * rate))
    assert result.best == Trial(10.0, 3000, 1000)
    assert (
        sweep(WarmupSearch(0.01, 1000, seeds=1, times=100), edge(0.05, lambda rate: 100 * rate)).best.learning_rate == 1
    )


def test_a_sweep_that_was_cut_goes_on_where_it_was() -> None:
    search, stable = WarmupSearch(0.01, 10_000, seeds=3), edge(0.05, lambda rate: 300)
    whole = sweep(search, stable)
    for cut in range(len(whole.outcomes)):
        outcomes = dict(itertools.islice(whole.outcomes.items(), cut))
        with pytest.raises(ValueError, match="the sweep is not over"):
            search.result(outcomes)
        assert search.ask(outcomes)[0] == [*whole.outcomes][cut]


def test_in_whatever_order_outcomes_come_the_result_is_the_same() -> None:
    search, stable = WarmupSearch(0.01, 10_000, seeds=4), edge(0.05, lambda rate: 100)
    alone = sweep(search, stable)
    chance = random.Random(0)
    outcomes: dict[Trial, Outcome] = {}
    while wanted := search.ask(outcomes):  # as when several do
        for trial in chance.sample(wanted, min(2, len(wanted))):
            outcomes[trial] = Outcome(stable(trial), 0.1, trial.steps)
    assert search.result(outcomes).best == alone.best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"max_steps": 99}, "max_steps must be a whole number of at least 100"),
        ({"base_learning_rate": -1}, "base_learning_rate must be a number above 0"),
        ({"base_learning_rate": 1.0, "unstable_base_learning_rate": 0.1}, "not both"),
        ({"times": 0.5}, "times must be a number of at least 1"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupSearch(**{"learning_rate": 0.1, "max_steps": 1000, **arguments})


def test_trials_bisect_and_confirm_in_half_the_time() -> None:
    search = WarmupSearch(0.1, 10_000, base_learning_rate=1.0, seeds=3)
    result = sweep(search, lambda trial: trial.warmup_steps >= 100)
    by_seed = [{t.warmup_steps: t.steps for t in result.outcomes if t.seed == seed} for seed in range(3)]
    assert by_seed == [{0: 100, 10: 100, 30: 100, 100: 300}, {100: 150}, {100: 150}]


def test_no_warmup_is_longer_than_a_tenth_of_the_run() -> None:
    assert WarmupSearch(0.1, 1000).warmups == [10, 30, 100]
    assert WarmupSearch(0.1, 999).warmups == [10, 30]


def test_what_a_sweep_says_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    def asked(base: float | None = None, seeds: int = 2, steps: int = 1000) -> WarmupSearch:
        return WarmupSearch(0.125, steps, base_learning_rate=base, seeds=seeds)

    def but_for_one(trial: Trial) -> bool:
        return trial.warmup_steps >= 30 and trial.seed != 3

    never = edge(0.125, lambda rate: math.inf)
    results = [
        sweep(asked(), edge(0.5, lambda rate: 30)),
        sweep(asked(seeds=8, steps=20_000), edge(0.5, lambda rate: 1000)),
        sweep(asked(steps=1500), edge(0.5, lambda rate: 100 if rate < 4 else math.inf)),
        sweep(asked(1.0, seeds=8), but_for_one),
        sweep(asked(), never),
        sweep(asked(0.5), never),
        sweep(asked(0.5), lambda trial: False),
        sweep(asked(0.5), edge(0.25, lambda rate: math.inf)),
        sweep(asked(), lambda trial: True),
        sweep(asked(0.5), lambda trial: True),
        sweep(asked(), lambda trial: False),
    ]
    word_for_word(*(each.finding for each in results), *(dict(each.summary) for each in results))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"base_learning_rate": 1.0, "unstable_base_learning_rate": 0.1},
            "give base_learning_rate or unstable_base_learning_rate, not both",
        ),
        ({"times": 0.5}, "times must be a number of at least 1, got 0.5"),
        ({"unstable_base_learning_rate": 0}, "unstable_base_learning_rate must be a number above 0, got 0"),
    ],
)
def test_what_contradicts_is_refused_with_what_it_is(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        WarmupSearch(0.1, 1000, **arguments)


def test_the_defaults_are_those_that_are_documented() -> None:
    search = WarmupSearch(0.1, 1000)
    assert (search.times, search.seeds, search.exhaustive, search.tolerated) == (10.0, 8, False, 1)
    assert [replace(search, seeds=seeds).tolerated for seeds in (7, 15, 16)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "most"),
    [
        ({"base_learning_rate": 1.0, "seeds": 1}, 3 * (100 + 100 + 100 + 300)),
        ({"base_learning_rate": 1.0, "seeds": 2}, 3 * (200 + 200 + 200 + 450)),
        ({"unstable_base_learning_rate": 1.0, "seeds": 1}, 3 * 600),
        ({"seeds": 2}, 2 * 700 + 3 * 1050),
        ({"seeds": 1, "exhaustive": True}, 700 + 3 * 600),
    ],
)
def test_a_sweep_cannot_exceed_what_it_says(more: Any, most: int) -> None:
    assert WarmupSearch(0.1, 1000, **more).most_steps == most
