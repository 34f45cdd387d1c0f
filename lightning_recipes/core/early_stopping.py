"""When to stop a training: criteria over the curve of a validation metric.

A criterion is a pure function of the curve: what was measured is the only state, so that a resumed run with another
patience is judged by the new one. :class:`EarlyStoppingRule` keeps the curve and asks the criterion.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, takewhile
from typing import Any, Literal

from typing_extensions import override

from lightning_recipes.core.arguments import check_choice, check_count, check_list, check_real
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.names import better

PLAYBOOK = "Deep Learning Tuning Playbook, training curves: https://github.com/google-research/tuning_playbook"
RECENT = 20  # checks that the noise is estimated from
FEW = 8  # checks below which noise can hardly be told from the curve
CLEAR = 8  # noises: a check this much worse than the best counts in full
UNCLEAR = 0.1  # what a check counts that is hardly worse than the best
READABLE = 8  # checks below which a curve is not interpreted
AROUND = 2  # checks on either side that a level is the median of
SIGNIFICANT = 2  # noises by which two levels have to differ
RISEN = 4  # noises by which the last level has to exceed the lowest of many
PLATEAU = 0.1  # of the first value: no check that differs by less has left the plateau at the start


def noise_of(values: Sequence[float]) -> float:
    """Standard deviation of what wobbles in a curve, from its last 20 values: median |second difference| / 1.65.

    A trend and a change of trend leave it alone, and so do single outliers. Fewer than eight values are too few to tell
    noise from a curve that turns, or from rounding: 0 if it turns only once, and if two of them are equal.

    Example:
        >>> noise_of([5.0, 4.0, 3.0, 2.0, 1.0])
        0.0
        >>> round(noise_of([1.0, 1.2, 0.9, 1.1, 1.02, 1.3]), 2)
        0.26
    """
    finite = [value for value in values[-RECENT:] if math.isfinite(value)]
    if len(finite) < FEW:
        turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(finite, finite[1:], finite[2:], strict=False))
        if turns < 2 or len(set(finite)) < len(finite):
            return 0.0
    differences = (abs(a - 2 * b + c) for a, b, c in zip(finite, finite[1:], finite[2:], strict=False))
    return statistics.median(differences) / (0.6745 * math.sqrt(6))


@dataclass
class Curve:
    """What the checks of a training have measured; each list has an entry for each check.

    Args:
        values: The watched metric, turned so that lower is better; infinite where it was not a finite number.
        train: Training loss since the check before, NaN where nobody told.
        steps: Optimizer updates done.
        epochs: Epochs done, with fractions.
        seconds: Time spent in training.
        start: The first check that may count towards a stop.
        noise: Standard deviation of the noise of ``values``, 0 where it is not to be considered.
        min_delta: What a value has to be lower by to be an improvement.
        relative: Whether ``min_delta`` is a share of the absolute best value.
    """

    values: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start: int = 0
    noise: float = 0.0
    min_delta: float = 0.0
    relative: bool = False

    @property
    def best(self) -> int:
        """The check with the lowest value, the first of several."""
        return min(range(len(self.values)), key=self.values.__getitem__)

    @property
    def improvements(self) -> list[int]:
        """For each check the last one until then that was an improvement on the one before it that was; the first is.

        Example:
            >>> Curve([3.0, 2.0, 2.5, 1.0]).improvements
            [0, 1, 1, 3]
        """
        found: list[int] = []
        for check, value in enumerate(self.values):
            reference = self.values[found[-1]] if found else math.inf
            improves = not found or value < reference - self.least_improvement(reference)
            found.append(check if improves else found[-1])
        return found

    def least_improvement(self, reference: float) -> float:
        """What a value has to be lower by than ``reference`` to be an improvement."""
        share = abs(reference) if self.relative and math.isfinite(reference) else 1.0
        return max(self.min_delta * share, self.noise)


class Criterion(ABC):
    """Says when a curve is past its best."""

    @abstractmethod
    def verdict(self, curve: Curve) -> str | None:
        """Why to stop after the last check of the curve; None to go on."""


@dataclass(frozen=True)
class Patience(Criterion):
    """Stop when nothing has improved for so long.

    Where the curve is noisy (``Curve.noise``) a check counts by how clearly it is worse than the last improvement: in
    full from eight standard deviations on, at least a tenth. So neither a lucky value nor an unlucky one decides.

    Args:
        amount: How long, at least 0; with 0 the first check without an improvement stops.
        unit: ``"checks"``, ``"steps"`` (optimizer updates), ``"epochs"`` or ``"seconds"``.

    Raises:
        TypeError: If the amount is not a number.
        ValueError: If it is negative or the unit unknown.

    Example:
        >>> Patience(2).verdict(Curve([3.0, 2.0, 2.5, 2.2]))
        'did not improve in the last 2 checks'
    """

    amount: float = 3
    unit: Literal["checks", "steps", "epochs", "seconds"] = "checks"

    def __post_init__(self) -> None:
        if self.amount != 0:
            check_real("amount", self.amount, 0, math.inf)
        check_choice("unit", self.unit, ("checks", "steps", "epochs", "seconds"))

    @override
    def verdict(self, curve: Curve) -> str | None:
        clock: Sequence[float] = range(len(curve.values)) if self.unit == "checks" else getattr(curve, self.unit)
        since, waited = 0, 0.0
        for check, since in enumerate(curve.improvements):
            if since == check or check < curve.start:
                waited = 0.0
            else:
                excess = curve.values[check] - curve.values[since]
                waited += _clearness(excess, curve.noise) * (clock[check] - clock[check - 1])
        last = len(curve.values) - 1
        if since == last or last < curve.start or waited < self.amount * (1 - 1e-9):
            return None
        span = clock[last] - clock[since]
        return f"did not improve in the last {span:g} {self.unit if span != 1 else self.unit[:-1]}"


def _clearness(excess: float, noise: float) -> float:
    """What a check counts whose value is above the best by ``excess``."""
    return min(1.0, max(UNCLEAR, excess / (CLEAR * noise))) if noise > 0 else 1.0


@dataclass(frozen=True)
class GeneralizationLoss(Criterion):
    """GL: stop when the value is ``alpha`` percent above the best: ``100 (E_va / E_opt - 1) > alpha``.

    Relative to the absolute best, so that negative metrics work.

    Args:
        alpha: In percent, above 0. Prechelt tried 1 to 5.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of its range.

    References:
        Prechelt, Early Stopping - But When?, 1998
    """

    alpha: float = 5.0

    def __post_init__(self) -> None:
        check_real("alpha", self.alpha, 0, math.inf)

    @override
    def verdict(self, curve: Curve) -> str | None:
        loss = generalization_loss(curve.values)
        if len(curve.values) <= curve.start or not loss > self.alpha:
            return None
        return f"is {loss:.3g} % worse than its best"


def generalization_loss(values: Sequence[float]) -> float:
    """By how many percent the last value is above the lowest.

    Example:
        >>> generalization_loss([2.0, 1.0, 1.5])
        50.0
    """
    best = min(values)
    if values[-1] == best:
        return 0.0
    return 100 * (values[-1] - best) / abs(best) if best else math.inf


@dataclass(frozen=True)
class ProgressQuotient(Criterion):
    """PQ: stop when the generalization loss outweighs the progress of the training: ``GL / P_k > alpha``.

    ``P_k = 1000 (mean of the last k training losses / their least - 1)``; looked at when a strip of ``k`` is complete.

    Args:
        alpha: Above 0. Prechelt tried 0.5 to 3.
        strip: Checks in a strip, at least 2.

    Raises:
        TypeError: If an argument is not a number of its kind.
        ValueError: If it is out of its range.

    References:
        Prechelt, Early Stopping - But When?, 1998
    """

    alpha: float = 0.5
    strip: int = 5

    def __post_init__(self) -> None:
        check_real("alpha", self.alpha, 0, math.inf)
        check_count("strip", self.strip, 2)

    @override
    def verdict(self, curve: Curve) -> str | None:
        checks = len(curve.values)
        if checks <= curve.start or checks % self.strip:
            return None
        quotient = generalization_loss(curve.values) / max(training_progress(curve.train[-self.strip :]), 1e-9)
        if not quotient > self.alpha:
            return None
        return f"got worse more than the training loss got better: their quotient is {quotient:.3g}"


def training_progress(losses: Sequence[float]) -> float:
    """P_k: by how many per mille the mean of the losses is above the least of them.

    Example:
        >>> round(training_progress([1.2, 1.1, 1.0]))
        100
    """
    least = min(losses)
    return 1000 * (statistics.fmean(losses) - least) / abs(least) if least else math.inf


@dataclass(frozen=True)
class SuccessiveRises(Criterion):
    """UP: stop when the value rose at ``rises`` successive ends of strips, however much.

    Args:
        rises: At least 1. Prechelt tried 2 to 8.
        strip: Checks in a strip, at least 1.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If it is out of its range.

    References:
        Prechelt, Early Stopping - But When?, 1998
    """

    rises: int = 3
    strip: int = 5

    def __post_init__(self) -> None:
        check_count("rises", self.rises, 1)
        check_count("strip", self.strip, 1)

    @override
    def verdict(self, curve: Curve) -> str | None:
        checks = len(curve.values)
        if checks % self.strip:
            return None
        ends = range(checks - 1, curve.start - 1, -self.strip)[: self.rises + 1]  # newest first
        rose = [curve.values[later] > curve.values[sooner] for later, sooner in pairwise(ends)]
        if len(rose) < self.rises or not all(rose):
            return None
        return f"rose {self.rises} times in a row over {self.strip} check{'s' if self.strip > 1 else ''} each"


@dataclass(frozen=True)
class AnyOf(Criterion):
    """Stop when one of several criteria would.

    Args:
        criteria: At least one.

    Raises:
        TypeError: If one is no criterion.
        ValueError: If there is none.
    """

    criteria: Sequence[Criterion]

    def __post_init__(self) -> None:
        object.__setattr__(self, "criteria", _checked(self.criteria))

    @override
    def verdict(self, curve: Curve) -> str | None:
        return next(filter(None, (criterion.verdict(curve) for criterion in self.criteria)), None)


@dataclass(frozen=True)
class AllOf(Criterion):
    """Stop when all of several criteria would.

    Args:
        criteria: At least one.

    Raises:
        TypeError: If one is no criterion.
        ValueError: If there is none.
    """

    criteria: Sequence[Criterion]

    def __post_init__(self) -> None:
        object.__setattr__(self, "criteria", _checked(self.criteria))

    @override
    def verdict(self, curve: Curve) -> str | None:
        verdicts = [criterion.verdict(curve) for criterion in self.criteria]
        return " and ".join(map(str, verdicts)) if all(verdicts) else None


def _checked(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    given = check_list("criteria", criteria, "criteria")
    if not given:
        raise ValueError("criteria must have at least one, got []")
    if not all(isinstance(each, Criterion) for each in given):
        how = " (in a configuration of Hydra write _convert_: all beside)" if isinstance(given[0], Mapping) else ""
        raise TypeError(f"criteria must be some of lightning_recipes.core.early_stopping{how}, got {criteria!r}")
    return given


@dataclass
class EarlyStoppingRule:
    """Keeps the curve of a metric and says when to stop.

    With ``min_delta="auto"`` the noise of the curve is estimated from the curve (:func:`noise_of`): an improvement is
    what exceeds it, and :class:`Patience` counts by it. And nothing stops on a plateau at the start: while the curve
    wobbles within a tenth of its first value, no check counts (one without noise is believed after eight checks, or at
    once if it repeats itself).

    Attributes:
        curve: Of all checks.
        waived: How many of the first checks do not count because :meth:`update` was told so.

    Args:
        min_delta: ``"auto"``; or what a value has to be better by than the best one to be an improvement: a number, or
            a share of the absolute best value such as ``"1%"``.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.

    Raises:
        ValueError: If ``min_delta`` or ``mode`` is not understood.
        TypeError: If ``min_delta`` is neither a number nor a string.

    Example:
        >>> rule = EarlyStoppingRule(min_delta=0.0)
        >>> [rule.update(value, Patience(2)) for value in (3.0, 2.0, 2.5, 2.2)][-1]
        'did not improve in the last 2 checks'
    """

    min_delta: float | str = "auto"
    mode: str = "min"
    curve: Curve = field(default_factory=Curve)
    waived: int = 0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("min", "max"))
        self.curve.min_delta, self.curve.relative = _parse_min_delta(self.min_delta)

    @property
    def least_improvement(self) -> float:
        """What the next value has to be better by than the best one."""
        return self.curve.least_improvement(min(self.curve.values, default=math.inf))

    @property
    def improved(self) -> bool:
        """Whether the last value is the best so far."""
        values = self.curve.values
        return bool(values) and self.curve.best == len(values) - 1 and values[-1] < math.inf

    def update(
        self,
        value: float,
        criterion: Criterion,
        train: float = math.nan,
        steps: int = 0,
        epochs: float = 0.0,
        seconds: float = 0.0,
        counts: bool = True,
    ) -> str | None:
        """Take in a check and return why to stop, or None.

        Args:
            value: The metric.
            criterion: What decides.
            train: Training loss since the check before.
            steps: Optimizer updates done.
            epochs: Epochs done.
            seconds: Time spent.
            counts: Whether this check may count towards a stop; if not, none before it does either.
        """
        curve = self.curve
        curve.values.append(value * (1 if self.mode == "min" else -1) if math.isfinite(value) else math.inf)
        curve.train.append(train)
        curve.steps.append(steps)
        curve.epochs.append(epochs)
        curve.seconds.append(seconds)
        checks = len(curve.values)
        if not counts:
            self.waived = checks
        curve.start = self.waived
        if self.min_delta == "auto":
            curve.noise = noise_of(curve.values)
            if curve.noise > 0 or (checks < FEW and len(set(curve.values)) == checks):
                first = curve.values[0]
                plateau = takewhile(lambda value: abs(value - first) <= PLATEAU * abs(first), curve.values)
                curve.start = max(curve.start, sum(1 for _ in plateau))
        return criterion.verdict(curve)

    def state_dict(self) -> dict[str, Any]:
        curve = self.curve
        lists = {name: list(getattr(curve, name)) for name in ("values", "train", "steps", "epochs", "seconds")}
        return {**lists, "waived": self.waived}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.waived = state_dict["waived"]
        for name in ("values", "train", "steps", "epochs", "seconds"):
            setattr(self.curve, name, list(state_dict[name]))


def _parse_min_delta(min_delta: object) -> tuple[float, bool]:
    rule = "min_delta must be a number of at least 0, a share of the best value such as '1%', or 'auto'"
    if min_delta == "auto":
        return 0.0, False
    if isinstance(min_delta, str):
        try:
            share = float(min_delta.removesuffix("%")) / 100 if min_delta.endswith("%") else math.nan
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf:
            raise ValueError(f"{rule}, got {min_delta!r}")
        return share, True
    if isinstance(min_delta, bool) or not isinstance(min_delta, int | float):
        raise TypeError(f"{rule}, got {min_delta!r}")
    if not 0 <= min_delta < math.inf:
        raise ValueError(f"{rule}, got {min_delta!r}")
    return float(min_delta), False


def reading(
    curve: Curve, monitor: str, mode: str = "min", stopped: bool = False, least: float = 0.0, restored: bool = False
) -> Finding | None:
    """What the curves of a finished run say, if the noise lets them say anything.

    In this order: the training loss rises; the best check lies in the first tenth of the run; the metric has got worse
    while the training loss was still falling (and, if it is a loss by its name, is above it: where dropout or
    augmentation keep the training loss above the validation, a gap below zero is no overfitting); the best check lies
    in the last quarter. Two levels (medians of several checks) differ if they do by more than two standard deviations
    of the noise. Where the name of the metric says that the other mode is meant, only the training loss is read; where
    it says nothing, and the best check is the first or early, the advice names the other mode, and a run that was
    stopped is read even if it had few checks.

    Args:
        curve: Of all checks.
        monitor: Name of the metric.
        mode: ``"min"`` or ``"max"``, for the sign of what is told.
        stopped: Whether the run was stopped early.
        least: By how much the metric has to be worse to have got worse, at least; a third of that is a gain.
        restored: Whether the model gets the weights of the best check.
    """
    checks, named = len(curve.values), better(monitor)
    if not checks or not all(map(math.isfinite, curve.values)):
        return None
    sign, best, last = 1 if mode == "min" else -1, curve.best, checks - 1
    other = f"If {'higher' if mode == 'min' else 'lower'} is better, set mode={'max' if mode == 'min' else 'min'!r}."
    when = f"{monitor} was best at step {curve.steps[best]:,} of {curve.steps[last]:,} (epoch {curve.epochs[best]:.3g})"
    evidence: dict[str, float | str] = {
        "best_step": curve.steps[best],
        "steps": curve.steps[last],
        "best": sign * curve.values[best],
    }
    found = partial(Finding, step=curve.steps[last], evidence=evidence, source=PLAYBOOK)
    noise, train_noise = noise_of(curve.values), noise_of(curve.train)
    if checks < READABLE:
        worse = curve.values[last] - curve.values[0]
        if not stopped or named or best or worse <= SIGNIFICANT * noise or not curve.train[last] < curve.train[0]:
            return None
        return found(
            "best at the start",
            "warning",
            f"{when}, the first check, and has got worse by {worse:.3g} since, while the training loss fell from"
            f" {curve.train[0]:.3g} to {curve.train[last]:.3g}.",
            f"{other} Else lower the learning rate.",
        )
    since = slice(min((best + last) // 2 + 1, last), None)  # the later half of the checks since the best
    worse = statistics.median(curve.values[since]) - _level(curve.values, best)
    got_worse = worse > max(SIGNIFICANT * noise, least) and worse > 0
    has_train = all(map(math.isfinite, curve.train))
    rises = rise(curve.train, curve.steps) if has_train else None
    if rises is not None or named not in ("", mode):
        return rises
    fall = _level(curve.train, best) - _level(curve.train, last) if has_train else 0.0
    meanwhile = f"while the training loss fell from {_level(curve.train, best):.3g} to {_level(curve.train, last):.3g}"
    gap = statistics.median(curve.values[since]) - statistics.median(curve.train[since])
    has_gap = has_train and mode == "min" and "loss" in monitor.lower()  # else the two are not measured alike
    overfits = got_worse and fall > SIGNIFICANT * train_noise and fall > 0 and (gap > 0 or not has_gap)
    if overfits:
        evidence |= {"got_worse_by": worse, "train_fell_by": fall} | ({"gap": gap} if has_gap else {})
    shorter = "Train far shorter, and tune again: the learning rate may be too high for so many steps."
    if got_worse and curve.steps[best] <= 0.1 * curve.steps[last]:
        return found(
            "best at the start",
            "warning",
            f"{when}, in the first tenth of the run, and got worse by {worse:.3g}"
            + (f", {meanwhile}{': overfitting' if named else ''}." if overfits else "."),
            shorter if named or not overfits else f"{shorter} {other}",
        )
    if overfits:
        return found(
            "overfitting",
            "warning",
            f"{when} and has got worse by {worse:.3g} since, {meanwhile}"
            + (f": a gap of {gap:.3g}." if has_gap else "."),
            "Regularise (weight decay, dropout, augmentation)"
            + (" or get more data. " if restored else ", get more data, or keep the weights of that step.")
            + ("The model has the weights of that step." if restored else ""),
        )
    before = [_level(curve.values, check) for check in range(checks) if curve.steps[check] < 0.75 * curve.steps[last]]
    gain = min(before, default=-math.inf) - _level(curve.values, best)
    late = curve.steps[best] >= 0.75 * curve.steps[last]
    if not stopped and late and gain > max(SIGNIFICANT * noise, least / 3) and gain > 0:
        return found(
            "best at the end",
            "info",
            f"{when}, in the last quarter of the run, in which it still gained {gain:.3g}.",
            "Train longer.",
        )
    return None


def rise(train: Sequence[float], steps: Sequence[int]) -> Finding | None:
    """Whether the training loss has risen beyond its noise, by a tenth of its lowest level and a twentieth of its fall.

    Args:
        train: Means over stretches of the run, all finite.
        steps: Optimizer updates done at the end of each.
    """
    if len(train) < READABLE:
        return None
    last = len(train) - 1
    levels = [_level(train, stretch) for stretch in range(len(train))]
    lowest = min(range(len(train)), key=levels.__getitem__)
    risen, fell = levels[last] - levels[lowest], levels[0] - levels[lowest]
    if risen <= max(RISEN * noise_of(train), 0.1 * abs(levels[lowest]), 0.05 * fell):
        return None
    return Finding(
        rule="training loss rises",
        severity="warning",
        message=f"The training loss rose from {levels[lowest]:.3g} at step {steps[lowest]:,} to {levels[last]:.3g}"
        " at the end.",
        advice="That is usually a bug in the data pipeline, else a learning rate that is too high: look for both.",
        step=steps[last],
        evidence={"lowest": levels[lowest], "lowest_step": steps[lowest], "last": levels[last]},
        source=PLAYBOOK,
    )


def _level(values: Sequence[float], check: int) -> float:
    """The median of a check and the two on either side of it."""
    return statistics.median(values[max(0, check - AROUND) : check + AROUND + 1])
