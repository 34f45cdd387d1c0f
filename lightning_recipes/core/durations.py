"""Durations as people say them: ``500``, ``"2 epochs"``, ``"0.1 of the run"``, ``"10%"`` or just ``0.1``."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lightning_recipes.core.arguments import check_real

_AMOUNT = r"(?P<amount>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_UNIT = r"(?P<unit>updates?|steps?|epochs?|of the run|%(?: of the run)?)"
_PATTERN = re.compile(rf"{_AMOUNT}(?:\s*{_UNIT})?", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A length of training in updates, in epochs or as a share of the run."""

    amount: float
    unit: Literal["updates", "epochs", "runs"]

    def in_updates(self, updates_per_epoch: float, updates_per_run: float) -> float:
        """The duration in optimizer updates.

        Args:
            updates_per_epoch: Updates of one epoch; may be infinite or -1 where nobody knows.
            updates_per_run: Updates of the whole run; likewise.

        Raises:
            ValueError: If the unit's length is not known.

        Example:
            >>> parse_duration("half_life", "2 epochs").in_updates(updates_per_epoch=50, updates_per_run=1000)
            100.0
        """
        length = {"updates": 1.0, "epochs": updates_per_epoch, "runs": updates_per_run}[self.unit]
        if not 0 < length < math.inf:
            raise ValueError(
                f"'{self.text}' needs the length of {'an epoch' if self.unit == 'epochs' else 'the run'}, which is not"
                " known here (a loader without length, or no max_steps): give it in updates"
            )
        return self.amount * length

    @property
    def text(self) -> str:
        """The duration in the words that :func:`parse_duration` reads."""
        return f"{self.amount:g} {'of the run' if self.unit == 'runs' else self.unit}"


def parse_duration(name: str, value: float | str) -> Duration:
    """Read a duration: a number of updates, ``"500 updates"``, ``"2 epochs"`` or ``"0.1 of the run"``.

    A number below 1 is a share of the run, and so is ``"10%"``.

    Args:
        name: The argument it was given as, for the error.
        value: What was given; "steps" is read as "updates".

    Raises:
        TypeError: If it is neither a number nor a string.
        ValueError: If it is not positive or its words are not understood.

    Example:
        >>> parse_duration("half_life", "0.1 of the run")
        Duration(amount=0.1, unit='runs')
        >>> parse_duration("half_life", "2 weeks")
        Traceback (most recent call last):
            ...
        ValueError: half_life must be a number of updates, '2 epochs' or '0.1 of the run', got '2 weeks'
    """
    return _read(name, value if isinstance(value, (str, int, float)) else check_real(name, value, 0, math.inf))


@lru_cache(maxsize=256, typed=True)  # schedules ask at every step
def _read(name: str, value: float | str) -> Duration:
    if not isinstance(value, str):
        amount = check_real(name, value, 0, math.inf)
        return Duration(amount, "runs" if amount < 1 else "updates")
    match = _PATTERN.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{name} must be a number of updates, '2 epochs' or '0.1 of the run', got {value!r}")
    share = (match["unit"] or "").startswith("%")
    amount = check_real(name, float(match["amount"]) / (100 if share else 1), 0, math.inf)
    word = (match["unit"] or ("updates" if amount >= 1 else "of the run")).lower()
    of_the_run = word.endswith(("%", "of the run"))
    return Duration(amount, "epochs" if word.startswith("epoch") else "runs" if of_the_run else "updates")
