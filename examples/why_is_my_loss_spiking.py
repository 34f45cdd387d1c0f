"""Why is my loss spiking, and what to do? Digits, with twenty broken batches in a row in the middle of the run.

python examples/why_is_my_loss_spiking.py [--epochs 20]

The same training four times: without a recipe, with a detector that only tells, with one that skips such updates, and
with one that goes back to the last good state.
"""

import argparse
import logging
import warnings
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from _data import digits
from digits import DigitClassifier
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import InstabilityDetector


class Poisoned(DigitClassifier):
    """From step 200 on twenty batches are a thousand times too bright."""

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return super().training_step((1000 * images if 200 <= step < 220 else images, labels), batch_idx)


ACTIONS: dict[str, list[dict[str, Any]]] = {
    "no recipe": [],
    "warn": [{}],
    "skip": [{"action": "skip"}],
    "rewind": [{"action": "rewind"}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    data = digits()
    print(data.name)
    for name, detectors in ACTIONS.items():
        pl.seed_everything(0, verbose=False)
        with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer = pl.Trainer(
                accelerator="cpu",
                max_epochs=options.epochs,
                callbacks=[InstabilityDetector(**arguments) for arguments in detectors],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            train = DataLoader(TensorDataset(*data.train), 32, shuffle=True, drop_last=True)
            trainer.fit(Poisoned(0.05, 0.0), train, DataLoader(TensorDataset(*data.test), 599))
        error = trainer.callback_metrics["val_error"].item()
        print(f"\n{name}: test error {error:.1%}")
        for warning in told:
            if " at step " in str(warning.message):
                print(f"  {warning.message}")


if __name__ == "__main__":
    main()
