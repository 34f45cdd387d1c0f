"""What the name of a metric says: of which data it is, and what it measures."""

import re
from typing import Literal

from lightning_recipes.core.findings import Finding

Split = Literal["train", "val", "test", ""]
SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
LOWER = {"loss", "error", "err", "mse", "mae", "rmse", "nll", "perplexity", "ppl", "wer", "cer", "fid"}
HIGHER = {"acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "iou", "miou", "dice", "bleu", "map", "psnr"}
TURNED = {"neg", "negative", "minus", "inverse"}


def tokens(name: str) -> list[str]:
    """The words of a name, in any script.

    Example:
        >>> tokens("val/topAcc_1"), tokens("精度_损失")
        (['val', 'top', 'acc', '1'], ['精度', '损失'])
    """
    return [token for token in re.split(r"[\W_]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()) if token]


def trains(name: str) -> bool:
    """Whether a metric is of the training, and not of a test after it, nor of its clock."""
    return name not in ("epoch", "step", "hp_metric") and split(name) != "test"


def split(name: str) -> Split:
    """Which data a name speaks of.

    Example:
        >>> split("val/acc_epoch"), split("train_loss_step"), split("loss")
        ('val', 'train', '')
    """
    found = [SPLITS[token] for token in tokens(name) if token in SPLITS]
    return found[0] if found else ""


def base(name: str) -> str:
    """What a name measures, on whatever data.

    Example:
        >>> base("val/acc_epoch"), base("train_loss_step"), base("loss"), base("val_loss_raw")
        ('acc', 'loss', 'loss', 'loss')
    """
    words = [token for token in tokens(name) if token not in SPLITS]
    while len(words) > 1 and words[-1] in ("step", "epoch", "raw"):
        words.pop()
    return " ".join(words) or name


def better(name: str) -> Literal["min", "max", ""]:
    """Whether lower or higher is better of a metric, where its name says so and says nothing else.

    Example:
        >>> better("val_loss"), better("val/topAcc_1"), better("f1_loss"), better("neg_mse"), better("score")
        ('min', 'max', '', '', '')
    """
    words = {*tokens(name)}
    lower, higher = bool(words & LOWER), bool(words & HIGHER)
    if lower == higher or words & TURNED:
        return ""
    return "min" if lower else "max"


def doubt(monitor: str, mode: str, recipe: str, harm: str) -> Finding | None:
    """Whether the name of a metric says that the other mode is meant.

    Args:
        monitor: The metric.
        mode: ``"min"`` or ``"max"``.
        recipe: Whose mode it is.
        harm: What that would do if the other one is meant.
    """
    meant = better(monitor)
    if meant in ("", mode):
        return None
    return Finding(
        rule="mode looks wrong",
        severity="warning",
        message=f"By its name {monitor} is better when {'lower' if meant == 'min' else 'higher'}, but {recipe} has"
        f" mode={mode!r}: it would {harm}.",
        advice=f"Set mode={meant!r}.",
        step=0,
        evidence={"monitor": monitor, "mode": mode},
    )
