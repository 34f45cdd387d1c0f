"""When a network is not good enough: the tree that tells bias, optimization, overfitting and mismatch apart."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_recipes.core.findings import Finding, listing
from lightning_recipes.core.selection import quantile

Leaf = Literal[
    "defect", "nothing learnt", "model bias", "optimization", "overfitting", "mismatch", "done", "cannot tell"
]

LECTURE = "When a network fails to train: training loss first, then validation; Ng, Machine Learning Yearning, 2018"
SURE = 0.975  # one-sided confidence of every comparison
NOTHING = 0.95  # of the trivial loss: a loss above that is no better than that of a constant output
HIGH = 0.5  # of the trivial loss: a training loss above that is high
LOW = 0.1  # of the trivial loss: a training loss below that is low, and so is a gap, or what a larger network gains
CLOSE = 0.1  # of what the training loss is too high by: networks whose losses differ by less are alike
HALF = 0.5  # of the gap, that the larger of its two causes has; of a training loss, that a larger network gets rid of
TOLD_APART = 0.6  # area under the ROC curve: two sets of inputs that a classifier tells apart

CURES: dict[str, tuple[str, ...]] = {
    "nothing learnt": (
        "look whether the labels belong to their inputs (shuffled or joined wrongly they belong to others)",
        "see whether the network can learn 16 examples by heart (OverfitCheck), which a bug keeps it from",
        "sweep the learning rate",
        "give it inputs that say more",
    ),
    "model bias": (
        "use a larger or deeper network",
        "give it inputs that say more",
        "regularise less (weight decay, dropout, augmentation)",
    ),
    "optimization": (
        "sweep the learning rate, with a warmup",
        "train longer",
        "normalise activations, add residual connections, start from a better initialisation",
        "try another optimizer",
    ),
    "overfitting": (
        "get more data, or augment it",
        "regularise (weight decay, dropout)",
        "stop early",
        "use a smaller network",
    ),
    "mismatch": (
        "train on data like those it is used on, or augment towards them",
        "look at what tells the two sets apart, and make preprocessing the same",
        "more data like the present ones will not help",
    ),
    "done": (),
}
OF_OPTIMIZATION = (  # rules of findings that say so
    "diverged",
    "training loss rises",
    "falls too slowly",
    "decayed too early",
    "learning rate looks too low",
    "learning rate looks too high",
    "learning rate too low",  # of the small sample, like the next
    "learning rate too high",
    "exploding gradient",
    "vanishing gradient",
    "divergence",
    "extremely aggressive clipping",
    "saddle",
    "bouncing between the walls",
)


@dataclass(frozen=True)
class Measured:
    """A loss, and how sure it is.

    Args:
        value: The loss.
        error: Half the width of its 95 % interval; 0 if that is not known.
    """

    value: float
    error: float = 0.0

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.value - self.error

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.value + self.error

    @override
    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}" if self.error else f"{self.value:.3g}"

    def __sub__(self, other: "Measured") -> "Measured":
        """The difference of two losses that were measured independently."""
        return Measured(self.value - other.value, math.hypot(self.error, other.error))


def measured(name: str, loss: "float | Sequence[float] | Tensor | Measured") -> Measured:
    """A loss given as a number, or as a sample whose mean it is (over examples, batches or seeds).

    Raises:
        TypeError: If it is neither.
        ValueError: If it is empty or not finite.

    Example:
        >>> str(measured("val_loss", [0.5, 0.7, 0.6, 0.6]))
        '0.6 ± 0.1'
    """
    if isinstance(loss, Measured):
        return loss
    given: Any = loss.flatten() if isinstance(loss, Tensor) else loss
    given = given.tolist() if hasattr(given, "tolist") else given
    values: Any = [given] if isinstance(given, Real) else given
    if isinstance(given, bool | str) or not all(isinstance(each, Real) for each in values):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {loss!r}")
    values = [float(each) for each in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be finite and at least one number, got {loss!r}")
    if len(values) == 1:
        return Measured(values[0])
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Measured(statistics.fmean(values), quantile(len(values), SURE) * error)


@dataclass(frozen=True)
class TwoSamples:
    """How well a classifier tells two sets of inputs apart that it was not fitted on.

    Args:
        auc: Area under the ROC curve; 0.5 if the sets are of one distribution.
        error: Half the width of its 95 % interval.
        chance: How far from 0.5 it gets by chance, in 95 % of the cases, if they are.
        samples: Of both sets together.
    """

    auc: float
    error: float
    chance: float
    samples: int

    @override
    def __str__(self) -> str:
        return (
            f"a classifier tells the inputs of the two sets apart with an AUC of {self.auc:.3f} ± {self.error:.2g}"
            f" ({self.samples:,} examples; by chance 0.5 ± {self.chance:.2g})"
        )


@dataclass(frozen=True)
class Diagnosis:
    """A leaf of the tree.

    Args:
        leaf: ``"defect"``, ``"nothing learnt"``, ``"model bias"``, ``"optimization"``, ``"overfitting"``,
            ``"mismatch"``, ``"done"`` or ``"cannot tell"``.
        finding: The evidence, and what to do; the rule is the leaf.
        cures: What helps, the first first; where it cannot be told, what to measure next.
    """

    leaf: Leaf
    finding: Finding
    cures: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """What the tree is asked with; everything but the training loss may be missing.

    Args:
        train: Training loss, as the validation loss is taken: without dropout and penalties.
        val: Validation loss.
        target: A loss that would be good enough: what people reach, or what is wanted.
        trivial: Loss of the best constant prediction: the entropy of the class prior, the variance of the targets. For
            losses whose least value is 0.
        smaller: Training loss of a smaller or shallower network on the same data.
        larger: Training loss of a larger network on the same data.
        held_out: Loss on a part of the training distribution that was not trained on.
        samples: How well the inputs of training and validation can be told apart.
        rules: Of what was told of the training, and before it of the learning rate.
        defects: What else warned before it, the severest first, or of values that are not finite since.
        step: Optimizer updates done.
    """

    train: Measured
    val: Measured | None = None
    target: float | None = None
    trivial: float | None = None
    smaller: Measured | None = None
    larger: Measured | None = None
    held_out: Measured | None = None
    samples: TwoSamples | None = None
    rules: frozenset[str] = frozenset()
    defects: tuple[Finding, ...] = ()
    step: int = 0


def decide(evidence: Evidence) -> Diagnosis:
    """Walk down the tree: first what is broken, then the training loss, then the validation loss.

    What warned before the training, or of a loss that is not finite any more, is mended first: behind it all leaves
    look alike. Training loss high: optimization, if a smaller network gets lower, model bias, if a larger one does, or
    nothing learnt where it, or the loss on held-out data (else on validation data), is not lower than that of a
    constant output; low, and validation high: overfitting or mismatch; else done. A loss is high if the whole of its
    interval is above the target. Without a target the trivial loss is the measure: a training loss above half of it is
    high and one below a tenth low, between them it cannot be told (unless a smaller network has a lower one, or a
    larger one at most half of it); and validation is high if it is more than a tenth of the trivial loss above
    training. Where validation is no better than a constant output, or its gap larger than the training loss itself,
    that is looked at wherever the training loss does not decide.

    Example:
        >>> decide(Evidence(Measured(0.02), Measured(0.9), target=0.1, held_out=Measured(0.05))).leaf
        'mismatch'

    References:
        Ng, Machine Learning Yearning, 2018, chapters 20 to 44
        He et al., Deep Residual Learning for Image Recognition, 2015 (a deeper network with a higher training loss):
        https://arxiv.org/abs/1512.03385
    """
    train, target, trivial = evidence.train, evidence.target, evidence.trivial
    if evidence.defects:
        first, *others = evidence.defects
        when = f"at step {first.step:,}" if first.step else "before the training"
        beside = f" ({listing([each.rule for each in others])} beside it)" if others else ""
        return _leaf(
            evidence,
            "defect",
            f"The training loss is {train}, and {when} there was a warning of {first.rule}{beside}: {first.message}",
            tuple(each.advice for each in evidence.defects),
        )
    if target is None and trivial is None:
        return _leaf(
            evidence,
            "cannot tell",
            f"The training loss is {train}, and nothing says whether that is high.",
            (
                "the loss of the best constant prediction (trivial_loss)",
                "what people or a known model reach (target_loss)",
            ),
        )
    if target is not None:
        high, low, than = train.low > target, train.low <= target, f"the target of {target:g}"
    else:
        assert trivial is not None  # one of the two is there
        high, low = train.low > HIGH * trivial, train.high < LOW * trivial
        than = f"the trivial loss of {trivial:.3g}"
    beaten = evidence.smaller is not None and (train - evidence.smaller).low > 0
    worse = evidence.val is not None and _worse_than_that(train, evidence.val, trivial)
    if high or (beaten and not low):
        than = f"{'high' if high else 'not low'} against {than}"
        found = _of_training(evidence, than)
        instead = _of_validation(evidence, than) if worse and found.leaf == "cannot tell" else found
        return found if instead.leaf == "cannot tell" else instead
    if low:
        sure = target is None or train.high <= target
        return _of_validation(evidence, f"{'low against' if sure else 'not surely above'} {than}")
    if worse:
        return _of_validation(evidence, f"neither low nor high against {than}")
    if evidence.larger is not None and _size_helps(evidence, evidence.larger):
        return _of_training(evidence, f"neither low nor high against {than}")
    return _leaf(
        evidence,
        "cannot tell",
        f"The training loss is {train}, neither low nor high against {than}.",
        (
            "what people or a known model reach (target_loss)",
            "the training loss of a smaller and of a larger network (smaller_train_loss, larger_train_loss)",
        ),
    )


def _worse_than_that(train: Measured, val: Measured, trivial: float | None) -> bool:
    """Whether validation is what to look at, though the training loss may be too high."""
    return (val - train).low > train.value or (trivial is not None and val.low > NOTHING * trivial)


def _size_helps(evidence: Evidence, larger: Measured) -> bool:
    """Whether the training loss of a larger network is lower by what matters."""
    train, gained = evidence.train, (evidence.train - larger).low
    if evidence.target is not None:
        return gained > CLOSE * (train.value - evidence.target)
    trivial = evidence.trivial or 0.0
    return gained > LOW * trivial and (train.low > HIGH * trivial or gained > HALF * train.value)


def _of_training(evidence: Evidence, than: str) -> Diagnosis:
    train, smaller, larger = evidence.train, evidence.smaller, evidence.larger
    saw = f"The training loss is {train}, {than}"
    matters = CLOSE * (train.value - (evidence.target or 0.0))
    over = None if smaller is None else train - smaller
    if over is not None and over.low > 0 and over.value > matters:
        return _leaf(
            evidence,
            "optimization",
            f"{saw}, and a smaller network reaches {smaller}: the larger one could, too, and does not find it.",
        )
    if told := _told(evidence):
        return _leaf(evidence, "optimization", f"{saw}, and it was told: {', '.join(told)}.")
    if nothing := _nothing(evidence):
        return _leaf(evidence, "nothing learnt", f"{saw}: {nothing}.")
    if larger is not None:
        if _size_helps(evidence, larger):
            return _leaf(evidence, "model bias", f"{saw}, and a larger network reaches {larger}.")
        return _leaf(
            evidence,
            "cannot tell",
            f"{saw}, and that of a larger network is {larger}: size is not what it lacks, or not enough to tell.",
            ("the training loss at other learning rates, and after more updates",),
        )
    if over is None:
        return _leaf(
            evidence,
            "cannot tell",
            f"{saw}; a network that is too small and one that is not trained well look alike.",
            ("the training loss of a smaller and of a larger network (smaller_train_loss, larger_train_loss)",),
        )
    if over.high <= matters:
        than_smaller = "lower than" if over.high < 0 else "no higher than"
        return _leaf(
            evidence,
            "model bias",
            f"{saw}, but {than_smaller} the {smaller} of a smaller network: size helps, or does no harm.",
        )
    return _leaf(
        evidence,
        "cannot tell",
        f"{saw}, and that of a smaller network is {smaller}: too uncertain to compare.",
        ("both training losses with more seeds",),
    )


def _told(evidence: Evidence) -> list[str]:
    """Which of the rules that were told say that it is optimized badly."""
    return [rule for rule in OF_OPTIMIZATION if rule in evidence.rules]


def _nothing(evidence: Evidence) -> str:
    """In what way the network knows no more than a constant output; empty if it does."""
    others = evidence.held_out if evidence.held_out is not None else evidence.val
    if "training loss does not fall" in evidence.rules:
        return "it has not fallen since the start"
    if evidence.trivial is None:
        return ""
    if evidence.train.low > NOTHING * evidence.trivial:
        return "no better than a constant output"
    if others is not None and others.low > NOTHING * evidence.trivial:
        kind = "held-out" if others is evidence.held_out else "validation"
        return f"what is learnt holds for these examples alone, the {kind} loss is {others}, no better than a constant"
    return ""


def _of_validation(evidence: Evidence, than: str) -> Diagnosis:
    train, val = evidence.train, evidence.val
    saw = f"The training loss is {train}, {than}"
    if val is None:
        return _leaf(
            evidence, "cannot tell", f"{saw}; there is no validation loss.", ("the validation loss (val_loss)",)
        )
    gap = val - train
    saw += f"; the validation loss is {val}"
    if evidence.target is not None:
        high, low = val.low > evidence.target, val.low <= evidence.target
    else:
        bound = LOW * (evidence.trivial or 0.0)
        high, low = gap.low > bound, gap.high <= bound
    if high:
        return _of_gap(evidence, saw, gap)
    if low:
        though = _told(evidence)
        beside = f", though it was told: {', '.join(though)}" if though else ""
        return _leaf(evidence, "done", f"{saw}, which is not high either{beside}.")
    return _leaf(evidence, "cannot tell", f"{saw}: too uncertain.", ("the validation loss on more examples",))


def _of_gap(evidence: Evidence, saw: str, gap: Measured) -> Diagnosis:
    val, held_out, samples = evidence.val, evidence.held_out, evidence.samples
    assert val is not None  # or there were no gap
    saw += f", {gap} higher"
    if held_out is not None:
        shift, within = val - held_out, held_out - evidence.train
        says = f"{saw}: {within} of that on held-out data of the training distribution, {shift} more on validation"
        if shift.low > HALF * gap.value:
            return _leaf(evidence, "mismatch", f"{says}.")
        if shift.high <= HALF * gap.value:
            return _leaf(evidence, "overfitting", f"{says}.")
        return _leaf(evidence, "cannot tell", f"{says}: too uncertain.", ("both losses on more examples",))
    if samples is not None:
        if samples.auc - samples.error > TOLD_APART:
            return _leaf(evidence, "mismatch", f"{saw}, and {samples}.")
        if samples.auc + samples.error <= TOLD_APART:
            return _leaf(evidence, "overfitting", f"{saw}, and the inputs are alike: {samples}.")
        saw += f", and {samples}, which does not decide"
    if "overfitting" in evidence.rules or "best at the start" in evidence.rules:
        return _leaf(evidence, "overfitting", f"{saw}, and it has grown while the training loss fell.")
    return _leaf(
        evidence,
        "cannot tell",
        f"{saw}; overfitting and data of another distribution look alike.",
        (
            "the loss on a held-out part of the training distribution (held_out_loss)",
            "whether a classifier tells the inputs of the two sets apart (train_inputs and val_inputs)",
        ),
    )


def _leaf(evidence: Evidence, leaf: Leaf, message: str, own: tuple[str, ...] = ()) -> Diagnosis:
    cures = own or CURES[leaf]
    if leaf == "defect":
        advice = f"Mend that first: {cures[0]}"
    elif leaf == "done":
        advice = "Nothing to cure: tune for the last bit, or ask for more (a lower target_loss)."
    elif own:
        advice = f"Measure {'; or '.join(cures)}."
    else:
        advice = f"In this order: {'; '.join(cures)}."
    numbers: dict[str, float | str] = {}
    for name in ("train", "val", "smaller", "larger", "held_out"):
        loss = getattr(evidence, name)
        if loss is not None and math.isfinite(loss.value):
            numbers |= {f"{name}_loss": loss.value, f"{name}_loss_error": loss.error}
    for name in ("target", "trivial"):
        if getattr(evidence, name) is not None:
            numbers[f"{name}_loss"] = getattr(evidence, name)
    if evidence.samples is not None:
        samples = evidence.samples
        numbers |= {"auc": samples.auc, "auc_error": samples.error, "auc_by_chance": samples.chance}
    severity: Literal["info", "warning"] = "info" if leaf in ("done", "cannot tell") else "warning"
    return Diagnosis(leaf, Finding(leaf, severity, message, advice, evidence.step, numbers, LECTURE), cures)
