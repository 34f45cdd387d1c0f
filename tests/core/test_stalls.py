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
