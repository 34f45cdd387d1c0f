"""Count where the host waits for a tensor, on any device and so without an accelerator."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What reads values, or sizes that depend on them.
READING_OPS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "is_nonzero", "item"}
READING_METHODS = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__repr__,
    Tensor.item,
    Tensor.__bool__,
    Tensor.__float__,
}


class _Ops(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in READING_OPS:
            self.note(name)
        if name == "index" and any(getattr(i, "dtype", None) is torch.bool for i in args[1] if i is not None):
            self.note("boolean index")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self.note(getattr(func, "__name__", "read"))
        return func(*args, **(kwargs or {}))


class HostReads:
    """Within the context every host read that comes from a file in ``folder`` is noted, with its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}/"
        self.places: list[str] = []
        self._modes = (_Ops(self._note), _Methods(self._note))

    def _note(self, name: str) -> None:
        frames = traceback.extract_stack(sys._getframe(1))
        own = [frame for frame in frames if frame.filename.startswith(self.folder)]
        if own:
            self.places.append(f"{name} at {own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}")

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*details)
