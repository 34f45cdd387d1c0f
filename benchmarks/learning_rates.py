"""Is the learning rate that a sweep of 100 steps suggests a good one to train at? Beside Lightning's ``lr_find``.

    python benchmarks/learning_rates.py [--steps 700] [--seed 0]

Four networks, with SGD and AdamW each: a perceptron and a CNN on scikit-learn's digits with 10 % wrong labels, a GRU
and a transformer on Python's own help texts. Each is trained at every rate of the grid, and at those that are
suggested; printed is the loss in the end over the lowest one of the grid, on training and validation data.
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
    def configure_optimizers(self) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = self.optimizer(self.parameters(), lr=self.lr, **self.settings)
        return made


def windows(start: int, stop: int) -> TensorDataset:
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT[start : stop + 1]])
    return TensorDataset(ids[:-1].view(-1, CONTEXT), ids[1:].view(-1, CONTEXT))


def ended(module: Workload, data: TensorDataset, val: TensorDataset, rate: float, steps: int) -> tuple[float, float]:
    """Training and validation loss in the end; infinite once a loss is not finite."""
    module.lr = rate
    optimizer = module.configure_optimizers()
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader(data, len(losses)):
            optimizer.zero_grad()
            loss = module.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return math.inf, math.inf
            if len(losses) == steps:
                break
    with torch.no_grad():
        whole = [module.loss(batch).item() for batch in DataLoader(val, 64)]
    return statistics.fmean(losses[-LAST:]), statistics.fmean(whole)


def loader(data: TensorDataset, seed: int) -> DataLoader[Any]:
    chance = torch.Generator().manual_seed(seed)
    return DataLoader(data, 32, shuffle=True, drop_last=True, generator=chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images = digits(options.seed, 0.1)
    pictures = TensorDataset(*images.train), TensorDataset(*images.val)
    prose = windows(0, 120_000), windows(120_000, 139_200)
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    print("| | ours | loss over the best (training / validation) | lr_find | the same |\n|---|---|---|---|---|")
    networks: list[tuple[Any, Any]] = [(perceptron, pictures), (cnn, pictures), (GRU, prose), (Transformer, prose)]
    for make, (data, val) in networks:
        for optimizer, settings in ((SGD, {"momentum": 0.9}), (AdamW, {})):

            def start(make: Any = make, optimizer: Any = optimizer, settings: Any = settings) -> Workload:
                seed_all(options.seed)
                return Workload(make(), optimizer, settings)

            shown: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = pl.Trainer(max_epochs=-1, enable_model_summary=False, **shown, **quiet)
            peer = Tuner(trainer).lr_find(start(), loader(data, 0), num_training=100)
            sweep = learning_rate_sweep(start(), train_dataloaders=loader(data, 0), show_progress=False, **quiet)
            suggested = (sweep.best and sweep.best.learning_rate, peer and peer.suggestion())
            rates = {*GRID, *(rate for rate in suggested if rate)}
            ends = {rate: ended(start(), data, val, rate, options.steps) for rate in sorted(rates)}
            lowest = [min(ends[rate][which] for rate in GRID) for which in (0, 1)]
            row = []
            for rate in suggested:
                over = [end / low for end, low in zip(ends.get(rate or 0.0, (math.nan,) * 2), lowest, strict=True)]
                row.append(f"{rate or 0:.2g} | {over[0]:.2f} / {over[1]:.2f}")
            print(f"| {make.__name__}, {optimizer.__name__} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
