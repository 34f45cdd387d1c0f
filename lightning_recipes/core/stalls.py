"""When a training loss has stopped falling, and looking at why is worth its price."""

import math
import statistics
from typing import Any

from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.early_stopping import noise_of

BLOCKS = 10  # whose means tell a trend from noise
FLAT = 2  # standard errors by which the loss has to have fallen
SHARE = 0.1  # of all updates that looks may cost, before the next one


class StallRule:
    """Says when a training loss has stopped falling.

    The losses of the last ``window`` updates are split into ten blocks. The loss has stalled if the mean of the newer
    five is below that of the older five by less than two standard errors, the noise of a block being that of the
    blocks' second differences, which no trend touches.

    The next stall is told after ``window`` updates, or half of all so far if these are more, and not before what was
    done about the last ones (see :meth:`charge`) is a tenth of all updates at most.

    Attributes:
        losses: The last ones, finite all.
        every: Updates from one look at the losses to the next, a block.
        updates: Losses seen in all.
        spent: Updates that could have been made instead.

    Args:
        window: Updates, at least 20.

    Example:
        >>> rule = StallRule(window=20)
        >>> any(rule.update(5 - 0.1 * step) for step in range(30)), any(rule.update(2.0) for step in range(30))
        (False, True)
    """

    def __init__(self, window: int = 500) -> None:
        self.window = check_count("window", window, 2 * BLOCKS)
        self.every = self.window // BLOCKS
        self.losses: list[float] = []
        self.updates, self.spent = 0, 0.0
        self._next = self.window  # not told before

    @property
    def is_flat(self) -> bool | None:
        """Whether the loss has stalled; None of too few losses."""
        if len(self.losses) < self.window:
            return None
        recent = self.losses[-self.every * BLOCKS :]
        means = [statistics.fmean(recent[start : start + self.every]) for start in range(0, len(recent), self.every)]
        older, newer = statistics.fmean(means[: BLOCKS // 2]), statistics.fmean(means[BLOCKS // 2 :])
        error = noise_of(means) * math.sqrt(2 / (BLOCKS // 2))
        return older - newer <= max(FLAT * error, 1e-4 * abs(older))

    def update(self, loss: float) -> bool:
        """Take in the loss of an update; whether it is time to look."""
        self.updates += 1
        if math.isfinite(loss):
            self.losses.append(loss)
            del self.losses[: -self.window]
        is_early = self.updates < max(self._next, self.spent / SHARE)
        if is_early or self.updates % self.every or not self.is_flat:
            return False
        self._next = self.updates + max(self.window, self.updates // 2)
        return True

    def charge(self, updates: float) -> None:
        """Put down that something was done at the cost of so many updates."""
        self.spent += updates

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "updates": self.updates, "spent": self.spent, "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.updates = list(state_dict["losses"])[-self.window :], state_dict["updates"]
        self.spent, self._next = state_dict["spent"], state_dict["next"]
