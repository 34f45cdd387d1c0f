"""How well instabilities are noticed: healthy runs with heavy noise, and runs with an event injected at a known step.

    python benchmarks/instability.py [--tune] [--seeds 6] [--first-seed 0]

Small perceptrons, trained side by side as one batch of matrices, on scikit-learn's digits and on English prose (next
character after eight, from Python's own help texts). Constants were chosen on the workloads of ``--tune``; the others
are those to report. A hit is an alarm attributed to a step from the event on, within 50 steps (200 for a learning rate
that creeps up or is too high from the start); an alarm before it, or in a healthy run, is a false one. An event that
did no harm (final loss below 1.5 times the healthy run's) is left out.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pydoc_data import topics

import torch
from torch import Tensor, nn

from lightning_recipes.core.instability import InstabilityRule

STEPS, SOON, LATE = 600, 50, 200
EVENTS = (
    "healthy",
    "NaN in a batch",
    "exploding gradient",
    "burst",
    "shock to the weights",
    "learning rate x 10",
    "learning rate creeps up",
    "dead units",
    "x 10 from the start",
)
SLOW = ("learning rate creeps up", "x 10 from the start")
HAS_TO_HURT = ("learning rate x 10", "x 10 from the start", "shock to the weights", "learning rate creeps up")


@dataclass(frozen=True)
class Workload:
    """How a run trains.

    Args:
        prose: Characters instead of digits.
        batch: Examples.
        rate: Learning rate.
        adam: Adam instead of SGD with momentum 0.9.
        wrong: Share of wrong labels.
        dropout: Probability.
        batch_norm: Have it.
        shape: Of the learning rate over the run: "constant", "cosine", "warmup" (200 steps), "restarts" (of 150).
        rare: One batch in forty is three times as bright.
        pretrained: Steps of training before the first.
    """

    prose: bool = False
    batch: int = 32
    rate: float = 0.05
    adam: bool = False
    wrong: float = 0.0
    dropout: float = 0.0
    batch_norm: bool = False
    shape: str = "constant"
    rare: bool = False
    pretrained: int = 0

    def rate_at(self, step: int) -> float:
        share = step / STEPS
        return (
            self.rate
            * {
                "constant": 1.0,
                "cosine": 0.5 * (1 + math.cos(math.pi * share)),
                "warmup": min(1.0, (step + 1) / 200),
                "restarts": 0.5 * (1 + math.cos(math.pi * (step % 150) / 150)),
            }[self.shape]
        )


TUNE = {
    "digits, batch 8": Workload(batch=8, rate=0.02),
    "digits": Workload(),
    "digits, 15 % wrong": Workload(wrong=0.15),
    "digits, Adam": Workload(batch=16, rate=1e-3, adam=True),
    "digits, batch 8, cosine": Workload(batch=8, rate=0.03, shape="cosine"),
    "digits, BatchNorm": Workload(batch_norm=True),
    "digits, warmup": Workload(batch=64, shape="warmup"),
    "prose": Workload(prose=True, rate=0.1),
    "prose, Adam": Workload(prose=True, batch=64, rate=2e-3, adam=True),
    "prose, batch 8": Workload(prose=True, batch=8, rate=0.02),
    "digits, dropout": Workload(dropout=0.4),
    "digits, restarts": Workload(shape="restarts"),
    "digits, rare large gradients": Workload(rare=True, rate=0.03),
    "digits, from a low loss": Workload(batch=16, rate=0.01, pretrained=400),
    "digits, high rate": Workload(batch=64, rate=0.15),
    "digits, batch 4, 10 % wrong": Workload(batch=4, rate=0.01, wrong=0.1),
    "digits, BatchNorm, Adam": Workload(batch_norm=True, adam=True, rate=3e-3),
    "prose, dropout, cosine": Workload(prose=True, dropout=0.2, rate=0.1, shape="cosine"),
    "prose, Adam, warmup": Workload(prose=True, adam=True, rate=3e-3, shape="warmup"),
    "prose, restarts": Workload(prose=True, rate=0.1, shape="restarts"),
}
REPORT = {
    "digits, Adam, dropout, cosine": Workload(batch=16, rate=2e-3, adam=True, dropout=0.3, shape="cosine"),
    "digits, 30 % wrong, batch 16": Workload(batch=16, rate=0.03, wrong=0.3),
    "digits, high rate, warmup": Workload(batch=64, rate=0.15, shape="warmup"),
    "digits, BatchNorm, restarts": Workload(batch_norm=True, rate=0.03, shape="restarts"),
    "digits, rare large gradients, Adam": Workload(rare=True, rate=1e-3, adam=True),
    "digits, from a low loss, Adam": Workload(batch=16, rate=5e-4, adam=True, pretrained=400),
    "prose, high rate": Workload(prose=True, rate=0.2),
    "prose, from a lower loss": Workload(prose=True, rate=0.05, pretrained=400),
    "prose, batch 16, dropout": Workload(prose=True, batch=16, rate=0.05, dropout=0.4),
    "prose, Adam, restarts": Workload(prose=True, batch=64, rate=2e-3, adam=True, shape="restarts"),
}


@dataclass
class Run:
    """One training as a detector sees it."""

    workload: str
    event: str
    at: int
    losses: list[float]
    norms: list[float]
    rates: list[float]


class Perceptrons:
    """A perceptron with two hidden layers for each run, all in one batch of matrices."""

    def __init__(self, sizes: list[int], seeds: list[int], batch_norm: bool, dropout: float) -> None:
        self.batch_norm, self.dropout = batch_norm, dropout
        self.chance = torch.Generator().manual_seed(seeds[0])
        self.weights, self.biases, self.gains = [], [], []
        for fan_in, fan_out in pairwise(sizes):
            own = [torch.randn(fan_in, fan_out, generator=torch.Generator().manual_seed(s + fan_out)) for s in seeds]
            self.weights.append((torch.stack(own) / math.sqrt(3 * fan_in)).requires_grad_())  # as nn.Linear does
            self.biases.append(torch.zeros(len(seeds), 1, fan_out, requires_grad=True))
            self.gains.append(torch.ones(len(seeds), 1, fan_out, requires_grad=True))

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases, *(self.gains[:-1] if self.batch_norm else [])]

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias, inputs, weight)
            if layer < last:
                if self.batch_norm:
                    mean, variance = inputs.mean(1, keepdim=True), inputs.var(1, keepdim=True, unbiased=False)
                    inputs = (inputs - mean) / (variance + 1e-5).sqrt() * self.gains[layer] + bias
                inputs = inputs.relu()
                if self.dropout:
                    keep = torch.rand(inputs.shape, generator=self.chance) >= self.dropout
                    inputs = inputs * keep / (1 - self.dropout)
        each = nn.functional.cross_entropy(inputs.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(1)


def examples(workload: Workload, seeds: list[int]) -> tuple[int, int, Callable[[], tuple[Tensor, Tensor]]]:
    """Number of inputs and of classes, and what draws a batch of every run."""
    chances = [torch.Generator().manual_seed(900 + seed) for seed in seeds]
    if workload.prose:
        text = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:300_000]
        letters = sorted(set(text))
        ids = torch.tensor([letters.index(letter) for letter in text])
        codes = torch.randn(len(letters), 12, generator=torch.Generator().manual_seed(0))

        def draw() -> tuple[Tensor, Tensor]:
            starts = torch.stack([torch.randint(len(ids) - 9, (workload.batch,), generator=g) for g in chances])
            window = ids[starts[..., None] + torch.arange(9)]
            return codes[window[..., :8]].flatten(2), window[..., 8]

        return 96, len(letters), draw
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = ((images - images.mean()) / images.std()).float()
    targets = labels.expand(len(seeds), -1).clone()
    for row, chance in zip(targets, chances, strict=True):
        wrong = torch.randperm(len(row), generator=chance)[: int(workload.wrong * len(row))]
        row[wrong] = torch.randint(10, (len(wrong),), generator=chance)

    def draw_digits() -> tuple[Tensor, Tensor]:
        picks = torch.stack([torch.randint(898, (workload.batch,), generator=chance) for chance in chances])
        return images[picks], targets.gather(1, picks)

    return 64, 10, draw_digits


def simulate(name: str, workload: Workload, seeds: list[int]) -> list[Run]:
    """One run for each event and seed."""
    kinds = [(event, seed) for event in EVENTS for seed in seeds]
    events, of = [event for event, _ in kinds], [seed for _, seed in kinds]
    ats = [0 if event in ("healthy", EVENTS[-1]) else 150 + (37 * seed) % 250 for event, seed in kinds]
    inputs, classes, draw = examples(workload, of)
    net = Perceptrons([inputs, 64, 64, classes], of, workload.batch_norm, workload.dropout)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in net.parameters]
    factor = torch.tensor([10.0 if event == EVENTS[-1] else 1.0 for event in events])
    runs = [Run(name, event, at, [], [], []) for event, at in zip(events, ats, strict=True)]
    for step in range(-workload.pretrained, STEPS):
        batch, targets = draw()
        if workload.rare and step % 40 == 7:
            batch = 3 * batch
        if step >= 0:
            for row, (event, at) in enumerate(zip(events, ats, strict=True)):
                inject(event, step - at, row, batch, targets, net, factor)
        losses = net.losses(batch, targets)
        gradients = torch.autograd.grad(losses.sum(), net.parameters)
        norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
        rate = workload.rate_at(max(step, 0)) * (factor if step >= 0 else torch.ones_like(factor))
        if step >= 0:
            values = zip(losses.tolist(), norms.tolist(), rate.tolist(), strict=True)
            for run, (loss, norm, value) in zip(runs, values, strict=True):
                run.losses.append(loss)
                run.norms.append(norm)
                run.rates.append(value)
        update(net, moments, gradients, rate.view(-1, 1, 1), step + workload.pretrained + 1, workload.adam)
    return runs


@torch.no_grad()
def inject(event: str, since: int, row: int, batch: Tensor, targets: Tensor, net: Perceptrons, factor: Tensor) -> None:
    if event == "NaN in a batch" and since == 0:
        batch[row, 0, 0] = math.nan
    elif (event == "exploding gradient" and since == 0) or (event == "burst" and 0 <= since < 5):
        batch[row] *= 20
        targets[row] = targets[row].roll(1)
    elif event == "shock to the weights" and since == 0:
        for weight in net.weights:
            weight[row] += 2 * weight[row].std() * torch.randn(weight[row].shape, generator=net.chance)
    elif event == "learning rate x 10" and since == 0:
        factor[row] = 10.0
    elif event == "learning rate creeps up" and since >= 0:
        factor[row] *= 1.02
    elif event == "dead units" and since == 0:
        net.biases[1][row] -= 20.0


@torch.no_grad()
def update(
    net: Perceptrons,
    moments: list[tuple[Tensor, Tensor]],
    gradients: tuple[Tensor, ...],
    rate: Tensor,
    count: int,
    adam: bool,
) -> None:
    for parameter, (first, second), gradient in zip(net.parameters, moments, gradients, strict=True):
        if adam:
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            denominator = (second / (1 - 0.999**count)).sqrt() + 1e-8
            parameter -= rate * first / (1 - 0.9**count) / denominator
        else:
            first.mul_(0.9).add_(gradient)
            parameter -= rate * first


# --------------------------------------------------------------------- detectors: the step of the first alarm, or None


def ours(run: Run) -> int | None:
    rule = InstabilityRule()
    for step, (loss, norm, rate) in enumerate(zip(run.losses, run.norms, run.rates, strict=True)):
        if rule.update(loss, norm, rate):
            return step
    return None


def without_rates(run: Run) -> int | None:
    rule = InstabilityRule()
    for step, (loss, norm) in enumerate(zip(run.losses, run.norms, strict=True)):
        if rule.update(loss, norm):
            return step
    return None


def spike_detection(run: Run) -> int | None:
    """Lightning's SpikeDetection: twice the mean of the last ten, and worse than the step before."""
    for step in range(1, STEPS):
        loss, mean = run.losses[step], statistics.fmean(run.losses[max(0, step - 10) : step])
        if not math.isfinite(loss) or (loss > run.losses[step - 1] and abs(loss - mean) >= 2 * mean):
            return step
    return None


def kill_loss_spike(run: Run) -> int | None:
    """llm-foundry's: twice the mean of the last hundred, five times in a row."""
    row = 0
    for step in range(100, STEPS):
        mean = statistics.fmean(run.losses[step - 100 : step])
        row = row + 1 if run.losses[step] >= 2 * mean or math.isnan(run.losses[step]) else 0
        if row > 4:
            return step
    return None


def skip_step(run: Run) -> int | None:
    """OLMo-core's: loss or norm six standard deviations off the last 128."""
    for step in range(64, STEPS):
        for values in (run.losses, run.norms):
            past = values[max(0, step - 128) : step]
            mean = statistics.fmean(past)
            deviation = math.sqrt(statistics.fmean((value - mean) ** 2 for value in past))
            if not abs(values[step] - mean) <= 6 * deviation:
                return step
    return None


DETECTORS: dict[str, Callable[[Run], int | None]] = {
    "InstabilityRule": ours,
    "InstabilityRule, rate unknown": without_rates,
    "Lightning SpikeDetection": spike_detection,
    "llm-foundry KillLossSpike": kill_loss_spike,
    "OLMo-core SkipStepOptimizer": skip_step,
}


@dataclass
class Score:
    """Of the runs with one event."""

    hits: int = 0
    runs: int = 0
    early: int = 0
    delays: list[int] = field(default_factory=list)


def harmed(run: Run, healthy: Run) -> bool:
    if run.event not in HAS_TO_HURT:
        return True
    window = slice(run.at, run.at + 10) if run.event == "shock to the weights" else slice(STEPS - 50, None)
    ends, others = run.losses[window], healthy.losses[window]
    return not statistics.fmean(ends) < 1.5 * statistics.fmean(others) + 0.02


def score(runs: list[tuple[Run, Run]], detect: Callable[[Run], int | None], verbose: bool) -> dict[str, Score]:
    scores = {event: Score() for event in EVENTS}
    for run, healthy in runs:
        if not harmed(run, healthy):
            continue
        alarm, one = detect(run), scores[run.event]
        one.runs += 1
        delay = math.inf if alarm is None else alarm - run.at
        if run.event == "healthy":
            one.hits += alarm is not None
        elif 0 <= delay < (LATE if run.event in SLOW else SOON):
            one.hits += 1
            one.delays.append(int(delay))
        else:
            one.early += delay < 0
        if verbose and (alarm is not None) == (run.event == "healthy" or not 0 <= delay < LATE):
            print(f"        {run.workload}: {run.event} at {run.at}, alarm at {alarm}")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="on the workloads that the constants were chosen on")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="list the misses of InstabilityRule")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    runs = []
    for name, workload in (TUNE if options.tune else REPORT).items():
        simulated = simulate(name, workload, seeds)
        runs += [(run, simulated[index % len(seeds)]) for index, run in enumerate(simulated)]
    for name, detect in DETECTORS.items():
        scores = score(runs, detect, options.verbose and detect is ours)
        events = {event: one for event, one in scores.items() if event != "healthy"}
        hits, early = sum(one.hits for one in events.values()), sum(one.early for one in events.values())
        healthy = scores["healthy"]
        precision = hits / max(1, hits + early + healthy.hits)
        print(f"\n{name}: precision {precision:.3f}, recall {hits / sum(one.runs for one in events.values()):.3f},")
        print(f"    {healthy.hits} alarms in {healthy.runs * STEPS:,} healthy steps, {early} before an event")
        for event, one in events.items():
            delay = statistics.median(one.delays) if one.delays else math.nan
            print(f"    {event:28}{one.hits:4}/{one.runs:<4}{one.hits / max(1, one.runs):7.1%}, median delay {delay:g}")


if __name__ == "__main__":
    main()
