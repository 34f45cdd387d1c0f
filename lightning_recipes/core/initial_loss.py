"""Whether the loss before the first update is what it should be, and if not, why."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_recipes.core.criteria import Criterion
from lightning_recipes.core.findings import Finding, Severity
from lightning_recipes.core.selection import paired, quantile
from lightning_recipes.core.targets import LARGE, between, clustered, commonest, constant_of, fit, padding, unnormalised

RECIPE = "Karpathy, A recipe for training neural networks, 2019: http://karpathy.github.io/2019/04/25/recipe/"
CLOSE, FAR = 0.10, 0.60  # of the expected loss: below the first all is well, above the second something is wrong
PADDED = 0.05  # of the targets of sequences, that is worth a word
PURE = 0.8  # of a batch's labels, of one class: data that are sorted by it
DEAD = 1e-3  # standard deviation of logits over examples
APPLIED_TWICE = {"softmax": "softmax applied twice", "sigmoid": "sigmoid applied twice"}
SQUASHED = ("softmax", "sigmoid", "relu", "relu6", "tanh", "hardtanh")


@dataclass(frozen=True)
class InitialLoss:
    """The loss of an untrained network, by one criterion.

    Args:
        criterion: Name of the loss function; ``"loss"`` for what the training step returns.
        loss: Mean over the batches.
        interval: Half the width of its 95 % confidence interval; infinite for a single batch.
        uniform: What equal logits give, ln C; for regression what zeros give; or what was expected.
        constant: What the best constant output gives: the entropy of the class prior, the variance of the targets.
        z: Distance of the loss from ``uniform``, in its standard errors.
        classes: Number of classes, 0 for regression.
        spread: Standard deviation of the outputs within an example, over the classes; for regression of all outputs.
        favoured: The class whose mean output is far off those of the others, -1 if there is none.
        penalty: What the training step returns beyond its criteria; NaN if it returns nothing.
        batches: How many.
        positions: Predictions of an example, 1 unless it is a sequence or an image of classes.
        labels: Targets in all batches.
    """

    criterion: str
    loss: float
    interval: float
    uniform: float
    constant: float
    z: float
    classes: int
    spread: float
    favoured: int
    penalty: float
    batches: int
    positions: int = 1
    labels: int = 0

    @property
    def ratio(self) -> float:
        """Loss over expected loss."""
        return self.loss / self.reference if self.reference else math.inf

    @property
    def reference(self) -> float:
        """The loss that an untrained network should have at most."""
        return self.uniform if self.classes or math.isnan(self.constant) else max(self.uniform, self.constant)

    @property
    def least_ratio(self) -> float:
        """That the loss has, at 95 % confidence."""
        return (self.loss - self.interval) / self.reference if self.reference else 0.0

    @property
    def text(self) -> str:
        """Loss and expectation."""
        known = {0: "a constant 0 gives", 2: "ln 2 ="}.get(self.classes, f"ln {self.classes} =")
        if math.isnan(self.constant):
            return f"{self.criterion} {self.loss:.4g} ± {self.interval:.2g}, expected {self.uniform:.4g}"
        best = "the class prior" if self.classes else "the mean of the targets"
        uniform = f"{known} {self.uniform:.4g}"
        if self.classes and abs(self.uniform - math.log(self.classes)) > 0.01 * self.uniform:  # weighted, or a sum
            uniform = f"equal logits give {self.uniform:.4g}"
        return f"{self.criterion} {self.loss:.4g} ± {self.interval:.2g}, {uniform}, {best} gives {self.constant:.4g}"


class _Group:
    """The calls of one loss function for outputs of one shape, over the batches."""

    def __init__(self, name: str, criterion: Criterion) -> None:
        self.name, self.kind, self.classes = name, criterion.kind, criterion.classes
        self.calls: list[list[Criterion]] = []  # without their outputs
        self.values: list[float] = []
        self.uniform: list[float] = []
        self.activations: set[str] = set()
        self.spreads: list[float] = []
        self.changes: list[float] = []
        self.means: list[Tensor] = []
        self.no_log = True
        self.tokens: list[Tensor] = []  # of the inputs, where they are as many as the targets

    def update(self, calls: list[Criterion]) -> None:
        zero = torch.zeros(self.classes if self.kind == "classes" else ())
        self.values.append(sum(call.mean for call in calls) / len(calls))
        self.uniform.append(sum(float(call.at(zero)) for call in calls) / len(calls))
        self.activations |= {call.activation or _by_its_values(call) for call in calls}
        rows = torch.cat([call.rows for call in calls])
        ordered = rows.std(1, correction=0).mean() if self.kind == "classes" else rows.std(correction=0)
        change = rows.std(0, correction=0).nanmean() if len(rows) > 1 else rows.new_tensor(math.inf)
        scale = 1.0 if self.kind in ("classes", "binary") else float(calls[0].targets.float().std(correction=0))
        self.spreads.append(float(ordered))
        self.changes.append(float(change) / (scale or 1.0))
        self.means.append(rows.mean(0))
        sums = rows.logsumexp(1) if self.kind == "classes" else rows
        self.no_log &= bool((sums.abs() > 0.01).float().mean() > 0.5)
        for call in calls:
            call.outputs = call.outputs.new_empty(1).expand(call.outputs.shape)  # its shape is needed
        self.calls.append(calls)

    @property
    def unnormalised(self) -> str:
        """Mean and standard deviation of the targets of a regression, where a network has to work to get there."""
        return unnormalised([call for batch in self.calls for call in batch], sum(self.spreads) / len(self.spreads))

    @property
    def whole_batches(self) -> list[list[Criterion]]:
        """The calls of each batch, if their targets are classes."""
        return [] if self.kind != "classes" or self.calls[0][0].targets.is_floating_point() else self.calls

    @property
    def targets(self) -> list[Tensor]:
        """Those of each batch in one dimension: classes, or numbers where there is one of them an example."""
        if self.kind == "classes":
            return [torch.cat([call.targets[call.valid] for call in batch]) for batch in self.whole_batches]
        every = [[call.targets for call in batch] for batch in self.calls]
        if any(each.numel() != len(each) for batch in every for each in batch if each.dim()):
            return []
        return [torch.cat([each.flatten() for each in batch]) for batch in every]

    def result(self, penalty: float) -> InitialLoss:
        prior = constant_of([call for batch in self.calls for call in batch])
        constants = [sum(float(call.at(prior)) for call in calls) / len(calls) for calls in self.calls]
        spread = sum(self.spreads) / len(self.spreads)
        constant = sum(constants) / len(constants)
        favoured = _outlier(torch.stack(self.means).mean(0)) if self.kind == "classes" else -1
        result = _result(self.name, self.values, self.uniform, constant, self.classes, spread, favoured, penalty)
        first = self.calls[0][0]
        labels = sum(call.positions for batch in self.calls for call in batch)
        return replace(result, positions=max(1, first.positions // max(1, len(first.outputs))), labels=labels)


def _outlier(values: Tensor) -> int:
    """Where the one value is that is far off all others, -1 if there is none."""
    off = (values - values.median()).abs()
    typical = off.median()
    return int(off.argmax()) if len(values) > 3 and bool((off > 8 * typical).sum() == 1) else -1


def _by_its_values(call: Criterion) -> str:
    """What the outputs have gone through, where their values alone leave no doubt."""
    rows = call.rows
    if call.kind != "classes" or rows.numel() < 50 or call.name == "nll_loss":
        return ""
    if bool((rows >= 0).all()):
        if bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
            return "softmax"
        if 0.1 < float((rows == 0).float().mean()) < 0.95:
            return "relu"
    return ""


def _result(
    name: str,
    losses: Sequence[float],
    uniform: Sequence[float],
    constant: float = math.nan,
    classes: int = 0,
    spread: float = 0.0,
    favoured: int = -1,
    penalty: float = math.nan,
) -> InitialLoss:
    batches = len(losses)
    differences = torch.tensor(losses, dtype=torch.float64) - torch.tensor(uniform, dtype=torch.float64)
    distance, error = paired(differences, torch.ones(batches, dtype=torch.float64))
    expected = sum(uniform) / batches
    return InitialLoss(
        criterion=name,
        loss=sum(losses) / batches,
        interval=quantile(batches, 0.975) * error if batches > 1 else math.inf,
        uniform=expected,
        constant=constant,
        z=distance / error if error else math.copysign(math.inf, distance) if distance else 0.0,
        classes=classes,
        spread=spread,
        favoured=favoured,
        penalty=penalty,
        batches=batches,
    )


class InitialLossRule:
    """Compares the loss of a network that has not been trained with what it should be.

    Equal logits give ln C whatever the labels are, so a network that knows nothing yet should be there: within 10 %.
    Up to 60 % above, the head starts somewhat large; farther off, something is wrong. Both count only where the 95 %
    confidence interval (over the batches) is above the bound as a whole. The expectation is the criterion's own value
    for equal logits, with its class weights, label smoothing, ignored targets and reduction; the value for the class
    prior is the better baseline, which a network can start at if the bias of its head is the log of the prior. For
    regression they are the values for 0 and for the mean (the median) of the targets.

    Args:
        expected: The expected loss of what the training step returns; None for that of its criteria.
        adaptive: Whether the scale of the gradients does not matter to the optimizers, as to Adam. To others a loss
            that is a sum multiplies the learning rate.

    Example:
        >>> from torch.nn import functional
        >>> from lightning_recipes.core.criteria import Watch
        >>> rule, chance = InitialLossRule(), torch.Generator().manual_seed(0)
        >>> for _ in range(10):
        ...     logits = (0.1 * torch.randn(64, 10, generator=chance)).requires_grad_()
        ...     targets = torch.randint(10, (64,), generator=chance)
        ...     with Watch() as watch:
        ...         loss = functional.cross_entropy(logits, targets)
        ...     rule.update(loss, watch.part_of(loss))
        >>> rule.findings()[0].message
        'cross_entropy 2.302 ± 0.011, ln 10 = 2.303, the class prior gives 2.299.'
    """

    def __init__(self, expected: float | None = None, adaptive: bool = True) -> None:
        self.expected, self.adaptive = expected, adaptive
        self.losses: list[float] = []
        self.expectations: list[float] = []
        self._groups: dict[str, _Group] = {}
        self._totals: list[float] = []
        self._sums: list[float] = []
        self._counts: list[tuple[int, int]] = []  # of examples and of predictions
        self._inputs: list[float] = []  # the largest root mean square of each
        self._finite = True
        self._broken_inputs = False

    def update(
        self,
        loss: Tensor | None,
        criteria: Sequence[Criterion],
        inputs: Sequence[Tensor] = (),
        expected: float | None = None,
    ) -> None:
        """Take what one batch gave.

        Args:
            loss: That the training step returned, if any.
            criteria: That it is made of.
            inputs: Tensors of the batch that are no targets.
            expected: The expected loss of this very batch.
        """
        value = math.nan if loss is None else float(loss.detach())
        values = [call.mean for call in criteria]
        for tensor in filter(torch.is_floating_point, inputs):
            numbers = tensor.detach().float()
            self._broken_inputs |= not bool(numbers.isfinite().all())
            columns = numbers if numbers.dim() == 2 else numbers.flatten()[:, None]  # those of a table have their own
            self._inputs.append(float(columns.square().mean(0).max().sqrt()))
        if not all(map(math.isfinite, values)) or (loss is not None and not math.isfinite(value)):
            self._finite = False
            return
        if loss is not None:
            self.losses.append(value)
        expected = self.expected if expected is None else expected
        if loss is not None and expected is not None:
            self.expectations.append(expected)
        calls: dict[str, list[Criterion]] = {}
        for call in criteria:
            if call.positions:
                shape = "x".join(map(str, call.outputs.shape[1:2])) if call.outputs.dim() > 1 else ""
                calls.setdefault(f"{call.name} {shape}", []).append(call)
        if calls:
            self._totals.append(value)
            self._sums.append(sum(values))
            first = next(iter(calls.values()))[0]
            self._counts.append((len(first.outputs), first.positions))
        for key, same in calls.items():
            group = self._groups.setdefault(key, _Group(same[0].name, same[0]))
            group.update(same)
            group.tokens += [each for each in inputs if not each.is_floating_point() and each.dim() == 2][:1]

    def results(self) -> list[InitialLoss]:
        """What was measured, of each criterion, and of the loss if something was expected."""
        penalty = self.penalty
        results = [group.result(penalty) for group in self._groups.values()]
        if self.expectations:
            results.insert(0, _result("loss", self.losses, self.expectations, penalty=penalty))
        return results

    @property
    def penalty(self) -> float:
        """What the training step returns beyond its criteria, on average; NaN if nobody knows."""
        return sum(map(float.__sub__, self._totals, self._sums)) / len(self._sums) if self._sums else math.nan

    def _summands(self, call: Criterion) -> int:
        """How many predictions the loss of the training step is the sum over; 1 if it is their mean."""
        totals = [*zip(self._totals, self._sums, strict=True)]
        if call.reduction == "sum":
            return call.positions if all(abs(total - value) <= 0.5 * abs(value) for total, value in totals) else 1
        for counts in zip(*self._counts, strict=True):  # a mean that is multiplied by a number, or a sum of single ones
            multiples = zip(totals, counts, strict=True)
            if all(value and math.isclose(total, value * count, rel_tol=1e-3) for (total, value), count in multiples):
                return int(counts[0])
        return 1

    def findings(self, step: int = 0) -> list[Finding]:
        """What is to be said, the most important first; never nothing."""
        say = _Say(step)
        if not self._finite:
            say.not_finite(self._broken_inputs)
            return say.findings
        if not self._groups and not self.expectations:
            say.not_known(self.losses)
            return say.findings
        results = self.results()
        flipped = bool(self._sums) and all(
            abs(total + value) < 1e-3 * abs(value) for total, value in zip(self._totals, self._sums, strict=True)
        )
        if flipped:
            say.flipped(self._totals[0], self._sums[0])
        judged = dict(zip(self._groups, results[-len(self._groups) :] if self._groups else [], strict=True))
        for key, result in judged.items():
            group = self._groups[key]
            call = group.calls[0][0]
            if say.broadcast(group) or say.padded(group):
                continue
            summands = self._summands(call)
            if not say.squashed(group, result) and summands > 1:
                mean = result.loss / (summands if call.reduction == "sum" else 1)
                say.summed(result, summands, mean, matters=bool(result.classes) or not self.adaptive)
            say.sorted(group) or say.several(group) or say.off_centre(group, result)
        named = bool(say.findings)
        large = max(self._inputs, default=0.0)
        for result in results:
            imbalanced = not named and say.imbalanced(result)
            told = (self.expectations and result.criterion != "loss") or say.far(result, large, named)
            if not named and not imbalanced and not told:
                say.as_expected(result)
        say.beside(large, self.penalty, statistics.fmean(self._sums) if self._sums else math.inf)
        for key, result in judged.items():
            say.dead(self._groups[key], result)
        return say.findings


class _Say:
    """Collects findings.

    Args:
        step: Of the run.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.findings: list[Finding] = []

    def __call__(
        self, rule: str, severity: Severity, message: str, advice: str, result: InitialLoss | None = None
    ) -> bool:
        evidence: dict[str, float | str] = {}
        if result is not None:
            evidence = {name: getattr(result, name) for name in InitialLoss.__dataclass_fields__}
        self.findings.append(Finding(rule, severity, message, advice, self.step, evidence, RECIPE))
        return True

    def not_finite(self, inputs: bool) -> None:
        where = "the inputs have NaN or infinities" if inputs else "the inputs are finite"
        advice = (
            "Repair the data."
            if inputs
            else "Look for a logarithm or a division by zero, or for a far too large scale."
        )
        self("initial loss not finite", "error", f"The loss is not finite before the first update; {where}.", advice)

    def not_known(self, losses: Sequence[float]) -> None:
        loss = f"is {sum(losses) / len(losses):.4g}" if losses else "is not returned"
        self(
            "initial loss not judged",
            "info",
            f"The loss {loss}; no loss function of torch.nn.functional that it comes from was seen.",
            "Say what it should be: InitialLossCheck(expected_loss=...).",
        )

    def flipped(self, total: float, value: float) -> None:
        self(
            "wrong sign of the loss",
            "error",
            f"The training step returns {total:.4g}, minus its criterion, {value:.4g}: training makes it worse.",
            "Return the criterion itself.",
        )

    def beside(self, large: float, penalty: float, criteria: float) -> None:
        """What is said of the inputs and of the other terms of the loss, whatever the criteria are."""
        if penalty > abs(criteria) and not any(finding.rule == "loss is a sum" for finding in self.findings):
            self(
                "penalty outweighs the loss",
                "info",
                f"The criteria are {criteria:.4g}, and the training step returns {penalty:.4g} beside them.",
                "Scale the other terms down, if that was not meant.",
            )
        if large > LARGE and not any("not normalised" in finding.message for finding in self.findings):
            self(
                "inputs not normalised",
                "info",
                f"The inputs are not normalised: the largest of them have a root mean square of {large:.3g}.",
                "Bring each feature to mean 0 and standard deviation 1, or begin with a layer that does.",
            )

    def squashed(self, group: _Group, result: InitialLoss) -> bool:
        found = next((name for name in SQUASHED if name in group.activations), "")
        if group.name == "binary_cross_entropy_with_logits" and found in ("sigmoid", "softmax"):
            message = f"{group.name} takes the sigmoid itself, and is given the result of one."
            return self("sigmoid applied twice", "warning", message, "Hand it the logits.", result)
        if group.kind != "classes":
            return False
        if group.name == "nll_loss":
            if not group.no_log:
                return False
            message = "nll_loss is given what are no log-probabilities: their exponentials do not sum to 1."
            return self(
                "no log-probabilities", "warning", message, "Use cross_entropy on logits, or log_softmax first.", result
            )
        if found == "softmax":
            most = math.log(1 + (group.classes - 1) / math.e)
            message = (
                f"cross_entropy takes the softmax itself, and is given probabilities: its loss cannot get below "
                f"{most:.3g}."
            )
            return self("softmax applied twice", "warning", message, "Hand it the logits.", result)
        if found:
            message = (
                f"The logits of cross_entropy come out of {found}, which keeps them from what they may have to be."
            )
            return self("activation on the logits", "warning", message, "End the network with a linear layer.", result)
        return False

    def summed(self, result: InitialLoss, positions: int, mean: float, matters: bool) -> bool:
        return self(
            "loss is a sum",
            "warning" if matters else "info",
            f"The loss is the sum over {positions:,} predictions, {mean * positions:.4g}, not their mean, {mean:.3g}:"
            " gradients grow with the batch.",
            "Use reduction='mean', or keep in mind that the learning rate belongs to this batch size.",
            result,
        )

    def far(self, result: InitialLoss, large: float, named: bool) -> bool:
        if any(finding.rule == "no log-probabilities" for finding in self.findings):
            return False  # such a loss means nothing
        times = f"{result.ratio:.2f} times what it should be"
        if result.ratio < 1 - CLOSE and not math.isnan(result.constant) and result.classes:
            if result.loss + result.interval >= (1 - CLOSE) * min(result.uniform, result.constant):
                return False
            message = f"The network knows something before it is trained: {result.text}."
            return self(
                "initial loss low", "info", message, "Good if it is pretrained; else look for the label in the input.",
                result,
            )  # fmt: skip
        if math.isnan(result.constant):
            off = abs(result.ratio - 1)
            sure = abs(result.loss - result.uniform) - result.interval > CLOSE * abs(result.uniform)
            if not sure:
                return False
            severity: Severity = "warning" if off > FAR else "info"
            return self(
                "initial loss off", severity, f"The loss is {times}: {result.text}.", "Check scales and the loss.",
                result,
            )  # fmt: skip
        if result.least_ratio <= 1 + CLOSE or (result.constant == 0 and not result.classes):
            return False
        bound = 1 + FAR if result.classes else 3.0
        severity = "warning" if result.least_ratio > bound and not named else "info"
        rule = "initial loss high"
        if large > LARGE:
            rule, severity = "inputs not normalised", "info" if named else "warning"  # they do reach the outputs
            cause = f"the inputs are not normalised (root mean square {large:.3g})"
            advice = "Bring them to mean 0 and standard deviation 1."
        elif result.favoured >= 0:
            cause = f"class {result.favoured} is favoured whatever is shown, by the bias of the head most likely"
            advice = "Start the bias at 0, or at the log of the class prior."
        elif not result.classes:
            cause = f"outputs have a standard deviation of {result.spread:.3g}"
            advice = "Scale the targets to mean 0 and standard deviation 1, and the last layer down."
        else:
            cause = f"outputs have a standard deviation of {result.spread:.3g}"
            advice = "Scale the initial weights of the last layer down, or those of all layers."
        message = f"The loss is {times}: {result.text} (z = {result.z:.1f}); {cause}."
        return self(rule, severity, message, advice, result)

    def broadcast(self, group: _Group) -> bool:
        call = group.calls[0][0]
        outputs, targets = tuple(call.outputs.shape), tuple(call.targets.shape)
        if group.kind not in ("squares", "absolute") or fit(outputs, targets):
            return False
        message = f"{group.name} of outputs {outputs} and targets {targets} compares them with others than their own."
        return self("targets broadcast", "error", message, "Give both the same shape: targets.view_as(outputs).")

    def padded(self, group: _Group) -> bool:
        share, label = padding([call.targets for batch in group.whole_batches for call in batch], group.tokens)
        if share < PADDED or label == group.calls[0][0].arguments.get("ignore_index"):
            return False
        message = (
            f"{share:.0%} of the targets are those of padding, in runs to the end of their rows: all are {label}, and"
            " the loss counts them."
        )
        return self("padding counted", "warning", message, "Leave them out: set them to ignore_index.")

    def sorted(self, group: _Group) -> bool:
        batches = [each for each in group.targets if len(each) >= 8]
        if len(batches) < 5 or all(call.made_up for calls in group.calls for call in calls):
            return False
        advice, count = "Shuffle the training data; look at the labels.", len(batches)
        if group.kind not in ("classes", "binary"):
            share = between(batches)
            message = f"{share:.0%} of the variance of the targets in the first {count} batches lies between them."
            return share >= PURE and self("labels all alike", "warning", message, advice)
        pure = sum(commonest(each) for each in batches) / count
        every = torch.cat(batches)
        single = group.calls[0][0].targets.dim() == 1  # one label an example: else neighbours may well be alike
        if pure < PURE or (pure < 1 and commonest(every) > PURE / 2 and not (single and clustered(batches))):
            return False
        message = (
            f"{pure:.0%} of the labels in each of the first {count} batches are of a single class"
            f" ({len(torch.unique(every))} classes in {len(every):,} labels)."
        )
        # Of two classes the other one may be rare, and not sorted behind.
        may_be_rare = group.classes == 2 and len(torch.unique(every)) == 1
        return self("labels all alike", "info" if may_be_rare else "warning", message, advice)

    def several(self, group: _Group) -> bool:
        shares = [call.targets for batch in group.calls for call in batch if call.targets.is_floating_point()]
        if group.kind != "classes" or not shares:
            return False
        sums = torch.cat([each.detach().float().sum(1 if each.dim() > 1 else 0).flatten() for each in shares])
        off = float(((sums - 1).abs() > 0.01).float().mean())
        if off < 0.05:
            return False
        message = (
            f"{off:.0%} of the targets of {group.name} do not sum to 1 (their mean sum is {float(sums.mean()):.3g}):"
            " these are no shares of classes that exclude each other."
        )
        advice = "Classes that an example may have several of need binary_cross_entropy_with_logits."
        return self("targets do not sum to 1", "info", message, advice)

    def off_centre(self, group: _Group, result: InitialLoss) -> bool:
        targets = group.unnormalised
        if not targets:
            return False
        if result.constant == 0:
            message = f"All targets in the first batches are the same number: {result.text}."
            return self(
                "labels all alike", "info", message, "Look at the targets: a constant is all there is to learn."
            )
        message = f"The targets have {targets}, the outputs a deviation of {result.spread:.3g}: {result.text}."
        advice = "Bring the targets to mean 0 and standard deviation 1, or start the bias of the head at their mean."
        return self("targets not normalised", "info", message, advice, result)

    def imbalanced(self, result: InitialLoss) -> bool:
        few = (result.classes - 1) / (2 * max(1, result.labels))  # by which the entropy of so many labels is too low
        rare = result.constant + few < 0.8 * result.uniform and result.loss > 1.1 * result.constant
        if not result.classes or not rare or (result.classes > 2 and result.positions > 1):  # as it is in language
            return False
        message = f"The classes are not equally frequent, which the network has to learn first: {result.text}."
        advice = "Start the bias of the head at the log of the class prior, and the first updates are not spent on it."
        return self("imbalanced classes", "info", message, advice, result)

    def as_expected(self, result: InitialLoss) -> bool:
        penalty = result.penalty
        beside = f"; penalties add {penalty:.3g}" if abs(penalty) > 1e-3 * abs(result.loss) else ""
        message = f"{result.text}{beside}."
        return self("initial loss as expected", "info", message, "Go on.", result)

    def dead(self, group: _Group, result: InitialLoss) -> bool:
        if not max(group.changes) <= DEAD:  # NaN if logits of minus infinity are in all columns
            return False
        message = f"The outputs hardly differ between examples (standard deviation {max(group.changes):.1g})."
        advice = (
            "Fine for a head that starts at zero; else weights start too small, units are dead, or inputs not used."
        )
        return self("outputs hardly depend on the input", "info", message, advice, result)
