"""Whether a network can learn a handful of examples by heart, and if not, why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_recipes.core.criteria import Criterion
from lightning_recipes.core.dependence import Dependence
from lightning_recipes.core.findings import Finding, listing
from lightning_recipes.core.fits import LEARNT, STUCK, Fit, flipped, helps
from lightning_recipes.core.initial_loss import APPLIED_TWICE, SQUASHED
from lightning_recipes.core.repeats import Repeats
from lightning_recipes.core.updates import not_optimized

RECIPE = "Karpathy, A recipe for training neural networks, 2019: http://karpathy.github.io/2019/04/25/recipe/"
SHOT_UP = 10.0  # excess after which a sample that is learnt in the end is worth a word
NARROW = 0.25  # of the outputs: what passes through fewer numbers can hardly make them
VALIDATED = 30  # examples below which a validation says little
DROPS = 0.85  # probability of dropout above which a training can hardly go on
SHRINKS = 0.01  # of the weights, by which weight decay shrinks them in an update: no training in order comes near


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
        untrained: Layers of these, by name, whose weights are the random ones that they were made with.
        unowned: Trainable parameters that no optimizer has, by name, and whether they get a gradient.
        shared: Parameters that several optimizers have, by name.
        without_gradient: Of those that an optimizer has, and that never had a gradient other than 0.
        zeros: Of these, matrices that start at 0.
        unmoved: Of those that had one, and stayed what they were.
        asleep: BatchNorm and dropout layers that the step leaves in evaluation mode, beside weights that are trained.
        awake: Whether there are others that are in training mode.
        outputs: Of an example, or of a position of a sequence, if they are known: the classes.
        narrowest: The layer that passes on the fewest numbers, and how many; None if there is none.
        dead: The first layer whose units give 0 for all examples, with how many do and how many it has; None if
            there is none.
        repeats: Training examples that are validation examples, too.
        column: Of the inputs that gives the target away, -1 if there is none.
        drops: The largest probability of dropout.
        shrinks: By how much weight decay shrinks the weights in an update, at most, as a share.
        alone: Excess in evaluation mode, of a sample of several batches that has been learnt in training mode with
            BatchNorm and no running mean that lags; NaN of any other.
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
    untrained: list[str] = field(default_factory=list)
    unowned: dict[str, bool] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)
    asleep: list[str] = field(default_factory=list)
    awake: bool = False
    outputs: int = 0
    narrowest: tuple[str, int] | None = None
    dead: tuple[str, int, int] | None = None
    repeats: Repeats = field(default_factory=Repeats)
    column: int = -1
    drops: float = 0.0
    shrinks: float = 0.0
    alone: float = math.nan
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
        causes = (
            any(self.unowned.values()),
            self.carried,
            self.activation,
            self.one_label,
            self.far,
            not found.used,
            found.alike,
        )
        return any(map(bool, causes))


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
        for has_gradient in (True, False):
            names = [name for name, has in seen.unowned.items() if has is has_gradient]
            if names:
                self.findings.append(not_optimized(names, has_gradient))
        if seen.shared:
            self.say(
                "parameters in several optimizers",
                "info",
                f"{listing(seen.shared)} belong to more than one optimizer: each update moves them again.",
                "Give each parameter to one optimizer, unless it has several objectives.",
            )
        if seen.carried:
            self.say(
                "gradients not set to zero",
                "error",
                "An update used gradients that the update before had used: they add up.",
                "Call zero_grad before each backward pass, or once an update.",
            )
        self._set_up()
        self._outputs()
        if seen.column >= 0:
            self.say(
                "target among the inputs",
                "warning",
                f"Column {seen.column} of the inputs (of an image, its value number {seen.column}) gives the target"
                " away in all examples that were looked at.",
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

    def _outputs(self) -> None:
        """What is wrong with what outputs depend on."""
        found = self.seen.dependence
        if found.mixed:
            self.say(
                "examples mixed",
                "warning",
                f"Changing one of {found.examples} examples changes the outputs for others"
                + (", in evaluation mode, in which BatchNorm does not mix them." if self.seen.batch_norm else "."),
                "Look for a view, reshape or transpose of the batch dimension, or a softmax over it.",
            )
        elif found.in_turn:
            self.say(
                "examples mixed",
                "info",
                f"The outputs for each of the {found.examples} rows of the batch depend on the rows before it: its"
                " first dimension is time, or the network takes it for that.",
                "Good if the batch has time first; if it has the examples first, set batch_first=True.",
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

    def _set_up(self) -> None:
        """What is wrong with how data and modes are set up."""
        seen = self.seen
        repeats = seen.repeats
        if repeats.is_leak:
            self.say(
                "validation data in the training data",
                "warning" if repeats.is_sure else "info",
                f"{repeats.found} of {repeats.examples} training examples are validation examples, too"
                + (f"; {repeats.natural} are like an earlier one of training." if repeats.natural else "."),
                "Split before anything is repeated or augmented: validation says nothing about data that were learnt.",
            )
        if 0 < repeats.validation < VALIDATED:
            self.say(
                "few validation examples",
                "info",
                f"Validation has {repeats.validation} examples: a share of them is known to"
                f" ± {1 / math.sqrt(repeats.validation):.0%} at worst.",
                "Validate on more, or by cross-validation.",
            )
        if seen.drops > DROPS:
            self.say(
                "dropout too large",
                "warning",
                f"Dropout of {seen.drops:g} leaves"
                + (f" one unit in {1 / (1 - seen.drops):.0f}" if seen.drops < 1 else " no unit")
                + ": hardly a signal gets through in training.",
                "Use 0.1 to 0.5.",
            )
        if seen.shrinks > SHRINKS:
            self.say(
                "weight decay too large",
                "warning",
                f"Weight decay alone halves the weights every {math.ceil(math.log(2) / seen.shrinks):,} updates.",
                "Divide it by 10, then by 100; with SGD a learning rate times a weight decay of 1e-6 to 1e-4 is usual.",
            )
        if seen.alone > STUCK:
            self.say(
                "evaluation mode differs",
                "warning",
                f"What is learnt in training mode ({self.first.excess:.0%} left) is lost in evaluation mode"
                f" ({seen.alone:.0%} of the loss of a constant output): BatchNorm sees too few examples in a batch.",
                "Use larger batches, or GroupNorm or LayerNorm.",
            )
        if seen.asleep:
            self.say(
                "evaluation mode in training",
                "info" if seen.awake else "warning",
                f"In the training step the layers {listing(seen.asleep)} are in evaluation mode: BatchNorm does not"
                " follow the data, dropout drops nothing.",
                "Call train() before the step; if it is meant, set requires_grad=False for those layers, too.",
            )

    def _parameters(self) -> None:
        seen = self.seen
        if seen.dead is not None and not seen.zeros:
            name, dead, units = seen.dead
            shown = f"{seen.examples or 'the'} examples"
            self.say(
                "dead units",
                "info" if self.first.learnt else "warning",
                f"{dead} of the {units} units of {name or 'the network'} give 0 for all {shown}: no"
                " gradient goes through them.",
                "Start their biases at 0 and their weights as kaiming_uniform_ does; normalise what comes in.",
            )
        if seen.without_gradient:
            blind = (seen.dependence.alike or not seen.dependence.used) and not seen.zeros
            self.say(
                "no gradient",
                "info" if self.first.learnt or self._expected or blind else "warning",
                f"{listing(seen.without_gradient)} never had a gradient other than 0"
                + (f"; {listing(seen.zeros)} start at 0." if seen.zeros else "."),
                "Start them with random numbers: of two layers at 0 neither ever has a gradient."
                if seen.zeros
                else "Fine if they are not used in training; else look for detach, no_grad, dead units, a frozen part.",
            )
        if seen.unmoved:
            self.say(
                "updates lost",
                "info",
                f"{listing(seen.unmoved)} had gradients, and stayed what they were.",
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
        sample = self._sample.capitalize()
        if not math.isfinite(first.first_excess) and seen.known:
            self.say(
                "loss not finite",
                "error",
                f"The loss of {self._sample} is not finite before the first update.",
                "Look for NaN in the data, and for a logarithm or a division by zero.",
            )
        elif seen.one_label:
            self.say(
                "labels all alike",
                "info",
                f"All targets of {self._sample} are the same, so that nothing can be told: the data seem to be sorted.",
                "Shuffle the training data.",
            )
        elif seen.known and flipped(self.fits) and seen.optimizers == 1:
            self.say(
                "wrong sign of the loss",
                "error",
                f"What is trained falls from {first.first_loss:.3g} to {first.last_loss:.3g} while its criterion "
                f"rises to {first.excess:.3g} times what a constant gives.",
                "Minimise the criterion, not its negative.",
            )
        elif seen.known and first.excess < -LEARNT and (not found.least_loss or first.last_loss < 0):
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
                "warning" if found.alike or seen.dead is None or seen.zeros else "info",
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
        """Frozen parameters, where the sample was not learnt or nobody has trained them."""
        seen = self.seen
        if not seen.frozen or (self.first.learnt and not seen.untrained):
            return
        share = f"{seen.frozen / (seen.frozen + seen.trainable):.0%} of the parameters are frozen"
        random = f"the layers {listing(seen.untrained)} with the random weights that they were made with"
        learnt = "were" if self.first.learnt else "were not"
        self.say(
            "frozen parameters",
            "info",
            f"{share}" + (f", {random}" if seen.untrained else "") + f"; {self._sample} {learnt} learnt.",
            "Set requires_grad=True if they should be trained: frozen weights have to be pretrained ones.",
        )

    @property
    def _sample(self) -> str:
        return f"{self.seen.examples} examples" if self.seen.examples else "the examples"

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
        name, width = self.seen.narrowest or ("", 0)
        other_cause = self.seen.carried or any(self.seen.unowned.values())
        narrow = 0 < width < NARROW * self.seen.outputs
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
        elif narrow and severity == "warning" and not other_cause:
            self.say(
                "model bias",
                "warning",
                f"{not_learnt}; {name} has a width of {width}, and {self.seen.outputs} outputs are made of it.",
                "Make that layer wider; if it was meant to be narrow, see what the network can learn.",
            )
        elif other_cause:
            self.say("small sample not learnt", "info", f"{not_learnt}.", "See the other findings.")
        elif expected:
            self.say("small sample not learnt", "info", f"{not_learnt}; {expected}.", "Good, if that is the reason.")
        elif not first.stuck:
            self.say("slow on a small sample", "info", f"{not_learnt}, and it still falls.", "Give it more max_steps.")
        else:
            tried = ", ".join(f"{fit.factor:g}" for fit in self.fits[1:])
            not_learnt += f", nor with the learning rate times {tried}" if tried else ""
            self.say(
                "small sample not learnt",
                "warning",
                f"{not_learnt}.",
                "Look for a bug before anything else: labels that do not belong to their inputs, a learning rate that"
                " is wrong by far more, a layer that loses the input, far too small a network, or an initialisation"
                " that lets no signal through.",
            )


def shrinks(optimizer: Optimizer, group: Mapping[str, Any], learning_rate: float) -> float:
    """By how much weight decay shrinks the weights in an update, as a share: where the optimizer has it do just that.

    Args:
        optimizer: SGD, whose momentum adds to it, or AdamW; 0 of any other.
        group: One of its parameter groups.
        learning_rate: Of the group.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum=0.9, weight_decay=0.01)
        >>> round(shrinks(optimizer, optimizer.param_groups[0], 0.1), 3)
        0.01
    """
    decay = learning_rate * float(group["weight_decay"])
    if isinstance(optimizer, torch.optim.SGD):
        return decay / (1 - min(float(group["momentum"]), 0.99))
    return decay if isinstance(optimizer, torch.optim.AdamW) else 0.0


def narrowest(module: nn.Module) -> tuple[str, int] | None:
    """The layer that passes on the fewest numbers for a position, and how many; None if there is none.

    Looked at are linear, convolutional and recurrent layers but for the last one, which makes the outputs.

    Example:
        >>> narrowest(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2), nn.Linear(2, 64)))
        ('2', 2)
    """
    widths = [(name, width) for name, each in module.named_modules() if (width := _width(each))]
    return min(widths[:-1], key=lambda each: each[1], default=None)


def _width(layer: nn.Module) -> int:
    """How many numbers a layer passes on; 0 of one that is not looked at."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.out_channels
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
    return layer.hidden_size if isinstance(layer, nn.RNNCellBase) else 0


def activation_of(criteria: Sequence[Criterion]) -> str:
    """What the logits of a criterion come out of, if that keeps the loss from 0."""
    for call in criteria:
        twice = call.name == "binary_cross_entropy_with_logits" and call.activation in ("sigmoid", "softmax", "relu")
        if call.activation in SQUASHED and (call.name == "cross_entropy" or twice):
            return call.activation
    return ""
