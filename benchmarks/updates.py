"""Whether the update ratio tells a learning rate that is wrong, and what it costs to measure.

    python benchmarks/updates.py [rates] [others] [healthy] [cost] [--seeds 3] [--steps 400] [--seconds 20]

``rates``: a perceptron, with BatchNorm too, and a CNN on scikit-learn's digits, trained at every rate of a grid with
SGD and Adam, at a constant rate and under a cosine; the best rate is the one of the lowest mean validation loss.
Printed is how often each verdict was given, by the rate over the best. ``others``: the same on data and networks that
no threshold was set on: Fashion-MNIST, letters, diabetes, breast cancer; residual and deep networks, attention, a GRU,
a network that is trained on. ``healthy``: other runs that train well (small batches, wrong labels, weight decay,
warmup, a step schedule, dropout): every finding is a false alarm. ``cost``: a
measured update beside a training step.
"""

import argparse
import copy
import gc
import logging
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _timing import Times, interleave, table
from _zoo import Attention, Letters, Recurrent, letters, mlp, on_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits, fashion

from lightning_recipes import UpdateRatioMonitor
from lightning_recipes.core.updates import UpdateMeter, UpdateRatioRule, update_ratios

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
    "warmup, then cosine": lambda share: (
        share / 0.1 if share < 0.1 else (1 + math.cos(math.pi * (share - 0.1) / 0.9)) / 2
    ),
}
Pair = tuple[Tensor, Tensor]


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


@dataclass(frozen=True)
class Setting:
    """What is trained at many rates.

    Args:
        make: The network.
        data: For a seed, inputs and targets to train on, and to validate.
        kind: ``"SGD"``, with momentum, or ``"Adam"``.
        schedule: One of SCHEDULES.
        size: Of a batch.
        decay: Weight decay.
        loss: Of outputs and targets.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Pair, Pair]]
    kind: str
    schedule: str = "constant"
    size: int = 32
    decay: float = 0.0
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy


def of_digits(seed: int, wrong: float = 0.0) -> tuple[Pair, Pair]:
    data = digits(seed, wrong)
    return data.train, data.val


def train(of: Setting, rate: float, seed: int, steps: int) -> tuple[UpdateRatioRule, float]:
    """A plain loop: what the rule saw, and the validation loss in the end, over that of the best constant output."""
    torch.manual_seed(seed)
    net, rule = of.make(), UpdateRatioRule()
    training, (images, labels) = of.data(seed)
    optimizer = optimizer_of(of.kind, net.parameters(), rate, of.decay)
    parameters, layers = list(net.parameters()), [name.rpartition(".")[0] for name, _ in net.named_parameters()]
    names = list(dict.fromkeys(layers))
    owners = [names.index(layer) for layer in layers]
    matrices = list({layer for layer, each in zip(layers, parameters, strict=True) if each.ndim > 1})
    for step, (inputs, targets) in zip(range(steps), batches(*training, of.size, seed), strict=False):
        now = rate * SCHEDULES[of.schedule](step / steps)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = of.loss(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # has no types in torch
        meter = UpdateMeter(parameters) if step % EVERY == 0 else None
        optimizer.step()
        if meter is not None:
            ratios = dict(zip(names, update_ratios(meter.norms().tolist(), owners), strict=True))
            rule.update(step, ratios, loss.item(), now, matrices)
    net.eval()
    with torch.no_grad():
        return rule, float(of.loss(net(images), labels)) / constant_loss(labels)


def constant_loss(targets: Tensor) -> float:
    """What the best output has that does not look at the input."""
    if targets.is_floating_point():
        return float(targets.var(0, correction=0).mean())
    return float(torch.distributions.Categorical(targets.flatten().bincount().float()).entropy())  # type: ignore[no-untyped-call]  # has no types in torch


def tuned() -> dict[str, Setting]:
    """What the thresholds were set on."""
    return {
        f"{name}, {kind}, {schedule}": Setting(make, of_digits, kind, schedule)
        for name, make in NETS.items()
        for kind in RATES
        for schedule in ("constant", "cosine")
    }


class Block(nn.Module):
    """A convolution with BatchNorm and what goes past it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    @override
    def forward(self, images: Tensor) -> Tensor:
        more: Tensor = self.body(images)
        return images + more


def residual() -> nn.Module:
    first = nn.Conv2d(1, 16, 3, stride=2, padding=1)
    return nn.Sequential(first, Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@cache
def of_fashion(seed: int, classes: range = range(10)) -> tuple[Pair, Pair]:
    data = fashion(seed, images=5000)
    parts = [
        (images, labels, (labels >= classes[0]) & (labels <= classes[-1])) for images, labels in (data.train, data.val)
    ]
    train, val = ((images[taken], labels[taken] - classes[0]) for images, labels, taken in parts)
    return train, val


def of_diabetes(seed: int) -> tuple[Pair, Pair]:
    run = on_diabetes(seed, Perceptron())
    return run.train, run.val


def of_cells(seed: int) -> tuple[Pair, Pair]:
    """569 images of cells, 30 features of each: malignant or benign (scikit-learn's)."""
    from sklearn.datasets import load_breast_cancer

    inputs, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    features, targets = torch.tensor(inputs).float()[order], torch.tensor(labels)[order]
    features = (features - features[:400].mean(0)) / features[:400].std(0)
    return (features[:400], targets[:400]), (features[400:], targets[400:])


@cache
def pretrained() -> nn.Module:
    """Trained on the first five classes of Fashion-MNIST."""
    torch.manual_seed(0)
    net: nn.Module = mlp(196, 128, 128, 5)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for _, (images, labels) in zip(range(1500), batches(*of_fashion(99, range(5))[0], 32, 0), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]  # has no types in torch
        optimizer.step()
    return net


def trained_on() -> nn.Module:
    net = copy.deepcopy(pretrained())
    net[-1].reset_parameters()  # type: ignore[index]  # a Sequential
    return net


def held_out() -> dict[str, Setting]:
    """What no threshold was set on."""

    def gru() -> nn.Module:
        return Letters(Recurrent(48, 48, batch_first=True))

    cosine, mse = "warmup, then cosine", nn.functional.mse_loss
    return {
        "fashion, perceptron, SGD": Setting(lambda: mlp(196, 128, 10), of_fashion, "SGD", cosine, decay=5e-4),
        "fashion, six layers, SGD": Setting(lambda: mlp(196, *[64] * 5, 10), of_fashion, "SGD"),
        "fashion, residual, AdamW": Setting(residual, of_fashion, "Adam", cosine, decay=0.05),
        "fashion, trained on, AdamW": Setting(
            trained_on, lambda seed: of_fashion(seed, range(5, 10)), "Adam", decay=0.01
        ),
        "letters, attention, AdamW": Setting(lambda: Letters(Attention()), letters, "Adam", cosine, 16, 0.1),
        "letters, GRU, Adam": Setting(gru, letters, "Adam", size=16),
        "diabetes, SGD": Setting(lambda: mlp(10, 32, 1), of_diabetes, "SGD", decay=0.01, loss=mse),
        "cells, tanh, Adam": Setting(lambda: mlp(30, 32, 32, 2, activation=nn.Tanh), of_cells, "Adam", size=16),
    }


def measure_rates(settings: dict[str, Setting], seeds: range, steps: int) -> None:
    """How often each verdict is given, by the learning rate over the best one."""
    counts: dict[tuple[float, float], Counter[str]] = {span: Counter() for span in TESTED}
    of_dead: Counter[str] = Counter()
    for name, of in settings.items():
        runs: dict[float, list[tuple[UpdateRatioRule, float]]] = {}
        for rate in RATES[of.kind]:
            pairs = [train(of, rate, seed, steps) for seed in seeds]
            runs[rate] = [(rule, loss if math.isfinite(loss) else 99.0) for rule, loss in pairs]
        means = {rate: statistics.mean(loss for _, loss in pairs) for rate, pairs in runs.items()}
        best = min(means, key=means.__getitem__)
        print(f"\n{name}: best rate {best:g}", flush=True)
        for rate, pairs in runs.items():
            verdicts = []
            for rule, loss in pairs:
                finding = rule.finding()
                verdict = f"{finding.rule.split()[-1]} ({finding.severity})" if finding else "-"
                verdicts.append(verdict)
                span = next(span for span in TESTED if span[0] <= rate / best < span[1])
                counts[span][verdict] += 1
                if loss > 0.9 and rate > best:
                    of_dead[verdict] += 1
            levels = f"{pairs[0][0].peak():.1e} {pairs[0][0].level():.1e}"
            print(f"  {rate:<8g} {means[rate]:8.3f}  peak, middle {levels}  {', '.join(verdicts)}", flush=True)
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
        setting = Setting(make, partial(of_digits, wrong=wrong), kind, **how)
        runs[name] = lambda seed: train(setting, rate, seed, steps)[0]

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
            nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]  # has no types in torch
            by.step()

        def measure(parameters: list[Tensor] = parameters, owners: list[int] = owners) -> None:
            update_ratios(UpdateMeter(parameters).norms().tolist(), owners)

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


BLOCK = 100  # updates: with five measured ones, and two that log


class InTurns(pl.Callback):
    """In one fit, time blocks of updates without a callback, with one that does nothing, and with the monitor.

    And in the end, with little noise, what the monitor's own hooks take in so many updates, called by hand.
    """

    def __init__(self) -> None:
        self.monitor, self.now, self.order = UpdateRatioMonitor(), "", [""]
        self.callbacks: dict[str, list[pl.Callback]] = {
            "nothing": [],
            "an empty callback": [pl.Callback()],
            "the monitor": [self.monitor],
        }
        self.times = Times({name: [] for name in self.callbacks})
        self.own: list[float] = []
        self.begun = 0.0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % BLOCK:
            return
        if self.now:
            self.times.rounds[self.now].append(time.process_time() - self.begun)
        self.order.pop()
        if not self.order:  # a round is over
            self.order = random.sample(sorted(self.callbacks), len(self.callbacks))
            gc.collect()
            self.own.append(self._time_hooks(trainer, pl_module))
        self.now = self.order[-1]
        run: Any = trainer
        run.callbacks[:] = [self, *self.callbacks[self.now]]
        self.monitor._let_go()
        if self.now == "the monitor":
            self.monitor.on_fit_start(trainer, pl_module)
        self.begun = time.process_time()

    def _time_hooks(self, trainer: pl.Trainer, pl_module: Any) -> float:
        self.monitor._let_go()
        self.monitor.on_fit_start(trainer, pl_module)
        optimizer: Any = trainer.optimizers[0]
        before, after = (list(getattr(optimizer, f"_optimizer_step_{when}_hooks").values()) for when in ("pre", "post"))
        args, kwargs, loss, loop = (optimizer,), {"closure": print}, torch.tensor(1.0), trainer.fit_loop.epoch_loop
        begun, step = time.process_time(), loop._batches_that_stepped
        for _ in range(BLOCK):
            for hook in before:
                hook(optimizer, args, kwargs)
            self.monitor.on_before_backward(trainer, pl_module, loss)
            self.monitor.on_before_optimizer_step(trainer, pl_module, optimizer)
            for hook in after:
                hook(optimizer, args, kwargs)
            loop._batches_that_stepped += 1
        loop._batches_that_stepped = step
        return time.process_time() - begun


def measure_loop(rounds: int) -> None:
    """What the callback adds to Lightning's steps on a tiny network."""
    items: Any = [(torch.rand(32, 64), torch.randint(10, (32,))) for _ in range(BLOCK)]
    turns = InTurns()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3 * BLOCK * rounds + 1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        callbacks=[turns],
    )
    gc.disable()
    trainer.fit(Perceptron(), DataLoader(items, batch_size=None))
    gc.enable()
    table(f"tiny network, {rounds} rounds of blocks of {BLOCK} updates", turns.times, "nothing", "an empty callback")
    step, own = (statistics.median(times) / BLOCK for times in (turns.times.rounds["nothing"], turns.own))
    print(f"the monitor's own hooks: {1e6 * own:.1f} us an update, {own / step:.2%} of a step's {1e6 * step:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ["rates", "others", "healthy", "cost"]
    parser.add_argument("questions", nargs="*", default=questions, metavar="question", help=", ".join(questions))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of each run of rates")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each cost")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "rates" in options.questions:
        measure_rates(tuned(), range(options.seeds), options.steps)
    if "others" in options.questions:
        measure_rates(held_out(), range(10, 10 + options.seeds), options.steps)
    if "healthy" in options.questions:
        measure_healthy(options.seeds)
    if "cost" in options.questions:
        measure_update(options.seconds)
        measure_loop(int(5 * options.seconds))


if __name__ == "__main__":
    main()
