"""Whether validation examples are among the training examples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEAST = 3  # repeated examples that are no accident,
SHARE = 0.02  # if they are so many of the training examples,
NATURAL = 3  # and so many times those that the training examples have among themselves


@dataclass(frozen=True)
class Repeats:
    """How many training examples are validation examples, too.

    Args:
        found: How many.
        examples: Training examples that were looked at.
        natural: Examples among them that are the same as an earlier one.
    """

    found: int = 0
    examples: int = 0
    natural: int = 0

    @property
    def is_leak(self) -> bool:
        """Whether there are more than data repeat by themselves."""
        return self.found >= max(LEAST, SHARE * self.examples, NATURAL * self.natural)


def repeats(train: Iterable[Any], val: Iterable[Any]) -> Repeats:
    """Compare the inputs of training and validation batches, byte by byte.

    The inputs are the first tensor of a batch with two dimensions or more.

    Args:
        train: Batches.
        val: Likewise.

    Example:
        >>> images = torch.arange(40.0).view(10, 4)
        >>> repeats([(images, images[:, 0])], [(images[:3], images[:3, 0]), (images[:2] + 1, images[:2, 0])]).found
        3
    """
    rows = [row for batch in train for row in _rows(batch)]
    held_out = {row for batch in val for row in _rows(batch)}
    once = set(rows)
    return Repeats(len(once & held_out), len(rows), len(rows) - len(once))


def _rows(batch: Any) -> Sequence[bytes]:
    inputs = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 1), None)
    if inputs is None or not inputs.numel() or inputs.layout != torch.strided:
        return []
    flat = inputs.detach().cpu().flatten(1).contiguous().view(torch.uint8)
    return [row.numpy().tobytes() for row in flat]
