"""Whether ``compare_capacity`` tells too small a network from one that the optimization does not get anywhere with.

    python benchmarks/capacity.py [--only NAME] [--first 0] [--steps 500] [--seeds 5] [--runs 2]

Pairs of networks on real data (scikit-learn's digits, diabetes and cells, Fashion-MNIST, Python's own help texts): deep
ones that are hard to train, beside shallow ones; ones that are large enough, beside ones that are too small; ones that
are both in order; and ones that cannot learn. Each pair is compared several times, on other seeds. Printed are the
losses and verdicts, and the confusion table. A network in order must not be called hard to train.
"""

import argparse
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _zoo import Letters, Recurrent, cnn, letters, mlp
from torch import Tensor, nn
from torch.nn import functional
from updates import Block, Pair, batches, of_cells, of_diabetes, of_digits, of_fashion

from lightning_recipes.sweep import compare_capacity

Net = Callable[[], nn.Module]
Data = Callable[[int], tuple[Pair, Pair]]
RIGHT = {
    "hard to train": {"optimization"},
    "too small": {"capacity"},
    "both in order": {"alike", "capacity"},
    "cannot learn": {"neither learns"},
}
VERDICTS = ("optimization", "capacity", "alike", "neither learns")


@dataclass(frozen=True)
class Case:
    """Two networks and how they are trained.

    Args:
        name: What is special.
        model: The larger network.
        baseline: The smaller one.
        data: For a seed.
        rate: Learning rate.
        optimizer: ``"sgd"``, with momentum, or ``"adam"``.
        loss: Of outputs and targets.
        spoilt: What is done to each batch.
    """

    name: str
    model: Net
    baseline: Net
    data: Data
    rate: float = 0.03
    optimizer: str = "sgd"
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    spoilt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def trained(self, make: Net, first: int) -> Callable[[int], tuple[torch.optim.Optimizer, Callable[[], Tensor]]]:
        """What ``compare_capacity`` takes: for a seed an optimizer and the loss of the next batch."""
        training, _ = self.data(first)

        def of(seed: int) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
            torch.manual_seed(1000 * first + seed)
            net, stream = make(), batches(*training, 32, seed)
            optimizer: torch.optim.Optimizer
            if self.optimizer == "sgd":
                optimizer = torch.optim.SGD(net.parameters(), self.rate, momentum=0.9)
            else:
                optimizer = torch.optim.Adam(net.parameters(), self.rate)

            def loss() -> Tensor:
                inputs, targets = next(stream)
                if self.spoilt is not None:
                    inputs, targets = self.spoilt(inputs, targets)
                return self.loss(net(inputs), targets)

            return optimizer, loss

        return of


def plain(blocks: int) -> nn.Module:
    """Convolutions one after the other, with neither BatchNorm nor anything that goes past them."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()]
    for _ in range(blocks):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def residual(blocks: int) -> nn.Module:
    first = nn.Conv2d(1, 16, 3, 2, 1)
    return nn.Sequential(first, *map(Block, [16] * blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def deep(inside: int, depth: int, outside: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    net: nn.Module = mlp(inside, *[64] * depth, outside, activation=activation)
    return net


def scaled(net: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
    return net


def noisy(seed: int) -> tuple[Pair, Pair]:
    return of_digits(seed, wrong=0.2)


def of_letters(seed: int) -> tuple[Pair, Pair]:
    return letters(seed)


def guess(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, targets[torch.randperm(len(targets))]


def blind(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return 0 * inputs, targets


MSE = functional.mse_loss
CASES = {
    "hard to train": [
        Case("fashion, 20 plain layers", lambda: deep(196, 20, 10), lambda: mlp(196, 64, 10), of_fashion),
        Case(
            "digits, 8 sigmoid layers",
            lambda: deep(64, 8, 10, nn.Sigmoid),
            lambda: deep(64, 1, 10, nn.Sigmoid),
            of_digits,
            0.1,
        ),
        Case(
            "digits, 6 sigmoid layers, Adam",
            lambda: deep(64, 6, 10, nn.Sigmoid),
            lambda: mlp(64, 10),
            of_digits,
            1e-3,
            "adam",
        ),
        Case("fashion, 12 plain convolutions", lambda: plain(12), lambda: plain(1), of_fashion),
        Case(
            "letters, 16 plain layers",
            lambda: Letters(deep(48, 16, 48)[1:]),  # type: ignore[index]  # without Flatten
            lambda: Letters(nn.Identity()),
            of_letters,
            3e-3,
            "adam",
        ),
        Case(
            "diabetes, 10 tanh, small init",
            lambda: scaled(deep(10, 10, 1, nn.Tanh), 0.3),
            lambda: mlp(10, 1),
            of_diabetes,
            0.01,
            loss=MSE,
        ),
        Case("digits, init x 5", lambda: scaled(deep(64, 5, 10), 5), lambda: mlp(64, 10), of_digits),
        Case("fashion, rate x 10", lambda: deep(196, 4, 10), lambda: mlp(196, 10), of_fashion, 0.3),
    ],
    "too small": [
        Case("fashion, 2 hidden units", lambda: mlp(196, 128, 10), lambda: mlp(196, 2, 10), of_fashion),
        Case("fashion, linear", cnn, lambda: mlp(196, 10), of_fashion, 1e-3, "adam"),
        Case(
            "letters, one letter back",
            lambda: Letters(Recurrent(48, 48, batch_first=True)),
            lambda: Letters(nn.Identity()),
            of_letters,
            3e-3,
            "adam",
        ),
        Case("digits, linear, noisy labels", lambda: mlp(64, 256, 256, 10), lambda: mlp(64, 10), noisy, 1e-3, "adam"),
        Case("digits, one hidden unit", lambda: mlp(64, 64, 10), lambda: mlp(64, 1, 10), of_digits),
        Case("diabetes, linear", lambda: mlp(10, 128, 128, 1), lambda: mlp(10, 1), of_diabetes, 3e-3, "adam", MSE),
    ],
    "both in order": [
        Case("digits, as large", lambda: mlp(64, 64, 10), lambda: mlp(64, 64, 10), of_digits),
        Case("digits, twice as wide", lambda: mlp(64, 128, 10), lambda: mlp(64, 64, 10), of_digits),
        Case("digits, three layers and one", lambda: deep(64, 3, 10), lambda: deep(64, 1, 10), of_digits),
        Case("digits, AdamW, deeper", lambda: deep(64, 4, 10), lambda: deep(64, 2, 10), of_digits, 1e-3, "adam"),
        Case("cells, linear and not", lambda: deep(30, 2, 2), lambda: mlp(30, 2), of_cells),
        Case("fashion, wider", lambda: mlp(196, 160, 10), lambda: mlp(196, 128, 10), of_fashion),
        Case("fashion, residual", lambda: residual(6), lambda: residual(3), of_fashion),
        Case("diabetes, wider", lambda: mlp(10, 48, 1), lambda: mlp(10, 32, 1), of_diabetes, 0.01, loss=MSE),
    ],
    "cannot learn": [
        Case("digits, labels by chance", lambda: mlp(64, 64, 10), lambda: mlp(64, 10), of_digits, spoilt=guess),
        Case("fashion, inputs of zero", cnn, lambda: mlp(196, 10), of_fashion, spoilt=blind),
        Case("diabetes, rate / 10,000", lambda: mlp(10, 64, 1), lambda: mlp(10, 1), of_diabetes, 3e-6, loss=MSE),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of a case")
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table: dict[str, Counter[str]] = {kind: Counter() for kind in CASES}
    for kind, cases in CASES.items():
        for case in cases:
            for first in range(options.first, options.first + options.runs):
                if options.only not in case.name:
                    continue
                begun = time.process_time()
                model, baseline = case.trained(case.model, first), case.trained(case.baseline, first)
                found = compare_capacity(model, baseline, options.steps, options.seeds)
                table[kind][found.verdict] += 1
                mark = "" if found.verdict in RIGHT[kind] else "  <- wrong"
                losses = f"{found.model_loss:8.4g} {found.baseline_loss:8.4g} {found.constant_loss:8.4g}"
                error = f"{found.difference:9.2g} ± {found.difference_error:.1g}"
                seconds = time.process_time() - begun
                print(
                    f"{kind:14} {case.name:32}{losses} {error:20}{found.verdict}{mark}  ({seconds:.0f} s)", flush=True
                )
    print(f"\n{'':16}" + "".join(f"{verdict:>16}" for verdict in VERDICTS))
    for kind, verdicts in table.items():
        print(f"{kind:16}" + "".join(f"{verdicts[verdict]:16}" for verdict in VERDICTS))


if __name__ == "__main__":
    main()
