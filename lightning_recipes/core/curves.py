"""What the curves of a training say: the loss of its steps, its validations, and the reading."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lightning_recipes.core.arguments import check_real
from lightning_recipes.core.early_stopping import READABLE as READABLE_CHECKS
from lightning_recipes.core.early_stopping import RECENT, Curve, noise_of, reading, rise
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.periods import EpochProfile
from lightning_recipes.core.selection import quantile
from lightning_recipes.core.series import Series
from lightning_recipes.core.trends import BEYOND, BLOCKS, trend

PLAYBOOK = "Deep Learning Tuning Playbook, training curves: https://github.com/google-research/tuning_playbook"
CS231N = "CS231n, babysitting the learning process: https://cs231n.github.io/neural-networks-3/"

BINS = 400  # at most, of the training curve; when they are full each two become one
FIRST = 16  # losses at the start that are kept: a bin of theirs would have the fall in it
READABLE = 100  # losses below which the training curve is not interpreted
LOST = 5  # losses in a row that are not finite: a GradScaler may skip fewer and go on
JUMPY = 0.02  # of the fall: noise of the validation above which it jumps
JUMPY_CHECKS = 10  # whose noise is told
TURNS = 0.33  # of the last checks, that a jumping curve turns at; noise does at two thirds
FLAT = 0.1  # of the fall, below which all that half a run may have brought has to lie for it to be flat
WOBBLES = 0.02  # of the fall: spread of the step losses above which a flat curve is not one that has arrived
SLOW = 0.5  # of the fall in the first half, that the second one brings where the learning rate is too low
STUCK = 0.02  # of the loss at the start: a run in which it changes by less has learned nothing
DEAD = 0.01  # of the highest learning rate: below it a run goes nowhere
ALIVE = 0.2  # of a run, which is hardly one if its learning rate is dead from there on
RISES = 1.5  # times higher at the end than in the half before: the run ends in a warmup or at the top of a cycle
DROP = 2.0  # times lower within a twentieth of the run: the learning rate was dropped
PERIODIC = 26.0  # a chi-squared with 6 degrees of freedom exceeds it once in 5,000 times
SEEN = 0.03  # of the fall, from where on a period is told
HARMFUL = 0.06  # and from where on it is worth a warning, if
ALIKE = 2.0  # is exceeded by the ratio of variances: batches that follow each other are alike
MATERIAL = 0.03  # of the fall, that a loss has to lose or promise to be worth a warning
CLOSE = 0.1  # of what the training loss is above its target, or above 0: a gap that is hardly one
LOW = 0.1  # of the loss at the start: below it a loss is low enough, if nobody knows a target
OF_ONE_OBJECTIVE = ("training loss does not fall", "falls too slowly", "decayed too early")  # not of two that compete
STOPPED = 0.05  # of the fall: what the last quarter of a run brings at most, of which that is told


class CurvesRule:
    """Keeps the curves of a training and reads them.

    Attributes:
        train: The losses of the steps, as mean and spread.
        rates: Their learning rates, in the same bins.
        first: The first 16 losses that are finite.
        lost: How many of the last losses were not finite in a row,
        lost_at: and the update at which that began.
        checks: The validations, with the mean training loss between them.
        accuracies: Of the validations, NaN where there was none.
        profile: Of the step losses within an epoch.
        competes: Whether several optimizers may work against each other, so that a training loss that goes up or stays
            is in order, and information.

    Args:
        target_loss: A training loss that would be good enough, any number; None if nobody knows: then underfitting is
            information, told of a loss that is flat above a tenth of the first one.

    Example:
        >>> rule = CurvesRule()
        >>> for step in range(2000):
        ...     rule.update(2.0 - step / 1000, rate=0.001, step=step + 1)
        >>> [finding.rule for finding in rule.findings()]
        ['falls too slowly']

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """

    def __init__(self, target_loss: float | None = None) -> None:
        if target_loss is not None:
            check_real("target_loss", target_loss, -math.inf, math.inf)
        self.target_loss = target_loss
        self.train, self.rates = Series(BINS), Series(BINS)
        self.first: list[float] = []
        self.lost = self.lost_at = 0
        self.checks = Curve()
        self.accuracies: list[float] = []
        self.profile = EpochProfile()
        self.competes = False
        self._sum, self._losses = 0.0, 0  # since the last check

    def update(self, loss: float, rate: float = math.nan, step: int = 0, place: float = math.nan) -> None:
        """Take in the loss of a batch.

        Args:
            loss: Any number.
            rate: Learning rate.
            step: Optimizer updates done.
            place: In the epoch, from 0 to below 1; NaN if its length is not known.
        """
        self.train.update(step, loss)
        self.rates.update(step, rate)
        self.profile.add(loss, place)
        if not math.isfinite(loss):
            self.lost_at = self.lost_at if self.lost else step
            self.lost += 1
            return
        self.lost = 0
        self.first += [loss] if len(self.first) < FIRST else []
        self._sum += loss
        self._losses += 1

    def check(self, value: float, step: int, epochs: float = 0.0, accuracy: float = math.nan) -> None:
        """Take in a validation loss."""
        checks = self.checks
        checks.values.append(value if math.isfinite(value) else math.inf)
        checks.train.append(self._sum / self._losses if self._losses else math.nan)
        checks.steps.append(step)
        checks.epochs.append(epochs)
        self.accuracies.append(accuracy)
        self._sum, self._losses = 0.0, 0

    def findings(self, monitor: str = "val_loss") -> list[Finding]:
        """What the curves say so far, the gravest first; nothing where the noise forbids.

        Args:
            monitor: Name of the validation loss.
        """
        read = Reading(self, monitor)
        diverged = read.diverged()
        return [diverged] if diverged is not None else list(read.others())

    def state_dict(self) -> dict[str, Any]:
        names = ("values", "train", "steps", "epochs")
        return {
            "bins": [self.train.as_rows(), self.rates.as_rows()],
            "width": self.train.width,
            "first": list(self.first),
            "lost": [self.lost, self.lost_at],
            "profile": self.profile.state_dict(),
            "checks": {name: list(getattr(self.checks, name)) for name in names},
            "accuracies": list(self.accuracies),
            "since": [self._sum, self._losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.rates = (Series.of_rows(rows, state_dict["width"], BINS) for rows in state_dict["bins"])
        self.first, (self.lost, self.lost_at) = list(state_dict["first"]), state_dict["lost"]
        self.profile.load_state_dict(state_dict["profile"])
        for name, values in state_dict["checks"].items():
            setattr(self.checks, name, list(values))
        self.accuracies = list(state_dict["accuracies"])
        self._sum, self._losses = state_dict["since"]


class Reading:
    """One look at the curves.

    Args:
        rule: Has them.
        monitor: Name of the validation loss.
    """

    def __init__(self, rule: CurvesRule, monitor: str) -> None:
        self.rule, self.monitor = rule, monitor
        both = [(loss, rate) for loss, rate in zip(rule.train.bins, rule.rates.bins, strict=True) if loss.count]
        self.bins = [loss for loss, _ in both]
        self.readable = rule.train.count >= READABLE and len(self.bins) >= 4 * BLOCKS
        self.means = [each.mean for each in self.bins]
        self.rates = [rate.mean if rate.count else math.nan for _, rate in both]
        self.highest = max((rate for rate in self.rates if rate > 0), default=math.nan)
        self.step = rule.train.bins[-1].last if rule.train.bins else 0
        spreads = [each.deviation for each in self.bins if each.count > 1]
        # Of single losses: from one to the next where a bin has one loss only; the trend is not in it.
        self.spread = statistics.median(spreads) if spreads else noise_of(self.means)
        tenth = max(1, len(self.means) // 10)
        self.start = rule.first[0] if rule.first else math.nan
        self.first = statistics.fmean(rule.first) if rule.first else math.nan
        self.end = statistics.median(self.means[-tenth:]) if self.means else math.nan

    @property
    def fall(self) -> float:
        """From the start to the lowest level of either curve: the scale of this training, whatever its loss."""
        checks = [value for value in self.rule.checks.values if math.isfinite(value)]
        train = [] if math.isnan(self.start) else [self.start, self.end]
        return max([*checks[:1], *train[:1]], default=math.nan) - min([*checks, *train[1:]], default=math.nan)

    def others(self) -> Iterable[Finding]:
        """All readings of a training that has not diverged."""
        of_checks = self.never_improves() or self.of_checks() or self.still_falls()
        mine: list[Callable[[], Finding | None]] = [self.jumps]
        if self.readable:
            mine += [self.rate_rises, self.does_not_fall, self.falls_too_slowly, self.decayed_too_early, self.periodic]
            mine += [self.underfits, self.learns_less, self.flat]
        found = [*filter(None, (look() for look in mine))]
        if of_checks is not None and of_checks.rule == "validation never improves":  # to learn it faster is no help
            found = [finding for finding in found if finding.rule != "falls too slowly"]
        rules = {finding.rule for finding in found}
        if of_checks is not None and not (of_checks.rule == "best at the end" and "falls too slowly" in rules):
            found.append(of_checks)
        return sorted(found, key=lambda finding: finding.severity == "info")

    def found(
        self, rule: str, severity: Any, message: str, advice: str, source: str = CS231N, **evidence: Any
    ) -> Finding:
        severity = "info" if self.rule.competes and rule in OF_ONE_OBJECTIVE else severity
        return Finding(rule, severity, message, advice, self.step, evidence, source)

    # ------------------------------------------------------------------------------------ of the training loss

    def diverged(self) -> Finding | None:
        """The last losses are no numbers, or the loss ends where it began and was far above that."""
        rule, checks = self.rule, self.rule.checks
        advice = "Cut the learning rate (by three, then by ten), or warm it up; look for what is not finite."
        if rule.lost >= LOST:
            message = f"The training loss has not been finite since step {rule.lost_at:,}."
            return self.found("diverged", "error", message, advice, PLAYBOOK, since=rule.lost_at)
        if checks.values and math.isinf(checks.values[-1]):
            since = 1 + max((at for at, value in enumerate(checks.values) if math.isfinite(value)), default=-1)
            message = f"{self.monitor} is not finite since step {checks.steps[since]:,}."
            return self.found("diverged", "error", message, advice, PLAYBOOK, since=checks.steps[since])
        if not self.readable:
            return None
        threes = [losses[at : at + 3] for losses in (self.rule.first, self.means) for at in range(len(losses) - 2)]
        peak = max(map(statistics.median, threes))  # of more than one loss
        clear = max(0.5 * abs(self.start), 6 * self.spread)
        ends_high = self.end > self.start - 0.1 * abs(self.start)
        if not (ends_high and peak > self.start + clear) and not self.end > self.start + clear:
            return None
        return self.found(
            "diverged",
            "info" if rule.competes else "error",
            f"The training loss began at {self.start:.3g}, went up to {peak:.3g} and is {self.end:.3g} now.",
            advice,
            PLAYBOOK,
            start=self.start,
            peak=peak,
            end=self.end,
        )

    def does_not_fall(self) -> Finding | None:
        """Nothing was learned, and that is sure."""
        line, first = trend(self.means), self.first
        error = quantile(FIRST, BEYOND) * self.spread / math.sqrt(FIRST)
        changed = max(abs(first - self.end) + error, abs(line.change) + line.error)
        if changed > STUCK * abs(first) or abs(first - self.end) > self.spread:
            return None
        return self.found(
            "training loss does not fall",
            "warning",
            f"The training loss was {first:.4g} at the start and is {self.end:.4g} after {self.step:,} updates.",
            "Look for a learning rate that is far too low, units that are dead, and parameters or labels that do not"
            " belong to the loss.",
            start=first,
            end=self.end,
        )

    def rate_rises(self) -> Finding | None:
        """The run ends while its learning rate goes up, and by much."""
        half = self.rates[len(self.rates) // 2 :]
        if not half[-1] > max(RISES * min(half), 0.5 * self.highest):
            return None
        lowest = half.index(min(half)) - len(half)
        never_fell = all(later >= 0.99 * sooner for sooner, later in pairwise(self.rates))
        return self.found(
            "learning rate rises",
            "warning" if never_fell else "info",
            f"The learning rate went up from {min(half):.2g} at step {self.bins[lowest].last:,} to {half[-1]:.2g} at"
            " the end, where it should be low.",
            "Make warmup and cycles shorter than the run: does the schedule count updates, and how many?",
            lowest=min(half),
            end=half[-1],
        )

    def falls_too_slowly(self) -> Finding | None:
        """The second half of the run brings at least half of what the first one does, at a rate that is not lower."""
        top = next((at for at, rate in enumerate(self.rates) if rate >= 0.9 * self.highest), 0)
        means = self.means[top:]
        if len(means) < 4 * BLOCKS:
            return None
        middle, tenth = len(means) // 2, max(2, len(means) // 20)
        first = self.first if top == 0 else means[0]
        around = trend(means[middle - 2 * tenth : middle + 2 * tenth])
        last, line = trend(means[-4 * tenth :]), trend(means[middle:])
        early, late = first - around.level, around.level - (last.level + last.change / 2)
        error = abs(around.error) / 2 + abs(last.error) / 2 + 2 * self.spread / math.sqrt(FIRST)
        if not line.falls or not last.falls or late - error < SLOW * (early + error) or late <= 0:
            return None
        return self.found(
            "falls too slowly",
            "warning",
            f"The training loss fell by {late:.3g} ± {error:.2g} in the second half of the run, by {early:.3g} in the"
            f" first: it is far from its end, {self.end:.3g}.",
            "Raise the learning rate (by three, then by ten), else train longer.",
            first_half=early,
            second_half=late,
            error=error,
        )

    def flat(self) -> Finding | None:
        """Flat at a constant rate, after a fall, and not because there is nothing left to fall."""
        half = len(self.means) // 2
        rates, line = self.rates[half:], trend(self.means[half:])
        fall = self.start - line.level
        constant = min(rates) > 0 and self.highest < 1.3 * min(rates)  # nor was it dropped before
        wobbles = self.spread > WOBBLES * fall
        is_flat = abs(line.change) < line.error and abs(line.change) + line.error < FLAT * fall
        if not (constant and wobbles and fall > 0 and is_flat):
            return None
        # Since when: from the end back, as long as no block is above the level of the half.
        bound = line.level + line.error + FLAT / 5 * fall
        size = max(1, len(self.means) // 20)
        since = half
        while since >= size and statistics.fmean(self.means[since - size : since]) <= bound:
            since -= size
        return self.found(
            "falls fast, then flat",
            "info",
            f"The training loss has been flat since about step {self.bins[since].last:,} of {self.step:,}, at"
            f" {line.level:.3g} (a change of {line.change:.2g} ± {line.error:.2g} over the second half), at a constant"
            f" learning rate; single steps spread by {self.spread:.2g}.",
            "Let the learning rate decay from there on; if that does not lower the loss, the model or noise in the"
            " labels is the limit.",
            since=self.bins[since].last,
            level=line.level,
            change=line.change,
            error=line.error,
        )

    def decayed_too_early(self) -> Finding | None:
        """Flat after the learning rate went down, while the loss was still falling before it."""
        return next(filter(None, (self._lost_by(*decay) for decay in self._decays())), None) or self._idle()

    def _idle(self) -> Finding | None:
        """Hardly a part of the run had a learning rate to speak of, whatever the loss was before."""
        alive = self._alive
        if not 0 < alive <= ALIVE * len(self.rates):
            return None
        step = self.bins[alive - 1].last
        return self.found(
            "decayed too early",
            "info",
            f"The learning rate has been below a hundredth of its highest, {self.highest:.2g}, since step {step:,} of"
            f" {self.step:,}.",
            "Let it decay over the whole run: does the schedule count epochs, and is it asked every batch?",
            dropped_at=step,
        )

    @property
    def _alive(self) -> int:
        """Bins up to the last one with a learning rate of a hundredth of the highest."""
        return max((at + 1 for at, rate in enumerate(self.rates) if rate >= DEAD * self.highest), default=0)

    def _decays(self) -> Iterable[tuple[int, int, int]]:
        """Where a constant rate drops, or stays below a hundredth of the highest; with what lies before and after."""
        window, rates = max(1, len(self.rates) // 20), self.rates
        for at in range(2 * BLOCKS, len(rates) - 2 * BLOCKS):
            dropped = 0 < rates[at - 1] >= DROP * rates[at + window] and rates[at] < 0.99 * rates[at - 1]
            if dropped and max(rates[at // 2 : at]) <= 1.3 * min(rates[at // 2 : at]):
                yield at // 2, at, at + window
                break
        alive = self._alive
        if 2 * BLOCKS <= alive <= len(rates) // 2:
            yield alive // 3, alive, alive

    def _lost_by(self, since: int, at: int, then: int) -> Finding | None:
        """What a decay has cost, if it was too early."""
        rises = (place for place in range(then, len(self.rates)) if self.rates[place] > self.rates[at])
        before, after = self.means[since:at], self.means[then : next(rises, None)]
        span = min(len(before), len(after))
        if span < BLOCKS:
            return None
        old = trend(before[-span:])
        promised = -(old.change + old.error)  # in as many updates, at the least
        if promised < max(0.0, MATERIAL * self.fall):
            return None
        # What even a longer stretch does not bring, a shorter one does not either, and of a longer one it is surer.
        while True:
            new = trend(after[:span])
            gained = old.level + old.change / 2 - (new.level + new.change / 2)
            error = old.error / 2 + new.error / 2
            if gained + error <= 0.5 * promised and new.error - new.change <= 0.5 * promised:
                break
            if span == len(after):
                return None
            span = min(2 * span, len(after))
        step, width = self.bins[at].last, self.rule.train.width
        return self.found(
            "decayed too early",
            "warning",
            f"Before the learning rate fell from {self.rates[since]:.2g} to {self.rates[then]:.2g} at step {step:,},"
            f" the training loss was falling by {-old.change:.2g} ± {old.error:.2g} in {len(before[-span:]) * width:,}"
            f" batches; in {span * width:,} after it by {gained:.2g} ± {error:.2g}.",
            "Drop the learning rate later, where the loss is flat, or by less.",
            dropped_at=step,
            before=old.change,
            before_error=old.error,
            after=-gained,
            after_error=error,
        )

    def periodic(self) -> Finding | None:
        """The same pattern in each epoch, while the learning rate has none."""
        period = self.rule.profile.period()
        rises = sum(later > 1.02 * sooner for sooner, later in pairwise(self.rates[len(self.rates) // 4 :]))
        if period is None or rises or period.chance < PERIODIC or period.size < SEEN * self.fall:
            return None
        alike = period.neighbours > ALIKE and period.size > HARMFUL * self.fall
        return self.found(
            "periodic training loss",
            "warning" if alike else "info",
            f"Within each of the last {len(self.rule.profile.profiles)} epochs the training loss goes the same way, by"
            f" {period.size:.3g} from the highest to the lowest eighth of the epoch"
            + (f"; neighbouring batches are alike ({period.neighbours:.1f} times chance)." if alike else "."),
            "The data come in the same order in each epoch: shuffle" + ("." if alike else ", if that was not meant."),
            range=period.size,
            agreement=period.chance,
            neighbours=period.neighbours,
        )

    # ------------------------------------------------------------------------------------ of both

    def of_checks(self) -> Finding | None:
        """What :class:`~lightning_recipes.EarlyStopping` would say, too."""
        if self.rule.checks.values:
            finding = reading(self.rule.checks, self.monitor, least=MATERIAL * self.fall)
        else:
            size = max(1, len(self.bins) // 20)
            ends = range(size - 1, len(self.bins), size)
            levels = [statistics.fmean(self.means[end - size + 1 : end + 1]) for end in ends]
            finding = rise(levels, [self.bins[end].last for end in ends]) if self.readable else None
        if finding is not None and finding.rule == "training loss rises" and self.rates:
            lowest = sum(each.last < float(finding.evidence["lowest_step"]) for each in self.bins[:-1])
            if self.rates[-1] > 1.3 * self.rates[lowest]:
                return None  # a restart of the learning rate
            return replace(finding, severity="info") if self.rule.competes else finding
        return finding

    def never_improves(self) -> Finding | None:
        """Training has learned, and no validation shows anything of it."""
        checks = self.rule.checks
        if len(checks.values) < 2 or not self.readable:
            return None
        first, best = self.first, checks.best
        learned = first - self.end
        sure = learned > max(6 * self.spread / math.sqrt(FIRST), FLAT * abs(first)) and trend(self.means).falls
        level, since = checks.values[0], checks.train[0] - checks.train[-1]
        falls = level - checks.values[best] > max(FLAT * abs(level), 0.5 * since)
        if not sure or falls or first - checks.values[best] > FLAT * learned:
            return None  # a loss that falls with that of training is only another one, as that of larger batches may be
        return self.found(
            "validation never improves",
            "warning",
            f"{self.monitor} was never below {checks.values[best]:.3g} (step {checks.steps[best]:,}) while the training"
            f" loss fell from {first:.3g} to {self.end:.3g}: what is learnt does not hold there.",
            "Make sure that both have the same preprocessing, labels, distribution and mode; if so, the labels are"
            " noise or the examples too few.",
            best=checks.values[best],
            start=first,
            end=self.end,
        )

    def learns_less(self) -> Finding | None:
        """The training loss has fallen by far less than the validation loss has."""
        values, train = self.rule.checks.values[-5:], self.rule.checks.train[-5:]
        if not values or not all(map(math.isfinite, [*values, *train])):
            return None
        above = statistics.median(train) - statistics.median(values)
        fall = self.start - statistics.median(values)
        if above < max(0.5 * fall, 6 * self.spread / math.sqrt(FIRST)):
            return None
        return self.found(
            "training loss above validation",
            "info",
            f"The training loss is {statistics.median(train):.3g}, {above:.2g} above {self.monitor}: more than half of"
            f" what validation shows to be learnt, {fall:.2g}, is lost in training.",
            "Less dropout or augmentation, unless the training loss has other terms or other data.",
            train=statistics.median(train),
            above=above,
            fall=fall,
        )

    def still_falls(self) -> Finding | None:
        """The training loss falls to the end of a run whose checks are too few to be read."""
        checks = self.rule.checks.values
        if not self.readable or len(checks) >= READABLE_CHECKS or (checks and min(checks) < checks[-1]):
            return None
        half = len(self.means) // 2
        line = trend(self.means[half:])
        decayed = self.rates[-1] < 0.5 * max(self.rates[half:])
        if decayed or not line.falls or -line.change < MATERIAL * self.fall:
            return None
        return self.found(
            "best at the end",
            "info",
            f"In the second half of the run the training loss still fell by {-line.change:.2g} ± {line.error:.2g}, to"
            f" {self.end:.3g}" + (f", and {self.monitor} was lowest at the end." if checks else "."),
            "Train longer.",
            change=line.change,
            error=line.error,
        )

    def jumps(self) -> Finding | None:
        """The validation goes up and down from check to check by more than a share of all that was learned."""
        values = self.rule.checks.values
        noise = noise_of(values) if len(values) >= JUMPY_CHECKS and all(map(math.isfinite, values)) else 0.0
        steps = [later - sooner for sooner, later in pairwise(values[-RECENT:])]
        turns = sum(sooner * later < 0 for sooner, later in pairwise(steps))
        if noise <= JUMPY * self.fall or not self.fall > 0 or turns < TURNS * len(steps):
            return None  # a bend is not noise
        return self.found(
            "validation jumps",
            "info",
            f"{self.monitor} jumps from check to check: by a standard deviation of {noise:.2g} about"
            f" {statistics.median(values[-RECENT:]):.3g}, {noise / self.fall:.0%} of the whole fall.",
            "Decay the learning rate or average the weights (EMAWeights), or validate on more data: which check is best"
            " is chance.",
            PLAYBOOK,
            noise=noise,
            fall=self.fall,
        )

    def underfits(self) -> Finding | None:
        """The training loss ends above its target, or flat and not low, and validation with it."""
        target, checks = self.rule.target_loss, self.rule.checks
        if not checks.values or not all(map(math.isfinite, checks.values)):
            return None
        line = trend(self.means[-len(self.means) // 4 :])
        above = line.level + line.change / 2 - line.error - (target or 0.0)
        gap = statistics.median(checks.values[-5:]) - statistics.median(checks.train[-5:])
        noise = noise_of(checks.values)
        if above <= 0 or gap > CLOSE * above + noise:
            return None
        if target is not None:
            return self.found(
                "underfitting",
                "warning",
                f"The training loss is {self.end:.3g}, at least {above:.2g} above the target of {target:g}, and"
                f" {self.monitor} hardly higher: a gap of {gap:.2g}.",
                "Use a larger model, train longer or at a better learning rate, regularise less.",
                end=self.end,
                target=target,
                gap=gap,
            )
        learned = self.first - line.level
        is_flat = learned > FLAT * self.first and -line.change < STOPPED * learned
        if above < LOW * self.first or not is_flat or max(noise, -gap) > CLOSE * above:
            return None
        return self.found(
            "underfitting",
            "info",
            f"The training loss hardly falls any more, at {self.end:.3g} of {self.first:.3g} at the start, and"
            f" {self.monitor} is close to it: a gap of {gap:.2g}.",
            "If that is too high, use a larger model or a better learning rate, and regularise less; more data of the"
            " kind will not help, and nothing will where noise is the limit.",
            end=self.end,
            start=self.first,
            gap=gap,
        )
