"""Whether validation examples are among the training examples, and targets among the inputs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEAST = 3  # repeated examples that are no accident,
SHARE = 0.02  # if they are so many of the training examples,
NATURAL = 3  # and so many times those that the training examples have among themselves
FEW, MANY = 32, 2000  # examples that tell whether a column is the target; those that are looked at
WIDE, PLENTY, WIDEST = 100, 256, 2**14  # more columns than that need so many examples; still more are not looked at
SIDE = 8  # examples on either side of what a column has to tell apart: fewer are alike by chance
EXACT = 1e-9  # of 1, that the squared correlation of a column with a target that is its multiple may lack


@dataclass(frozen=True)
class Repeats:
    """How many training examples are validation examples, too.

    Args:
        found: How many.
        examples: Training examples that were looked at.
        natural: Examples among them that are the same as an earlier one.
        validation: Validation examples that were looked at.
    """

    found: int = 0
    examples: int = 0
    natural: int = 0
    validation: int = 0

    @property
    def is_leak(self) -> bool:
        """Whether there are enough that it matters."""
        return self.found >= max(LEAST, SHARE * self.examples)

    @property
    def is_sure(self) -> bool:
        """Whether there are more than data repeat by themselves."""
        return self.is_leak and self.found >= NATURAL * self.natural


def repeats(train: Iterable[Any], val: Iterable[Any]) -> Repeats:
    """Compare the inputs of training and validation batches, byte by byte.

    The inputs are the tensor of a batch with two dimensions or more, of which most examples of training differ (a mask
    of padding has many the same); of several such the first.

    Args:
        train: Batches.
        val: Likewise.

    Example:
        >>> images = torch.arange(40.0).view(10, 4)
        >>> repeats([(images, images[:, 0])], [(images[:3], images[:3, 0]), (images[:2] + 1, images[:2, 0])]).found
        3
    """
    columns, val_columns = _columns(train), _columns(val)
    place = max(range(len(columns)), key=lambda place: len(set(columns[place])), default=0)
    rows, held_out = (each[place] if place < len(each) else [] for each in (columns, val_columns))
    once = set(rows)
    return Repeats(len(once & {*held_out}), len(rows), len(rows) - len(once), len(held_out))


def target_column(batches: Iterable[Any]) -> int:
    """The first column of a table of inputs, or place of an image's, that gives the target away, -1 if there is none.

    That is one that has the same value in all examples of a class, and not in all classes; or, where targets are
    numbers, one that is a multiple of the target and a constant.

    Args:
        batches: One tensor of inputs and one number for each example, in this order or the other, and nothing else.

    Example:
        >>> chance = torch.Generator().manual_seed(0)
        >>> inputs, labels = torch.randn(64, 4, generator=chance), torch.randint(3, (64,), generator=chance)
        >>> target_column([(inputs, labels)]), target_column([(torch.cat([inputs, 1 - labels[:, None]], 1), labels)])
        (-1, 4)
    """
    tables, targets, examples = [], [], 0
    for batch in batches:
        leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        single = [leaf for leaf in leaves if leaf.dim() and leaf.numel() == len(leaf)]
        table = [leaf.flatten(1) for leaf in leaves if leaf.dim() > 1 and leaf.numel() > len(leaf)]
        if len(leaves) != 2 or len(single) != 1 or len(table) != 1 or len(single[0]) != len(table[0]):
            return -1
        if table[0].shape[1] > WIDEST:
            return -1
        if examples < (MANY if table[0].shape[1] <= WIDE else PLENTY):
            tables.append(table[0].detach().cpu().double())
            targets.append(single[0].detach().cpu().double().flatten())
            examples += len(table[0])
    columns = {table.shape[1] for table in tables}
    if len(columns) != 1 or examples < (FEW if max(columns) <= WIDE else PLENTY):
        return -1
    inputs, wanted = torch.cat(tables), torch.cat(targets)
    kinds, labels, counts = torch.unique(wanted, return_inverse=True, return_counts=True)
    if len(kinds) > examples // SIDE:
        inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean()
        aligned = (wanted @ inputs).square() >= (1 - EXACT) * inputs.square().sum(0) * wanted.square().sum()
        told = aligned & (inputs.square().sum(0) > 0)
    else:
        first = torch.stack([inputs[labels == label][0] for label in range(len(kinds))])
        constant = (inputs == first[labels]).all(0)
        common = first[counts.argmax()]
        aside = (counts[:, None] * (first != common)).sum(0)
        told = constant & (aside >= SIDE) & (examples - aside >= SIDE)
    found = told.nonzero().flatten().tolist()
    return int(found[0]) if found else -1


def _columns(batches: Iterable[Any]) -> list[list[bytes]]:
    """The examples of all batches in each of their tensors with two dimensions or more."""
    tables = zip(*filter(None, map(_tables, batches)), strict=False)
    return [[row for rows in table for row in rows] for table in tables]


def _tables(batch: Any) -> list[list[bytes]]:
    """The examples of a batch in each such tensor; none if there is one that has no rows."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 1]
    if not all(leaf.numel() and leaf.layout == torch.strided for leaf in leaves):
        return []
    flat = [leaf.detach().cpu().flatten(1).contiguous().view(torch.uint8) for leaf in leaves]
    return [[row.numpy().tobytes() for row in table] for table in flat]
