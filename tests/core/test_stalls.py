import json
import math
import statistics

import pytest
import torch

from lightning_recipes.core.early_stopping import noise_of
from lightning_recipes.core.stalls import StallRule


def losses_of(trend: float, noise: float, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    wobble = torch.randn(steps, generator=generator).tolist()
    return [2.0 - trend * step + noise * each for step, each in enumerate(wobble)]


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_a_loss_that_falls_is_hardly_ever_taken_for_flat_and_a_flat_one_is(noise: float) -> None:
    falls = flats = 0
    for seed in range(20):
        rule, other = StallRule(200), StallRule(200)
        falls += sum(rule.update(loss) for loss in losses_of(max(noise, 0.1) / 100, noise, 200, seed)) > 0
        flats += sum(other.update(loss) for loss in losses_of(0, noise, 400, seed)) > 0
    assert falls == 0
    assert flats >= 18


def test_flat_is_its_definition() -> None:
    found = []
    for seed in range(60):
        rule, losses = StallRule(40), losses_of(0.002, 0.1, 75, seed)
        for loss in losses:
            rule.update(loss)
        means = [statistics.fmean(losses[start : start + 4]) for start in range(35, 75, 4)]
        fall = statistics.fmean(means[:5]) - statistics.fmean(means[5:])
        assert rule.is_flat == (fall <= 2 * noise_of(means) * math.sqrt(2 / 5))
        found.append(rule.is_flat)
    assert 10 < sum(map(bool, found)) < 50
    for fall, flat in ((0.9e-5, True), (1.1e-5, False)):  # from half to half a ten-thousandth of the loss
        rule = StallRule(20)
        for step in range(20):
            rule.update(-100 - 100 * fall * step)
        assert rule.is_flat == flat


def test_a_stall_that_lasts_is_told_ever_more_seldom() -> None:
    rule = StallRule(20)
    assert [step for step in range(300) if rule.update(1.0)] == [19, 39, 59, 89, 135, 203]


def test_what_looks_cost_is_at_most_a_tenth_before_the_next_one() -> None:
    rule = StallRule(20)
    told = []
    for step in range(1, 2001):
        if rule.update(1.0):
            assert rule.spent <= step / 10
            told.append(step)
            rule.charge(50)
    assert told == [20, 500, 1000, 1500]
    other = StallRule(20)
    other.load_state_dict(rule.state_dict())
    goes_on = [[step for step in range(3000) if each.update(1.0)] for each in (rule, other)]
    assert goes_on[0] == goes_on[1] == [249, 1375]  # after half of 1,500 updates more, and of 2,250


def test_what_is_not_finite_never_enters_its_history() -> None:
    rule = StallRule(20)
    for step in range(40):
        rule.update(math.nan if step % 2 else 1.0)
    assert rule.losses == [1.0] * 20
    assert rule.is_flat


def test_the_state_of_a_stall_goes_on_with_another_window() -> None:
    rule, other = StallRule(20), StallRule(40)
    for _ in range(50):
        rule.update(1.0)
    other.load_state_dict(rule.state_dict())
    assert other.updates == 50
    assert other.is_flat is None
    with pytest.raises(ValueError, match="window"):
        StallRule(19)


def test_the_state_of_a_rule_goes_on_as_if_nothing_had_been() -> None:
    losses = losses_of(0.001, 0.05, 700, seed=3)
    whole, resumed = StallRule(40), StallRule(40)
    told: list[list[bool]] = [[], []]
    for step, loss in enumerate(losses):
        if step in (15, 333):
            state = json.loads(json.dumps(resumed.state_dict()))
            assert state == whole.state_dict()
            resumed = StallRule(40)
            resumed.load_state_dict(state)
        for rule, answers in zip((whole, resumed), told, strict=True):
            answers.append(rule.update(loss))
            if answers[-1]:
                rule.charge(3.5)
    assert told[0] == told[1]
    assert sum(told[0]) >= 3
    assert resumed.state_dict() == whole.state_dict()


def test_the_defaults_and_the_bounds_of_a_window() -> None:
    rule = StallRule()
    assert (rule.window, rule.every, rule.spent) == (500, 50, 0)
    assert [step for step in range(1000) if rule.update(1.0)] == [499, 999]
    assert rule.losses == [1.0] * 500
    with pytest.raises(ValueError, match="^window must be a whole number of at least 20, got 19$"):
        StallRule(19)


def test_a_window_that_is_no_multiple_of_ten_is_judged_by_the_newest_blocks() -> None:
    rule = StallRule(29)
    for loss in [9.0] * 9 + [1.0] * 20:
        rule.update(loss)
    assert rule.every == 2
    assert rule.is_flat


def test_smaller_looks_wait_for_a_tenth_of_all_updates() -> None:
    for cost, first in ((4.0, 40), (4.1, 42)):  # a look is at every second update
        rule = StallRule(20)
        rule.charge(cost / 2)
        rule.charge(cost / 2)
        assert next(step for step in range(1, 100) if rule.update(1.0)) == first
