"""What TrainingReport costs: a step, a page, a checkpoint; what reading a long run from its files takes."""

import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import TrainingReport
from lightning_recipes.report.page import render
from lightning_recipes.report.reading import read_run
from lightning_recipes.report.run import Run


class Net(pl.LightningModule):
    """A small network, whose steps are short."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def seconds(callbacks: list[pl.Callback], folder: Path, logger: Any = False, batches: int = 3000) -> float:
    """Time of a run of so many updates."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 64), torch.randint(0, 10, (8,)))
    train = DataLoader(data, batch_sampler=[list(range(8))] * batches)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=logger,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(Net(), train, DataLoader(data, 8))
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = TrainingReport()
        pairs = [(seconds([], folder), seconds([report], folder)) for _ in range(5)]
        without, beside = (min(times) for times in zip(*pairs, strict=True))
        print(f"a step: {without / 3000 * 1e6:.0f} us without, {beside / 3000 * 1e6:.0f} us with, page included")

        run = Run(series=dict(report.rule.series))
        for number in range(100):
            run.series[f"layer{number}/norm"] = report.rule.series["loss of training_step"]
        start = time.perf_counter()
        html, markdown = render(run)
        print(
            f"a page of {len(run.series)} series: {time.perf_counter() - start:.2f} s, {len(html) / 1e3:.0f} kB", end=""
        )
        print(f", as Markdown {len(markdown) / 1e3:.0f} kB")
        torch.save(report.state_dict(), folder / "state")
        print(f"in a checkpoint: {(folder / 'state').stat().st_size / 1e3:.0f} kB for {len(report.rule.series)} series")

        logger = TensorBoardLogger(folder)
        for step in range(20_000):
            logger.log_metrics({f"metric{number}": float(step) for number in range(5)}, step)
        logger.finalize("success")
        start = time.perf_counter()
        read = read_run(Path(logger.log_dir))
        print(f"100,000 points of TensorBoard: {time.perf_counter() - start:.1f} s, {len(read.series)} series")


if __name__ == "__main__":
    main()
