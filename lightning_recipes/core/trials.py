"""Short trainings of a sweep: what they are to do, whether they are stable, and what came out of all of them."""

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_recipes.core.files import put
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.instability import InstabilityRule
from lightning_recipes.core.schedules import warmth
from lightning_recipes.core.tables import as_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOWN_UP = 100.0  # times the first loss above it
FEW = 4  # losses whose changes are the scale where the first one is near 0
GIVEN_BACK = 0.3  # of what the loss had gained: a trial that ends so is unstable
NOISE = 3.0  # standard deviations of a loss, by which it has to have risen besides
SHORT = 10  # losses that a level is the median of
STUCK = ("vanishing gradient", "no progress")  # from which a training does not come back
QUIET = 0.01  # of what the loss has gained: by so little it wobbles where a training has gone to its minimum
SETTLED = 30  # updates before a gradient that falls to a fifth means anything
POINTS = 300  # of a curve that are kept
BLOCK = 10  # updates that are read back from the device, and judged, together


@dataclass(frozen=True)
class Trial:
    """A short training to do.

    Args:
        learning_rate: Of the first parameter group that has one, behind the warmup; the others keep their ratio to it.
        steps: Optimizer updates, the warmup included.
        warmup_steps: Updates in which the learning rate rises to it.
        seed: Of everything random; every trial with the same one starts alike and sees the same data.
        validates: Whether the loss on validation data is wanted in the end.
    """

    learning_rate: float
    steps: int
    warmup_steps: int = 0
    seed: int = 0
    validates: bool = False

    def factor(self, step: int) -> float:
        """Of the learning rate, at the update number ``step``."""
        return warmth(step, self.warmup_steps)


@dataclass(frozen=True)
class Outcome:
    """What came out of a trial.

    Args:
        stable: Whether it was.
        loss: Mean of its last losses, a tenth of the steps; NaN if it was not stable, which is no number to compare.
        steps: Updates made: an unstable trial ends at the first certain sign.
        reason: Why it was not stable.
        losses: The training loss, thinned out to 300 values at most.
        val_loss: On validation data in the end; None if there are none, or nobody has asked.
    """

    stable: bool
    loss: float
    steps: int
    reason: str = ""
    losses: tuple[float, ...] = field(default=(), repr=False)
    val_loss: float | None = None


class Search(Protocol):
    """Plans the trials of a sweep; knows neither a Trainer nor who runs them."""

    def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
        """The trials that are wanted next, the most useful first; none when all is known.

        A pure function of the outcomes so far: a sweep that was cut goes on with those it has.
        """


class TrialRule:
    """Judges a trial by the loss and the gradient norm of every update.

    It is unstable, at once, where one of them is not finite, the loss is a hundred times the first one above it (or a
    hundred times by what the first four differ: a loss may begin near 0), or the training is stuck (dead units, a loss
    that does not move; see :class:`~lightning_recipes.core.instability.InstabilityRule`). It is unstable in the end,
    where it was stuck with the loss at its lowest, which wobbles by more than a hundredth of its gain: without noise it
    has gone to its minimum; or where the loss has risen above the first one or gives back a third of what it had
    gained, by three standard deviations of its noise besides. A loss that stands is stable, and so is one that rises
    for a while and comes back.

    Args:
        steps: Updates of the trial.

    Example:
        >>> rule = TrialRule(steps=40)
        >>> any(rule.update(1 / (1 + step), 1.0) for step in range(40))
        False
        >>> rule.outcome().stable
        True
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.best = math.inf  # lowest level
        self.reason = ""
        self._rule = InstabilityRule()
        self._scale = math.inf  # of the loss
        self._stuck = ""  # what looks so, with the loss at its lowest

    def update(self, loss: float, norm: float, rate: float = 0.0, scaled: bool = False) -> bool:
        """Take in an update that is about to be made and say whether the trial is unstable and over.

        Args:
            loss: Of the update's batch.
            norm: L2 norm of its gradient.
            rate: Learning rate; 0 if it is not known.
            scaled: Whether a GradScaler skips an update whose gradient is not finite, which is normal.
        """
        step = len(self.losses)
        self.losses.append(loss)
        found = self._rule.update(loss, norm, rate, scaled)
        first = self.losses[0]
        if not math.isfinite(loss) or (found is not None and found.kind == "not finite"):
            self.reason = f"not finite at step {step}"
        elif loss - first > BLOWN_UP * self._scale:
            self.reason = f"the loss rose from {first:.3g} to {loss:.3g} at step {step}"
        elif found is not None and found.kind in STUCK and step >= SETTLED:
            stuck = f"{found.kind} at step {step}"
            if statistics.median(self.losses[-SHORT:]) > self.best + QUIET * (self._first - self.best):
                self.reason = stuck
            else:
                self._stuck = self._stuck or stuck
        if step == FEW - 1:
            self._scale = max(abs(first), statistics.median(abs(a - b) for a, b in pairwise(self.losses)))
        if step % SHORT == SHORT - 1:
            self.best = min(self.best, statistics.median(self.losses[-SHORT:]))
        return bool(self.reason)

    def outcome(self, val_loss: float | None = None) -> Outcome:
        """The verdict, after the last update; and what was validated then."""
        done, losses = len(self.losses), self.losses
        loss = math.nan
        if not self.reason and losses:
            first = self._first
            loss = statistics.fmean(losses[-max(SHORT, self.steps // 10) :])
            margin = NOISE * min(statistics.pstdev(losses[:SHORT]), _deviation(losses[-4 * SHORT :]))
            if self._stuck and _deviation(losses[-SHORT:]) > QUIET * (first - loss):
                self.reason = self._stuck
            elif loss > first + margin and done > SHORT:
                self.reason = f"the loss ended at {loss:.3g}, above the first one, {first:.3g}"
            elif loss > self.best + GIVEN_BACK * max(first - self.best, 0.0) + margin:
                self.reason = f"the loss ended at {loss:.3g} after it had been down at {self.best:.3g}"
        every = math.ceil(done / POINTS) if done else 1
        kept = tuple(losses[::every])
        return Outcome(not self.reason, math.nan if self.reason else loss, done, self.reason, kept, val_loss)

    @property
    def _first(self) -> float:
        """Of the losses: one batch alone may be an easy one."""
        return max(self.losses[0], statistics.median(self.losses[: SHORT // 2]))


class Readings:
    """Has a :class:`TrialRule` judge updates in blocks: in the same order, at a tenth of the waits for the device.

    Args:
        rule: Judges them.
    """

    def __init__(self, rule: TrialRule) -> None:
        self.rule = rule
        self._waiting: list[tuple[Tensor, float | Tensor]] = []
        self._rates: list[tuple[float, bool]] = []

    def add(self, loss: Tensor, norm: float | Tensor, rate: float = 0.0, scaled: bool = False) -> bool:
        """Take in an update that is about to be made, as :meth:`TrialRule.update`; whether a block is full."""
        self._waiting.append((loss, norm))
        self._rates.append((rate, scaled))
        return len(self._rates) == BLOCK

    def read(self, mean: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Judge what is waiting, up to the first certain sign; whether there is one.

        Args:
            mean: Of values over the ranks, which have to read together; None for a single one.
        """
        if not self._waiting or self.rule.reason:
            return bool(self.rule.reason)
        values: list[Any] = [each for pair in self._waiting for each in pair]  # read one by one where nothing waits
        if mean is not None or values[0].device.type != "cpu":
            device = values[0].device
            together = torch.cat([torch.as_tensor(each, dtype=torch.float32, device=device).view(1) for each in values])
            values = (together if mean is None else mean(together)).tolist()
        rates, scaled = zip(*self._rates, strict=True)
        self._waiting, self._rates = [], []
        return any(map(self.rule.update, map(float, values[::2]), map(float, values[1::2]), rates, scaled))


def _deviation(values: list[float]) -> float:
    """Standard deviation, from the quartiles."""
    ascending = sorted(values)
    return (ascending[3 * len(values) // 4] - ascending[len(values) // 4]) / 1.349


@dataclass
class SweepResult:
    """What a sweep has found.

    Attributes:
        best: The trial to train like: its learning rate and its warmup; None if there is none.
        finding: The same in words, with what to do.
        outcomes: Of every trial that was run.
        summary: More numbers, by name.
    """

    best: Trial | None
    finding: Finding
    outcomes: dict[Trial, Outcome]
    summary: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Updates that all trials have made."""
        return sum(outcome.steps for outcome in self.outcomes.values())

    def table(self) -> list[dict[str, Any]]:
        """A row for each learning rate and warmup, and length of trials without one.

        Has their number, how many of them were stable, and the mean losses of those.
        """
        rows: dict[tuple[float, int, int], list[tuple[Trial, Outcome]]] = {}
        for trial, outcome in sorted(self.outcomes.items(), key=lambda item: (item[0].learning_rate, item[0].seed)):
            rows.setdefault(_place(trial), []).append((trial, outcome))
        return [
            {
                "learning_rate": rate,
                "warmup_steps": warmup,
                "steps": max(trial.steps for trial, _ in each),
                "trials": len(each),
                "stable": sum(outcome.stable for _, outcome in each),
                "loss": mean_loss([outcome for _, outcome in each]),
                "val_loss": _mean([o.val_loss for _, o in each if o.stable and o.val_loss is not None]),
                "reason": next((outcome.reason for _, outcome in each if not outcome.stable), ""),
                "best": self.best is not None and _place(self.best) == (rate, warmup, steps),
            }
            for (rate, warmup, steps), each in sorted(rows.items())
        ]

    def to_markdown(self) -> str:
        """The table, with the finding below it."""
        rows = self.table()
        names = [name for name in ("loss", "val_loss") if not all(math.isnan(row[name]) for row in rows)]
        lines = [f"| learning rate | warmup steps | steps | stable | {' | '.join(names)} | |"]
        lines.append("|" + (5 + len(names)) * "---|")
        for row in rows:
            losses = ["" if math.isnan(row[name]) else f"{row[name]:.4g}" for name in names]
            lines.append(
                f"| {row['learning_rate']:.3g} | {row['warmup_steps']} | {row['steps']} |"
                f" {row['stable']} of {row['trials']} | {' | '.join(losses)} |"
                f" {'**recommended**' if row['best'] else row['reason']} |"
            )
        return "\n".join([*lines, "", f"{self.finding.message} {self.finding.advice}"])

    def _repr_html_(self) -> str:
        return as_html(self.to_markdown())

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the sweep; needs the extra ``plots``.

        Where warmups differ: a map of learning rate and warmup with the loss, grey where a trial was unstable.
        Else the loss over the learning rate.

        Returns:
            Figure and axes.
        """
        drawn: tuple[Figure, Axes] = _draw(self, ax)
        return drawn

    def plot_curves(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the training curves of the best learning rate, and of those above it; needs the extra ``plots``.

        Returns:
            Figure and axes.
        """
        drawn: tuple[Figure, Axes] = _draw_curves(self, ax)
        return drawn

    def save(self, path: str | Path) -> None:
        """Write all outcomes as JSON, at once or not at all."""
        save_outcomes(path, self.outcomes)


def mean_loss(outcomes: list[Outcome]) -> float:
    """Of the stable ones; NaN if there is none."""
    return _mean([outcome.loss for outcome in outcomes if outcome.stable])


def _mean(losses: list[float]) -> float:
    return statistics.fmean(losses) if losses else math.nan


def save_outcomes(path: str | Path, outcomes: Mapping[Trial, Outcome]) -> None:
    """Write outcomes as JSON, at once or not at all; infinities and NaN, which JSON has not, as strings."""
    lines = [
        {"trial": asdict(trial), "outcome": outcome_as_data(outcome)} for trial, outcome in sorted_by_trial(outcomes)
    ]
    put(Path(path), json.dumps({"trials": lines}, allow_nan=False, indent=1))


def load_outcomes(path: str | Path) -> dict[Trial, Outcome]:
    """Read what :func:`save_outcomes` has written; nothing if there is no such file.

    Raises:
        ValueError: If it was written by somebody else, or is damaged.
    """
    if not Path(path).exists():
        return {}
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        return {Trial(**each["trial"]): outcome_from_data(each["outcome"]) for each in saved["trials"]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} has no outcomes of a sweep ({type(error).__name__}: {error}): give another path, or delete it to"
            " start anew"
        ) from error


def outcome_as_data(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values that JSON knows."""
    losses = [loss if math.isfinite(loss) else str(loss) for loss in outcome.losses]
    val_loss = None if outcome.val_loss is None else str(outcome.val_loss)
    return {**asdict(outcome), "loss": str(outcome.loss), "losses": losses, "val_loss": val_loss}


def outcome_from_data(data: Mapping[str, Any]) -> Outcome:
    """The outcome that :func:`outcome_as_data` took apart."""
    val_loss = None if data.get("val_loss") is None else float(data["val_loss"])
    losses = tuple(map(float, data["losses"]))
    return Outcome(**{**data, "loss": float(data["loss"]), "losses": losses, "val_loss": val_loss})


def sorted_by_trial(outcomes: Mapping[Trial, Outcome]) -> list[tuple[Trial, Outcome]]:
    """In an order that does not depend on who ran them."""
    return sorted(outcomes.items(), key=lambda item: (*_place(item[0]), item[0].seed, item[0].steps))


def _place(trial: Trial) -> tuple[float, int, int]:
    """Of the row in the table: a warmup is shown with trials of all lengths."""
    return trial.learning_rate, trial.warmup_steps, 0 if trial.warmup_steps else trial.steps


def _draw(result: SweepResult, ax: Any) -> Any:
    figure, ax = _axes(ax)
    rows = result.table()
    if len({row["warmup_steps"] for row in rows}) == 1:
        _draw_rates(result, rows, ax)
    else:
        _draw_map(rows, ax)
    return figure, ax


def _draw_rates(result: SweepResult, rows: list[dict[str, Any]], ax: Any) -> None:
    stable = [row for row in rows if row["stable"] == row["trials"]]
    for steps in sorted({row["steps"] for row in stable}):
        for name, label in (("loss", "training"), ("val_loss", "validation")):
            points = [(row["learning_rate"], row[name]) for row in stable if row["steps"] == steps]
            if not all(math.isnan(loss) for _, loss in points):
                ax.plot(*zip(*points, strict=True), marker="o", label=f"{label}, {steps:,} steps")
    for row in rows:
        if row["stable"] < row["trials"]:
            ax.axvline(row["learning_rate"], color="C3", linewidth=0.8, linestyle=":")
    if result.best is not None:
        ax.axvline(result.best.learning_rate, color="black", linewidth=0.8, linestyle="--", label="recommended")
        ax.legend()
    ax.set(xscale="log", xlabel="learning rate (dotted: unstable)", ylabel="loss")
    if all(row["loss"] > 0 for row in stable):
        ax.set_yscale("log")


def _draw_map(rows: list[dict[str, Any]], ax: Any) -> None:
    warmups = sorted({row["warmup_steps"] for row in rows})
    rates = sorted({row["learning_rate"] for row in rows})
    losses = [row["loss"] for row in rows if row["stable"] == row["trials"]]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    for row in rows:
        x, y = warmups.index(row["warmup_steps"]), rates.index(row["learning_rate"])
        if row["stable"] == row["trials"]:
            shade = (row["loss"] - low) / (high - low) if high > low else 0.0
            ax.scatter(x, y, s=900, marker="s", color=(0.2 + 0.6 * shade, 0.75 - 0.3 * shade, 0.35 + 0.3 * shade))
            ax.annotate(f"{row['loss']:.2g}", (x, y), ha="center", va="center", fontsize=8)
        else:
            ax.scatter(x, y, s=900, marker="s", color="0.9")
            ax.annotate(f"unstable\n{row['stable']}/{row['trials']}", (x, y), ha="center", va="center", fontsize=7)
        if row["best"]:
            ax.scatter(x, y, s=1200, marker="s", facecolors="none", edgecolors="black", linewidths=2)
    ax.set_xticks(range(len(warmups)), [str(warmup) for warmup in warmups])
    ax.set_yticks(range(len(rates)), [f"{rate:.2g}" for rate in rates])
    ax.set(xlabel="warmup steps", ylabel="learning rate", title="training loss at the end of the trials")
    ax.margins(0.15)


def _draw_curves(result: SweepResult, ax: Any) -> Any:
    figure, ax = _axes(ax)
    at = 0.0 if result.best is None else result.best.learning_rate
    shown = [trial for trial in result.outcomes if trial.learning_rate >= at and trial.seed == 0]
    longest = {(trial.learning_rate, trial.warmup_steps): trial for trial in sorted(shown, key=lambda each: each.steps)}
    for trial, outcome in sorted_by_trial(result.outcomes):
        if trial in longest.values():
            every = max(1, math.ceil(outcome.steps / max(1, len(outcome.losses))))
            steps = [every * point for point in range(len(outcome.losses))]
            warmed = f", warmup {trial.warmup_steps}" if trial.warmup_steps else ""
            label = f"{trial.learning_rate:.2g}{warmed}{'' if outcome.stable else ' (unstable)'}"
            ax.plot(steps, outcome.losses, linewidth=1, linestyle="-" if outcome.stable else ":", label=label)
    ax.set(xlabel="update", ylabel="training loss", yscale="symlog")
    ax.legend(fontsize=8)
    return figure, ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'lightning-recipes[plots]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()
