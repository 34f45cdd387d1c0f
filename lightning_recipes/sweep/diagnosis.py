"""When a network is not good enough: what is the matter, and what helps."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_recipes.callbacks.curves import LearningCurves
from lightning_recipes.callbacks.initial_loss import InitialLossCheck
from lightning_recipes.callbacks.telling import told
from lightning_recipes.core.arguments import check_real
from lightning_recipes.core.curves import CurvesRule
from lightning_recipes.core.diagnosis import (
    OF_OPTIMIZATION,
    Diagnosis,
    Evidence,
    Measured,
    TwoSamples,
    decide,
    measured,
)
from lightning_recipes.core.trends import BLOCKS, trend

Loss = float | Sequence[float] | Tensor | Measured

NOT_CHECKED = "not checked"  # says nothing of the training
NOT_FINITE = ("not finite", "gradient not finite")
FOLDS = 5
MOST = 2000  # examples of each set that are looked at
FEWEST = 20  # examples of each set
DIRECTIONS = 64  # of the largest variance, that the classifier sees
HIDDEN = 32
STEPS = 150
LEARNING_RATE = 0.02
WEIGHT_DECAY = 0.03
TWO_SIDED = 1.96


def diagnose(
    train_loss: Loss | None = None,
    val_loss: Loss | None = None,
    target_loss: float | None = None,
    trivial_loss: float | None = None,
    smaller_train_loss: Loss | None = None,
    larger_train_loss: Loss | None = None,
    held_out_loss: Loss | None = None,
    train_inputs: Any = None,
    val_inputs: Any = None,
    features: Callable[[Tensor], Tensor] | None = None,
    trainer: pl.Trainer | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Say what is the matter with a training: a defect, model bias, optimization, overfitting, mismatch, or nothing.

    Of a ``trainer`` whose fit is over its callbacks are asked: what they warned of before the training is to be mended
    first, and what they told during it counts. Training loss that of a constant output: nothing was learnt. High: if a
    smaller network reaches a lower one it is optimization, if not, or if a larger one does, the model is too small.
    Training loss low and validation loss high: overfitting, if held-out data of the training distribution are as bad,
    mismatch, if they are good; without such data a classifier is trained to tell the inputs of the two sets apart. What
    is high, and how noise counts, says :func:`~lightning_recipes.core.diagnosis.decide`. Where the evidence does not
    decide, the answer is ``"cannot tell"``, and what to measure next.

    A loss is a number, or a sample (of examples, batches or, where networks are compared, seeds) whose mean it is: only
    then is it known how sure it is.

    Args:
        train_loss: In the end, taken as the validation loss is: without dropout and penalties. None for that of the
            trainer's :class:`~lightning_recipes.LearningCurves`.
        val_loss: In the end; None likewise.
        target_loss: What would be good enough: what people reach, or what is wanted.
        trivial_loss: Of the best constant prediction: the entropy of the class prior (ln C for even classes), the
            variance of the targets; above 0, for losses whose least value is 0. None for that of the trainer's
            :class:`~lightning_recipes.InitialLossCheck`.
        smaller_train_loss: Of a smaller or shallower network, trained on the same data.
        larger_train_loss: Of a larger network, likewise.
        held_out_loss: On a part of the training distribution that was not trained on.
        train_inputs: Of examples, a tensor (N, ...) or tensors of batches; looked at if the rest does not decide.
        val_inputs: Likewise.
        features: Makes features (N, ...) of inputs, such as a network without its head; needed for tokens.
        trainer: After ``fit``, with the callbacks that shall be asked.
        seed: Of the classifier.

    Raises:
        TypeError: If an argument is not of its kind, or there is no training loss.
        ValueError: If a number is out of its range, or there are too few inputs.

    Example:
        >>> diagnosis = diagnose(train_loss=1.4, trivial_loss=2.3, smaller_train_loss=[0.20, 0.22, 0.21])
        >>> diagnosis.leaf, diagnosis.cures[0]
        ('optimization', 'sweep the learning rate, with a warmup')

    References:
        Ng, Machine Learning Yearning, 2018, chapters 20 to 44
        Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, 2017: https://arxiv.org/abs/1610.06545
    """
    if trainer is not None and not isinstance(trainer, pl.Trainer):
        raise TypeError(f"trainer must be a Trainer, got {trainer!r}")
    run: Any = trainer  # connectors set some attributes
    callbacks = [] if run is None else run.callbacks
    rule = next((each.rule for each in callbacks if isinstance(each, LearningCurves)), None)
    read = _losses(rule) if rule is not None else (None, None)
    train, val = (
        measured(name, given) if given is not None else own
        for name, given, own in zip(("train_loss", "val_loss"), (train_loss, val_loss), read, strict=True)
    )
    if target_loss is not None:
        check_real("target_loss", target_loss, -math.inf, math.inf)
    if trivial_loss is not None:
        check_real("trivial_loss", trivial_loss, 0, math.inf)
    else:
        trivial_loss = _trivial(callbacks)
    if (train_inputs is None) != (val_inputs is None):
        raise TypeError("the inputs of both sets are needed to compare them, or of none")
    findings = told(trainer) if trainer is not None else []
    findings = [each for each in findings if each.rule != NOT_CHECKED]
    warned = [each for severity in ("error", "warning") for each in findings if each.severity == severity]
    of_curves = rule.findings() if rule is not None else []
    defects = tuple(each for each in warned if not each.step and each.rule not in OF_OPTIMIZATION)
    lost = [each for each in of_curves if each.rule == "diverged" and "since" in each.evidence]
    if lost and train_loss is None:
        train = Measured(math.nan)
        defects += (*[each for each in warned if each.rule in NOT_FINITE][:1], *lost)
    if train is None:
        raise TypeError(
            "there must be a training loss: give train_loss, or a trainer with LearningCurves of at least 100 batches"
        )
    evidence = Evidence(
        train,
        val,
        target_loss,
        trivial_loss,
        None if smaller_train_loss is None else measured("smaller_train_loss", smaller_train_loss),
        None if larger_train_loss is None else measured("larger_train_loss", larger_train_loss),
        None if held_out_loss is None else measured("held_out_loss", held_out_loss),
        rules=frozenset(each.rule for each in (*of_curves, *warned) if each not in defects),
        defects=defects,
        step=trainer.global_step if trainer is not None else 0,
    )
    if train_inputs is not None and held_out_loss is None:
        samples = two_sample_test(train_inputs, val_inputs, features, seed)
        evidence = Evidence(**{**vars(evidence), "samples": samples})
    return decide(evidence)


def _trivial(callbacks: Sequence[Any]) -> float | None:
    """The loss of the best constant output, if an InitialLossCheck knows it of a single criterion."""
    results = [result for each in callbacks if isinstance(each, InitialLossCheck) for result in each.results]
    constants = [result.constant for result in results if result.constant > 0 and math.isfinite(result.constant)]
    return constants[0] if len(constants) == len(results) == 1 else None


def _losses(rule: CurvesRule) -> tuple[Measured | None, Measured | None]:
    """Training and validation loss at the end of the curves."""
    means = [each.mean for each in rule.train.bins if each.count]
    train = val = None
    if len(means) >= 4 * BLOCKS:
        line = trend(means[-len(means) // 4 :])
        train = Measured(line.level + line.change / 2, line.error)
    values = [value for value in rule.checks.values[-5:] if math.isfinite(value)]
    if values:
        val = measured("val_loss", values)
    return train, val


# ------------------------------------------------------------------------------------- two samples


@torch.inference_mode(False)
@torch.enable_grad()
def two_sample_test(
    first: Any, second: Any, features: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> TwoSamples:
    """Whether a classifier tells two sets of examples apart: cross-validated, a small network on standardised inputs.

    The classifier, a linear one beside 32 hidden units, sees the 64 directions of largest variance and is judged on
    fifths that it was not trained on. Of each set at most 2,000 examples are taken; the global random state is left
    alone.

    Args:
        first: Examples, a tensor (N, ...) or tensors of batches (of pairs the inputs), at least 20.
        second: Likewise, of the same shape.
        features: Makes features (N, ...) of inputs.
        seed: Of the choice of examples, the folds and the network.

    Raises:
        TypeError: If the examples are not tensors.
        ValueError: If there are too few, their shapes differ, or they are not finite.

    References:
        Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, 2017: https://arxiv.org/abs/1610.06545
        DeLong et al., Comparing the Areas under Two or More Correlated ROC Curves, 1988 (the interval)
    """
    generator = torch.Generator().manual_seed(seed)
    sets = [_examples(each, features, generator) for each in (first, second)]
    if sets[0].shape[1:] != sets[1].shape[1:]:
        raise ValueError(
            f"both sets must have one shape, got {tuple(sets[0].shape[1:])} and {tuple(sets[1].shape[1:])}"
        )
    if min(map(len, sets)) < FEWEST:
        raise ValueError(f"at least {FEWEST} examples of each set are needed, got {len(sets[0])} and {len(sets[1])}")
    pooled = torch.cat(sets)
    if not bool(pooled.isfinite().all()):
        raise ValueError("inputs must be finite")
    inputs = _directions(pooled)
    labels = torch.cat([torch.zeros(len(sets[0])), torch.ones(len(sets[1]))])
    folds = torch.cat([_folds(len(each), generator) for each in sets])
    scores = _scores(inputs, labels, folds, generator)
    areas, variances = [], []
    for fold in range(FOLDS):
        area, variance = _area(*(scores[(folds == fold) & (labels == label)] for label in (0, 1)))
        areas.append(area)
        variances.append(variance)
    sizes = [len(each) for each in sets]
    floor = 0.5 / min(sizes)  # of the error: a perfect score of few examples is not certain
    return TwoSamples(
        auc=sum(areas) / FOLDS,
        error=TWO_SIDED * max(floor, math.sqrt(sum(variances)) / FOLDS),
        chance=TWO_SIDED * math.sqrt((sum(sizes) + 1) / (12 * sizes[0] * sizes[1])),
        samples=sum(sizes),
    )


def _examples(given: Any, features: Callable[[Tensor], Tensor] | None, generator: torch.Generator) -> Tensor:
    """At most 2,000 examples as a matrix, on the CPU."""
    batches: Iterable[Any] = [given] if isinstance(given, Tensor) else given
    parts = []
    for batch in batches:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be a tensor, or tensors of batches, got {type(inputs).__name__}")
        with torch.no_grad():
            made = inputs if features is None else features(inputs)
        parts.append(made.detach().flatten(1).float().cpu() if made.ndim > 1 else made.detach().float().cpu()[:, None])
    if not parts:
        return torch.empty(0, 0)
    matrix = torch.cat(parts)
    return matrix[torch.randperm(len(matrix), generator=generator)[:MOST]]


def _directions(pooled: Tensor) -> Tensor:
    """The inputs, standardised, along the directions of their largest variance, with a mean square of 1."""
    centred = pooled - pooled.mean(0)
    spread = centred.std(0)
    centred = (centred / spread.clamp(min=1e-12))[:, spread > 1e-6 * spread.max()]
    if centred.shape[1] > DIRECTIONS:
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        centred = centred @ directions[:DIRECTIONS].T
    size = centred.square().mean().sqrt()
    return centred / size if size > 0 else centred


def _folds(examples: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(examples, generator=generator) % FOLDS


def _scores(inputs: Tensor, labels: Tensor, folds: Tensor, generator: torch.Generator) -> Tensor:
    """Logits of the examples, each of the network that was trained without its fold; all networks at once."""
    wide = inputs.shape[1]
    shapes = {"line": (wide, 1), "into": (wide, HIDDEN), "shift": (1, HIDDEN), "out": (HIDDEN, 1), "bias": (1, 1)}
    weights = {name: torch.zeros(FOLDS, *shape) for name, shape in shapes.items()}
    for name in ("into", "out"):
        start = torch.randn(shapes[name], generator=generator) / math.sqrt(shapes[name][0])
        weights[name] = start.repeat(FOLDS, 1, 1)
    for weight in weights.values():
        weight.requires_grad_()

    def logits() -> Tensor:  # (folds, examples)
        hidden = torch.tanh(inputs @ weights["into"] + weights["shift"])
        return (inputs @ weights["line"] + hidden @ weights["out"] + weights["bias"])[..., 0]

    fitted = folds != torch.arange(FOLDS)[:, None]
    truth = labels.expand(FOLDS, -1)
    shares = torch.stack([(fitted & (truth == label)).sum(1) for label in (0, 1)], 1)
    weight_of = torch.where(fitted, 0.5 / shares.gather(1, truth.long()), 0.0)  # both sets count alike
    optimizer = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=WEIGHT_DECAY / LEARNING_RATE)
    for _ in range(STEPS):
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits(), truth, weight_of, reduction="sum")
        optimizer.zero_grad()
        torch.autograd.backward(losses)
        optimizer.step()
    return logits().detach().gather(0, folds[None])[0]


def _area(negatives: Tensor, positives: Tensor) -> tuple[float, float]:
    """Area under the ROC curve and DeLong's variance of it."""
    wins = (positives[:, None] > negatives).double() + 0.5 * (positives[:, None] == negatives).double()
    of_positives, of_negatives = wins.mean(1), wins.mean(0)
    variance = of_positives.var() / len(positives) + of_negatives.var() / len(negatives)
    return float(wins.mean()), float(variance)
