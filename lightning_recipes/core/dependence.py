"""What the outputs of a training step depend on: its inputs, the other examples, the future, the target itself.

Found by changing one thing at a time, so that it works for tokens, masks and anything else that has no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_recipes.core.criteria import Criterion
from lightning_recipes.core.targets import constant_of

Run = Callable[[Any], Sequence[Criterion]]
SAME = 1e-4  # of the change where a change is due: rounding
TELLS = 0.9  # of the loss of a constant output, that is left at most where inputs say something of their targets
MOST_LEAVES = 12
MOST_ROWS = 20_000


@dataclass
class Dependence:
    """What was found in a batch; False and empty where it cannot be told, too.

    Args:
        examples: In the batch.
        targets_given: Whether the targets come from the batch.
        inputs: Number of tensors of the batch that no target comes from.
        used: Whether some output depends on what the batch has for its example.
        fed: Whether outputs depend on the tensor that the targets come from.
        alike: Whether all inputs of all examples are the same.
        mixed: Whether outputs of several examples depend on another one.
        in_turn: Whether they do on examples before them alone, of several targets each: these may be steps in time.
        next_token: Whether the targets are the inputs, one position later.
        future: Whether outputs depend on inputs that they are to predict.
        copied: Whether the targets are the inputs of the same positions.
        least_loss: That the best network would have, as equal inputs have different targets.
        zeroed: The criterion with all inputs set to zero, where that leaves the targets alone.
    """

    examples: int = 0
    targets_given: bool = False
    inputs: int = 0
    used: bool = False
    fed: bool = False
    alike: bool = False
    mixed: bool = False
    in_turn: bool = False
    next_token: bool = False
    future: bool = False
    copied: bool = False
    least_loss: float = 0.0
    zeroed: list[Criterion] = field(default_factory=list)

    def or_(self, later: "Dependence") -> "Dependence":
        """What was found earlier, or later when the weights are others."""
        for name in ("used", "fed", "mixed", "in_turn", "future"):
            setattr(self, name, getattr(self, name) or getattr(later, name))
        return self


def examples_of(batch: Any) -> int:
    """Number of examples in a batch whose tensors all have them in their first dimension; 0 of any other.

    Of a batch with a sparse tensor, which may be a graph of them, it is 0, too.
    """
    leaves, _ = tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    sizes = {leaf.shape[0] for leaf in tensors if leaf.dim()}
    return sizes.pop() if len(sizes) == 1 and len(tensors) == len(leaves) and all(leaf.dim() for leaf in tensors) else 0


def first_examples(batch: Any, count: int) -> Any:
    """The first examples of a batch, or the batch itself if it has fewer, or if it is not clear what they are."""
    return batch if examples_of(batch) <= count else _taken(batch, slice(count))


def labels_alike(batch: Any) -> bool:
    """Whether the batch has one label an example, as it seems, and these are all the same."""
    labels = _labels(batch)
    return labels is not None and bool((labels == labels[0]).all())


def varied_examples(batches: Sequence[Any], count: int) -> Any:
    """Examples of several batches whose labels are not all the same, as many of each as there are.

    Where the batches have examples of other shapes they are those of one batch.

    Example:
        >>> batches = [(torch.zeros(4, 2), torch.tensor([1, 1, 1, 1])), (torch.ones(4, 2), torch.tensor([1, 1, 2, 1]))]
        >>> varied_examples(batches, 3)[1]
        tensor([1, 2, 1])
    """
    shapes = {tuple(leaf.shape[1:] for leaf in tree_flatten(batch)[0]) for batch in batches}
    if len(shapes) > 1:  # each is padded by itself
        varied = (batch for batch in batches if examples_of(batch) and not labels_alike(batch))
        batches = [next(varied, batches[0])]
    _, structure = tree_flatten(batches[0])
    columns = zip(*(tree_flatten(batch)[0] for batch in batches), strict=True)
    whole = tree_unflatten([torch.cat(column) for column in columns], structure)
    labels = _labels(whole)
    assert labels is not None  # of batches with labels
    order: list[tuple[int, int]] = []
    seen: dict[int, int] = {}
    for place, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, -1) + 1
        order.append((seen[label], place))
    return _taken(whole, torch.tensor([place for _, place in sorted(order)[:count]], device=labels.device))


def _labels(batch: Any) -> Tensor | None:
    if not examples_of(batch):
        return None
    whole = [leaf.flatten() for leaf in tree_flatten(batch)[0] if leaf.numel() == leaf.shape[0]]
    return next((leaf for leaf in whole if not leaf.is_floating_point()), None)


def _taken(batch: Any, which: Any) -> Any:
    leaves, structure = tree_flatten(batch)
    return tree_unflatten([leaf[which] for leaf in leaves], structure)


def look(run: Run, batch: Any) -> Dependence:
    """Find out what depends on what.

    Args:
        run: Gives the criteria of the step for a batch. Of a step that gives other outputs for the same batch, as it
            has random numbers of its own, nothing is found out that is told by its outputs; used they are taken to be.
        batch: All of its tensors with the examples in their first dimension; of any other nothing is found out.
    """
    found = Dependence(examples_of(batch))
    leaves, structure = tree_flatten(batch)
    criteria = run(batch)
    before = _main(criteria)
    if before is None or found.examples < 2 or len(leaves) > MOST_LEAVES:
        return found
    probe = _Probe(run, leaves, structure, before, found.examples)
    control = probe({})
    if control is None or not _same_targets(before, control):
        return found
    inputs, used = [], []
    for place, leaf in enumerate(leaves):
        after = probe({place: leaf.roll(1, 0)})
        if after is None:
            continue
        if _same_targets(before, after):
            inputs.append(place)
        else:
            found.targets_given = True
        change = probe.change(after)
        if change.numel() and float(change.max()) > 0:
            used.append(place)
    found.inputs, found.used = len(inputs), bool(used)
    found.alike = bool(inputs) and all(torch.equal(leaves[place], leaves[place].roll(1, 0)) for place in inputs)
    if found.targets_given and len(criteria) == 1 and _is_one_each(before, found.examples) and not found.alike:
        found.least_loss = _least(before, [leaves[place] for place in inputs if place in used])
    again = probe.change(control)
    if not again.numel() or float(again.max()) <= SAME * float(before.rows.abs().max()):
        _outputs(probe, inputs, used, found)
    return found


def _outputs(probe: "_Probe", inputs: Sequence[int], used: Sequence[int], found: Dependence) -> None:
    """What is told by outputs that are the same for the same batch."""
    before, leaves = probe.before, probe.leaves
    found.fed = bool(set(used) - set(inputs))
    _sequences(probe, leaves, found)
    if found.targets_given and _mixed(probe, leaves):
        several = before.positions > found.examples and not found.next_token  # which is one of its row
        found.in_turn = several and _in_turn(probe, leaves)
        found.mixed = not found.in_turn
    single = len(before.rows) == found.examples
    if set(used) & set(inputs) or (single and found.fed and before.kind == "classes"):
        zeroed = probe({place: torch.zeros_like(leaves[place]) for place in inputs})
        if zeroed is not None and _same_targets(before, zeroed) and (single or not found.fed):
            found.zeroed = [zeroed]


@dataclass
class _Probe:
    run: Run
    leaves: list[Tensor]
    structure: Any
    before: Criterion
    examples: int

    def __call__(self, changed: dict[int, Tensor]) -> Criterion | None:
        """The main criterion of the batch with some tensors changed; None if the step does not take them."""
        leaves = [changed.get(place, leaf) for place, leaf in enumerate(self.leaves)]
        try:
            after = _main(self.run(tree_unflatten(leaves, self.structure)))
        except Exception:  # anything may be wrong with what nobody meant to be put in
            return None
        return after if after is not None and after.outputs.shape == self.before.outputs.shape else None

    def change(self, after: Criterion) -> Tensor:
        """How much each output has changed at most, shape (examples, outputs of each); empty if it cannot be told."""
        before, now = self.before.rows, after.rows
        if len(before) % self.examples or not bool(now.isfinite().all() & before.isfinite().all()):
            return before.new_zeros(self.examples, 0)
        return (now - before).abs().amax(1).view(self.examples, -1)


def _main(criteria: Sequence[Criterion]) -> Criterion | None:
    return max(criteria, key=lambda each: each.positions, default=None)


def _same_targets(before: Criterion, after: Criterion) -> bool:
    return torch.equal(before.targets, after.targets)


def _mixed(probe: _Probe, leaves: list[Tensor]) -> bool:
    """Change one example: several others must not notice; one other may be what mixup mixes it with."""
    other = next((j for j in range(1, probe.examples) if any(not torch.equal(x[0], x[j]) for x in leaves)), 0)
    after = probe({place: torch.cat([leaf[other : other + 1], leaf[1:]]) for place, leaf in enumerate(leaves)})
    if not other or after is None:
        return False
    change = probe.change(after)
    if not change.numel():
        return False
    either = (change, change.view(-1, probe.examples).T)  # examples first, or positions first
    return min(int((each[1:].amax(1) > SAME * each.max()).sum()) for each in either) > 1


def _in_turn(probe: _Probe, leaves: list[Tensor]) -> bool:
    """Have the first half of the examples in place of the second one, too: the first one must not notice."""
    half = probe.examples // 2
    after = probe({place: torch.cat([leaf[:half], leaf[: len(leaf) - half]]) for place, leaf in enumerate(leaves)})
    change = probe.change(after) if after is not None else torch.zeros(probe.examples, 0)
    most = float(change.max()) if change.numel() else 0.0
    return most > 0 and float(change[:half].max()) <= SAME * most


def _sequences(probe: _Probe, leaves: list[Tensor], found: Dependence) -> None:
    """Whether the targets are tokens of the input, and which of them the outputs see."""
    before, examples = probe.before, probe.examples
    targets = before.targets
    if before.kind != "classes" or targets.is_floating_point() or targets.numel() % examples:
        return
    wanted, valid = targets.reshape(examples, -1), before.valid.reshape(examples, -1)
    length = wanted.shape[1]
    for place, leaf in enumerate(leaves):
        if leaf.dim() != 2 or leaf.is_floating_point() or length < 4 or not length <= leaf.shape[1] <= length + 1:
            continue
        tokens = leaf.to(wanted.dtype)
        ahead = (
            _agree(wanted[:, :-1], tokens[:, 1:], valid[:, :-1])
            if leaf.shape[1] == length
            else _agree(wanted, tokens[:, 1:], valid)
        )
        same = _agree(wanted, tokens[:, :length], valid)
        if max(ahead, same) < 0.95:
            continue
        half = length // 2
        future = torch.cat([leaf[:, : half + 1], leaf.roll(1, 0)[:, half + 1 :]], 1)
        after = probe({place: future})
        change = probe.change(after) if after is not None else torch.zeros(examples, 0)
        if not change.numel() or not float(change.max()):
            continue  # it cannot be told, or these are the labels themselves
        early = change[:, : half + 1][valid[:, : half + 1]]
        sees = bool(early.numel()) and float(early.max()) > SAME * float(change.max())
        found.next_token = ahead > same
        found.copied = same > ahead and not sees and _sees_own(probe, place, leaf, half, valid)
        found.future = found.next_token and sees
        if found.next_token and not sees and examples * length <= MOST_ROWS:
            found.least_loss = _ambiguity(tokens, wanted, valid)


def _sees_own(probe: _Probe, place: int, leaf: Tensor, column: int, valid: Tensor) -> bool:
    """Whether the outputs of a position depend on its own token: where a step shifts them inside they do not."""
    tokens = leaf.clone()
    tokens[:, column] = leaf[:, column].roll(1)
    after = probe({place: tokens})
    change = probe.change(after) if after is not None else torch.zeros(len(leaf), 0)
    own = change[:, column][valid[:, column]] if change.numel() else change
    return bool(own.numel()) and float(own.max()) > SAME * float(change.max())


def _agree(wanted: Tensor, tokens: Tensor, valid: Tensor) -> float:
    """Share of the targets that are these tokens; 0 if these are all the same one."""
    picked = tokens[valid]
    if picked.numel() < 8 or bool((picked == picked[0]).all()):
        return 0.0
    return float((wanted[valid] == picked).float().mean())


def _is_one_each(call: Criterion, examples: int) -> bool:
    """Whether each example has one target."""
    return call.outputs.shape[:1] == call.targets.shape[:1] == (examples,) and call.positions == examples


def _least(call: Criterion, inputs: Sequence[Tensor]) -> float:
    """The criterion with the best constant output for the examples of each input; 0 if these tell hardly anything."""
    if call.arguments.get("weight") is not None or not inputs:
        return 0.0
    same: dict[bytes, list[int]] = {}
    rows = torch.cat([leaf.detach().flatten(1).cpu().double() for leaf in inputs], 1).numpy()
    for place, row in enumerate(rows):
        same.setdefault(row.tobytes(), []).append(place)
    if len(same) == len(rows):
        return 0.0
    parts = [replace(call, outputs=call.outputs[each], targets=call.targets[each]) for each in same.values()]
    least = sum(len(part.targets) * float(part.at(constant_of([part]))) for part in parts) / len(rows)
    return least if least < TELLS * float(call.at(constant_of([call]))) else 0.0


def _ambiguity(tokens: Tensor, wanted: Tensor, valid: Tensor) -> float:
    """Mean entropy of the targets given all tokens so far, in nats."""
    follows: dict[bytes, dict[int, int]] = {}
    total = 0
    for row, targets, counts in zip(tokens.cpu().numpy(), wanted.tolist(), valid.tolist(), strict=True):
        for place, (target, there) in enumerate(zip(targets, counts, strict=True)):
            if there and place < 32:  # longer ones are hardly ever the same twice
                seen = follows.setdefault(row[: place + 1].tobytes(), {})
                seen[target] = seen.get(target, 0) + 1
            total += there
    groups = [torch.tensor(list(seen.values()), dtype=torch.float64) for seen in follows.values() if len(seen) > 1]
    nats = sum(float(-(group * (group / group.sum()).log()).sum()) for group in groups)
    return nats / max(1, total)
