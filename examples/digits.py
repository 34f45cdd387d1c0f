"""A small network on handwritten digits, for LightningCLI: the recipes are added on the command line or in YAML.

    python examples/digits.py fit --config examples/digits.yaml
    python examples/digits.py fit --config examples/digits.yaml --trainer.callbacks+=lightning_recipes.EMAWeights

The training is a rough one: a tenth of the labels is wrong, the learning rate is high and stays so, and one batch in
fifty is a sensor glitch, twenty times too bright and with its labels mixed up.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from _data import digits
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy


class DigitClassifier(pl.LightningModule):
    """A perceptron with two hidden layers, trained by SGD with momentum 0.9.

    Args:
        learning_rate: Constant.
        glitches: Share of the training batches that are glitches, after the first fifty.
    """

    def __init__(self, learning_rate: float = 0.05, glitches: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.glitches = learning_rate, glitches
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.global_step >= 50 and torch.rand(()) < self.glitches:
            images, labels = 20 * images, labels[torch.randperm(len(labels))]
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_error", 1 - accuracy(logits, labels, task="multiclass", num_classes=10), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


class Digits(pl.LightningDataModule):
    """Scikit-learn's handwritten digits, a tenth of the training labels wrong.

    Args:
        batch_size: Of the training.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.data = digits(wrong_labels=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.data.train), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.data.test), 599)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small layers: more threads only wait for each other
    LightningCLI(DigitClassifier, Digits)
