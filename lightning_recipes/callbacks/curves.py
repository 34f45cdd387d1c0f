"""The curves of a training, drawn and read."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.measuring import (
    index_of,
    mean_over_ranks,
    means_over_ranks,
    read_at_once,
    read_if_free,
    share_before_save,
)
from lightning_recipes.callbacks.telling import show, tell
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_name
from lightning_recipes.core.curves import CS231N, CurvesRule
from lightning_recipes.core.early_stopping import EarlyStoppingRule, reading
from lightning_recipes.core.findings import Finding, listing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNREAD = 1000  # losses that are kept on the device until they are read together
FIRST_FIGURE = 1000  # batches; the next one at twice as many, and so on
DRAWN = 120  # points of the training curve in the figure
FIGURE = "learning_curves"
NAMES = ("val_loss", "valid_loss", "validation_loss", "val/loss", "valid/loss", "validation/loss")
TRAIN, VALIDATION, GREY = "#0072B2", "#D55E00", "#595959"  # told apart by the colour-blind, and in grey


class LearningCurves(pl.Callback):
    """Draw the training loss with its spread and the validation on the same axes, and say what the curves say.

    Takes what ``training_step`` returned at ``on_train_batch_end`` (a loss, or a dict with ``"loss"``; under manual
    optimization, too), and the validation loss at ``on_validation_end``. The training curve is kept as mean and
    standard deviation of the step losses, in at most 400 bins of as many batches each, however long the run.

    At the end of fit it tells, each as a finding with the measured numbers: the loss diverged, does not fall, rises,
    falls too slowly, or fell fast and then stayed (at a constant rate); a decay of the learning rate that came too
    early, or a rate that rises to the end; overfitting and since when; a best check in the first tenth or the last
    quarter, or a run of few checks that still falls; a validation that never improves, or jumps from check to check; a
    training loss far above it; a pattern that all epochs share (data that are not shuffled); and underfitting, as a
    warning if ``target_loss`` says what would be good. With several optimizers, which may work against each other, it
    is information that the training loss does not fall.
    At the first validation it tells of layers that are left in training mode. Where the noise does not allow it nothing
    is said, and nothing of a run of fewer than 100 batches; what an :class:`~lightning_recipes.EarlyStopping` beside it
    tells is left to that one. :meth:`findings` has the same at any moment.

    Shows the figure ``learning_curves`` after 1,000 batches, whenever their number has doubled, and at the end: in
    TensorBoard, or as PNG beside the logs (needs the extra ``plots``).

    Costs nothing in a step but keeping a reference to the loss; the losses are read together, at validations, at the
    end of an epoch, and every 1,000 batches. Under DDP they are the means over the ranks. Memory: 400 bins, 1,000
    losses, two numbers for each validation. The state resumes exactly.

    Attributes:
        rule: The curves, a :class:`~lightning_recipes.core.curves.CurvesRule`.

    Args:
        monitor: Name of the validation loss, lower is better; None for ``val_loss``, or else the metric whose name has
            ``val`` and ``loss`` in it.
        target_loss: A training loss that would be good enough, any number; None if nobody knows: then underfitting is
            information, told of a loss that is flat above a tenth of the first one.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If ``target_loss`` is not finite.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LearningCurves()], logger=False)

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023, "What can we learn from training curves":
        https://github.com/google-research/tuning_playbook
    """

    def __init__(self, monitor: str | None = None, target_loss: float | None = None) -> None:
        if monitor is not None:
            check_name("monitor", monitor, "a metric, or None")
        CurvesRule(target_loss)  # refuses bad arguments
        self.monitor, self.target_loss = monitor, target_loss
        self._forget()

    def _forget(self) -> None:
        """Start anew: what was seen of another training says nothing about this one."""
        self.rule = CurvesRule(self.target_loss)
        # Of each batch its loss, learning rate, updates before it, place in the epoch.
        self._unread: list[tuple[float | Tensor, float, int, float]] = []
        self._rate = math.nan
        self._looked_at_modes = False
        self._name = self.monitor or NAMES[0]
        self._drawn = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    # ---------------------------------------------------------------------------------- measure

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drawn = _doublings(self._batches)
        self.rule.competes = len(trainer.optimizers) > 1

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if index_of(trainer, optimizer) == 0:
            rate = optimizer.param_groups[0].get("lr")  # on the device if it is a tensor
            self._rate = rate if isinstance(rate, float) else math.nan

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        batches = trainer.num_training_batches
        place = batch_idx / batches if 0 < batches < math.inf else math.nan
        share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        value = read_if_free(loss)
        value = value if share == 1 else value * share  # a tensor that is multiplied costs an operation on its device
        self._unread.append((value, self._rate, trainer.global_step, place))
        if len(self._unread) >= UNREAD:
            self._read(trainer)
        if _doublings(self._batches) > self._drawn:
            self._read(trainer)
            self._drawn = _doublings(self._batches)
            self._show(trainer)

    @property
    def _batches(self) -> int:
        return self.rule.train.points + len(self._unread)

    def _read(self, trainer: pl.Trainer) -> None:
        """Read all losses at once, their means over the ranks."""
        self._share(trainer)
        unread, self._unread = self._unread, []
        for loss, rate, step, place in unread:
            self.rule.update(float(loss), rate, step, place)

    def _share(self, trainer: pl.Trainer) -> None:
        """Have the means over the ranks, in numbers."""
        means = means_over_ranks(trainer, [loss for loss, *_ in self._unread])
        self._unread = [
            (mean, rate, step, place) for mean, (_, rate, step, place) in zip(means, self._unread, strict=True)
        ]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._looked_at_modes or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._looked_at_modes = True
        awake = [name for name, module in pl_module.named_modules() if module.training and _depends_on_mode(module)]
        if awake:
            tell(trainer, _training_mode(awake, trainer.global_step))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._read(trainer)
        metrics = trainer.callback_metrics
        name = self.monitor or _name_of(metrics, "loss") or ""
        is_there = name in metrics
        if not trainer.strategy.reduce_boolean_decision(is_there, all=True):
            if self.monitor is not None or is_there:
                tell(trainer, _not_logged(name, sorted(metrics), trainer.global_step))
            return
        self._name = name
        accuracy = metrics.get(_name_of(metrics, "acc") or "", torch.tensor(math.nan))
        both = torch.stack([each.squeeze().to(accuracy.device).float() for each in (metrics[name], accuracy)])
        value, of_accuracy = mean_over_ranks(trainer, both).tolist()
        done, batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed, trainer.num_training_batches
        share = min(1.0, done / batches) if 0 < batches < math.inf else 1.0
        self.rule.check(value, trainer.global_step, trainer.current_epoch + share, of_accuracy)

    # ---------------------------------------------------------------------------------- tell

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run: Any = trainer  # connectors set some attributes
        self._read(trainer)
        if run.fast_dev_run:
            return
        beside = _told_beside(trainer)
        for finding in self.findings():
            if finding.rule not in beside:
                tell(trainer, finding)
        self._show(trainer)

    def findings(self) -> list[Finding]:
        """What the curves say so far, the gravest first: of all losses that have been read."""
        return self.rule.findings(self._name)

    def draw(self) -> "Figure":
        """The figure, of all losses that have been read; needs the extra ``plots``."""
        return draw_curves(self.rule, self._name)

    def _show(self, trainer: pl.Trainer) -> None:
        if self.rule.train.bins:
            show(trainer, FIGURE, self.draw)

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        share_before_save(trainer, self, checkpoint, self._share)

    @override
    def state_dict(self) -> dict[str, Any]:
        losses = read_at_once([loss for loss, *_ in self._unread])
        unread = [[loss, *where] for loss, (_, *where) in zip(losses, self._unread, strict=True)]
        return {
            "rule": self.rule.state_dict(),
            "unread": unread,
            "rate": self._rate,
            "name": self._name,
            "looked": self._looked_at_modes,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self._unread = [(loss, rate, step, place) for loss, rate, step, place in state_dict["unread"]]
        self._rate, self._looked_at_modes = state_dict["rate"], state_dict["looked"]
        self._name = self.monitor or state_dict["name"]


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module does something else in training mode."""
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return drops or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _training_mode(layers: Sequence[str], step: int) -> Finding:
    """Layers that are in training mode while the validation is measured."""
    return Finding(
        "training mode in validation",
        "warning",
        f"In validation layers are in training mode ({listing(layers)}): dropout drops, BatchNorm follows the"
        " validation data.",
        "Call eval() before validation, or leave the modes to the Trainer.",
        step,
        {"layers": len(layers)},
        CS231N,
    )


def _not_logged(monitor: str, metrics: Sequence[str], step: int) -> Finding:
    message = f"The validation logs no {monitor!r}, " + (f"but {', '.join(metrics)}" if metrics else "and nothing else")
    advice = "Set monitor to a metric that validation_step logs."
    if monitor in metrics:
        message, advice = f"Not every rank logs {monitor!r}", "Log it on all ranks, with sync_dist=True."
    return Finding(
        "no such metric",
        "warning",
        f"{message}: the curves are those of the training alone.",
        advice,
        step,
        {"monitor": monitor},
    )


def _doublings(batches: int) -> int:
    return (batches // FIRST_FIGURE).bit_length()


def _name_of(metrics: Mapping[str, Tensor], kind: str) -> str | None:
    """The validation metric of a kind; of several the usual name, or else the shortest."""
    if kind == "loss":
        usual = next((name for name in NAMES if name in metrics), None)
        if usual is not None:
            return usual
    named = [name for name in metrics if "val" in name.lower() and kind in name.lower()]
    return min(named, key=lambda name: (len(name), name), default=None)


def _told_beside(trainer: pl.Trainer) -> set[str]:
    """The rules of what an EarlyStopping of the same run tells at its end."""
    told = set()
    for callback in trainer.early_stopping_callbacks:
        rule = getattr(callback, "rule", None)
        if isinstance(rule, EarlyStoppingRule):
            stopped = getattr(callback, "stop_wish", False)
            finding = reading(rule.curve, callback.monitor, callback.mode, stopped)
            told |= {finding.rule} if finding is not None else set()
    return told


def draw_curves(rule: CurvesRule, name: str = "val_loss") -> "Figure":
    """Draw training loss (mean and spread), validation and learning rate over the updates; needs the extra ``plots``.

    Args:
        rule: Has the curves.
        name: Of the validation loss.
    """
    from matplotlib.figure import Figure

    both = list(zip(rule.train.coarse(DRAWN), rule.rates.coarse(DRAWN), strict=True))
    bins = [each for each, _ in both if each.count]
    rates = [(rate.last, rate.mean) for _, rate in both if rate.count]
    checks = [(step, value) for step, value in zip(rule.checks.steps, rule.checks.values, strict=True)]
    checks = [(step, value) for step, value in checks if math.isfinite(value)]
    accuracies = [(step, value) for step, value in zip(rule.checks.steps, rule.accuracies, strict=True)]
    accuracies = [(step, value) for step, value in accuracies if math.isfinite(value)]
    has_rate = any(rate > 0 for _, rate in rates)
    heights = [4.0] + [1.6] * bool(accuracies) + [1.1] * has_rate
    figure = Figure(figsize=(9, 1 + sum(heights)), layout="constrained")
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    loss = panels[0]
    steps, means = [each.last for each in bins], [each.mean for each in bins]
    spreads = [each.deviation for each in bins]
    values = [*means, *(value for _, value in checks)]
    lowest = min(values, default=0.0)
    logarithmic = lowest > 0 and max(values) > 20 * lowest
    floor = lowest / 3 if logarithmic else -math.inf
    low = [max(floor, mean - spread) for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    loss.fill_between(steps, low, high, color=TRAIN, alpha=0.22, linewidth=0, label="training, ± 1 standard deviation")
    loss.plot(steps, means, color=TRAIN, linewidth=1.6, label="training, mean")
    if checks:
        mark = "o" if len(checks) <= 60 else ""
        loss.plot(
            *zip(*checks, strict=True),
            color=VALIDATION,
            linewidth=1.6,
            linestyle="--",
            marker=mark,
            markersize=3.5,
            label=name,
        )
        best = min(checks, key=lambda check: check[1])
        loss.plot(
            *best,
            color=VALIDATION,
            marker="*",
            markersize=13,
            markeredgecolor="black",
            linestyle="",
            label=f"best: {best[1]:.4g} at step {best[0]:,}",
        )
    loss.set(ylabel="loss (log scale)" if logarithmic else "loss", yscale="log" if logarithmic else "linear")
    loss.legend(loc="best", frameon=False)
    if accuracies:
        panels[1].plot(*zip(*accuracies, strict=True), color=VALIDATION, linewidth=1.6, linestyle="--")
        panels[1].set(ylabel="validation\naccuracy")
    if has_rate:
        panels[-1].plot(*zip(*rates, strict=True), color=GREY, linewidth=1.4)
        panels[-1].set(ylabel="learning\nrate", ylim=(0, None))
    panels[-1].set(xlabel="update")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.ticklabel_format(axis="x", style="plain")
    return figure
