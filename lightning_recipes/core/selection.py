"""Choose and weight the members of an ensemble on held-out data, and say what the ensemble is worth."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_recipes.core.arguments import check_choice
from lightning_recipes.core.evidence import Evidence, Table, only
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.tables import as_html

Verdict = Literal["gain", "noise", "alike"]
Fit = Callable[[Table], Tensor]

HOW = ("auto", "uniform", "greedy", "simplex", "best")
FOLDS = 5  # of the held-out samples: weights are fitted on four and judged on the fifth
CONFIDENCE = 0.95  # one-sided, of a claimed gain
GREEDY_STEPS = 25  # members taken with replacement, so that a weight is a multiple of 1/25 at the finest
ALIKE = 0.01  # disagreement below which members hardly differ
WORTHWHILE = 0.05  # of the loss, which a gain of members that hardly differ has to reach to be one


@dataclass(frozen=True)
class Selection:
    """Weights of the members, and what they are worth on samples that they were not fitted on.

    Args:
        weights: Of each member, sum 1.
        how: Which rule they are of: ``"best"``, ``"last 3"``, ``"uniform"``, ``"greedy"`` or ``"simplex"``.
        loss: Of these weights, cross-validated.
        tried: The rule of the ensemble that was compared with the best member.
        gain: By how much its loss is below the best member's; both chosen on four fifths, judged on the rest (or the
            best one chosen on all, see :func:`gain_of`).
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
        last = paired(table.losses(only(table.members, table.members - 1)) - losses[used], table.counts)
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


def _last(number: int, table: Table) -> Tensor:
    return torch.tensor([0.0] * (table.members - number) + [1 / number] * number, dtype=torch.float64)


def _simplex(table: Table) -> Tensor:
    return table.simplex()


def _best(table: Table) -> Tensor:
    alone = [only(table.members, member) for member in range(table.members)]
    return min(alone, key=table.loss)


def _greedy(table: Table) -> Tensor:
    counts = _best(table)
    best, lowest = counts, table.loss(counts)
    for size in range(2, GREEDY_STEPS + 1):
        grown = [(counts + only(table.members, member)) / size for member in range(table.members)]
        losses = [table.loss(weights) for weights in grown]
        counts = grown[losses.index(min(losses))] * size
        if min(losses) < lowest:
            best, lowest = counts / size, min(losses)
    return best


def folds_of(samples: int, seed: int) -> Tensor:
    """The fold of each sample."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return order % FOLDS


def _cross_validated(table: Table, rules: Mapping[str, Fit], seed: int) -> dict[str, Tensor]:
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
    """Gain over the best member, its standard error, and whether it is beyond noise.

    It has to be above zero at 95 % over the member that each fold chooses, and by a standard error over the one that is
    the best on all samples. The first alone claims too much where members are nearly equal, as the folds choose
    different ones; the second has the advantage of being chosen on the samples that it is judged on. Told is the first,
    or the second if that alone is within noise.
    """
    gain, error = paired(over_chosen, counts)
    least, least_error = paired(over_best, counts)
    if gain > quantile(len(counts)) * error and not least > least_error:
        return least, least_error, False
    return gain, error, gain > quantile(len(counts)) * error


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
    """Of Student's t distribution: exact for two and three samples, else by the expansion in 1 / (samples - 1).

    Within 1 % up to a confidence of 0.994, and within 3 % up to 0.999.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    n = max(1, samples - 1)
    if n == 1:
        return math.tan(math.pi * (confidence - 0.5))
    if n == 2:
        both = 2 * confidence - 1
        return both * math.sqrt(2 / (1 - both**2))
    z = NormalDist().inv_cdf(confidence)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / n**power for power, term in enumerate(terms))


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
        return as_html(self.to_markdown())


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
    losses = {member: table.loss(only(table.members, place)) for place, member in enumerate(finite)}
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
        outcome = (
            f"The ensemble ({selection.tried}) is not better than the best member beyond noise: {measured} in loss"
            if selection.gain_error > 0
            else "No ensemble is better than the best member"
        )
        message = f"{outcome}, on {samples} samples; {alone}."
        advice = (
            "Take more held-out samples to tell; members help that are nearly as good as the best: longer cycles where "
            "early ones are weak, a shorter run where late ones have overfitted."
        )
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
