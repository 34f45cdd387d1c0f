from functools import partial
from typing import Any

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


def test_a_rule_is_asked_with_all_that_was_measured() -> None:
    class Notes:
        def __init__(self) -> None:
            self.asked: list[object] = []

        def update(self, *measured: float, **more: float) -> int:
            self.asked.append((measured, more))
            return len(self.asked)

        def state_dict(self) -> dict[str, object]:
            return {"asked": self.asked}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.asked = state_dict["asked"]

    rules = PerOptimizer(Notes)
    assert (rules.update(1.0, 2.0, share=0.5), rules.update(optimizer=3), rules.update(4.0)) == (1, 1, 2)
    assert rules.state_dict() == {0: {"asked": [((1.0, 2.0), {"share": 0.5}), ((4.0,), {})]}, 3: {"asked": [((), {})]}}
