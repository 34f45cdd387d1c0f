"""Notice an instability at the step at which it happens, and act on it."""

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.batch_norm import KeptStatistics
from lightning_recipes.callbacks.learning_rates import scale_learning_rates
from lightning_recipes.callbacks.measuring import (
    cancel_,
    examples_in,
    forget_norms,
    free_to_read,
    gradient_norm,
    index_of,
    loss_of_update,
    means_over_ranks,
    read_if_free,
    scaler_of,
    share_before_save,
)
from lightning_recipes.callbacks.replay import first_broken_module
from lightning_recipes.callbacks.sharding import is_sharded
from lightning_recipes.callbacks.telling import note, tell, time_to_log
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_choice, check_count, check_real
from lightning_recipes.core.clipping import total_norm
from lightning_recipes.core.findings import Finding
from lightning_recipes.core.instability import Instability, InstabilityRule
from lightning_recipes.core.per_optimizer import PerOptimizer

PLAYBOOK = "Deep Learning Tuning Playbook, optimization failures: https://github.com/google-research/tuning_playbook"
UNREAD = 1000  # updates at most until they are judged
AGAIN = 100  # updates without it until an instability of a kind is told again
KEPT = 2  # good states to go back to
JUMPS = ("not finite", "spike", "burst", "exploding gradient")  # of one update, which can be cancelled
REST = (
    "another optimizer, x + f(Norm(x)) instead of Norm(x + f(x)) with f starting at 0, and a lower learning rate last"
)
ORDER = f"in this order: warmup, gradient clipping, {REST}"
CURES = {
    "not finite": "Look for an overflow, a division or a logarithm in the loss and for such values in the data.",
    "spike": f"If it comes again, {ORDER}.",
    "burst": f"Look at these batches; if they are sound, {ORDER}.",
    "exploding gradient": f"Clip the gradients (PercentileGradientClipping); else, in this order: warmup, {REST}.",
    "vanishing gradient": "Units have died or saturated: warm up or cut the learning rate, look at initialisation and"
    " normalisation, and use residual connections.",
    "no progress": "Check labels and loss (can a small sample be overfitted?), and warm up or cut the learning rate.",
    "divergence": f"Stabilise the training, {ORDER}.",
    "early instability": "Warm the learning rate up, longer if it is already; else, in this order: gradient clipping,"
    f" {REST}.",
    "GradScaler storm": "Train in bfloat16, or look for values that half precision cannot hold.",
}


class TrainingInstability(RuntimeError):
    """Raised by ``InstabilityDetector(action="raise")``."""


@dataclass(slots=True)
class _Update:
    """What is known of an update when it is about to be made; tensors are not read yet."""

    optimizer: int
    loss: Any
    norm: Any
    examples: float
    rate: float
    step: int
    epoch: int
    batch_idx: int
    has_loss: bool = True


class InstabilityDetector(pl.Callback):
    """Judge the loss and the gradient norm of every update, tell the kinds of instability apart, and act.

    What is noticed, and by which rule, is said in :class:`~lightning_recipes.core.instability.InstabilityRule`. Seen is
    the loss of each optimizer's update (the mean of its micro-batches, unscaled, over all ranks) and the norm of its
    unclipped gradient, which ``PercentileGradientClipping`` and this callback measure once for both.

    Each instability is a finding, with the cure in the playbook's order, and a line of ``findings.jsonl``: step, epoch,
    batch index, signal, value, expected range and what was decided. One kind is told again when there was none for 100
    updates; of updates cancelled in a row the first has a line. Where it can be read at once (``action`` other than
    ``"warn"`` and ``"stop"``, or on a CPU), it also says where a value is not finite: in which tensor of the batch,
    parameter, gradient or optimizer state, or else, on one device and by one more ``training_step`` that leaves no
    trace, in which module of the forward pass; and of an exploding gradient which parameters have most of it. With
    several optimizers, which may be adversaries, a loss that rises is information and no warning; of a loss that is no
    measure of progress, as that of a policy gradient, this callback is better left out. One backward pass may serve
    several optimizers; of one that Lightning does not see (``loss.backward()``) only a gradient that is not finite is
    noticed.

    The actions:

    - ``"warn"``: only tell. Reads nothing back but at the steps that log, when the updates since the last are judged;
      on a CPU one that is not finite, or whose gradient may have exploded, is judged at once.
    - ``"skip"``: cancel an update with a value that is not finite, a spike, a burst or an exploding gradient, on all
      ranks together, by setting the gradients to None, and with it what its batch did to the statistics of BatchNorm.
      What comes thirty times in a row, or five times apart from each other within a hundred updates, is no accident but
      what the training is now, as where a curriculum gets harder: it is told as a divergence, and but for what is not
      finite nothing is cancelled until a hundred updates had none of it. Costs a host read an update, and over ranks a
      collective.
    - ``"rewind"``: go back to the last good state: parameters, buffers, optimizers, learning rate schedules, GradScaler
      and the rules of the other recipes (the average of ``EMAWeights``, too). The batches since then are not seen
      again, and those right behind that are as bad are skipped. A checkpoint holds none of the good states: what it
      saves becomes one. Costs what ``"skip"`` does, and memory for two states on their device.
    - ``"stop"``: end the training, on all ranks together, with the last good state. Noticed at the steps that log;
      costs the memory of ``"rewind"``.
    - ``"raise"``: raise :class:`TrainingInstability` on all ranks. Costs what ``"skip"`` does.

    Attributes:
        rule: An :class:`~lightning_recipes.core.instability.InstabilityRule` for each optimizer.
        rewinds: How often the training went back.

    Args:
        action: What to do about an instability: only ``"warn"``, ``"skip"`` the update, ``"rewind"`` to a good state,
            ``"stop"`` the training or ``"raise"`` an error.
        max_rewinds: How often to go back before stopping instead, at least 0.
        keep_every: Updates from one good state that is kept to the next, at least 1.
        lr_factor: Multiplies the learning rate at each rewind, above 0 and at most 1.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.
        MisconfigurationException: When fit starts, under DeepSpeed, or with ``"rewind"`` or ``"stop"`` of a model in
            shards.

    Example:
        >>> trainer = pl.Trainer(callbacks=[InstabilityDetector(action="skip")], logger=False)

    References:
        Godbole et al., Deep Learning Tuning Playbook, 2023: https://github.com/google-research/tuning_playbook
        Chowdhery et al., PaLM, 2022 (going back behind a spike): https://arxiv.org/abs/2204.02311
    """

    def __init__(
        self,
        action: Literal["warn", "skip", "rewind", "stop", "raise"] = "warn",
        max_rewinds: int = 3,
        keep_every: int = 50,
        lr_factor: float = 1.0,
    ) -> None:
        self.action = check_choice("action", action, ("warn", "skip", "rewind", "stop", "raise"))
        self.max_rewinds = check_count("max_rewinds", max_rewinds, 0)
        self.keep_every = check_count("keep_every", keep_every, 1)
        self.lr_factor = check_real("lr_factor", lr_factor, 0, float("inf"))
        if self.lr_factor > 1:
            raise ValueError(f"lr_factor must be a number above 0 and at most 1, got {lr_factor!r}")
        self.rule: PerOptimizer[InstabilityRule] = PerOptimizer(
            partial(InstabilityRule, cancels=self.action in ("skip", "rewind"))
        )
        self._good: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._statistics = KeptStatistics()  # of BatchNorm
        self._batch: Any = None
        self._batch_idx = 0
        self._forget()

    def _forget(self) -> None:
        """Start anew: what was seen of another training says nothing about this one."""
        self.rule.rules = {}
        self.rewinds = self._updates = self._kept_at = 0
        self._seen: dict[str, int] = {}  # the step at which each kind was seen last
        self._losses: list[Tensor] = []  # of the backward passes since the last update
        self._examples = 0  # likewise
        self._last: tuple[float | Tensor, int] | None = None  # loss and examples of the batch's last update
        self._unread: list[_Update] = []
        self._back: int | None = None  # to which of the good states to go back when the batch is done
        self._is_back = False  # whether the training has gone back since it kept a state
        self._keeps_next = False  # whether to keep the present state before anything changes it
        self._stopped = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(f"{name} cannot see the gradients of DeepSpeed, whose engine keeps them")
        forget_norms(trainer)
        if self.action in ("rewind", "stop") and is_sharded(trainer):
            raise MisconfigurationException(
                f"{name}(action={self.action!r}) cannot keep the states of a model in shards"
                f" ({type(trainer.strategy).__name__}): use action='skip' or 'raise'"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._good.clear()
        self._statistics = KeptStatistics(pl_module if self.action in ("skip", "rewind") else None)
        self._keeps_next = self.action in ("rewind", "stop")

    # ---------------------------------------------------------------------------------- measure

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._batch_idx, self._last = batch, batch_idx, None
        if self._good and self._good[-1]["sizes"] != _group_sizes(trainer):  # nowhere to go back to
            self._good.clear()
            self._keeps_next = True
        unjudged = self._unread and self._good  # what is not judged may not be good
        if self._keeps_next and not unjudged and not any(map(is_lazy, pl_module.parameters())):
            self._keeps_next = False
            self._keep(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._examples += examples_in(self._batch)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        norm = gradient_norm(trainer, optimizer, self)
        if norm is None:
            return
        if losses:
            self._last = read_if_free(loss_of_update(trainer, losses)), self._examples
        loss, examples = self._last or (0.0, 0)  # one backward pass may serve several optimizers
        self._examples = 0
        rate = optimizer.param_groups[0].get("lr", 0.0)
        is_known = isinstance(norm, float) and isinstance(loss, float) and trainer.world_size == 1
        update = _Update(
            optimizer=index_of(trainer, optimizer),
            loss=loss,
            norm=norm,
            examples=examples,
            rate=0.0 if isinstance(rate, Tensor) and not free_to_read(rate) else float(rate),
            step=self._updates,
            epoch=trainer.current_epoch,
            batch_idx=self._batch_idx,
            has_loss=self._last is not None,
        )
        self._updates += 1
        self._unread.append(update)
        at_once = self.action in ("skip", "rewind", "raise")
        if not at_once and is_known:
            at_once = self.action == "stop" or self.rule[update.optimizer].is_striking(update.loss, update.norm)
        if at_once or time_to_log(trainer) or len(self._unread) >= UNREAD:
            self._judge(trainer, pl_module, optimizer if at_once else None)
        self._statistics.keep()

    # ---------------------------------------------------------------------------------- ask, act, tell

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer | None) -> None:
        """Read what has not been read and ask the rules; ``optimizer`` is the one about to step, if it may be held."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        scaled = scaler_of(trainer) is not None
        for update, (loss, norm, examples) in zip(unread, self._read(trainer, unread), strict=True):
            if not update.has_loss and math.isfinite(norm):
                continue  # of a backward pass that Lightning has not seen: nothing else can be said
            found = self.rule[update.optimizer].update(loss, norm, update.rate, scaled, examples)
            if found is not None:
                self._act(trainer, pl_module, optimizer, update, found)

    def _read(self, trainer: pl.Trainer, unread: list[_Update]) -> list[tuple[float, float, float]]:
        """Loss, norm and number of examples of each update, the means over the ranks."""
        measured = [value for each in unread for value in (each.loss, each.norm, each.examples)]
        values = means_over_ranks(trainer, measured)
        return [*zip(values[::3], values[1::3], values[2::3], strict=True)]

    def _act(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer | None,
        update: _Update,
        found: Instability,
    ) -> None:
        decision = self._decide(found, self.rule[update.optimizer].gave_up)
        where = self._locate(pl_module, optimizer, update, found) if optimizer is not None else ""
        if optimizer is not None and found.kind == "not finite":
            where = _first_of_all(trainer, where)
        rivals, scaled = len(trainer.optimizers) > 1, scaler_of(trainer) is not None
        finding = _finding(update, found, decision, where, rivals, scaled, bool(self._good))
        since = update.step - self._seen.get(found.kind, -AGAIN)
        self._seen[found.kind] = update.step
        if since >= AGAIN or decision not in ("told", "cancelled"):
            tell(trainer, finding)
        elif decision == "cancelled" and since > len(trainer.optimizers):  # else it goes on
            note(trainer, finding)
        if decision == "raised":
            raise TrainingInstability(finding.text)
        if decision in ("went back", "stopped") and self._good:
            self._back = 0 if found.kind not in JUMPS else -1
        if decision == "stopped":
            trainer.should_stop = self._stopped = True
        if decision == "went back":
            self.rewinds += 1
        if optimizer is not None and decision in ("cancelled", "went back", "stopped"):
            cancel_(trainer, optimizer)
            self._statistics.put_back()

    def _decide(self, found: Instability, gave_up: bool) -> str:
        if found.kind == "GradScaler storm" or self.action == "warn" or self._stopped:
            return "told"
        if self.action == "skip" and found.kind not in JUMPS:
            return "gave up" if gave_up and found.kind == "divergence" else "told"
        if self.action == "skip":
            return "cancelled"
        just_back = self._updates - self._kept_at <= self.keep_every and self._is_back
        again = self._back is not None or (just_back and found.kind in JUMPS)
        if self.action == "rewind" and (again or not self._good):
            return "cancelled"  # the same trouble, in the batches that follow; or there is nowhere to go back to
        if self.action == "rewind":
            return "went back" if self.rewinds < self.max_rewinds else "stopped"
        return "stopped" if self.action == "stop" else "raised"

    def _locate(self, pl_module: pl.LightningModule, optimizer: Optimizer, update: _Update, found: Instability) -> str:
        """Where the trouble is, as far as it can be seen at the update itself."""
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if found.kind == "exploding gradient":
            norms = {name: float(total_norm([gradient])) for name, gradient in gradients.items()}
            largest = sorted(norms, key=norms.__getitem__, reverse=True)[:3]
            return "most of it in " + ", ".join(f"{name} ({norms[name]:.3g})" for name in largest)
        if found.kind != "not finite":
            return ""
        states = {
            f"{key} of {name}": value
            for name, parameter in pl_module.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for kind, tensors in (
            ("in the batch", dict(_tensors("batch", self._batch))),
            ("in the optimizer's state", states),
            ("in the weights", dict(pl_module.named_parameters())),
        ):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not _is_finite(tensor):
                    return f"first {kind}: {name}"
        if found.signal == "loss":
            alone = pl_module.trainer.world_size == 1  # a collective in the step would wait for the other ranks
            again = alone and pl_module.automatic_optimization  # a manual step would update
            module = self._broken_module(pl_module, update.batch_idx) if again else ""
            if math.isfinite(float(update.loss)):
                return ""  # of this rank
            return f"first in the forward pass, in {module}" if module else "first in the loss"
        broken = next((name for name, gradient in gradients.items() if not _is_finite(gradient)), "")
        return f"first in the gradient of {broken}" if broken else ""

    def _broken_module(self, pl_module: pl.LightningModule, batch_idx: int) -> str:
        try:
            return first_broken_module(pl_module, self._batch, batch_idx)
        except Exception:  # whatever a step may raise that runs once more, and without gradients
            return ""

    # ---------------------------------------------------------------------------------- keep good states, go back

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        trainer.should_stop = trainer.should_stop or self._stopped  # whoever has taken it back
        if self._back is not None:
            self._go_back(trainer, pl_module)
        elif self._is_time_to_keep(trainer):
            self._keep(trainer, pl_module)

    def _is_time_to_keep(self, trainer: pl.Trainer) -> bool:
        all_judged = not self._unread and not self._losses  # and not within an accumulation
        return (
            self.action in ("rewind", "stop")
            and not self._stopped
            and all_judged
            and self._updates - self._kept_at >= self.keep_every
        )

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept_at, self._is_back = self._updates, False
        state = {
            "weights": {name: value for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)},
            "buffers": dict(pl_module.named_buffers()),  # those that are in no checkpoint, too
            "sizes": _group_sizes(trainer),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "rules": [each.rule.state_dict() for each in self._others(trainer)],
            "own": self.rule.state_dict(),
            "rewinds": self.rewinds,
        }
        self._good.append(copy.deepcopy(state))

    @torch.no_grad()
    def _go_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._back is not None
        state, self._back = copy.deepcopy(self._good[self._back]), None
        weights = {name: value for name, value in state["weights"].items() if name not in state["buffers"]}
        pl_module.load_state_dict(weights, strict=False)
        for name, value in state["buffers"].items():
            _set_buffer(pl_module, name, value)
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            optimizer.zero_grad(set_to_none=True)
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        trainer.precision_plugin.load_state_dict(state["precision"])
        for each, saved in zip(self._others(trainer), state["rules"], strict=True):
            each.rule.load_state_dict(saved)
        scale_learning_rates(trainer, self.lr_factor ** (self.rewinds - state["rewinds"]))
        self.rule.load_state_dict(state["own"])
        self._statistics.keep()
        self._kept_at, self._is_back, self._losses = self._updates, True, []

    def _others(self, trainer: pl.Trainer) -> list[Any]:
        """The other recipes that learn from every update."""
        run: Any = trainer  # connectors set some attributes
        others = (each for each in run.callbacks if each is not self)
        return [each for each in others if isinstance(getattr(each, "rule", None), PerOptimizer)]

    # ---------------------------------------------------------------------------------- ends and checkpoints

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge(trainer, pl_module, None)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge(trainer, pl_module, None)
        if self._back is not None:
            self._go_back(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()

    def _finish(self) -> None:
        """Let go of what belongs to the training."""
        self._statistics = KeptStatistics()
        self._good.clear()
        self._batch, self._last, self._losses, self._unread = None, None, [], []

    def _share(self, trainer: pl.Trainer) -> None:
        measured = self._read(trainer, self._unread)
        for update, (loss, norm, examples) in zip(self._unread, measured, strict=True):
            update.loss, update.norm, update.examples = loss, norm, examples

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        share_before_save(trainer, self, checkpoint, self._share)
        # A run resumed from here has this as its newest good state: so does this one, once no average is in its place.
        self._keeps_next = self.action in ("rewind", "stop") and self._back is None

    @override
    def state_dict(self) -> dict[str, Any]:
        unread = [{**asdict(each), "loss": float(each.loss), "norm": float(each.norm)} for each in self._unread]
        return {"rule": self.rule.state_dict(), "rewinds": self.rewinds, "updates": self._updates, "unread": unread}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self.rewinds, self._updates = state_dict["rewinds"], state_dict["updates"]
        self._unread = [_Update(**each) for each in state_dict["unread"]]


def _group_sizes(trainer: pl.Trainer) -> list[list[int]]:
    return [[len(group["params"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """In place where it can be: others may hold the tensor."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    held = module._buffers.get(key)
    if held is None or held.shape != value.shape or value.layout is not torch.strided:
        module._buffers[key] = value
    elif not torch.equal(held, value):  # one that is expanded cannot be written, nor has it been
        held.copy_(value)


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values() if values.layout is torch.sparse_coo else values.values()
    return bool(values.isfinite().all())


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch, each with where it stands."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(f"{name}[{key!r}]", each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _tensors(f"{name}[{index}]", each)


def _first_of_all(trainer: pl.Trainer, where: str) -> str:
    """What the first rank that knows says of where trouble began, and its number; all ranks have to ask."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return where
    said: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(said, where)
    rank, where = next(((rank, each) for rank, each in enumerate(said) if each), (0, ""))
    return f"first on rank {rank}, {where.removeprefix('first ')}" if len(set(said)) > 1 else where


def _cure(found: Instability, decision: str, where: str, scaled: bool) -> str:
    if found.kind != "not finite":
        return CURES[found.kind]
    if "in the weights:" in where:
        return "The weights were lost before: go on from a checkpoint, or with a new model."
    cure = "Repair or leave out such data." if "in the batch:" in where else CURES[found.kind]
    lost = decision == "told" and not scaled  # a GradScaler skips such an update
    return cure + (' From this update on no weight is of use; action="skip" cancels such updates.' if lost else "")


def _finding(
    update: _Update,
    found: Instability,
    decision: str,
    where: str,
    rivals: bool,
    scaled: bool = False,
    kept: bool = True,
) -> Finding:
    towards = "down" if found.kind == "vanishing gradient" else "up"
    bound = "" if math.isinf(found.expected) else f", where {towards} to {found.expected:.3g} would have been normal"
    if found.kind == "no progress":
        bound = f", and {found.expected:.3g} at the start"
    did = {
        "told": "",
        "cancelled": " The update was cancelled.",
        "went back": " The training went back to the last good state.",
        "stopped": f" The training was stopped{' with the last good state' if kept else ': no state was kept yet'}.",
        "gave up": " So many updates are no accidents: they are cancelled no longer.",
        "raised": "",
    }[decision]
    smoothed = found.kind in ("divergence", "early instability", "no progress")  # of some twenty updates, spikes cut
    # Where optimizers work against each other a loss may well rise: what one of them wins another loses.
    return Finding(
        rule=found.kind,
        severity="info" if rivals and found.kind in ("divergence", "early instability") else "warning",
        message=f"The {'smoothed ' if smoothed else ''}{found.signal} was {found.value:.3g} at batch"
        f" {update.batch_idx} of epoch {update.epoch}{bound}{f'; {where}' if where else ''}.{did}",
        advice=_cure(found, decision, where, scaled),
        step=update.step,
        evidence={
            "optimizer": update.optimizer,
            "epoch": update.epoch,
            "batch_idx": update.batch_idx,
            "signal": found.signal,
            "value": found.value,
            "expected": found.expected,
            "learning_rate": update.rate,
            "where": where,
            "decision": decision,
        },
        source=PLAYBOOK,
    )
