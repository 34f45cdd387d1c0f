"""Where to clip a gradient: at the 90th percentile of the norms seen so far.

The playbook (Tuning Playbook, "How can optimization failures be debugged and mitigated?", gradient clipping) takes the
90th percentile of the unclipped gradient norms as the threshold and leaves two questions open: what an adaptive
strategy would be, and what to do while there is nothing to take a percentile of. :class:`PercentileThreshold` answers
both; ``benchmarks/LOG.md`` shows what the alternatives cost.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn import Parameter

from lightning_recipes.core.arguments import check_count, check_real

RECENT = 200  # norms that the bound is taken from: short enough to follow a norm that falls, long for a quartile
OUTLIER = 10  # times its threshold a norm is an outlier, with which others may come
FEW = 10  # below this many norms no statistic of them can be trusted, and the weights bound the threshold instead
FEW_ELEMENTS = 2**16  # copied into one tensor sooner than their norms are taken one by one
HALF_PRECISION = (torch.float16, torch.bfloat16)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all elements of all tensors together, without reading it back from the device.

    Args:
        tensors: Gradients or weights of any shapes, dtypes and devices; sparse ones and DTensors too. The norm of a
            DTensor is the global one, which is a collective: every rank has to call.

    Returns:
        Scalar tensor on the device of the first tensor, in single precision for half-precision input. An empty
        sequence has norm 0.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not tensors:
        return torch.zeros(())
    device, elements = tensors[0].device, 0
    for tensor in tensors:
        if not (
            tensor.dtype is torch.float32
            and (type(tensor) is Tensor or type(tensor) is Parameter)
            and tensor.layout is torch.strided
            and tensor.device == device
        ):
            return _norm_of_norms(_norms_of_all_kinds(tensors))
        elements += tensor.numel()
    if elements > FEW_ELEMENTS:
        return _norm_of_norms(torch._foreach_norm(tensors))
    together = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]  # torch's own, untyped
    norm: Tensor = torch.linalg.vector_norm(together)
    return norm


def _norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([*norms]))
    return norm


def _norms_of_all_kinds(tensors: list[Tensor]) -> list[Tensor]:
    """One norm for all DTensors and one for each other tensor, on one device and in at least single precision."""
    sharded = [tensor for tensor in tensors if hasattr(tensor, "full_tensor")]
    others = [tensor for tensor in tensors if not hasattr(tensor, "full_tensor")]
    norms = []
    if sharded:
        norm: Any = torch.nn.utils.get_total_norm(sharded)  # a DTensor, whose local value is only a part
        norms.append(norm.full_tensor())
    for tensor in others:
        values = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor
        dtype = torch.float32 if values.dtype in HALF_PRECISION else None
        norms.append(torch.linalg.vector_norm(values, dtype=dtype))
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    return [norm.to(norms[0].device, dtype, non_blocking=True) for norm in norms]


def scale_(gradients: list[Tensor], factor: float | Tensor) -> None:
    """Multiply all gradients by one factor in place; a tensor factor is not read back from the device."""
    if not gradients:
        return
    local: list[Any] = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in gradients]
    if isinstance(factor, Tensor) and any(gradient.device != factor.device for gradient in local):
        for gradient in local:
            gradient.mul_(factor.to(gradient.device, non_blocking=True))
    else:
        torch._foreach_mul_(local, factor)


def clipping_factor(norm: Any, threshold: Any) -> Any:
    """What to multiply gradients of this norm by so that they are no longer than the threshold.

    1 where the norm is not above the threshold, where it is not finite (never multiply a NaN into gradients) and
    where the threshold is 0 (all norms so far were 0, which says nothing about this one).

    Args:
        norm: A number, or a scalar tensor, which is not read back.
        threshold: Likewise.

    Example:
        >>> clipping_factor(4.0, 1.0), clipping_factor(0.5, 1.0), clipping_factor(math.nan, 1.0)
        (0.25, 1.0, 1.0)
    """
    if isinstance(norm, Tensor):
        clips = (norm > threshold) & (norm < math.inf) & (threshold > 0)
        return torch.where(clips, threshold / norm, 1.0)
    return threshold / norm if 0 < threshold < norm < math.inf else 1.0


class _Ranks:
    """Which place a percentile has among ``count`` sorted values: the smallest with that share at or below it."""

    def __init__(self, percentile: float) -> None:
        share = Fraction(repr(percentile)) / 100  # exact: in floats 0.9 * 10 may come out above 9
        self.numerator, self.denominator = share.as_integer_ratio()

    def place(self, count: int) -> int:
        return -(-count * self.numerator // self.denominator) - 1


class _SortedWindow:
    """The last ``size`` values, in order of arrival and of size: adding one and asking for any rank is cheap."""

    def __init__(self, size: int) -> None:
        self.arrived: deque[float] = deque(maxlen=size)
        self.ascending: list[float] = []

    def add(self, value: float) -> None:
        if len(self.arrived) == self.arrived.maxlen:
            del self.ascending[bisect_left(self.ascending, self.arrived[0])]
        self.arrived.append(value)
        insort(self.ascending, value)


class NormHistory:
    """All norms of a run in bounded memory: a histogram, and a curve that keeps every extreme.

    The histogram has 64 bins an octave (a norm is known to 0.6 %). The curve has at most 2,048 points; a point covers
    one update at first, and twice as many each time the curve is full: the least and the greatest norm of them and
    their last threshold.
    """

    POINTS = 2048
    BINS_PER_OCTAVE = 64

    def __init__(self) -> None:
        self.updates_per_point = 1
        self.low: list[float] = []
        self.high: list[float] = []
        self.thresholds: list[float] = []
        self.count = 0
        self.bins: dict[int, int] = {}
        self.zeros = 0

    def add(self, norm: float, threshold: float) -> None:
        """Take in the finite ``norm`` of one update and the threshold that it met."""
        if norm > 0:
            bin_ = math.floor(math.log2(norm) * self.BINS_PER_OCTAVE)
            self.bins[bin_] = self.bins.get(bin_, 0) + 1
        else:
            self.zeros += 1
        if self.count % self.updates_per_point:
            self.low[-1], self.high[-1] = min(self.low[-1], norm), max(self.high[-1], norm)
            self.thresholds[-1] = threshold
        else:
            self.low.append(norm)
            self.high.append(norm)
            self.thresholds.append(threshold)
        self.count += 1
        if len(self.low) == self.POINTS and self.count % self.updates_per_point == 0:
            self.low = [min(pair) for pair in zip(self.low[::2], self.low[1::2], strict=True)]
            self.high = [max(pair) for pair in zip(self.high[::2], self.high[1::2], strict=True)]
            self.thresholds = self.thresholds[1::2]
            self.updates_per_point *= 2

    def histogram(self) -> list[tuple[float, float, int]]:
        """``(lower edge, upper edge, count)`` of every occupied bin, ascending; zeros are the bin (0, 0)."""
        edges = [
            (2.0 ** (bin_ / self.BINS_PER_OCTAVE), 2.0 ** ((bin_ + 1) / self.BINS_PER_OCTAVE), self.bins[bin_])
            for bin_ in sorted(self.bins)
        ]
        return [(0.0, 0.0, self.zeros), *edges] if self.zeros else edges

    def percentile(self, percentile: float) -> float:
        """The norm that this share of all norms is at or below, to the width of a bin; 0 if there was none."""
        place = _Ranks(percentile).place(self.count)
        for low, high, count in self.histogram():
            if place < count:
                return math.sqrt(low * high)
            place -= count
        return 0.0

    def share_above(self, value: float) -> float:
        """The share of all norms above ``value``, to the width of a bin."""
        return sum(count for low, high, count in self.histogram() if math.sqrt(low * high) > value) / max(self.count, 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "updates_per_point": self.updates_per_point,
            "curve": torch.tensor([self.low, self.high, self.thresholds], dtype=torch.float64),
            "bins": torch.tensor([*self.bins.items()], dtype=torch.int64).reshape(-1, 2),
            "zeros": self.zeros,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.zeros = state_dict["count"], state_dict["zeros"]
        self.updates_per_point = state_dict["updates_per_point"]
        self.low, self.high, self.thresholds = state_dict["curve"].tolist()
        self.bins = dict(state_dict["bins"].tolist())


class PercentileThreshold:
    """The gradient norm above which to clip, from the norms seen so far.

    The threshold of an update is the ``percentile`` of the finite norms of the last ``window`` updates before it: the
    smallest of them with at least that share at or below it. It is bounded by what the bulk of the last 200 norms
    allows, twice their upper quartile and four times their median: where outliers are so many that the percentile is
    one of them, it is taken of the norms within the bound instead. And right behind an outlier, a norm of more than
    ten times its threshold, the threshold is at most the median of the last 200, so that the harm of a burst does not
    add up. A stream without such outliers meets neither (a log-normal one of log-deviation up to 0.9, say), and the
    threshold is the plain percentile.

    During the first ``warmup_steps`` updates the bound is the threshold, and during the first ten of those no gradient
    is let through that is longer than the weights were at the start. A norm is judged by those before it and remembered
    as it was, unclipped; one that is not finite is counted and otherwise leaves no trace, and neither does a norm of 0,
    as of a hinge loss that is met: it says nothing about the others.

    A norm given as a number gives a number, in a microsecond or two. A norm given as a scalar tensor gives a scalar
    tensor on its device, by the same rule and without reading anything back; what :meth:`flush` reads, at most 1,000
    updates late, is what the statistics below know. Memory is bounded: ``window`` norms and their thresholds, and the
    history.

    Attributes:
        count: Finite norms seen.
        nonfinite: Norms seen that were not finite.
        counts_nonfinite: Whether to count those; not where a GradScaler skips such updates, which is normal.
        history: All finite norms, in bounded memory.
        weight_norm: The norm of the weights at the first update; None before, and where nobody told.

    Args:
        percentile: Share of the norms at or below the threshold, in percent, at least 1 and below 100.
        window: Updates that the percentile is taken of, at least 1.
        warmup_steps: Updates before the percentile is trusted, at least 0. With 0 the first gradient is not clipped.

    Raises:
        TypeError: If an argument is not a number of its kind.
        ValueError: If it is out of its range.

    Example:
        >>> rule = PercentileThreshold(percentile=90, window=10, warmup_steps=0)
        >>> for norm in [1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 1.0, 3.0, 2.0, 1.0]:
        ...     threshold = rule.update(norm)
        >>> rule.update(1e6)
        3.0

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
        Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation Networks, 2020:
        https://arxiv.org/abs/2007.14469
    """

    def __init__(self, percentile: float = 90.0, window: int = 1000, warmup_steps: int = 20) -> None:
        self.percentile = check_real("percentile", percentile, 0, 100)
        if self.percentile < 1:
            raise ValueError(f"percentile is in percent: at {percentile!r} nearly every update is clipped; 90 is usual")
        self.window = check_count("window", window, 1)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        self.ranks, self.quartile, self.median = _Ranks(self.percentile), _Ranks(75.0), _Ranks(50.0)
        self.norms, self.recent = _SortedWindow(self.window), _SortedWindow(min(self.window, RECENT))
        self.thresholds: deque[float] = deque(maxlen=self.window)
        self.history = NormHistory()
        self.nonfinite = 0
        self.counts_nonfinite = True
        self.weight_norm: float | Tensor | None = None
        self._unread: _UnreadNorms | None = None

    @property
    def count(self) -> int:
        return self.history.count

    def update(self, norm: Any, weight_norm: Any = None) -> Any:
        """Take in the unclipped gradient norm of an update and return the threshold that it has to meet.

        Args:
            norm: L2 norm of all gradients together: a number, or a scalar tensor, which is not read back.
            weight_norm: L2 norm of the weights that they move, likewise; the first that is given counts. Without it,
                or if it is 0, the first gradient is let through.
        """
        if self.weight_norm is None:
            self.weight_norm = weight_norm
        if isinstance(norm, Tensor):
            if self._unread is None:
                self._unread = _UnreadNorms(self, norm)
            if self._unread.full:
                self.flush()
            return self._unread.update(norm, self.weight_norm)
        threshold = self.threshold()
        self._remember(norm, threshold)
        return threshold

    def threshold(self) -> float:
        """The threshold that the next norm has to meet."""
        values, recent = self.norms.ascending, self.recent.ascending
        if not values:
            return float(self.weight_norm or math.inf) if self.warmup_steps else math.inf
        median = recent[self.median.place(len(recent))]
        bound = min(2 * recent[self.quartile.place(len(recent))], 4 * median)
        if self.count < self.warmup_steps:
            threshold = min(bound, float(self.weight_norm or math.inf)) if self.count < FEW else bound
        else:
            plain = values[self.ranks.place(len(values))]
            threshold = plain if plain <= bound else values[self.ranks.place(bisect_right(values, bound))]
        behind_outlier = self.norms.arrived[-1] > OUTLIER * self.thresholds[-1]
        return min(threshold, median) if behind_outlier else threshold

    def flush(self) -> None:
        """Read the norms that were given as tensors since the last time: one or two host reads, or none."""
        if self._unread:
            pending = self._unread.pending
            told, zeros = self._unread.read()
            for norm, threshold in told:
                self._remember(norm, threshold)
            self.nonfinite += (pending - len(told) - zeros) * self.counts_nonfinite

    def clipped_fraction(self) -> float:
        """The share of the last ``window`` updates whose norm was above its threshold."""
        clipped: int = sum(clipping_factor(norm, threshold) < 1 for norm, threshold in self._judged())
        return clipped / max(len(self.thresholds), 1)

    def typical_factor(self) -> float:
        """The median over the last ``window`` updates of what clipping to the threshold multiplies a gradient by."""
        factors = [clipping_factor(norm, threshold) for norm, threshold in self._judged()]
        return sorted(factors)[len(factors) // 2] if factors else 1.0

    def _judged(self) -> Iterable[tuple[float, float]]:
        return zip(self.norms.arrived, self.thresholds, strict=True)

    def _remember(self, norm: float, threshold: float) -> None:
        if not norm < math.inf:
            self.nonfinite += self.counts_nonfinite
            return
        if norm == 0:
            return
        self.norms.add(norm)
        self.recent.add(norm)
        self.thresholds.append(threshold)
        self.history.add(norm, threshold)

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return {
            "norms": torch.tensor(self.norms.arrived, dtype=torch.float64),
            "thresholds": torch.tensor(self.thresholds, dtype=torch.float64),
            "nonfinite": self.nonfinite,
            "weight_norm": None if self.weight_norm is None else float(self.weight_norm),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.norms, self.recent = _SortedWindow(self.window), _SortedWindow(min(self.window, RECENT))
        for norm in state_dict["norms"].tolist():
            self.norms.add(norm)
            self.recent.add(norm)
        self.thresholds = deque(state_dict["thresholds"].tolist(), maxlen=self.window)
        self.nonfinite, self.weight_norm = state_dict["nonfinite"], state_dict["weight_norm"]
        self.history.load_state_dict(state_dict["history"])
        self._unread = None


class _UnreadNorms:
    """The rule of :class:`PercentileThreshold` on scalar tensors, and the norms that it has not read yet.

    The last norms and their thresholds stand in one tensor in order of arrival, newest last, empty places infinite.
    """

    def __init__(self, rule: PercentileThreshold, like: Tensor) -> None:
        self.window, self.warmup_steps = rule.window, rule.warmup_steps
        self.values = like.new_full((2, max(rule.window, 1000)), math.inf)
        kept = len(rule.thresholds)
        self.values[:, self.capacity - kept :] = like.new_tensor([rule.norms.arrived, rule.thresholds])
        self.pending, self.known = 0, rule.count
        self.seen = torch.tensor(rule.count, device=like.device)
        self.zeros = torch.zeros_like(self.seen)  # norms of 0 that were not read yet
        self.forgotten = rule.count - kept  # seen long ago, or before a resume with another window
        counts = range(rule.window + 1)
        self.places = torch.tensor(  # of the percentile, the upper quartile and the median, by the count of norms
            [
                [max(rule.ranks.place(count), 0) for count in counts],
                [max(rule.quartile.place(min(count, RECENT)), 0) for count in counts],
                [max(rule.median.place(min(count, RECENT)), 0) for count in counts],
            ],
            device=like.device,
        )
        self.multiples = like.new_tensor([2.0, 4.0])

    @property
    def capacity(self) -> int:
        return self.values.shape[1]

    @property
    def full(self) -> bool:
        return self.pending == self.capacity

    @torch.no_grad()
    def update(self, norm: Tensor, weight_norm: Tensor | float | None) -> Tensor:
        threshold = self.threshold(weight_norm)
        told = (norm < math.inf) & (norm > 0)
        shifted = torch.cat([self.values[:, 1:], torch.stack([norm, threshold])[:, None]], dim=1)
        self.values = torch.where(told, shifted, self.values)
        self.seen, self.zeros = self.seen + told, self.zeros + (norm == 0)
        self.pending += 1
        return threshold

    def threshold(self, weight_norm: Tensor | float | None) -> Tensor:
        norms = self.values[0, -self.window :]
        ascending, recent = norms.sort()[0], norms[-RECENT:].sort()[0]
        count = (self.seen - self.forgotten).clamp(max=self.window)
        places = self.places.index_select(1, count[None])[:, 0]
        quartile_and_median = recent.take(places[1:])
        bound = (quartile_and_median * self.multiples).amin()
        plain = ascending.take(places[0])
        within = torch.searchsorted(ascending, bound, right=True).minimum(count)
        threshold = torch.where(plain <= bound, plain, ascending.take(self.places[0].take(within)))
        if self.known < self.warmup_steps:
            weights = torch.as_tensor(math.inf if weight_norm is None else weight_norm, device=bound.device)
            early = torch.where((self.seen < FEW) & (weights > 0), bound.minimum(weights), bound)
            threshold = torch.where(self.seen < self.warmup_steps, early, threshold)
        last_norm, last_threshold = self.values[:, -1]
        behind_outlier = last_norm > OUTLIER * last_threshold
        return torch.where(behind_outlier, threshold.minimum(quartile_and_median[1]), threshold)

    def read(self) -> tuple[list[tuple[float, float]], int]:
        """The finite norms since the last time, in order, each with its threshold; and the number of those of 0."""
        if not self.pending:
            return [], 0
        seen, zeros = torch.stack([self.seen, self.zeros]).tolist()
        new, self.zeros = seen - self.known, torch.zeros_like(self.zeros)
        pairs = self.values[:, self.capacity - new :].T.tolist()
        self.pending, self.known = 0, self.known + new
        return [(norm, threshold) for norm, threshold in pairs], zeros
