from functools import partial

from lightning_recipes.core.clipping import PercentileThreshold
from lightning_recipes.core.per_optimizer import PerOptimizer


def test_each_optimizer_has_a_rule_of_its_own_that_is_restored() -> None:
    rules = PerOptimizer(partial(PercentileThreshold, warmup_steps=0))
    assert rules.update(1.0) == rules.update(9.0, optimizer=2) == float("inf")
    assert (rules.update(5.0), rules.update(5.0, optimizer=2)) == (1.0, 9.0)
    assert list(rules) == [0, 2]

    restored = PerOptimizer(partial(PercentileThreshold, warmup_steps=0))
    restored.update(100.0, optimizer=1)
    restored.load_state_dict(rules.state_dict())
    assert list(restored) == [0, 2]
    assert (restored[0].threshold(), restored[2].threshold()) == (rules[0].threshold(), rules[2].threshold())
