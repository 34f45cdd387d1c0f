import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_recipes.core.learning_rate import LearningRateSearch, learning_rate_sensitivity
from lightning_recipes.core.trials import Outcome, Trial

RATES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


def searched(short: list[float], long: list[float], seeds: int = 1) -> tuple[Any, set[float]]:
    """What comes out where these losses are what the trials of each rate end at, NaN if they are not stable."""
    search, outcomes = LearningRateSearch(RATES, 100, seeds, 500), {}
    while wanted := search.ask(outcomes):
        for trial in wanted[::2] or wanted:  # whoever runs them may be done with some before others
            loss = (long if trial.validates else short)[RATES.index(trial.learning_rate)]
            outcomes[trial] = Outcome(not math.isnan(loss), loss, trial.steps, losses=(9.0, 1.0))
    found = search.result(outcomes)
    assert sum(outcome.steps for outcome in outcomes.values()) <= search.most_steps
    return found, {trial.learning_rate for trial in outcomes if trial.validates}


EARLY = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, math.nan, math.nan, math.nan]


@pytest.mark.parametrize(
    ("long", "best", "trained"),
    [
        ([9, 9, 5, 3, 2, 1, 2, 9, 9, 9], 0.05, {0.02, 0.05, 0.1}),
        ([9, 5, 3, 2, 1, 2, 3, 9, 9, 9], 0.02, {0.01, 0.02, 0.05, 0.1}),
        ([5, 3, 1, 2, 3, 4, 5, 9, 9, 9], 0.005, {0.002, 0.005, 0.01, 0.02, 0.05, 0.1}),
        ([9, 9, 9, 9, 3, 2, 1, math.nan, 9, 9], 0.05, {0.02, 0.05, 0.1, 0.2}),  # not beside a cliff
        ([9, 9, 9, 3.0, 2.0, 2.1, 1.9, 5.0, 9, 9], 0.05, {0.01, 0.02, 0.05, 0.1, 0.2}),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], 0.001, {*RATES[:7]}),
    ],
)
def test_long_trials_follow_the_best_rate_until_it_has_its_neighbours(
    long: list[float], best: float, trained: set[float]
) -> None:
    found, rates = searched(EARLY, long)
    assert found.best == Trial(best, 500, validates=True)
    assert rates == trained
    assert (found.finding.rule == "best at the end of the grid") == (best == 0.001)


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_lowest_of_smoothed_losses(seed: int) -> None:
    chance = random.Random(seed)
    short, long = (
        [abs(place - centre) + chance.random() - (3 if seed % 2 else 0) for place in range(10)] for centre in (6, 4)
    )
    if seed % 3:
        short[9] = long[9] = math.nan
    found, rates = searched(short, long, seeds=1 + seed % 2)
    assert found.best is not None
    places = sorted(RATES.index(rate) for rate in rates)
    assert places == [*range(places[0], places[-1] + 1)]
    assert len(places) <= 8

    def smoothed(place: int) -> float:  # the definition
        own = {each: 9.0 if math.isnan(long[each]) else long[each] for each in places}
        return own.get(place - 1, own[place]) + 2 * own[place] + own.get(place + 1, own[place])

    chosen = RATES.index(found.best.learning_rate)
    assert smoothed(chosen) == pytest.approx(min(map(smoothed, places)))
    lowest = min((place for place in places if not math.isnan(long[place])), key=lambda place: long[place])
    assert found.summary["lowest_loss_at"] == RATES[lowest]
    if len(places) < 8:
        for place in (chosen, lowest):
            assert {max(0, place - 1), place, min(9, place + 1)} <= {*places}


def test_no_rate_may_be_stable_for_long() -> None:
    found, rates = searched(EARLY, [math.nan] * 10)
    assert found.best is None
    assert "not even 0.001 for long" in found.finding.message
    assert rates == {*RATES[:7]}


def test_sensitivity_is_wortsmans() -> None:
    losses = {1e-3: 0.5, 1e-2: 0.25, 1e-1: 4.0, 1.0: math.nan}
    assert learning_rate_sensitivity(losses, 2.0) == pytest.approx((0.5 + 0.25 + 2.0 + 2.0) / 4 - 0.25)


def test_a_search_asks_for_what_is_missing() -> None:
    search = LearningRateSearch((0.1, 1.0), 20, 2, 20)
    asked = search.ask({Trial(0.1, 20, validates=True): Outcome(True, 1.0, 20)})
    assert asked == [Trial(rate, 20, 0, seed, validates=True) for rate, seed in ((1.0, 0), (0.1, 1), (1.0, 1))]
    assert LearningRateSearch((0.1, 1.0), 20).ask({}) == [Trial(0.1, 20), Trial(1.0, 20)]


def test_a_run_that_is_no_longer_has_one_kind_of_trial() -> None:
    search = LearningRateSearch(RATES, 100, max_steps=50)
    assert {trial.steps for trial in search.ask({})} == {50}
    assert search.most_steps == 10 * 50
    assert LearningRateSearch(RATES, 100, 2, 500).most_steps == 10 * 100 + 8 * 2 * 500
    assert LearningRateSearch(RATES[:3], 100, 2, 500).most_steps == 3 * 100 + 3 * 2 * 500
    done = {Trial(rate, 100, validates=True): Outcome(True, 1.0, 100) for rate in RATES}
    assert not LearningRateSearch(RATES, 100, max_steps=100).ask(done)


def test_what_is_said_of_the_best_rate_and_of_the_edge() -> None:
    found, _ = searched(EARLY, [9, 9, 5, 3, 2, 1, 2, 9, 9, 9])
    assert found.finding.message == (
        "The training loss after 500 steps is lowest at a learning rate of 0.05; from 0.2 on the training is unstable."
    )
    assert found.finding.advice == "Train at 0.05 (a loss of 1); a much longer run may be best at a lower one."
    assert found.finding.rule == "learning rate found"
    assert found.finding.step == 10 * 100 + 3 * 500
    assert found.finding.evidence == {"learning_rate": 0.05, "loss": 1.0, "lowest": 0.05, "edge": 0.2}
    capped = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0]
    assert found.summary == {
        "initial_loss": 9.0,
        "sensitivity": pytest.approx(sum(capped) / 10 - 2),
        "lowest_loss_at": 0.05,
        "lowest_early_at": 0.1,
        "edge": 0.2,
        "at_edge": 0.0,
    }
    found, _ = searched(EARLY, [9, 9, 9, 9, 3, 2, 1, math.nan, 9, 9])
    assert found.finding.rule == "best at the edge of stability"
    assert found.finding.advice.startswith(
        "Train at 0.05 (a loss of 2); a much longer run may be best at a lower one. It is the safer choice: the rates"
        " next to 0.05 end lower on average than those next to 0.1, whose own loss may be luck. The best lies"
    )
    assert "| 0.05 | 0 | 500 | 1 of 1 | 2 | **recommended** |" in found.to_markdown()
    assert "**best**" not in found.to_markdown()
    assert found.summary["at_edge"] == 1
    found, _ = searched([*reversed(RATES)], [*reversed(RATES)])
    assert found.finding.advice == "It is the highest of the grid: try higher ones."
    assert found.finding.message.endswith("at a learning rate of 1.")
    assert found.summary["edge"] == math.inf
    assert found.summary["at_edge"] == 0
    found, _ = searched([*RATES], [*RATES])
    assert found.finding.advice == "It is the lowest of the grid: try lower ones."
    found, rates = searched([math.nan] * 10, EARLY)
    assert found.finding.message == "Every learning rate was unstable, 0.001 the lowest."
    assert (found.finding.rule, rates) == ("no learning rate is stable", set())


def test_a_stable_trial_is_judged_by_its_validation_loss() -> None:
    search = LearningRateSearch((0.1, 0.2, 0.4), 20, max_steps=20)
    trials = search.ask({})
    ends = [(True, 1.0, 2.0), (True, 5.0, 0.5), (False, math.nan, 0.1)]
    outcomes = {
        trial: Outcome(stable, loss, 20, losses=(start,) * (start > 0), val_loss=validated)
        for trial, start, (stable, loss, validated) in zip(trials, (4.0, 8.0, 0.0), ends, strict=True)
    }
    found = search.result(outcomes)
    assert found.finding.message.startswith("The validation loss after 20 steps is lowest at a learning rate of 0.2; ")
    assert (found.finding.evidence["loss"], found.finding.evidence["lowest"]) == (2.0, 0.2)
    assert found.best == trials[0]  # 2 + 2 x 2 + 0.5 against 2 + 2 x 0.5 + 6, of an unstable neighbour
    assert found.summary["initial_loss"] == 6.0
    assert found.summary["sensitivity"] == pytest.approx((1 + 5 + 6) / 3 - 1)  # of the training losses


def test_an_unstable_rate_counts_as_the_worst_there_is() -> None:
    search = LearningRateSearch((0.1, 0.2, 0.4, 0.8, 1.6), 20, max_steps=20)
    ends = (9.0, 6.0, 3.2, 2.6, math.nan)
    outcomes = {
        trial: Outcome(not math.isnan(loss), loss, 20, losses=(6.0,)) for trial, loss in zip(search.ask({}), ends)
    }
    best = search.result(outcomes).best
    assert best is not None
    assert best.learning_rate == 0.4  # 3.75, against 4.35; with the 6 before training 0.8 would have 3.6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rates": (0.2, 0.1)}, "must rise"),
        ({"learning_rates": (0.1, 0.1)}, "must rise"),
        ({"learning_rates": (0.1,)}, "at least two"),
        ({"learning_rates": (0.0, 0.1)}, "learning_rates"),
        ({"steps": 19}, "steps"),
        ({"max_steps": 19}, "max_steps"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    LearningRateSearch((0.1, 0.2), 20, 1, 20)
    with pytest.raises(ValueError, match=message):
        LearningRateSearch(**wrong)


def test_what_a_sweep_says_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    nan = math.nan
    validated = LearningRateSearch((0.1, 0.2, 0.4), 20, max_steps=20)
    losses = zip(validated.ask({}), (0.5, 0.25, 0.75), strict=True)
    outcomes = {trial: Outcome(True, 1.0, 20, losses=(4.0,), val_loss=loss) for trial, loss in losses}
    results = [
        searched(EARLY, [9, 9, 5, 3, 2, 1, 2, 9, 9, 9])[0],
        searched(EARLY, [9, 9, 9, 9, 3, 2, 1, nan, 9, 9])[0],
        searched([*RATES], [*RATES])[0],
        searched([*reversed(RATES)], [*reversed(RATES)])[0],
        searched(EARLY, [nan] * 10)[0],
        searched([nan] * 10, EARLY)[0],
        validated.result(outcomes),
    ]
    word_for_word(*(each.finding for each in results), *(dict(each.summary) for each in results))


def test_the_grid_that_is_refused_is_named() -> None:
    said = "learning_rates must rise and be at least two, got (0.2, 0.1)"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        LearningRateSearch((0.2, 0.1))


def test_the_defaults_are_those_that_are_documented() -> None:
    search = LearningRateSearch()
    assert (search.steps, search.seeds, search.max_steps, len(search.learning_rates)) == (100, 1, 500, 16)
    assert (search.learning_rates[0], search.learning_rates[-1]) == (1e-5, 1.0)
