"""Which learning rate: short trainings over a grid of them, longer ones with the best, and what they say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_recipes.core.arguments import check_count, check_list, check_real
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.trials import Outcome, SweepResult, Trial

PLAYBOOK = (
    "Deep Learning Tuning Playbook, identifying unstable workloads: https://github.com/google-research/tuning_playbook"
)
GRID = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
MOST = 8  # learning rates that are trained with for long
BELOW = 2  # of them are below the one that is best after the short trials, to begin with


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

    First every learning rate is trained with for some steps, all from the same start with the same data. lr* has the
    lowest mean loss over the last tenth of them; an unstable one (not finite, or an uncharacteristically high loss) is
    not feasible, and no number. The longer a run, the lower the rate that it ends best at, so then lr* and the two
    below it are trained with for ``max_steps``, and the neighbours of the best of those, until it has both: no more
    than eight. They are judged by their validation loss, if it is known, and by each other: the one to train at has the
    lowest mean of its own loss, which counts half, and those of its neighbours, a quarter each (an unstable one as the
    worst there is). What was lucky once, or lies beside a cliff, is not chosen so.

    Args:
        learning_rates: Rising, at least two, above 0.
        steps: Updates of each, at least 20.
        seeds: How many long trials for each, at least 1.
        max_steps: Updates of the long ones, at least 20: the length of the run, if that can be afforded. Not above
            ``steps``: there are only trials of that length, of every learning rate.

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
    max_steps: int = 500

    def __post_init__(self) -> None:
        for rate in check_list("learning_rates", self.learning_rates, "numbers"):
            check_real("learning_rates", rate, 0, math.inf)
        if len(self.learning_rates) < 2 or [*self.learning_rates] != sorted({*self.learning_rates}):
            raise ValueError(f"learning_rates must rise and be at least two, got {self.learning_rates!r}")
        check_count("steps", self.steps, 20)
        check_count("seeds", self.seeds, 1)
        check_count("max_steps", self.max_steps, 20)

    @property
    def most_steps(self) -> int:
        """Updates that the sweep cannot exceed."""
        rates = len(self.learning_rates)
        if not self._in_two:
            return rates * self.seeds * self.max_steps
        return rates * self.steps + min(rates, MOST) * self.seeds * self.max_steps

    def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
        """The trials that are wanted next; see :class:`~lightning_recipes.core.trials.Search`."""
        short = [trial for trial in map(self._short, self.learning_rates) if trial not in outcomes]
        if self._in_two and short:
            return short
        long = [trial for seed in range(self.seeds) for trial in self._long(self._chosen(outcomes), seed)]
        return [trial for trial in long if trial not in outcomes]

    # ---------------------------------------------------------------------------------- the procedure

    @property
    def _in_two(self) -> bool:
        """Whether there are short trials and long ones."""
        return self.max_steps > self.steps

    def _short(self, rate: float) -> Trial:
        return Trial(rate, self.steps)

    def _long(self, rates: Sequence[float], seed: int) -> list[Trial]:
        return [Trial(rate, self.max_steps, 0, seed, validates=True) for rate in rates]

    def _chosen(self, outcomes: Mapping[Trial, Outcome]) -> Sequence[float]:
        """The learning rates to train with for long, rising, as far as that is known; each has its neighbours in it."""
        rates = self.learning_rates
        if not self._in_two:
            return rates
        found = {index: outcomes[self._short(rate)] for index, rate in enumerate(rates)}
        feasible = [index for index in found if found[index].stable]
        if not feasible:
            return ()
        start = min(feasible, key=lambda index: found[index].loss)
        low, high = max(0, start - BELOW), start + 1
        while high - low < MOST:
            known = {rate: self._losses(outcomes, rate) for rate in rates[low:high]}
            if not all(known.values()):
                break  # to be trained first
            losses = self._levels(outcomes, rates[low:high])
            best = {losses.index(min(losses)), _smoothest(losses)}
            down, up = low > 0 and 0 in best, high < len(rates) and len(losses) - 1 in best
            if not (down or up):
                break
            low, high = low - down, high + up
        return rates[low:high]

    def _losses(self, outcomes: Mapping[Trial, Outcome], rate: float) -> list[float]:
        """Of the long trials of a learning rate, NaN where it was unstable; nothing if one is missing."""
        each = [outcomes.get(trial) for seed in range(self.seeds) for trial in self._long([rate], seed)]
        return [_judged(outcome) for outcome in each if outcome is not None] if None not in each else []

    def _levels(self, outcomes: Mapping[Trial, Outcome], rates: Sequence[float]) -> list[float]:
        """Mean loss at each learning rate; of an unstable one the worst of all, that before training included."""
        means = [fmean(self._losses(outcomes, rate)) for rate in rates]
        worst = max([_initial(outcomes), *(mean for mean in means if not math.isnan(mean))])
        return [worst if math.isnan(mean) else mean for mean in means]

    # ---------------------------------------------------------------------------------- what it says

    def result(self, outcomes: Mapping[Trial, Outcome]) -> SweepResult:
        """What the outcomes say, when nothing more is asked."""
        chosen, initial = self._chosen(outcomes), _initial(outcomes)
        short = (
            [self._short(rate) for rate in self.learning_rates] if self._in_two else self._long(self.learning_rates, 0)
        )
        losses = {trial.learning_rate: outcomes[trial].loss for trial in short}
        unstable = {trial.learning_rate for trial, outcome in outcomes.items() if not outcome.stable}
        feasible = [place for place, rate in enumerate(chosen) if not math.isnan(fmean(self._losses(outcomes, rate)))]
        steps = sum(outcome.steps for outcome in outcomes.values())
        summary = {"initial_loss": initial, "sensitivity": learning_rate_sensitivity(losses, initial)}
        if not feasible:
            tried = f"{self.learning_rates[0]:.3g} the lowest" if not chosen else f"not even {chosen[0]:.3g} for long"
            message = f"Every learning rate was unstable, {tried}."
            advice = "Try lower ones; if they are no better, look at data, initialisation and loss."
            finding = Finding("no learning rate is stable", "warning", message, advice, steps, source=PLAYBOOK)
            return SweepResult(None, finding, dict(outcomes), summary)
        levels = self._levels(outcomes, chosen)
        place, smooth = min(feasible, key=levels.__getitem__), _smoothed(levels)
        lowest, best = chosen[place], min(feasible, key=smooth.__getitem__)
        edge = min((rate for rate in unstable if rate > lowest), default=math.inf)
        at_edge = self._next(lowest) == edge < math.inf
        trial = self._long([chosen[best]], 0)[0]
        early = min((rate for rate in losses if not math.isnan(losses[rate])), key=losses.__getitem__, default=lowest)
        evidence = {"learning_rate": trial.learning_rate, "loss": levels[best], "lowest": lowest, "edge": edge}
        validated = outcomes[trial].val_loss is not None
        return SweepResult(
            trial,
            self._finding(evidence, "validation" if validated else "training", at_edge, steps),
            dict(outcomes),
            {**summary, "lowest_loss_at": lowest, "lowest_early_at": early, "edge": edge, "at_edge": float(at_edge)},
        )

    def _next(self, rate: float) -> float:
        above = [each for each in self.learning_rates if each > rate]
        return above[0] if above else math.inf

    def _finding(self, evidence: dict[str, float], kind: str, at_edge: bool, steps: int) -> Finding:
        best, loss, lowest, edge = evidence.values()
        where = "" if edge == math.inf else f"; from {edge:.3g} on the training is unstable"
        message = f"The {kind} loss after {self.max_steps:,} steps is lowest at a learning rate of {lowest:.3g}{where}."
        advice = f"Train at {best:.3g} (a loss of {loss:.4g}); a much longer run may be best at a lower one."
        if best != lowest:
            advice += (
                f" It is the safer choice: the rates next to {best:.3g} end lower on average than those next to"
                f" {lowest:.3g}, whose own loss may be luck."
            )
        rule = "learning rate found"
        if lowest in (self.learning_rates[0], self.learning_rates[-1]):
            side, ones = ("highest", "higher") if lowest == self.learning_rates[-1] else ("lowest", "lower")
            advice = f"It is the {side} of the grid: try {ones} ones."
            rule = "best at the end of the grid"
        elif at_edge:
            rule = "best at the edge of stability"
            advice += (
                " The best lies at the edge: if higher rates make the loss rise after a while, not at once, fixing the"
                " instability will help (WarmupSweep, then PercentileGradientClipping)."
            )
        return Finding(rule, "info", message, advice, steps, {**evidence}, PLAYBOOK)


def _judged(outcome: Outcome) -> float:
    """The validation loss, if it was asked for; NaN if the training was unstable."""
    loss = outcome.loss if outcome.val_loss is None or not outcome.stable else outcome.val_loss
    return loss if math.isfinite(loss) else math.nan


def _initial(outcomes: Mapping[Trial, Outcome]) -> float:
    """Mean loss before training."""
    return fmean([outcome.losses[0] for outcome in outcomes.values() if outcome.losses])


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Half of each, a quarter of each of its neighbours; at an end it is its own neighbour."""
    left, right = [losses[0], *losses[:-1]], [*losses[1:], losses[-1]]
    return [low / 4 + loss / 2 + high / 4 for low, loss, high in zip(left, losses, right, strict=True)]


def _smoothest(losses: Sequence[float]) -> int:
    smooth = _smoothed(losses)
    return smooth.index(min(smooth))
