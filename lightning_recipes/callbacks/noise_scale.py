"""Measure the gradient noise scale while a training goes on."""

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_recipes.callbacks.measuring import (
    examples_in,
    forget_norms,
    gradient_norm,
    mean_over_ranks,
    read_at_once,
    scaler_of,
)
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.telling import log_scalars, tell, time_to_log
from lightning_recipes.callbacks.tracking import gradients_of, parameters_of
from lightning_recipes.callbacks.unused import pass_over, pass_over_unused
from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.clipping import total_norm
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.noise_scale import ENOUGH, PAPER, NoiseScaleRule

UNREAD = 100  # updates at most until they are read
MEASURING = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step")
EVERY = 4  # updates of which one is measured where every parameter needs a hook of its own

NOT_MEASURED = Finding(
    rule="noise scale not measured",
    severity="info",
    message="The gradient noise scale needs two gradients of an update: of a micro-batch and of the whole.",
    advice="Set accumulate_grad_batches to 2 or more (with smaller batches), or train on several devices with DDP; with"
    " manual optimization it cannot be measured.",
    step=0,
    source=PAPER,
)


@dataclass(slots=True)
class _Pair:
    """Two squared norms of an update that are not read yet, of a batch and of ``batches`` that are as large."""

    small: Any
    large: Any
    size: Any  # examples in a batch, the mean over the ranks; 0 on one that has no such pair
    squared_size: Any
    batches: int


class GradientNoiseScale(pl.Callback):
    """Estimate the gradient noise scale from gradients that the training computes anyway.

    The noise scale ``S / |G|^2`` is the trace of the covariance of one example's gradient over the squared length of
    the true gradient, in examples. At a batch of that size noise and gradient are equally long: far below it a larger
    batch saves updates almost in proportion, far above it examples are wasted. It grows as the loss falls. An example
    is what the batch counts: an image, or a sequence of tokens. Dropout and augmentation are part of the noise.

    Each update gives one pair of estimates from two squared norms (McCandlish et al., appendix A.1), ``S`` and
    ``|G|^2``, which are averaged separately over the last ``window`` updates and then divided:

    - with ``accumulate_grad_batches``: after the first micro-batch (``on_after_backward``; under DDP that of each rank,
      which is not reduced yet) and before the update;
    - with DDP alone: of each rank's own gradient before it is reduced, which hooks on the parameters see, and of the
      reduced one, at every fourth update.

    Where there is neither, or under manual optimization, nothing is measured, and a finding says so once. Updates with
    micro-batches of different sizes (a short last one, or another rank's), without a loss, or with a gradient that is
    not finite are left out, so that updates a GradScaler skips are none.

    Logs, every ``log_every_n_steps`` once a hundred updates (or the window) were measured: ``gradient_noise_scale``,
    but not where the standard error of ``|G|^2`` is above half of it, as it is near convergence; and
    ``gradient_noise_scale_at_least``, the lower end of the 95 % interval. Near convergence, where few examples carry
    the gradient, that interval is too narrow for few updates.

    Tells, at the end: the noise scale with its error, or ``>= x`` where only a bound is known, and whether the
    effective batch is small or large against it.

    Costs one more pass over the gradients at an update (the norm of the whole is measured once for this callback, the
    clipping and ``InstabilityDetector``), no copy of them, and a host read at the steps that log. Under DDP a sum over
    the ranks of three numbers, and in the second case a small norm for each parameter. The training is left bit for bit
    as it is.

    Attributes:
        rule: A :class:`~lightning_recipes.core.noise_scale.NoiseScaleRule`; ``rule.estimate()`` is the newest estimate.

    Args:
        window: Updates that ``S`` and ``|G|^2`` are averaged over, at least 2. Fifty give an error of about 30 %, four
            hundred of 10 %.
        batch_size: Examples in a micro-batch of one rank, at least 1. Without it the first dimension of the first
            tensor in the batch.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.
        MisconfigurationException: When fit starts, under DeepSpeed or with a model in shards, whose local gradients
            cannot be seen.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradientNoiseScale()], accumulate_grad_batches=4, logger=False)

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018: https://arxiv.org/abs/1812.06162
    """

    def __init__(self, window: int = 400, batch_size: int | None = None) -> None:
        self.rule = NoiseScaleRule(window)
        self.batch_size = batch_size if batch_size is None else check_count("batch_size", batch_size, 1)
        self._handles: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        """Start anew: what was seen of another training says nothing about this one."""
        self.rule = NoiseScaleRule(self.rule.window)
        self._measures = False  # whether an update has two gradients
        self._unread: list[_Pair] = []
        self._begin()

    def _begin(self) -> None:
        """Begin the next update."""
        self._unhook()
        self._sizes: list[int] = []  # of the micro-batches since the last update
        self._backwards = 0  # since then
        self._small: Tensor | None = None  # squared norm of the first micro-batch's gradient
        self._hooked = False  # whether it is seen before it is reduced

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy) or is_sharded(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot see the local gradients of {type(trainer.strategy).__name__}: use it"
                " with DDP or on one device, and remove it here"
            )
        forget_norms(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()
        run: Any = trainer  # connectors set some attributes
        scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in run.callbacks)
        has_two = trainer.accumulate_grad_batches > 1 or scheduled or self._has_replicas(trainer)
        self._measures = has_two and pl_module.automatic_optimization
        if not self._measures:
            pass_over(trainer, self, GradientNoiseScale, MEASURING)
            tell(trainer, NOT_MEASURED)

    def _has_replicas(self, trainer: pl.Trainer) -> bool:
        return isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 1

    # ---------------------------------------------------------------------------------- measure

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._measures:
            return
        self._sizes.append(self.batch_size or examples_in(batch))
        alone = trainer.accumulate_grad_batches == 1 and self._has_replicas(trainer)
        if alone and trainer.global_step % EVERY == 0:
            self._hook(trainer)

    def _hook(self, trainer: pl.Trainer) -> None:
        """Sum the squares of this rank's gradients as they come, before DDP reduces them."""
        self._unhook()
        self._small, self._hooked = None, True

        def see(gradient: Tensor) -> None:
            square = total_norm([gradient.detach()]).to(trainer.strategy.root_device) ** 2
            self._small = square if self._small is None else self._small + square

        for each in parameters_of(trainer.optimizers[0]):
            parameter: Any = each  # register_hook has no types
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(see))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._measures:
            return
        self._unhook()
        self._backwards += 1
        shares = trainer.accumulate_grad_batches  # by which the loss is divided
        if self._backwards == 1 and shares > 1:
            self._small = (total_norm(gradients_of(trainer.optimizers[0])) * shares) ** 2

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._measures:
            return
        norm = gradient_norm(trainer, optimizer, self)  # to be asked for at every update
        pair = self._pair(trainer, norm)
        if pair is not None:
            self._unread.append(pair)
        self._begin()
        if len(self._unread) >= UNREAD:
            self._read()
        if time_to_log(trainer):
            self._log(trainer)

    def _pair(self, trainer: pl.Trainer, norm: float | Tensor | None) -> _Pair | None:
        """Both squared norms, of mean gradients over examples, unscaled; the same on all ranks, all of which ask."""
        sizes, ranks, shares = self._sizes, trainer.world_size, trainer.accumulate_grad_batches
        if not (len(sizes) > 1 if shares > 1 else self._hooked):
            return None
        alike = min(sizes) == max(sizes) and len(sizes) == self._backwards
        known = alike and self._small is not None and norm is not None
        if ranks == 1 and not known:
            return None
        size: Any = sizes[0] if known else 0
        small: Any = self._unscaled_small(trainer)
        squared_size: Any = size**2
        if ranks > 1:  # the sizes of another rank's micro-batches are known to nobody else
            both = small.new_tensor([size, squared_size])
            small, size, squared_size = mean_over_ranks(trainer, torch.cat([small.reshape(1), both])).unbind()
        large = 0.0 if norm is None else (norm * (shares / len(sizes))) ** 2
        return _Pair(small, large, size, squared_size, len(sizes) * ranks)

    def _unscaled_small(self, trainer: pl.Trainer) -> Tensor:
        """0 on a rank that has seen no gradient."""
        small = torch.zeros((), device=trainer.strategy.root_device) if self._small is None else self._small.detach()
        scaler = scaler_of(trainer)
        return small if scaler is None else small / scaler.scale(torch.ones_like(small)) ** 2

    # ---------------------------------------------------------------------------------- ask, tell

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = read_at_once(
            [value for each in unread for value in (each.small, each.large, each.size, each.squared_size)]
        )
        for each, small, large, size, squared_size in zip(
            unread, values[::4], values[1::4], values[2::4], values[3::4], strict=True
        ):
            if size > 0 and math.isclose(size**2, squared_size, rel_tol=1e-6):  # the same on all ranks
                self.rule.update(small, large, int(size), int(size) * each.batches)

    def _log(self, trainer: pl.Trainer) -> None:
        self._read()
        scale = self.rule.estimate()
        if scale.updates < min(ENOUGH, self.rule.window):
            return
        scalars = {"gradient_noise_scale": scale.value} if scale.is_certain else {}
        if scale.low > 0:
            scalars["gradient_noise_scale_at_least"] = scale.low
        if scalars:
            log_scalars(trainer, scalars)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read()
        finding = self.rule.finding(trainer.global_step)
        if finding is not None:
            tell(trainer, finding)
        self._begin()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._begin()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._begin()

    @override
    def state_dict(self) -> dict[str, Any]:
        measured = [(each.small, each.large, each.size, each.squared_size, each.batches) for each in self._unread]
        unread = [[float(value) for value in each] for each in measured]
        return {"rule": self.rule.state_dict(), "unread": unread}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self._unread = [
            _Pair(small, large, size, squared_size, int(batches))
            for small, large, size, squared_size, batches in state_dict["unread"]
        ]
