"""How far the gradient noise scale of ``GradientNoiseScale`` is from the exact one.

    python benchmarks/noise_scale.py [--seeds 3] [--pairs 50 400]

A perceptron on scikit-learn's digits, at its start and after 50, 300 and 3,000 updates. The exact
``tr(Sigma) / |G|^2`` is that of every example's own gradient. The estimate is the callback's, in a Trainer with a
learning rate of 0, batches of 8 drawn with replacement and ``accumulate_grad_batches=8``.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import Data, digits

from lightning_recipes import GradientNoiseScale
from lightning_recipes.core.noise_scale import NoiseScale

SMALL, TIMES = 8, 8


class Still(pl.LightningModule):
    """A network whose weights stay."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trained(data: Data, updates: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(updates):
        batch = torch.randint(len(data.train[0]), (32,))
        loss = nn.functional.cross_entropy(net(data.train[0][batch]), data.train[1][batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # has no types in torch
        optimizer.step()
    return net


def exact(net: nn.Module, data: Data) -> float:
    gradients = []
    for image, label in zip(*data.train, strict=True):
        loss = nn.functional.cross_entropy(net(image[None]), label[None])
        parts = torch.autograd.grad(loss, list(net.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    each = torch.stack(gradients)
    mean = each.mean(0)
    return float((each - mean).square().sum(1).mean() / mean.square().sum())


def estimated(net: nn.Module, data: Data, pairs: int, seed: int) -> NoiseScale:
    generator = torch.Generator().manual_seed(seed)
    batches: Any = [
        (data.train[0][index], data.train[1][index])
        for index in torch.randint(len(data.train[0]), (pairs * TIMES, SMALL), generator=generator)
    ]
    noise = GradientNoiseScale(window=pairs)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=TIMES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        callbacks=[noise],
    )
    trainer.fit(Still(net), DataLoader(batches, batch_size=None))
    return noise.rule.estimate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 400])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for updates in (0, 50, 300, 3000):
        for seed in range(options.seeds):
            data = digits(seed)
            net = trained(data, updates, seed)
            truth = exact(net, data)
            for pairs in options.pairs:
                scale = estimated(net, data, pairs, seed)
                off = f"{scale.value / truth - 1:+.0%}" if scale.is_certain else "no point estimate"
                covers = "covers it" if scale.low <= truth <= scale.high else "misses it"
                interval = f"{scale.low:.3g} to {scale.high:.3g} {covers}"
                told = f"{scale.text} ({off}; {interval})"
                print(f"update {updates:4} seed {seed}: exact {truth:8.3g}  {pairs:4} pairs: {told}", flush=True)


if __name__ == "__main__":
    main()
