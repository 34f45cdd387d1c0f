"""Snapshot ensembles beside single runs of the same length, and beside their best members.

    python benchmarks/snapshots.py [digits] [perceptron] [cnn] [short] [--seeds 10]

digits: 300 of scikit-learn's digits, a perceptron, 1,500 updates in 5 cycles, 15 % of the labels wrong, and none.
perceptron, cnn: 5,000 images of Fashion-MNIST at 28 x 28, 24 epochs in 4 cycles. short: 10,000 images, 8 epochs in 4
cycles, which are too short: the early members are weak. Beside each the same updates as one cosine, and an ensemble of
as many independent runs of the whole length. Errors are of test data that nothing was chosen on.
"""

import argparse
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits, fashion

from lightning_recipes import LearningRateSchedule, SnapshotEnsemble
from lightning_recipes.callbacks.ensembling import with_state
from lightning_recipes.callbacks.trials import seed_all
from lightning_recipes.core.ensembles import Ensemble

Split = tuple[Tensor, Tensor]


class Classifier(pl.LightningModule):
    """A network, SGD with momentum 0.9."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Nothing: the ensemble asks for the validation data itself."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=1e-4)


@dataclass(frozen=True)
class Score:
    """On test data.

    Args:
        error: In percent.
        nll: Mean negative log-likelihood.
        ece: Expected calibration error.
    """

    error: float
    nll: float
    ece: float


@torch.no_grad()
def score(network: nn.Module, data: Split) -> Score:
    logits = torch.cat([network.eval()(inputs) for inputs in torch.split(data[0], 500)])
    wrong = 100 * (logits.argmax(1) != data[1]).float().mean().item()
    calibration = multiclass_calibration_error(logits.softmax(1), data[1], num_classes=10).item()
    return Score(wrong, functional.cross_entropy(logits, data[1]).item(), calibration)


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Args:
        train: Images and labels.
        val: Likewise.
        test: Likewise.
        net: Makes the network.
        rate: Learning rate of a single run.
        restart: Of a cycle's start.
        steps: Updates.
        cycles: Of them.
        batch: Images in one.
    """

    train: Split
    val: Split
    test: Split
    net: Any
    rate: float
    restart: float
    steps: int
    cycles: int
    batch: int

    def fit(self, seed: int, rate: float, callback: pl.Callback) -> Classifier:
        seed_all(seed)
        module = Classifier(self.net(), rate)
        shuffled = torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(*self.train), self.batch, shuffle=True, drop_last=True, generator=shuffled)
        shown: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        with TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                max_steps=self.steps,
                max_epochs=-1,
                accelerator="cpu",
                devices=1,
                callbacks=[callback],
                enable_model_summary=False,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=10_000,
                default_root_dir=folder,
                **shown,
            )
            trainer.fit(module, loader, DataLoader(TensorDataset(*self.val), 500))
        return module


def compared(name: str, workload: Callable[[int], Workload], seeds: int) -> None:
    print(f"\n## {name}\n")
    scores: dict[str, list[Score]] = {}
    verdicts, disagreements = [], []
    for seed in range(seeds):
        work = workload(seed)
        callback = SnapshotEnsemble(work.cycles)
        module = work.fit(seed, work.restart, callback)
        assert callback.ensemble is not None
        assert callback.report is not None
        members = [with_state(module, state) for state in callback.rule.states()]
        losses = [member.loss for member in callback.report.members]
        single = work.fit(seed, work.rate, LearningRateSchedule("cosine"))
        fresh = [1000 * (1 + run) + seed for run in range(work.cycles - 1)]
        others = [work.fit(each, work.rate, LearningRateSchedule("cosine")) for each in fresh]
        found = {
            "single cosine": single,
            "snapshot ensemble": callback.ensemble,
            "all snapshots alike": Ensemble(members),
            "best snapshot": members[losses.index(min(losses))],
            "last snapshot": members[-1],
            "independent runs": Ensemble([single, *others]),
        }
        for kind, network in found.items():
            scores.setdefault(kind, []).append(score(network, work.test))
        verdicts.append(f"{callback.report.selection.verdict}/{callback.report.selection.how}")
        disagreements.append(callback.report.disagreement)
    print("| | error, % | nll | ece | nll less than single's | error less than single's | wins nll, error |")
    print("|---|---|---|---|---|---|---|")
    for kind, each in scores.items():
        nll = [one.nll - single.nll for one, single in zip(each, scores["single cosine"], strict=True)]
        error = [one.error - single.error for one, single in zip(each, scores["single cosine"], strict=True)]
        wins = f"{sum(value < 0 for value in nll)}, {sum(value < 0 for value in error)} of {seeds}"
        columns = [spread([getattr(one, name) for one in each]) for name in ("error", "nll", "ece")]
        print(f"| {kind} | {' | '.join(columns)} | {interval(nll)} | {interval(error)} | {wins} |")
    pairs = zip(scores["snapshot ensemble"], scores["best snapshot"], strict=True)
    over_best = [one.nll - best.nll for one, best in pairs]
    print(f"\nnll over the best snapshot: {[round(value, 4) for value in over_best]}; verdicts: {verdicts}")
    print(f"disagreement: {spread(disagreements)}", flush=True)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def interval(values: Sequence[float]) -> str:
    """Mean with its 95 % interval."""
    return f"{statistics.fmean(values):+.3f} ± {2.26 * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def perceptron(*sizes: int) -> Any:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def cnn() -> nn.Module:
    body = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(800, 10))


def run_digits(seeds: int) -> None:
    for wrong, restart in ((0.15, 0.2), (0.0, 0.1)):

        def workload(seed: int, wrong: float = wrong, restart: float = restart) -> Workload:
            data = digits(seed, wrong)
            train = data.train[0][:300], data.train[1][:300]
            return Workload(train, data.val, data.test, perceptron(64, 64, 64, 10), 0.1, restart, 1500, 5, 32)

        compared(f"digits, {wrong:.0%} of the labels wrong", workload, seeds)


def run_fashion(net: Any, images: int, epochs: int, cycles: int, name: str, seeds: int) -> None:
    def workload(seed: int) -> Workload:
        data = fashion(seed, 0, 28, images)
        return Workload(data.train, data.val, data.test, net, 0.1, 0.1, images // 64 * epochs, cycles, 64)

    compared(name, workload, seeds)


PARTS: dict[str, Callable[[int], None]] = {
    "digits": run_digits,
    "perceptron": lambda seeds: run_fashion(perceptron(784, 256, 256, 10), 5000, 24, 4, "perceptron", seeds),
    "cnn": lambda seeds: run_fashion(cnn, 5000, 24, 4, "cnn", seeds),
    "short": lambda seeds: run_fashion(cnn, 10_000, 8, 4, "cnn, cycles too short", seeds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
    for part in options.parts or PARTS:
        PARTS[part](options.seeds)


if __name__ == "__main__":
    main()
