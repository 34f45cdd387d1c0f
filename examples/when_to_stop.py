"""When to stop? A network that learns 200 digits by heart: trained to the end, stopped, stopped for want of patience.

python examples/when_to_stop.py [--epochs 150] [--seeds 2]
"""

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from digits import DigitClassifier, Digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import EarlyStopping

STOPPERS = {
    "to the end": None,
    "Lightning, patience 3": pl.callbacks.EarlyStopping,
    "EarlyStopping": EarlyStopping,
}


class FewDigits(Digits):
    """The first 200 training images only."""

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        images, labels = self.data.train
        return DataLoader(TensorDataset(images[:200], labels[:200]), 16, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(*self.data.val), 300)

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(*self.data.test), 599)


def train(stopper: type[pl.callbacks.EarlyStopping] | None, seed: int, epochs: int) -> tuple[int, float]:
    """Epochs trained, and the test loss of the model that is left."""
    pl.seed_everything(seed, verbose=False)
    model, data = DigitClassifier(learning_rate=0.02, glitches=0.0), FewDigits()
    model.test_step = model.validation_step  # type: ignore[method-assign]  # of this one
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[stopper("val_loss")] if stopper else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(model, data)
        trained = trainer.current_epoch
        (scores,) = trainer.test(model, data, verbose=False)
    return trained, scores["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    print(f"{Digits().data.name}, 200 to train; mean of {options.seeds} trainings")
    print(f"{'stopped by':28}{'epochs':>8}{'test loss':>12}")
    for name, stopper in STOPPERS.items():
        ends = [train(stopper, seed, options.epochs) for seed in range(options.seeds)]
        epochs, loss = (statistics.fmean(values) for values in zip(*ends, strict=True))
        print(f"{name:28}{epochs:>8.0f}{loss:>12.3f}", flush=True)


if __name__ == "__main__":
    main()
