"""The slope of a stretch of a curve, with an interval that its noise does not fool."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_recipes.core.selection import quantile

BLOCKS = 10  # that a slope is fitted to: long enough that the noise of one is not that of the next
BEYOND = 0.975  # one-sided confidence of what is claimed


@dataclass(frozen=True)
class Trend:
    """A straight line through a stretch of a curve.

    Args:
        change: By how much the line rises from the beginning of the stretch to its end.
        error: Half the width of its 95 % interval.
        level: The mean.
    """

    change: float
    error: float
    level: float

    @property
    def falls(self) -> bool:
        """Beyond noise."""
        return self.change + self.error < 0


def trend(values: Sequence[float]) -> Trend:
    """The line through a stretch, with an interval that noise of one value and the next may not fool.

    The values are averaged in ten blocks (or as many as there are values), and the error is that of the blocks' means
    about the line, by Student's t: correlations shorter than a block are in it, and so is a bend.

    Args:
        values: At equal distances, at least 3.

    Example:
        >>> trend([3.0, 2.0, 1.0, 0.0]).change
        -4.0
    """
    blocks = min(BLOCKS, len(values))
    edges = [round(block * len(values) / blocks) for block in range(blocks + 1)]
    means = [statistics.fmean(values[low:high]) for low, high in pairwise(edges)]
    places = [(low + high) / 2 / len(values) for low, high in pairwise(edges)]
    slope, intercept = statistics.linear_regression(places, means)
    left = sum((mean - intercept - slope * place) ** 2 for place, mean in zip(places, means, strict=True))
    middle = statistics.fmean(places)
    error = math.sqrt(left / (blocks - 2) / sum((place - middle) ** 2 for place in places)) if blocks > 2 else math.inf
    return Trend(slope, quantile(blocks - 1, BEYOND) * error, statistics.fmean(values))
