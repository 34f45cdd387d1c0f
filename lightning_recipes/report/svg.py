"""Draw curves and histograms as inline SVG that takes its colours from the page and says what it shows in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from lightning_recipes.report.numbers import labels

FONT = 12  # pixels of all text, where the picture has its own size
CHARACTER = 6.4  # pixels of a character on average
APART = 4  # pixels between the marks of events of one kind, at least
ROOM = 40  # pixels of a legend for which a picture need not be higher
STYLES = 6  # told apart by colour and dashes
SPANS = {1 / 5: 30.0, 1 / 2: 8.0}  # of the highest value over these quantiles, above which the scale is logarithmic


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Args:
        x: Step.
        y: Value.
        low: Lower edge of a band around the line.
        high: Its upper edge.
    """

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A line of a picture.

    Args:
        name: In the legend.
        points: In the order of the steps; those that are not finite are gaps.
        marks: Whether each point has a mark.
    """

    name: str
    points: Sequence[Point]
    marks: bool = False


@dataclass(frozen=True)
class Event:
    """Something that happened at a step.

    Args:
        step: When.
        letter: That stands for its kind.
        label: What it was.
    """

    step: float
    letter: str
    label: str


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels.

    Args:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Pixels.
        end: Pixels.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf

    def ticks(self, most: int, least: float = 0.0) -> list[float]:
        """Round values within, some of them, no closer than ``least``."""
        if self.log:
            return _decades(self.low, self.high, most)
        apart = math.ulp(max(abs(self.low), abs(self.high)))  # what a float can tell
        step = _round_up(max(least, (self.high - self.low) / most, apart))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


@dataclass
class Picture:
    """A picture with axes, to be filled.

    Args:
        key: An id that no other picture of the page has.
        title: Its name.
        description: What it shows, in words.
        width: Pixels.
        height: Pixels, the legend included.
    """

    key: str
    title: str
    description: str
    width: int = 360
    height: int = 220
    parts: list[str] = field(default_factory=list)

    def markup(self) -> Markup:
        """The picture."""
        return Markup(
            f'<svg class="chart" role="img" viewBox="0 0 {self.width} {self.height}"'
            f' aria-labelledby="{self.key}-t {self.key}-d"><title id="{self.key}-t">{escape(self.title)}</title>'
            f'<desc id="{self.key}-d">{escape(self.description)}</desc>{"".join(self.parts)}</svg>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> None:
        """Write."""
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a straight line."""
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def legend(self, names: Sequence[str]) -> float:
        """Write the names of the lines beside samples of them; return where the legend ends."""
        x, y, sample = 8.0, 14.0, 26
        for style, name in enumerate(names):
            room = int((self.width - 24 - sample) / CHARACTER)
            short = name if len(name) <= room else f"{name[: room - 1]}…"
            wide = sample + 6 + len(short) * CHARACTER + 12
            if x > 8 and x + wide > self.width:
                x, y = 8.0, y + FONT + 5
            self.line(f"curve c{style % STYLES}", x, y - 4, x + sample, y - 4)
            self.text(x + sample + 6, y, short)
            x += wide
        return y + 6

    def axes(self, x: Axis, y: Axis, x_label: str, least: float = 0.0) -> None:
        """Draw grid and numbers, those of x no closer than ``least``."""
        heights = y.ticks(max(2, int(abs(y.end - y.start) / 36)))
        for tick, text in zip(heights, labels(heights), strict=True):
            self.line("tick", x.start, y(tick), x.end, y(tick))
            self.text(x.start - 5, y(tick) + 4, text, "end")
        places = x.ticks(max(2, int((x.end - x.start) / 62)), least)
        for tick, text in zip(places, labels(places), strict=True):
            self.line("tick", x(tick), y.start, x(tick), y.start + 4)
            self.text(min(x(tick), self.width - 4 - len(text) * CHARACTER / 2), y.start + 17, text, "middle")
        self.line("axis", x.start, y.start, x.end, y.start)
        self.text(x.end, y.start + 32, x_label, "end", "label quiet")

    def events(self, x: Axis, y: Axis, events: Sequence[Event]) -> None:
        """Mark events by lines with their letters above, where there is room for them."""
        free, last = -math.inf, dict[str, float]()
        for event in sorted(events, key=lambda event: event.step):
            at = x(event.step)
            if at - last.get(event.letter, -math.inf) < APART:
                continue
            last[event.letter] = at
            self.parts.append(f"<g><title>{escape(event.label)}</title>")
            self.line("event", at, y.start, at, y.end)
            if at > free:
                self.text(at, y.end - 3, event.letter, "middle", "label letter")
                free = at + 12
            self.parts.append("</g>")


def chart(
    key: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    events: Sequence[Event] = (),
    guides: Sequence[tuple[float, str]] = (),
    width: int = 360,
    height: int = 220,
    x_label: str = "updates",
    log_x: bool = False,
) -> Markup:
    """Lines over the updates, or whatever else.

    Args:
        key: An id that no other picture of the page has.
        title: Its name.
        description: What it shows, in words.
        lines: With at least one finite point among them.
        events: Marked on the way.
        guides: Values to compare with, and their names.
        width: Pixels.
        height: Pixels.
        x_label: What the lines are over.
        log_x: Whether it is on a logarithmic scale.
    """
    picture = Picture(key, title, description, width, height)
    top = picture.legend([line.name for line in lines])
    height = picture.height = height + max(0, round(top) - ROOM)
    top += FONT + 2 if events else 4
    points = [point for line in lines for point in line.points if math.isfinite(point.y)]
    y_low, y_high, log = _range([(point.low, point.high) for point in points], [value for value, _ in guides])
    y = Axis(y_low, y_high, height - 38, top, log)
    heights = labels(y.ticks(max(2, int(abs(y.end - y.start) / 36))))
    left = 10 + CHARACTER * max((len(label) for label in heights), default=1)
    steps = [point.x for point in points]
    least = max(1.0, abs(min(steps)) * 1e-9)  # that a float can tell from the first step
    x = Axis(min(steps), max(*steps, min(steps) + least), left, width - 10, log_x)
    picture.axes(x, y, x_label, least=1)
    for value, _ in guides:
        picture.line("guide", x.start, y(value), x.end, y(value))
    picture.events(x, y, [event for event in events if x.low <= event.step <= x.high])
    for style, line in enumerate(lines):
        _draw(picture, line, style % STYLES, x, y)
    for value, name in guides:
        picture.text(x.end, y(value) - 3, name, "end", "label quiet")
    return picture.markup()


def histogram(
    key: str, title: str, description: str, bins: Sequence[tuple[float, float, float]], width: int = 360
) -> Markup:
    """Bars of ``(lower edge, upper edge, count)``; edges that are all positive are on a logarithmic scale."""
    height = 200
    picture = Picture(key, title, description, width, height)
    low, high, log = _range([(each[0], each[1]) for each in bins], (), pad=False)
    x = Axis(low, high, 46, width - 10, log)
    y = Axis(0, max(count for *_, count in bins) * 1.05, height - 38, 12)
    picture.axes(x, y, title)
    for lower, upper, count in bins:
        left, right = x(lower), x(upper)
        picture.parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y(count):.1f}" width="{max(0.5, right - left - 0.5):.1f}"'
            f' height="{max(0.0, y.start - y(count)):.1f}"/>'
        )
    return picture.markup()


def _draw(picture: Picture, line: Line, style: int, x: Axis, y: Axis) -> None:
    for part in _unbroken(line.points):
        if any(point.high > point.low for point in part):
            upper = [f"{x(point.x):.1f},{y(point.high):.1f}" for point in part]
            lower = [f"{x(point.x):.1f},{y(point.low):.1f}" for point in reversed(part)]
            picture.parts.append(f'<polygon class="band c{style}" points="{" ".join(upper + lower)}"/>')
        places = [(x(point.x), y(point.y)) for point in part]
        if len(places) > 1:
            path = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
            picture.parts.append(f'<polyline class="curve c{style}" points="{path}"/>')
        if line.marks or len(places) == 1:
            for left, top in places if len(places) <= 60 else ():
                picture.parts.append(f'<circle class="mark c{style}" cx="{left:.1f}" cy="{top:.1f}" r="2.5"/>')


def _unbroken(points: Sequence[Point]) -> list[list[Point]]:
    parts: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.y):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _range(
    spans: Sequence[tuple[float, float]], guides: Sequence[float], pad: bool = True
) -> tuple[float, float, bool]:
    """The lowest and the highest value to show, and whether on a logarithmic scale."""
    low = min([*(low for low, _ in spans), *guides])
    high = max([*(high for _, high in spans), *guides])
    if low > 0:
        lows = sorted(low for low, _ in spans)
        if any(high / lows[int(len(lows) * quantile)] > span for quantile, span in SPANS.items()):
            return (low / 1.15, high * 1.15, True) if pad else (low, high, True)
    margin = 0.05 * (high - low) if high > low else 0.5 * abs(high) or 1.0
    return (low - margin, high + margin, False) if pad or high == low else (low, high, False)


def _round_up(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _decades(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**power for power in range(first, last + 1) for f in factors if low <= f * 10.0**power <= high]
        if len(ticks) <= most:
            return ticks
    every = math.ceil(len(ticks) / most)
    return ticks[::every]
