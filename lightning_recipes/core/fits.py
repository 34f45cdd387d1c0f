"""Whether a training on a fixed sample learns it by heart, and how far it gets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_recipes.core.criteria import Criterion
from lightning_recipes.core.targets import constant_of, unnormalised

LEARNT = 0.03  # of the loss of the best constant output
STUCK = 0.5  # of it: a training that is still above has learnt next to nothing
STILL = 0.9  # of what it was at two thirds: a training above does not get any further
RISEN = 1.5  # times the loss of the best constant output, while what is trained falls
UNSTABLE = 2.0  # excess that no training at a learning rate in order gets to, once it has begun
FACTORS = (10.0, 0.1, 100.0, 0.01)  # of the learning rate


class _Group:
    """A loss function for outputs of one shape: its value at the start, and the least and the constant one."""

    def __init__(self, calls: list[Criterion], least: float) -> None:
        self.start = _mean(calls)
        prior = constant_of(calls)
        constant = sum(float(call.at(prior)) for call in calls) / len(calls)
        self.least = sum(_floor(call) for call in calls) / len(calls)
        if calls[0].reduction != "sum":
            self.least = max(self.least, least)
        regression = calls[0].kind in ("squares", "absolute")
        self.one_label = constant - self.least <= (1e-9 if regression else 1e-3) * max(abs(self.start), abs(constant))
        outputs = torch.cat([call.outputs.detach().float().flatten() for call in calls])
        self.far = bool(unnormalised(calls, float(outputs.std(correction=0)))) and self.start > constant
        self.reference = min(constant, self.start) if self.start > self.least else constant

    def excess(self, calls: list[Criterion]) -> float:
        return (_mean(calls) - self.least) / max(self.reference - self.least, 1e-12)


def _mean(calls: list[Criterion]) -> float:
    return sum(call.mean for call in calls) / len(calls)


def _floor(call: Criterion) -> float:
    """What the criterion is at least: above 0 with soft targets or label smoothing."""
    if call.kind not in ("classes", "binary"):
        return 0.0
    smoothing = call.arguments.get("label_smoothing", 0.0)
    if not smoothing and not call.targets.is_floating_point():
        return 0.0
    targets = call.targets
    if call.kind == "binary":
        soft = targets.float().clamp(1e-6, 1 - 1e-6)
        return float(call.value_at(soft.logit() if call.name.endswith("logits") else soft))
    dim = 1 if call.outputs.dim() > 1 else 0
    if not targets.is_floating_point():
        hard = targets.clamp(min=0, max=call.classes - 1)
        targets = torch.nn.functional.one_hot(hard, call.classes).float().movedim(-1, dim)
    soft = (1 - smoothing) * targets.float() + smoothing / call.classes
    return float(call.value_at(soft.clamp(min=1e-12).log()))


class FitRule:
    """Follows one training on a fixed sample, and says when it is over.

    The excess of a criterion is its value above the least possible one (label smoothing, soft targets, equal inputs
    with different targets), over that of the best constant output: 1 is what can be had without looking at the input, 0
    is learnt by heart. Of several criteria the greatest counts. Of a loss that nobody knows it is the loss over the
    first one; so it is where all targets are one number that the training step makes up, which outputs are compared by.

    Args:
        least_loss: Because of inputs that are the same: of criteria for classes, or of the only one.

    Example:
        >>> rule = FitRule()
        >>> [rule.update(loss, []) for loss in (2.0, 1.0, 0.05)]
        [False, False, True]
        >>> rule.excess, rule.known
        (0.025, False)
    """

    def __init__(self, least_loss: float = 0.0) -> None:
        self.curve: list[float] = []
        self.losses: list[float] = []
        self.known = self.one_label = self.far = False
        self._least = least_loss
        self._groups: dict[str, _Group] = {}

    def measure(self, loss: float, criteria: Sequence[Criterion]) -> float:
        """The excess of an update's batches; the first ones set the scale.

        Args:
            loss: Mean of what the training step returned; NaN if it returns nothing.
            criteria: That it is made of.
        """
        calls: dict[str, list[Criterion]] = {}
        for call in criteria:
            if call.positions and not (call.made_up and bool((call.targets == call.targets.flatten()[0]).all())):
                calls.setdefault(f"{call.name} {tuple(call.outputs.shape[1:])}", []).append(call)
        if not self._groups and not self.losses:
            self._groups = {
                key: _Group(same, self._least if same[0].kind == "classes" or len(calls) == 1 else 0.0)
                for key, same in calls.items()
            }
            self.one_label = bool(self._groups) and all(group.one_label for group in self._groups.values())
            self.far = any(group.far for group in self._groups.values())
            self.known = bool(self._groups)
        self.losses.append(loss)
        if not self.known:
            return loss / self.losses[0] if self.losses[0] > 0 else math.nan
        excesses = [
            group.excess(calls[key]) for key, group in self._groups.items() if key in calls and not group.one_label
        ]
        return max(excesses, default=0.0, key=lambda value: (math.isnan(value), value))

    def follow(self, excess: float) -> bool:
        """Take the excess of an update, the mean over all ranks; return whether the training is over."""
        self.curve.append(excess)
        hopeless = len(self.curve) > 50 and min(self.curve[-40:]) > 20
        return self.learnt or hopeless or (not math.isfinite(excess) and self.known)

    def update(self, loss: float, criteria: Sequence[Criterion]) -> bool:
        """Both."""
        return self.follow(self.measure(loss, criteria))

    @property
    def excess(self) -> float:
        """At the end: the median of the last five; infinite if it is no number."""
        last = self.curve[-1:] if self.learnt else self.curve[-5:]
        if not last or not all(map(math.isfinite, last)):
            return math.inf
        return sorted(last)[len(last) // 2]

    @property
    def learnt(self) -> bool:
        """Whether the sample has been learnt."""
        return bool(self.curve) and self.curve[-1] <= LEARNT

    @property
    def stuck(self) -> bool:
        """Whether it has learnt next to nothing, or does not get any further."""
        if self.excess > STUCK:
            return True
        third = len(self.curve) // 3
        middle = self.curve[2 * third - 5 : 2 * third]
        return len(middle) == 5 and self.excess > STILL * sorted(middle)[2] and self.excess > 0.1


@dataclass(frozen=True)
class Fit:
    """One training on the sample.

    Args:
        factor: Of the learning rate.
        steps: Updates.
        excess: At the end, as :class:`FitRule` has it.
        learnt: Whether the sample has been learnt.
        stuck: Whether it would not have been with more updates, as far as can be told.
        first_loss: That the training step returned at first; NaN if it returns none.
        last_loss: At the end.
        first_excess: Before the first update.
        most_excess: After it.
    """

    factor: float
    steps: int
    excess: float
    learnt: bool
    stuck: bool
    first_loss: float = math.nan
    last_loss: float = math.nan
    first_excess: float = 1.0
    most_excess: float = 1.0


def fit_of(rule: FitRule, factor: float) -> Fit:
    """What a rule has followed."""
    most = max((value if math.isfinite(value) else math.inf for value in rule.curve[1:]), default=rule.curve[0])
    ends = rule.losses[0], rule.losses[-1], rule.curve[0], most
    return Fit(factor, len(rule.curve), rule.excess, rule.learnt, rule.stuck, *ends)


def flipped(fits: Sequence[Fit]) -> bool:
    """Whether what is trained falls while the criterion rises."""
    first = fits[0]
    return first.excess > RISEN * max(1.0, first.first_excess) and first.last_loss < first.first_loss - 0.1 * abs(
        first.first_loss
    )


def other_factors(first: Fit) -> tuple[float, ...]:
    """Learning rates to try after a failure, the likelier ones first."""
    up, down, far_up, far_down = FACTORS
    return (down, far_down, up) if unstable(first) else (up, far_up, down)


def unstable(fit: Fit) -> bool:
    """Whether the loss has shot up."""
    return not fit.most_excess <= UNSTABLE * max(1.0, fit.first_excess)


def helps(other: Fit, first: Fit) -> bool:
    """Whether a training got clearly further than another."""
    return other.learnt or other.excess < 0.5 * first.excess


def mean_loss(losses: Sequence[Tensor | None]) -> float:
    """Of what the training step returned, NaN if it returned nothing."""
    there = [loss for loss in losses if loss is not None]
    return sum(float(loss.detach()) for loss in there) / len(there) if there else math.nan
