"""Clip gradients at a percentile of their recent norms."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.batch_norm import KeptStatistics
from lightning_recipes.callbacks.measuring import (
    around_each_step,
    forget_norms,
    gradient_norm,
    index_of,
    read_if_free,
    scaler_of,
    whole_norm,
)
from lightning_recipes.callbacks.sharding import shard_group
from lightning_recipes.callbacks.telling import log_histogram, log_scalars, show, tell, time_to_log
from lightning_recipes.callbacks.tracking import gradients_of, parameters_of
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_flag
from lightning_recipes.core.clipping import PercentileThreshold, clipping_factor, scale_
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.per_optimizer import PerOptimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAYBOOK = "Deep Learning Tuning Playbook, gradient clipping: https://github.com/google-research/tuning_playbook"
FIRST_FIGURE = 1000  # updates; the next one at twice as many, and so on
HARMLESS = 0.95  # of their length is left of clipped gradients: the learning rate is not the matter
ENOUGH = 100  # updates of which a share is told
BARS_PER_OCTAVE = 8


class PercentileGradientClipping(pl.Callback):
    """Clip the gradients of each update at the 90th percentile of the gradient norms seen so far.

    Runs in ``on_before_optimizer_step``, once an update, on the global norm of the unclipped, unscaled, reduced
    gradients of each optimizer, sharded ones included; the threshold is that of
    :class:`~lightning_recipes.core.clipping.PercentileThreshold`: the exact percentile of the last ``window`` norms,
    kept within what most of the last 200 allow, so that neither an outlier nor a burst of them moves it, and right
    behind an outlier at most their median, so that the harm of a burst does not add up. During the first
    ``warmup_steps`` updates a gradient may be neither longer than twice the upper quartile (or four times the median)
    of the norms so far nor, during the first ten, than the weights were at the start. Works with automatic and manual
    optimization, accumulation and a GradScaler, whose skipped steps leave no trace.

    Logs, every ``log_every_n_steps``: ``grad_norm`` (before clipping), ``grad_norm_threshold`` and
    ``clipped_fraction`` (share of the window's updates that were clipped); with several optimizers each with
    ``/0``, ``/1``... behind it. After 1,000 updates, whenever their number has doubled and at the end: a figure
    ``grad_norm`` (norm and threshold over the updates, and the histogram of all norms) to TensorBoard or as PNG
    beside the logs (needs the extra ``plots``), and TensorBoard's histogram of all norms.

    Tells: more than half of the updates clipped (cut the learning rate, and by how much), gradients that were not
    finite, an optimizer that is stepped past Lightning and so past the clipping, and with ``measure_only`` the
    ``gradient_clip_val`` that it recommends.

    Costs one pass over the gradients for the norm. On a CPU the norm is read and only the updates above the
    threshold are scaled, another pass; elsewhere nothing is read but at the steps that log, or every 1,000 updates.
    Memory is ``window`` norms and at most 2,048 points of history. The state resumes bit for bit.

    Attributes:
        rule: The thresholds, a :class:`~lightning_recipes.core.clipping.PercentileThreshold` for each optimizer.
        in_trials: True: the trials of :class:`~lightning_recipes.WarmupSweep` have a copy of it.

    Args:
        percentile: Share of the norms at or below the threshold, in percent, at least 1, below 100.
        window: Updates that the percentile is taken of, at least 1.
        warmup_steps: Updates before the percentile is trusted, at least 0. With 0 the first gradient is not clipped.
        skip_nonfinite: Cancel an update whose gradient is not finite, on all ranks together, by setting the gradients
            to None, and with it what its batch did to the statistics of BatchNorm; the learning rate schedule and the
            step count go on. Costs one host read an update (and on several devices a collective). Without it the update
            takes place; either way it is counted and told.
        measure_only: Clip nothing, and at the end recommend a ``gradient_clip_val``.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.
        MisconfigurationException: When fit starts, if something else clips too or the gradients cannot be clipped
            from here (DeepSpeed, LBFGS).

    Example:
        >>> trainer = pl.Trainer(callbacks=[PercentileGradientClipping()], logger=False)

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023, "Gradient clipping":
        https://github.com/google-research/tuning_playbook
    """

    in_trials = True

    def __init__(
        self,
        percentile: float = 90.0,
        window: int = 1000,
        warmup_steps: int = 20,
        skip_nonfinite: bool = False,
        measure_only: bool = False,
    ) -> None:
        make = partial(PercentileThreshold, percentile, window, warmup_steps)
        make()  # refuses bad arguments
        self.rule: PerOptimizer[PercentileThreshold] = PerOptimizer(make)
        self.skip_nonfinite = check_flag("skip_nonfinite", skip_nonfinite)
        self.measure_only = check_flag("measure_only", measure_only)
        self._put_back: list[Callable[[], None]] = []  # takes away hooks when fit ends
        self._statistics = KeptStatistics()  # of BatchNorm
        self._measured: set[int] = set()  # optimizers about to step whose gradients were seen
        self._told: set[tuple[str, int]] = set()
        self._nonfinite_told: dict[int, int] = {}
        self._doublings: dict[int, int] = {}  # of the updates, when the last figure was drawn

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
            self.rule.rules.clear()  # another training's norms say nothing about this one's

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_conflicts(trainer, pl_module)
        forget_norms(trainer)
        self._measured, self._told = set(), set()
        self._watch(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._statistics = KeptStatistics(pl_module if self.skip_nonfinite else None)
        self._nonfinite_told = {index: self.rule[index].nonfinite for index in self.rule}
        self._doublings = {index: _doublings(self.rule[index].count) for index in self.rule}

    def _refuse_conflicts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{name} cannot see the gradients of DeepSpeed, whose engine keeps and clips them itself: remove it"
                " and set 'gradient_clipping' in the DeepSpeed config"
            )
        parameters = [parameter for optimizer in trainer.optimizers for parameter in parameters_of(optimizer)]
        if not any(parameter.requires_grad for parameter in parameters):
            raise MisconfigurationException(
                f"{name} has nothing to clip: no optimizer has a parameter that requires a gradient"
            )
        if self.measure_only:
            return
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"{name} replaces Trainer(gradient_clip_val={trainer.gradient_clip_val!r}), which would clip once more"
                " behind it: unset gradient_clip_val, or use measure_only=True"
            )
        defined_by = next(kind for kind in type(pl_module).__mro__ if "configure_gradient_clipping" in vars(kind))
        if pl_module.automatic_optimization and defined_by.__name__ != "LightningModule":
            raise MisconfigurationException(
                f"{name} replaces {type(pl_module).__name__}.configure_gradient_clipping, which would clip once more"
                " behind it: remove that method, or use measure_only=True"
            )
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{name} cannot clip for LBFGS, which takes several gradients in one update and compares them:"
                " remove it, or use measure_only=True"
            )

    def _watch(self, trainer: pl.Trainer) -> None:
        """Notice an optimizer that steps without ``on_before_optimizer_step``: its gradients were not clipped."""
        self._unwatch()
        for index, optimizer in enumerate(trainer.optimizers):
            if not hasattr(optimizer, "register_step_post_hook"):
                continue

            def stepped(index: int = index) -> None:
                if index not in self._measured:
                    self._tell_once(trainer, index, _unobserved(index))
                self._measured.discard(index)

            self._put_back.append(around_each_step(optimizer, stepped))

    def _unwatch(self) -> None:
        while self._put_back:
            self._put_back.pop()()
        self._statistics = KeptStatistics()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        index, scaler = index_of(trainer, optimizer), scaler_of(trainer)
        self._measured.add(index)
        norm: Any = gradient_norm(trainer, optimizer, self)
        if norm is None:
            return
        rule = self.rule[index]
        rule.counts_nonfinite = scaler is None
        weight_norm: Any = None
        if rule.weight_norm is None:
            weights = [parameter.detach() for parameter in parameters_of(optimizer)]
            weight_norm = read_if_free(whole_norm(weights, shard_group(trainer), trainer.strategy.root_device))
        decides = self.skip_nonfinite and scaler is None  # a GradScaler skips such an update by itself
        if decides and trainer.strategy.reduce_boolean_decision(not bool(norm < math.inf), all=False):
            norm = norm * math.nan  # on all ranks, so that their thresholds stay the same
            optimizer.zero_grad(set_to_none=True)
            self._statistics.put_back()
        elif decides:
            self._statistics.keep()
        threshold = rule.update(norm, weight_norm)

        if not self.measure_only:
            factor = clipping_factor(norm, threshold)
            if isinstance(factor, Tensor) or factor < 1:
                scale_(gradients_of(optimizer), factor)
        if time_to_log(trainer):
            self._log(trainer, index)
            self._tell(trainer, index)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for index in self.rule:
            self._tell(trainer, index, ended=True)
            self._show(trainer, index)
            if self.measure_only:
                self._tell_once(trainer, index, _recommendation(self.rule[index], index))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._unwatch()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unwatch()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])

    def _log(self, trainer: pl.Trainer, index: int) -> None:
        rule, suffix = self.rule[index], _suffix(trainer, index)
        rule.flush()
        if rule.count:
            scalars = {
                "grad_norm": rule.norms.arrived[-1],
                "grad_norm_threshold": rule.thresholds[-1],
                "clipped_fraction": rule.clipped_fraction(),
            }
            log_scalars(trainer, {f"{name}{suffix}": value for name, value in scalars.items()})
        if _doublings(rule.count) > self._doublings.get(index, 0):
            self._doublings[index] = _doublings(rule.count)
            self._show(trainer, index)

    def _tell(self, trainer: pl.Trainer, index: int, ended: bool = False) -> None:
        """Say what there is to say about an optimizer's norms; how many are not finite at first, and in the end."""
        rule = self.rule[index]
        rule.flush()
        told = self._nonfinite_told.get(index, 0)
        if rule.nonfinite >= max(1, 10 * told) and (ended or not told):
            self._nonfinite_told[index] = rule.nonfinite
            tell(trainer, _nonfinite(rule, index, self.skip_nonfinite))
        fraction = rule.clipped_fraction()
        if fraction > 0.5 and rule.count >= min(rule.window, ENOUGH):
            self._tell_once(trainer, index, _aggressive(rule, index, fraction))

    def _tell_once(self, trainer: pl.Trainer, index: int, finding: Finding) -> None:
        if (finding.rule, index) not in self._told:
            self._told.add((finding.rule, index))
            tell(trainer, finding)

    def _show(self, trainer: pl.Trainer, index: int) -> None:
        """The figure of an optimizer's norms, and TensorBoard's histogram of them."""
        rule, name = self.rule[index], f"grad_norm{_suffix(trainer, index)}"
        if not rule.count or not trainer.loggers:
            return
        log_histogram(trainer, name, rule.history.histogram())
        show(trainer, name, lambda: draw_norms(rule))


def _suffix(trainer: pl.Trainer, index: int) -> str:
    return f"/{index}" if len(trainer.optimizers) > 1 else ""


def _doublings(updates: int) -> int:
    return (updates // FIRST_FIGURE).bit_length()


def _unobserved(index: int) -> Finding:
    return Finding(
        rule="optimizer not observed",
        severity="warning",
        message=f"Optimizer {index} was stepped past Lightning, so its gradients are neither measured nor clipped.",
        advice="Step what self.optimizers() gives, not self.optimizers(use_pl_optimizer=False).",
        step=0,
    )


def _nonfinite(rule: PercentileThreshold, index: int, skipped: bool) -> Finding:
    fate = "were cancelled" if skipped else "clipping cannot mend"
    cure = "warm the learning rate up or cut it" if skipped else "skip_nonfinite=True cancels such updates"
    return Finding(
        rule="gradient not finite",
        severity="warning",
        message=f"The gradient of optimizer {index} was NaN or infinite in {rule.nonfinite} of"
        f" {rule.count + rule.nonfinite} updates, which {fate}.",
        advice=f"Look for an overflow, division or logarithm in the loss and for such values in the data; {cure}.",
        step=rule.count + rule.nonfinite,
        evidence={
            "nonfinite": rule.nonfinite,
            "updates": rule.count + rule.nonfinite,
            "decision": "cancelled" if skipped else "told",
        },
    )


def _aggressive(rule: PercentileThreshold, index: int, fraction: float) -> Finding:
    factor = rule.typical_factor()
    return Finding(
        rule="extremely aggressive clipping",
        severity="warning",
        message=f"{fraction:.0%} of the last {len(rule.thresholds)} updates of optimizer {index} had gradients above"
        f" the threshold and were cut to {factor:.1%} of their length at the median.",
        advice=f"Cut the learning rate instead, to about {factor:.0%} of what it is."
        if factor < HARMLESS
        else "That hardly shortens them, but their norms keep rising: watch them, and cut the learning rate if the loss"
        " rises, too.",
        step=rule.count,
        evidence={"clipped_fraction": fraction, "typical_factor": factor},
        source=PLAYBOOK,
    )


def _recommendation(rule: PercentileThreshold, index: int) -> Finding:
    value = float(f"{rule.history.percentile(rule.percentile):.3g}")
    recent = sum(norm > value for norm in rule.norms.arrived) / max(len(rule.norms.arrived), 1)
    evidence: dict[str, float | str] = {
        "gradient_clip_val": value,
        "share_above": rule.history.share_above(value),
        "share_above_last": recent,
    }
    if rule.count < max(ENOUGH, rule.nonfinite):
        message = f"Only {rule.count} of {rule.count + rule.nonfinite} gradient norms of optimizer {index} were finite."
        advice = f"Too few to recommend a gradient_clip_val: measure a stable run of at least {ENOUGH} updates."
        return Finding("no gradient_clip_val", "info", message, advice, rule.count, source=PLAYBOOK)
    return Finding(
        rule="recommended gradient_clip_val",
        severity="info",
        message=f"{rule.percentile:g} % of the {rule.count} gradient norms of optimizer {index} were at or below"
        f" {value:g}; of the last {len(rule.norms.arrived)}, {recent:.0%} were above it (see the figure grad_norm).",
        advice=f"Set Trainer(gradient_clip_val={value:g}); if the run stays unstable, less.",
        step=rule.count,
        evidence=evidence,
        source=PLAYBOOK,
    )


def draw_norms(rule: PercentileThreshold) -> "Figure":
    """Draw norm and threshold over the updates, and the histogram of all norms; needs the extra ``plots``."""
    from matplotlib.figure import Figure

    history = rule.history
    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, bars = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    steps = [history.updates_per_point * (point + 1) for point in range(len(history.low))]
    if history.updates_per_point > 1:
        curve.fill_between(steps, history.low, history.high, alpha=0.4, linewidth=0, label="gradient norm (range)")
    else:
        curve.plot(steps, history.high, linewidth=0.7, alpha=0.7, label="gradient norm")
    curve.plot(steps, history.thresholds, color="C3", linewidth=1.5, label="threshold")
    curve.set(xlabel="update", ylabel="gradient norm (unclipped)", yscale="log")
    curve.legend(loc="best")
    coarse: dict[int, int] = {}
    for low, _, count in history.histogram():
        if low > 0:
            octaves = math.floor(math.log2(low) * BARS_PER_OCTAVE)
            coarse[octaves] = coarse.get(octaves, 0) + count
    edges = [2 ** (octaves / BARS_PER_OCTAVE) for octaves in coarse]
    heights = [edge * (2 ** (1 / BARS_PER_OCTAVE) - 1) for edge in edges]
    bars.barh(edges, list(coarse.values()), height=heights, align="edge")
    percentile = history.percentile(rule.percentile)
    label = f"{rule.percentile:g} % of all: {percentile:.3g}"
    bars.axhline(percentile, color="black", linewidth=1, linestyle="--", label=label)
    bars.set(xlabel="updates")
    bars.legend(loc="best")
    return figure
