"""Is my run stuck, and in what? Three trainings on digits whose loss does not fall, each for another reason.

python examples/is_my_run_stuck.py [--steps 2500]

Bouncing between the walls of a valley, at a learning rate that is too high for the curvature; a saddle, because all
units start alike; and a minimum. The loss curve looks the same; the curvature tells them apart.
"""

import argparse
import logging
import warnings
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from _data import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import CriticalPointProbe


class Perceptron(pl.LightningModule):
    """Twelve hidden units, trained by gradient descent on all of the data; the targets are smoothed.

    Args:
        learning_rate: Constant.
        weight: That all weights start at, random ones if None.
    """

    def __init__(self, learning_rate: float, weight: float | None = None) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
        if weight is not None:
            for parameter in self.parameters():
                nn.init.constant_(parameter, weight)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels, label_smoothing=0.1)
        self.log("train_loss", loss)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    images, labels = (tensor[:60] for tensor in digits().train)
    print("scikit-learn digits, 60 images")
    for name, learning_rate, weight in (
        ("learning rate 6", 6.0, None),
        ("all weights start at 0", 0.2, 0.0),
        ("learning rate 2", 2.0, None),
    ):
        pl.seed_everything(0, verbose=False)
        probe = CriticalPointProbe(patience=100)
        with TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                accelerator="cpu",
                max_steps=options.steps,
                max_epochs=-1,
                callbacks=[probe],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(Perceptron(learning_rate, weight), DataLoader(TensorDataset(images, labels), 60))
        print(f"\n{name}: loss {trainer.callback_metrics['train_loss'].item():.3f}")
        print(f"  {probe.finding.text if probe.finding else 'The loss still falls: there was no reason to look.'}")


if __name__ == "__main__":
    main()
