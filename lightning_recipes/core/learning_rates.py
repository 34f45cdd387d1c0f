"""Learning rates of an optimizer, in any training loop: the product of what they are by themselves and of factors."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_recipes.core.schedules import warmth


class LearningRates:
    """The learning rates of an optimizer: what they would be by themselves, times the factors laid on them.

    The parameter groups have the product. Whoever multiplies or sets what stands there meanwhile is understood: the
    rates by themselves change by the same ratio. A learning rate scheduler, which computes the next one from the last,
    is stepped within :meth:`unscaled`.

    Attributes:
        step: Updates done.
        base: Learning rate of each group by itself.
        added_steps: Updates that a warmup in front of everything has, all together.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> rates = LearningRates()
        >>> rates.lay(lambda step: 1 / (1 + step))
        >>> rates.start(optimizer)
        >>> for _ in range(3):
        ...     optimizer.step()
        ...     rates.update()
        >>> optimizer.param_groups[0]["lr"]
        0.025
    """

    def __init__(self) -> None:
        self.step = 0
        self.base: list[Any] = []
        self.added_steps = 0
        self._optimizer: Optimizer | None = None
        self._momenta: list[Any] = []  # by themselves
        self._warmup_steps = 0
        self._curves: list[tuple[Callable[[int], float], int]] = []
        self._momentum: tuple[Callable[[int], float | None], int] | None = None
        self._written = 1.0  # the factor that the groups have

    def lay(
        self,
        factor: Callable[[int], float],
        added_steps: int = 0,
        momentum: Callable[[int], float | None] | None = None,
    ) -> None:
        """Lay a factor, a function of the step, on the learning rates.

        Args:
            factor: Of the base learning rate, for the update number ``step``.
            added_steps: Within so many updates, those of a warmup, neither the schedulers nor other factors move.
            momentum: Of the update number ``step``.
        """
        self._read()
        self._curves.append((factor, added_steps))
        self.added_steps += added_steps
        self._momentum = self._momentum if momentum is None else (momentum, added_steps)
        self._write()

    def prepend_warmup(self, warmup_steps: int) -> None:
        """Have everything begin only after a warmup."""
        self._read()
        self.added_steps += warmup_steps - self._warmup_steps
        self._warmup_steps = warmup_steps
        self._write()

    @property
    def behind_warmup(self) -> int:
        """Updates done since the warmup in front of everything."""
        return self._behind(0)

    def _behind(self, own: int) -> int:
        """Likewise, but for ``own`` updates of a warmup."""
        return max(0, self.step - (self.added_steps - own))

    @property
    def holds_schedulers(self) -> bool:
        """Whether the update just made was one of a warmup in front of what the schedulers do."""
        return 0 < self.step <= self.added_steps

    @property
    def factor(self) -> float:
        """Of the next update."""
        factors = [curve(self._behind(added)) for curve, added in self._curves]
        return math.prod(factors, start=warmth(self.step, self._warmup_steps))

    def start(self, optimizer: Optimizer) -> None:
        """Begin, or go on with what was loaded; again after another was laid."""
        self._optimizer, groups = optimizer, optimizer.param_groups
        self.base = self.base[: len(groups)] + [_copied(group["lr"]) for group in groups[len(self.base) :]]
        self._momenta = self._momenta or [(group.get("momentum"), group.get("betas")) for group in groups]
        self._write()

    def update(self) -> None:
        """An update was made: have the groups ready for the next one."""
        self._read()
        self.step += 1
        self._write()

    @contextmanager
    def unscaled(self) -> Iterator[None]:
        """Within the context the groups have the learning rates by themselves; what is left there is the new base."""
        self._read()
        for group, base in zip(self._groups, self.base, strict=True):
            _set(group, base)
        try:
            yield
        finally:
            self.base = [_copied(group["lr"]) for group in self._groups]
            self._write()

    def finish(self) -> None:
        """Leave the groups with the learning rates and momenta that they have by themselves."""
        self._read()
        for group, base in zip(self._groups, self.base, strict=True):
            _set(group, base)
        if self._momentum is not None:
            for group, (momentum, betas) in zip(self._groups, self._momenta, strict=False):
                group.update({} if momentum is None else {"momentum": momentum})
                group.update({} if betas is None else {"betas": betas})
        self._optimizer, self._curves, self._momentum, self._momenta = None, [], None, []
        self._warmup_steps = self.added_steps = 0

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """Asked for each time: an optimizer that loads a state has new ones."""
        return [] if self._optimizer is None else self._optimizer.param_groups

    def _read(self) -> None:
        """Understand what was changed since the groups were written."""
        factor = self._written
        for index, group in enumerate(self._groups):
            if index == len(self.base):  # a group was added
                self.base.append(_copied(group["lr"]) if factor == 0 else group["lr"] / factor)
            rate, base = group["lr"], self.base[index]
            if isinstance(rate, Tensor) or rate == base * factor:
                continue  # a tensor is not compared, which would wait for its device
            self.base[index] = rate if base * factor == 0 else base * (rate / (base * factor))

    def _write(self) -> None:
        if self._optimizer is None:
            return
        factor = self._written = self.factor
        for group, base in zip(self._groups, self.base, strict=True):
            _set(group, base * factor)
        if self._momentum is not None:
            curve, added = self._momentum
            momentum = curve(self._behind(added))
            for group in self._groups if momentum is not None else ():
                if "momentum" in group:
                    group["momentum"] = momentum
                else:
                    group["betas"] = (momentum, *group["betas"][1:])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "base": [float(base) for base in self.base]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.base = state_dict["step"], list(state_dict["base"])
        self._written = self.factor  # the groups are restored as well


def _copied(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
    else:
        group["lr"] = rate
