"""A running curve: the whole course of a value in bounded memory, as mean, spread and range."""

import math
from dataclasses import astuple, dataclass, replace

BINS = 256  # of a series at most, unless said otherwise; at least half as many once there are more points


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
        low_at: Step of the lowest.
        high_at: Step of the highest.
    """

    first: int
    last: int
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = 0.0
    high: float = 0.0
    bad: int = 0
    low_at: int = 0
    high_at: int = 0

    @property
    def step(self) -> float:
        """The middle."""
        return (self.first + self.last) / 2

    @property
    def points(self) -> int:
        """How many, finite or not."""
        return self.count + self.bad

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 of a single point."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def merge(self, other: "Bin") -> None:
        """Take in what follows (Chan's update of mean and squares)."""
        self.last, self.bad = other.last, self.bad + other.bad
        if not other.count:
            return
        if not self.count or other.low < self.low:
            self.low, self.low_at = other.low, other.low_at
        if not self.count or other.high > self.high:
            self.high, self.high_at = other.high, other.high_at
        count, shift = self.count + other.count, other.mean - self.mean
        self.squares += other.squares + shift**2 * self.count * other.count / count
        self.mean += shift * other.count / count
        self.count = count


class Series:
    """Points (step, value) in at most 256 bins of the same number of points, which doubles when they are full.

    A point at an earlier step than the last one means that the training has gone back: what was remembered from there
    on is forgotten, by whole bins.

    Attributes:
        bins: In order; all have ``width`` points, the last one may have fewer.
        width: Points of a bin.
        newest: The last value; None if it was not finite, or there is none.

    Args:
        most: Bins at most, an even number.

    Example:
        >>> series = Series()
        >>> for step in range(1000):
        ...     back = series.update(step, 1 / (1 + step))
        >>> len(series.bins), series.width, series.bins[0].high, series.bins[-1].last
        (250, 4, 1.0, 999)
    """

    def __init__(self, most: int = BINS) -> None:
        self.most = most
        self.bins: list[Bin] = []
        self.width = 1
        self.newest: float | None = None

    def update(self, step: int, value: float) -> bool:
        """Remember a point; return whether the training has gone back."""
        point = bin_of(step, value)
        self.newest = value if point.count else None
        back = bool(self.bins) and step < self.bins[-1].last
        if back:
            self.forget(step)
        if self.bins and self.bins[-1].points < self.width:
            self.bins[-1].merge(point)
            return back
        if len(self.bins) == self.most:
            self.bins = _pairs(self.bins)
            self.width *= 2
        self.bins.append(point)
        return back

    def forget(self, step: int) -> None:
        """Forget what was remembered from a step on, by whole bins."""
        while self.bins and self.bins[-1].last >= step:
            self.bins.pop()

    def coarse(self, most: int) -> list[Bin]:
        """The course in at most so many bins."""
        bins = self.bins
        while len(bins) > most:
            bins = _pairs(bins)
        return bins

    @property
    def points(self) -> int:
        """How many are remembered, finite or not."""
        return (len(self.bins) - 1) * self.width + self.bins[-1].points if self.bins else 0

    @property
    def count(self) -> int:
        """Those that are finite."""
        return sum(each.count for each in self.bins)

    @property
    def bad(self) -> int:
        """Those that are not."""
        return sum(each.bad for each in self.bins)

    def as_rows(self) -> list[list[float]]:
        """The bins as plain numbers, all of them finite."""
        return [list(astuple(each)) for each in self.bins]

    @classmethod
    def of_rows(cls, rows: list[list[float]], width: int, most: int = BINS, newest: float | None = None) -> "Series":
        """What :meth:`as_rows` gave."""
        series = cls(most)
        series.width, series.newest = width, newest
        for row in rows:
            first, last, count, bad, low_at, high_at = (int(each) for each in (*row[:3], *row[7:]))
            mean, squares, low, high = (float(each) for each in row[3:7])
            series.bins.append(Bin(first, last, count, mean, squares, low, high, bad, low_at, high_at))
        return series


def bin_of(step: int, value: float) -> Bin:
    """One point; it counts as finite if its square is, too."""
    if abs(value) < 1e150:
        return Bin(step, step, 1, value, 0.0, value, value, low_at=step, high_at=step)
    return Bin(step, step, bad=1)


def _pairs(bins: list[Bin]) -> list[Bin]:
    """Each two neighbours as one."""
    merged = [replace(each) for each in bins[::2]]
    for one, other in zip(merged, bins[1::2], strict=False):
        one.merge(other)
    return merged
