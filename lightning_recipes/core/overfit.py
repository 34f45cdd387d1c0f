"""Whether a network can learn a handful of examples by heart, and if not, why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_recipes.core.criteria import Criterion
from lightning_recipes.core.dependence import Dependence
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.initial_loss import APPLIED_TWICE, SQUASHED, constant_of, unnormalised
from lightning_recipes.core.repeats import Repeats

RECIPE = "Karpathy, A recipe for training neural networks, 2019: http://karpathy.github.io/2019/04/25/recipe/"
LEARNT = 0.03  # of the loss of the best constant output
STUCK = 0.5  # of it: a training that is still above has learnt next to nothing
STILL = 0.9  # of what it was at two thirds: a training above does not get any further
RISEN = 1.5  # times the loss of the best constant output, while what is trained falls
SHOT_UP = 10.0  # excess after which a sample that is learnt in the end is worth a word
UNSTABLE = 2.0  # excess that no training at a learning rate in order gets to, once it has begun
FACTORS = (10.0, 0.1, 100.0, 0.01)  # of the learning rate


class _Group:
    """A loss function for outputs of one shape: its value at the start, and the least and the constant one."""

    def __init__(self, calls: list[Criterion], least: float) -> None:
        self.start = _mean(calls)
        prior = constant_of(calls)
        constant = sum(float(call.at(prior)) for call in calls) / len(calls)
        self.least = sum(_floor(call) for call in calls) / len(calls)
        if calls[0].kind == "classes" and calls[0].reduction != "sum":
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
    first one.

    Args:
        least_loss: Of criteria for classes, because of inputs that are the same.

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
        self.beyond = 0.0
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
            if call.positions:
                calls.setdefault(f"{call.name} {tuple(call.outputs.shape[1:])}", []).append(call)
        if not self._groups and not self.losses:
            self._groups = {key: _Group(same, self._least) for key, same in calls.items()}
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


@dataclass
class Symptoms:
    """What was seen beside the loss.

    Args:
        examples: In the sample.
        known: Whether the criteria are known.
        one_label: Whether all targets are the same.
        far: Whether the targets of a regression are far from where the outputs start, or larger by far.
        optimizers: How many.
        trainable: Parameters that require a gradient, in numbers.
        frozen: Those that do not.
        unowned: Names of trainable parameters that no optimizer has.
        without_gradient: Of those that an optimizer has, and that never had a gradient other than 0.
        unmoved: Of those that had one, and stayed what they were.
        asleep: BatchNorm and dropout layers that the step leaves in evaluation mode, beside weights that are trained.
        awake: Whether there are others that are in training mode.
        repeats: Training examples that are validation examples, too.
        carried: Whether gradients were used that an update before had used.
        batch_norm: Whether the network has BatchNorm.
        activation: Name of what the logits come out of.
        penalty: Share of the loss, at the end, that is not the criteria.
        leaked: Whether the sample is known with its inputs set to zero.
        dependence: Of the outputs.
    """

    examples: int = 0
    known: bool = False
    one_label: bool = False
    far: bool = False
    optimizers: int = 1
    trainable: int = 0
    frozen: int = 0
    unowned: list[str] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)
    asleep: list[str] = field(default_factory=list)
    awake: bool = False
    repeats: Repeats = field(default_factory=Repeats)
    carried: bool = False
    batch_norm: bool = False
    activation: str = ""
    penalty: float = 0.0
    leaked: bool = False
    dependence: Dependence = field(default_factory=Dependence)

    @property
    def explained(self) -> bool:
        """Whether a failure has a cause that no other learning rate would change, or may be in order."""
        found = self.dependence
        if not self.known or self.optimizers > 1 or not found.targets_given:
            return True
        causes = (self.unowned, self.carried, self.activation, self.one_label, self.far, not found.used, found.alike)
        return any(map(bool, causes))


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


def judge(fits: Sequence[Fit], seen: Symptoms, step: int = 0) -> list[Finding]:
    """Say what was found, the most important first; never nothing.

    Args:
        fits: Trainings on the sample: at the learning rate in use, and after a failure at others.
        seen: What was seen beside.
        step: Of the run.

    Example:
        >>> fits = [Fit(1.0, 300, 0.9, False, True, 2.3, 2.1), Fit(10.0, 60, 0.02, True, False, 2.3, 0.05)]
        >>> [finding] = judge(fits, Symptoms(examples=16, known=True))
        >>> finding.rule, finding.evidence["factor"]
        ('learning rate too low', 10.0)
    """
    judge = _Judge(fits, seen, step)
    judge.structure()
    judge.frozen()
    judge.learning()
    return sorted(judge.findings, key=lambda finding: ("error", "warning", "info").index(finding.severity))


def nothing_to_train(frozen: int, step: int = 0) -> Finding:
    """No parameter requires a gradient."""
    return Finding(
        "nothing to train",
        "error",
        f"None of the {frozen:,} parameters requires a gradient.",
        "Set requires_grad, or thaw what was frozen.",
        step,
        {"frozen": frozen},
        RECIPE,
    )


class _Judge:
    def __init__(self, fits: Sequence[Fit], seen: Symptoms, step: int) -> None:
        self.fits, self.first, self.seen, self.step = fits, fits[0], seen, step
        self.findings: list[Finding] = []

    def say(self, rule: str, severity: Literal["info", "warning", "error"], message: str, advice: str) -> None:
        first, best = self.first, min(self.fits, key=lambda fit: fit.excess)
        evidence: dict[str, float | str] = {
            "examples": self.seen.examples,
            "updates": first.steps,
            "excess": first.excess,
            "first_loss": first.first_loss,
            "last_loss": first.last_loss,
            "factor": best.factor,
            "excess_at_factor": best.excess,
        }
        self.findings.append(Finding(rule, severity, message, advice, self.step, evidence, RECIPE))

    def structure(self) -> None:
        """What is wrong whether the sample is learnt or not."""
        seen, found = self.seen, self.seen.dependence
        if seen.unowned:
            self.say(
                "not in any optimizer",
                "warning",
                f"{_names(seen.unowned)} require a gradient, but no optimizer has them: they stay as they are.",
                "Give them to the optimizer, or set requires_grad=False.",
            )
        if seen.carried:
            self.say(
                "gradients not set to zero",
                "error",
                "An update used gradients that the update before had used: they add up.",
                "Call zero_grad before each backward pass, or once an update.",
            )
        self._set_up()
        if found.mixed:
            self.say(
                "examples mixed",
                "warning",
                f"Changing one of {found.examples} examples changes the outputs for others"
                + (", in evaluation mode, in which BatchNorm does not mix them." if seen.batch_norm else "."),
                "Look for a view, reshape or transpose of the batch dimension, or a softmax over it.",
            )
        if found.future:
            self.say(
                "the future is seen",
                "error",
                "The outputs for a token depend on the tokens that they are to predict.",
                "Give the attention a causal mask; make a recurrent network run in one direction.",
            )
        if found.copied:
            self.say(
                "target is the input",
                "warning",
                "The targets are the tokens of the same positions, which a causal network can see.",
                "Shift the targets by one position.",
            )
        if found.column >= 0:
            self.say(
                "target among the inputs",
                "warning",
                f"Column {found.column} of the inputs equals the target in all {found.examples} examples.",
                "Take it out of the inputs.",
            )
        elif seen.leaked and not found.future:
            self.say(
                "target among the inputs",
                "warning",
                "The sample that was learnt is known with all inputs set to zero, too.",
                "Find the way on which the target, or the number of the example, gets to the outputs.",
            )
        self._parameters()

    def _set_up(self) -> None:
        """What is wrong with how data and modes are set up."""
        seen = self.seen
        if seen.repeats.is_leak:
            self.say(
                "validation data in the training data",
                "warning",
                f"{seen.repeats.found} of {seen.repeats.examples} training examples are validation examples, too.",
                "Split before anything is repeated or augmented: validation says nothing about data that were learnt.",
            )
        if seen.asleep:
            self.say(
                "evaluation mode in training",
                "info" if seen.awake else "warning",
                f"In the training step {_names(seen.asleep, 'layers')} are in evaluation mode: BatchNorm does not"
                " follow the data, dropout drops nothing.",
                "Call train() before the step; if it is meant, set requires_grad=False for those layers, too.",
            )

    def _parameters(self) -> None:
        seen = self.seen
        if seen.without_gradient:
            blind = seen.dependence.alike or not seen.dependence.used
            self.say(
                "no gradient",
                "info" if self.first.learnt or self._expected or blind else "warning",
                f"{_names(seen.without_gradient)} never had a gradient other than 0.",
                "Fine if they are not used in training; else look for detach, no_grad, dead units or a frozen part.",
            )
        if seen.unmoved:
            self.say(
                "updates lost",
                "info",
                f"{_names(seen.unmoved)} had gradients, and stayed what they were.",
                "Their learning rate is 0, or updates are below the precision of the weights: keep those in float32.",
            )

    @property
    def _expected(self) -> str:
        """Why failing may be in order; empty if there is no reason."""
        seen = self.seen
        if not seen.known:
            return "what the loss can become is not known"
        if seen.optimizers > 1:
            return "the objectives of several optimizers may work against each other"
        if not seen.dependence.targets_given:
            return "targets are made in the training step"
        if seen.penalty > 0.02:
            return "the loss has other terms beside"
        if seen.frozen:
            return f"{seen.frozen / (seen.frozen + seen.trainable):.0%} of the parameters are frozen"
        if seen.trainable < 2 * seen.examples:
            return f"{seen.trainable:,} parameters may be too few"
        return ""

    def learning(self) -> None:
        """Whether the sample was learnt."""
        first, seen, found = self.first, self.seen, self.seen.dependence
        sample = f"{seen.examples} examples" if seen.examples else "The sample"
        if not math.isfinite(first.first_excess) and seen.known:
            self.say(
                "loss not finite",
                "error",
                f"The loss of {sample} is not finite before the first update.",
                "Look for NaN in the data, and for a logarithm or a division by zero.",
            )
        elif seen.one_label:
            self.say(
                "labels all alike",
                "info",
                f"All targets of {sample} are the same, so that nothing can be told: the data seem to be sorted.",
                "Shuffle the training data.",
            )
        elif flipped(self.fits) and seen.optimizers == 1:
            self.say(
                "wrong sign of the loss",
                "error",
                f"What is trained falls from {first.first_loss:.3g} to {first.last_loss:.3g} while its criterion "
                f"rises to {first.excess:.3g} times what a constant gives.",
                "Minimise the criterion, not its negative.",
            )
        elif seen.known and first.excess < -LEARNT:
            self.say(
                "no log-probabilities",
                "warning",
                f"The loss falls to {first.last_loss:.3g}, below what it can be of probabilities.",
                "Give nll_loss the result of log_softmax, binary_cross_entropy that of sigmoid, and targets in 0..1.",
            )
        elif first.learnt and first.most_excess > SHOT_UP * max(1.0, first.first_excess):
            self.say(
                "learning rate too high",
                "info",
                f"{sample} are learnt by heart in {first.steps} updates, after the loss was up at "
                f"{first.most_excess:.3g} times that of a constant output.",
                "Try a lower learning rate or a warmup.",
            )
        elif first.learnt:
            self.say(
                "overfits a small sample",
                "info",
                f"{sample} are learnt by heart in {first.steps} updates, as they should be.",
                "Go on.",
            )
        elif found.alike or (found.targets_given and not found.used):
            what = "The inputs of all examples are the same" if found.alike else "No output depends on its input"
            self.say(
                "input without information",
                "warning",
                f"{what}; {sample} were not learnt in {first.steps} updates ({self._left}).",
                "Look at what the training step is given, and at what becomes of it on the way.",
            )
        elif seen.activation:
            self.say(
                APPLIED_TWICE.get(seen.activation, "activation on the logits"),
                "warning",
                f"{sample} were not learnt in {first.steps} updates ({self._left}): the logits come out of "
                f"{seen.activation}.",
                "Hand the loss function the logits.",
            )
        elif seen.far:
            self.say(
                "targets not normalised",
                "warning" if first.stuck else "info",
                f"{sample} were not learnt in {first.steps} updates: the loss starts at {first.first_loss:.3g}, "
                f"{first.first_excess:.3g} times what their mean gives, and ends at {first.last_loss:.3g}.",
                "Bring the targets to mean 0 and standard deviation 1, or start the bias of the head at their mean.",
            )
        else:
            self._rate(sample)

    def frozen(self) -> None:
        """Frozen parameters, where the sample was not learnt."""
        seen = self.seen
        if seen.frozen and not self.first.learnt:
            self.say(
                "frozen parameters",
                "info",
                f"{seen.frozen / (seen.frozen + seen.trainable):.0%} of the parameters are frozen, and"
                f" {seen.examples} examples were not learnt.",
                "Set requires_grad=True if they should be trained: frozen weights have to be pretrained ones.",
            )

    @property
    def _left(self) -> str:
        """How far the training got."""
        if not self.seen.known:
            return f"loss {self.first.first_loss:.3g} to {self.first.last_loss:.3g}"
        if math.isinf(self.first.excess):
            return "the loss is not finite"
        return f"{self.first.excess:.0%} of the loss of a constant output is left"

    def _rate(self, sample: str) -> None:
        """It was not learnt, and only the learning rate is left to ask about."""
        first, expected = self.first, self._expected
        better = [fit for fit in self.fits[1:] if helps(fit, first)]
        severity: Literal["info", "warning"] = "warning" if first.stuck and not expected else "info"
        not_learnt = f"{sample} were not learnt in {first.steps} updates ({self._left})"
        if better:
            best = min(better, key=lambda fit: (not fit.learnt, abs(math.log10(fit.factor)), fit.excess))
            kind, times = (
                ("low", f"{best.factor:g} times") if best.factor > 1 else ("high", f"1/{1 / best.factor:g} of")
            )
            how = f"are in {best.steps}" if best.learnt else f"come down to {best.excess:.0%} in {best.steps}"
            if severity == "info" and kind == "low" and not expected:
                self.say(
                    "slow on a small sample",
                    "info",
                    f"{not_learnt}; with {times} the learning rate they {how}.",
                    "Try a higher learning rate if the run is to be short.",
                )
                return
            self.say(
                f"learning rate too {kind}",
                severity,
                f"{not_learnt}; with {times} the learning rate they {how}.",
                f"Use {times} the learning rate, and sweep around it.",
            )
        elif self.seen.carried or self.seen.unowned:
            self.say("small sample not learnt", "info", f"{not_learnt}.", "See the other findings.")
        elif expected:
            self.say("small sample not learnt", "info", f"{not_learnt}; {expected}.", "Good, if that is the reason.")
        elif not first.stuck:
            self.say("slow on a small sample", "info", f"{not_learnt}, and it still falls.", "Give it more max_steps.")
        else:
            tried = ", ".join(f"{fit.factor:g}" for fit in self.fits[1:])
            self.say(
                "small sample not learnt",
                "warning",
                f"{not_learnt}, nor with the learning rate times {tried}." if tried else f"{not_learnt}.",
                "Look for a bug before anything else: labels that do not belong to their inputs, a layer that loses "
                "the input, far too small a network, or an initialisation that lets no signal through.",
            )


def _names(names: Sequence[str], kind: str = "parameters") -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more {kind}"


def activation_of(criteria: Sequence[Criterion]) -> str:
    """What the logits of a criterion come out of, if that keeps the loss from 0."""
    for call in criteria:
        twice = call.name == "binary_cross_entropy_with_logits" and call.activation in ("sigmoid", "softmax", "relu")
        if call.activation in SQUASHED and (call.name == "cross_entropy" or twice):
            return call.activation
    return ""


def mean_loss(losses: Sequence[Tensor | None]) -> float:
    """Of what the training step returned, NaN if it returned nothing."""
    there = [loss for loss in losses if loss is not None]
    return sum(float(loss.detach()) for loss in there) / len(there) if there else math.nan
