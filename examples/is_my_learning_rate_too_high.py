"""Is my learning rate too high? Three ways to find out, of a perceptron on digits.

python examples/is_my_learning_rate_too_high.py [--learning-rate 0.5] [--steps 1000]

A training at that rate, watched by UpdateRatioMonitor; a copy trained at twice the rate, whether an instability hides
there; and the sweep, which says what to train at. Then a training at that rate.
"""

import argparse
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from _data import Data, digits
from digits import DigitClassifier
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import UpdateRatioMonitor
from lightning_recipes.sweep import early_instability_probe, learning_rate_sweep


def loaders(data: Data) -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    train = DataLoader(TensorDataset(*data.train), 32, shuffle=True, drop_last=True)
    return train, DataLoader(TensorDataset(*data.val), 300)


def make(learning_rate: float) -> DigitClassifier:
    pl.seed_everything(0, verbose=False)
    return DigitClassifier(learning_rate, glitches=0.0)


def train(data: Data, learning_rate: float, steps: int) -> tuple[float, str]:
    """Validation loss in the end, and what the monitor says."""
    monitor = UpdateRatioMonitor(every_n_steps=10)
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(make(learning_rate), *loaders(data))
    finding = monitor.rule[0].finding()
    return trainer.callback_metrics["val_loss"].item(), finding.text if finding else "nothing to say"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    data, rate = digits(wrong_labels=0.1), options.learning_rate
    print(data.name)
    loss, told = train(data, rate, options.steps)
    print(f"\nUpdateRatioMonitor at {rate:g}: validation loss {loss:.3f}\n  {told}")

    probe = early_instability_probe(make(rate), loaders(data)[0], steps=options.steps // 4, accelerator="cpu")
    print(f"\nearly_instability_probe\n  {probe.finding.text}")

    sweep = learning_rate_sweep(
        make(rate),
        [rate * factor for factor in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)],
        max_steps=options.steps,
        monitor="val_loss",
        train_dataloaders=loaders(data)[0],
        val_dataloaders=loaders(data)[1],
        show_progress=False,
        accelerator="cpu",
    )
    print(f"\nlearning_rate_sweep\n\n{sweep.to_markdown()}")
    assert sweep.best is not None
    loss, told = train(data, sweep.best.learning_rate, options.steps)
    print(f"\nUpdateRatioMonitor at {sweep.best.learning_rate:g}: validation loss {loss:.3f}\n  {told}")


if __name__ == "__main__":
    main()
