"""Notice that a training becomes unstable, from the loss and the gradient norm of every update.

All rules judge a value by those before it, with medians and quartiles of the last hundred, into which what was flagged
does not enter. They know neither the sign nor the unit of the loss: what counts is how far it moves against its own
noise and against what the training has gained so far (the *gain*: from the first losses down to the best level).
``benchmarks/instability.py`` says how often they are right.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lightning_recipes.core.early_stopping import noise_of

Kind = Literal[
    "not finite",
    "spike",
    "burst",
    "exploding gradient",
    "vanishing gradient",
    "divergence",
    "early instability",
    "no progress",
    "GradScaler storm",
]
Signal = Literal["loss", "gradient norm"]

WINDOW = 100  # updates that medians and quartiles are taken of
ENOUGH = 30  # updates before anything but what is not finite or has vanished is judged
PART = 0.5  # of the usual examples: an update of fewer is not judged, but for NaN
HEAD = 5  # first losses, from which the gain is measured
SETTLED = 20  # updates before there is a best level
RESTART = 60  # likewise after the learning rate has jumped up to where it has been before
TAIL = 3.0  # times as far as the highest of the last hundred is above the median, the gain is at least
EARLY = 100  # updates within which a divergence is an early instability
ROSE = 5.0  # times as high as the first losses: an early instability before there are statistics
ROUNDING = 1e-6  # of a value, its least standard deviation
FAR = 6.0  # robust standard deviations: a loss or log norm this far up is flagged
VERY_FAR = 10.0  # a loss this far up, and twice the gain above its best level, is a spike
TENFOLD = math.log(10)  # and twice as far: a norm explodes whatever the loss does
SPREAD = 0.1  # least standard deviation of the log norm
LEVEL = 0.05  # share of the newest loss in its level, a moving average
GIVEN_BACK = 0.3  # of the gain: that much is a divergence
SHORT = 15  # updates in a short median
EVERY = 3  # updates from one look at that to the next
FALL = 50  # updates within which a gradient has to collapse to have vanished
STALL = math.log(3)  # by how much it falls, however slowly, where a training that gains nothing makes no progress
COLLAPSE = math.log(5)  # by how much its log norm falls then, and by how much more than the log loss
SLOWS = 0.5  # of what the loss falls by in the first half of fifty updates, at most in the second, and
QUIET = 0.01  # of the gain, noise of the loss at most: a training that goes to its minimum
DRIFT, DRIFTED = 0.6, 7.0  # standard deviations: what a cumulative sum is allowed at an update, and where it alarms
DRIFTED_BY = 0.04  # share of the gain that the level has to be worse by, too
HOT_DRIFT, HOT_DRIFTED = 0.2, 3.0  # likewise while the learning rate is higher than ever before:
HOT, BACK = 1.3, 30  # above 1.3 times its highest value up to thirty updates ago
SKIPS, OF_LAST = 10, 20  # updates that a GradScaler skipped, a storm
NOTHING = math.log(1e-30)  # log norm of no gradient at all
MOST = 700.0  # log norm of which there is a norm
OFTEN = 5  # jumps in the last hundred updates, apart from each other: no accident


@dataclass(frozen=True)
class Instability:
    """What was noticed at one update.

    Args:
        kind: What it is.
        signal: Where it was seen.
        step: The update, counted from 0.
        value: Of the signal.
        expected: Up to which value (down to which for a vanishing gradient) it would have been normal.
    """

    kind: Kind
    signal: Signal
    step: int
    value: float
    expected: float


class _Window:
    """Median and spread of the last values."""

    def __init__(self) -> None:
        self.arrived: deque[float] = deque(maxlen=WINDOW)
        self.ascending: list[float] = []

    def add(self, value: float) -> None:
        if len(self.arrived) == WINDOW:
            del self.ascending[bisect_left(self.ascending, self.arrived[0])]
        self.arrived.append(value)
        insort(self.ascending, value)

    @property
    def median(self) -> float:
        return self.ascending[len(self.ascending) // 2]

    @property
    def deviation(self) -> float:
        """Standard deviation, from the quartiles; at least what rounding may make."""
        count = len(self.ascending)
        between = self.ascending[3 * count // 4] - self.ascending[count // 4]
        return max(between / 1.349, ROUNDING * abs(self.median))


class InstabilityRule:
    """Says at each update of one optimizer whether the training has become unstable, and how.

    =================== ================================================================================================
    not finite          the loss or the gradient norm is NaN or infinite
    spike               one loss ten deviations above the median and twice the gain above the best level
    burst               three of four losses six deviations up, or two, the second 1.2 gains above the best level; for
                        thirty updates, then a divergence
    exploding gradient  log norm six deviations above its median while the loss is up, too, or twelve and tenfold
    divergence          the level of the loss gives back 0.3 of the gain; or loss and norm drift up together (two
                        cumulative sums), watched more closely while the learning rate is higher than ever before
    early instability   the same within the first hundred updates, or a fivefold rise within the first thirty
    vanishing gradient  within fifty updates the norm falls to a fifth, and five times as far as the loss: dead units
    no progress         after a hundred updates the loss has not fallen by its noise, and the norm to a third
    GradScaler storm    ten of the last twenty updates were skipped by a GradScaler
    =================== ================================================================================================

    An update of less than half the usual examples (the median of the last hundred), as the last one of an epoch may be,
    is only looked at for NaN: its loss and gradient are noisier than the others. One without any gradient, a norm of 0
    as of a hinge loss that is met, is none to compare others with.

    Takes about seven microseconds. Memory is constant. After a divergence or a vanished gradient the rule starts anew:
    what was normal before is no longer.

    Args:
        cancels: Whether an update with a spike, a burst or an exploding gradient will be cancelled: then the training
            is where it was, and the rule learns nothing from it. What comes thirty times in a row, or five times apart
            from each other within a hundred updates, is no accident but what the training is now: the rule calls it a
            divergence, starts anew, and says nothing of spikes, bursts and explosions until a hundred updates had none.

    Attributes:
        gave_up: Whether it says nothing of them at the moment.

    Example:
        >>> rule = InstabilityRule()
        >>> for step in range(60):
        ...     assert rule.update(1 / (1 + step) + 0.01 * (step % 3), 1.0 + 0.1 * (step % 4)) is None
        >>> rule.update(80.0, 500.0).kind
        'spike'
        >>> rule.update(float("nan"), 1.0).kind
        'not finite'
    """

    def __init__(self, cancels: bool = False) -> None:
        self.cancels = cancels
        self.step = 0
        self.examples = _Window()  # of an update
        self.skips: deque[bool] = deque(maxlen=OF_LAST)
        self.gave_up = False
        self.forget()

    def forget(self) -> None:
        """Start anew, but for the count of updates."""
        self.seen = 0
        self.first = self.level = 0.0  # mean of the first losses; moving average
        self.highest = 0.0  # of the first three losses
        self.top = (-math.inf, 0.0)  # the highest short median of the log norm, and of the loss then
        self.best = math.inf  # lowest level since the training has settled
        self.settling = SETTLED
        self.losses, self.norms = _Window(), _Window()
        self.striking = 0.0  # a norm from which a gradient may have exploded; 0 if that is not known at the moment
        self.flagged: deque[bool] = deque(maxlen=3)
        self.beyond = 0  # updates in a row that were flagged
        self.jumps: deque[bool] = deque(maxlen=WINDOW)  # which of the last updates had one
        self.short: deque[tuple[float, float]] = deque(maxlen=SHORT)
        self.recent: deque[tuple[float, float]] = deque(maxlen=FALL // EVERY)
        self.drift = self.norm_drift = self.hot_drift = self.hot_norm_drift = 0.0
        self.rates: deque[float] = deque(maxlen=BACK)
        self.rate = self.highest_rate = 0.0

    def is_striking(self, loss: float, norm: float) -> bool:
        """Whether an update is better judged at once than with those that follow; from a look at it, a microsecond.

        So are the first, those that are not finite, and those with a norm from which a gradient may have exploded.
        """
        if norm < self.striking and abs(loss) < math.inf:
            return False
        if len(self.norms.ascending) >= ENOUGH:
            bound = self.norms.median + FAR * max(self.norms.deviation, SPREAD)
            self.striking = math.exp(min(bound, MOST))
        return not (norm < self.striking and abs(loss) < math.inf)

    def update(
        self, loss: float, norm: float, rate: float = 0.0, scaled: bool = False, examples: float = 0
    ) -> Instability | None:
        """Take in an update that is about to be made and say what is wrong with it, or nothing.

        Args:
            loss: Of the update's batch.
            norm: L2 norm of its unclipped gradient.
            rate: Learning rate; 0 if it is not known.
            scaled: Whether a GradScaler skips an update whose gradient is not finite, which is normal.
            examples: That it is made of; 0 if that is not known.
        """
        step, self.step, self.striking = self.step, self.step + 1, 0.0
        skipped = scaled and math.isfinite(loss) and not math.isfinite(norm)
        self.skips.append(skipped)
        if skipped:
            storm = self.skips.count(True) == SKIPS and len(self.skips) == OF_LAST
            return Instability("GradScaler storm", "gradient norm", step, norm, math.inf) if storm else None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            signal: Signal = "gradient norm" if math.isfinite(loss) else "loss"
            return Instability("not finite", signal, step, norm if math.isfinite(loss) else loss, math.inf)
        if examples and self._is_of_few(examples):
            return None  # both are noisier than the others
        found = self._judge(loss, _log(norm), rate)
        if found is None:
            return None
        kind, value, expected = found
        of_norm = kind in ("exploding gradient", "vanishing gradient")
        if kind in ("divergence", "early instability", "vanishing gradient", "no progress"):
            self.forget()
        if not of_norm:
            return Instability(kind, "loss", step, value, expected)
        return Instability(kind, "gradient norm", step, math.exp(value), math.exp(expected))

    def _judge(self, loss: float, log_norm: float, rate: float) -> tuple[Kind, float, float] | None:
        if log_norm <= NOTHING:  # as of a hinge loss that is met: no update, and nothing to compare others with
            return self._vanished(loss, log_norm)
        self.seen += 1
        if self.seen <= HEAD:
            self.first += (loss - self.first) / self.seen
            self.highest = loss if self.seen == 1 else max(self.highest, loss) if self.seen <= 3 else self.highest
        hot = self._is_hot(rate)
        ready = len(self.losses.ascending) >= ENOUGH
        found, far, norm_far, at_most, gain = None, False, False, math.inf, 0.0
        if ready:
            losses = self.losses
            low = min(self.best, losses.median)
            gain = max(self.first - low, 4 * losses.deviation, TAIL * (losses.ascending[-1] - losses.median))
            found, far, norm_far = self._jump(loss, log_norm, low, gain)
            self.flagged.append(far)
            self.beyond = self.beyond + 1 if far else 0
            if self._cancels(found is not None):
                return ("divergence", loss, low + GIVEN_BACK * gain) if self.gave_up else found
            if self.gave_up or self.beyond > ENOUGH:
                found = None  # no burst any more: it does not come back
            self._drift(loss, log_norm, gain, hot)
            at_most = low + gain  # one loss alone, however high, moves the level by little
        self.level = loss if self.seen == 1 else self.level + LEVEL * (min(loss, at_most) - self.level)
        if self.settling:
            self.settling -= 1
            self.drift = self.norm_drift = 0.0
        else:
            self.best = min(self.best, self.level)
        found = found or self._vanished(loss, log_norm) or (self._diverged(gain, hot) if ready else self._rose())
        if not far:
            self.losses.add(loss)
        if not norm_far:
            self.norms.add(log_norm)
        return found

    def _is_of_few(self, examples: float) -> bool:
        few = bool(self.examples.ascending) and examples < PART * self.examples.median
        self.examples.add(examples)
        return few

    def _is_hot(self, rate: float) -> bool:
        """Whether the learning rate is higher than ever before; after a restart the level may rise once."""
        hot = len(self.rates) == BACK and rate > HOT * self.rates[0]
        if rate > HOT * self.rate and rate <= self.highest_rate:
            self.best, self.settling = math.inf, RESTART
        self.rate = rate
        if rate > self.highest_rate:
            self.highest_rate = rate
        self.rates.append(self.highest_rate)
        return hot

    def _jump(
        self, loss: float, log_norm: float, low: float, gain: float
    ) -> tuple[tuple[Kind, float, float] | None, bool, bool]:
        """What one value says, and whether loss and norm are to be kept out of the windows."""
        median, middle, spread = self.losses.median, self.norms.median, max(self.norms.deviation, SPREAD)
        deviation = self.losses.deviation
        bound, norm_bound = median + FAR * deviation, middle + FAR * spread
        far = loss > bound and loss > low + GIVEN_BACK * gain
        norm_far = log_norm > norm_bound and loss > low + GIVEN_BACK / 2 * gain
        found: Any = None
        if loss > median + VERY_FAR * deviation and loss > low + 2 * gain:
            found = "spike", loss, bound
        elif (norm_far and loss > median + deviation) or log_norm > middle + max(2 * FAR * spread, TENFOLD):
            found = "exploding gradient", log_norm, norm_bound
        elif far and sum(self.flagged) >= (1 if loss > low + 1.2 * gain else 2):
            found = "burst", loss, bound
        return found, far, norm_far

    def _cancels(self, jumped: bool) -> bool:
        """Whether the update will be cancelled, or would have been if that had not just been given up."""
        if not self.cancels:
            return False
        self.jumps.append(jumped)
        if self.gave_up:
            self.gave_up = len(self.jumps) < WINDOW or any(self.jumps)
            return False
        if jumped:
            jumps = [*self.jumps]
            apart = sum(now and not before for before, now in pairwise([False, *jumps]))
            self.gave_up = apart >= OFTEN or (len(jumps) >= ENOUGH and all(jumps[-ENOUGH:]))
        return jumped

    def _drift(self, loss: float, log_norm: float, gain: float, hot: bool) -> None:
        """Two-fold cumulative sums of clipped standard scores; Page 1954."""
        z = (loss - self.losses.median) / max(self.losses.deviation, 0.02 * gain, 1e-30)
        norm_z = (log_norm - self.norms.median) / max(self.norms.deviation, SPREAD)
        z, norm_z = max(-3.0, min(3.0, z)), max(-3.0, min(3.0, norm_z))
        self.drift = max(0.0, self.drift + z - DRIFT)
        self.norm_drift = max(0.0, self.norm_drift + norm_z - DRIFT)
        self.hot_drift = max(0.0, self.hot_drift + z - HOT_DRIFT) if hot else 0.0
        self.hot_norm_drift = max(0.0, self.hot_norm_drift + norm_z - HOT_DRIFT) if hot else 0.0

    def _diverged(self, gain: float, hot: bool) -> tuple[Kind, float, float] | None:
        allowed = GIVEN_BACK * gain
        worse = self.level - self.best
        drifted = self.drift > DRIFTED and self.norm_drift > DRIFTED and worse > DRIFTED_BY * gain
        hot_drifted = hot and self.hot_drift > HOT_DRIFTED and self.hot_norm_drift > HOT_DRIFTED
        if not (drifted or hot_drifted or worse > allowed):
            return None
        bound = allowed if worse > allowed else DRIFTED_BY * gain if drifted else 0.0
        return "early instability" if self.seen <= EARLY else "divergence", self.level, self.best + bound

    def _rose(self) -> tuple[Kind, float, float] | None:
        """Within the first updates, where no statistic tells normal from not, the loss has risen fivefold."""
        if len(self.short) < HEAD or self.highest <= 0:
            return None
        loss = sorted(loss for loss, _ in self.short)[len(self.short) // 2]
        return ("early instability", loss, ROSE * self.highest) if loss > ROSE * self.highest else None

    def _vanished(self, loss: float, log_norm: float) -> tuple[Kind, float, float] | None:
        """The gradient has collapsed, and not because the loss has; looked at every third update."""
        self.short.append((loss, log_norm))
        if len(self.short) < HEAD or self.step % EVERY:
            return None
        loss, log_norm = (sorted(values)[len(values) // 2] for values in zip(*self.short, strict=True))
        self.recent.append((log_norm, loss))
        highest = max(self.recent)
        if highest > self.top:
            self.top = highest
        if _fell_alone(highest, log_norm, loss, COLLAPSE) and not self._settles(loss):
            return "vanishing gradient", log_norm, highest[0] - COLLAPSE
        if self.seen < EARLY:
            return None
        gained_nothing = self.best < math.inf and self.first - self.best < 2 * self.losses.deviation
        least = max(STALL, 2 * self.norms.deviation)
        if gained_nothing and _fell_alone(self.top, log_norm, loss, least):
            return "no progress", self.level, self.first
        return None

    def _settles(self, loss: float) -> bool:
        """Whether the loss goes to its minimum without noise, as on one batch for ever: then so does its gradient."""
        falls, gain = [each for _, each in self.recent], self.first - loss
        middle, little = falls[len(falls) // 2], QUIET * gain
        slows = middle - loss <= SLOWS * (falls[0] - middle) + little
        return slows and loss - min(falls) <= little and noise_of([each for each, _ in self.short]) <= little

    def state_dict(self) -> dict[str, Any]:
        left_out = ("cancels", "striking")  # one is configuration, the other comes of the norms
        seen = {name: value for name, value in vars(self).items() if name not in left_out}
        state = {name: value for name, value in seen.items() if isinstance(value, int | float)}
        kept = (list, deque, tuple)
        lists = {name: list(value) for name, value in seen.items() if isinstance(value, kept)}
        windows = {name: list(value.arrived) for name, value in seen.items() if isinstance(value, _Window)}
        return {**state, **lists, **windows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(vars(type(self)(self.cancels)))
        for name, value in state_dict.items():
            held = getattr(self, name)
            if isinstance(held, _Window):
                for measured in value:
                    held.add(measured)
            elif isinstance(held, tuple):
                setattr(self, name, tuple(value))
            elif isinstance(held, deque | list):
                held.extend(tuple(each) if isinstance(each, list) else each for each in value)
            else:
                setattr(self, name, value)


def _log(norm: float) -> float:
    return math.log(norm) if norm > 1e-30 else NOTHING


def _fell_alone(before: tuple[float, float], log_norm: float, loss: float, least: float) -> bool:
    """Whether the log norm has fallen that far since ``before``, and that much further than the loss has.

    Not where the loss is 0: there is nothing left to learn.
    """
    if loss == 0:
        return False
    log_norm_then, loss_then = before
    fell = log_norm_then - log_norm
    if loss > 0 and loss_then > 0:
        return fell > least and fell - math.log(loss_then / loss) > least
    return fell > least and loss >= loss_then
