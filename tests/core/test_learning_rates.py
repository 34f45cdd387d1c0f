from typing import Any

import pytest
import torch

from lightning_recipes.core.learning_rates import LearningRates


def two_groups(rates: tuple[Any, Any] = (0.1, 0.02)) -> torch.optim.SGD:
    return torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": rates[0]}, {"params": [torch.zeros(1)], "lr": rates[1]}], momentum=0.9
    )


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def on(optimizer: torch.optim.Optimizer, *factors: Any, **more: Any) -> LearningRates:
    rates = LearningRates()
    for factor in factors:
        rates.lay(factor, **more)
    rates.start(optimizer)
    return rates


def test_the_groups_have_the_product_and_keep_their_ratio() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: 0.5**step, lambda step: 1 / (step + 1))
    for step in range(5):
        factor = 0.5**step / (step + 1)
        assert rates_of(optimizer) == pytest.approx([0.1 * factor, 0.02 * factor])
        rates.update()
    rates.finish()
    assert rates_of(optimizer) == [0.1, 0.02]


def test_whoever_multiplies_or_sets_what_stands_there_is_understood() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: (step + 1) / 4)
    optimizer.param_groups[0]["lr"] *= 0.5
    rates.update()
    assert rates_of(optimizer) == pytest.approx([0.1 * 0.5 * 0.5, 0.02 * 0.5])
    optimizer.param_groups[1]["lr"] = 0.3  # from now on, whatever it was
    rates.update()
    assert rates_of(optimizer) == pytest.approx([0.1 * 0.5 * 0.75, 0.3 / 0.5 * 0.75])
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.75})
    rates.update()
    assert rates_of(optimizer)[2] == pytest.approx(1.0)
    rates.finish()
    assert rates_of(optimizer) == pytest.approx([0.05, 0.6, 1.0])


def test_a_factor_of_zero_loses_nothing() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: float(step != 1))
    rates.update()
    assert rates_of(optimizer) == [0, 0]
    rates.update()
    assert rates_of(optimizer) == [0.1, 0.02]


def test_tensors_stay_the_same_tensors() -> None:
    held = torch.tensor(0.1)
    optimizer = two_groups((held, torch.tensor(0.02)))
    rates = on(optimizer, lambda step: 1 / (step + 1))
    rates.update()
    assert optimizer.param_groups[0]["lr"] is held
    assert rates_of(optimizer) == pytest.approx([0.05, 0.01])
    with rates.unscaled():
        assert rates_of(optimizer) == pytest.approx([0.1, 0.02])
        held.mul_(0.5)
    assert rates_of(optimizer) == pytest.approx([0.025, 0.01])
    rates.finish()
    assert rates_of(optimizer) == pytest.approx([0.05, 0.02])


def test_a_change_before_a_scheduler_is_stepped_is_not_lost() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: 0.5)
    optimizer.param_groups[0]["lr"] *= 3
    with rates.unscaled():
        assert rates_of(optimizer) == pytest.approx([0.3, 0.02])
    assert rates_of(optimizer) == pytest.approx([0.15, 0.01])
    negative = on(two_groups((0.1, -0.2)), lambda step: 0.5)  # as some ascend
    negative.update()
    assert negative.base == [0.1, -0.2]


def test_a_warmup_in_front_holds_everything_else() -> None:
    optimizer = two_groups()
    rates = LearningRates()
    rates.lay(lambda step: 1 / (step + 1), added_steps=1)
    rates.prepend_warmup(3)
    rates.start(optimizer)
    seen, held = [], []
    for _ in range(7):
        seen.append(rates_of(optimizer)[0])
        rates.update()
        held.append(rates.holds_schedulers)
    assert seen == pytest.approx([0.1 * factor for factor in (0.25, 0.5, 0.75, 1, 1 / 2, 1 / 3, 1 / 4)])
    assert held == [True] * 4 + [False] * 3  # asked behind an update


def test_what_was_changed_before_another_factor_is_laid_is_not_lost() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: 0.5)
    optimizer.param_groups[0]["lr"] *= 3
    rates.prepend_warmup(1)
    optimizer.param_groups[1]["lr"] *= 2
    rates.lay(lambda step: 0.1)
    rates.start(optimizer)
    rates.update()
    assert rates_of(optimizer) == pytest.approx([0.3 * 0.5 * 0.1, 0.02 * 2 * 0.5 * 0.1])


@pytest.mark.parametrize("adam", [False, True])
def test_momentum_is_given_back(adam: bool) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1)], betas=(0.9, 0.99)) if adam else two_groups()
    group = optimizer.param_groups[0]
    rates = on(optimizer, lambda step: 1.0, momentum=lambda step: 0.5 + step / 10)
    rates.update()
    rates.start(optimizer)
    assert (group["betas"] if adam else group["momentum"]) == pytest.approx((0.6, 0.99) if adam else 0.6)
    rates.finish()
    assert (group["betas"] if adam else group["momentum"]) == ((0.9, 0.99) if adam else 0.9)


def test_state_is_what_was_seen() -> None:
    optimizer, factor = two_groups(), lambda step: 1 / (step + 1)
    rates = on(optimizer, factor)
    for _ in range(4):
        rates.update()
    resumed, other = LearningRates(), two_groups(tuple(rates_of(optimizer)))  # type: ignore[arg-type]
    resumed.load_state_dict(rates.state_dict())
    resumed.lay(factor)
    resumed.start(other)
    assert rates_of(other) == rates_of(optimizer)
    assert resumed.state_dict() == rates.state_dict() == {"step": 4, "base": [0.1, 0.02]}


def test_a_momentum_that_is_none_is_left_alone() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: 1.0, momentum=lambda step: 0.5 if step == 1 else None)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    rates.update()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5]
    rates.lay(lambda step: 0.5)  # without a momentum of its own
    rates.update()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5]
    rates.finish()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]


def test_a_momentum_begins_behind_its_own_warmup_with_its_factor() -> None:
    optimizer = two_groups()
    rates = LearningRates()
    rates.lay(lambda step: 1.0, added_steps=2, momentum=lambda step: step / 10)
    rates.prepend_warmup(1)
    rates.start(optimizer)
    seen = []
    for _ in range(5):
        seen.append((optimizer.param_groups[0]["momentum"], rates.behind_warmup))
        rates.update()
    assert seen == [(0.0, 0), (0.0, 0), (0.1, 0), (0.2, 0), (0.3, 1)]
    assert rates.added_steps == 3
    rates.prepend_warmup(4)  # in the place of that
    assert rates.added_steps == 6


def test_what_is_over_leaves_nothing_behind() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: 0.5, added_steps=3, momentum=lambda step: 0.5)
    rates.prepend_warmup(2)
    rates.finish()
    assert (rates.added_steps, rates.factor) == (0, 1.0)
    optimizer.param_groups[0]["lr"] = 0.4
    rates.update()
    assert rates_of(optimizer) == [0.4, 0.02]
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_a_group_that_is_added_where_the_factor_is_zero_has_its_own_rate() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: float(step > 0))
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.75})
    rates.update()
    assert rates_of(optimizer) == [0.1, 0.02, 0.75]
    assert rates.base == [0.1, 0.02, 0.75]


def test_a_rate_that_is_set_where_the_factor_is_zero_is_the_new_one() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: float(step > 0))
    optimizer.param_groups[0]["lr"] = 0.3
    rates.update()
    assert rates_of(optimizer) == [0.3, 0.02]


def test_an_error_within_leaves_the_product_in_the_groups() -> None:
    optimizer = two_groups()
    rates = on(optimizer, lambda step: 0.5)
    with pytest.raises(KeyError, match="lrs"), rates.unscaled():
        optimizer.param_groups[0]["lr"] = 0.2 + optimizer.param_groups[1]["lrs"]
    assert rates_of(optimizer) == [0.05, 0.01]
    assert rates.base == [0.1, 0.02]


def test_nothing_is_held_where_there_is_no_warmup() -> None:
    rates = on(two_groups(), lambda step: 0.5)
    assert (rates.holds_schedulers, rates.behind_warmup) == (False, 0)
    rates.update()
    assert (rates.holds_schedulers, rates.behind_warmup) == (False, 1)


def test_a_tensor_takes_what_was_restored_as_a_number() -> None:
    held = torch.tensor(0.1)
    optimizer, rates = two_groups((held, torch.tensor(0.02))), LearningRates()
    rates.load_state_dict({"step": 1, "base": [0.1, 0.02]})
    rates.lay(lambda step: 0.5**step)
    rates.start(optimizer)
    assert rates_of(optimizer) == pytest.approx([0.05, 0.01])
    assert optimizer.param_groups[0]["lr"] is held
    rates.finish()
    assert held.item() == pytest.approx(0.1)


def test_a_tensor_of_a_group_that_is_added_has_the_factor_in_it() -> None:
    optimizer = two_groups((torch.tensor(0.1), torch.tensor(0.02)))
    rates = on(optimizer, lambda step: 0.5)
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": torch.tensor(0.25)})
    rates.update()
    assert rates_of(optimizer) == pytest.approx([0.05, 0.01, 0.25])
    rates.finish()
    assert rates_of(optimizer) == pytest.approx([0.1, 0.02, 0.5])
