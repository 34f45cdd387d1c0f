"""The shortest warmup that makes a high learning rate stable: which short trainings to do, and what they say."""

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from lightning_recipes.core.arguments import check_count, check_real
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.trials import Outcome, SweepResult, Trial, mean_loss

PLAYBOOK = "Deep Learning Tuning Playbook, learning rate warmup: https://github.com/google-research/tuning_playbook"
LEAST = 100  # steps of a trial
LONGEST = 0.1  # of the run: a warmup is not tried beyond
LONG = 0.05  # of the run: a warmup for which the run may have to get longer
LADDER = (1, 3, 10, 30, 100, 300, 1000)  # times the learning rate in use, until a training becomes unstable;
DOWN = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # or stable


@dataclass(frozen=True)
class WarmupSearch:
    """Plans the trials of a warmup sweep; a :class:`~lightning_recipes.core.trials.Search`.

    The playbook's procedure. Without a ``base_learning_rate`` the lowest unstable one without warmup is found first, by
    steps of about 3, and multiplied by ``times``. A trial of W warmup steps rises from 0 to the base learning rate and
    stays there for 2 W steps (100 in all at least). The warmups are 10, 30, 100, 300... up to a tenth of the run: the
    shortest is found by bisection with one seed and confirmed with the others, which stay for W / 2 steps: nearly all
    trials that fail do so by then. A warmup helps if the training is stable and ends no higher than the best that is
    stable without: where nothing is learned it may be stable, too. If none does, lower learning rates are tried.

    Args:
        learning_rate: The one in use, above 0.
        max_steps: Length of the run that the warmup is for, at least 100.
        base_learning_rate: The one to be made stable; None for ``times`` the lowest unstable one.
        unstable_base_learning_rate: The lowest unstable one; None to find it.
        times: 10, or 100 in a second sweep.
        seeds: How many a learning rate and warmup have to be stable with, at least 1; of eight, seven will do.
        exhaustive: Try every warmup instead of bisecting.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range, or two contradict each other.

    Example:
        >>> search = WarmupSearch(0.1, max_steps=1000, base_learning_rate=1.0, seeds=1)
        >>> [(trial.learning_rate, trial.steps, trial.warmup_steps) for trial in search.ask({})]
        [(1.0, 100, 0)]

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """

    learning_rate: float
    max_steps: int
    base_learning_rate: float | None = None
    unstable_base_learning_rate: float | None = None
    times: float = 10.0
    seeds: int = 8
    exhaustive: bool = False

    def __post_init__(self) -> None:
        check_real("learning_rate", self.learning_rate, 0, math.inf)
        check_count("max_steps", self.max_steps, LEAST)
        for name in ("base_learning_rate", "unstable_base_learning_rate"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), 0, math.inf)
        if self.base_learning_rate is not None and self.unstable_base_learning_rate is not None:
            raise ValueError("give base_learning_rate or unstable_base_learning_rate, not both")
        if check_real("times", self.times, 0, math.inf) < 1:
            raise ValueError(f"times must be a number of at least 1, got {self.times!r}")
        check_count("seeds", self.seeds, 1)

    @property
    def warmups(self) -> list[int]:
        """The warmups that are tried."""
        candidates = [int(mantissa * 10**power) for power in range(1, 10) for mantissa in (1, 3)]
        return [warmup for warmup in candidates if warmup <= LONGEST * self.max_steps]

    @property
    def tolerated(self) -> int:
        """With how many seeds a warmup may fail: one in eight, as with a start that is bad beyond measure."""
        return self.seeds // 8

    @property
    def most_steps(self) -> int:
        """Updates that the sweep cannot exceed; it makes far fewer."""
        rates = len(self._rates(1.0))
        bracketing = len(LADDER) * LEAST if self.base_learning_rate is self.unstable_base_learning_rate is None else 0
        once = sum(trial.steps for warmup in (0, *self.warmups) for trial in self._trials(1.0, warmup, self.seeds))
        return self.seeds * bracketing + rates * once

    def ask(self, outcomes: Mapping[Trial, Outcome]) -> list[Trial]:
        """The trials that are wanted next; see :class:`~lightning_recipes.core.trials.Search`."""
        return next(self._wanted(outcomes, []), [])

    def result(self, outcomes: Mapping[Trial, Outcome]) -> SweepResult:
        """What the outcomes say, when nothing more is asked."""
        known: list[float] = []
        for wanted in self._wanted(outcomes, known):
            raise ValueError(f"the sweep is not over: {wanted[0]} has not been run")
        return self._conclude(outcomes, *known)

    # ---------------------------------------------------------------------------------- the procedure

    def _wanted(self, outcomes: Mapping[Trial, Outcome], known: list[float]) -> Iterator[list[Trial]]:
        """Yield the first trials that are not known; append to ``known`` the unstable rate, and what was tried last.

        That is: the lowest learning rate that is unstable without warmup (0 if none is), the one tried last, and the
        warmup that makes that stable (infinite if none does).
        """
        unstable = self.unstable_base_learning_rate or 0.0
        if self.base_learning_rate is None and not unstable:
            for rate in self._ladder(outcomes):
                yield from self._unknown(outcomes, rate, 0, self.seeds)
                unstable = unstable if self._is_stable(outcomes, rate, 0, self.seeds) else rate
        rate, warmup = self.learning_rate, 0.0
        for rate in self._rates(unstable):
            if self.base_learning_rate is not None:
                yield from self._unknown(outcomes, rate, 0, self.seeds)
                if self._is_stable(outcomes, rate, 0, self.seeds):
                    warmup = 0
                    break
                unstable = rate
            warmup = yield from self._shortest(outcomes, rate)
            if warmup < math.inf and self._loss(outcomes, rate, int(warmup)) <= self._best_without(outcomes)[0]:
                break
            warmup = math.inf
        known += [unstable, rate, warmup]

    def _rates(self, unstable: float) -> list[float]:
        """Learning rates to be made stable, the first that can be is it."""
        if self.base_learning_rate is not None:
            return [self.base_learning_rate / factor for factor in (1, 10 / 3, 10)]
        factors = (self.times, *(factor for factor in reversed(LADDER) if factor < self.times))
        return [unstable * factor for factor in factors] if unstable else []

    def _ladder(self, outcomes: Mapping[Trial, Outcome]) -> Iterator[float]:
        """Learning rates, up to the first that is unstable, or down to the first that is stable."""
        down = False
        for up, factor in zip(LADDER, DOWN, strict=True):
            rate = self.learning_rate * (factor if down else up)
            yield rate
            stable = self._is_stable(outcomes, rate, 0, self.seeds)
            if up == 1:
                down = not stable
            elif stable == down:
                return

    def _shortest(self, outcomes: Mapping[Trial, Outcome], rate: float) -> Generator[list[Trial], None, float]:
        """Yield trials that are not known; return the shortest warmup that is stable, infinite if none is."""
        warmups = self.warmups
        if self.exhaustive:
            missing = [t for warmup in warmups for t in self._trials(rate, warmup, self.seeds) if t not in outcomes]
            if missing:
                yield missing
        low, high = 0, 0 if self.exhaustive else len(warmups)  # bisection with the first seed
        while low < high:
            middle = (low + high - 1) // 2  # rather the shorter one: a trial that fails is short
            yield from self._unknown(outcomes, rate, warmups[middle], 1)
            if self._is_stable(outcomes, rate, warmups[middle], 1):
                high = middle
            else:
                low = middle + 1
        for warmup in warmups[low:]:
            yield from self._unknown(outcomes, rate, warmup, self.seeds, self.tolerated)
            if self._is_stable(outcomes, rate, warmup, self.seeds, self.tolerated):
                return warmup
        return math.inf

    def _trial(self, rate: float, warmup: int, seed: int) -> Trial:
        confirms = seed > 0 and not self.exhaustive
        return Trial(rate, max(LEAST, 3 * warmup // 2 if confirms else 3 * warmup), warmup, seed)

    def _trials(self, rate: float, warmup: int, seeds: int) -> list[Trial]:
        return [self._trial(rate, warmup, seed) for seed in range(seeds)]

    def _unknown(
        self, outcomes: Mapping[Trial, Outcome], rate: float, warmup: int, seeds: int, tolerated: int = 0
    ) -> Iterator[list[Trial]]:
        """The trials that are missing to say whether it is stable; unstable ones may say so sooner."""
        trials = self._trials(rate, warmup, seeds)
        missing = [trial for trial in trials if trial not in outcomes]
        if missing and sum(not outcomes[trial].stable for trial in trials if trial in outcomes) <= tolerated:
            yield missing

    def _is_stable(
        self, outcomes: Mapping[Trial, Outcome], rate: float, warmup: int, seeds: int, tolerated: int = 0
    ) -> bool:
        trials = self._trials(rate, warmup, seeds)
        return sum(trial in outcomes and outcomes[trial].stable for trial in trials) >= seeds - tolerated

    def _loss(self, outcomes: Mapping[Trial, Outcome], rate: float, warmup: int) -> float:
        """The mean over the seeds that are stable."""
        return mean_loss([outcomes[trial] for trial in self._trials(rate, warmup, self.seeds)])

    def _best_without(self, outcomes: Mapping[Trial, Outcome]) -> tuple[float, float]:
        """The lowest loss at a learning rate that is stable without a warmup, infinite if there is none; and that."""
        rates = {trial.learning_rate for trial in outcomes if trial.warmup_steps == 0}
        stable = [rate for rate in rates if self._is_stable(outcomes, rate, 0, self.seeds)]
        return min(((self._loss(outcomes, rate, 0), rate) for rate in stable), default=(math.inf, 0.0))

    # ---------------------------------------------------------------------------------- what it says

    def _conclude(self, outcomes: Mapping[Trial, Outcome], unstable: float, rate: float, warmup: float) -> SweepResult:
        stable = [
            trial.learning_rate for trial in outcomes if trial.warmup_steps == 0 and self._is_all(outcomes, trial)
        ]
        without, (_, best_without) = max(stable, default=0.0), self._best_without(outcomes)
        summary = {"unstable_base_learning_rate": unstable, "stable_without_warmup": without}
        evidence: dict[str, float | str] = {**summary, "learning_rate": rate, "warmup_steps": warmup}
        evidence["steps_of_trials"] = sum(outcome.steps for outcome in outcomes.values())
        found = partial(Finding, step=0, evidence=evidence, source=PLAYBOOK)  # before training
        up_to = f"No warmup of up to {self.warmups[-1]:,} steps"
        if warmup == 0 and self.base_learning_rate in (None, rate):
            finding = found(
                "no warmup needed",
                "info",
                f"Without a warmup the training is stable up to a learning rate of {without:.3g}.",
                "No warmup is needed.",
            )
            best = None if self.base_learning_rate is None else self._trial(rate, 0, 0)
            return SweepResult(best, finding, dict(outcomes), {**summary, "gain": 1.0})
        if warmup in (0, math.inf):
            highest = self.base_learning_rate or unstable * self.times
            lowest = unstable if warmup == 0 else rate
            rates = f"{lowest:.3g} to {highest:.3g}" if lowest < highest else f"{highest:.3g}"
            finding = found(
                "warmup does not help",
                "info" if without and self.base_learning_rate is None else "warning",  # nobody needs a higher one
                f"{up_to} makes a learning rate of {rates} stable"
                + (f" and better than {best_without:.3g} without one." if best_without else "."),
                ("Keep the learning rate" if stable else "Take a learning rate that is lower still")
                + "; look at gradient clipping, another optimizer, normalisation and residual connections"
                " (x + f(Norm(x)) with f starting at 0).",
            )
            return SweepResult(None, finding, dict(outcomes), {**summary, "gain": 1.0})
        best = self._trial(rate, int(warmup), 0)
        gain = rate / without if without else math.inf
        held = sum(outcomes[trial].stable for trial in self._trials(rate, int(warmup), self.seeds))
        times = f" ({gain:.3g} times the highest that is stable without one)" if without else ""
        losses = self._loss(outcomes, rate, int(warmup))
        share = warmup / self.max_steps
        advice = f"Prepend {warmup:,.0f} warmup steps to the schedule: train {self.max_steps + int(warmup):,} steps."
        if share > LONG:
            advice += f" That is {share:.0%} of the run: max_steps may have to grow."
        higher = self.base_learning_rate or unstable * self.times
        evidence |= {"loss": losses, "stable": held, "seeds": self.seeds, "share_of_run": share}
        finding = found(
            "warmup found",
            "info",
            f"A warmup of {warmup:,.0f} steps makes a learning rate of {rate:.3g}{times} stable, with {held} of"
            f" {self.seeds} seeds, so in {_at_least(held, self.seeds):.0%} of all runs or more (with 95 % confidence)"
            + (f"; none of up to {self.warmups[-1]:,} does at {higher:.3g}." if rate < higher * (1 - 1e-9) else "."),
            advice,
        )
        return SweepResult(best, finding, dict(outcomes), {**summary, "gain": gain})

    def _is_all(self, outcomes: Mapping[Trial, Outcome], trial: Trial) -> bool:
        return self._is_stable(outcomes, trial.learning_rate, trial.warmup_steps, self.seeds)


def _at_least(held: int, of: int) -> float:
    """The lowest share that makes it likelier than 5 % that so many hold (Clopper and Pearson)."""
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        likely = sum(math.comb(of, each) * share**each * (1 - share) ** (of - each) for each in range(held, of + 1))
        low, high = (share, high) if likely < 0.05 else (low, share)
    return low
