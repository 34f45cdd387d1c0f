"""What the targets of a training say by themselves: their best constant prediction, their scale, padding among them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_recipes.core.criteria import Criterion

LARGE = 10.0  # root mean square of inputs, or standard deviation of targets, that nobody has normalised
PERMUTATIONS = 999
FAR_OFF = 3.0  # standard deviations of the targets that their mean is from 0


def constant_of(calls: Sequence[Criterion]) -> Tensor:
    """The constant output that fits the targets of a criterion best: logits, or a prediction.

    Args:
        calls: Of the same loss function, with outputs of the same kind.
    """
    kind, classes = calls[0].kind, calls[0].classes
    if kind == "classes":
        counts = torch.stack([_class_weights(call) for call in calls]).sum(0)
        smoothing = calls[0].arguments.get("label_smoothing", 0.0)
        share = counts / counts.sum().clamp(min=1e-30)
        logits: Tensor = ((1 - smoothing) * share + smoothing / classes).clamp(min=1e-12).log()
        return logits
    rows = [call.targets.float() for call in calls]
    columns = all(row.dim() == 2 and row.shape[1] == rows[0].shape[1] for row in rows)
    values = torch.cat(rows) if columns else torch.cat([row.flatten() for row in rows])
    if kind == "absolute":
        median: Tensor = values.median(0).values
        return median
    mean = values.mean(0)
    if kind == "squares":
        return mean
    heavier = calls[0].arguments.get("pos_weight")
    if heavier is not None:
        heavier = heavier.float().flatten()
        weight = heavier if heavier.numel() == mean.numel() else heavier.mean()
        mean = weight * mean / (weight * mean + 1 - mean)
    return mean.clamp(1e-6, 1 - 1e-6).logit()


def _class_weights(call: Criterion) -> Tensor:
    """Weight of each class among the targets."""
    weight = call.arguments.get("weight")
    ones = torch.ones(call.classes, device=call.targets.device) if weight is None else weight.float()
    if call.targets.is_floating_point():
        return ones * call.targets.float().movedim(1 if call.targets.dim() > 1 else 0, -1).reshape(
            -1, call.classes
        ).sum(0)
    return ones * torch.bincount(call.targets[call.valid].flatten(), minlength=call.classes).float()


def unnormalised(calls: Sequence[Criterion], spread: float) -> str:
    """Mean and standard deviation of the targets of a regression, if these are far from 0, or large; else empty.

    Args:
        calls: Of one loss function.
        spread: Standard deviation of the outputs: targets are not large for a network that scales its outputs.
    """
    if calls[0].kind not in ("squares", "absolute"):
        return ""
    targets = torch.cat([call.targets.detach().float().flatten() for call in calls])
    mean, deviation = float(targets.mean()), float(targets.std(correction=0))
    if abs(mean) <= FAR_OFF * deviation and deviation <= LARGE * max(1.0, spread):
        return ""
    return f"mean {mean:.3g} and standard deviation {deviation:.3g}"


def padding(targets: Sequence[Tensor], tokens: Sequence[Tensor] = ()) -> tuple[float, int]:
    """Share of the targets of sequences that are those of padding, and the class that they are.

    Padding is a class, or else a token of the input, that rows end with, and that is nowhere else; the targets of such
    tokens are all the same.

    Args:
        targets: Classes, of shape (batch, positions).
        tokens: Of the inputs, of the same shapes; none if there are none such.
    """
    found = _trailing(targets)
    if found is None and [each.shape for each in tokens] == [each.shape for each in targets]:
        found = _trailing(tokens)
    if found is None:
        return 0.0, -1
    filled = torch.cat([each.flatten().cpu() for each in targets])[found]
    if bool((filled != filled[0]).any()):
        return 0.0, -1
    return float(found.float().mean()), int(filled[0])


def _trailing(rows: Sequence[Tensor]) -> Tensor | None:
    """Where rows are filled up to their end with what is nowhere else, as one mask for all; None if they are not."""
    if not rows or any(each.dim() != 2 or each.shape[1] < 2 for each in rows):
        return None
    last = torch.cat([each[:, -1].cpu() for each in rows])
    label = int(last.mode().values)
    is_label = [each.cpu() == label for each in rows]
    trailing = torch.cat([each.flip(1).cummin(1).values.flip(1).flatten() for each in is_label])  # to the end of a row
    found, at_the_end = sum(int(each.sum()) for each in is_label), int(trailing.sum())
    return None if found > at_the_end or found < 2 * int((last == label).sum()) else trailing


def fit(outputs: Sequence[int], targets: Sequence[int]) -> bool:
    """Whether each output has one target: of its place, or one that several share."""
    spread = (1,) * (len(outputs) - len(targets)) + tuple(targets)
    return len(spread) == len(outputs) and all(b in (1, a) for a, b in zip(outputs, spread, strict=True))


def commonest(labels: Tensor) -> float:
    """Share of the most frequent label."""
    return float(torch.unique(labels, return_counts=True)[1].max()) / len(labels)


def between(batches: Sequence[Tensor]) -> float:
    """Share of the variance of numbers that lies between batches: 1 if those of a batch are all the same, 0 by chance.

    Reads the batches back, one by one.

    Example:
        >>> numbers = torch.arange(64.0)
        >>> round(between(numbers.split(8)), 2), round(between(numbers.view(8, 8).T.flatten().split(8)), 2)
        (0.98, -0.11)
    """
    numbers = [batch.cpu().double() for batch in batches]
    every = torch.cat(numbers)
    variance = float(every.var())
    within = sum(float((each - each.mean()).square().sum()) for each in numbers) / (len(every) - len(numbers))
    return 1 - within / variance if variance > 0 else 0.0


def clustered(batches: Sequence[Tensor]) -> bool:
    """Whether labels differ more from batch to batch than in any of 999 shuffles of them.

    Example:
        >>> labels = torch.arange(64) // 16
        >>> clustered(labels.split(8)), clustered(labels.view(4, 16).T.flatten().split(8))
        (True, False)
    """
    labels = torch.cat([batch.cpu() for batch in batches])
    one_hot = torch.nn.functional.one_hot(torch.unique(labels, return_inverse=True)[1]).float()
    sizes = torch.tensor([len(batch) for batch in batches])
    of = torch.arange(len(batches)).repeat_interleave(sizes)

    def spread(rows: Tensor) -> float:
        """By Pearson's statistic, but for what no shuffle changes."""
        counts = torch.zeros(len(batches), rows.shape[1]).index_add(0, of, rows)
        return float((counts.square() / rows.sum(0) / sizes[:, None]).sum())

    chance = torch.Generator().manual_seed(0)
    seen = spread(one_hot)
    return all(
        spread(one_hot[torch.randperm(len(labels), generator=chance)]) < seen - 1e-6 for _ in range(PERMUTATIONS)
    )
