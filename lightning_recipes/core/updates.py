"""The size of an update over the size of the weights that it changes, and what it says about the learning rate.

A ratio of about 1e-3 is the rule of thumb. What training at the best rate shows is a ratio that starts higher and falls
as the training converges, under any schedule; a training that has died has a tiny one. So a rate is called too low by
the ratios of a run whose loss falls no faster than its learning rates add up, too high by the ratios of the middle half
or by the first update, and neither where the loss says otherwise. ``benchmarks/updates.py`` says how often that is
right.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_recipes.core.early_stopping import noise_of
from lightning_recipes.core.findings import Finding, listing

Verdict = Literal["too low", "too high", "too high for the start", "died"]

NOTES = "Karpathy, CS231n, ratio of weights and updates: https://cs231n.github.io/neural-networks-3/#ratio"
LOW = 1.3e-3  # the highest ratios of a run are below: too low, if the loss says so, too
HIGH = 1.2e-2  # the middle half of a run has ratios above: too high
VERY_HIGH = 2e-2  # likewise, and worth a warning; or above it before the run died
KICK = 0.3  # of its weights an update changes at once: too high for the start
LEAP = 1.0  # likewise, and worth a warning, in however short a run
HEALTHY = (5e-4, 2e-2)  # what figures show as the usual range
PEAK = 0.9  # quantile of the ratios of a run that counts as their highest
BEYOND = 2.0  # times its noise a loss is not 0
DEAD = 0.1  # of the first loss, which a run has to gain that has not died
GIVEN_BACK = 0.3  # of the gain: so much lost again and the run has diverged
STEADY = 0.6, 0.1  # share of the gain made by a quarter of the summed rate at most, and after the half at least
EVENLY = 0.2, 0.3  # likewise, where the highest ratios are not that low
ENOUGH = 20  # measured updates before anything is said when training ends
CERTAIN = 100  # likewise while it goes on
SETTLED = 200  # updates before a ratio is called too high or too low: the first ones are large in any training
APART = 50.0  # times as large or small as the others' a layer's ratio is far from them
POINTS = 512  # of the history


class UpdateMeter:
    """Measures one update: made right before it, asked right after it.

    Args:
        parameters: The weights, which are copied (of DTensors this rank's shards).
        whole: Makes squared norms of shards those of the whole, where shards are plain tensors; those of DTensors are
            summed anyway, a collective.

    Example:
        >>> weights = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> meter = UpdateMeter(weights)
        >>> weights[0] -= 0.5
        >>> meter.norms()
        tensor([[3.0000, 4.0000],
                [0.5000, 0.0000]])
    """

    def __init__(self, parameters: Sequence[Tensor], whole: Callable[[Tensor], Tensor] | None = None) -> None:
        self.parameters, self.whole = list(parameters), whole
        self.before = [_local(parameter).clone() for parameter in self.parameters]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The L2 norm of each weight before the update, and of its change, shape ``(2, parameters)``.

        Not read back; the copies are used up.
        """
        if not self.before:
            return torch.zeros(2, 0)
        runs = list(zip(_alike(self.before), _alike([_local(parameter) for parameter in self.parameters]), strict=True))
        each = [norm for copies, _ in runs for norm in _norms(copies)]
        for copies, weights in runs:
            torch._foreach_sub_(copies, weights)
        each += [norm for copies, _ in runs for norm in _norms(copies)]
        if len(runs) > 1:
            dtype = max((norm.dtype for norm in each), key=lambda dtype: dtype.itemsize)
            each = [norm.to(each[0].device, dtype) for norm in each]
        norms = torch.stack(each).view(2, -1)
        if self.whole is not None:
            norms = self.whole(norms.square()).sqrt()
        return _of_whole(norms, self.parameters)


def update_ratios(norms: Sequence[Sequence[float]], layers: Sequence[int]) -> list[float]:
    """``||w_after - w_before|| / ||w_before||`` over all weights of a layer together, for each layer.

    A layer whose weights were all zero before the update has none: NaN. One that did not change has 0.

    Args:
        norms: Of each weight before the update, and of its change, as :meth:`UpdateMeter.norms` gives them.
        layers: The layer of each weight, counted from 0, none left out.

    Example:
        >>> update_ratios([[3.0, 4.0, 2.0], [0.5, 0.0, 1.0]], layers=[0, 0, 1])
        [0.1, 0.5]
    """
    sizes, changes = ([0.0] * (max(layers, default=-1) + 1) for _ in range(2))
    for layer, size, change in zip(layers, *norms, strict=True):
        sizes[layer] += size * size
        changes[layer] += change * change
    return [math.sqrt(change / size) if size else math.nan for size, change in zip(sizes, changes, strict=True)]


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """The L2 norm of each tensor, all of one dtype and device, in at least single precision."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    norms: Sequence[Tensor] = torch._foreach_norm(tensors, 2, dtype=torch.float32 if half else None)
    return norms


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Runs of tensors of one dtype and device, which one foreach call takes; in order."""
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        if not runs or (runs[-1][0].dtype, runs[-1][0].device) != (tensor.dtype, tensor.device):
            runs.append([])
        runs[-1].append(tensor)
    return runs


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, all or (of a DTensor) a shard; detached."""
    detached: Any = tensor.detach()
    local: Tensor = detached.to_local() if hasattr(detached, "to_local") else detached
    return local


def _of_whole(norms: Tensor, parameters: list[Tensor]) -> Tensor:
    """The norms, the last dimension, of whole DTensors from those of their shards; every rank has to call."""
    layouts: dict[Any, list[int]] = {}
    for place, parameter in enumerate(parameters):
        each: Any = parameter
        if hasattr(each, "to_local"):
            layouts.setdefault((each.device_mesh, each.placements), []).append(place)
    if not layouts:
        return norms
    from torch.distributed.tensor import DTensor, Partial, Replicate

    for (mesh, placements), places in layouts.items():
        sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        squares = DTensor.from_local(norms[..., places].square(), mesh, sums)
        norms[..., places] = squares.full_tensor().sqrt()
    return norms


class UpdateRatioRule:
    """What the update ratios of one optimizer say.

    The *level* of an update is the median ratio of the layers that have a matrix (of all, if none has): biases and
    scales have sizes of their own. Judged are, from 20 measured updates and 200 in all on:

    ====================== =============================================================================================
    too low                the loss falls evenly with the sum of the learning rates: at a quarter of the sum at most
                           60 % of the gain was made, and after its half at least 10 %, beyond noise, while the highest
                           levels of the run are below 1.3e-3; or (information only) at most 20 % and at least 30 %,
                           while those of the middle half are below 3.9e-3
    too high               the level of the middle half of the run is above 1.2e-2 (a warning above 2e-2), or was above
                           2e-2 before the run died
    too high for the start the first update changed more than 0.3 of the weights
    ====================== =============================================================================================

    A run has died if its loss has not gained a tenth of the first, gave back a third of its gain or is not finite:
    that is never called too low. Nor is one whose learning rate still rises. One that begins within its spread about 0,
    as the loss of a policy gradient does, has died only if it is not finite.

    Memory is 512 points and two numbers a layer.

    Example:
        >>> rule = UpdateRatioRule()
        >>> for step in range(0, 1000, 10):
        ...     rule.update(step, {"body": 2e-4, "head": 3e-4}, loss=2 - step / 1000, rate=1e-5)
        >>> rule.finding().rule
        'learning rate looks too low'
    """

    def __init__(self) -> None:
        self.points: list[list[float]] = []  # update, level, lowest, highest, loss, learning rate
        self.points_each = 1  # measured updates a point stands for
        self.step = self.seen = self.measured = (
            0  # newest update; how many were looked at, and how many moved something
        )
        self.kick = 0.0  # level of the first update
        self.first_loss = math.nan
        self.layers: dict[str, list[float]] = {}  # measured, changed, sum of the logarithms of its ratios
        self.matrices: set[str] = set()
        self.newest: dict[str, float] = {}

    def update(
        self,
        step: int,
        ratios: Mapping[str, float],
        loss: float = math.nan,
        rate: float = 0.0,
        matrices: Sequence[str] | None = None,
    ) -> None:
        """Take in a measured update.

        Args:
            step: Updates before it.
            ratios: Of each layer; what is not finite (weights of zero, an update that was skipped) is left out.
            loss: Of the update; NaN if it is not known.
            rate: Learning rate; 0 if it is not known.
            matrices: The layers that have a matrix; all if not given.
        """
        self.matrices = set(ratios if matrices is None else matrices)
        self.step = step
        self.newest = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
        lowest = level = highest = math.nan
        if any(self.newest.values()):  # else it was skipped, or the learning rate is 0, or the weights are broken
            for name, ratio in self.newest.items():
                layer = self.layers.setdefault(name, [0, 0, 0.0])
                layer[0] += 1
                layer[1] += ratio > 0
                layer[2] += math.log(ratio) if ratio > 0 else 0.0
            lowest, level, highest = self.summary.values()
            self.kick = level if step == 0 else self.kick
            self.measured += 1
        if not self.points:
            self.first_loss = loss
        if self.seen % self.points_each == 0:
            self.points.append([float(step), level, lowest, highest, loss, rate])
        self.seen += 1
        if len(self.points) == POINTS:
            self.points, self.points_each = self.points[::2], 2 * self.points_each

    @property
    def summary(self) -> dict[str, float]:
        """Lowest, median and highest ratio of the layers with a matrix at the newest measured update; may be empty."""
        moved = {name: ratio for name, ratio in self.newest.items() if ratio > 0}
        judged = [ratio for name, ratio in moved.items() if name in self.matrices] or list(moved.values())
        if not judged:
            return {}
        return {"lowest": min(judged), "median": statistics.median(judged), "highest": max(judged)}

    def level(self, begin: float = 0.25, end: float = 0.75) -> float:
        """The median level of a part of the run, by default of its middle half; 0 if nothing moved there."""
        levels = self._levels(begin, end)
        return statistics.median(levels) if levels else 0.0

    def peak(self) -> float:
        """The highest level of the run, but for the highest tenth."""
        levels = sorted(self._levels(0, 1))
        return levels[math.ceil(PEAK * len(levels)) - 1] if levels else 0.0

    def _levels(self, begin: float, end: float) -> list[float]:
        return [point[1] for point in self._part(begin, end) if math.isfinite(point[1])]

    def _part(self, begin: float, end: float) -> list[list[float]]:
        count = len(self.points)
        return self.points[int(begin * count) : max(int(begin * count) + 1, int(end * count))]

    def unmoved(self) -> list[str]:
        """Layers that did not change at any of at least 20 measured updates."""
        return [name for name, (measured, changed, _) in self.layers.items() if measured >= ENOUGH and not changed]

    def apart(self) -> tuple[str, float, float] | None:
        """The layer with a matrix whose mean ratio is furthest from that of the others: name, its and the median's."""
        means = {
            name: logs / changed
            for name, (_, changed, logs) in self.layers.items()
            if changed >= ENOUGH and name in self.matrices
        }
        if len(means) < 3 or self._died():
            return None
        middle = statistics.median(means.values())
        name = max(means, key=lambda each: abs(means[each] - middle))
        if abs(means[name] - middle) < math.log(APART):
            return None
        return name, math.exp(means[name]), math.exp(middle)

    def verdict(self, enough: int = ENOUGH) -> Verdict | None:
        """What is to be said of the learning rate, if anything."""
        leaps: Verdict | None = "too high for the start" if self.kick > LEAP else None
        if self.seen < enough or not self.measured:
            return leaps
        if self._died():
            return "died" if self._before_it_died() > VERY_HIGH else None
        if self.measured < enough or self.step + 1 < SETTLED:
            return leaps
        if self.level() > HIGH:
            return "too high"
        if self.kick > KICK:
            return "too high for the start"
        if self._died(min) or self._still_rises():
            return None
        low = self._gains(*STEADY) if self.peak() < LOW else self.level() < 3 * LOW and self._gains(*EVENLY)
        return "too low" if low else None

    def finding(self, enough: int = ENOUGH) -> Finding | None:
        """The verdict on the learning rate as a finding.

        Args:
            enough: Measured updates that it needs.
        """
        verdict = self.verdict(enough)
        if verdict is None:
            return None
        share, last = f"of {self.measured} measured updates", self._loss(0.75, 1)
        peak, middle = self.peak(), self.level()
        idle = max(abs(last - self.first_loss), self.first_loss - self._lowest()) < DEAD * abs(self.first_loss)
        when = "in a run that has learned nothing" if idle else "before the run died"
        is_sure = verdict == "died" or (verdict == "too low" and peak < LOW)
        warns = is_sure or middle > VERY_HIGH or self.kick > LEAP
        ratio = f"stayed below {peak:.2g} in nine tenths" if peak < LOW else f"was {middle:.2g} in the middle half"
        message, advice = {
            "too low": (
                f"The update ratio {ratio} {share} (usual is 1e-3 to 1e-2 while there is much to learn), and the loss"
                f" falls as evenly as the learning rates add up, from {self.first_loss:.3g} to {last:.3g} so far.",
                "Try 3 to 10 times the learning rate (less if a pretrained network is fine-tuned).",
            ),
            "too high": (
                f"The update ratio was {middle:.2g} in the middle half {share}, where up to {HIGH:g} is usual.",
                "Try a third of the learning rate, or a schedule that lowers it.",
            ),
            "too high for the start": (
                f"The first update changed the weights by {self.kick:.0%} of their size.",
                "Warm the learning rate up, or lower it.",
            ),
            "died": (
                f"The update ratio was {self._before_it_died():.2g} {when}, where up to {VERY_HIGH:g} is"
                f" usual: the loss began at {self.first_loss:.3g} and is {last:.3g}.",
                "Try a tenth of the learning rate, or warm it up.",
            ),
        }[verdict]
        too = "low" if verdict == "too low" else "high"
        return Finding(
            rule=f"learning rate looks too {too}",
            severity="warning" if warns else "info",
            message=message,
            advice=advice,
            step=self.step + 1,
            evidence={
                "verdict": verdict,
                "highest_ratio": peak,
                "middle_ratio": middle,
                "first_ratio": self.kick,
                "first_loss": self.first_loss,
                "last_loss": last,
                "measured_updates": self.measured,
            },
            source=NOTES,
        )

    def _before_it_died(self) -> float:
        """The level of the first quarter, or a single one that stands out."""
        return max(self.level(0, 0.25), *(0.4 * level for level in self._levels(0, 1)))

    def _loss(self, begin: float, end: float) -> float:
        """The median loss of a part of the run; NaN if most of it is not finite."""
        losses = [point[4] for point in self._part(begin, end)]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return statistics.median(finite) if 2 * len(finite) > len(losses) else math.nan

    def _early_loss(self) -> float:
        """The median loss of the first twentieth of the run, at least of three updates: one alone is noisy."""
        return self._loss(0, max(0.05, 3 / len(self.points)))

    def _died(self, of_both: Callable[..., float] = max) -> bool:
        """Whether the run has gained nothing since its first or early loss, or has lost it again."""
        first, last = of_both(self.first_loss, self._early_loss()), self._loss(0.75, 1)
        if not any(math.isfinite(point[4]) for point in self.points):
            return False  # the loss is not known
        if not (math.isfinite(first) and math.isfinite(last)):
            return True
        if self._is_about_zero(first):
            return False  # nothing can be said in shares of it
        if first - last < DEAD * abs(first):
            return True
        best = self._lowest()
        return last - best > GIVEN_BACK * (first - best)

    def _is_about_zero(self, first: float) -> bool:
        """Whether the first loss is 0 but for the noise of the early ones, as that of a policy gradient.

        Losses that are never below 0 are noisy in a run that explodes.
        """
        early = [point[4] for point in self._part(0, 0.25) if math.isfinite(point[4])]
        return min(early, default=0.0) < 0 and abs(first) <= BEYOND * noise_of(early)

    def _lowest(self) -> float:
        """The lowest loss of a quarter of the run."""
        return min(self._loss(begin / 4, (begin + 1) / 4) for begin in range(4))

    def _gains(self, early_share: float, late_share: float) -> bool:
        """Whether the loss falls with the sum of the learning rates, not faster at first, and has not stopped yet.

        By that sum, not by updates, a loss that only the rate holds back falls evenly whatever the schedule.

        Args:
            early_share: Of the gain, made at a quarter of the sum at most.
            late_share: Of the gain, made behind half of it at least, and beyond noise.
        """
        rates = [point[5] for point in self.points]
        rates = rates if any(rates) else [1.0] * len(rates)  # not known
        sums = [*accumulate(rates)]

        def losses(begin: float, end: float) -> list[float]:
            part = zip(self.points, sums, strict=True)
            return [p[4] for p, passed in part if begin <= passed / sums[-1] <= end and math.isfinite(p[4])]

        parts = losses(0.2, 0.3), losses(0.45, 0.55), losses(0.75, 1)
        if not all(parts):
            return False
        first, (early, middle, last) = self._early_loss(), map(statistics.median, parts)
        noise = statistics.median(abs(loss - last) for loss in parts[2]) / math.sqrt(len(parts[2]))
        is_even = -0.1 * (first - last) <= first - early <= early_share * (first - last)
        return is_even and middle - last >= max(late_share * (first - last), 4 * noise)

    def _still_rises(self) -> bool:
        """Whether the learning rate is in its warmup."""
        return self.points[-1][5] > 1.01 * self.points[len(self.points) // 2][5]

    def state_dict(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "matrices"}
        state["points"] = [list(point) for point in self.points]
        state["layers"] = {name: list(layer) for name, layer in self.layers.items()}
        return {**state, "matrices": sorted(self.matrices), "newest": dict(self.newest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
        self.points = [list(point) for point in state_dict["points"]]
        self.layers = {name: list(layer) for name, layer in state_dict["layers"].items()}
        self.matrices, self.newest = set(state_dict["matrices"]), dict(state_dict["newest"])


def not_optimized(names: Sequence[str], has_gradient: bool) -> Finding:
    """Of trainable parameters that no optimizer has.

    Args:
        names: Of the parameters.
        has_gradient: Whether they get one: if not they may only be meant to predict, as the target of a critic.
    """
    gradient = "though they get a gradient" if has_gradient else "nor do they get a gradient"
    return Finding(
        rule="not in any optimizer",
        severity="warning" if has_gradient else "info",
        message=f"No optimizer has {listing(names)}, {gradient}.",
        advice="Give them to an optimizer in configure_optimizers; or freeze them with requires_grad_(False), which"
        " saves the time and memory of their gradients.",
        step=0,
        evidence={"parameters": ", ".join(names), "count": len(names)},
        source=NOTES,
    )
