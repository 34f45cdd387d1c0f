"""What there is to say of a training: how it went, what was found, what happened when."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_recipes.core.early_stopping import Curve, reading
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.names import HIGHER, LOWER, base, split, tokens
from lightning_recipes.core.series import Bin, Series
from lightning_recipes.report.numbers import shown
from lightning_recipes.report.run import STEP_LOSS, Run
from lightning_recipes.report.svg import Event

SEVERITIES = ("error", "warning", "info")
KINDS = {
    "B": "best",
    "C": "learning rate cut",
    "I": "instability",
    "N": "not finite",
    "P": "resumed",
    "R": "went back",
    "S": "update skipped",
    "U": "learning rate up again (restart)",
    "W": "other warning",
    "X": "stopped",
}
DECISIONS = {"cancelled": "S", "went back": "R", "stopped": "X"}
CUT, UP = 0.6, 1.6  # factors of a learning rate from one point to the next
MOST_STEPS = 8  # listed of a finding that came again


@dataclass(frozen=True)
class Group:
    """The findings of one rule.

    Args:
        findings: In order.
    """

    findings: Sequence[Finding]

    @property
    def latest(self) -> Finding:
        """The worst of them, the newest of these."""
        worst = min(self.findings, key=lambda finding: _rank(finding.severity))
        return [finding for finding in self.findings if finding.severity == worst.severity][-1]

    @property
    def when(self) -> str:
        """The steps, in words."""
        steps = sorted({finding.step for finding in self.findings})
        listed = [shown(step) for step in steps]
        if len(listed) > MOST_STEPS:
            listed = [*listed[: MOST_STEPS - 1], "…", listed[-1]]
        times = f", {len(self.findings):,} times" if len(self.findings) > 1 else ""
        return f"{'steps' if len(steps) > 1 else 'step'} {', '.join(listed)}{times}"


@dataclass(frozen=True)
class Panel:
    """Series that belong on the same axes.

    Args:
        title: What they measure.
        names: Of the series.
    """

    title: str
    names: Sequence[str]


@dataclass(frozen=True)
class Best:
    """The best value of a series.

    Args:
        name: Of the series.
        value: The best.
        step: Where.
        last: The last value; None if it was not finite.
        lower: Whether lower is better.
    """

    name: str
    value: float
    step: int
    last: float | None
    lower: bool


def group(findings: Iterable[Finding]) -> list[Group]:
    """The findings of each rule together: the most severe first, of these what was told before the training, which
    others may come of, and then the newest.
    """
    by_rule: dict[str, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    groups = [Group(each) for each in by_rule.values()]
    return sorted(groups, key=lambda each: (_rank(each.latest.severity), each.latest.step > 0, -each.latest.step))


def severity(run: Run) -> str:
    """How bad it is: that of the worst finding; ``"error"`` of a training that failed or whose loss was lost."""
    if _failed(run) or _lost(run):
        return "error"
    return next((each.latest.severity for each in group(run.findings)), "info")


def verdict(run: Run) -> tuple[str, str, str]:
    """How it went, the most important finding, and what to do next."""
    groups, lost = group(run.findings), _lost(run)
    pressing = [each.latest for each in groups if each.latest.severity != "info"]
    if pressing:
        first = pressing[0]
        more = f" ({len(pressing) - 1} more below.)" if len(pressing) > 1 else ""
        return _how(run), f"{first.severity.capitalize()}, {first.rule}: {first.message}{more}", first.advice
    if _failed(run):
        return _how(run), "Error: the training failed. No warning came before it.", "Mend what raised the error."
    if lost:
        return (
            _how(run),
            f"Error: {', '.join(lost[:3])} {'was' if len(lost) == 1 else 'were'} not finite at the end.",
            "Look at the data and the loss first: an overflow, a division, a logarithm. If both are sound, lower the"
            " learning rate or warm up longer. lightning_recipes.InstabilityDetector() says where it began.",
        )
    if groups:
        first = groups[0].latest
        return _how(run), f"No warning. {first.rule}: {first.message}", first.advice
    if not run.series and run.ended == "running":
        return _how(run), "Nothing was logged yet.", "Open the page again after the first validation."
    if not run.series:
        return _how(run), "Nothing was logged and nothing found.", "Log a loss, or attach a recipe."
    if run.callbacks:
        return (
            _how(run),
            "No finding: what was watched was sound.",
            "Nothing asks for action; look at the curves below.",
        )
    return (
        _how(run),
        "No findings in its files, so only the curves can speak.",
        "Look at the curves below; lightning_recipes.InstabilityDetector() and EarlyStopping() can watch the next run.",
    )


def panels(names: Iterable[str]) -> list[Panel]:
    """Which series share their axes: those that differ in the split of the data only."""
    by_base: dict[str, list[str]] = {}
    for name in names:
        by_base.setdefault(base(name), []).append(name)
    return [Panel(title, each) for title, each in by_base.items()]


def best(run: Run) -> Best | None:
    """The best validation of the run: of its loss, or else of a metric whose better direction is known by its name."""
    candidates = [name for name in run.series if split(name) == "val" and "raw" not in tokens(name)]
    for good, pick in ((LOWER, min), (HIGHER, max)):
        for name in sorted(candidates, key=lambda name: (base(name) != "loss", len(name))):
            bins = [each for each in run.series[name].bins if each.count]
            if bins and good & set(tokens(name)):
                where = pick(bins, key=lambda each: each.low if pick is min else each.high)
                value, step = (where.low, where.low_at) if pick is min else (where.high, where.high_at)
                return Best(name, value, step, run.series[name].newest, pick is min)
    return None


def events(run: Run, rates: Mapping[str, Series]) -> list[Event]:
    """What happened when, from findings, learning rates and values that are not finite."""
    found = [Event(step, "P", f"resumed at {step:,}") for step in run.resumed]
    top = best(run)
    if top is not None:
        found.append(Event(top.step, "B", f"best {top.name}, {shown(top.value)}, at {top.step:,}"))
    exact = any("not finite" in each.rule and "decision" in each.evidence for each in run.findings)
    cuts = [each.step for each in run.findings if _letter(each) == "C"]
    for finding in run.findings:
        letter = _letter(finding)
        if letter == "N" and exact and "decision" not in finding.evidence:
            continue  # a count of what has its own marks
        if letter and (letter != "W" or 0 < finding.step < run.updates):  # neither before the training nor in its end
            why = "" if finding.rule == KINDS[letter] else f": {finding.rule}"
            found.append(Event(finding.step, letter, f"{KINDS[letter]} at {finding.step:,}{why}"))
    for series in rates.values():
        found += _jumps([each for each in series.bins if each.count], cuts)
        break  # the others are those of further groups
    broken = run.series.get(STEP_LOSS)
    if broken is not None and not exact and not any(event.letter == "N" for event in found):
        found += _losses_not_finite(broken)
    return sorted(found, key=lambda event: event.step)


def key_of(found: Sequence[Event]) -> list[tuple[str, str]]:
    """The letters of events, and what they mean, with the steps."""
    lines = []
    for letter in sorted({event.letter for event in found}):
        own = [event for event in found if event.letter == letter]
        if len(own) == 1:
            lines.append((letter, own[0].label))
            continue
        steps = [shown(round(event.step)) for event in own]
        listed = steps if len(steps) <= MOST_STEPS else [*steps[: MOST_STEPS - 1], "…", steps[-1]]
        lines.append((letter, f"{KINDS[letter]}, {len(own):,} times: {', '.join(listed)}"))
    return lines


def read_curves(run: Run) -> Finding | None:
    """What the curves say of a run that nobody watched, by the reading of EarlyStopping."""
    top, epochs = best(run), run.series.get("epoch")
    if top is None or epochs is None:
        return None
    checks = [each for each in run.series[top.name].bins if each.count]
    losses = [name for name in run.series if base(name) == "loss" and split(name) in ("train", "")]
    train = run.series[min(losses, key=lambda name: ("epoch" not in name, name))].bins if losses else []
    sign, curve, before = 1 if top.lower else -1, Curve(), -1
    for check in checks:
        between = [each.mean for each in train if before < each.last <= check.last and each.count]
        curve.values.append(sign * check.mean)
        curve.train.append(statistics.fmean(between) if between else math.nan)
        curve.steps.append(check.last + 1)
        curve.epochs.append(next((each.mean for each in reversed(epochs.bins) if each.first <= check.last), 0.0) + 1)
        before = check.last
    return reading(curve, top.name, "min" if top.lower else "max")


def describe(name: str, series: Series) -> str:
    """The course of a series in a sentence."""
    bins = [each for each in series.bins if each.count]
    bad = f"; {series.bad:,} values not finite" if series.bad else ""
    if not bins:
        return f"{name}: {series.bad:,} values, none of them finite."
    if len(bins) == 1 and bins[0].count == 1:
        return f"{name}: {shown(bins[0].mean)} at {bins[0].low_at:,}{bad}."
    low, high = min(bins, key=lambda each: each.low), max(bins, key=lambda each: each.high)
    return (
        f"{name}: {shown(bins[0].mean)} → {shown(bins[-1].mean)}, lowest {shown(low.low)} at {low.low_at:,},"
        f" highest {shown(high.high)} at {high.high_at:,}{bad}."
    )


def _how(run: Run) -> str:
    ended = run.ended or "Read from its files"
    after = f" after {run.updates:,} updates" if run.updates else ""
    time = next((run.costs[name] for name in ("wall time", "time from first to last entry") if name in run.costs), "")
    sentence = f"{ended[0].upper()}{ended[1:]}{after}{f' in {time}' if time and run.updates else ''}."
    broken = _broken(run)
    if broken:
        sentence += f" At the end {', '.join(broken[:3])} {'was' if len(broken) == 1 else 'were'} not finite."
    top = best(run)
    if top is not None:
        last = "not finite" if top.last is None else shown(top.last)
        place = "the last one" if top.value == top.last else f"the last one was {last}"
        sentence += f" Best {top.name} {shown(top.value)} at step {top.step:,}; {place}."
    elif STEP_LOSS in run.series:
        sentence += f" {describe('Training loss', run.series[STEP_LOSS])}"
    return sentence


def _failed(run: Run) -> bool:
    return run.ended.startswith("failed")


def _broken(run: Run) -> list[str]:
    """What was not finite at the end."""
    return [name for name, series in run.series.items() if series.bins and series.newest is None]


def _lost(run: Run) -> list[str]:
    """The losses among it."""
    return [name for name in _broken(run) if "loss" in tokens(name)]


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _letter(finding: Finding) -> str:
    decision = finding.evidence.get("decision")
    if decision in DECISIONS:
        return DECISIONS[str(decision)]
    if finding.rule == "learning rate cut":
        return "C"
    if "not finite" in finding.rule:
        return "N"
    if decision is not None:
        return "I"
    return "W" if finding.severity != "info" else ""


def _losses_not_finite(losses: Series) -> list[Event]:
    """Where the loss was not finite first, and whether it stayed so."""
    bad = [each for each in losses.bins if each.bad]
    if not bad:
        return []
    first = bad[0]
    where = shown(round(first.step))
    if not any(each.count for each in losses.bins if each.first > first.last) and losses.newest is None:
        return [Event(first.step, "N", f"loss not finite from about {where} on")]
    often = f" first, {losses.bad:,} times in all" if losses.bad > 1 else ""
    return [Event(first.step, "N", f"loss not finite at about {where}{often}")]


def _jumps(bins: Sequence[Bin], told: Sequence[int]) -> list[Event]:
    """Where a learning rate falls or rises at once, neither before nor behind it, and no cut was told of there."""
    found = []
    for before, here, there, after in zip(bins, bins[1:], bins[2:], [*bins[3:], bins[-1]], strict=False):
        if min(each.low for each in (before, here, there, after)) <= 0:
            continue
        ratio = there.mean / here.mean
        around = max(abs(here.mean / before.mean - 1), abs(after.mean / there.mean - 1))
        known = any(here.first < step <= there.last for step in told)
        if around < abs(ratio - 1) / 2 and ratio < CUT and not known:
            found.append(Event(there.first, "C", f"learning rate cut at {there.first:,} to {shown(there.mean)}"))
        elif around < abs(ratio - 1) / 2 and ratio > UP:
            found.append(Event(there.first, "U", f"learning rate up again at {there.first:,} to {shown(there.mean)}"))
    return found
