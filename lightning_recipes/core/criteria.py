"""Which losses of ``torch.nn.functional`` a piece of code computes, and what they would be for other outputs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import Self, override

KINDS: dict[Callable[..., Any], str] = {
    functional.cross_entropy: "classes",
    functional.nll_loss: "classes",
    functional.binary_cross_entropy_with_logits: "binary",
    functional.binary_cross_entropy: "binary",
    functional.mse_loss: "squares",
    functional.huber_loss: "squares",
    functional.smooth_l1_loss: "squares",
    functional.l1_loss: "absolute",
}
ACTIVATIONS = {"softmax", "log_softmax", "sigmoid", "relu", "relu_", "tanh", "hardtanh", "relu6"}
FACTORIES = {"zeros", "ones", "full", "arange"}  # and their variants, new_zeros and zeros_like
FARTHEST = 2000  # nodes of the graph of a loss that are looked at; a criterion is among the first


@dataclass(eq=False)
class Criterion:
    """One call of a loss function.

    Args:
        function: Such as ``torch.nn.functional.cross_entropy``.
        arguments: What it was called with, by name, but for the two that come next.
        outputs: Of the model, the first argument.
        targets: The second.
        value: What it returned, with its graph until :meth:`detach_`.
        activation: Name of the function whose result, or a view of it, the outputs are; empty for any other.
        made_up: Whether the targets are numbers that the step makes up, whatever its batch is.

    Example:
        >>> with Watch() as watch:
        ...     loss = functional.cross_entropy(torch.zeros(4, 10).softmax(1), torch.arange(4)) + 1.0
        >>> (criterion,) = watch.seen
        >>> criterion.name, criterion.activation, round(float(criterion.at(torch.zeros(10))), 4)
        ('cross_entropy', 'softmax', 2.3026)
    """

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    outputs: Tensor
    targets: Tensor
    value: Tensor
    activation: str = ""
    made_up: bool = False

    @property
    def name(self) -> str:
        """Of the function."""
        return self.function.__name__

    @property
    def kind(self) -> str:
        """``"classes"``, ``"binary"``, ``"squares"`` or ``"absolute"``."""
        return KINDS[self.function]

    @property
    def reduction(self) -> str:
        """``"mean"``, ``"sum"`` or ``"none"``."""
        given = self.arguments
        if given.get("size_average") is not None or given.get("reduce") is not None:  # as it was before torch 1
            if given.get("reduce") is False:
                return "none"
            return "sum" if given.get("size_average") is False else "mean"
        return str(given["reduction"])

    @property
    def classes(self) -> int:
        """Number of classes; 2 for binary outputs, 0 for others."""
        if self.kind == "classes":
            return self.outputs.shape[1 if self.outputs.dim() > 1 else 0]
        return 2 if self.kind == "binary" else 0

    @property
    def mean(self) -> float:
        """The value, as a mean where it is none."""
        return float(self.value.detach().float().mean())

    @property
    def positions(self) -> int:
        """How many things are predicted: examples, tokens, pixels; outputs of each, where each has several."""
        count = self.targets.numel() if self.targets.is_floating_point() else int(self.valid.sum())
        return count // (self.classes if self.kind == "classes" and self.targets.is_floating_point() else 1)

    @property
    def valid(self) -> Tensor:
        """Where targets that are classes count."""
        there: Tensor = self.targets != self.arguments.get("ignore_index", -100)
        return there

    @property
    def rows(self) -> Tensor:
        """The outputs as a matrix: a row for each thing that is predicted; for all but classes one for each example."""
        outputs = self.outputs.detach().float()
        if outputs.dim() < 2:
            return outputs.reshape(1 if self.kind == "classes" else -1, self.classes if self.kind == "classes" else 1)
        if self.kind == "classes":
            return outputs.movedim(1, -1).flatten(0, -2)
        return outputs.flatten(1)

    def at(self, constant: Tensor) -> Tensor:
        """What the mean would have been had every output been this: of the shape (classes,), of one output, or ().

        Args:
            constant: Logits where logits are expected or log-probabilities; else the outputs themselves.
        """
        if self.kind == "classes":
            if self.name == "nll_loss":
                constant = constant.log_softmax(0)
            constant = constant.view(-1, *[1] * max(0, self.outputs.dim() - 2))
        elif self.name == "binary_cross_entropy":
            constant = constant.sigmoid()
        everywhere = torch.zeros(self.outputs.shape, device=self.outputs.device)
        return self.value_at(
            everywhere + constant.to(everywhere)
        )  # wider, where targets have more columns than outputs

    def value_at(self, outputs: Tensor) -> Tensor:
        """What the mean would have been for other outputs."""
        given = {name: each.float() if isinstance(each, Tensor) else each for name, each in self.arguments.items()}
        targets = self.targets.float() if self.targets.is_floating_point() else self.targets
        with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
            value: Tensor = self.function(outputs, targets, **given).mean()
        return value

    def detach_(self) -> Self:
        """Let go of the graph."""
        self.outputs, self.targets, self.value = self.outputs.detach(), self.targets.detach(), self.value.detach()
        return self


@dataclass(eq=False)
class Watch(TorchFunctionMode):
    """Within the context, notes every criterion that is computed; :attr:`seen` has them in their order."""

    seen: list[Criterion] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        # Tensors are kept, or their memory would be used again.
        self._activated: dict[int, tuple[str, Tensor]] = {}
        self._made_up: dict[int, Tensor] = {}

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KINDS:
            self._note(func, result, args, kwargs or {})
            return result
        name = getattr(func, "__name__", "")
        if name in ACTIVATIONS and isinstance(result, Tensor):
            self._activated[result.untyped_storage().data_ptr()] = (name.rstrip("_"), result)
        given = [each for each in args if isinstance(each, Tensor)]
        factory = name.removeprefix("new_").removesuffix("_like") in FACTORIES
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._made_up.pop(id(next(iter(given), None)), None)  # written to, with who knows what
        elif isinstance(result, Tensor) and (factory or (given and all(id(each) in self._made_up for each in given))):
            self._made_up[id(result)] = result
        return result

    def _note(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        outputs, targets = given.pop("input"), given.pop("target")
        if outputs.numel():
            name, tensor = self._activated.get(outputs.untyped_storage().data_ptr(), ("", outputs))
            same = tensor.numel() == outputs.numel()
            self.seen.append(
                Criterion(func, given, outputs, targets, result, name if same else "", id(targets) in self._made_up)
            )

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # has no types in torch
        self._activated.clear()
        self._made_up.clear()

    def part_of(self, loss: Tensor | None) -> list[Criterion]:
        """Those that a loss depends on; without one (in manual optimization) those that could be learnt from; all if
        nothing can.

        They let go of their graphs.
        """
        frozen = loss is not None and loss.grad_fn is None
        chosen = [criterion for criterion in self.seen if criterion.value.requires_grad or frozen]
        if loss is not None and loss.grad_fn is not None:
            nodes = _nodes(loss.grad_fn)  # alive meanwhile, or their ids would be given to others
            found = {id(node) for node in nodes}
            chosen = [criterion for criterion in chosen if id(criterion.value.grad_fn) in found]
        return [criterion.detach_() for criterion in chosen]


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned, None if there is none."""
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _nodes(start: Any) -> list[Any]:
    """The nodes of a graph from its result on, each once, the nearest first."""
    known, nodes = {id(start)}, [start]
    for node in nodes:
        for each, _ in node.next_functions:
            if each is not None and id(each) not in known and len(nodes) < FARTHEST:
                known.add(id(each))
                nodes.append(each)
    return nodes
