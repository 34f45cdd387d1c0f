"""Which learning rate, and does it need a warmup? A deep residual network without normalisation, on digits.

python examples/which_learning_rate.py [--steps 3000] [--seeds 3]

First the sweep of learning rates, then three trainings: at the rate that it suggests, at ten times the lowest one that
is unstable, and there with WarmupSweep, which finds the shortest warmup that makes it stable.
"""

import argparse
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from _data import digits
from digits import DigitClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import LearningRateSchedule, WarmupSweep
from lightning_recipes.sweep import learning_rate_sweep


class Residual(nn.Module):
    """Six residual blocks of width 32, with weights that are too large and no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(6))
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1.4 * (2 / 32) ** 0.5)

    @override
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits: Tensor = self.last(hidden)
        return logits


def make(learning_rate: float) -> DigitClassifier:
    pl.seed_everything(0, verbose=False)
    model = DigitClassifier(learning_rate, glitches=0.0)
    model.net = Residual()  # type: ignore[assignment]  # another network
    model.test_step = model.validation_step  # type: ignore[method-assign]  # of this one
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    data = digits()
    train = DataLoader(TensorDataset(*data.train), 64, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(*data.test), 599)
    print(data.name)
    rates = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3]
    sweep = learning_rate_sweep(make(1e-4), rates, train_dataloaders=train, accelerator="cpu", show_progress=False)
    print(f"\n{sweep.to_markdown()}\n")
    assert sweep.best is not None
    high = 10 * sweep.summary["edge"]
    search = WarmupSweep(base_learning_rate=high, seeds=options.seeds)
    for rate, warmup in ((sweep.best.learning_rate, None), (high, None), (high, search)):
        model = make(rate)
        with TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                accelerator="cpu",
                max_steps=options.steps,
                max_epochs=-1,
                callbacks=[*([] if warmup is None else [warmup]), LearningRateSchedule("cosine")],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=Path(folder),
            )
            trainer.fit(model, train)
            (scores,) = trainer.test(model, test, verbose=False)
        how = "no warmup" if warmup is None else "WarmupSweep"
        print(f"learning rate {rate:.2g}, {how}: test error {scores['val_error']:.1%}", flush=True)
    assert search.result is not None
    print(f"\n{search.result.finding.message}")


if __name__ == "__main__":
    main()
