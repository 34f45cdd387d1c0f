"""Let several trained networks of one architecture predict together, or average their weights into one."""

import copy
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_recipes.core.arguments import check_choice
from lightning_recipes.core.averaging import HALF_PRECISION
from lightning_recipes.core.files import replaced

Combination = Callable[[Tensor, Tensor], Tensor]

COMBINATIONS = ("logits", "binary logits", "mean")
ROUNDS = 5  # timed calls of each way at most
LONG = 0.2  # seconds of a loop that arithmetic dominates: there vmap has no overhead to save
CLEARLY = 0.95  # of the time of the loop, below which vmap is worth having
REMEMBERED = 64  # kinds of input


class Ensemble(nn.Module):
    """Predicts with several modules at once: averaged probabilities, averaged values, or any function of the outputs.

    The members are the modules that are given, not copies, and are put in eval mode. One of weight 0 is dropped. What
    ``combine`` makes of the members' outputs:

    - ``"logits"``: of class logits, the log of the weighted mean of the softmax probabilities (log-mean-exp). It is a
      logit again: its softmax is the averaged probabilities, and cross-entropy takes it.
    - ``"binary logits"``: the logit of the weighted mean of the sigmoids.
    - ``"mean"``: the weighted mean, for regression and for members that give probabilities.
    - a function of the outputs, shape (members, ...), and the weights, shape (members,).

    Half-precision outputs are combined, and the result is returned, in single precision.

    Without gradients (``torch.no_grad`` or ``torch.inference_mode``) and in eval mode the members run one after the
    other or all at once by ``torch.vmap``, whichever is faster for the inputs at hand: at the first call with inputs
    of their shapes, dtypes and device both are timed (a dozen more calls, none if one takes more than 0.2 seconds;
    for the moment, a second copy of the weights). Where vmap raises, gives other numbers (random numbers or control
    flow of a member's own), or a member writes to its buffers or has hooks, the members run one after the other. Once
    vmap has won, the members' parameters and buffers are views of one stacked tensor each, which takes no more memory
    and follows every change of their values. What is neither (a temperature kept as a float) must not change
    after the first call.

    Attributes:
        members: The members, in a ``ModuleList``.
        weights: Of the members, sum 1; single precision, whatever the members are cast to.

    Args:
        members: At least one, of the same architecture. Each gives one tensor.
        weights: One for each member, not negative; None for equal ones.
        combine: ``"logits"``, ``"binary logits"``, ``"mean"`` or a function.
        dim: Of the classes in a member's output, for ``"logits"``; None for 1, as ``torch.nn.CrossEntropyLoss`` has it
            (-1 if the output has one dimension). A language model's is -1.

    Raises:
        TypeError: If a member is no module, or an output no tensor.
        ValueError: If there is no member, or the weights are not one for each, finite, not negative and above 0 in sum.

    Example:
        >>> one, other = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> with torch.no_grad():
        ...     for member, logit in ((one, 0.0), (other, 200.0)):
        ...         _ = member.weight.zero_(), member.bias.copy_(torch.tensor([logit, 0.0]))
        ...     Ensemble([one, other], weights=[3, 1])(torch.ones(1, 1)).softmax(-1)
        tensor([[0.6250, 0.3750]])

    References:
        Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles, 2017:
        https://arxiv.org/abs/1612.01474
        Huang et al., Snapshot Ensembles: Train 1, Get M for Free, 2017: https://arxiv.org/abs/1704.00109
    """

    weights: Tensor

    def __init__(
        self,
        members: Iterable[nn.Module],
        weights: Sequence[float] | Tensor | None = None,
        combine: str | Combination = "logits",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        members = list(members)
        for member in members:
            if not isinstance(member, nn.Module):
                raise TypeError(f"members must be modules, got {member!r}")
        shares = normalized(weights, len(members))
        self.combine = combine if callable(combine) else check_choice("combine", combine, COMBINATIONS)
        self.dim = dim
        self.members = nn.ModuleList(member for member, share in zip(members, shares, strict=True) if share > 0)
        self.register_buffer("weights", torch.tensor([share for share in shares if share > 0]))
        self._stacked: _Stacked | None = None
        self._vmap_wins: dict[Any, bool] = {}
        self._logs: dict[Any, Tensor] = {}
        self.eval()

    @override
    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        outputs = self.outputs(*inputs, **named)
        if callable(self.combine):
            return self.combine(outputs, self.weights)
        if self.combine == "mean" or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return combined(outputs, self.weights, self.combine, self.dim)
        return _mixed(outputs, self._log_weights(outputs), self.combine, self.dim)

    def _log_weights(self, outputs: Tensor) -> Tensor:
        """Of the members, in dtype and dimensions of their outputs; computed once for each of these."""
        weights = self._buffers["weights"]
        assert isinstance(weights, Tensor)  # one of this class
        kind = outputs.ndim, outputs.dtype, id(weights), None if weights.is_inference() else weights._version
        if kind not in self._logs:
            self._logs[kind] = _shaped(outputs, weights).log()
        return self._logs[kind]

    def outputs(self, *inputs: Any, **named: Any) -> Tensor:
        """What each member gives for the inputs, shape (members, ...)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._loop(inputs, named)
        given = (*inputs, *named.values()) if named else inputs
        kind = (*named, *[(value.shape, value.dtype) if type(value) is Tensor else None for value in given])
        vmap_wins = self._vmap_wins.get(kind)
        if vmap_wins is False or None in kind or not self._is_plain():
            return self._loop(inputs, named)
        if self._stacked is not None and not self._stacked.is_current():
            self._forget()
        elif vmap_wins and self._stacked is not None:
            try:
                return self._stacked(inputs, named)
            except Exception:  # a branch of the members that vmap cannot take
                self._vmap_wins[kind] = False
                return self._loop(inputs, named)
        return self._learn(kind, inputs, named)

    def _is_plain(self) -> bool:
        """Whether this is plain prediction: no member trains, and nobody traces."""
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # has no types in torch
        return not (tracing or self.training or any(member.training for member in self.members))

    def _loop(self, inputs: Any, named: Any) -> Tensor:
        members: Any = self._modules["members"]._modules.values()  # type: ignore[union-attr]  # self.members, but faster
        outputs = [member(*inputs, **named) for member in members]
        try:
            return torch.stack(outputs)
        except TypeError:
            raise TypeError(
                f"a member must give one tensor, got {type(outputs[0]).__name__}: "
                "wrap the members in a module that returns the tensor to combine"
            ) from None

    def _learn(self, kind: Any, inputs: Any, named: Any) -> Tensor:
        """Predict with the loop, and remember whether vmap would have been faster."""
        if len(self._vmap_wins) >= REMEMBERED:
            self._vmap_wins.clear()
        self._vmap_wins[kind] = False
        versions = self._versions()
        outputs = self._loop(inputs, named)
        try:
            if versions and versions == self._versions() and not any(_hooks(self.members)):
                self._vmap_wins[kind] = self._is_vmap_faster(outputs, inputs, named)
        except Exception:  # whatever vmap cannot do
            self._vmap_wins[kind] = False
        return outputs

    def _versions(self) -> list[tuple[int, int]]:
        """Changes with every write to a parameter or buffer; empty if that cannot be told."""
        tensors = [*self.members.parameters(), *self.members.buffers()]
        return [] if any(tensor.is_inference() for tensor in tensors) else [(id(t), t._version) for t in tensors]

    def _is_vmap_faster(self, outputs: Tensor, inputs: Any, named: Any) -> bool:
        def seconds(call: Callable[[Any, Any], Tensor]) -> float:
            if outputs.device.type != "cpu":
                torch.accelerator.synchronize(outputs.device)
            start = time.perf_counter()
            call(inputs, named)
            if outputs.device.type != "cpu":
                torch.accelerator.synchronize(outputs.device)
            return time.perf_counter() - start

        loop = seconds(self._loop)
        if loop > LONG:
            return False
        # Not under inference mode, whose tensors could not be trained or saved as the members' own.
        with torch.inference_mode(False), torch.no_grad():
            stacked = self._stacked or _Stacked(list(self.members))
        if not _alike(stacked(inputs, named), outputs):
            return False
        vmap = seconds(stacked)
        for _ in range(ROUNDS - 1):
            if vmap > 2 * loop:
                break
            loop, vmap = min(loop, seconds(self._loop)), min(vmap, seconds(stacked))
        if vmap >= CLEARLY * loop:
            return False
        if self._stacked is None:
            with torch.inference_mode(False), torch.no_grad():
                stacked.share()
            self._stacked = stacked
        return True

    def _forget(self) -> None:
        self._stacked, self._vmap_wins, self._logs = None, {}, {}

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Ensemble":
        self._forget()
        weights = self.weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # has no types in torch
        self.weights = weights.to(self.weights.device)  # in single precision
        return self

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacked": None, "_vmap_wins": {}, "_logs": {}}

    def save(self, path: str | Path) -> None:
        """Write the members and how they are combined as one file, at once or not at all.

        It loads with ``torch.load(path, weights_only=True)``. A function given as ``combine`` is not in it.
        """
        saved = {
            "members": [dict(member.state_dict()) for member in self.members],
            "weights": self.weights,
            "combine": None if callable(self.combine) else self.combine,
            "dim": self.dim,
        }
        with replaced(path) as file:
            torch.save(saved, file)

    @classmethod
    def load(cls, path: str | Path, module: nn.Module, combine: Combination | None = None) -> "Ensemble":
        """Read what :meth:`save` has written.

        Args:
            path: The file.
            module: Of the members' architecture, with any weights. Each member is a copy of it and has its device and
                dtype.
            combine: The function that was given to the ensemble, if it was one.

        Raises:
            ValueError: If the ensemble had a function and there is none here, or the other way round.
        """
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if (saved["combine"] is None) != (combine is not None):
            how = (
                "a function, which the file does not hold: give it as" if combine is None else "no function: leave out"
            )
            raise ValueError(f"the ensemble in {path} combines by {how} combine=")
        members = []
        for state in saved["members"]:
            member = copy.deepcopy(module)
            member.load_state_dict(state)
            members.append(member)
        device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
        ensemble = cls(members, saved["weights"], combine or saved["combine"], saved["dim"])
        ensemble.weights = ensemble.weights.to(device)
        return ensemble


class _Stacked:
    """The members' parameters and buffers, one stacked tensor a name, and the call that runs all members on them."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.named = [{**dict(member.named_parameters()), **dict(member.named_buffers())} for member in members]
        every = [tensor for each in self.named for tensor in each.values()]
        plain = all(
            type(t) in (Tensor, nn.Parameter) and t.is_contiguous() and t.layout == torch.strided for t in every
        )
        kinds = [[(name, t.dtype, t.device) for name, t in each.items()] for each in self.named]
        if not plain or len({id(tensor) for tensor in every}) < len(every) or any(kind != kinds[0] for kind in kinds):
            raise ValueError("these members cannot be stacked")
        self.tensors = {name: torch.stack([each[name] for each in self.named]) for name in self.named[0]}
        # A copy without weights, which several threads must not fill at the same time. The members stay untouched.
        without = {id(tensor): _on_meta(tensor) for tensor in self.named[0].values()}
        self.shell = copy.deepcopy(members[0], without)
        self.lock = threading.Lock()
        self.hooks = _hooks(members)
        self.places: list[tuple[dict[str, Any], str, Tensor, int]] = []

    def __call__(self, inputs: Any, named: Any) -> Tensor:
        def one(tensors: dict[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(self.shell, tensors, inputs, named)
            return output

        with self.lock:
            outputs: Tensor = torch.vmap(one)(self.tensors)
        return outputs

    def share(self) -> None:
        """Make the members' tensors views of the stacked ones."""
        for index, each in enumerate(self.named):
            for name, tensor in each.items():
                tensor.data = self.tensors[name][index]
        owners = [owner for member in self.members for module in member.modules() for owner in _tensors_of(module)]
        self.places = [
            (owner, name, tensor, tensor.data_ptr())
            for owner in owners
            for name, tensor in owner.items()
            if tensor is not None
        ]

    def is_current(self) -> bool:
        """Whether the members' tensors still are views of the stacked ones, and there are no hooks."""
        return all(
            owner.get(name) is tensor and tensor.data_ptr() == pointer for owner, name, tensor, pointer in self.places
        ) and not any(self.hooks)


def _tensors_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _hooks(members: Iterable[nn.Module]) -> list[Mapping[int, Any]]:
    modules = [module for member in members for module in member.modules()]
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether two results are equal but for the order of sums."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    tolerance = min(torch.finfo(first.dtype).eps ** 0.5, 0.02)
    scale = second.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)


def combined(outputs: Tensor, weights: Tensor, combine: str, dim: int | None = None) -> Tensor:
    """Combine the members' outputs, shape (members, ...), as :class:`Ensemble` does.

    Args:
        outputs: Of the members, stacked.
        weights: Shape (members,), above 0, sum 1.
        combine: ``"logits"``, ``"binary logits"`` or ``"mean"``.
        dim: Of the classes in a member's output; None for 1, or the only one.

    Example:
        >>> combined(torch.tensor([[100.0], [-300.0]]), torch.tensor([0.5, 0.5]), "binary logits")
        tensor([0.])
    """
    shares = _shaped(outputs, weights)
    return (shares * outputs).sum(0) if combine == "mean" else _mixed(outputs, shares.log(), combine, dim)


def _shaped(outputs: Tensor, weights: Tensor) -> Tensor:
    """Weights that can be multiplied with the members' outputs, of sum 1 to the precision of these."""
    dtype = outputs.dtype if outputs.is_floating_point() or outputs.is_complex() else torch.float32
    if dtype in HALF_PRECISION:
        dtype = torch.float32
    if weights.dtype != dtype:
        weights = weights.to(dtype)
        weights = weights / weights.sum()
    return weights.view(-1, *[1] * (outputs.ndim - 1))


def _mixed(outputs: Tensor, log_weights: Tensor, combine: str, dim: int | None) -> Tensor:
    """Logits of the mean of the members' probabilities."""
    if outputs.dtype != log_weights.dtype:
        outputs = outputs.to(log_weights.dtype)
    if combine == "binary logits":
        sigmoid = nn.functional.logsigmoid
        return (sigmoid(outputs) + log_weights).logsumexp(0) - (sigmoid(-outputs) + log_weights).logsumexp(0)
    if dim is None:
        dim = 1 if outputs.ndim > 2 else -1
    return (outputs.log_softmax(dim + 1 if dim >= 0 else dim) + log_weights).logsumexp(0)


def normalized(weights: Sequence[float] | Tensor | None, members: int) -> list[float]:
    """Weights that sum to 1, one for each member; equal ones for None.

    Raises:
        ValueError: If there is no member, or the weights are not one for each, finite, not negative, above 0 in sum.

    Example:
        >>> normalized([3, 1], 2)
        [0.75, 0.25]
    """
    if members < 1:
        raise ValueError("there must be at least one member")
    shares = torch.ones(members) if weights is None else torch.as_tensor(weights).detach().cpu()
    shares = shares.double()
    if shares.shape != (members,) or not shares.isfinite().all() or (shares < 0).any() or shares.sum() <= 0:
        raise ValueError(
            f"weights must be {members} finite numbers of at least 0, one for each member, and not all 0, got {weights}"
        )
    return [float(share) for share in shares / shares.sum()]


def average_weights(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | Tensor | None = None
) -> dict[str, Tensor]:
    """Weighted mean of state dicts: a model soup, one network in the place of several.

    The networks must lie in one basin of the loss: fine-tuned from the same weights, or late in one training.
    Half-precision tensors are averaged in single precision and cast back. Integers and booleans are those of the
    first state of weight above 0. BatchNorm's running statistics are averaged like all the rest.

    Args:
        states: State dicts with the same names and shapes.
        weights: One for each, not negative; None for equal ones. ``(1 - t, t)`` interpolates two states.

    Raises:
        ValueError: If the names or shapes differ, or the weights are not as :func:`normalized` wants them.

    Example:
        >>> average_weights([{"bias": torch.zeros(2)}, {"bias": torch.ones(2)}], weights=(0.75, 0.25))
        {'bias': tensor([0.2500, 0.2500])}

    References:
        Wortsman et al., Model soups, 2022: https://arxiv.org/abs/2203.05482
    """
    shares = normalized(weights, len(states))
    kept = [(state, share) for state, share in zip(states, shares, strict=True) if share > 0]
    first = kept[0][0]
    for state in states:
        unlike = state.keys() ^ first.keys() or {name for name in first if state[name].shape != first[name].shape}
        if unlike:
            raise ValueError(
                f"only states of one architecture can be averaged; these differ: {', '.join(sorted(unlike))}"
            )
    average = {}
    for name, tensor in first.items():
        wide = torch.float32 if tensor.dtype in HALF_PRECISION else tensor.dtype
        if tensor.is_floating_point() or tensor.is_complex():
            parts = [share * state[name].detach().to(tensor.device, wide) for state, share in kept]
            average[name] = torch.stack(parts).sum(0).to(tensor.dtype)
        else:
            average[name] = tensor.detach().clone()
    return average
