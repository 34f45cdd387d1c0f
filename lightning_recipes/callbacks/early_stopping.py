"""Stop at the right moment and leave with the best weights."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.early_stopping import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_recipes.callbacks.measuring import mean_over_ranks, means_over_ranks, read_if_free, share_before_save
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.substitute import substitute
from lightning_recipes.callbacks.telling import tell
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_choice, check_count, check_flag, check_name, check_real
from lightning_recipes.core.early_stopping import Criterion, EarlyStoppingRule, Patience, reading
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.names import doubt

BEST = "best_weights"  # beside state_dict in a checkpoint


class EarlyStopping(LightningEarlyStopping):
    """Stop the training when a metric has stopped improving, and leave with the best weights.

    Takes the place of Lightning's ``EarlyStopping``, with all its arguments and attributes, and checks where that one
    does. By default the noise of the metric is estimated from its own curve: only what exceeds it is an improvement,
    and a check counts against ``patience`` by how clearly it is worse than the best (in full from eight standard
    deviations on, at least a tenth). On a plateau at the start, where the metric wobbles within a tenth of its first
    value, no check counts. A curve without noise is judged as Lightning does. Nor does a check count without a new
    value, as after an epoch without validation, and a NaN is never an improvement. A wish to stop before the Trainer's
    ``min_epochs`` or ``min_steps`` waits for them, and is taken back if a check finds a new best value meanwhile and
    does not wish to stop itself. What others ask of the Trainer is left alone. Under DDP the mean over the ranks is
    judged.

    When fit ends, by itself, stopped, by an exception or Ctrl-C, the model gets the weights back that a checkpoint
    would have held at the best check: with ``EMAWeights`` those are the averaged ones that were validated. They are
    kept on the CPU (one copy of the ``state_dict``, made whenever the metric is better than before) and saved in
    checkpoints, which hold the trained weights as ever.

    At the start it tells of a ``mode`` that the name of the metric speaks against; at the end, what the curves say, if
    the noise lets them: overfitting and since when, a training loss that rises, a run far too long or too short. Costs
    an addition a step, for the mean of the training loss, and host reads at the checks alone.

    Attributes:
        rule: The curve of all checks, an :class:`~lightning_recipes.core.early_stopping.EarlyStoppingRule`.
        best_score: The metric at its best, with the weights that are kept.
        wait_count: Checks since the last improvement that exceeded the noise, or ``min_delta``.
        stopped_epoch: The epoch in which the training was stopped, 0 if it was not.
        stopping_reason: Lightning's ``EarlyStoppingReason``; ``PATIENCE_EXHAUSTED`` for every criterion.
        stopping_reason_message: The same in words.

    Args:
        monitor: Name of the metric.
        min_delta: ``"auto"``: judge by the noise of the curve. Or what an improvement has to exceed: a
            number, or a share of the absolute best value such as ``"1%"``; then every check counts alike, from the
            first on, as in Lightning.
        patience: Checks without an improvement after which to stop, at least 0.
        verbose: Log each improvement and the reason for the stop.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        strict: Raise an error if there is no such metric, or no ``train_monitor``.
        check_finite: Stop when the metric is NaN or infinite.
        stopping_threshold: Stop when the metric is better than this.
        divergence_threshold: Stop when the metric is worse than this.
        check_on_train_epoch_end: Check at the end of the training epoch, not of the validation; None to choose.
        log_rank_zero_only: Log on rank zero only.
        criterion: Decides in the place of ``patience``: one of those in ``lightning_recipes.core.early_stopping``
            (``Patience`` with other units, ``GeneralizationLoss``, ``ProgressQuotient``, ``SuccessiveRises``,
            ``AnyOf``, ``AllOf``) or your own.
        train_monitor: Name of a metric with the training loss, lower is better; None for the mean of what
            ``training_step`` returned since the check before.
        start_epoch: No check before this epoch counts, at least 0.
        restore_best_weights: Whether to leave with the best weights. Of several callbacks the first in the list
            decides, which is told if their metrics differ. Not possible under FSDP, ModelParallel and DeepSpeed.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.
        MisconfigurationException: When fit starts, if the best weights cannot be restored.

    Example:
        >>> trainer = pl.Trainer(callbacks=[EarlyStopping("val_loss")], logger=False)

    References:
        Prechelt, Early Stopping - But When?, 1998
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float | str = "auto",
        patience: int = 3,
        verbose: bool = False,
        mode: Literal["min", "max"] = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
        criterion: Criterion | None = None,
        train_monitor: str | None = None,
        start_epoch: int = 0,
        restore_best_weights: bool = True,
    ) -> None:
        thresholds = {"stopping_threshold": stopping_threshold, "divergence_threshold": divergence_threshold}
        for name, threshold in thresholds.items():
            if threshold is not None:
                check_real(name, threshold, float("-inf"), float("inf"))
        if check_on_train_epoch_end is not None:
            check_flag("check_on_train_epoch_end", check_on_train_epoch_end)
        super().__init__(
            check_name("monitor", monitor, "a metric"),
            0.0,
            check_count("patience", patience, 0),
            check_flag("verbose", verbose),
            check_choice("mode", mode, ("min", "max")),
            check_flag("strict", strict),
            check_flag("check_finite", check_finite),
            stopping_threshold,
            divergence_threshold,
            check_on_train_epoch_end,
            check_flag("log_rank_zero_only", log_rank_zero_only),
        )
        self.rule = EarlyStoppingRule(min_delta, mode)
        if criterion is not None and not isinstance(criterion, Criterion):
            raise TypeError(f"criterion must be one of lightning_recipes.core.early_stopping, got {criterion!r}")
        self.criterion = criterion
        if train_monitor is not None:
            check_name("train_monitor", train_monitor, "a metric, or None")
        self.train_monitor = train_monitor
        self.start_epoch = check_count("start_epoch", start_epoch, 0)
        self.restore_best_weights = check_flag("restore_best_weights", restore_best_weights)
        self._started = 0.0
        self._now: dict[str, Any] = {}  # where the training is at the check under way
        self._put_back: Callable[[], None] | None = None
        self._forget()

    @property
    def _judge(self) -> Criterion:
        return self.criterion or Patience(self.patience)

    def _signed(self, delta: float) -> float:
        """As Lightning keeps ``min_delta``."""
        return delta if self.mode == "max" else -delta

    # ---------------------------------------------------------------------------------- fit: start, step, end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    def _forget(self) -> None:
        """Start anew: what was seen of another training says nothing about this one."""
        self.rule = EarlyStoppingRule(self.rule.min_delta, self.mode)
        self.min_delta = self._signed(self.rule.least_improvement)
        self.best_score = torch.tensor(-self._signed(math.inf))
        self.wait_count = self.stopped_epoch = 0
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
        self.stop_wish = self._asked = False
        self._best_weights: dict[str, Any] | None = None
        self._seen: Any = None  # the metric's tensor at the last check: Lightning never lets go of an old one
        self._loss_sum: Tensor | float = 0.0  # of the training steps since the last check
        self._losses = 0
        self._validated = self._trained = False  # an epoch in this fit, at whose end its metrics are there

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        harm = "stop while the metric improves, and keep the worst weights"
        doubtful = doubt(self.monitor, self.mode, type(self).__name__, harm)
        if doubtful is not None:
            tell(trainer, doubtful)
        if not self.restore_best_weights:
            return
        if is_sharded(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot restore the best weights of a model in shards"
                f" ({type(trainer.strategy).__name__}): set restore_best_weights=False and take them from a"
                f" ModelCheckpoint(monitor={self.monitor!r}, mode={self.mode!r})"
            )
        restoring = _restoring(trainer)
        if restoring[:1] == [self] and len({each.state_key for each in restoring}) > 1:
            tell(trainer, _several([each.monitor for each in restoring], trainer.global_step))
        self._finish()
        teardown = trainer.strategy.teardown  # comes last, after an exception too

        def restore_and_teardown() -> None:
            if self._best_weights is not None:
                pl_module.load_state_dict(self._best_weights, strict=False)
            self._finish()
            teardown()

        self._put_back = substitute(trainer.strategy, "teardown", restore_and_teardown)

    def _finish(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        spent = self.rule.curve.seconds[-1] if self.rule.curve.seconds else 0.0
        self._started = time.monotonic() - spent
        self.stop_wish = self.stop_wish and not trainer.fit_loop._can_stop_early  # else a run that ended is resumed

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.train_monitor is None and isinstance(loss, Tensor):
            self._loss_sum += read_if_free(loss)
            self._losses += 1
        self._pass_on(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = True
        super().on_train_epoch_end(trainer, pl_module)
        self._pass_on(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored = self._best_weights is not None and _restoring(trainer)[:1] == [self]
        finding = reading(self.rule.curve, self.monitor, self.mode, self.stop_wish, restored=restored)
        if finding is not None:
            tell(trainer, finding)

    # ---------------------------------------------------------------------------------- a check

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = self._validated or not self._should_skip_check(trainer)
        super().on_validation_end(trainer, pl_module)

    @override
    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        run: Any = trainer  # connectors set some attributes
        metrics = trainer.callback_metrics
        if not trainer.strategy.reduce_boolean_decision(self.monitor in metrics, all=True):
            if trainer.enable_validation and not self._validated:
                return  # in epochs before the first validation
            metrics = {name: value for name, value in metrics.items() if name != self.monitor}  # one rank may have it
        if run.fast_dev_run or not self._validate_condition_metric(metrics):
            return
        value = metrics[self.monitor]
        if value is self._seen:
            return
        self._seen = value
        self._measure(trainer, metrics)
        current = mean_over_ranks(trainer, value.squeeze())
        should_stop, reason = self._evaluate_stopping_criteria(current)
        if self._put_back is not None and self.rule.improved:
            weights = trainer.strategy.lightning_module_state_dict()
            self._best_weights = {name: _on_cpu(tensor) for name, tensor in weights.items()}
        self._wish(trainer, trainer.strategy.reduce_boolean_decision(should_stop, all=False), reason)
        if reason and self.verbose:
            self._log_info(trainer, reason, self.log_rank_zero_only)

    def _measure(self, trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> None:
        """Note where the training is, for the check that follows."""
        if self.train_monitor is not None:
            if self.strict and self._trained and self.train_monitor not in metrics:
                raise RuntimeError(
                    f"train_monitor={self.train_monitor!r} is no metric that is logged; there are: {', '.join(metrics)}"
                )
            train = float(mean_over_ranks(trainer, torch.as_tensor(metrics.get(self.train_monitor, math.nan))))
        else:
            [total] = means_over_ranks(trainer, [self._loss_sum])
            train = total / self._losses * trainer.accumulate_grad_batches if self._losses else math.nan
        self._loss_sum, self._losses = 0.0, 0
        loop = trainer.fit_loop.epoch_loop
        batches = trainer.num_training_batches
        share = min(1.0, loop.batch_progress.current.completed / batches) if 0 < batches < math.inf else 1.0
        self._now = {
            "train": train,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch + share,
            "seconds": time.monotonic() - self._started,
            "counts": trainer.current_epoch >= self.start_epoch,
        }

    @override
    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        verdict = self.rule.update(current.item(), self._judge, **self._now)
        self.min_delta = self._signed(self.rule.least_improvement)
        before = self.stopping_reason if self.stop_wish else EarlyStoppingReason.NOT_STOPPED
        should_stop, reason = super()._evaluate_stopping_criteria(current)
        curve, improved = self.rule.curve, self.wait_count == 0
        self.best_score = current.new_tensor(curve.values[curve.best] * (1 if self.mode == "min" else -1))
        self.wait_count = len(curve.values) - 1 - curve.improvements[-1]
        if not self._now["counts"]:
            self.wait_count, verdict, should_stop = 0, None, False
        if should_stop and self.stopping_reason != EarlyStoppingReason.PATIENCE_EXHAUSTED:
            return True, reason  # not finite, or one of the thresholds
        if verdict is None:
            self.stopping_reason = before
            return False, reason if improved else None
        self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
        return True, f"Monitored metric {self.monitor} {verdict}. Best score: {self.best_score:.3f}."

    def _wish(self, trainer: pl.Trainer, stop: bool, reason: str | None) -> None:
        """Wish to stop, or take an earlier wish back."""
        if stop:
            self.stop_wish = True
            self.stopped_epoch, self.stopping_reason_message = trainer.current_epoch, reason
        elif self.stop_wish and not self._asked and self.rule.improved:
            self.stop_wish = False
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            self.stopped_epoch, self.stopping_reason_message = 0, None
        self._pass_on(trainer)

    def _pass_on(self, trainer: pl.Trainer) -> None:
        """Ask the Trainer to stop, as soon as it can: what it has been asked nobody can take back."""
        if self.stop_wish and trainer.fit_loop._can_stop_early:
            trainer.should_stop = self._asked = True

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["patience"]  # is configuration
        return {
            **state,
            "rule": self.rule.state_dict(),
            "loss_sum": float(self._loss_sum),
            "losses": self._losses,
            "wished_by": repr(self._judge) if self.stop_wish else None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})
        if "rule" in state_dict:  # Lightning's own has none
            self.rule.load_state_dict(state_dict["rule"])
            self._loss_sum, self._losses = state_dict["loss_sum"], state_dict["losses"]
            self.stop_wish = state_dict["wished_by"] == repr(self._judge)  # another one judges anew

    def _share(self, trainer: pl.Trainer) -> None:
        [self._loss_sum] = means_over_ranks(trainer, [self._loss_sum])  # exact: single precision in double

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        share_before_save(trainer, self, checkpoint, self._share)
        if self._best_weights is not None:
            checkpoint.setdefault(BEST, {})[self.state_key] = dict(self._best_weights)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._best_weights = checkpoint.get(BEST, {}).get(self.state_key)


def _restoring(trainer: pl.Trainer) -> list[EarlyStopping]:
    """Those that restore their best weights; the first of them has the last word."""
    every = [each for each in trainer.early_stopping_callbacks if isinstance(each, EarlyStopping)]
    return [each for each in every if each.restore_best_weights]


def _several(monitors: list[str], step: int) -> Finding:
    return Finding(
        rule="best weights of several metrics",
        severity="warning",
        message=f"EarlyStopping watches {', '.join(monitors)}: the model will leave with the weights that are best by"
        f" {monitors[0]}, the first in the list.",
        advice="Put the callback first whose weights you want, or set restore_best_weights=False for the others.",
        step=step,
    )


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
