"""Learning rate schedules: pure functions of the step, a factor on the base learning rate.

A schedule is what the person wrote, durations included; :class:`Run` says how long the training is. Both together give
the factor of any step in closed form, so that there is nothing to save and a resumed run is exact:

    >>> Cosine().curve(steps=4)
    [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from typing_extensions import override

from lightning_recipes.core.arguments import check_choice, check_count, check_flag, check_list, check_real
from lightning_recipes.core.durations import parse_duration
from lightning_recipes.core.early_stopping import EarlyStoppingRule, Patience


@dataclass(frozen=True)
class Run:
    """The length of a training.

    Args:
        steps: Optimizer updates of the whole run; infinite if nobody knows.
        steps_per_epoch: Of one epoch; likewise.
    """

    steps: float = math.inf
    steps_per_epoch: float = math.inf

    def length(self, name: str, duration: float | str) -> int:
        """A duration in whole updates, at least 1; see :func:`~lightning_recipes.core.durations.parse_duration`."""
        return max(1, round(parse_duration(name, duration).in_updates(self.steps_per_epoch, self.steps)))

    def passed(self, step: int) -> float:
        """The share of the run that lies behind at a step, at most 1.

        Raises:
            ValueError: If nobody knows how long the run is.
        """
        if not 0 < self.steps < math.inf:
            raise ValueError(
                "the schedule needs the length of the run, which is not known here (a loader without length, or no"
                " max_steps): give the number of steps"
            )
        return min(step, self.steps) / self.steps


class Schedule(ABC):
    """A learning rate schedule; derive from it for one of your own."""

    @abstractmethod
    def factor(self, step: int, run: Run) -> float:
        """What the base learning rate is multiplied by for the update number ``step``, counted from 0."""

    def momentum(self, step: int, run: Run) -> float | None:
        """Momentum (beta1 in Adam) of the update; None to leave it alone."""
        return None

    def added_steps(self, run: Run) -> int:
        """By how many updates the schedule makes the run longer."""
        return 0

    def overlaid_steps(self, run: Run) -> int:
        """How many of the run's own updates a warmup takes."""
        return 0

    def check(self, run: Run) -> None:
        """Raise the error that the schedule would meet in such a run.

        Raises:
            ValueError: If a length is needed that is not known.
        """
        self.factor(0, run)

    def curve(self, steps: int, steps_per_epoch: float = math.inf) -> list[float]:
        """The factor of every update of a run, to look at before there is an optimizer.

        Args:
            steps: Updates of the run, without those that the schedule adds.
            steps_per_epoch: Where durations are given in epochs.
        """
        run = Run(steps, steps_per_epoch)
        return [self.factor(step, run) for step in range(steps + self.added_steps(run))]


@dataclass(frozen=True)
class Constant(Schedule):
    """The base learning rate throughout: where to start, before any schedule is tuned."""

    @override
    def factor(self, step: int, run: Run) -> float:
        return 1.0


@dataclass(frozen=True)
class StepDecay(Schedule):
    """Multiply the learning rate by ``gamma`` after each interval.

    Args:
        interval: A duration: updates, ``"30 epochs"`` or ``"0.3 of the run"``.
        gamma: Above 0 and below 1.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or not understood.

    Example:
        >>> StepDecay(interval=2, gamma=0.5).curve(steps=6)
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    interval: float | str = "0.3 of the run"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        parse_duration("interval", self.interval)
        check_real("gamma", self.gamma, 0, 1)

    @override
    def factor(self, step: int, run: Run) -> float:
        return float(self.gamma ** (step // run.length("interval", self.interval)))


@dataclass(frozen=True)
class PiecewiseConstant(Schedule):
    """Factors of one's own from milestones of one's own on; 1 before the first.

    Args:
        milestones: Durations from the start, rising.
        factors: One for each milestone, at least 0: of the base learning rate, not of the one before.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or not understood.

    Example:
        >>> PiecewiseConstant([2, "0.8 of the run"], [0.1, 0.01]).curve(steps=5)
        [1.0, 1.0, 0.1, 0.1, 0.01]
    """

    milestones: Sequence[float | str] = ()
    factors: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", check_list("milestones", self.milestones, "durations"))
        object.__setattr__(self, "factors", check_list("factors", self.factors, "numbers"))
        if len(self.milestones) != len(self.factors):
            raise ValueError(f"factors must be one for each of {len(self.milestones)} milestones, got {self.factors!r}")
        parsed = [parse_duration("milestones", milestone) for milestone in self.milestones]
        if any(a.unit == b.unit and a.amount > b.amount for a, b in pairwise(parsed)):
            raise ValueError(f"milestones must rise, got {self.milestones!r}")
        for factor in self.factors:
            if factor != 0:
                check_real("factors", factor, 0, math.inf)

    @override
    def factor(self, step: int, run: Run) -> float:
        milestones = [run.length("milestones", milestone) for milestone in self.milestones]
        passed = bisect_right(milestones, step)
        return float(self.factors[passed - 1]) if passed else 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Fall on a straight line: ``1 - t / T``.

    Args:
        final: Factor at the end, at least 0 and at most 1.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of its range.

    Example:
        >>> Linear().curve(steps=4)
        [1.0, 0.75, 0.5, 0.25]
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        _check_share("final", self.final)

    @override
    def factor(self, step: int, run: Run) -> float:
        return self.final + (1 - self.final) * (1 - run.passed(step))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """Fall as a power of what is left of the run: ``(1 - t / T) ** power``.

    Args:
        power: Above 0.
        final: Factor at the end, at least 0 and at most 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is out of its range.

    Example:
        >>> Polynomial(power=2).curve(steps=4)
        [1.0, 0.5625, 0.25, 0.0625]
    """

    power: float = 2.0
    final: float = 0.0

    def __post_init__(self) -> None:
        check_real("power", self.power, 0, math.inf)
        _check_share("final", self.final)

    @override
    def factor(self, step: int, run: Run) -> float:
        return float(self.final + (1 - self.final) * (1 - run.passed(step)) ** self.power)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Fall on half a cosine: ``(1 + cos(pi t / T)) / 2``.

    Args:
        final: Factor at the end, at least 0 and at most 1.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of its range.

    References:
        Loshchilov and Hutter, SGDR, 2017: https://arxiv.org/abs/1608.03983
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        _check_share("final", self.final)

    @override
    def factor(self, step: int, run: Run) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * run.passed(step))) / 2


@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """Fall as ``1 / sqrt(1 + t / timescale)``, however long the run is.

    Behind a prepended warmup of ``timescale`` updates this is the schedule of Vaswani et al.

    Args:
        timescale: A duration: updates, epochs or a share of the run.

    Raises:
        TypeError: If it is neither a number nor words.
        ValueError: If it is not positive or not understood.

    Example:
        >>> [round(factor, 3) for factor in InverseSquareRoot().curve(steps=4)]
        [1.0, 0.707, 0.577, 0.5]

    References:
        Vaswani et al., Attention is all you need, 2017: https://arxiv.org/abs/1706.03762
    """

    timescale: float | str = 1

    def __post_init__(self) -> None:
        parse_duration("timescale", self.timescale)

    @override
    def factor(self, step: int, run: Run) -> float:
        return 1 / math.sqrt(1 + step / run.length("timescale", self.timescale))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm up, stay, and decay at the end: the part that stays can be made longer without training anew.

    Args:
        warmup_steps: A duration, or 0; the run does not get longer by it.
        decay_steps: Likewise, at the end of the run.
        final: Factor at the end, at least 0 and at most 1.
        shape: Of the decay: ``"linear"``, or ``"sqrt"`` for ``1 - sqrt(share of the decay)``.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or not understood.

    Example:
        >>> WarmupStableDecay(warmup_steps=1, decay_steps=2, shape="linear").curve(steps=6)
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]

    References:
        Hu et al., MiniCPM, 2024: https://arxiv.org/abs/2404.06395
        Hägele et al., Scaling laws and compute-optimal training beyond fixed training durations, 2024
    """

    warmup_steps: float | str = "0.01 of the run"
    decay_steps: float | str = "0.2 of the run"
    final: float = 0.0
    shape: Literal["linear", "sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) != 0:
                parse_duration(name, getattr(self, name))
        _check_share("final", self.final)
        check_choice("shape", self.shape, ("linear", "sqrt"))

    @override
    def factor(self, step: int, run: Run) -> float:
        run.passed(step)  # the decay counts from the end
        decay = _length(run, "decay_steps", self.decay_steps)
        into = min(1.0, max(0.0, (step - (run.steps - decay)) / decay)) if decay else 0.0
        fallen = into if self.shape == "linear" else math.sqrt(into)
        return warmth(step, self.overlaid_steps(run)) * (1 - (1 - self.final) * fallen)

    @override
    def overlaid_steps(self, run: Run) -> int:
        return _length(run, "warmup_steps", self.warmup_steps)


@dataclass(frozen=True)
class CyclicCosine(Schedule):
    """Fall on half a cosine and start again at the top: ``(1 + cos(pi mod(t, P) / P)) / 2``, P = ceil(T / cycles).

    For snapshots: each cycle ends in a minimum of its own. The last one has the updates that are left, so that it ends
    with the run (P is T / cycles rounded down in a run so short that none would be left, and there are fewer cycles
    where not even one update is left for each).

    Args:
        cycles: At least 1.
        warmup_steps: Updates in which each cycle rises to the top, at least 0; the cosine follows.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.

    Example:
        >>> [round(factor, 3) for factor in CyclicCosine(cycles=2).curve(steps=6)]
        [1.0, 0.75, 0.25, 1.0, 0.75, 0.25]
        >>> CyclicCosine(cycles=2).ends(Run(steps=7))
        [4, 7]

    References:
        Huang et al., Snapshot ensembles, 2017, equation 2: https://arxiv.org/abs/1704.00109
    """

    cycles: int = 5
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_count("cycles", self.cycles, 1)
        check_count("warmup_steps", self.warmup_steps, 0)

    def ends(self, run: Run) -> list[int]:
        """Updates made when each cycle is over.

        Raises:
            ValueError: If nobody knows how long the run is.
        """
        run.passed(0)
        steps = math.ceil(run.steps)
        cycles = max(1, min(self.cycles, steps // (self.warmup_steps + 1)))
        period = math.ceil(steps / cycles)
        if period * (cycles - 1) + self.warmup_steps >= steps:
            period = steps // cycles
        return [*range(period, period * cycles, period), steps]

    @override
    def factor(self, step: int, run: Run) -> float:
        return self.at(step, self.ends(run))

    def at(self, step: int, ends: Sequence[int]) -> float:
        """The factor where the cycles end after so many updates."""
        cycle = min(bisect_right(ends, step), len(ends) - 1)
        start = ends[cycle - 1] if cycle else 0
        into, length = min(step, ends[-1] - 1) - start, ends[cycle] - start
        behind, fall = max(0, into - self.warmup_steps), max(1, length - self.warmup_steps)
        return warmth(into, self.warmup_steps) * (1 + math.cos(math.pi * behind / fall)) / 2


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Rise and fall once; momentum moves the other way.

    Args:
        rise: Share of the run in which the learning rate rises, at least 0 and at most 1.
        initial: Factor at the start, at least 0 and at most 1.
        final: Factor at the end, likewise.
        shape: ``"cosine"`` or ``"linear"``, of both phases.
        cycle_momentum: Whether momentum (beta1 in Adam) falls from 0.95 to 0.85 and rises again.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.

    Example:
        >>> OneCycle(rise=0.5, initial=0, shape="linear").curve(steps=4)
        [0.0, 0.5, 1.0, 0.5]

    References:
        Smith, A disciplined approach to neural network hyper-parameters, 2018: https://arxiv.org/abs/1803.09820
    """

    rise: float = 0.3
    initial: float = 0.04
    final: float = 0.0
    shape: Literal["cosine", "linear"] = "cosine"
    cycle_momentum: bool = True

    def __post_init__(self) -> None:
        for name in ("rise", "initial", "final"):
            _check_share(name, getattr(self, name))
        check_choice("shape", self.shape, ("cosine", "linear"))
        check_flag("cycle_momentum", self.cycle_momentum)

    @override
    def factor(self, step: int, run: Run) -> float:
        rising, share = self._phase(step, run)
        return self.initial + (1 - self.initial) * share if rising else 1 + (self.final - 1) * share

    @override
    def momentum(self, step: int, run: Run) -> float | None:
        if not self.cycle_momentum:
            return None
        rising, share = self._phase(step, run)
        return 0.95 - 0.1 * share if rising else 0.85 + 0.1 * share

    def _phase(self, step: int, run: Run) -> tuple[bool, float]:
        """Whether the learning rate rises, and what share of its way it has gone."""
        passed = run.passed(step)
        rising = passed < self.rise
        share = passed / self.rise if rising else (passed - self.rise) / (1 - self.rise) if self.rise < 1 else 0.0
        return rising, share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Warmup(Schedule):
    """Let the learning rate rise on a straight line to where another schedule wants it.

    The update number t of W has ``(t + 1) / (W + 1)`` of the learning rate: none is wasted at zero.

    Args:
        warmup_steps: A duration.
        schedule: What comes behind, or lies below.
        kind: ``"prepended"``: the schedule starts at its own step 0 when the warmup is done, and the run gets longer by
            the warmup (10,000 + 1,000 steps are 11,000). ``"overlaid"``: the schedule starts with the run, and the
            warmup is laid over its first steps.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.

    Example:
        >>> Warmup(3, Linear()).curve(steps=4)
        [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
        >>> Warmup(3, Linear(), kind="overlaid").curve(steps=4)
        [0.25, 0.375, 0.375, 0.25]

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """

    warmup_steps: float | str
    schedule: Schedule = field(default_factory=Constant)
    kind: Literal["prepended", "overlaid"] = "prepended"

    def __post_init__(self) -> None:
        parse_duration("warmup_steps", self.warmup_steps)
        check_choice("kind", self.kind, ("prepended", "overlaid"))
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be one of lightning_recipes.core.schedules, got {self.schedule!r}")

    @override
    def factor(self, step: int, run: Run) -> float:
        length = self._length(run)
        return warmth(step, length) * self.schedule.factor(self._behind(step, length), run)

    @override
    def momentum(self, step: int, run: Run) -> float | None:
        return self.schedule.momentum(self._behind(step, self._length(run)), run)

    @override
    def added_steps(self, run: Run) -> int:
        return (self._length(run) if self.kind == "prepended" else 0) + self.schedule.added_steps(run)

    @override
    def overlaid_steps(self, run: Run) -> int:
        return max(self._length(run) if self.kind == "overlaid" else 0, self.schedule.overlaid_steps(run))

    def _length(self, run: Run) -> int:
        return run.length("warmup_steps", self.warmup_steps)

    def _behind(self, step: int, length: int) -> int:
        return max(0, step - length) if self.kind == "prepended" else step


def warmth(step: int, warmup_steps: int) -> float:
    """The share of the learning rate that the update number ``step`` of a warmup has, 1 behind it."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _length(run: Run, name: str, duration: float | str) -> int:
    return 0 if duration == 0 else run.length(name, duration)


def _check_share(name: str, value: object) -> None:
    if value not in (0, 1):
        check_real(name, value, 0, 1)


SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(),
    "cosine": Cosine(),
    "cyclic cosine": CyclicCosine(),
    "inverse square root": InverseSquareRoot(),
    "linear": Linear(),
    "one cycle": OneCycle(),
    "polynomial": Polynomial(),
    "step decay": StepDecay(),
    "warmup stable decay": WarmupStableDecay(),
}  # with the arguments that they have by default


@dataclass(frozen=True)
class ReduceOnPlateau:
    """Cut the learning rate when a metric has stopped improving, by more than its noise.

    It depends on what the run measures, so it is no :class:`Schedule`: :class:`PlateauRule` records the one it makes.

    Args:
        monitor: Name of the metric.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        gamma: Multiplies the learning rate each time, above 0 and below 1.
        patience: Checks without an improvement, at least 1.
        min_delta: As for :class:`~lightning_recipes.core.early_stopping.EarlyStoppingRule`.
        max_cuts: At most so many, at least 1.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    gamma: float = 0.1
    patience: int = 5
    min_delta: float | str = "auto"
    max_cuts: int = 3

    def __post_init__(self) -> None:
        check_real("gamma", self.gamma, 0, 1)
        check_count("patience", self.patience, 1)
        check_count("max_cuts", self.max_cuts, 1)
        EarlyStoppingRule(self.min_delta, self.mode)


class PlateauRule:
    """Says when to cut the learning rate, by the rule of early stopping, and records the schedule that comes of it.

    After a cut the metric has ``patience`` checks again.

    Attributes:
        milestones: Steps of the cuts.

    Example:
        >>> rule = PlateauRule(ReduceOnPlateau(patience=2, min_delta=0.0))
        >>> [rule.update(value, step) for step, value in enumerate((3.0, 2.0, 2.0, 2.0, 2.0, 1.0))]
        [False, False, False, True, False, False]
        >>> rule.schedule
        PiecewiseConstant(milestones=(3,), factors=(0.1,))
    """

    def __init__(self, asked: ReduceOnPlateau) -> None:
        self.asked = asked
        self.milestones: list[int] = []
        self.checks = EarlyStoppingRule(asked.min_delta, asked.mode)

    @property
    def schedule(self) -> PiecewiseConstant:
        """What has been made so far; another run can be given it."""
        return PiecewiseConstant(self.milestones, [self.asked.gamma**cut for cut in range(1, len(self.milestones) + 1)])

    def update(self, value: float, step: int, counts: bool = True) -> bool:
        """Take in a check, ``step`` updates into the schedule, and say whether the next one has a lower learning rate.

        Args:
            value: The metric.
            step: Updates done.
            counts: Whether it may count, as one within a warmup does not.
        """
        verdict = self.checks.update(value, Patience(self.asked.patience), steps=step, counts=counts)
        if not counts or verdict is None or len(self.milestones) == self.asked.max_cuts:
            return False
        self.checks.waived = len(self.checks.curve.values)
        self.milestones.append(step)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"milestones": list(self.milestones), "checks": self.checks.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.milestones = list(state_dict["milestones"])
        self.checks.load_state_dict(state_dict["checks"])
