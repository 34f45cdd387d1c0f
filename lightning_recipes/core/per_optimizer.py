"""One rule for each optimizer of a training."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar


class Rule(Protocol):
    """What learns from a training: asked with ``update``, saved and restored with the other two."""

    @property
    def update(self) -> Callable[..., Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


RuleT = TypeVar("RuleT", bound=Rule)


class PerOptimizer(Generic[RuleT]):
    """Rules of one kind, one for each optimizer, made when first asked for.

    Args:
        make: Makes the rule of one optimizer.

    Example:
        >>> from functools import partial
        >>> from lightning_recipes.core.clipping import PercentileThreshold
        >>> rules = PerOptimizer(partial(PercentileThreshold, warmup_steps=0))
        >>> rules.update(1.0), rules.update(5.0), rules.update(3.0, optimizer=1)
        (inf, 1.0, inf)
        >>> rules[0].count, rules[1].count
        (2, 1)
    """

    def __init__(self, make: Callable[[], RuleT]) -> None:
        self.make = make
        self.rules: dict[int, RuleT] = {}

    def __getitem__(self, optimizer: int) -> RuleT:
        if optimizer not in self.rules:
            self.rules[optimizer] = self.make()
        return self.rules[optimizer]

    def __iter__(self) -> Iterator[int]:
        """The optimizers that have a rule, in order."""
        return iter(sorted(self.rules))

    def update(self, *measured: Any, optimizer: int = 0, **more: Any) -> Any:
        """Ask the rule of ``optimizer``."""
        return self[optimizer].update(*measured, **more)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        return {optimizer: self.rules[optimizer].state_dict() for optimizer in self}

    def load_state_dict(self, state_dict: dict[int, dict[str, Any]]) -> None:
        self.rules = {optimizer: self[optimizer] for optimizer in state_dict}
        for optimizer, state in state_dict.items():
            self[optimizer].load_state_dict(state)
