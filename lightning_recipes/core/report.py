"""Remember the whole course of a training in bounded memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

BINS = 256  # of a series at most, at least half as many once there are more points
NAMES = 256  # series at most


@dataclass(slots=True)
class Bin:
    """Some points of a series that follow each other; those that are not finite are only counted.

    Args:
        first: Step of the first point.
        last: Step of the last one.
        count: Points that are finite.
        mean: Of them.
        squares: Sum of their squared distances from the mean.
        low: The lowest.
        high: The highest.
        bad: Points that are not finite.
    """

    first: int
    last: int
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = 0.0
    high: float = 0.0
    bad: int = 0

    @property
    def step(self) -> float:
        """The middle."""
        return (self.first + self.last) / 2

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 of a single point."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def merge(self, other: "Bin") -> None:
        """Take in what follows."""
        self.last, self.bad = other.last, self.bad + other.bad
        if not other.count:
            return
        if not self.count:
            self.low, self.high = other.low, other.high
        count, shift = self.count + other.count, other.mean - self.mean
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.squares += other.squares + shift**2 * self.count * other.count / count
        self.mean += shift * other.count / count
        self.count = count


class Series:
    """Points (step, value) in at most 256 bins of the same number of points, which doubles when they are full.

    A point at an earlier step than the last one means that the training has gone back: what was remembered from there
    on is forgotten, by whole bins.

    Example:
        >>> series = Series()
        >>> for step in range(1000):
        ...     back = series.update(step, 1 / (1 + step))
        >>> len(series.bins), series.width, series.bins[0].high, series.bins[-1].last
        (250, 4, 1.0, 999)
    """

    def __init__(self) -> None:
        self.bins: list[Bin] = []
        self.width = 1

    def update(self, step: int, value: float) -> bool:
        """Remember a point; return whether the training has gone back."""
        back = bool(self.bins) and step < self.bins[-1].last
        while self.bins and back and self.bins[-1].last >= step:
            self.bins.pop()
        point = Bin(step, step, 1, value, 0.0, value, value) if _holds(value) else Bin(step, step, bad=1)
        if self.bins and self.bins[-1].count + self.bins[-1].bad < self.width:
            self.bins[-1].merge(point)
            return back
        if len(self.bins) == BINS:
            self.bins = _pairs(self.bins)
            self.width *= 2
        self.bins.append(point)
        return back

    def coarse(self, most: int) -> list[Bin]:
        """The course in at most so many bins."""
        bins = self.bins
        while len(bins) > most:
            bins = _pairs(bins)
        return bins

    @property
    def bad(self) -> int:
        """Points that were not finite."""
        return sum(each.bad for each in self.bins)

    def as_rows(self) -> list[list[float]]:
        """The bins as plain numbers, all of them finite."""
        return [[b.first, b.last, b.count, b.mean, b.squares, b.low, b.high, b.bad] for b in self.bins]

    @classmethod
    def of_rows(cls, rows: list[list[float]], width: int) -> "Series":
        """What :meth:`as_rows` gave."""
        series = cls()
        series.width = width
        for first, last, count, mean, squares, low, high, bad in rows:
            series.bins.append(Bin(int(first), int(last), int(count), mean, squares, low, high, int(bad)))
        return series


class Record:
    """The series of a training by their names, 256 of them at most.

    Example:
        >>> record = Record()
        >>> record.update("val_loss", 100, 0.5)
        >>> list(record)
        ['val_loss']
    """

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.left_out = 0  # points of further names

    def __iter__(self) -> Iterator[str]:
        return iter(self.series)

    def update(self, name: str, step: int, value: float) -> None:
        """Remember a value."""
        if name not in self.series and len(self.series) >= NAMES:
            self.left_out += 1
            return
        self.series.setdefault(name, Series()).update(step, value)

    def state_dict(self) -> dict[str, Any]:
        return {
            "series": {
                name: {"width": series.width, "bins": torch.tensor(series.as_rows(), dtype=torch.float64)}
                for name, series in self.series.items()
            },
            "left_out": self.left_out,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.series = {
            name: Series.of_rows(state["bins"].tolist(), state["width"]) for name, state in state_dict["series"].items()
        }
        self.left_out = state_dict["left_out"]


def _holds(value: float) -> bool:
    """Whether it is finite, and its square too."""
    return abs(value) < 1e150


def _pairs(bins: list[Bin]) -> list[Bin]:
    """Each two neighbours as one."""
    merged = [Bin(b.first, b.last, b.count, b.mean, b.squares, b.low, b.high, b.bad) for b in bins[::2]]
    for one, other in zip(merged, bins[1::2], strict=False):
        one.merge(other)
    return merged
