"""One page of a run, as HTML that needs nothing else, and as Markdown."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from lightning_recipes.core.files import put
from lightning_recipes.core.names import split
from lightning_recipes.core.series import Series
from lightning_recipes.report import story
from lightning_recipes.report.numbers import shown
from lightning_recipes.report.run import STEP_LOSS, Run
from lightning_recipes.report.svg import STYLES, Event, Line, Point, chart, histogram

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE, TEXT = "report.html", "report.md"
HEALTHY = (1e-3, "about 0.001 is healthy")
COARSE = 80  # bins of the loss of every step, for mean and spread
SHOWN = 36  # small pictures at most
DRAWN = 4 * STYLES  # lines of a kind at most
SPARKS = "▁▂▃▄▅▆▇█"
UNSEEN = ("epoch", "step", "hp_metric")


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Args:
        title: Its name.
        pictures: For a wide and for a narrow screen; the same one twice if it is small.
        sentences: What it shows: a sentence for each series.
        sparks: The course of each series in characters, by name.
    """

    title: str
    pictures: tuple[Markup, Markup]
    sentences: Sequence[str]
    sparks: Mapping[str, str]


def render(run: Run, written: str = "") -> tuple[str, str]:
    """The page as HTML and as Markdown.

    Args:
        run: What is known.
        written: When, for people.
    """
    values = {"run": run, "written": written, **_content(run)}
    templates = _templates()
    html = templates.get_template("template.html").render(values)
    markdown = templates.get_template("template.md").render(values)
    return html, re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"


def write(run: Run, folder: Path, written: str = "") -> Path:
    """Write ``report.html`` and ``report.md`` at once, so that a reader never sees half a page; return the first."""
    html, markdown = render(run, written)
    put(folder / TEXT, markdown)
    put(folder / PAGE, html)
    return folder / PAGE


def _content(run: Run) -> dict[str, object]:
    series = {name: each for name, each in run.series.items() if each.bins and not _unseen(name, each)}
    rates = {name: each for name, each in series.items() if _is_rate(name)}
    gradients = {name: each for name, each in series.items() if name.startswith(("grad_norm", "clipped_fraction"))}
    updates = {name: each for name, each in series.items() if name.startswith("update_ratio")}
    ensemble = {name: each for name, each in series.items() if name.startswith("ensemble/")}
    taken = {*rates, *gradients, *updates, *ensemble}
    others = {name: each for name, each in series.items() if name not in taken}
    happened = story.events(run, rates)
    main, rest = _main(others)
    changes = [event for event in happened if event.letter in "CPRU"]
    draw = _Drawer()
    curves = [draw(main.title, {name: others[name] for name in main.names}, happened, wide=True)] if main else []
    small = [draw(panel.title, {name: others[name] for name in panel.names}, happened) for panel in rest[:SHOWN]]
    left_out = [name for panel in rest[SHOWN:] for name in panel.names]
    norms = [name for name in gradients if name.startswith("grad_norm")]
    left_out += [name for names in (norms, [*updates], [*rates]) for name in names[DRAWN:]]
    return {
        "verdict": story.verdict(run),
        "severity": story.severity(run),
        "groups": story.group(run.findings),
        "key": story.key_of(happened),
        "curves": [each for each in curves if each],
        "small": [each for each in small if each],
        "left_out": left_out,
        "broken": [name for name, each in series.items() if not any(b.count for b in each.bins)],
        "gradients": _gradients(draw, run, gradients, happened),
        "updates": [*_in_parts(draw, "Update over weight, ‖Δw‖ / ‖w‖", updates, (HEALTHY,))],
        "rates": [*_in_parts(draw, "Learning rate as applied", rates, (), changes)],
        "ensemble": _table(run.ensemble),
        "members": ensemble and [story.describe(name, each) for name, each in ensemble.items()],
        "words": _words(run.ensemble),
    }


class _Drawer:
    """Draws figures, each with a key of its own."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(
        self,
        title: str,
        series: Mapping[str, Series],
        events: Sequence[Event] = (),
        guides: Sequence[tuple[float, str]] = (),
        wide: bool = False,
    ) -> Figure | None:
        """A figure of series on the same axes; None if there is nothing to draw."""
        lines = [_line(name, each) for name, each in series.items() if any(b.count for b in each.bins)]
        if not lines:
            return None
        sentences = [story.describe(name, each) for name, each in series.items()]
        words = " ".join([f"Lines over the updates: {', '.join(line.name for line in lines)}.", *sentences])
        words += f" Marked: {'; '.join(label for _, label in story.key_of(events))}." if events else ""
        narrow = chart(self.key(), title, words, lines, events, guides, height=240 if wide else 220)
        broad = chart(self.key(), title, words, lines, events, guides, 960, 340) if wide else narrow
        sparks = {name: _spark(each) for name, each in series.items()}
        return Figure(title, (broad, narrow), sentences, sparks)

    def key(self) -> str:
        """An id."""
        self.drawn += 1
        return f"p{self.drawn}"


def _main(series: Mapping[str, Series]) -> tuple[story.Panel | None, list[story.Panel]]:
    """The panel of the loss, and the others."""
    panels = story.panels(series)
    own = [STEP_LOSS] if STEP_LOSS in series else []
    panels = [panel for panel in panels if STEP_LOSS not in panel.names]
    both = [panel for panel in panels if {"train", "val"} <= {split(name) for name in panel.names}]
    losses = [panel for panel in panels if panel.title == "loss"]
    losses += [panel for panel in panels if panel.title.endswith(" loss")]
    chosen = [*losses[:1], *([] if own else [*both, *panels])][:1]
    names = list(chosen[0].names) if chosen else []
    same = [name for name in names if own and split(name) in ("train", "")]  # the loss of every step says more
    names = [*own, *(name for name in names if name not in same)][:STYLES]
    if not names:
        return None, []
    title = "Loss" if own or chosen[0].title == "loss" else chosen[0].title
    rest = [panel for panel in panels if panel not in chosen]
    beside = [name for panel in chosen for name in panel.names if name not in names]
    if beside:
        rest.insert(0, story.Panel("loss as logged", beside))
    parts = [
        story.Panel(each.title, each.names[at : at + STYLES])
        for each in rest
        for at in range(0, len(each.names), STYLES)
    ]
    return story.Panel(title, names), parts


def _gradients(draw: _Drawer, run: Run, series: Mapping[str, Series], events: Sequence[Event]) -> list[Figure]:
    norms = {name: each for name, each in series.items() if name.startswith("grad_norm")}
    shares = {name: each for name, each in series.items() if name.startswith("clipped_fraction")}
    parts = _in_parts(draw, "Gradient norm", norms, (), [event for event in events if event.letter != "B"])
    figures = [
        *(replace(each, sentences=[*each.sentences, *_clips(norms, shares)]) for each in parts),
        draw("Share of the updates that were clipped", shares),
    ]
    bins = run.bins or _bins([each for name, each in norms.items() if "threshold" not in name])
    if len(bins) > 1:
        title = "Gradient norms" if run.bins else "Gradient norms as logged"
        peak = max(bins, key=lambda each: each[2])
        words = f"{title}: most often between {shown(peak[0])} and {shown(peak[1])}, all between"
        words += f" {shown(bins[0][0])} and {shown(bins[-1][1])}."
        picture = histogram(draw.key(), title, f"Histogram. {words}", bins)
        figures.append(Figure(title, (picture, picture), [words], {}))
    return [each for each in figures if each]


def _clips(norms: Mapping[str, Series], shares: Mapping[str, Series]) -> Iterable[str]:
    """How often a norm was above its threshold: of all points while each is remembered, then of the last updates."""
    for name, series in norms.items():
        threshold = norms.get(name.replace("grad_norm", "grad_norm_threshold", 1))
        share = shares.get(name.replace("grad_norm", "clipped_fraction", 1))
        if threshold is None:
            continue
        if series.width == threshold.width == 1:
            limits = {each.last: each.mean for each in threshold.bins if each.count}
            pairs = [(each.mean, limits[each.last]) for each in series.bins if each.count and each.last in limits]
            above = sum(norm > limit for norm, limit in pairs)
            yield f"{name} was above its threshold, and clipped, at {above:,} of {len(pairs):,} points."
        elif share is not None and share.newest is not None:
            yield f"{name} was above its threshold, and clipped, in {share.newest:.0%} of the last updates."


def _in_parts(
    draw: _Drawer,
    title: str,
    series: Mapping[str, Series],
    guides: Sequence[tuple[float, str]] = (),
    events: Sequence[Event] = (),
) -> Iterable[Figure]:
    """As many figures as the lines need to be told apart."""
    names = list(series)
    for start in range(0, min(len(names), DRAWN), STYLES):
        figure = draw(title, {name: series[name] for name in names[start : start + STYLES]}, events, guides)
        if figure:
            yield figure


def _line(name: str, series: Series) -> Line:
    every = name == STEP_LOSS
    bins = series.coarse(COARSE) if every else series.bins
    points = []
    for each in bins:
        low, high = each.low, each.high
        if every:
            low, high = max(low, each.mean - each.deviation), min(high, each.mean + each.deviation)
        points.append(Point(each.step, each.mean if each.count else math.nan, low, high))
    label = "training loss, mean ± spread" if every else name.removeprefix("update_ratio/")
    return Line(label, points, marks=len(points) <= 40 and not every)


def _bins(series: Sequence[Series]) -> list[tuple[float, float, float]]:
    """A histogram on a logarithmic scale; values that are not known one by one are spread from lowest to highest."""
    known = [each for one in series for each in one.bins if each.count and each.mean > 0]
    if len(known) < 20:
        return []
    spans = [(math.log(each.low if each.low > 0 else each.mean), math.log(each.high), each.count) for each in known]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    if high - low < 1e-6:
        return []
    number = 24
    scale = number / (high - low)
    counts = [0.0] * number
    for lower, upper, count in spans:
        start, end = (lower - low) * scale, (upper - low) * scale
        first, last = (min(number - 1, int(place)) for place in (start, end))
        for at in range(first, last + 1):
            share = (min(end, at + 1) - max(start, at)) / (end - start) if first < last else 1.0
            counts[at] += count * share
    edges = [math.exp(low + (high - low) * at / number) for at in range(number + 1)]
    return list(zip(edges, edges[1:], counts, strict=False))


def _spark(series: Series) -> str:
    """The course in a few characters."""
    means = [each.mean if each.count else math.nan for each in series.coarse(24)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    if min(finite) > 0 and max(finite) > 8 * statistics.median(finite):  # one spike would leave nothing else to see
        means, finite = [math.log(mean) for mean in means], [math.log(mean) for mean in finite]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join("x" if math.isnan(mean) else SPARKS[min(7, int((mean - low) / span * 8))] for mean in means)


def _is_rate(name: str) -> bool:
    return bool(re.match(r"(lr|learning_rate)([-_/]|$)", name)) and not name.endswith(("momentum", "weight_decay"))


def _unseen(name: str, series: Series) -> bool:
    return name in UNSEEN[:2] or (name == "hp_metric" and all(each.low == each.high == -1 for each in series.bins))


def _table(markdown: str) -> list[list[str]]:
    """The first table of a Markdown text, without its marks."""
    rows = [line.strip().strip("|").split("|") for line in markdown.splitlines() if line.lstrip().startswith("|")]
    return [[cell.strip(" *`") for cell in row] for row in rows if not all(set(cell) <= set(" -:") for cell in row)]


def _words(markdown: str) -> list[str]:
    return [line.strip() for line in markdown.splitlines() if line.strip() and not line.lstrip().startswith("|")]


@cache
def _templates() -> "Environment":
    from jinja2 import DictLoader, Environment  # takes a tenth of the time that importing the recipes does

    folder = resources.files("lightning_recipes.report")
    names = ("template.html", "template.md")
    loader = DictLoader({name: folder.joinpath(name).read_text(encoding="utf-8") for name in names})
    templates = Environment(
        loader=loader, autoescape=lambda name: name != "template.md", trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["md"] = _for_markdown
    return templates


def _for_markdown(text: object) -> str:
    """Text that Markdown leaves as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
