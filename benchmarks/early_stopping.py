"""Epochs saved against test loss lost, of every criterion and of Lightning's EarlyStopping, on real overfitting runs.

    python benchmarks/early_stopping.py [--seeds 8] [--epochs 200]

Each run trains to the end and records its curves; each criterion is then asked where it would have stopped. The model
that it leaves is that of its best validation; "lost" is by how much the test loss of that one is above the test loss at
the best validation of the whole run.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits, fashion

from lightning_recipes.core.early_stopping import (
    Criterion,
    EarlyStoppingRule,
    GeneralizationLoss,
    Patience,
    ProgressQuotient,
    SuccessiveRises,
)

Split = tuple[Tensor, Tensor]


@dataclass
class Curves:
    """Of one run, an entry an epoch."""

    train: list[float]
    validation: list[float]
    test: list[float]


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [[nn.Linear(a, b), activation()] for a, b in pairwise(sizes)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def convolutional() -> nn.Sequential:
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 10))


def breast_cancer(seed: int, wrong_labels: float = 0.1) -> list[Split]:
    """Scikit-learn's: 150 to train, 150 to validate, 269 to test; 30 features, two classes."""
    from sklearn.datasets import load_breast_cancer

    features, labels = (torch.tensor(array) for array in load_breast_cancer(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    train, validation, test = torch.split(torch.randperm(len(labels), generator=generator), [150, 150, 269])
    features = ((features - features[train].mean(0)) / features[train].std(0)).float()
    targets = labels.clone()
    wrong = train[: int(wrong_labels * len(train))]
    targets[wrong] = 1 - targets[wrong]
    return [
        (features[train], targets[train]),
        (features[validation], labels[validation]),
        (features[test], labels[test]),
    ]


def of_digits(count: int, validate: int, wrong_labels: float) -> Callable[[int], list[Split]]:
    def load(seed: int) -> list[Split]:
        data = digits(seed, wrong_labels)
        return [
            (data.train[0][:count], data.train[1][:count]),
            (data.val[0][:validate], data.val[1][:validate]),
            data.test,
        ]

    return load


def of_fashion(seed: int) -> list[Split]:
    data = fashion(seed, 0.2)
    return [(data.train[0][:500], data.train[1][:500]), (data.val[0][:500], data.val[1][:500]), data.test]


def train(data: list[Split], net: nn.Module, optimizer: torch.optim.Optimizer, batch: int, epochs: int) -> Curves:
    (inputs, targets), *held_out = data
    curves = Curves([], [], [])
    for _ in range(epochs):
        losses = []
        for part in torch.split(torch.randperm(len(inputs)), batch):
            loss = nn.functional.cross_entropy(net(inputs[part]), targets[part])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        curves.train.append(statistics.fmean(losses))
        with torch.no_grad():
            validation, test = (nn.functional.cross_entropy(net(x), y).item() for x, y in held_out)
        curves.validation.append(validation)
        curves.test.append(test)
    return curves


def sgd(learning_rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda net: torch.optim.SGD(net.parameters(), learning_rate, momentum=0.9)


def adam(learning_rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda net: torch.optim.Adam(net.parameters(), learning_rate)


WORKLOADS: dict[
    str, tuple[Callable[[int], list[Split]], Callable[[], nn.Module], Callable[..., torch.optim.Optimizer], int]
]
WORKLOADS = {
    "digits 200, 15 % wrong": (of_digits(200, 300, 0.15), lambda: perceptron(64, 128, 10), sgd(0.02), 16),
    "digits 400, 30 % wrong": (of_digits(400, 100, 0.3), lambda: perceptron(64, 128, 10), sgd(0.05), 16),
    "digits, Adam, 40 validate": (of_digits(300, 40, 0.2), lambda: perceptron(64, 64, 64, 10), adam(1e-3), 8),
    "breast cancer, 10 % wrong": (breast_cancer, lambda: perceptron(30, 64, 64, 2), adam(1e-3), 16),
    "Fashion, conv, 20 % wrong": (of_fashion, convolutional, adam(1e-3), 32),
    "plateau (deep sigmoid)": (
        of_digits(600, 300, 0.0),
        lambda: perceptron(64, 48, 48, 48, 10, activation=nn.Sigmoid),
        sgd(0.03),
        32,
    ),
}  # fmt: skip

Judge = Callable[[Curves], int]


def ours(criterion: Criterion, min_delta: float | str = "auto") -> Judge:
    def stop(curves: Curves) -> int:
        rule = EarlyStoppingRule(min_delta)
        for epoch, (value, loss) in enumerate(zip(curves.validation, curves.train, strict=True), 1):
            if rule.update(value, criterion, loss):
                return epoch
        return len(curves.validation)

    return stop


def lightnings(patience: int) -> Judge:
    def stop(curves: Curves) -> int:
        callback = LightningEarlyStopping("val_loss", patience=patience)
        for epoch, value in enumerate(curves.validation, 1):
            if callback._evaluate_stopping_criteria(torch.tensor(value))[0]:
                return epoch
        return len(curves.validation)

    return stop


JUDGES: dict[str, Judge] = {
    "EarlyStopping (default)": ours(Patience(3)),
    "EarlyStopping, patience 5": ours(Patience(5)),
    "GeneralizationLoss(5)": ours(GeneralizationLoss(5)),
    "ProgressQuotient(0.5)": ours(ProgressQuotient(0.5)),
    "SuccessiveRises(2)": ours(SuccessiveRises(2)),
    "SuccessiveRises(3)": ours(SuccessiveRises(3)),
    "Lightning, patience 3": lightnings(3),
    "Lightning, patience 10": lightnings(10),
    "Lightning, patience 20": lightnings(20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"% of {options.epochs} epochs saved / % of test loss lost, mean of {options.seeds} seeds (worst)\n")
    for name, (load, make, optimizer, batch) in WORKLOADS.items():
        runs = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net = make()
            runs.append(train(load(seed), net, optimizer(net), batch, options.epochs))
        print(name)
        for judge, stop in JUDGES.items():
            saved, lost = [], []
            for curves in runs:
                end, validation = stop(curves), curves.validation
                kept, best = validation.index(min(validation[:end])), validation.index(min(validation))
                saved.append(100 * (1 - end / options.epochs))
                lost.append(100 * (curves.test[kept] / curves.test[best] - 1))
            print(
                f"    {judge:28}{statistics.fmean(saved):6.1f} / {statistics.fmean(lost):6.1f} ({max(lost):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
