"""Is the average better than the last weights? At a constant learning rate, and under one that decays to zero.

python examples/is_the_average_better.py [--epochs 13] [--seeds 3]
"""

import argparse
import logging
import statistics
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from digits import DigitClassifier, Digits

from lightning_recipes import EMAWeights


class Decaying(DigitClassifier):
    """The same network under a cosine schedule to zero."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def score(kind: type[DigitClassifier], seed: int, epochs: int) -> dict[str, float]:
    """Both losses at the end of one training: of the average (val_loss) and of the raw weights (val_loss_raw)."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[EMAWeights(validate_raw=True)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(kind(glitches=0.0), Digits())
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    print(f"{Digits().data.name}; {options.epochs} epochs, mean of {options.seeds} trainings")
    print(f"{'learning rate':24}{'loss: raw':>12}{'average':>12}{'error: raw':>14}{'average':>12}")
    for name, kind in (("constant", DigitClassifier), ("cosine to zero", Decaying)):
        ends = [score(kind, seed, options.epochs) for seed in range(options.seeds)]
        raw, average, raw_error, average_error = (
            statistics.fmean(end[key] for end in ends)
            for key in ("val_loss_raw", "val_loss", "val_error_raw", "val_error")
        )
        print(f"{name:24}{raw:>12.3f}{average:>12.3f}{raw_error:>14.1%}{average_error:>12.1%}", flush=True)


if __name__ == "__main__":
    main()
