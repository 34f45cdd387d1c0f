"""What LearningCurves reads off curves whose truth is known, and off healthy runs of other kinds, on real data.

    python benchmarks/curves.py [--seeds 8] [--first-seed 100] [--figures FOLDER]

Five classes of runs on scikit-learn's digits, two set-ups each; then runs with one defect each; then healthy runs. A
run is read once, at its end. For the classes the finding that decides is the first of these: diverged; overfitting or
best at the start; validation jumps; falls too slowly or best at the end; none of them means saturated.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import FASHION, digits, fashion

from lightning_recipes.callbacks.curves import draw_curves
from lightning_recipes.core.curves import CurvesRule

Split = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Callable[[float], float]

CLASS_OF = {
    "diverged": "diverged",
    "overfitting": "overfitting",
    "best at the start": "overfitting",
    "validation jumps": "noisy",
    "falls too slowly": "still improving",
    "best at the end": "still improving",
}


def constant(_: float) -> float:
    return 1.0


def cosine(share: float) -> float:
    return 0.5 * (1 + cos(pi * share))


def drop_at(*places: float) -> Schedule:
    return lambda share: 0.1 ** sum(share >= place for place in places)


@dataclass
class Setup:
    """How to train.

    Args:
        data: Makes training and validation data for a seed.
        make: Makes the network.
        learning_rate: Of SGD with momentum 0.9, or Adam.
        batch: Size.
        epochs: How many.
        schedule: Multiplies the learning rate, given the share of the run that is over.
        weight_decay: Of the optimizer.
        adam: Instead of SGD.
        loss: Of outputs and targets.
        shuffle: Whether each epoch has an order of its own.
        expected: Any of these rules must be found in a run with a defect.
    """

    data: Callable[[int], tuple[Split, Split]]
    make: Callable[[], nn.Module]
    learning_rate: float
    batch: int
    epochs: int
    schedule: Schedule = constant
    weight_decay: float = 0.0
    adam: bool = False
    loss: Loss = nn.functional.cross_entropy
    shuffle: bool = True
    expected: tuple[str, ...] = field(default=())


def run(setup: Setup, seed: int) -> CurvesRule:
    """Train, and keep the curves as the callback does."""
    (inputs, targets), (val_inputs, val_targets) = setup.data(seed)
    torch.manual_seed(seed)
    net = setup.make()
    parameters, decay = net.parameters(), setup.weight_decay
    optimizer: torch.optim.Optimizer
    if setup.adam:
        optimizer = torch.optim.AdamW(parameters, setup.learning_rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(parameters, setup.learning_rate, momentum=0.9, weight_decay=decay)
    rule, step = CurvesRule(), 0
    per_epoch = -(-len(inputs) // setup.batch)
    for epoch in range(setup.epochs):
        net.train()
        order = torch.randperm(len(inputs)) if setup.shuffle else torch.arange(len(inputs))
        for place, part in enumerate(torch.split(order, setup.batch)):
            rate = setup.learning_rate * setup.schedule(step / (per_epoch * setup.epochs))
            optimizer.param_groups[0]["lr"] = rate
            loss = setup.loss(net(inputs[part]), targets[part])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            step += 1
            rule.update(loss.item(), rate, step, place / per_epoch)
        net.eval()
        with torch.no_grad():
            rule.check(setup.loss(net(val_inputs), val_targets).item(), step, epoch + 1)
    return rule


# ------------------------------------------------------------------------------------------- networks and data


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = [[nn.Linear(a, b), activation()] for a, b in pairwise(sizes)]
        return nn.Sequential(nn.Flatten(), *[layer for pair in layers for layer in pair][:-1])

    return make


def convolutional(pixels: int = 14, batch_norm: bool = False, dropout: float = 0.0) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norms: list[list[nn.Module]] = [[nn.BatchNorm2d(16)], [nn.BatchNorm2d(32)]] if batch_norm else [[], []]
        first = [nn.Conv2d(1, 16, 3, padding=1), *norms[0], nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(16, 32, 3, padding=1), *norms[1], nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*first, *second, nn.Dropout(dropout), nn.Linear(32 * (pixels // 4) ** 2, 10))

    return make


class Rows(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self, pixels: int = 8) -> None:
        super().__init__()
        self.pixels = pixels
        self.gru, self.head = nn.GRU(pixels, 48, batch_first=True), nn.Linear(48, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(images.view(-1, self.pixels, self.pixels))[1][0])
        return logits


def of_digits(
    count: int = 898, wrong_labels: float = 0.0, by_class: bool = False
) -> Callable[[int], tuple[Split, Split]]:
    def load(seed: int) -> tuple[Split, Split]:
        data = digits(seed, wrong_labels)
        inputs, targets = data.train[0][:count], data.train[1][:count]
        if by_class:
            order = targets.argsort(stable=True)
            inputs, targets = inputs[order], targets[order]
        return (inputs, targets), data.val

    return load


def images_of_digits(seed: int) -> tuple[Split, Split]:
    train, val = of_digits()(seed)
    return (train[0].view(-1, 1, 8, 8), train[1]), (val[0].view(-1, 1, 8, 8), val[1])


def of_fashion(images: int = 3000) -> Callable[[int], tuple[Split, Split]]:
    def load(seed: int) -> tuple[Split, Split]:
        data = fashion(seed, images=images)
        return data.train, (data.val[0][:1000], data.val[1][:1000])

    return load


def diabetes(seed: int) -> tuple[Split, Split]:
    """Scikit-learn's: 300 to train, 142 to validate; noise is about half of the targets' variance."""
    from sklearn.datasets import load_diabetes

    features, progress = (torch.tensor(array, dtype=torch.float32) for array in load_diabetes(return_X_y=True))
    features, progress = features / features.std(0), ((progress - progress.mean()) / progress.std())[:, None]
    order = torch.randperm(len(progress), generator=torch.Generator().manual_seed(seed))
    train, val = order[:300], order[300:]
    return (features[train], progress[train]), (features[val], progress[val])


def pixels(seed: int) -> tuple[Split, Split]:
    """The lower half of a digit from the upper one."""
    (train, _), (val, _) = of_digits()(seed)
    return (train[:, :32], train[:, 32:]), (val[:, :32], val[:, 32:])


def itself(seed: int) -> tuple[Split, Split]:
    (train, _), (val, _) = of_digits()(seed)
    return (train, train), (val, val)


def learned_density(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-density of a Gaussian whose spread is learned; below 0 where it is sure."""
    mean, spread = outputs.chunk(2, 1)
    return nn.functional.gaussian_nll_loss(mean, targets * 0.1, nn.functional.softplus(spread) + 1e-4)


DIGITS = perceptron(64, 64, 10)

CLASSES: dict[str, list[Setup]] = {
    "overfitting": [
        Setup(of_digits(200, 0.15), DIGITS, 0.02, 16, 60),
        Setup(of_digits(300, 0.3), DIGITS, 0.03, 16, 80),
    ],
    "still improving": [
        Setup(of_digits(), DIGITS, 0.002, 32, 12),
        Setup(of_digits(), DIGITS, 0.001, 64, 30),
    ],
    "saturated": [
        Setup(of_digits(), DIGITS, 0.05, 32, 60, weight_decay=3e-3),
        Setup(of_digits(), DIGITS, 0.05, 32, 40, cosine, weight_decay=1e-3),
    ],
    "noisy": [
        Setup(of_digits(400, 0.1), DIGITS, 0.03, 4, 40, weight_decay=1e-3),
        Setup(of_digits(898, 0.1), DIGITS, 0.05, 8, 40, weight_decay=1e-3),
    ],
    "diverged": [
        Setup(of_digits(), DIGITS, 3.0, 32, 20),
        Setup(of_digits(), DIGITS, 1.5, 8, 20),
    ],
}  # fmt: skip

DEFECTS: dict[str, Setup] = {
    "rate / 100": Setup(of_digits(), DIGITS, 0.0005, 32, 20, expected=("falls too slowly",)),
    "rate / 30, Adam": Setup(of_digits(), DIGITS, 3e-5, 32, 20, adam=True, expected=("falls too slowly",)),
    "rate too high, constant": Setup(
        of_fashion(2000), perceptron(196, 64, 10), 0.1, 16, 20,
        expected=("falls fast, then flat", "validation jumps", "training loss rises"),
    ),
    "no decay, noisy labels": Setup(
        of_digits(898, 0.3), perceptron(64, 10), 0.03, 16, 60, expected=("falls fast, then flat",)
    ),
    "decayed too early": Setup(
        of_digits(), DIGITS, 0.003, 32, 40, drop_at(0.15), expected=("decayed too early",)
    ),
    "decayed too early, Fashion": Setup(
        of_fashion(), convolutional(), 0.003, 64, 15, drop_at(0.2), expected=("decayed too early",)
    ),
    "sorted by class": Setup(
        of_digits(by_class=True), DIGITS, 0.01, 32, 20, shuffle=False, expected=("periodic training loss",)
    ),
    "rate 0": Setup(of_digits(), DIGITS, 1e-9, 32, 20, expected=("training loss does not fall",)),
    "few samples, 40 % wrong": Setup(
        of_digits(300, 0.4), perceptron(64, 128, 10), 3e-3, 16, 60, adam=True,
        expected=("overfitting", "best at the start"),
    ),
}  # fmt: skip

HEALTHY: dict[str, Setup] = {
    "digits, cosine": Setup(of_digits(), DIGITS, 0.05, 32, 30, cosine, 1e-4),
    "digits, constant": Setup(of_digits(), DIGITS, 0.02, 32, 25, weight_decay=1e-3),
    "digits, Adam": Setup(of_digits(), perceptron(64, 64, 64, 10), 1e-3, 32, 20, adam=True, weight_decay=0.01),
    "digits, 10 % wrong, cosine": Setup(of_digits(898, 0.1), DIGITS, 0.02, 32, 12, cosine, 1e-3),
    "digits, 10 % wrong, decayed weights": Setup(of_digits(898, 0.1), DIGITS, 0.01, 32, 15, cosine, 0.03),
    "digits, steps": Setup(of_digits(), DIGITS, 0.05, 32, 30, drop_at(0.5, 0.75), 1e-3),
    "digits, CNN": Setup(images_of_digits, convolutional(8), 0.02, 32, 15, cosine),
    "digits, BatchNorm": Setup(images_of_digits, convolutional(8, True), 0.02, 32, 15, cosine, 5e-4),
    "digits, GRU, cosine": Setup(of_digits(), Rows, 3e-3, 32, 25, cosine, adam=True),
    "digits, GRU, constant": Setup(of_digits(), Rows, 1e-3, 32, 30, adam=True),
    "digits, not shuffled": Setup(of_digits(), DIGITS, 0.02, 32, 20, cosine, shuffle=False),
    "diabetes, linear": Setup(diabetes, lambda: nn.Linear(10, 1), 0.003, 16, 30, loss=nn.functional.mse_loss),
    "diabetes, perceptron": Setup(
        diabetes, perceptron(10, 16, 1), 0.01, 32, 20, cosine, 0.01, loss=nn.functional.mse_loss
    ),
    "pixels, squared error": Setup(
        pixels, perceptron(32, 128, 32), 1e-3, 32, 40, cosine, 0.05, adam=True, loss=nn.functional.mse_loss
    ),
    "autoencoder, loss near 0": Setup(
        itself, perceptron(64, 128, 64), 1e-3, 32, 60, cosine, adam=True, loss=nn.functional.mse_loss
    ),
    "linear, loss at 0": Setup(itself, lambda: nn.Linear(64, 64), 3e-3, 32, 60, adam=True, loss=nn.functional.mse_loss),
    "density, negative": Setup(
        pixels, perceptron(32, 64, 64), 1e-3, 32, 25, cosine, 0.01, adam=True, loss=learned_density
    ),
}  # fmt: skip
if FASHION.is_dir():
    HEALTHY["Fashion, CNN, cosine"] = Setup(of_fashion(), convolutional(), 0.02, 32, 8, cosine, 5e-4)
    HEALTHY["Fashion, CNN, dropout"] = Setup(
        of_fashion(), convolutional(dropout=0.5), 1e-3, 64, 12, adam=True, weight_decay=0.01
    )


# ------------------------------------------------------------------------------------------- the figures


def class_of(rules: list[str]) -> str:
    return next((CLASS_OF[rule] for rule in CLASS_OF if rule in rules), "saturated")


def seeded(setups: list[Setup], seeds: range, folder: Path | None, name: str) -> Iterator[list[str]]:
    """The findings of each run; those of severity warning or error with a ! behind."""
    for number, setup in enumerate(setups):
        for seed in seeds:
            rule = run(setup, seed)
            findings = rule.findings()
            if folder is not None and seed == seeds[0]:
                draw_curves(rule).savefig(folder / f"{name.replace(' ', '_').replace('/', '')}_{number}.png", dpi=80)
                print(*("       " + finding.text for finding in findings), sep="\n")
            yield [finding.rule + "!" * (finding.severity != "info") for finding in findings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--part", choices=("classes", "defects", "healthy"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if options.part in (None, "classes"):
        right = total = 0
        print(f"Five classes, seeds {seeds[0]} to {seeds[-1]}: truth, and what was read")
        for truth, setups in CLASSES.items():
            read = Counter(
                class_of([rule.rstrip("!") for rule in rules])
                for rules in seeded(setups, seeds, options.figures, truth)
            )
            right, total = right + read[truth], total + sum(read.values())
            print(f"    {truth:18}{dict(read)}", flush=True)
        print(f"    right: {right} of {total}\n")
    if options.part in (None, "defects"):
        print("One defect each: runs in which it was named, and all findings (! is a warning)")
        for name, setup in DEFECTS.items():
            rules = list(seeded([setup], seeds, options.figures, name))
            named = sum(any(rule.rstrip("!") in setup.expected for rule in each) for each in rules)
            print(
                f"    {name:38}{named} of {len(rules)}  {dict(Counter(rule for each in rules for rule in each))}",
                flush=True,
            )
        print()
    if options.part in (None, "healthy"):
        print("Healthy: runs with a warning, and all findings")
        alarms = total = 0
        for name, setup in HEALTHY.items():
            rules = list(seeded([setup], seeds, options.figures, name))
            warned = sum(any(rule.endswith("!") for rule in each) for each in rules)
            alarms, total = alarms + warned, total + len(rules)
            print(
                f"    {name:38}{warned} of {len(rules)}  {dict(Counter(rule for each in rules for rule in each))}",
                flush=True,
            )
        print(f"    with a warning: {alarms} of {total}")


if __name__ == "__main__":
    main()
