"""Stuck? Look at the loss around the weights: minimum, saddle, walls, noise, or a slope after all."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.measuring import (
    loss_of_update,
    mean_over_ranks,
    means_over_ranks,
    read_at_once,
    read_if_free,
    share_before_save,
)
from lightning_recipes.callbacks.replay import in_full, on_copies, step_arguments, without_trace
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.substitute import substitute
from lightning_recipes.callbacks.telling import log_scalars, tell
from lightning_recipes.callbacks.tracking import parameters_of
from lightning_recipes.callbacks.trials import seed_all
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_count, check_flag
from lightning_recipes.core.curvature import COHEN, judge, measure, sharpness
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.hessian import LossSurface, Steps, steps_of
from lightning_recipes.core.stalls import StallRule

T = TypeVar("T")

RANDOM = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)  # what drops out in training
ONCE = (nn.SyncBatchNorm,)  # has no second derivative in training


class CriticalPointProbe(pl.Callback):
    """Say what a training is stuck at: a local minimum, a saddle, the walls of a valley, the noise, or nothing.

    When the training loss has stopped falling (see :class:`~lightning_recipes.core.stalls.StallRule`), it measures
    on a sample of training batches the gradient against its own noise, both ends of the Hessian's spectrum with bounds
    on their errors, the largest curvature against what the optimizer can follow at its learning rate, and what steps
    along the most negative curvature do to the loss. The verdict (:func:`~lightning_recipes.core.curvature.verdict`) is
    a finding: a warning for walls and for a saddle with a way out that lowers the loss by 1 %, for information else.
    When training ends, it tells how sharp the point is that it ended at.

    The loss is that of ``training_step`` on the first batches that were seen, always the same (a resumed run takes the
    first that it sees itself), with the penalty that weight decay stands for. It is computed on copies of parameters
    and buffers, in float32 at least and without autocast, with attention in its mathematical form. Dropout is off;
    other layers are as in training (BatchNorm uses the statistics of the batch, SyncBatchNorm those of the run); other
    random numbers are the same each time. The run is left bit for bit as it was, with whatever the module holds (see
    :func:`~lightning_recipes.callbacks.unchanged.unchanged`). Under DDP the sample is that of all ranks. With manual
    optimization there is no loss to look at, and nothing is measured, unless a subclass has a method ``loss(pl_module,
    batch, batch_idx)``: then all parameters of all optimizers are looked at together.

    Logs with each look ``sharpness`` (largest curvature), ``smallest_curvature``, ``sharpness_over_limit`` (the largest
    curvature in the metric of SGD, RMSprop, Adam or AdamW over the limit of its stability; for gradient descent the
    learning rate times the sharpness over 2) and ``relative_gradient`` (|gradient| |weights| / loss); at the end the
    first and the third.

    A look takes 15 to 130 Hessian-vector products on networks of a thousand parameters (at most ``max_products`` for
    each of its spectra: one with SGD, two with other optimizers, whose second takes about 10), and one for each batch
    where the gradient is not small; at the end of a training about 10. A product is one to two gradients of each batch
    of the sample while the graphs of the first derivatives fit into half a GiB, else two to three. A stall is not
    looked at before all looks so far have cost a tenth of the run's own gradients at most, nor before ``patience``
    updates or half of all so far after the last: all but one look together cost that tenth. ``every_n_steps`` looks
    whatever it costs. Memory during a look, beyond those graphs: ``max_products`` vectors of the size of the
    parameters or half a GiB of them (at least 30), ``batches + 10`` more, and the activations of one batch two to
    three times; else the sample, on the host. A step reads nothing back; the losses are read ten times in ``patience``
    updates.

    Attributes:
        rule: A :class:`~lightning_recipes.core.stalls.StallRule`.
        finding: The newest verdict, None before the first of this process.

    Args:
        every_n_steps: Look every so many optimizer updates, too, whether the loss falls or not; at least 1. No look
            before the sample is full.
        patience: Updates over which the loss has not fallen, at least 20.
        batches: Batches of the sample, on each rank, at least 1; below 3 there is no telling the noise.
        max_products: Hessian-vector products for a spectrum, at least 1. It takes as many as it needs: up to 150 on
            networks of a few thousand parameters, for both ends to be exact to 1 % (the smallest, where it is next to
            nothing, to 1e-3 of the largest); 10 to 15 do for the largest.
        at_end: Look at the sharpness when training ends.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range.
        MisconfigurationException: When fit starts with a model in shards (FSDP, ModelParallel, DeepSpeed).

    Example:
        >>> trainer = pl.Trainer(callbacks=[CriticalPointProbe()], logger=False)

    References:
        Dauphin et al., Identifying and attacking the saddle point problem, 2014: https://arxiv.org/abs/1406.2572
        Cohen et al., Gradient Descent Typically Occurs at the Edge of Stability, 2021:
        https://arxiv.org/abs/2103.00065
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        patience: int = 500,
        batches: int = 8,
        max_products: int = 150,
        at_end: bool = True,
    ) -> None:
        self.every_n_steps = None if every_n_steps is None else check_count("every_n_steps", every_n_steps, 1)
        self.patience = check_count("patience", patience, 20)
        self.batches = check_count("batches", batches, 1)
        self.max_products = check_count("max_products", max_products, 1)
        self.at_end = check_flag("at_end", at_end)
        self._put_back: Callable[[], None] | None = None
        self._forget()

    def _forget(self) -> None:
        """Start anew: what was seen of another training says nothing about this one."""
        self.rule = StallRule(self.patience)
        self.finding: Finding | None = None
        self._sample: dict[int, Any] = {}  # batches on the host by their numbers
        self._candidate: Any = None
        self._losses: list[Tensor] = []  # of the backward passes since the last update
        self._unread: list[float | Tensor] = []  # of updates
        self._is_stalled = self._is_due = False
        self._told = ""  # the verdict
        self._able = True

    # ---------------------------------------------------------------------------------- fit: start and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run: Any = trainer  # connectors set some attributes
        if is_sharded(trainer) or isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot differentiate a model in shards twice"
                f" ({type(trainer.strategy).__name__}): look at a smaller one, whole on each device"
            )
        self._able = not run.fast_dev_run
        if not pl_module.automatic_optimization and type(self).loss is CriticalPointProbe.loss:
            self._give_up(trainer, "the module optimizes manually", "Give a subclass of the callback a method `loss`.")
        if any(parameter.is_complex() for parameter in pl_module.parameters()):
            self._give_up(trainer, "parameters are complex", "Hold their real and imaginary parts if you want to look.")
        self._finish()
        end = trainer.fit_loop.on_run_end

        def look_and_end() -> None:  # before the hooks in which an average takes the place of the weights
            self._finish()
            if self._able and self._is_due:
                self._look(trainer, pl_module)
            if self.at_end:
                self._look_at_the_end(trainer, pl_module)
            self._sample = {}
            end()

        self._put_back = substitute(trainer.fit_loop, "on_run_end", look_and_end)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()
        self._sample, self._losses = {}, []

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    # ---------------------------------------------------------------------------------- when to look

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._able:
            return
        is_full = len(self._sample) >= min(self.batches, trainer.num_training_batches) or batch_idx == 0
        if self._is_due and is_full:  # behind whatever the others have done at the end of the last batch
            self._look(trainer, pl_module)
        if len(self._sample) < self.batches and batch_idx not in self._sample:  # it would come again
            self._candidate = self._copied(trainer, batch)

    def _copied(self, trainer: pl.Trainer, batch: Any) -> Any:
        """A copy on the host; None, which is told, if there is none."""
        try:
            return move_data_to_device(copy.deepcopy(batch), torch.device("cpu"))  # some batches move themselves
        except Exception as error:
            self._give_up(
                trainer,
                f"a batch could not be copied ({type(error).__name__}: {_first_line(error)})",
                "Have batches that copy.deepcopy copies: tensors without a graph.",
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None and (outputs or not pl_module.automatic_optimization):  # not passed over
            self._sample[batch_idx] = candidate

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._able:
            self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        if not losses:
            return
        self._unread.append(read_if_free(loss_of_update(trainer, losses)))
        updates = self.rule.updates + len(self._unread)
        if updates % self.rule.every == 0:
            self._read(trainer)
        if self.every_n_steps is not None and updates % self.every_n_steps == 0:
            self._is_due = True

    def _read(self, trainer: pl.Trainer) -> None:
        losses, self._unread = means_over_ranks(trainer, self._unread), []
        for loss in losses:
            if self.rule.update(loss):
                self._is_stalled = self._is_due = True

    def _share(self, trainer: pl.Trainer) -> None:
        self._unread = [*means_over_ranks(trainer, self._unread)]

    # ---------------------------------------------------------------------------------- look

    def loss(self, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
        """The training loss of a batch, which what is looked at is the mean of."""
        output = pl_module.training_step(*step_arguments(pl_module, batch, batch_idx))
        loss: Any = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {loss!r} for a batch that it had a loss for")
        return loss

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._sample:
            return
        is_stalled, self._is_stalled, self._is_due = self._is_stalled, False, False
        measured = self._measured(
            trainer,
            pl_module,
            partial(
                measure,
                max_products=self.max_products,
                share=len(self._sample) / trainer.num_training_batches,
                batches_per_update=trainer.accumulate_grad_batches * trainer.world_size,
                ranks=trainer.world_size,
            ),
        )
        if measured is None:
            return
        surface, point = measured
        self.rule.charge(surface.work / trainer.accumulate_grad_batches)
        log_scalars(
            trainer,
            {
                "sharpness": point.spectrum.largest,
                "smallest_curvature": point.spectrum.smallest,
                "sharpness_over_limit": point.over_limit.value,
                "relative_gradient": point.relative_gradient(point.slope.value),
            },
        )
        self.finding = judge(point, trainer.global_step, True if is_stalled else self.rule.is_flat)
        if is_stalled or self.finding.rule != self._told:
            tell(trainer, self.finding)
        self._told = self.finding.rule

    def _look_at_the_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._able or not self._sample:
            return
        measured = self._measured(trainer, pl_module, partial(sharpness, max_products=self.max_products))
        if measured is None:
            return
        surface, (spectrum, over_limit) = measured
        log_scalars(trainer, {"sharpness": spectrum.largest, "sharpness_over_limit": over_limit.value})
        ratio = over_limit.value  # 0 where the learning rate has decayed to 0, which can stay anywhere
        limit = f", {ratio:.2g} of what the optimizer can stay at" if 0 < ratio < math.inf else ""
        tell(
            trainer,
            Finding(
                rule="sharpness",
                severity="info",
                message=f"Training ended where the largest curvature is {spectrum.largest:.3g}{limit}.",
                advice="Compare it with other runs of this network: flatter ends often generalise better, and higher"
                " learning rates or smaller batches end flatter.",
                step=trainer.global_step,
                evidence={
                    "sharpness": spectrum.largest,
                    "sharpness_error": spectrum.largest_error,
                    "sharpness_over_limit": over_limit.value,
                    "products": surface.products,
                },
                source=COHEN,
            ),
        )

    def _measured(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, what: Callable[[LossSurface, Steps | None], T]
    ) -> tuple[LossSurface, T] | None:
        """What is measured on the surface; None, which is told, if that fails."""
        surface: LossSurface | None = None
        try:
            with self._surface(trainer, pl_module) as (surface, steps):
                return surface, what(surface, steps)
        except Exception as error:
            if trainer.world_size > 1 and not isinstance(error, ArithmeticError):
                raise  # of several ranks one may wait for another
            self._fail(trainer, error, None if surface is None else surface.failure)
        return None

    @contextmanager
    def _surface(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Iterator[tuple[LossSurface, Steps | None]]:
        """The loss of the sample around the weights, and the steps of the optimizers there."""
        parameters = {
            id(parameter): parameter
            for optimizer in trainer.optimizers
            for parameter in parameters_of(optimizer)
            if parameter.requires_grad
        }
        with ExitStack() as put_back:
            put_back.enter_context(without_trace(pl_module))
            copies = put_back.enter_context(on_copies(pl_module))
            put_back.enter_context(torch.enable_grad())
            put_back.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others cannot be differentiated twice
            if isinstance(trainer.precision_plugin, DoublePrecision):
                put_back.enter_context(trainer.precision_plugin.train_step_context())
            if "torch._dynamo" in sys.modules:
                put_back.enter_context(torch.compiler.set_stance("force_eager"))  # likewise
            for module in pl_module.modules():
                if isinstance(module, nn.RNNBase):
                    put_back.enter_context(torch.backends.cudnn.flags(enabled=False))  # likewise
                if isinstance(module, (*RANDOM, *ONCE)):
                    module.training = False
            here = [parameter for number, parameter in parameters.items() if number in copies]
            surface = LossSurface(
                [partial(self._loss_of, pl_module, *taken) for taken in enumerate(self._sample.items())],
                [copies[id(parameter)] for parameter in here],
                partial(mean_over_ranks, trainer),
            )
            yield surface, steps_of(trainer.optimizers, here)

    def _loss_of(self, pl_module: pl.LightningModule, seed: int, taken: tuple[int, Any]) -> Tensor:
        batch_idx, batch = taken
        batch = move_data_to_device(copy.deepcopy(batch), pl_module.device)  # a step may change it
        seed_all(seed)
        return self.loss(pl_module, apply_to_collection(batch, Tensor, in_full), batch_idx).reshape(())

    def _fail(self, trainer: pl.Trainer, error: Exception, failure: Exception | None) -> None:
        """Tell of an error, which that of a loss or its derivatives may be behind."""
        if isinstance(error, ArithmeticError) and failure is None:
            self._give_up(trainer, str(error), "See what else is told of this run; it is not looked at again.")
            return
        cause = failure or error
        self._give_up(
            trainer,
            f"a loss could not be computed and differentiated twice ({type(cause).__name__}: {_first_line(cause)})",
            "Use an operation that has a second derivative, or fewer and smaller batches if memory was short.",
        )

    def _give_up(self, trainer: pl.Trainer, reason: str, advice: str) -> None:
        if self._able:
            self._able = False
            tell(trainer, Finding("curvature not measured", "info", f"No look: {reason}.", advice, trainer.global_step))

    # ---------------------------------------------------------------------------------- checkpoints

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        share_before_save(trainer, self, checkpoint, self._share)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule.state_dict(),
            "unread": read_at_once(self._unread),
            "is_stalled": self._is_stalled,
            "is_due": self._is_due,
            "told": self._told,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self._unread = list(state_dict["unread"])
        self._is_stalled, self._is_due = state_dict["is_stalled"], state_dict["is_due"]
        self._told = state_dict["told"]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
