"""Whether the update ratio tells a learning rate that is wrong, and what it costs to measure.

    python benchmarks/updates.py [rates] [healthy] [cost] [--seeds 3] [--steps 400] [--seconds 20]

``rates``: a perceptron, with BatchNorm too, and a CNN on scikit-learn's digits, trained at every rate of a grid with
SGD and Adam, at a constant rate and under a cosine; the best rate is the one of the lowest mean validation loss.
Printed is how often each verdict was given, by the rate over the best. ``healthy``: other runs that train well (small
batches, wrong labels, weight decay, warmup, a step schedule, dropout): every finding is a false alarm. ``cost``: a
measured update beside a training step.
"""

import argparse
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _timing import interleave
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import Data, digits

from lightning_recipes import UpdateRatioMonitor
from lightning_recipes.core.updates import UpdateMeter, UpdateRatioRule

RATES = {
    "SGD": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4, 0.8],
    "Adam": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3],
}
EVERY = 20  # the default
TESTED = [(0, 1 / 60), (1 / 60, 1 / 20), (1 / 20, 1 / 5), (1 / 5, 0.5), (0.5, 2), (2, 5), (5, 20), (20, 1e9)]


def perceptron(batch_norm: bool = False, dropout: float = 0.0, outputs: int = 10) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if batch_norm else []), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(64, outputs))


def cnn() -> nn.Module:
    body = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "perceptron, BatchNorm": lambda: perceptron(batch_norm=True),
    "CNN": cnn,
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "steps": lambda share: 1.0 if share < 0.5 else 0.1 if share < 0.75 else 0.01,
    "warmup, then linear": lambda share: share / 0.1 if share < 0.1 else (1 - share) / 0.9,
}


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for begin in range(0, len(order) - size + 1, size):
            yield images[order[begin : begin + size]], labels[order[begin : begin + size]]


def optimizer_of(kind: str, parameters: Any, rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def train(
    make: Callable[[], nn.Module],
    data: Data,
    kind: str,
    rate: float,
    seed: int,
    steps: int,
    schedule: str = "constant",
    size: int = 32,
    decay: float = 0.0,
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> tuple[UpdateRatioRule, float]:
    """A plain loop: what the rule saw, and the validation loss in the end."""
    torch.manual_seed(seed)
    net, rule = make(), UpdateRatioRule()
    optimizer = optimizer_of(kind, net.parameters(), rate, decay)
    parameters, layers = list(net.parameters()), [name.rpartition(".")[0] for name, _ in net.named_parameters()]
    names = list(dict.fromkeys(layers))
    owners = [names.index(layer) for layer in layers]
    matrices = list({layer for layer, each in zip(layers, parameters, strict=True) if each.ndim > 1})
    for step, (images, labels) in zip(range(steps), batches(*data.train, size, seed), strict=False):
        now = rate * SCHEDULES[schedule](step / steps)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = loss_of(net(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        meter = UpdateMeter(parameters, owners) if step % EVERY == 0 else None
        optimizer.step()
        if meter is not None:
            ratios = dict(zip(names, meter.ratios().tolist(), strict=True))
            rule.update(step, ratios, loss.item(), now, matrices)
    net.eval()
    with torch.no_grad():
        return rule, float(loss_of(net(data.val[0]), data.val[1]))


def measure_rates(seeds: int, steps: int) -> None:
    """How often each verdict is given, by the learning rate over the best one."""
    counts: dict[tuple[float, float], Counter[str]] = {span: Counter() for span in TESTED}
    of_dead: Counter[str] = Counter()
    for name, make in NETS.items():
        for kind, rates in RATES.items():
            for schedule in ("constant", "cosine"):
                runs: dict[float, list[tuple[UpdateRatioRule, float]]] = {}
                for rate in rates:
                    pairs = [train(make, digits(seed), kind, rate, seed, steps, schedule) for seed in range(seeds)]
                    runs[rate] = [(rule, loss if math.isfinite(loss) else 99.0) for rule, loss in pairs]
                means = {rate: statistics.mean(loss for _, loss in pairs) for rate, pairs in runs.items()}
                best = min(means, key=means.__getitem__)
                print(f"\n{name}, {kind}, {schedule}: best rate {best:g} (validation loss {means[best]:.3f})")
                for rate, pairs in runs.items():
                    verdicts = []
                    for rule, loss in pairs:
                        finding = rule.finding()
                        verdict = f"{finding.rule.split()[-1]} ({finding.severity})" if finding else "-"
                        verdicts.append(verdict)
                        span = next(span for span in TESTED if span[0] <= rate / best < span[1])
                        counts[span][verdict] += 1
                        if loss > 0.9 * math.log(10) and rate > best:
                            of_dead[verdict] += 1
                    levels = f"{pairs[0][0].peak():.1e} {pairs[0][0].level():.1e}"
                    print(f"  {rate:<8g} {means[rate]:8.3f}  peak, middle {levels}  {', '.join(verdicts)}")
    print("\nVerdicts by the learning rate over the best one")
    for (low, high), verdicts_of in counts.items():
        total = sum(verdicts_of.values())
        shares = ", ".join(f"{verdict} {count}/{total}" for verdict, count in sorted(verdicts_of.items()))
        print(f"  {low:.3g} to {high:.3g}: {shares}")
    print(f"  of runs that died of a high rate: {dict(of_dead)}")


def measure_healthy(seeds: int) -> None:
    """Findings in runs that train well."""
    runs: dict[str, Callable[[int], UpdateRatioRule]] = {}

    def add(name: str, kind: str, rate: float, make: Callable[[], nn.Module] = perceptron, **how: Any) -> None:
        wrong, steps = how.pop("wrong_labels", 0.0), how.pop("steps", 800)
        runs[name] = lambda seed: train(make, digits(seed, wrong), kind, rate, seed, steps, **how)[0]

    add("SGD, batches of 8", "SGD", 0.01, size=8)
    add("SGD, batches of 4, 10 % wrong labels", "SGD", 0.005, size=4, wrong_labels=0.1)
    add("Adam, batches of 8, 10 % wrong labels", "Adam", 1e-3, wrong_labels=0.1, size=8)
    add("AdamW, weight decay 0.1", "Adam", 3e-3, decay=0.1)
    add("SGD, weight decay 5e-4, cosine", "SGD", 0.05, decay=5e-4, schedule="cosine")
    add("SGD, steps", "SGD", 0.05, schedule="steps")
    add("Adam, warmup, linear", "Adam", 3e-3, schedule="warmup, then linear")
    add("BatchNorm, SGD, weight decay 5e-4", "SGD", 0.05, lambda: perceptron(True), decay=5e-4)
    add("BatchNorm, Adam, dropout", "Adam", 3e-3, lambda: perceptron(True, 0.3))
    add("CNN, AdamW, cosine", "Adam", 3e-3, cnn, schedule="cosine")
    add("CNN, SGD, 5,000 updates", "SGD", 0.02, cnn, steps=5000)
    add("dropout, SGD", "SGD", 0.03, lambda: perceptron(dropout=0.3))
    alarms = 0
    for name, run in runs.items():
        findings = [rule.finding() for rule in map(run, range(seeds))]
        told = [finding for finding in findings if finding is not None]
        alarms += sum(finding.severity == "warning" for finding in told)
        print(f"{name:42} {', '.join(f'{each.rule} ({each.severity})' for each in told) or '-'}", flush=True)
    print(f"{alarms} warnings in {seeds * len(runs)} runs")


# ------------------------------------------------------------------------------ cost


class Residual(nn.Module):
    """Two convolutions and what goes past them, as in a ResNet-18."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = 1 if inside == outside else 2
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.past = nn.Conv2d(inside, outside, 1, stride, bias=False) if stride == 2 else nn.Identity()

    @override
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.body(images) + self.past(images))


def resnet() -> nn.Module:
    """A ResNet-18 for images of 32 by 32: 11.2 million weights."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Residual(inside, outside) for inside, outside in pairwise(widths)]
    first = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def measure_update(seconds: float) -> None:
    """A training step of a ResNet-18, and a measured update beside it."""
    torch.manual_seed(0)
    for size in (8, 32):
        net = resnet()
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        images, labels = torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
        parameters: list[Tensor] = list(net.parameters())
        owners = list(range(len(parameters)))

        def step(images: Tensor = images, labels: Tensor = labels, net: nn.Module = net, by: Any = optimizer) -> None:
            by.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            by.step()

        def measure(parameters: list[Tensor] = parameters, owners: list[int] = owners) -> None:
            UpdateMeter(parameters, owners).ratios().tolist()

        low, middle, high = interleave({"step": step, "measure": measure}, seconds).ratio("measure", "step")
        print(
            f"ResNet-18, batch of {size}: a measured update takes {middle:.1%} ({low:.1%} to {high:.1%}) of a step;"
            f" every {EVERY}th: {middle / EVERY:.2%}",
            flush=True,
        )


class Perceptron(pl.LightningModule):
    """2,400 parameters: nearly nothing but the loop's own cost."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class InTurns(pl.Callback):
    """Take the monitor out and put it in again after as many steps as have one measured update, and time both."""

    def __init__(self) -> None:
        self.monitor, self.is_in, self.blocks = UpdateRatioMonitor(), False, ([], [])  # type: ignore[var-annotated]

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % EVERY == 2:  # not where it is switched
            self.begun = time.process_time()
        if step % EVERY == 0 and step:
            self.blocks[self.is_in].append(time.process_time() - self.begun)
        if step % EVERY == 0:
            self.is_in = not self.is_in
            run: Any = trainer
            run.callbacks = [self, self.monitor] if self.is_in else [self]
            self.monitor._let_go()
            if self.is_in:
                self.monitor._updates = {0: EVERY // 2}  # the measured update is in the middle
                self.monitor.on_fit_start(trainer, pl_module)


def measure_loop(steps: int) -> None:
    """What the callback adds to Lightning's steps on a tiny network, by blocks with and without it in one fit."""
    items: Any = [(torch.rand(32, 64), torch.randint(10, (32,))) for _ in range(56)]
    turns = InTurns()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        callbacks=[turns],
    )
    trainer.fit(Perceptron(), DataLoader(items, batch_size=None))
    shares = [one / other - 1 for other, one in zip(*turns.blocks, strict=False)]
    low, middle, high = statistics.quantiles(shares, n=4)
    step = statistics.median(turns.blocks[0]) / (EVERY - 2)
    print(
        f"tiny network: {middle:.1%} (quartiles {low:.1%} to {high:.1%}, {len(shares)} pairs of blocks),"
        f" {1e6 * middle * step:.0f} us of a step's {1e6 * step:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ["rates", "healthy", "cost"]
    parser.add_argument("questions", nargs="*", default=questions, metavar="question", help=", ".join(questions))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of each run of rates")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each cost")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "rates" in options.questions:
        measure_rates(options.seeds, options.steps)
    if "healthy" in options.questions:
        measure_healthy(options.seeds)
    if "cost" in options.questions:
        measure_update(options.seconds)
        measure_loop(int(500 * options.seconds))


if __name__ == "__main__":
    main()
