"""Whether a high training loss comes from too small a network, or from an optimization that does not get there."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.selection import paired, quantile

HE = "He et al. 2016, https://arxiv.org/abs/1512.03385: a deeper network must not have the higher training error"
MATTERS = 0.01  # of the loss of the best constant output: a smaller difference is none
LEARNS = 0.95  # of the loss of the best constant output


@dataclass(frozen=True)
class CapacityComparison:
    """Training losses of a network and of a smaller one, after the same updates on the same data.

    Args:
        model_loss: Mean over the seeds.
        baseline_loss: Of the smaller network.
        constant_loss: Of the best output that does not look at the input; NaN where the loss is not known.
        difference: Model minus baseline, mean over the seeds.
        difference_error: Its standard error.
        steps: Updates of each training.
        seeds: How many.
        verdict: ``"optimization"`` (the smaller network gets lower: the larger one contains it, and does not find it),
            ``"capacity"`` (the larger one gets lower, and so might a still larger one), ``"alike"`` (it cannot be told)
            or ``"neither learns"`` (more than a constant).
        finding: The same in words, with what to do.
    """

    model_loss: float
    baseline_loss: float
    constant_loss: float
    difference: float
    difference_error: float
    steps: int
    seeds: int
    verdict: Literal["optimization", "capacity", "alike", "neither learns"]
    finding: Finding


def compare(
    model: Sequence[float], baseline: Sequence[float], constant: float = math.nan, steps: int = 0
) -> CapacityComparison:
    """Compare training losses seed by seed.

    A difference counts where it is above zero at 95 % (Student's t over the seeds) and above 1 % of the loss of the
    best constant output (of the baseline's where that is not known): of two networks that have learnt nearly all, one
    may have a multiple of the other's loss, and neither is in trouble. A loss that is not finite is worse than any
    other.

    Args:
        model: Training loss at the end, one a seed.
        baseline: Of the smaller network, with the same seeds.
        constant: Of the best constant output.
        steps: Updates of each training.

    Raises:
        ValueError: If there are fewer than two seeds, or not as many of one as of the other.

    Example:
        >>> compare([0.9, 0.8, 1.0], [0.4, 0.5, 0.5]).verdict
        'optimization'
    """
    if len(model) != len(baseline) or len(model) < 2:
        raise ValueError(f"compare takes two losses or more of each, got {len(model)} and {len(baseline)}")
    seeds = len(model)
    both = [(one, other) for one, other in zip(model, baseline, strict=True) if math.isfinite(one + other)]
    failed = [sum(not math.isfinite(loss) for loss in losses) for losses in (model, baseline)]
    mean_model, mean_baseline = sum(model) / seeds, sum(baseline) / seeds
    difference, error = math.nan, math.inf
    if len(both) == seeds:
        differences = torch.tensor([one - other for one, other in both], dtype=torch.float64)
        difference, error = paired(differences, torch.ones(seeds, dtype=torch.float64))
    matters = MATTERS * abs(mean_baseline if math.isnan(constant) else constant)
    bound = max(quantile(seeds) * error, matters)
    verdict: Literal["optimization", "capacity", "alike", "neither learns"] = "alike"
    if failed[0] > failed[1] or difference > bound:
        verdict = "optimization"
    elif failed[1] > failed[0] or -difference > bound:
        verdict = "capacity"
    usual = (statistics.median(x if math.isfinite(x) else math.inf for x in each) for each in (model, baseline))
    if not math.isnan(constant) and min(usual) > LEARNS * constant:
        verdict = "neither learns"
    values = (mean_model, mean_baseline, constant, difference, error, steps, seeds)
    return CapacityComparison(*values, verdict, _finding(verdict, *values))


def _finding(
    verdict: str,
    model: float,
    baseline: float,
    constant: float,
    difference: float,
    error: float,
    steps: int,
    seeds: int,
) -> Finding:
    beside = "" if math.isnan(constant) else f"; a constant has {constant:.4g}"
    losses = (
        f"{model:.4g} against {baseline:.4g} (difference {difference:.2g} ± {error:.1g}, {seeds} seeds, "
        f"{steps:,} updates{beside})"
    )
    severity: Literal["info", "warning"] = "warning" if verdict in ("optimization", "neither learns") else "info"
    message, advice = {
        "optimization": (
            f"The smaller network reaches a lower training loss: {losses}.",
            "The larger one could do the same, so it is not too small: look at the learning rate and its warmup, the "
            "initialisation, normalisation and residual connections.",
        ),
        "capacity": (
            f"The larger network reaches a lower training loss: {losses}.",
            "If that is still too high, a larger network or more updates may help.",
        ),
        "alike": (
            f"The training losses do not differ beyond noise, or hardly: {losses}.",
            "Take more seeds or updates to tell, if that is too high; if it stays so, the smaller network will do.",
        ),
        "neither learns": (
            f"Neither network gets below what a constant gives: {losses}.",
            "Lower the learning rate: the trainings blow up."
            if math.isinf(model + baseline)
            else "Look for a bug in the data or the loss: OverfitCheck tells more.",
        ),
    }[verdict]
    evidence: dict[str, float | str] = {
        "verdict": verdict,
        "model_loss": model,
        "baseline_loss": baseline,
        "constant_loss": constant,
        "difference": difference,
        "difference_error": error,
        "steps": steps,
        "seeds": seeds,
    }
    return Finding("capacity or optimization", severity, message, advice, steps, evidence, HE)
