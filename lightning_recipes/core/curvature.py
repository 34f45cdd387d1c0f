"""Stuck? What the loss looks like around the weights, from products of its Hessian with vectors.

:func:`measure` puts a :class:`CriticalPoint` together, and :func:`judge` says what it is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.hessian import NEGATIVE, LossSurface, Spectrum, Steps, extreme_eigenvalues
from lightning_recipes.core.selection import quantile

Verdict = Literal[
    "local minimum", "saddle", "bouncing between the walls", "noise floor", "still descending", "critical point unclear"
]

COHEN = (
    "Cohen et al., Gradient Descent Typically Occurs at the Edge of Stability, 2021: https://arxiv.org/abs/2103.00065"
)
DAUPHIN = "Dauphin et al., Identifying and attacking the saddle point problem, 2014: https://arxiv.org/abs/1406.2572"
MCCANDLISH = "McCandlish et al., An Empirical Model of Large-Batch Training, 2018: https://arxiv.org/abs/1812.06162"
CRITICAL = 0.05  # |gradient| |weights| / loss up to which a point is critical
ROUNDING = 8  # units in the last place of the loss: a smaller change was not seen
ASYMMETRIC = 0.02  # of the largest curvature: what a wrong second derivative is known by
NEAR = 4  # times the loss that an update gains by the slope may be what it loses by noise, for the noise floor
LENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of steps along the escape direction, over that of the weights
FRACTIONS = (1.0, 0.3, 0.1, 0.03)  # of the step that the optimizer would make along the mean gradient
WORTHWHILE = 0.01  # of the loss: an escape that lowers it by less is no reason to act


# ---------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float = 0.0

    def least(self, quantile: float) -> float:
        """So many standard errors below."""
        return self.value - quantile * self.error

    def most(self, quantile: float) -> float:
        """So many standard errors above."""
        return self.value + quantile * self.error


@dataclass(frozen=True)
class CriticalPoint:
    """What was measured at a point of a training.

    Args:
        loss: Of the sample, with what weight decay adds; so are all that follow.
        batches: In the sample, over all ranks.
        slope: Squared norm of the gradient of the training loss, without the bias that the noise of a sample has.
        weight_norm: L2 norm of the parameters.
        spectrum: Of the Hessian.
        over_limit: Largest curvature in the metric of the optimizer over the limit of its stability, and the bound on
            its error; NaN for an optimizer that is not known.
        gain: By how much the slope lowers the loss per update, to first order; NaN likewise, or where not needed.
        loss_to_noise: By how much the noise of the batches raises it per update, to second order; NaN likewise.
        ahead: Change of the loss by a step along the mean gradient, for each fraction of the optimizer's step (without
            momentum, at the same share of the limit of stability); empty where not needed.
        escape: Change of the loss by steps along the direction of the smallest curvature, by their length over that of
            the weights, in both senses; empty where not needed.
        rounding: What the loss is off by.
        products: Hessian-vector products, with those that are not of ``spectrum``.
    """

    loss: float
    batches: int
    slope: Estimate
    weight_norm: float
    spectrum: Spectrum
    over_limit: Estimate = Estimate(math.nan)
    gain: Estimate = Estimate(math.nan)
    loss_to_noise: float = math.nan
    ahead: Mapping[float, float] = field(default_factory=dict)
    escape: Mapping[float, float] = field(default_factory=dict)
    rounding: float = 0.0
    products: int = 0

    @property
    def quantile(self) -> float:
        """Of Student's t for the batches of the sample."""
        return quantile(self.batches) if self.batches > 1 else 1.0

    def relative_gradient(self, square: float) -> float:
        """Relative change of the loss per relative change of the weights."""
        return math.sqrt(max(square, 0.0)) * self.weight_norm / max(abs(self.loss), 1e-30)

    @property
    def is_critical(self) -> bool:
        """Whether the gradient is small, at most."""
        return self.relative_gradient(self.slope.most(self.quantile)) <= CRITICAL

    @property
    def has_negative_curvature(self) -> bool:
        """Beyond rounding."""
        return self.spectrum.smallest < -NEGATIVE * self.spectrum.scale

    @property
    def escape_step(self) -> float:
        """The step along the escape direction that lowers the loss most; 0 if the loss was not seen to be concave.

        That is seen in the mean of a step and its opposite, which the slope leaves alone.
        """
        both = [(change + self.escape[-step]) / 2 for step, change in self.escape.items()]
        return min(self.escape, key=self.escape.__getitem__) if min(both, default=0.0) < -self.rounding else 0.0

    @property
    def best_fraction(self) -> float:
        """Of the optimizer's step along the mean gradient: which lowers the loss most; 0 if none was seen to."""
        best = min(self.ahead, key=self.ahead.__getitem__, default=0.0)
        return best if self.ahead.get(best, 0.0) < -self.rounding else 0.0

    @property
    def overshoots(self) -> bool:
        """Whether a part of the optimizer's step lowers the loss ten times as much as the whole."""
        best = self.best_fraction
        return 0 < best < 1 and self.ahead[1.0] > 0.1 * self.ahead[best] and self.slope.least(self.quantile) > 0


def sharpness(
    surface: LossSurface, steps: Steps | None, seed: int = 0, max_products: int = 150
) -> tuple[Spectrum, Estimate]:
    """The upper end of the Hessian's spectrum, and the largest curvature over the optimizer's limit of stability.

    Raises:
        ArithmeticError: If a derivative is not finite.
    """
    gradient = surface.mean(torch.stack(surface.gradients()[1]).mean(0))
    spectrum = extreme_eigenvalues(surface.product, _start(gradient, seed), max_products, ends="largest")
    return spectrum, _over_limit(surface, steps, spectrum, gradient, seed, max_products)


def measure(
    surface: LossSurface,
    steps: Steps | None,
    seed: int = 0,
    max_products: int = 150,
    share: float = 0.0,
    batches_per_update: int = 1,
    ranks: int = 1,
) -> CriticalPoint:
    """Measure what :func:`judge` wants to know.

    Takes a gradient of each batch, at most ``2 max_products`` Hessian-vector products and one for each batch, and at
    most 16 losses of the sample. Keeps ``max_products`` vectors of the size of all parameters or half a GiB of them (at
    least 30), one for each batch, and about eight more.

    Args:
        surface: The loss.
        steps: Of the optimizer, from :func:`steps_of`; its weight decay is taken into the loss.
        seed: Of the vector that Lanczos' method starts from.
        max_products: At most for each end of a spectrum, at least 1.
        share: Of the training data that the sample is: of all of it the gradient has no error.
        batches_per_update: Whose gradients an update takes the mean of.
        ranks: Over which ``surface`` takes means.

    Raises:
        ArithmeticError: If the loss or a derivative is not finite, or the Hessian is not symmetric.
    """
    if steps is not None and bool((steps.penalty != 0).any()):
        surface.penalty = steps.penalty
    losses, gradients = surface.gradients()
    loss, gradient = float(surface.mean(losses.double().mean())), surface.mean(torch.stack(gradients).mean(0))
    if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
        raise ArithmeticError("the loss or its gradient is not finite")
    weights = surface.weights
    if surface.penalty is not None:
        loss += float(surface.penalty @ weights.square()) / 2
        gradients = [each + surface.penalty * weights for each in gradients]
        gradient = gradient + surface.penalty * weights
    batches = ranks * len(gradients)
    spectrum = extreme_eigenvalues(surface.product, _start(gradient, seed), max_products)
    if spectrum.asymmetry > ASYMMETRIC:
        named = ", ".join(surface.custom_functions())
        raise ArithmeticError(
            f"the Hessian is not symmetric, by {spectrum.asymmetry:.0%}: an operation of the model has a wrong second"
            f" derivative{f' ({named}?)' if named else ''}, or the loss is not the same each time"
        )
    slope = _squared_norm(surface, gradients, gradient, None, batches, share)
    known: dict[str, Any] = {"loss": loss, "batches": batches, "slope": slope, "spectrum": spectrum}
    known["rounding"] = ROUNDING * torch.finfo(weights.dtype).eps * abs(loss)
    known["weight_norm"] = float(torch.linalg.vector_norm(weights))
    point = CriticalPoint(**known)
    if steps is not None:
        known["over_limit"] = _over_limit(surface, steps, spectrum, gradient, seed, max_products)
        if not point.is_critical:
            known["gain"] = _squared_norm(surface, gradients, gradient, steps.reach, batches, share)
            known["loss_to_noise"] = _noise(surface, gradients, gradient, steps.reach, ranks) / batches_per_update
            step = -2 * steps.sharpness_limit * gradient
            known["ahead"] = {fraction: surface.loss_at(fraction * step) - loss for fraction in FRACTIONS}
    if point.has_negative_curvature and point.is_critical:
        step = (point.weight_norm or 1.0) * spectrum.direction
        known["escape"] = {
            length: surface.loss_at(length * step) - loss for each in LENGTHS for length in (each, -each)
        }
    return CriticalPoint(**known, products=surface.products)


def _start(gradient: Tensor, seed: int) -> Tensor:
    """A random direction, and that of the gradient, in which the curvature is often large."""
    normal = torch.randn(gradient.numel(), generator=torch.Generator().manual_seed(seed), dtype=gradient.dtype)
    lengths = [torch.linalg.vector_norm(each) for each in (normal, gradient)]
    start: Tensor = normal.to(gradient.device) / lengths[0] + gradient / lengths[1].clamp_min(1e-30)
    return start


def _over_limit(
    surface: LossSurface, steps: Steps | None, spectrum: Spectrum, gradient: Tensor, seed: int, max_products: int
) -> Estimate:
    if steps is None:
        return Estimate(math.nan)
    if steps.is_uniform:
        factor = float(steps.sharpness_limit[0])
        return Estimate(factor * spectrum.largest, factor * spectrum.largest_error)
    root = steps.sharpness_limit.sqrt()
    scaled = extreme_eigenvalues(
        lambda vector: root * surface.product(root * vector),
        _start(root * gradient, seed),
        max_products,
        ends="largest",
    )
    return Estimate(scaled.largest, scaled.largest_error)


def _squared_norm(
    surface: LossSurface, gradients: list[Tensor], mean: Tensor, metric: Tensor | None, batches: int, share: float
) -> Estimate:
    """Of the gradient of all data, unbiased, with the jackknife's standard error; batches are the samples."""
    dual = mean if metric is None else metric * mean
    whole = float(mean @ dual)
    if share >= 1:
        return Estimate(whole)
    if batches < 3:
        return Estimate(whole, math.inf)
    squares = torch.stack([each @ (each if metric is None else metric * each) for each in gradients]).double()
    across = torch.stack([each @ dual for each in gradients]).double()
    average = float(surface.mean(squares.mean()))
    left = batches - 1
    others = (batches**2 * whole - 2 * batches * across + squares) / left**2  # squared norms of means but for one
    estimates = (left * others - (batches * average - squares) / left) / (left - 1)
    centre, spread = float(surface.mean(estimates.mean())), float(surface.mean(estimates.square().mean()))
    value = (batches * whole - average) / left
    value += share * (average - whole) / left  # of a part that is not small more is known
    return Estimate(value, math.sqrt(max(0.0, (spread - centre**2) * left * (1 - share))))


def _noise(surface: LossSurface, gradients: list[Tensor], mean: Tensor, metric: Tensor, ranks: int) -> float:
    """Half the trace of metric, Hessian, metric and the covariance of the gradients of single batches."""
    if len(gradients) < 2:
        return math.nan
    total = 0.0
    for gradient in gradients:
        deviation = metric * surface.mean(gradient - mean)
        total += ranks * float(deviation @ surface.product(deviation))
    return total / (len(gradients) - 1) / 2


# ---------------------------------------------------------------------------------- judge


def verdict(point: CriticalPoint, is_flat: bool | None = None) -> Verdict:
    """What a point of a training is.

    In this order:

    - ``"bouncing between the walls"``: the gradient is not small, and the curvature is above what the optimizer can
      follow at its learning rate, by more than the error of the curvature; or the mean gradient is beyond its noise,
      and a step along it lowers the loss by less than a tenth of what a shorter one does (high on walls that are
      flatter than the bottom between them). The loss does not fall.
    - ``"saddle"``: the gradient is small (relative to weights and loss at most 0.05, its noise included), and the
      loss was seen to be concave along a direction. A larger gradient is never that of a saddle, however noisy: some
      direction in which the loss of a small sample falls is always found, and says nothing about other batches.
    - ``"local minimum"``: the gradient is small, and no negative curvature was found.
    - ``"noise floor"``: the loss does not fall, and what the slope gains per update is about what the noise of the
      batches loses (:data:`NEAR` times at most).
    - ``"still descending"``: the slope gains more than that, or the loss falls.
    - ``"critical point unclear"``: the sample is too small to tell.

    Args:
        point: What was measured.
        is_flat: Whether the training loss has stopped falling; None if nobody knows.
    """
    too_sharp = point.over_limit.least(1) > 1
    if (too_sharp or point.overshoots) and not point.is_critical:
        return "still descending" if is_flat is False else "bouncing between the walls"
    if point.is_critical:
        concave: Verdict = "saddle" if point.escape_step else "critical point unclear"
        return concave if point.has_negative_curvature else "local minimum"
    if is_flat is False:
        return "still descending"
    return _with_noise(point)


def _with_noise(point: CriticalPoint) -> Verdict:
    if math.isnan(point.loss_to_noise):  # of a single batch, or of an optimizer that is not known
        return "still descending" if point.slope.least(point.quantile) > 0 else "critical point unclear"
    noise = NEAR * max(point.loss_to_noise, 0.0)
    if point.gain.least(point.quantile) > noise:
        return "still descending"
    return "noise floor" if point.gain.most(point.quantile) <= noise else "critical point unclear"


def judge(point: CriticalPoint, step: int, is_flat: bool | None = None) -> Finding:
    """The verdict as a finding; a warning only if the loss is flat and there is a cure.

    Args:
        point: What was measured.
        step: Updates done.
        is_flat: As of :func:`verdict`.
    """
    name = verdict(point, is_flat)
    message, advice = _TEXTS[name](point)
    curable = name == "bouncing between the walls" or (name == "saddle" and _lowering(point) >= WORTHWHILE)
    slope = point.slope
    return Finding(
        rule=name,
        severity="warning" if is_flat and curable else "info",
        message=message,
        advice=advice,
        step=step,
        evidence={
            "loss": point.loss,
            "batches": point.batches,
            "gradient_norm": math.sqrt(max(0.0, slope.value)),
            "relative_gradient": point.relative_gradient(slope.value),
            "relative_gradient_at_most": point.relative_gradient(slope.most(point.quantile)),
            "sharpness": point.spectrum.largest,
            "sharpness_error": point.spectrum.largest_error,
            "smallest_curvature": point.spectrum.smallest,
            "smallest_curvature_error": point.spectrum.smallest_error,
            "smallest_curvature_floor": point.spectrum.floor,
            "sharpness_over_limit": point.over_limit.value,
            "gain_of_an_update": point.gain.value,
            "loss_of_an_update_to_noise": point.loss_to_noise,
            "escape_step": point.escape_step,
            "products": point.products,
        },
        source=MCCANDLISH if name == "noise floor" else DAUPHIN if name in ("saddle", "local minimum") else COHEN,
    )


def _lowering(point: CriticalPoint) -> float:
    """By what share of it the escape lowers the loss."""
    return -point.escape.get(point.escape_step, 0.0) / max(abs(point.loss), 1e-30)


def _gradient_text(point: CriticalPoint) -> str:
    size = point.relative_gradient(point.slope.value)
    return f"|gradient| |weights| / loss is {size:.2g}"


def _curvature_text(point: CriticalPoint) -> str:
    spectrum = point.spectrum
    return f"curvatures lie between {spectrum.smallest:.2g} and {spectrum.largest:.3g}"


def _bouncing(point: CriticalPoint) -> tuple[str, str]:
    over, best = point.over_limit.value, point.best_fraction
    seen = [f"The gradient is not small ({_gradient_text(point)})"]
    if over > 1:
        sharpest = f"the largest curvature, {point.spectrum.largest:.3g},"
        seen.append(f"{sharpest} is {over:.2g} times what the optimizer can follow at its learning rate")
    if 0 < best < 1:
        ahead = f"a step at the learning rate changes the loss by {point.ahead[1.0]:+.2g}"
        seen.append(f"{ahead}, one at {best:g} of it by {point.ahead[best]:+.2g}")
    cut = max(2, math.ceil(over), round(1 / best) if best and point.overshoots else 0)
    return "; ".join(seen) + ".", f"Divide the learning rate by {cut}, or let it decay."


def _saddle(point: CriticalPoint) -> tuple[str, str]:
    step, lowering = point.escape_step, _lowering(point)
    message = (
        f"{_gradient_text(point)}, {_curvature_text(point)}, and a step of {abs(step):g} of the weights' length along"
        f" the direction of the smallest lowers the loss by {lowering:.2%}."
    )
    if lowering < WORTHWHILE:
        return message, "The way out is open but shallow: expect little of it alone."
    return (
        message,
        "Leave it by noise (smaller batches, momentum, other initial weights); a longer run gets out, slowly.",
    )


def _minimum(point: CriticalPoint) -> tuple[str, str]:
    floor = point.spectrum.floor
    bound = f" (none below {floor:.2g} with 95 % certainty)" if math.isfinite(floor) else ""
    unstable = point.over_limit.least(1) > 1
    return (
        f"{_gradient_text(point)}, and {_curvature_text(point)}{bound}: no way down was found in"
        f" {point.spectrum.products} products."
        + (f" Its sharpness is {point.over_limit.value:.2g} times what the optimizer can stay at." if unstable else ""),
        "If the loss is too high, more steps will not lower it: a larger model, better data, other initial weights.",
    )


def _noise_floor(point: CriticalPoint) -> tuple[str, str]:
    return (
        f"Per update the slope gains {point.gain.value:.2g} and the noise of the batches loses"
        f" {point.loss_to_noise:.2g} of a loss of {point.loss:.3g}.",
        "Let the learning rate decay, average the weights (EMAWeights), or take larger batches.",
    )


def _descending(point: CriticalPoint) -> tuple[str, str]:
    message = f"{_gradient_text(point)}, and {_curvature_text(point)}"
    over = point.over_limit.value
    if math.isnan(over):
        return message + ".", "Train longer."
    message += f"; the learning rate is at {over:.2g} of the limit of stability."
    if over < 0.1:
        return message, "A higher learning rate would be stable and go down faster, if the schedule allows it."
    return message, "Train longer."


def _unclear(point: CriticalPoint) -> tuple[str, str]:
    return (
        f"{_gradient_text(point)} (up to {point.relative_gradient(point.slope.most(point.quantile)):.2g} within its"
        f" noise over {point.batches} batches), and {_curvature_text(point)}.",
        "It cannot be told from this sample: take more batches.",
    )


_TEXTS: dict[Verdict, Callable[[CriticalPoint], tuple[str, str]]] = {
    "bouncing between the walls": _bouncing,
    "saddle": _saddle,
    "local minimum": _minimum,
    "noise floor": _noise_floor,
    "still descending": _descending,
    "critical point unclear": _unclear,
}
