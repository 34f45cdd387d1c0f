"""What the warmup sweep finds, what it costs, and whether what it finds is true.

    python benchmarks/sweeps.py [residual] [control] [prose] [cost] [--seeds 8]

residual: a residual perceptron without normalisation on scikit-learn's digits, with weights so large that it diverges
at any useful learning rate. control: the same with LayerNorm in branches that start at 0, which needs no warmup. prose:
a character model on Python's own help texts; the warmup found is tried with fresh seeds, and half of it, too. cost:
CPU time of a trial over that of the same steps without one.
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits
from _timing import interleave, table

from lightning_recipes.callbacks.trials import LoopTrials, ModuleTrials, seed_all, without_notes
from lightning_recipes.core.trials import Outcome, SweepResult, Trial, TrialRule
from lightning_recipes.core.warmup import LEAST, WarmupSearch
from lightning_recipes.sweep import warmup_sweep

RUN = 3000  # steps of the run that a warmup is for
LONG, LONGER = 600, 1500  # steps of a training that says what a warmup is worth
CONTEXT = 32  # characters
GAIN = 1.7  # of the transformer's weights, 1 keeps the variance
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FRESH = range(100, 105)  # seeds that no sweep has seen
DATA = digits()
COST = 100  # steps of a trial that is timed

Start = Callable[[int], tuple[nn.Module, Optimizer, Callable[[], Tensor]]]


class Residual(nn.Module):
    """Six branches x + B relu(A x) of width 32, with weights of variance 1.4^2 * 2 / 32.

    Args:
        tame: With LayerNorm in front of A, its weights as small as is usual, and B = 0 in the beginning.
    """

    def __init__(self, tame: bool = False, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if tame else nn.Identity() for _ in range(depth))
        self.ins = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        scale = (1.0 if tame else 1.4) * math.sqrt(2 / width)
        for branch, gain in ((self.ins, scale), (self.outs, 0.0 if tame else scale)):
            for layer in branch:
                assert isinstance(layer, nn.Linear)
                nn.init.normal_(layer.weight, std=gain)
                nn.init.zeros_(layer.bias)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs)
        for norm, into, out in zip(self.norms, self.ins, self.outs, strict=True):
            hidden = hidden + out(functional.relu(into(norm(hidden))))
        logits: Tensor = self.last(hidden)
        return logits


def start_digits(rate: float = 1e-4, tame: bool = False) -> Start:
    """SGD with momentum 0.9 on batches of 64."""

    def start(seed: int) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
        net, chance = Residual(tame), torch.Generator().manual_seed(900 + seed)

        def next_loss() -> Tensor:
            picks = torch.randint(len(DATA.train[1]), (64,), generator=chance)
            return functional.cross_entropy(net(DATA.train[0][picks].flatten(1)), DATA.train[1][picks])

        return net, SGD(net.parameters(), rate, momentum=0.9), next_loss

    return start


def make(start: Start) -> Callable[[int], tuple[Optimizer, Callable[[], Tensor]]]:
    return lambda seed: start(seed)[1:]


# ---------------------------------------------------------------------------------------------------- measuring


def report(result: SweepResult, since: float) -> None:
    print(f"\n{result.to_markdown()}\n{result.steps:,} steps, {time.perf_counter() - since:.1f} s", flush=True)


def compared(name: str, start: Start, seeds: int, base: float | None) -> SweepResult:
    """A sweep, and the same one over the full grid."""
    print(f"\n## {name}")
    since = time.perf_counter()
    result = warmup_sweep(make(start), RUN, base, seeds=seeds)
    report(result, since)
    since = time.perf_counter()
    full = warmup_sweep(make(start), RUN, base, seeds=seeds, exhaustive=True)
    grid = seeds * sum(max(LEAST, 3 * warmup) for warmup in WarmupSearch(1.0, RUN).warmups)
    same = (result.best and result.best.warmup_steps) == (full.best and full.best.warmup_steps)
    print(
        f"exhaustive: {full.steps:,} steps, {time.perf_counter() - since:.1f} s, winner"
        f" {'the same' if same else f'another: {full.best}'}. Share of steps: {result.steps / full.steps:.2f};"
        f" of all trials of that rate to their end ({grid:,}): {result.steps / grid:.2f}"
    )
    return result


def train(start: Start, seed: int, rates: Callable[[int], float], steps: int = LONG) -> tuple[Outcome, nn.Module]:
    """Train at the rate that a function of the step says."""
    seed_all(seed)
    net, optimizer, next_loss = start(seed)
    rule = TrialRule(steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates(step)
        optimizer.zero_grad()
        loss = next_loss()
        torch.autograd.backward(loss)
        norms = [parameter.grad.norm() for parameter in net.parameters() if parameter.grad is not None]
        if rule.update(loss.item(), torch.stack(norms).norm().item(), rates(step)):
            break
        optimizer.step()
    return rule.outcome(), net


def constant(rate: float, warmup: int) -> Callable[[int], float]:
    return lambda step: rate * Trial(rate, LONG, warmup).factor(step)


def cosine(rate: float, warmup: int) -> Callable[[int], float]:
    """A warmup, and down to 0 at the end."""
    return lambda step: (
        constant(rate, warmup)(step) * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (LONG - warmup)))
    )


def sensitivity(start: Start, warmup: int, seeds: range) -> list[float]:
    """By how much the loss is above the best one over all learning rates; a training that fails stays at chance."""
    chance, each = math.log(10), []
    for seed in seeds:
        outcomes = [train(start, seed, constant(rate, warmup))[0] for rate in RATES]
        losses = [min(outcome.loss, chance) if outcome.stable else chance for outcome in outcomes]
        each.append(statistics.fmean(losses) - min(losses))
    return each


def test_errors(start: Start, rates: Callable[[int], float], seeds: range) -> list[float]:
    errors = []
    for seed in seeds:
        _, net = train(start, seed, rates)
        with torch.no_grad():
            wrong = net(DATA.test[0].flatten(1)).argmax(1) != DATA.test[1]
        errors.append(100 * wrong.float().mean().item())
    return errors


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


# -------------------------------------------------------------------------------------------------------- parts


def residual(seeds: int) -> None:
    start = start_digits()
    found = {base: compared(f"residual, base {base:g}", start, seeds, base) for base in (1e-3, 3e-3)}
    bracketed = compared("residual, base found from 1e-4", start, seeds, None)
    results = [result for result in (*found.values(), bracketed) if result.best is not None]
    best = max((result.best for result in results if result.best), key=lambda trial: trial.learning_rate)
    rate, warmup = best.learning_rate, best.warmup_steps
    print(f"\nWhat a warmup of {warmup} and a rate of {rate:g} are worth, {LONG} steps, 5 seeds")
    for steps in (0, warmup):
        print(f"    sensitivity to the learning rate, warmup {steps:3}: {spread(sensitivity(start, steps, range(5)))}")
    for peak, steps in ((1e-4, 0), (rate, warmup)):
        errors = test_errors(start, cosine(peak, steps), range(5))
        print(f"    test error, cosine from {peak:g}, warmup {steps:3}: {spread(errors)} %", flush=True)


def control(seeds: int) -> None:
    print("\n## control, base 0.1")
    since = time.perf_counter()
    report(warmup_sweep(make(start_digits(0.1, tame=True)), RUN, 0.1, seeds=seeds), since)


class Characters(nn.Module):
    """A transformer of two blocks without normalisation, its weights orthogonal and large.

    Args:
        letters: How many there are.
        width: Of everything but the perceptrons, which have twice that.
    """

    def __init__(self, letters: int, width: int = 32) -> None:
        super().__init__()
        self.codes, self.places = nn.Embedding(letters, width), nn.Parameter(torch.randn(CONTEXT, width))
        sizes = ((width, 3 * width), (width, width), (width, 2 * width), (2 * width, width))
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(*size) for size in sizes) for _ in range(2))
        self.last = nn.Linear(width, letters)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                rows, columns = layer.weight.shape
                nn.init.orthogonal_(layer.weight, GAIN * max(1.0, math.sqrt(rows / columns)))
                nn.init.zeros_(layer.bias)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.codes(inputs) + self.places
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            asks, mix, into, out = block
            query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in asks(hidden).chunk(3, -1))
            seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = hidden + mix(seen.transpose(1, 2).flatten(2))
            hidden = hidden + out(functional.relu(into(hidden)))
        logits: Tensor = self.last(hidden)
        return logits


def start_prose(rate: float = 1e-3) -> Start:
    """SGD with momentum 0.9 on 16 windows of 32 characters."""
    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:300_000]
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])

    def start(seed: int) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
        net, chance = Characters(len(letters)), torch.Generator().manual_seed(900 + seed)

        def next_loss() -> Tensor:
            starts = torch.randint(len(ids) - CONTEXT - 1, (16,), generator=chance)
            window = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
            return functional.cross_entropy(net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

        return net, SGD(net.parameters(), rate, momentum=0.9), next_loss

    return start


def prose(seeds: int) -> None:
    start = start_prose()
    print("\n## prose, base found from 1e-3")
    since = time.perf_counter()
    result = warmup_sweep(make(start), RUN, seeds=seeds)
    report(result, since)
    if result.best is None:
        return
    rate, found = result.best.learning_rate, result.best.warmup_steps
    lowest = result.summary["unstable_base_learning_rate"]
    print(f"\nseeds {FRESH[0]} to {FRESH[-1]} at {rate:g}, {rate / lowest:g} times the lowest unstable rate")
    trials = LoopTrials(make(start))
    for warmup in (found, found // 2):
        for steps in sorted({max(LEAST, 3 * found), LONG, LONGER}):
            outcomes = [trials(Trial(rate, steps, warmup, seed)) for seed in FRESH]
            stable = [outcome for outcome in outcomes if outcome.stable]
            losses = ", ".join(f"{outcome.loss:.3g}" for outcome in stable)
            print(f"    warmup {warmup:3}, {steps:4} steps: {len(stable)} of {len(FRESH)} stable; loss {losses}")
            for outcome in outcomes:
                if not outcome.stable:
                    print(f"        {outcome.reason}")


class Plain(pl.LightningModule):
    """A classifier of 32 numbers, or of pictures of 28 x 28."""

    def __init__(self, pictures: bool) -> None:
        super().__init__()
        body = (
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
        )
        small = (nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        self.net = nn.Sequential(*((*body, nn.Flatten(), nn.Linear(512, 10)) if pictures else small))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), 1e-4)


def cost_of(name: str, *shape: int) -> None:
    data = TensorDataset(torch.randn(32 * COST, *shape), torch.randint(0, 10, (32 * COST,)))
    loader: DataLoader[Any] = DataLoader(data, 32)
    pictures, quiet = len(shape) > 1, {"accelerator": "cpu", "devices": 1}
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {"max_steps": COST, "max_epochs": -1, **dict.fromkeys(silent, False), **quiet}

    def made(_: int) -> tuple[Optimizer, Callable[[], Tensor]]:
        module, batches = Plain(pictures), iter(loader)
        return AdamW(module.parameters(), 1e-4), lambda: module.training_step(next(batches), 0)

    def bare() -> list[float]:
        optimizer, next_loss = made(0)
        losses = []
        for _ in range(COST):
            optimizer.zero_grad()
            loss = next_loss()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    trial = Trial(1e-4, COST)
    in_a_loop, by_a_trainer = LoopTrials(made), ModuleTrials(lambda _: Plain(pictures), loader, None, quiet)
    calls: dict[str, Callable[[], object]] = {
        "bare loop": bare,
        "trial in a loop": lambda: in_a_loop(trial),
        "fit": lambda: pl.Trainer(**settings).fit(Plain(pictures), loader),
        "trial by a Trainer": lambda: by_a_trainer(trial),
    }
    table(f"{name}, {COST} steps", interleave(calls, 60.0), "bare loop", "fit")


def cost(_: int) -> None:
    warnings.simplefilter("ignore")
    with without_notes():  # once for all trials, as in a sweep
        cost_of("perceptron", 32)
        cost_of("CNN", 1, 28, 28)


PARTS = {"residual": residual, "control": control, "prose": prose, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="residual, control, prose, cost; all by default")
    parser.add_argument("--seeds", type=int, default=8, help="of a sweep")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        PARTS[part](options.seeds)


if __name__ == "__main__":
    main()
