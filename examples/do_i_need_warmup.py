"""Do I need warmup? A deep residual network without normalisation, on digits.

python examples/do_i_need_warmup.py [--steps 3000] [--seeds 3]

WarmupSweep finds the lowest learning rate that is unstable, and the shortest warmup that makes one ten times as high
stable. Then two trainings without it: at the rate that is stable without a warmup, and at the high one.
"""

import argparse
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from _data import digits
from digits import DigitClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import LearningRateSchedule, WarmupSweep


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


def error(module: DigitClassifier, train: Any, test: Any, steps: int, *recipes: pl.Callback) -> float:
    """Of a training under a cosine, on the test data."""
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*recipes, LearningRateSchedule("cosine")],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(module, train)
        (scores,) = trainer.test(module, test, verbose=False)
    return scores["val_error"]


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
    search = WarmupSweep(seeds=options.seeds, show_progress=False)
    warmed = error(make(1e-4), train, test, options.steps, search)
    assert search.result is not None
    print(f"\n{search.result.to_markdown()}\n")
    if search.result.best is None:
        return
    high = search.result.best.learning_rate
    for rate in (1e-4, high):
        print(f"learning rate {rate:.2g}, no warmup: test error {error(make(rate), train, test, options.steps):.1%}")
    print(f"learning rate {high:.2g}, warmup of {search.warmup_steps} steps: test error {warmed:.1%}")


if __name__ == "__main__":
    main()
