"""What the recipes do for a training: through the Trainer, on real data, several seeds, with the control beside.

    python benchmarks/quality.py [clipping] [averaging] [rewinding] [fashion] [--seeds 8]

The digits come with scikit-learn; for Fashion-MNIST see examples/_data.py.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import Data, digits, fashion

from lightning_recipes import EMAWeights, InstabilityDetector, PercentileGradientClipping


def perceptron(batch_norm: bool = False) -> nn.Module:
    """64-64-64-10."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def convolutional(batch_norm: bool = False) -> nn.Module:
    """Two convolutions, 7,700 parameters."""
    layers: list[nn.Module] = []
    for before, width in ((1, 16), (16, 32)):
        norm = [nn.BatchNorm2d(width)] if batch_norm else []
        layers += [nn.Conv2d(before, width, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 3 * 3, 10))


class Classifier(pl.LightningModule):
    """SGD with momentum 0.9; from step 50 on some batches are glitches: 20 times too bright, labels mixed up.

    Args:
        net: Makes the network.
        learning_rate: Constant.
        glitches: Share of glitches.
        burst: How many come in a row.
        poisoned: Batches that are glitches.
        seed: Of everything.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        learning_rate: float,
        glitches: float,
        burst: int,
        seed: int,
        poisoned: range = range(0),
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.learning_rate = net(), learning_rate
        self.glitches, self.burst, self.left = glitches, burst, 0
        self.poisoned = poisoned
        self.chance = torch.Generator().manual_seed(77 + seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        draw = torch.rand((), generator=self.chance).item()
        if self.global_step >= 50 and not self.left and draw < self.glitches / self.burst:
            self.left = self.burst
        if self.left or self.trainer.fit_loop.epoch_loop.total_batch_idx in self.poisoned:
            self.left -= self.left > 0
            images, labels = 20 * images, labels[torch.randperm(len(labels))]
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


@torch.no_grad()
def score(module: Classifier, data: Data) -> tuple[float, float]:
    """Test error in percent and test loss in nats."""
    module.eval()
    images, labels = data.test
    logits = torch.cat([module.net(part) for part in torch.split(images, 1000)]).nan_to_num()
    module.train()
    return 100 * (logits.argmax(1) != labels).float().mean().item(), nn.functional.cross_entropy(logits, labels).item()


def train(
    data: Data,
    net: Callable[[], nn.Module],
    seed: int,
    callbacks: list[pl.Callback],
    steps: int = 600,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    glitches: float = 0.0,
    burst: int = 1,
    poisoned: range = range(0),
) -> Classifier:
    module = Classifier(net, learning_rate, glitches, burst, seed, poisoned)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*data.train), batch_size, shuffle=True, drop_last=True, generator=order)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        log_every_n_steps=10**6,
    )
    trainer.fit(module, loader)
    return module


def spread(values: list[float], digits_: int = 2) -> str:
    return f"{statistics.fmean(values):.{digits_}f} ± {statistics.stdev(values):.{digits_}f}"


def clipping(seeds: int, load: Callable[..., Data], net: Callable[[], nn.Module], rate: float, steps: int) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "clean": {},
        "2 % glitches": {"glitches": 0.02},
        "2 %, bursts of 5": {"glitches": 0.02, "burst": 5},
        "9 % glitches": {"glitches": 0.09},
        "15 % glitches": {"glitches": 0.15},
        "2 % wrong labels, batch 4": {"wrong_labels": 0.02, "batch_size": 4, "learning_rate": rate / 5, "steps": steps},
    }
    print(f"\nPercentileGradientClipping, {load().name}; test error in %, {seeds} seeds (of these dead: above 50)")
    print(f"{'':28}{'none':>24}{'clipped':>24}{'share of updates clipped':>28}")
    for name, kind in kinds.items():
        settings = {"learning_rate": rate, **kind}
        wrong_labels = settings.pop("wrong_labels", 0.0)
        errors: dict[bool, list[float]] = {False: [], True: []}
        shares = []
        for seed in range(seeds):
            data = load(seed, wrong_labels)
            for clips in (False, True):
                callbacks: list[pl.Callback] = [PercentileGradientClipping()] if clips else []
                errors[clips].append(score(train(data, net, seed, callbacks, **settings), data)[0])
                if clips:
                    shares.append(callbacks[0].rule[0].clipped_fraction())  # type: ignore[attr-defined]  # the clipping
        cells = [f"{spread(errors[clips])} ({sum(error > 50 for error in errors[clips])})" for clips in (False, True)]
        print(f"{name:28}{cells[0]:>24}{cells[1]:>24}{statistics.fmean(shares):>28.1%}", flush=True)


class Scores(pl.Callback):
    """Test scores of the raw and of the averaged weights after some updates."""

    def __init__(self, at: tuple[int, ...], ema: EMAWeights, data: Data) -> None:
        self.at, self.ema, self.data = at, ema, data
        self.raw: dict[int, tuple[float, float]] = {}
        self.average: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in self.at:
            self.raw[trainer.global_step] = score(pl_module, self.data)
            with self.ema.average_weights(pl_module):
                self.average[trainer.global_step] = score(pl_module, self.data)


def averaging(seeds: int, load: Callable[..., Data], net: Callable[[bool], nn.Module], *rates: float) -> None:
    print(f"\nEMAWeights, {load().name}, 10 % wrong labels, batch 8, constant learning rate, {seeds} seeds")
    columns = ["error: raw", "average", "loss: raw", "average", "gain in nats"]
    print(f"{'':36}" + "".join(f"{column:>18}" for column in columns) + f"{'better':>8}{'worst':>8}")
    kinds: list[tuple[str, bool, Any]] = [
        ("plain", False, "average"),
        ("BatchNorm, buffers average", True, "average"),
        ("BatchNorm, buffers copy", True, "copy"),
        ("BatchNorm, buffers recompute", True, "recompute"),
    ]
    for name, batch_norm, buffers in kinds:
        runs = []
        for seed in range(seeds):
            data, ema = load(seed, 0.1), EMAWeights(buffers=buffers)
            scores = Scores((25, 100, 400, 1500), ema, data)
            train(data, partial(net, batch_norm), seed, [ema, scores], 1500, 8, rates[batch_norm])
            runs.append(scores)
        for step in runs[0].at:
            raw, average = ([getattr(run, kind)[step] for run in runs] for kind in ("raw", "average"))
            gains = [one[1] - other[1] for one, other in zip(raw, average, strict=True)]
            cells = [spread([end[0] for end in raw], 1), spread([end[0] for end in average], 1)]
            cells += [spread([end[1] for end in raw], 3), spread([end[1] for end in average], 3), spread(gains, 3)]
            row = "".join(f"{cell:>18}" for cell in cells)
            print(
                f"{name + f', step {step}':36}{row}{sum(gain > 0 for gain in gains):>8}{min(gains):>8.3f}", flush=True
            )


def rewinding(seeds: int, load: Callable[..., Data], net: Callable[[], nn.Module], rate: float) -> None:
    """A stretch of poisoned batches in the middle of a run, with and without going back."""
    print(f"\nInstabilityDetector, {load().name}, batches 300 to 319 poisoned; test error in %, {seeds} seeds (dead)")
    kinds: dict[str, tuple[range, Callable[[], list[pl.Callback]]]] = {
        "never poisoned": (range(0), list),
        "poisoned": (range(300, 320), list),
        "action='skip'": (range(300, 320), lambda: [InstabilityDetector("skip")]),
        "action='rewind'": (range(300, 320), lambda: [InstabilityDetector("rewind")]),
        "rewind, EMA, clipping": (
            range(300, 320),
            lambda: [InstabilityDetector("rewind"), EMAWeights(), PercentileGradientClipping()],
        ),
    }
    for name, (poisoned, callbacks) in kinds.items():
        errors = []
        for seed in range(seeds):
            data = load(seed)
            module = train(data, net, seed, callbacks(), learning_rate=rate, poisoned=poisoned)
            errors.append(score(module, data)[0])
        print(f"{name:28}{spread(errors):>24} ({sum(error > 50 for error in errors)})  {[round(e, 1) for e in errors]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ["clipping", "averaging", "rewinding", "fashion"]
    parser.add_argument("questions", nargs="*", default=questions, metavar="question", help=", ".join(questions))
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if "clipping" in options.questions:
        clipping(options.seeds, digits, perceptron, 0.1, 1200)
    if "averaging" in options.questions:
        averaging(options.seeds, digits, perceptron, 0.05, 0.1)
    if "rewinding" in options.questions:
        rewinding(options.seeds, digits, perceptron, 0.1)
    if "fashion" in options.questions:
        clipping(options.seeds, cache(fashion), convolutional, 0.05, 3000)
        averaging(options.seeds, cache(fashion), convolutional, 0.02, 0.02)


if __name__ == "__main__":
    main()
