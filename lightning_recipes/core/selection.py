"""Choose and weight the members of an ensemble on held-out data, and say what the ensemble is worth."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_recipes.core.arguments import check_choice
from lightning_recipes.core.findings import Finding

Verdict = Literal["gain", "noise", "alike"]

TASKS = ("auto", "classification", "binary", "regression")
HOW = ("auto", "uniform", "greedy", "simplex", "best")
FOLDS = 5  # of the held-out samples: weights are fitted on four and judged on the fifth
CONFIDENCE = 0.95  # one-sided, of a claimed gain
GREEDY_STEPS = 25  # members taken with replacement, so that a weight is a multiple of 1/25 at the finest
TOLERANCE = 1e-5  # nats, or share of the squared error, that simplex weights are off the optimum at most
ITERATIONS = 1000
LEAST = -700.0  # log of a probability over the best member's, at which it is taken to be; e**-745 is 0
BINS = 15  # of equal width, of the calibration error
ALIKE = 0.01  # disagreement below which members hardly differ
WORTHWHILE = 0.05  # of the loss, which a gain of members that hardly differ has to reach to be one


# ------------------------------------------------------------------------------ what is kept of the predictions


class Evidence:
    """What the members predict on held-out data: of each batch as little as weights and report need.

    - Classification (members give logits): the loss is the negative log-likelihood of the weighted mean of the softmax
      probabilities. Kept are each member's log-probability of the target, 4 bytes a member and position.
    - Binary (a logit for each target): likewise, with the sigmoid.
    - Regression: the loss is the squared error of the weighted mean. Kept are the products of the members' residuals,
      summed over a sample, 8 bytes a pair of members.

    A *sample* is a row of the batch. Positions in one row (tokens, pixels) are not independent: the loss is the mean
    over positions, its noise is judged over samples. What is kept is moved to the CPU.

    Attributes:
        task: ``"classification"``, ``"binary"`` or ``"regression"``, once there was a batch.
        dim: Of the classes in one member's output, likewise.
        samples: Rows seen.

    Args:
        task: ``"auto"`` tells from the first batch: integer targets without the dimension of the classes are
            classification, floating-point targets of the outputs' shape regression, boolean ones binary.
        dim: Of the classes in one member's output; None where the shapes tell: outputs (N, C, ...) with targets
            (N, ...), outputs (N, ..., C) with targets (N, ...), outputs (N * T, C) with targets (N, T).
        ignore_index: A target that does not count, in classification.

    Example:
        >>> evidence = Evidence()
        >>> evidence.update(torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]), torch.tensor([1, 0]))
        >>> evidence.task, evidence.samples
        ('classification', 2)
        >>> select(evidence, "uniform").weights
        (0.5, 0.5)
    """

    def __init__(self, task: str = "auto", dim: int | None = None, ignore_index: int = -100) -> None:
        self.task = check_choice("task", task, TASKS)
        self.dim, self.ignore_index = dim, ignore_index
        self.samples = 0
        self._kept: list[tuple[Tensor, Tensor]] = []  # log-probabilities and rows, or products and counts
        self._positions = 0
        self._correct: Tensor = torch.zeros(())  # (members,)
        self._differs: Tensor = torch.zeros(())  # (members, members): positions at which the predicted class differs
        self._bins: Tensor = torch.zeros(())  # (members, 3, bins): positions, confidence, hits

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch.

        Args:
            outputs: Of all members, shape (members, batch, ...).
            targets: Shape (batch, ...).

        Raises:
            ValueError: If the shapes do not say what the outputs mean, or the number of members changes.
        """
        members = len(outputs)
        if self._kept and members != self._kept[0][0].shape[0 if self.task != "regression" else 1]:
            raise ValueError(f"every batch must have outputs of the same members, got {members}")
        if self.task == "auto":
            self.task = _task_of(outputs, targets)
        targets = targets.to(outputs.device)
        if self.task == "classification":
            self._update_classes(outputs, targets)
        elif outputs.shape[1:] != targets.shape:
            raise ValueError(
                f"{self.task} needs a target for each output: outputs have the shape (members, batch, ...) "
                f"{tuple(outputs.shape)}, targets {tuple(targets.shape)}"
            )
        elif self.task == "binary":
            self._update_binary(outputs.reshape(members, -1).float(), targets)
        else:
            residuals = (outputs.double() - targets.double()).reshape(members, len(targets), -1)
            products = torch.einsum("irp,jrp->rij", residuals, residuals)
            counts = torch.full((len(targets),), residuals.shape[2], dtype=torch.float64)
            self._kept.append((products.cpu(), counts))
        self.samples += len(targets)

    def _update_classes(self, outputs: Tensor, targets: Tensor) -> None:
        if self.dim is None:
            self.dim = _class_dim(outputs[0], targets)
        outputs = outputs.movedim(self.dim + 1 if self.dim >= 0 else self.dim, -1)
        if outputs[0, ..., 0].numel() != targets.numel():
            raise ValueError(
                f"there must be a target for each position: outputs have the shape (members, batch, ...) "
                f"{tuple(outputs.shape)} with the classes last, targets {tuple(targets.shape)}"
            )
        flat = targets.flatten()
        counted = flat != self.ignore_index
        flat = flat[counted].long()
        log_p, confidence, tops = [], [], []
        for output in outputs:  # one after the other: in single precision those of a language model are large
            logits = output.reshape(-1, output.shape[-1])[counted].float()
            norm = logits.logsumexp(-1)
            norm = norm.masked_fill(norm.isinf(), math.nan)  # an infinite logit is no prediction
            log_p.append(logits.gather(1, flat[:, None]).squeeze(1) - norm)
            top = logits.max(-1)
            confidence.append((top.values - norm).exp())
            tops.append(top.indices)
        top_of_all = torch.stack(tops)
        correct = top_of_all == flat
        self._count(torch.stack(log_p), targets, counted, top_of_all, correct, torch.stack(confidence), correct)

    def _update_binary(self, logits: Tensor, targets: Tensor) -> None:
        logits = logits.masked_fill(logits.isinf(), math.nan)
        truth = targets.flatten().bool()
        counted = torch.ones_like(truth)
        log_p = nn.functional.logsigmoid(torch.where(truth, logits, -logits))
        top = logits > 0
        hits = truth.expand_as(top)  # calibration of binary predictions is that of the probability of 1
        self._count(log_p, targets, counted, top, top == truth, logits.sigmoid(), hits)

    def _count(
        self,
        log_p: Tensor,
        targets: Tensor,
        counted: Tensor,
        tops: Tensor,
        correct: Tensor,
        confidence: Tensor,
        hits: Tensor,
    ) -> None:
        rows = torch.arange(len(targets)).repeat_interleave(targets[0].numel() if len(targets) else 1)
        self._kept.append((log_p.cpu(), rows[counted.cpu()] + self.samples))
        self._positions += log_p.shape[1]
        self._correct = self._correct + correct.sum(1).cpu()
        self._differs = self._differs + torch.stack([(tops != top).sum(1) for top in tops]).cpu()
        # One more bin than boundaries divide, for a confidence of exactly 1, as torchmetrics has it.
        place = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1, device=confidence.device), right=True) - 1
        place = place.clamp(0, BINS)
        columns = [torch.ones_like(confidence), confidence, hits.to(confidence.dtype)]
        empty = torch.zeros(len(confidence), BINS + 1, device=confidence.device)
        self._bins = self._bins + torch.stack([empty.scatter_add(1, place, c).double() for c in columns], 1).cpu()

    def extend(self, other: "Evidence") -> None:
        """Take in the batches that another one has seen, as on another rank."""
        if not other._kept:
            return
        if self._kept and self.task != other.task:
            raise ValueError(f"evidence of one task is wanted, got {self.task} and {other.task}")
        self.task, self.dim = other.task, other.dim
        shift = self.samples if self.task != "regression" else 0  # rows are numbered, counts are not
        self._kept += [(first, second + shift) for first, second in other._kept]
        self.samples += other.samples
        self._positions += other._positions
        self._correct = self._correct + other._correct
        self._differs = self._differs + other._differs
        self._bins = self._bins + other._bins

    def table(self) -> "tuple[_Table, list[int]]":
        """What the loss of any weights can be computed of, and the members in it: those whose predictions are numbers.

        Raises:
            ValueError: If there was no batch, or no member is left.
        """
        if not self._kept:
            raise ValueError("there is no evidence: no batch has been given")
        first = torch.cat([first for first, _ in self._kept], 0 if self.task == "regression" else 1)
        second = torch.cat([second for _, second in self._kept])
        if self.task == "regression":
            finite = _places(first.diagonal(dim1=1, dim2=2).isfinite().all(0))
        else:
            finite = _places(~first.isnan().any(1))
        if not finite:
            raise ValueError("every member predicts NaN or infinities")
        table: _Table
        if self.task == "regression":
            table = _Squares(first[:, finite][:, :, finite], second)
        else:
            table = _Likelihoods(first[finite].double(), torch.unique(second, return_inverse=True)[1])
        if not len(table.counts):
            raise ValueError("there is no evidence: no target counts")
        return table, finite

    def losses(self) -> Tensor:
        """Mean loss of each sample under each member, shape (members, samples); NaN for one that gives no numbers."""
        table, finite = self.table()
        losses = torch.full((len(self.disagreements()), len(table.counts)), math.nan, dtype=torch.float64)
        for place, member in enumerate(finite):
            losses[member] = table.losses(_alone(table.members, place)) / table.counts
        return losses

    def accuracies(self) -> list[float]:
        """Of each member; NaN for regression."""
        return self._shares(self._correct)

    def calibration_errors(self) -> list[float]:
        """Expected calibration error of each member, over 15 bins of equal width; NaN for regression."""
        if self.task == "regression":
            return self._shares(self._correct)
        _, confidence, hits = self._bins.unbind(1)
        return self._shares((confidence - hits).abs().sum(1))

    def disagreements(self) -> Tensor:
        """Of each pair of members, shape (members, members).

        Share of the positions at which the predicted class differs. For regression: the mean squared difference over
        the sum of the mean squared errors, 0 for equal members and 1 for ones whose errors are not correlated.
        """
        if self.task != "regression":
            return self._differs.double() / self._positions
        total = torch.cat([products for products, _ in self._kept]).sum(0)
        errors = total.diagonal()[:, None] + total.diagonal()
        return torch.where(errors > 0, (errors - 2 * total) / errors, torch.where(errors == 0, 0.0, torch.nan))

    def _shares(self, counts: Tensor) -> list[float]:
        if self.task == "regression":
            return [math.nan] * self._kept[0][0].shape[1]
        return [float(count) / self._positions for count in counts]


def _task_of(outputs: Tensor, targets: Tensor) -> str:
    same = outputs.shape[1:] == targets.shape
    if targets.dtype == torch.bool and same:
        return "binary"
    if targets.is_floating_point() and same:
        return "regression"
    if not (targets.is_floating_point() or targets.dtype == torch.bool or same):
        return "classification"
    raise ValueError(
        f"outputs (members, batch, ...) of the shape {tuple(outputs.shape)} and {targets.dtype} targets of the shape "
        f"{tuple(targets.shape)} do not tell the task: give task='classification', 'binary' or 'regression', and "
        "targets that fit"
    )


def _class_dim(output: Tensor, targets: Tensor) -> int:
    """The dimension of the classes in the output of one member."""
    second = output.ndim > 1 and (output.shape[0], *output.shape[2:]) == targets.shape
    last = output.ndim > 1 and (output.shape[:-1] == targets.shape or output.shape[:-1] == (targets.numel(),))
    if second == last and not (second and output.ndim == 2):
        problem = "could have the classes second or last" if second else "do not fit"
        raise ValueError(
            f"outputs of shape {tuple(output.shape)} and targets {tuple(targets.shape)} {problem}: give dim"
        )
    return 1 if second else -1


def _places(mask: Tensor) -> list[int]:
    return [index for index, value in enumerate(mask.tolist()) if value]


# ------------------------------------------------------------------------------ the loss of any weights


class _Likelihoods:
    """The loss of any weights: negative log-likelihood of the mixture.

    Log-probabilities of the targets have the shape (members, positions), ``rows`` names the sample of each position.
    """

    def __init__(self, log_p: Tensor, rows: Tensor, samples: int | None = None) -> None:
        self.members = len(log_p)
        self.log_p, self.rows = log_p, rows
        self.counts = torch.bincount(rows, minlength=samples or 0).double()
        self.best = log_p.clamp(min=-1e4).amax(0)  # every member may call the target impossible
        self.p = (log_p - self.best).clamp(min=LEAST).exp()

    def losses(self, weights: Tensor) -> Tensor:
        """Sum of the losses over the positions of each sample, shape (samples,)."""
        losses = -((weights @ self.p).log() + self.best)
        return torch.zeros_like(self.counts).index_add(0, self.rows, losses)

    def loss(self, weights: Tensor) -> float:
        """Mean over the positions."""
        return -float(((weights @ self.p).log() + self.best).mean())

    def simplex(self) -> Tensor:
        """Expectation maximisation: the gap to the optimum is below the largest ratio less 1."""
        weights = torch.full((self.members,), 1 / self.members, dtype=torch.float64)
        for _ in range(ITERATIONS):
            ratios = (self.p / (weights @ self.p)).mean(1)
            if ratios.max() - 1 < TOLERANCE:
                break
            weights = weights * ratios
        return weights / weights.sum()

    def part(self, chosen: Tensor) -> "_Likelihoods":
        """The samples where ``chosen`` is true."""
        positions = chosen[self.rows]
        renumbered = (chosen.cumsum(0) - 1)[self.rows[positions]]
        return _Likelihoods(self.log_p[:, positions], renumbered, int(chosen.sum()))


class _Squares:
    """The loss of any weights: squared error of the mean.

    Products of the members' residuals have the shape (samples, members, members).
    """

    def __init__(self, products: Tensor, counts: Tensor) -> None:
        self.members = products.shape[1]
        self.products, self.counts = products, counts

    def losses(self, weights: Tensor) -> Tensor:
        """Sum of the losses over the positions of each sample, shape (samples,)."""
        return (self.products @ weights) @ weights

    def loss(self, weights: Tensor) -> float:
        """Mean over the positions."""
        return float(self.losses(weights).sum() / self.counts.sum())

    def simplex(self) -> Tensor:
        """Pairwise Frank-Wolfe: move weight from the worst member that has any to the best, as far as it helps."""
        total = self.products.sum(0) / self.counts.sum()
        weights = torch.full((self.members,), 1 / self.members, dtype=torch.float64)
        for _ in range(ITERATIONS):
            slope = total @ weights
            to, source = int(slope.argmin()), int(slope.masked_fill(weights == 0, -math.inf).argmax())
            gap = slope[source] - slope[to]
            if gap <= TOLERANCE * (weights @ slope):
                break
            curvature = total[to, to] + total[source, source] - 2 * total[to, source]
            step = weights[source].clamp(max=gap / curvature)
            weights[to] += step
            weights[source] -= step
        return weights

    def part(self, chosen: Tensor) -> "_Squares":
        """Likewise."""
        return _Squares(self.products[chosen], self.counts[chosen])


_Table = _Likelihoods | _Squares
Fit = Callable[[_Table], Tensor]


# ------------------------------------------------------------------------------ the choice


@dataclass(frozen=True)
class Selection:
    """Weights of the members, and what they are worth on samples that they were not fitted on.

    Args:
        weights: Of each member, sum 1.
        how: Which rule they are of: ``"best"``, ``"last 3"``, ``"uniform"``, ``"greedy"`` or ``"simplex"``.
        loss: Of these weights, cross-validated.
        tried: The rule of the ensemble that was compared with the best member.
        gain: By how much its loss is below the best member's; both chosen on four fifths, judged on the rest.
        gain_error: Standard error of that.
        gain_over_last: By how much ``loss`` is below the last member's; NaN if that predicts no numbers.
        gain_over_last_error: Standard error of that.
        verdict: ``"gain"`` (beyond noise), ``"noise"``, or ``"alike"`` (the members hardly differ).
        candidates: Cross-validated loss of every rule that was tried.
    """

    weights: tuple[float, ...]
    how: str
    loss: float
    tried: str
    gain: float
    gain_error: float
    gain_over_last: float
    gain_over_last_error: float
    verdict: Verdict
    candidates: dict[str, float] = field(default_factory=dict)


def select(evidence: Evidence, how: str = "auto", seed: int = 0) -> Selection:
    """Choose the members' weights.

    - ``"best"``: the best member alone.
    - ``"uniform"``: all members alike.
    - ``"greedy"``: members taken one by one with replacement, each the one that helps most, 25 at most.
    - ``"simplex"``: the convex weights of the lowest loss.
    - ``"auto"``: these, and equal weights for the last 2, 3, ... members, are fitted on four fifths of the samples and
      judged on the rest. The simplest within one standard error of the lowest loss is taken if it beats the best member
      beyond noise (see :func:`gain_of`), and if the members differ (a disagreement of 1 %, or else a gain of 5 % of
      the loss). If not the best member is used alone.

    A member that predicts NaN or infinities anywhere has weight 0.

    Args:
        evidence: Of samples that no member was trained on.
        how: One of these.
        seed: Of the folds.

    Raises:
        ValueError: If ``how`` is none of these, or there is no evidence.

    References:
        Caruana et al., Ensemble Selection from Libraries of Models, 2004 (greedy)
        Hastie et al., The Elements of Statistical Learning, section 7.10 (one standard error)
    """
    check_choice("how", how, HOW)
    table, finite = evidence.table()
    rules = _rules(table.members)
    if how != "auto":
        rules = {"best": rules["best"], how: rules.get(how, rules["best"])}  # of a single member all are one
    losses = _cross_validated(table, rules, seed)
    best = table.losses(_best(table))
    if how == "auto":
        tried, gain, error, beyond = compared(losses, best, table.counts)
    else:
        tried = how if how in rules else "best"
        gain, error, beyond = gain_of(losses["best"] - losses[tried], best - losses[tried], table.counts)
    best_loss = float(losses["best"].sum() / table.counts.sum())
    alike = disagreement(evidence, finite) < ALIKE and gain < WORTHWHILE * best_loss
    verdict: Verdict = "alike" if alike else "gain" if beyond else "noise"
    used = tried if verdict == "gain" or how != "auto" else "best"
    fitted = rules[used](table).tolist()
    weights = dict(zip(finite, fitted, strict=True))
    members = len(evidence.disagreements())
    last = (math.nan, math.nan)
    if finite[-1] == members - 1:
        last = paired(table.losses(_alone(table.members, table.members - 1)) - losses[used], table.counts)
    return Selection(
        weights=tuple(weights.get(member, 0.0) for member in range(members)),
        how=used,
        loss=float(losses[used].sum() / table.counts.sum()),
        tried=tried,
        gain=gain,
        gain_error=error,
        gain_over_last=last[0],
        gain_over_last_error=last[1],
        verdict=verdict,
        candidates={name: float(each.sum() / table.counts.sum()) for name, each in losses.items()},
    )


def _rules(members: int) -> dict[str, Fit]:
    """How weights are found, the simplest first."""
    rules: dict[str, Fit] = {"best": _best}
    for last in range(2, members + 1):
        rules["uniform" if last == members else f"last {last}"] = partial(_last, last)
    if members > 1:
        rules |= {"greedy": _greedy, "simplex": _simplex}
    return rules


def _last(number: int, table: _Table) -> Tensor:
    return torch.tensor([0.0] * (table.members - number) + [1 / number] * number, dtype=torch.float64)


def _simplex(table: _Table) -> Tensor:
    return table.simplex()


def _alone(members: int, member: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(member), members).double()


def _best(table: _Table) -> Tensor:
    alone = [_alone(table.members, member) for member in range(table.members)]
    return min(alone, key=table.loss)


def _greedy(table: _Table) -> Tensor:
    counts = _best(table)
    best, lowest = counts, table.loss(counts)
    for size in range(2, GREEDY_STEPS + 1):
        grown = [(counts + _alone(table.members, member)) / size for member in range(table.members)]
        losses = [table.loss(weights) for weights in grown]
        counts = grown[losses.index(min(losses))] * size
        if min(losses) < lowest:
            best, lowest = counts / size, min(losses)
    return best


def folds_of(samples: int, seed: int) -> Tensor:
    """The fold of each sample."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return order % FOLDS


def _cross_validated(table: _Table, rules: Mapping[str, Fit], seed: int) -> dict[str, Tensor]:
    """Loss of each sample under each rule, fitted on the other folds."""
    losses = {name: torch.zeros_like(table.counts) for name in rules}
    folds = folds_of(len(table.counts), seed)
    for fold in range(int(folds.max()) + 1):
        inside = folds == fold
        judged, fitted_on = table.part(inside), table if inside.all() else table.part(~inside)
        for name, rule in rules.items():
            losses[name][inside] = judged.losses(rule(fitted_on))
    return losses


def compared(losses: Mapping[str, Tensor], best: Tensor, counts: Tensor) -> tuple[str, float, float, bool]:
    """The rule to try against the best member; its gain, the standard error, and whether it is beyond noise.

    Args:
        losses: Of each sample under each rule, cross-validated.
        best: Of each sample under the member that is the best on all of them.
        counts: Positions of each sample.
    """
    others = [name for name in losses if name != "best"]
    if not others:
        return "best", 0.0, 0.0, False
    lowest = min(others, key=lambda name: float(losses[name].sum()))
    tried = lowest
    for name in others:
        worse, error = paired(losses[name] - losses[lowest], counts)
        if worse <= error:
            tried = name
            break
    return (tried, *gain_of(losses["best"] - losses[tried], best - losses[tried], counts))


def gain_of(over_chosen: Tensor, over_best: Tensor, counts: Tensor) -> tuple[float, float, bool]:
    """Gain over the best member as chosen in the folds, its standard error, and whether it is beyond noise.

    It has to be above zero at 95 % over the member that each fold chooses, and by a standard error over the one that is
    the best on all samples. The first alone claims too much where members are nearly equal, as the folds choose
    different ones; the second has the advantage of being chosen on the samples that it is judged on.
    """
    gain, error = paired(over_chosen, counts)
    least, least_error = paired(over_best, counts)
    return gain, error, gain > quantile(len(counts)) * error and least > least_error


def paired(differences: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean difference over positions and its standard error over samples; infinite for a single sample.

    Args:
        differences: Sum over the positions of each sample, shape (samples,).
        counts: Positions of each sample.

    Example:
        >>> paired(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
        (2.0, 0.5773502588272095)
    """
    samples, total = len(counts), counts.sum()
    mean = differences.sum() / total
    if samples < 2:
        return float(mean), math.inf
    squares = (differences - mean * counts).square().sum()
    return float(mean), float((squares * samples / (samples - 1)).sqrt() / total)


def quantile(samples: int, confidence: float = CONFIDENCE) -> float:
    """Of Student's t distribution, by its expansion in the degrees of freedom."""
    z, n = NormalDist().inv_cdf(confidence), max(1, samples - 1)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def disagreement(evidence: Evidence, members: Sequence[int]) -> float:
    """Mean over the pairs of these members; 0 for a single one."""
    pairs = evidence.disagreements()[list(members)][:, list(members)]
    return float(pairs.sum()) / max(1, len(members) * (len(members) - 1))


# ------------------------------------------------------------------------------ the report


@dataclass(frozen=True)
class Member:
    """One member in a report.

    Args:
        name: What it is called.
        loss: Mean negative log-likelihood, or squared error; NaN if its predictions are no numbers.
        weight: In the ensemble.
        disagreement: With the others, their mean, as :meth:`Evidence.disagreements` has it.
        accuracy: NaN for regression.
        calibration_error: Expected calibration error, 15 bins; NaN for regression.
    """

    name: str
    loss: float
    weight: float
    disagreement: float
    accuracy: float
    calibration_error: float


@dataclass(frozen=True)
class Report:
    """What an ensemble and its members are worth on held-out data.

    Args:
        members: In their order.
        selection: Their weights, and the gain.
        accuracy: Of the ensemble; NaN for regression, or if it was not measured.
        calibration_error: Likewise.
        disagreement: Mean over the pairs of members.
        samples: Held-out samples.
        finding: The outcome in words, with what to do.
    """

    members: tuple[Member, ...]
    selection: Selection
    accuracy: float
    calibration_error: float
    disagreement: float
    samples: int
    finding: Finding

    def to_markdown(self) -> str:
        """A row for each member and one for the ensemble, with the finding below them."""
        chosen = self.selection
        rows = [
            *self.members,
            Member("**ensemble**", chosen.loss, 1.0, math.nan, self.accuracy, self.calibration_error),
        ]
        lines = [
            "| member | weight | loss | accuracy | calibration error | disagreement |",
            "|---|---|---|---|---|---|",
            *(
                f"| {row.name} | {row.weight:.3g} | {_shown(row.loss, '.4g')} | {_shown(row.accuracy, '.2%')} | "
                f"{_shown(row.calibration_error, '.3f')} | {_shown(row.disagreement, '.2%')} |"
                for row in rows
            ),
        ]
        return "\n".join([*lines, "", f"{self.finding.message} {self.finding.advice}"])

    def _repr_html_(self) -> str:
        cells = [line.strip("| ").split("|") for line in self.to_markdown().splitlines() if line.startswith("|")]
        rows = ["".join(f"<td>{cell.strip(' *')}</td>" for cell in row) for row in (cells[0], *cells[2:])]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table><p>{self.finding.text}</p>"


def _shown(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def report(
    evidence: Evidence,
    selection: Selection,
    ensemble: Evidence | None = None,
    names: Sequence[str] | None = None,
    step: int = 0,
) -> Report:
    """Say what was measured.

    Args:
        evidence: Of the members.
        selection: What :func:`select` made of it.
        ensemble: Of the ensemble with these weights, as a single member (outputs of the shape (1, batch, ...)): its
            accuracy and calibration are not in the evidence of the members. Not needed where one member is used alone.
        names: Of the members; None for their numbers.
        step: Optimizer updates done.

    Example:
        >>> evidence = Evidence()
        >>> evidence.update(torch.tensor([[[2.0], [3.0]], [[0.0], [1.0]]]), torch.tensor([[1.0], [2.0]]))
        >>> made = report(evidence, select(evidence, "uniform"))
        >>> [member.loss for member in made.members], made.selection.loss
        ([1.0, 1.0], 0.0)
    """
    table, finite = evidence.table()
    disagreements, weights = evidence.disagreements(), selection.weights
    accuracies, errors = evidence.accuracies(), evidence.calibration_errors()
    losses = {member: table.loss(_alone(table.members, place)) for place, member in enumerate(finite)}
    members = tuple(
        Member(
            name=names[member] if names else str(member),
            loss=losses.get(member, math.nan),
            weight=weights[member],
            disagreement=_mean(disagreements[member, other] for other in finite if other != member),
            accuracy=accuracies[member] if member in losses else math.nan,
            calibration_error=errors[member] if member in losses else math.nan,
        )
        for member in range(len(weights))
    )
    used = [member for member, weight in enumerate(weights) if weight > 0]
    accuracy, error = math.nan, math.nan
    if len(used) == 1:
        accuracy, error = accuracies[used[0]], errors[used[0]]
    elif ensemble is not None:
        accuracy, error = ensemble.accuracies()[0], ensemble.calibration_errors()[0]
    differ = disagreement(evidence, finite)
    return Report(
        members=members,
        selection=selection,
        accuracy=accuracy,
        calibration_error=error,
        disagreement=differ,
        samples=len(table.counts),
        finding=_finding(members, selection, differ, len(table.counts), step),
    )


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else math.nan


def _finding(members: tuple[Member, ...], selection: Selection, differ: float, samples: int, step: int) -> Finding:
    used = [member for member in members if member.weight > 0]
    broken = [member.name for member in members if math.isnan(member.loss)]
    measured = f"{selection.gain:.3g} ± {selection.gain_error:.2g}"
    alone = f"member {used[0].name} is used alone" if len(used) == 1 else f"{len(used)} members are used, as asked"
    severity: Literal["info", "warning"] = "info"
    if len(members) - len(broken) == 1:
        message, advice = f"There is one member to use: {alone}.", "Train more of them for an ensemble."
    elif selection.verdict == "gain":
        count = sum(member.weight > 0 for member in members)
        message = (
            f"The ensemble of {count} of {len(members)} members ({selection.how}) is better than the best member by "
            f"{measured} in loss, on {samples} samples."
        )
        advice = "Use it."
    elif selection.verdict == "alike":
        severity = "warning"
        message = (
            f"The members hardly differ (disagreement {differ:.2%} < {ALIKE:.0%}), and nothing is gained: {alone}."
        )
        advice = (
            "Raise the learning rate of restarts or shorten the cycles; the network may already interpolate its data."
        )
    else:
        message = (
            f"The ensemble ({selection.tried}) is not better than the best member beyond noise: {measured} in loss, on "
            f"{samples} samples; {alone}."
        )
        advice = "Take more held-out samples to tell, or longer cycles if the early members are weak."
    if broken:
        severity = "warning"
        message += f" No numbers come from {', '.join(broken)}, weight 0."
    return Finding(
        rule="ensemble",
        severity=severity,
        message=message,
        advice=advice,
        step=step,
        evidence={
            "loss": selection.loss,
            "gain": selection.gain,
            "gain_error": selection.gain_error,
            "gain_over_last": selection.gain_over_last,
            "gain_over_last_error": selection.gain_over_last_error,
            "disagreement": differ,
            "samples": samples,
            "how": selection.how,
            "verdict": selection.verdict,
        },
        source="Huang et al. 2017, https://arxiv.org/abs/1704.00109; Caruana et al. 2004",
    )
