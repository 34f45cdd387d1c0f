"""Is the learning rate that a sweep suggests a good one to train at? Beside Lightning's ``lr_find``.

    python benchmarks/learning_rates.py [--steps 700] [--seed 0] [--starts 1] [network ...]

Four networks, with SGD and AdamW each: a perceptron and a CNN on scikit-learn's digits, 10 % of the labels wrong (and
the perceptron with all labels right), a GRU and a transformer on Python's own help texts. A sweep judges by the
validation loss after ``--steps``. Then each network is trained at every rate of the grid, and at those suggested, from
other starts and in other orders; printed is the mean loss in the end over the lowest one of the grid, on validation
and training data, and what the sweep has cost in lengths of a run.
"""

import argparse
import logging
import math
import statistics
import sys
import warnings
from pathlib import Path
from pydoc_data import topics
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits

from lightning_recipes.callbacks.trials import seed_all
from lightning_recipes.core.learning_rate import GRID
from lightning_recipes.sweep import learning_rate_sweep

CONTEXT = 32  # characters
LAST = 50  # steps whose mean is the training loss in the end
TEXT = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:140_000]
LETTERS = sorted(set(TEXT))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    body = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.Flatten(), nn.Linear(512, 10))


class GRU(nn.Module):
    """Of characters."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.body = nn.Embedding(len(LETTERS), 32), nn.GRU(32, 64, batch_first=True)
        self.last = nn.Linear(64, len(LETTERS))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(self.codes(inputs))[0])
        return logits


class Transformer(nn.Module):
    """Two blocks, with normalisation, of characters."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.places = nn.Embedding(len(LETTERS), 48), nn.Parameter(0.02 * torch.randn(CONTEXT, 48))
        block = nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.last = nn.Linear(48, len(LETTERS))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.codes(inputs) + self.places
        logits: Tensor = self.last(self.body(hidden, mask=self.mask, is_causal=True))
        return logits


class Workload(pl.LightningModule):
    """A network and its optimizer."""

    def __init__(self, net: nn.Module, optimizer: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.optimizer, self.settings, self.lr = net, optimizer, settings, 1e-3

    def loss(self, batch: list[Tensor]) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]).flatten(0, -2), batch[1].flatten())

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = self.optimizer(self.parameters(), lr=self.lr, **self.settings)
        return made


def windows(start: int, stop: int) -> TensorDataset:
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT[start : stop + 1]])
    return TensorDataset(ids[:-1].view(-1, CONTEXT), ids[1:].view(-1, CONTEXT))


def ended(
    module: Workload, data: TensorDataset, val: TensorDataset, rate: float, steps: int, seed: int
) -> tuple[float, float]:
    """Validation and training loss in the end; infinite once a loss is not finite."""
    module.lr = rate
    optimizer = module.configure_optimizers()
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader(data, seed + len(losses)):
            optimizer.zero_grad()
            loss = module.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]  # has no types in torch
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return math.inf, math.inf
            if len(losses) == steps:
                break
    with torch.no_grad():
        whole = [module.loss(batch).item() * len(batch[0]) for batch in DataLoader(val, 64)]
    return sum(whole) / len(val), statistics.fmean(losses[-LAST:])


def loader(data: TensorDataset, seed: int) -> DataLoader[Any]:
    chance = torch.Generator().manual_seed(seed)
    return DataLoader(data, 32, shuffle=True, drop_last=True, generator=chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="network", help=f"{', '.join(NETWORKS)}; all by default")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    print(
        "| | ours | loss over the best (validation / training) | runs | lr_find | the same |\n|---|---|---|---|---|---|"
    )
    for name in options.networks or NETWORKS:
        make, data, val = NETWORKS[name](options.seed)
        for optimizer, settings in ((SGD, {"momentum": 0.9}), (AdamW, {})):

            def start(seed: int, make: Any = make, optimizer: Any = optimizer, settings: Any = settings) -> Workload:
                seed_all(seed)
                return Workload(make(), optimizer, settings)

            shown: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = pl.Trainer(max_epochs=-1, enable_model_summary=False, **shown, **quiet)
            peer = Tuner(trainer).lr_find(start(options.seed), loader(data, options.seed), num_training=100)
            asked: dict[str, Any] = {"max_steps": options.steps, "monitor": "val_loss", "show_progress": False, **quiet}
            loaders: dict[str, Any] = {"train_dataloaders": loader(data, options.seed)}
            sweep = learning_rate_sweep(start(options.seed), val_dataloaders=DataLoader(val, 64), **loaders, **asked)
            suggested = (sweep.best and sweep.best.learning_rate, peer and peer.suggestion())
            ends = {}
            for rate in sorted({*GRID, *(rate for rate in suggested if rate)}):
                fresh = range(FRESH + options.seed, FRESH + options.seed + options.starts)
                each = [ended(start(seed), data, val, rate, options.steps, 10_000 * seed) for seed in fresh]
                ends[rate] = [statistics.fmean(losses) for losses in zip(*each, strict=True)]
            lowest = [min(ends[rate][which] for rate in GRID) for which in (0, 1)]
            row = []
            for picked in suggested:
                end = ends.get(picked or 0.0, [math.nan] * 2)
                row.append(f"{picked or 0:.2g} | {end[0] / lowest[0]:.2f} / {end[1] / lowest[1]:.2f}")
            row.insert(1, f"{sweep.steps / options.steps:.1f}")
            print(f"| {name}, {optimizer.__name__} | {' | '.join(row)} |", flush=True)


def pictures(wrong_labels: float, seed: int) -> tuple[TensorDataset, TensorDataset]:
    images = digits(seed, wrong_labels)
    return TensorDataset(*images.train), TensorDataset(*images.val)


def prose() -> tuple[TensorDataset, TensorDataset]:
    return windows(0, 120_000), windows(120_000, 139_200)


FRESH = 100  # the first of the seeds that no sweep has seen
NETWORKS: dict[str, Any] = {
    "perceptron": lambda seed: (perceptron, *pictures(0.1, seed)),
    "clean": lambda seed: (perceptron, *pictures(0.0, seed)),
    "cnn": lambda seed: (cnn, *pictures(0.1, seed)),
    "gru": lambda _: (GRU, *prose()),
    "transformer": lambda _: (Transformer, *prose()),
}


if __name__ == "__main__":
    main()
