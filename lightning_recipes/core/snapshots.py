"""Keep what a network was at the end of each cycle of its learning rate."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_recipes.core.arguments import check_choice
from lightning_recipes.core.files import replaced

DTYPES = {"same": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SnapshotRule:
    """Says when a cycle is over, and keeps the state of that moment: in CPU memory, or in a file each.

    Memory is a copy of the state for each cycle, half of that with ``dtype="bfloat16"`` or ``"float16"``; with a folder
    the same is on disk, and in memory only when it is asked for.

    Attributes:
        ends: Updates made when each cycle is over.
        kept: The state dict of each cycle so far, or the path of its file.

    Args:
        dtype: Of what is kept of floating-point tensors: ``"same"``, ``"bfloat16"`` or ``"float16"``, which is eight
            times as exact and ends at 65,504.

    Raises:
        ValueError: If ``dtype`` is none of these.

    Example:
        >>> rule = SnapshotRule()
        >>> rule.ends = [2, 4]
        >>> weight = torch.zeros(1)
        >>> for update in range(1, 5):
        ...     weight += 1
        ...     if rule.update(update):
        ...         rule.keep({"weight": weight})
        >>> rule.states()
        [{'weight': tensor([2.])}, {'weight': tensor([4.])}]
    """

    def __init__(self, dtype: str = "same") -> None:
        self.dtype = DTYPES[check_choice("dtype", dtype, tuple(DTYPES))]
        self.ends: Sequence[int] = ()
        self.kept: list[dict[str, Any] | str] = []

    def update(self, updates: int) -> bool:
        """Whether a cycle is over, and has to be kept now that so many updates were made."""
        return len(self.kept) < len(self.ends) and updates >= self.ends[len(self.kept)]

    def plan(self, ends: Sequence[int], updates: int, done: int) -> None:
        """Divide a run into cycles, or what is left of one among the cycles that are left.

        Args:
            ends: Updates after which each cycle is over in a run from the start. If as many have been kept already,
                what is left has more of them, of about that length.
            updates: Of the whole run.
            done: Updates that were made.
        """
        taken, left = len(self.kept), updates - done
        cycles = len(ends) - taken if len(ends) > taken else max(1, round(left * len(ends) / ends[-1]))
        if not taken and not done and updates == ends[-1]:
            self.ends = ends
        elif left >= cycles:
            start = self.ends[taken - 1] if taken else 0
            if start + (updates - start) // cycles <= done:
                start = done  # or the cycle under way would be over already
            new = [start + (updates - start) * (cycle + 1) // cycles for cycle in range(cycles)]
            self.ends = [*self.ends[:taken], *new]

    def keep(self, state: Mapping[str, Any], folder: str | Path | None = None, write: bool = True) -> None:
        """Keep the state at the end of a cycle.

        Args:
            state: State dict.
            folder: Where to keep it in a file, written at once or not at all; None for memory.
            write: Whether to write the file, as one process of several has to.
        """
        own = {name: self._copied(value) for name, value in state.items()}
        if folder is None:
            self.kept.append(own)
            return
        path = Path(folder).absolute() / f"snapshot_{len(self.kept) + 1}.pt"
        if write:
            with replaced(path) as file:
                torch.save(own, file)
        self.kept.append(str(path))

    def _copied(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)  # an extra state of a module's own
        dtype = value.dtype if self.dtype is None or not value.is_floating_point() else self.dtype
        return value.detach().to("cpu", dtype, copy=True)

    def states(self) -> list[dict[str, Any]]:
        """The state of each cycle so far, with the dtype that it was kept in.

        Raises:
            FileNotFoundError: If a file is gone.
        """
        return [
            torch.load(kept, map_location="cpu", weights_only=True) if isinstance(kept, str) else kept
            for kept in self.kept
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": list(self.kept), "ends": list(self.ends)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept, self.ends = list(state_dict["kept"]), list(state_dict["ends"])
