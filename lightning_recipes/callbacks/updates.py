"""Watch how much each update changes the weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_recipes.callbacks.measuring import around_each_step, index_of, loss_of_update, mean_over_ranks
from lightning_recipes.callbacks.sharding import is_sharded, shard_group
from lightning_recipes.callbacks.telling import log_scalars, show, tell, time_to_log
from lightning_recipes.callbacks.tracking import parameters_of
from lightning_recipes.callbacks.unused import pass_over_unused
from lightning_recipes.core.arguments import check_choice, check_count, check_flag
from lightning_recipes.core.clipping import total_norm
from lightning_recipes.core.findings import Finding, listing
from lightning_recipes.core.per_optimizer import PerOptimizer
from lightning_recipes.core.updates import (
    CERTAIN,
    ENOUGH,
    HEALTHY,
    NOTES,
    UpdateMeter,
    UpdateRatioRule,
    not_optimized,
    update_ratios,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNREAD = 20  # measured updates at most until they are read
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_forward_module.")
SHOWN = 12  # layers at either end of a figure


@dataclass(frozen=True)
class _Layout:
    """What is measured of an optimizer."""

    parameters: list[Tensor]
    layers: list[int]  # of each parameter
    names: list[str]  # of the layers
    matrices: list[str]  # those that have a matrix

    def turn(self, number: int, turns: int) -> "_Layout":
        """Every ``turns``-th layer, beginning with a given one."""
        if turns == 1:
            return self
        names = self.names[number % turns :: turns]
        taken = [
            (parameter, names.index(self.names[layer]))
            for parameter, layer in zip(self.parameters, self.layers, strict=True)
            if self.names[layer] in names
        ]
        matrices = [name for name in names if name in self.matrices]
        return _Layout([each for each, _ in taken], [layer for _, layer in taken], names, matrices)


@dataclass(slots=True)
class _Measured:
    """A measured update that is not read yet: the norms of its weights and of their changes, and its loss."""

    optimizer: int
    step: int
    rate: float
    names: list[str]
    matrices: list[str]
    layers: list[int]
    norms: Any
    loss: Any


class UpdateRatioMonitor(pl.Callback):
    """Measure the true update over the weight, ``||w_after - w_before|| / ||w_before||``, and say what it tells.

    Measured around the step of every optimizer itself, whatever it does (momentum, adaptive rates, weight decay,
    clipping, several inner steps), from a copy of the weights that it changes: at every ``every_n_steps``-th update of
    each optimizer, the first included. An update that a GradScaler skips is none (a fused optimizer skips by itself:
    there it counts, with no ratio). Shards are summed over the ranks. A layer whose weights are all zero has no ratio
    until they are not. The loss of these updates, the mean over micro-batches and ranks, is measured with them.

    Logs, every ``log_every_n_steps``: ``update_ratio/median``, ``update_ratio/lowest`` and ``update_ratio/highest``,
    of the layers that have a matrix (biases and scales have sizes of their own; they are in the ratio of their layer);
    with several optimizers each with ``/0``, ``/1``... behind it; and with ``log_all`` the ratio of every layer as
    ``update_ratio/<layer>``. At the end a figure ``update_ratio``, to TensorBoard or as PNG beside the logs (needs the
    extra ``plots``).

    Tells, once each, when it is sure (100 measured updates, then whenever they have doubled) or when training ends
    (20): a learning rate that looks too low or too high, by the rules of
    :class:`~lightning_recipes.core.updates.UpdateRatioRule`, never too low of a run that has died; layers that never
    change, and why; parameters that no optimizer has; a layer whose ratio is 50 times as large or as small as the
    others'.

    Costs at a measured update a copy of the weights, made after the backward pass, when the memory of the activations
    is free again, and about four passes over them; at the others about a microsecond. Nothing is read back but at
    the steps that log or every 20 measured updates. With several ranks the loss is averaged, and shards are summed, at
    a measured update.

    Attributes:
        rule: An :class:`~lightning_recipes.core.updates.UpdateRatioRule` for each optimizer.

    Args:
        every_n_steps: Updates from one that is measured to the next, at least 1.
        per: What has a ratio: each ``"layer"`` (a module with all parameters of its own), ``"group"`` of an optimizer,
            or ``"parameter"``.
        log_all: Log every ratio, not only the median and the extremes.
        turns: Measure the layers in this many turns, one at each measured update, at least 1: divides the memory.

    Raises:
        TypeError: If an argument is not of its kind.
        ValueError: If it is out of its range or unknown.
        MisconfigurationException: When fit starts, under DeepSpeed, whose engine keeps the weights.

    Example:
        >>> trainer = pl.Trainer(callbacks=[UpdateRatioMonitor()], logger=False)

    References:
        Karpathy, CS231n notes, 2016, "Ratio of weights:updates": https://cs231n.github.io/neural-networks-3/#ratio
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        per: Literal["layer", "group", "parameter"] = "layer",
        log_all: bool = False,
        turns: int = 1,
    ) -> None:
        self.every_n_steps = check_count("every_n_steps", every_n_steps, 1)
        self.per = check_choice("per", per, ("layer", "group", "parameter"))
        self.log_all = check_flag("log_all", log_all)
        self.turns = check_count("turns", turns, 1)
        self.rule: PerOptimizer[UpdateRatioRule] = PerOptimizer(UpdateRatioRule)
        self._put_back: list[Callable[[], None]] = []
        self._forget()

    def _forget(self) -> None:
        """Start anew: what was seen of another training says nothing about this one."""
        self.rule.rules = {}
        self._updates: dict[int, int] = {}  # of each optimizer
        self._unread: list[_Measured] = []
        self._told: set[tuple[str, int]] = set()
        self._judged: dict[int, int] = {}  # how often the measured updates had doubled then
        self._looked_for_strays = False
        self._let_go()

    def _let_go(self) -> None:
        """Let go of what belongs to the training."""
        while self._put_back:
            self._put_back.pop()()
        self._layouts: dict[int, _Layout] = {}
        self._meters: dict[int, tuple[_Layout, UpdateMeter]] = {}
        self._waiting: set[int] = set()  # optimizers in a step whose gradient is still to be computed
        self._raw: set[int] = set()  # optimizers that step with a closure, but past Lightning
        self._wants_losses = True  # whether an optimizer's next update is to be measured
        self._losses: list[Tensor] = []  # of the backward passes since the last update
        self._losses_of_update: list[Tensor] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass_over_unused(trainer, self)
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot see the weights of DeepSpeed, whose engine keeps and updates them"
            )
        self._let_go()
        for index, optimizer in enumerate(trainer.optimizers):
            self._updates.setdefault(index, 0)
            if hasattr(optimizer, "register_step_post_hook"):
                before = partial(self._before_step, trainer, index, optimizer)
                after = partial(self._after_step, trainer, index, optimizer)
                self._put_back.append(around_each_step(optimizer, after, before))

    # ---------------------------------------------------------------------------------- measure

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._wants_losses:
            self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._wants_losses:
            self._losses_of_update, self._losses = self._losses, []
        if self._waiting:
            index = index_of(trainer, optimizer)
            if index in self._waiting:
                self._waiting.discard(index)
                self._begin(trainer, index, optimizer)

    def _before_step(self, trainer: pl.Trainer, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._updates[index] % self.every_n_steps:
            return
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None or index in self._raw:
            self._begin(trainer, index, optimizer)
        else:
            self._waiting.add(index)  # for the end of the backward pass, when there is memory again

    def _begin(self, trainer: pl.Trainer, index: int, optimizer: Optimizer) -> None:
        layout = self._layouts.get(index)
        wanted = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
        if layout is None or list(map(id, layout.parameters)) != list(map(id, wanted)):
            layout = self._layouts[index] = self._lay_out(trainer.lightning_module, optimizer)
        part = layout.turn(self._updates[index] // self.every_n_steps, self.turns)
        group = shard_group(trainer)
        whole = None if group is None else partial(_summed, group)
        self._meters[index] = part, UpdateMeter(part.parameters, whole)

    def _lay_out(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> _Layout:
        names = {id(parameter): _plain(name) for name, parameter in pl_module.named_parameters()}
        layers: dict[str, int] = {}
        layout = _Layout([], [], [], [])
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                name = names.get(id(parameter), f"group {number}")
                if self.per == "group":
                    name = str(group.get("name", f"group {number}"))
                elif self.per == "layer" and id(parameter) in names:
                    name = name.rpartition(".")[0] or type(pl_module).__name__
                layout.parameters.append(parameter)
                layout.layers.append(layers.setdefault(name, len(layers)))
                if parameter.ndim > 1 and name not in layout.matrices:
                    layout.matrices.append(name)
        layout.names.extend(layers)
        return layout

    def _after_step(self, trainer: pl.Trainer, index: int, optimizer: Optimizer) -> None:
        if self._wants_losses:
            losses = self._losses_of_update or self._losses
            self._losses_of_update, self._losses = [], []
            if index in self._meters:
                self._measure(trainer, index, optimizer, losses)
            elif self._updates[index] % self.every_n_steps == 0:
                self._raw.add(index)
                self._waiting.discard(index)
        self._updates[index] += 1
        self._wants_losses = self._is_any_due()
        if self._unread and (len(self._unread) >= UNREAD or time_to_log(trainer)):
            self._read()
            if not self._looked_for_strays and not is_sharded(trainer):
                self._tell_of_strays(trainer, trainer.lightning_module)
            self._looked_for_strays = True
            if _doublings(self.rule[index].seen) > self._judged.get(index, 0):
                self._judged[index] = _doublings(self.rule[index].seen)
                self._judge(trainer, index, CERTAIN)
            if time_to_log(trainer):
                self._log(trainer)

    def _is_any_due(self) -> bool:
        return any(updates % self.every_n_steps == 0 for updates in self._updates.values())

    @torch.no_grad()
    def _measure(self, trainer: pl.Trainer, index: int, optimizer: Optimizer, losses: list[Tensor]) -> None:
        layout, meter = self._meters.pop(index)
        norms = meter.norms()
        skipped = getattr(optimizer, "found_inf", None)  # a GradScaler has set it for a fused optimizer
        if skipped is not None:
            norms = torch.where(skipped.to(norms.device) > 0, torch.nan, norms)
        loss = mean_over_ranks(trainer, loss_of_update(trainer, losses)) if losses else math.nan
        rates = [group["lr"] for group in optimizer.param_groups if isinstance(group.get("lr"), float)]
        of_layers = (layout.names, layout.matrices, layout.layers)
        rate = max(rates, default=0.0)
        self._unread.append(_Measured(index, self._updates[index], rate, *of_layers, norms, loss))

    # ---------------------------------------------------------------------------------- ask, tell

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for each in unread:
            ratios = update_ratios(_plain_values(each.norms), each.layers)
            named = dict(zip(each.names, ratios, strict=True))
            self.rule[each.optimizer].update(each.step, named, float(each.loss), each.rate, each.matrices)

    def _log(self, trainer: pl.Trainer) -> None:
        scalars: dict[str, float] = {}
        for index in self.rule:
            suffix = _suffix(trainer, index)
            scalars |= {f"update_ratio/{name}{suffix}": value for name, value in self.rule[index].summary.items()}
            if self.log_all:
                scalars |= {f"update_ratio/{name}": value for name, value in self.rule[index].newest.items()}
        if scalars:
            log_scalars(trainer, scalars)

    def _judge(self, trainer: pl.Trainer, index: int, enough: int) -> None:
        """Say what there is to say of an optimizer, from so many measured updates on."""
        rule, optimizer = self.rule[index], trainer.optimizers[index]
        for finding in (
            rule.finding(enough),
            *self._unmoved(rule, optimizer, self._layouts.get(index), is_sharded(trainer)),
            _apart(rule),
        ):
            if finding is not None and (finding.rule, index) not in self._told:
                self._told.add((finding.rule, index))
                tell(trainer, finding)

    def _unmoved(
        self, rule: UpdateRatioRule, optimizer: Optimizer, layout: _Layout | None, sharded: bool
    ) -> list[Finding]:
        """Layers that an optimizer has and that never change, but for those whose learning rate is 0."""
        found = set(rule.unmoved())
        if not found or layout is None:
            return []
        rates = {id(each): group.get("lr") for group in optimizer.param_groups for each in group["params"]}
        reasons: dict[str, list[str]] = {}
        for number, name in enumerate(layout.names):
            own = [each for each, layer in zip(layout.parameters, layout.layers, strict=True) if layer == number]
            if name in found and any(rates[id(each)] != 0 for each in own):
                reasons.setdefault("" if sharded else _reason(own), []).append(name)
        return [_never_changes(names, reason, rule) for reason, names in reasons.items()]

    def _tell_of_strays(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trainable parameters that no optimizer has."""
        had = {id(parameter) for optimizer in trainer.optimizers for parameter in parameters_of(optimizer)}
        strays = {
            name: each for name, each in pl_module.named_parameters() if each.requires_grad and id(each) not in had
        }
        for has_gradient in (True, False):
            names = [name for name, each in strays.items() if (each.grad is not None) is has_gradient]
            if names:
                tell(trainer, not_optimized(names, has_gradient))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judged = {index: _doublings(self.rule[index].seen) for index in self.rule}
        self._looked_for_strays = any(self._updates.values())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read()
        for index in self.rule:
            self._judge(trainer, index, ENOUGH)
            self._show(trainer, index)
        self._let_go()

    def _show(self, trainer: pl.Trainer, index: int) -> None:
        if self.rule[index].measured:
            show(trainer, f"update_ratio{_suffix(trainer, index)}", lambda: draw_ratios(self.rule[index]))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        unread = [{name: _plain_values(getattr(each, name)) for name in each.__slots__} for each in self._unread]
        return {"rule": self.rule.state_dict(), "updates": dict(self._updates), "unread": unread}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self._updates.update(state_dict["updates"])
        self._wants_losses = self._is_any_due()
        self._unread = [_Measured(**each) for each in state_dict["unread"]]


def _plain_values(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) else values


def _summed(group: Any, squares: Tensor) -> Tensor:
    """Sum over the ranks that share what FSDP (1) keeps as plain tensors."""
    torch.distributed.all_reduce(squares, group=group)
    return squares


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _suffix(trainer: pl.Trainer, index: int) -> str:
    return f"/{index}" if len(trainer.optimizers) > 1 else ""


def _doublings(measured: int) -> int:
    return (measured // CERTAIN).bit_length()


def _reason(parameters: list[Tensor]) -> str:
    """Why an optimizer leaves parameters as they are, from their gradients of the newest update."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return "no gradient"
    return "rounding" if float(total_norm(gradients)) > 0 else "zero gradient"


def _never_changes(names: list[str], reason: str, rule: UpdateRatioRule) -> Finding:
    why, advice = {
        "no gradient": (
            ": no gradient reaches them",
            "Is the layer used in the forward pass, and not cut off by detach(), no_grad() or an argmax? If it is meant"
            " to be frozen, say so: requires_grad_(False).",
        ),
        "zero gradient": (
            ": their gradient is zero",
            "Look for dead units, an input or a factor that is always zero, and weights that are all zero.",
        ),
        "rounding": (
            ", though there is a gradient: each update is lost in rounding",
            "Keep the weights in single precision (precision='bf16-mixed' instead of 'bf16-true'), or raise the"
            " learning rate.",
        ),
        "": ("", "Is a gradient reaching the layer, and is it meant to be trained?"),
    }[reason]
    return Finding(
        rule="layer never changes",
        severity="warning",
        message=f"None of {rule.measured} measured updates changed {listing(names)}{why}.",
        advice=advice,
        step=rule.step + 1,
        evidence={"layers": ", ".join(names), "reason": reason, "measured_updates": rule.measured},
        source=NOTES,
    )


def _apart(rule: UpdateRatioRule) -> Finding | None:
    found = rule.apart()
    if found is None:
        return None
    name, ratio, median = found
    small = ratio < median
    return Finding(
        rule="layer far from the others",
        severity="info",
        message=f"The update ratio of {name} was {ratio:.2g}, {max(ratio / median, median / ratio):.0f} times as"
        f" {'small' if small else 'large'} as the {median:.2g} of the middle layer.",
        advice="Look at its learning rate and initial scale"
        + (", and for gradients that vanish on the way to it (initialisation, normalisation)." if small else "."),
        step=rule.step + 1,
        evidence={"layer": name, "ratio": ratio, "median_ratio": median},
        source=NOTES,
    )


def draw_ratios(rule: UpdateRatioRule) -> "Figure":
    """Draw the ratios over the updates, and the mean ratio of each layer; needs the extra ``plots``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, layers = figure.subplots(1, 2, width_ratios=[3, 2])
    points = [point for point in rule.points if math.isfinite(point[1])]
    steps, level, lowest, highest, *_ = zip(*points, strict=True)
    curve.axhspan(*HEALTHY, color="C2", alpha=0.15, linewidth=0, label="usual")
    curve.fill_between(steps, lowest, highest, alpha=0.3, linewidth=0, label="lowest to highest layer")
    curve.plot(steps, level, linewidth=1.5, label="median layer")
    curve.set(xlabel="update", ylabel="update ratio", yscale="log")
    curve.legend(loc="best")
    means = {name: math.exp(logs / changed) for name, (_, changed, logs) in rule.layers.items() if changed}
    ordered = sorted(means, key=means.__getitem__)
    shown = ordered if len(ordered) <= 2 * SHOWN else [*ordered[:SHOWN], *ordered[-SHOWN:]]
    layers.plot([means[name] for name in shown], [name[-30:] for name in shown], "o")
    layers.axvspan(*HEALTHY, color="C2", alpha=0.15, linewidth=0)
    left_out = f" (the {SHOWN} lowest and highest)" if len(shown) < len(ordered) else ""
    layers.set(xlabel=f"mean ratio of a layer{left_out}", xscale="log")
    layers.tick_params(axis="y", labelsize=7)
    return figure
