"""Whether the loss does the same in each epoch: the sign of data that come in the same order."""

import math
import statistics
from dataclasses import astuple, dataclass
from typing import Any

from lightning_recipes.core.series import Bin, bin_of

PHASES = 8  # of an epoch
EPOCHS = 10  # whose losses by phase are kept
ENOUGH = 6  # epochs of which a period is told


@dataclass(frozen=True)
class Period:
    """The pattern that the epochs share.

    Args:
        size: Range of its mean.
        chance: How well the directions of the patterns agree, whatever their sizes (Rayleigh's test): by chance
            distributed about as chi-squared with 6 degrees of freedom.
        neighbours: Ratio of variances between the eighths of an epoch and within them: about 1 unless batches that
            follow each other are alike.
    """

    size: float
    chance: float
    neighbours: float


class EpochProfile:
    """What the loss does within an epoch, of the last ten: means over eighths of the epoch, less their straight line.

    Where data are shuffled nothing but chance is left of that; where each epoch has the same order, the same pattern.
    """

    def __init__(self) -> None:
        self.profiles: list[list[float]] = []
        self.between: list[float] = []  # of each epoch: the variance of the eighths' means, times the batches of one,
        self.within: list[float] = []  # and that of the losses in an eighth: alike if neighbours are not
        self.eighths = [Bin(0, 0) for _ in range(PHASES)]
        self.place = 0.0

    def add(self, loss: float, place: float) -> None:
        """Take in a loss.

        Args:
            loss: A number that is finite, or it is left out.
            place: In the epoch, from 0 to below 1; NaN if its length is not known.
        """
        if math.isnan(place):
            return
        if place < self.place:
            self._end_epoch()
        self.place = place
        if math.isfinite(loss):
            self.eighths[min(PHASES - 1, int(place * PHASES))].merge(bin_of(0, loss))

    def _end_epoch(self) -> None:
        eighths, self.eighths = self.eighths, [Bin(0, 0) for _ in range(PHASES)]
        losses = sum(each.count for each in eighths)
        if min(each.count for each in eighths) == 0 or losses == PHASES:
            return
        means = [each.mean for each in eighths]
        slope, intercept = statistics.linear_regression(range(PHASES), means)
        profile = [mean - intercept - slope * phase for phase, mean in enumerate(means)]
        self.profiles.append(profile)
        self.between.append(losses / PHASES * sum(value**2 for value in profile) / (PHASES - 2))
        self.within.append(sum(each.squares for each in eighths) / (losses - PHASES))
        for kept in (self.profiles, self.between, self.within):
            del kept[:-EPOCHS]

    def period(self) -> Period | None:
        """What the epochs have in common; None of fewer than six."""
        lengths = [math.sqrt(sum(value**2 for value in profile)) for profile in self.profiles]
        epochs = sum(length > 0 for length in lengths)
        if epochs < ENOUGH:
            return None
        units = [
            [value / length for value in each] for each, length in zip(self.profiles, lengths, strict=True) if length
        ]
        shared = sum(statistics.fmean(phase) ** 2 for phase in zip(*units, strict=True))
        pattern = [statistics.fmean(phase) for phase in zip(*self.profiles, strict=True)]
        within = statistics.fmean(self.within)
        return Period(
            size=max(pattern) - min(pattern),
            chance=(PHASES - 2) * epochs * shared,
            neighbours=statistics.fmean(self.between) / within if within else math.inf,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "profiles": [list(profile) for profile in self.profiles],
            "between": list(self.between),
            "within": list(self.within),
            "eighths": [list(astuple(each)) for each in self.eighths],
            "place": self.place,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.profiles = [list(profile) for profile in state_dict["profiles"]]
        self.between, self.within = list(state_dict["between"]), list(state_dict["within"])
        self.eighths = [Bin(*each) for each in state_dict["eighths"]]
        self.place = state_dict["place"]
