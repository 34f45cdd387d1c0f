"""The gradient noise scale: at which batch size the noise of the gradient is as large as the gradient.

From the norms of two gradients of one update: that of a small batch, and that of a larger one which contains it. Their
expectations ``E|g_b|^2 = |G|^2 + S / b`` give two unbiased estimates, of ``|G|^2`` (the true gradient) and of ``S``
(the trace of the covariance of one example's gradient), whose averages over many updates are divided.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.findings import Finding

PAPER = "McCandlish et al., An Empirical Model of Large-Batch Training, 2018: https://arxiv.org/abs/1812.06162"
Z = 1.96  # standard errors in a 95 % interval
CERTAIN = 0.5  # standard error of |G|^2 over |G|^2, above which there is a lower bound only
ENOUGH = 100  # updates before anything is said: near convergence, where few examples carry the gradient, few mislead
FAR = 2.0  # times the noise scale a batch is large, likewise small; even the nearer end of the interval


@dataclass(frozen=True)
class NoiseScale:
    """An estimate of the noise scale ``S / |G|^2``.

    Args:
        value: In examples; NaN where the error of ``|G|^2`` is above half of it.
        low: Lower end of its 95 % interval; 0 if there is none.
        high: Upper end; infinite if there is none.
        error: Standard error of ``value``; NaN without one.
        squared_gradient: The mean estimate of ``|G|^2``.
        squared_gradient_error: Its standard error.
        variance: The mean estimate of ``S``.
        updates: Number of updates that it is from.
    """

    value: float
    low: float
    high: float
    error: float
    squared_gradient: float
    squared_gradient_error: float
    variance: float
    updates: int

    @property
    def is_certain(self) -> bool:
        """Whether there is a value, not only a lower bound."""
        return math.isfinite(self.value)

    @property
    def text(self) -> str:
        """The estimate in words."""
        if self.is_certain:
            return f"{self.value:.3g} ± {float(f'{self.error:.1g}'):g}"  # no 3e+01
        return f">= {self.low:.3g}" if self.low > 0 else "unknown"


def components(small: float, large: float, small_batch: float, large_batch: float) -> tuple[float, float]:
    """Unbiased estimates of ``S`` and ``|G|^2`` from two squared norms.

    Args:
        small: Squared L2 norm of the mean gradient over ``small_batch`` examples.
        large: Likewise over ``large_batch`` examples, the small ones among them or not.
        small_batch: Number of examples.
        large_batch: Number of examples, more than ``small_batch``.

    Returns:
        ``S`` and ``|G|^2``; either may be negative, and only their means are to be divided.

    Example:
        >>> components(small=3.0, large=1.5, small_batch=8, large_batch=32)  # |G|^2 = 1, S = 16
        (16.0, 1.0)
    """
    squared_gradient = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    variance = (small - large) / (1 / small_batch - 1 / large_batch)
    return variance, squared_gradient


def estimate(pairs: list[tuple[float, float]]) -> NoiseScale:
    """The noise scale from many updates' ``(S, |G|^2)``, with Fieller's interval for the ratio of two means.

    The interval is right where ``|G|^2`` is close to zero, too: then it has no upper end.

    Args:
        pairs: What :func:`components` returns.

    Example:
        >>> estimate([(16.0, 1.0), (20.0, 1.1), (12.0, 0.9)]).text
        '16 ± 1'

    References:
        Fieller, Some Problems in Interval Estimation, Journal of the Royal Statistical Society B 16, 1954
    """
    count = len(pairs)
    if count < 2:
        return NoiseScale(math.nan, 0.0, math.inf, math.nan, math.nan, math.nan, math.nan, count)
    variance = math.fsum(s for s, _ in pairs) / count
    squared = math.fsum(g for _, g in pairs) / count
    scale = 1 / (count * (count - 1))
    v_s = scale * math.fsum((s - variance) ** 2 for s, _ in pairs)
    v_g = scale * math.fsum((g - squared) ** 2 for _, g in pairs)
    v_sg = scale * math.fsum((s - variance) * (g - squared) for s, g in pairs)
    a, b, c = squared**2 - Z**2 * v_g, variance * squared - Z**2 * v_sg, variance**2 - Z**2 * v_s
    root = math.sqrt(max(0.0, b * b - a * c))
    low = max(0.0, c / (b + root)) if c > 0 and b + root > 0 else 0.0  # c <= 0: S may be zero
    high = (b + root) / a if a > 0 else math.inf
    value = error = math.nan
    if squared > 0 and variance > 0 and math.sqrt(v_g) <= CERTAIN * squared:
        value = variance / squared
        error = math.sqrt(max(0.0, v_s - 2 * value * v_sg + value**2 * v_g)) / squared
    return NoiseScale(value, low, high, error, squared, math.sqrt(v_g), variance, count)


class NoiseScaleRule:
    """The noise scale of the last updates, and what it says about the batch size.

    Args:
        window: Updates that ``S`` and ``|G|^2`` are averaged over, at least 2.

    Example:
        >>> rule = NoiseScaleRule(window=100)
        >>> for noise in range(40):
        ...     rule.update(3.0 + 0.01 * noise, 1.5, small_batch=8, large_batch=32)
        >>> rule.estimate().text
        '19.3 ± 0.3'
    """

    def __init__(self, window: int = 400) -> None:
        self.window = check_count("window", window, 2)
        self.pairs: deque[tuple[float, float]] = deque(maxlen=self.window)
        self.batch = 0.0  # examples of the newest update
        self.measured = 0

    def update(self, small: float, large: float, small_batch: float, large_batch: float) -> None:
        """Take in two squared norms of an update, as for :func:`components`; what is not finite is left out."""
        if math.isfinite(small) and math.isfinite(large):
            self.pairs.append(components(small, large, small_batch, large_batch))
            self.batch = float(large_batch)
            self.measured += 1

    def estimate(self) -> NoiseScale:
        """The noise scale of the last ``window`` updates that were measured."""
        return estimate(list(self.pairs))

    def finding(self, step: int) -> Finding | None:
        """What the noise scale says about the batch size; None before there is enough to tell."""
        scale = self.estimate()
        if scale.updates < min(ENOUGH, self.window) or scale.low <= 0:
            return None
        verdict = self._verdict(scale)
        batch, bound = self.batch, "" if scale.is_certain else " (|G|^2 is lost in its noise, so this is a bound)"
        about = f"about {scale.text}" if scale.is_certain else f"{scale.low:.3g} or more"
        advice = {
            "small": f"A larger batch, up to {about}, would need almost proportionally fewer updates; retune"
            " the learning rate with it. For the same number of examples this batch is efficient.",
            "large": f"A batch of {about} would gain almost as much with each update from fewer examples;"
            " this one pays only if the hardware is idle otherwise.",
            "balanced": "The batch size suits this point of training.",
            "unknown": "Measure more updates (a larger window) before drawing conclusions about the batch size.",
        }[verdict]
        against = {
            "small": "small against it",
            "large": "large against it",
            "balanced": "of its order",
            "unknown": "it cannot be said which is larger",
        }[verdict]
        return Finding(
            rule="gradient noise scale",
            severity="info",
            message=f"The gradient noise scale over the last {scale.updates} measured updates was {scale.text}{bound},"
            f" and the effective batch size {batch:g} ({against}).",
            advice=advice,
            step=step,
            evidence={
                "noise_scale": scale.value,
                "noise_scale_low": scale.low,
                "noise_scale_high": scale.high,
                "noise_scale_error": scale.error,
                "effective_batch_size": batch,
                "squared_gradient": scale.squared_gradient,
                "squared_gradient_error": scale.squared_gradient_error,
                "variance": scale.variance,
                "updates": scale.updates,
                "verdict": verdict,
            },
            source=PAPER,
        )

    def _verdict(self, scale: NoiseScale) -> Literal["small", "large", "balanced", "unknown"]:
        if scale.low > FAR * self.batch:
            return "small"
        if scale.high < self.batch / FAR:
            return "large"
        return "balanced" if scale.is_certain else "unknown"

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": [list(pair) for pair in self.pairs], "batch": self.batch, "measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pairs.clear()
        self.pairs.extend((variance, squared) for variance, squared in state_dict["pairs"])
        self.batch, self.measured = state_dict["batch"], state_dict["measured"]
