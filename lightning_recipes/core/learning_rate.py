"""Which learning rate: short trainings over a grid of them, and what they say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_recipes.core.arguments import check_count, check_real
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.trials import Outcome, SweepResult, Trial, mean_loss

PLAYBOOK = (
    "Deep Learning Tuning Playbook, identifying unstable workloads: https://github.com/google-research/tuning_playbook"
)
GRID = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
LONGER = 2  # times the steps of the trials: for a run that is longer than that another rate is best,
LOWER = 2.0  # times lower,
SAFE = 4.0  # and so many times below the edge of stability: what is nearer may be unstable later


def learning_rate_sensitivity(losses: Mapping[float, float], initial: float) -> float:
    """By how much a learning rate that is off costs: the mean of ``min(loss, initial) - best loss`` over the rates.

    Args:
        losses: Final loss at each learning rate, of a grid with even ratios; NaN where the training was not stable.
        initial: Loss before training, which takes the place of a NaN, too.

    Example:
        >>> learning_rate_sensitivity({0.01: 1.0, 0.1: 0.5, 1.0: float("nan")}, initial=2.0)
        0.6666666666666667

    References:
        Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, 2023:
        https://arxiv.org/abs/2309.14322
    """
    capped = [initial if math.isnan(loss) else min(loss, initial) for loss in losses.values()]
    return sum(capped) / len(capped) - min(capped)


@dataclass(frozen=True)
class LearningRateSearch:
    """Plans the trials of a learning-rate sweep; a :class:`~lightning_recipes.core.trials.Search`.

    Each learning rate is trained with for some steps from the same start with the same data. lr* has the lowest mean
    loss over the last tenth of the steps; an unstable one (not finite, or an uncharacteristically high loss) is not
    feasible, and no number. A long run is best at a lower rate than a short trial: the one to train at is the rate of
    the grid that is nearest to half of lr*, or to a quarter of the lowest unstable one, whichever is lower
    (``benchmarks/LOG.md``); it is lr* itself for a run that is hardly longer than the trials.

    Args:
        learning_rates: Rising, at least two, above 0.
        steps: Updates of each, at least 20.
        seeds: How many trials for each, at least 1.
        max_steps: Length of the run that the rate is for, at least 1; None for a long one.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
        Wu et al., Understanding Short-Horizon Bias in Stochastic Meta-Optimization, 2018:
        https://arxiv.org/abs/1803.02021
    """

    learning_rates: Sequence[float] = GRID
    steps: int = 100
    seeds: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for rate in self.learning_rates:
            check_real("learning_rates", rate, 0, math.inf)
        if len(self.learning_rates) < 2 or [*self.learning_rates] != sorted({*self.learning_rates}):
            raise ValueError(f"learning_rates must rise and be at least two, got {self.learning_rates!r}")
        check_count("steps", self.steps, 20)
        check_count("seeds", self.seeds, 1)
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps, 1)

    @property
    def most_steps(self) -> int:
        """Updates that the sweep cannot exceed."""
        return len(self.learning_rates) * self.seeds * self.steps

    def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
        """The trials that are wanted next; see :class:`~lightning_recipes.core.trials.Search`."""
        return [trial for seed in range(self.seeds) for trial in self._trials(seed) if trial not in outcomes]

    def _trials(self, seed: int) -> list[Trial]:
        return [Trial(rate, self.steps, 0, seed) for rate in self.learning_rates]

    def result(self, outcomes: Mapping[Trial, Outcome]) -> SweepResult:
        """What the outcomes say, when nothing more is asked."""
        by_rate = {
            rate: [outcomes[Trial(rate, self.steps, 0, seed)] for seed in range(self.seeds)]
            for rate in self.learning_rates
        }
        stable = {rate: all(outcome.stable for outcome in each) for rate, each in by_rate.items()}
        losses = {rate: mean_loss(each) if stable[rate] else math.nan for rate, each in by_rate.items()}
        firsts = [outcome.losses[0] for each in by_rate.values() for outcome in each if outcome.losses]
        initial = sum(firsts) / len(firsts)
        feasible = {rate: loss for rate, loss in losses.items() if stable[rate]}
        steps = sum(outcome.steps for outcome in outcomes.values())
        summary = {"initial_loss": initial, "sensitivity": learning_rate_sensitivity(losses, initial)}
        if not feasible:
            message = f"Every learning rate was unstable, {self.learning_rates[0]:.3g} the lowest."
            advice = "Try lower ones; if they are no better, look at data, initialisation and loss."
            finding = Finding("no learning rate is stable", "warning", message, advice, steps, source=PLAYBOOK)
            return SweepResult(None, finding, dict(outcomes), summary)
        lowest = min(feasible, key=feasible.__getitem__)
        edge = min((rate for rate in self.learning_rates if not stable[rate] and rate > lowest), default=math.inf)
        best = lowest
        if self.max_steps is None or self.max_steps > LONGER * self.steps:
            target = min(lowest / LOWER, edge / SAFE)
            best = min(feasible, key=lambda rate: abs(math.log(rate / target)))
        at_edge = self._next(lowest) == edge < math.inf
        return SweepResult(
            Trial(best, self.steps),
            self._finding(best, losses[best], lowest, edge, steps),
            dict(outcomes),
            {**summary, "lowest_loss_at": lowest, "edge": edge, "at_edge": float(at_edge)},
        )

    def _next(self, rate: float) -> float:
        above = [each for each in self.learning_rates if each > rate]
        return above[0] if above else math.inf

    def _finding(self, best: float, loss: float, lowest: float, edge: float, steps: int) -> Finding:
        where = "" if edge == math.inf else f"; from {edge:.3g} on the training is unstable"
        message = f"The training loss after {self.steps} steps is lowest at a learning rate of {lowest:.3g}{where}."
        lower = "; a long run is best at a lower rate than a short trial" if best < lowest else ""
        advice = f"Train at {best:.3g} (a loss of {loss:.4g}{lower})."
        rule = "learning rate found"
        if lowest in (self.learning_rates[0], self.learning_rates[-1]):
            side = "higher" if lowest == self.learning_rates[-1] else "lower"
            advice, rule = f"It is the last one of the grid: try {side} ones.", "best at the end of the grid"
        elif self._next(lowest) == edge:
            rule = "best at the edge of stability"
            advice += (
                " The best lies at the edge: if higher rates make the loss rise after a while, not at once, fixing the"
                " instability will help (WarmupSweep, then PercentileGradientClipping)."
            )
        evidence: dict[str, float | str] = {"learning_rate": best, "loss": loss, "lowest": lowest, "edge": edge}
        return Finding(rule, "info", message, advice, steps, evidence, PLAYBOOK)
