"""Real data that comes with packages: nothing is downloaded, and what was loaded is said."""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION = Path(os.environ.get("RECIPES_DATA", "/usr/share/datasets/fashion-mnist"))


@dataclass(frozen=True)
class Data:
    """Images and labels, shuffled and split.

    Args:
        name: What it is and how much of it.
        train: Images, standardised, of shape (N, features) or (N, 1, height, width), and their classes, (N,).
        val: The same for validation.
        test: The same for the end.
    """

    name: str
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int = 0, wrong_labels: float = 0.0) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels (scikit-learn's): 898 to train, 300 to validate, 599 to test.

    Args:
        seed: Of the split.
        wrong_labels: Share of the training labels that are replaced by another class.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    name = f"scikit-learn digits, {len(images)} images"
    if wrong_labels:
        name += f", {wrong_labels:.0%} of the training labels wrong"
    return _split(name, torch.tensor(images / 16), torch.tensor(labels), (898, 300, 599), seed, wrong_labels)


def fashion(seed: int = 0, wrong_labels: float = 0.0, pixels: int = 14, images: int = 10_000) -> Data:
    """Fashion-MNIST: ``images`` to train, 2,000 to validate, 10,000 to test, of 14 x 14 pixels or 28 x 28.

    From the folder that RECIPES_DATA names, or where Debian's package dataset-fashion-mnist puts it.

    Raises:
        FileNotFoundError: If it is not there.
    """
    every = torch.cat([_idx(f"{part}-images-idx3-ubyte.gz", 16) for part in ("train", "t10k")]).view(-1, 1, 28, 28)
    labels = torch.cat([_idx(f"{part}-labels-idx1-ubyte.gz", 8) for part in ("train", "t10k")])
    small = torch.nn.functional.avg_pool2d(every.float() / 255, 28 // pixels)
    name = f"Fashion-MNIST at {pixels} x {pixels}"
    return _split(name, small, labels.long(), (images, 2000, 10_000), seed, wrong_labels)


def _idx(name: str, header: int) -> Tensor:
    with gzip.open(FASHION / name) as file:
        return torch.tensor(np.frombuffer(file.read(), np.uint8, offset=header))


def _split(
    name: str, images: Tensor, labels: Tensor, sizes: tuple[int, int, int], seed: int, wrong_labels: float
) -> Data:
    generator = torch.Generator().manual_seed(1000 + seed)
    train, val, test, _ = torch.split(
        torch.randperm(len(images), generator=generator), [*sizes, len(images) - sum(sizes)]
    )
    images = ((images - images[train].mean()) / images[train].std()).float()
    targets = labels[train]
    wrong = torch.randperm(len(train), generator=generator)[: int(wrong_labels * len(train))]
    targets[wrong] = (targets[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return Data(name, (images[train], targets), (images[val], labels[val]), (images[test], labels[test]))
