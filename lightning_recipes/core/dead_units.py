"""Whether the units of a layer are dead: a ReLU gives 0 for everything that is shown, and no gradient goes through."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

RECTIFIERS = ("relu", "relu_", "relu6", "hardtanh")  # as nn.ReLU6 is
DEAD = 0.9  # of the units of a layer, from where on it is told; a tenth to a half may be silent in a sound network


class DeadUnits(TorchFunctionMode):
    """Within the context, notes how many units of each ReLU in the forward passes of modules give nothing but 0.

    A unit is a column of a matrix, a channel of images, the last dimension of anything else.

    Attributes:
        found: By the name of the module in whose forward pass a ReLU is: its dead units, and all it has. The worst of
            several.

    Args:
        module: Names are those in this one.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = nn.init.constant_(net[0].bias, -20.0)
        >>> with DeadUnits(net) as units:
        ...     _ = net(torch.rand(8, 2))
        >>> units.found, units.worst
        ({'1': (3, 3)}, ('1', 3, 3))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, tuple[int, int]] = {}
        self._names = {id(each): name for name, each in module.named_modules()}
        self._within: list[str] = []  # modules whose forward pass is under way
        self._handles: list[RemovableHandle] = []

    @property
    def worst(self) -> tuple[str, int, int] | None:
        """The first layer nine tenths of whose units are dead or more, with how many are, and all of them."""
        return next(((name, dead, units) for name, (dead, units) in self.found.items() if dead >= DEAD * units), None)

    @override
    def __enter__(self) -> Self:
        self._handles = [
            register_module_forward_pre_hook(lambda module, _: self._within.append(self._names.get(id(module), ""))),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]  # has no types in torch
        return self

    def _leave(self) -> None:
        self._within.pop()  # what a hook returns would take the place of the output

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # has no types in torch
        while self._handles:
            self._handles.pop().remove()

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # One outside of a forward pass is part of a loss, and may well be 0.
        if self._within and getattr(func, "__name__", "") in RECTIFIERS and isinstance(result, Tensor):
            self._note(result)
        return result

    def _note(self, result: Tensor) -> None:
        if result.dim() < 2 or len(result) < 2:
            return
        rows = result.detach().movedim(1 if result.dim() == 4 else -1, -1).flatten(0, -2)
        dead, units = int((rows == 0).all(0).sum()), rows.shape[1]
        name = next((name for name in reversed(self._within) if name), "")
        before = self.found.get(name)
        if before is None or dead * before[1] > before[0] * units:
            self.found[name] = dead, units
