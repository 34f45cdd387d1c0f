"""Is it broken? Five trainings on digits, one as it should be and four with one mistake each, and what is said of them.

python examples/is_it_broken.py [--epochs 10] [--folder is_it_broken]

The mistakes are of the kind that raises no error: the network trains, only worse. The folder has a report of each.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from _data import digits
from digits import DigitClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import InitialLossCheck, LearningCurves, OverfitCheck, TrainingReport, UpdateRatioMonitor


class SoftmaxTwice(DigitClassifier):
    """Cross-entropy has a softmax of its own."""

    @override
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


class ShuffledTwice(DigitClassifier):
    """Images and labels are shuffled each on their own."""

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images, labels[torch.randperm(len(labels))]), batch_idx)


class Forgets(DigitClassifier):
    """The optimizer was not given the first layers."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[-1].parameters(), self.learning_rate, momentum=0.9)


class LargeWeights(DigitClassifier):
    """The last layer starts with weights that are thirty times too large."""

    def __init__(self, learning_rate: float, glitches: float) -> None:
        super().__init__(learning_rate, glitches)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=30 / 64**0.5)


TRAININGS: dict[str, Callable[[float, float], DigitClassifier]] = {
    "as it should be": DigitClassifier,
    "softmax twice": SoftmaxTwice,
    "shuffled apart": ShuffledTwice,
    "layers forgotten": Forgets,
    "weights too large": LargeWeights,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("is_it_broken"), help="where the reports go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    data = digits()
    print(data.name)
    for name, make in TRAININGS.items():
        pl.seed_everything(0, verbose=False)
        folder = options.folder / name.replace(" ", "_")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            callbacks=[InitialLossCheck(), OverfitCheck(), UpdateRatioMonitor(), LearningCurves(), TrainingReport()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        train = DataLoader(TensorDataset(*data.train), 32, shuffle=True, drop_last=True)
        trainer.fit(make(0.02, 0.0), train, DataLoader(TensorDataset(*data.val), 300))
        findings = [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]
        error = trainer.callback_metrics["val_error"].item()
        print(f"\n{name}: validation error {error:.1%}")
        for finding in findings:
            if finding["severity"] != "info":
                print(f"  {finding['rule']}: {finding['message']} {finding['advice']}")
    print(f"\nThe reports: {options.folder}/*/report.html")


if __name__ == "__main__":
    main()
