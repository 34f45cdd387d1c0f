"""Minimum, saddle, walls, noise or slope? Points that are known to be one of them, on real digits.

    python benchmarks/curvature.py [points] [eigenvalues] [minibatches] [runs] [cost] [--seeds 5]

The points are made, not found: saddles by zeroed weights and by a unit that is there twice (Fukumizu and Amari, 2000),
minima by L-BFGS, bouncing by a learning rate of three times the edge, noise by small batches.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits

from lightning_recipes import CriticalPointProbe
from lightning_recipes.core.curvature import CriticalPoint, measure, sharpness, verdict
from lightning_recipes.core.hessian import LossSurface, extreme_eigenvalues, steps_of

SMOOTHING = 0.1  # of the labels: then minima lie at finite weights

Batch = tuple[Tensor, Tensor]
Point = tuple[str, nn.Module, Optimizer, list[Batch], float]  # what it is, and the share of the data in the batches


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=SMOOTHING)


def network(kind: str, width: int, seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    last = nn.Linear(36 * width if kind == "convolutions" else width, 10, dtype=dtype)
    torch.manual_seed(seed)
    if kind == "convolutions":
        first = nn.Conv2d(1, width, 3, dtype=dtype)
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), first, nn.Tanh(), nn.Flatten(), last)
    return nn.Sequential(nn.Linear(64, width, dtype=dtype), nn.Tanh(), nn.Linear(width, 10, dtype=dtype))


def descend(model: nn.Module, batch: Batch, lr: float, steps: int) -> None:
    optimizer = SGD(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, batch))
        optimizer.step()


def polish(model: nn.Module, batch: Batch, steps: int) -> None:
    optimizer = torch.optim.LBFGS(
        model.parameters(), 1.0, steps, 4 * steps, 1e-9, 1e-14, 50, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # has no types in torch


def surface_of(model: nn.Module, batches: list[Batch]) -> LossSurface:
    return LossSurface([partial(loss_of, model, batch) for batch in batches], model.parameters())


def look(model: nn.Module, optimizer: Optimizer, batches: list[Batch], share: float = 1.0) -> CriticalPoint:
    return measure(surface_of(model, batches), steps_of([optimizer], list(model.parameters())), share=share)


# ------------------------------------------------------------------------------ full batches: experiment 7 of the facts


def zero_saddle(data: Batch, seed: int, kind: str) -> nn.Module:
    model = network(kind, 12, seed, data[0].dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        share = torch.bincount(data[1], minlength=10).to(data[0]) / len(data[1])
        last: nn.Linear = model[-1]  # type: ignore[index]  # a Sequential
        last.bias.copy_((share * (1 - SMOOTHING) + SMOOTHING / 10).log())
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    return model


def doubled_unit(data: Batch, seed: int) -> nn.Module:
    small, large = network("units", 3, seed, data[0].dtype), network("units", 4, seed, data[0].dtype)
    descend(small, data, 0.5, 1500)
    polish(small, data, 600)
    with torch.no_grad():
        inward, bias, outward, last = [parameter.clone() for parameter in small.parameters()]
        outward = torch.cat([outward, outward[:, :1]], 1)
        outward[:, 0] *= 0.4
        outward[:, 3] *= 0.6
        values = [torch.cat([inward, inward[:1]]), torch.cat([bias, bias[:1]]), outward, last]
        for parameter, value in zip(large.parameters(), values, strict=True):
            parameter.copy_(value)
    return large


def bouncing(data: Batch, seed: int, kind: str, factor: float = 3.0) -> tuple[nn.Module, Optimizer]:
    model = network(kind, 12, seed, data[0].dtype)
    descend(model, data, 0.2, 300)
    largest = look(model, SGD(model.parameters(), 0.2), [data]).spectrum.largest
    descend(model, data, 2 * factor / largest, 7)
    return model, SGD(model.parameters(), 2 * factor / largest)


def full_batch_points(data: Batch, seeds: range, kind: str) -> Iterator[Point]:
    for seed in seeds:
        model = zero_saddle(data, seed, kind)
        yield "saddle", model, SGD(model.parameters(), 0.1), [data], 1.0
        if kind == "units":
            model = doubled_unit(data, seed)
            yield "saddle", model, SGD(model.parameters(), 0.1), [data], 1.0
        model = network(kind, 3 if kind == "units" else 1, 50 + seed, data[0].dtype)
        descend(model, data, 0.5, 1500)
        polish(model, data, 3000)
        yield "local minimum", model, SGD(model.parameters(), 0.1), [data], 1.0
        model = network(kind, 12, seed, data[0].dtype)
        descend(model, data, 0.1, 20)
        yield "still descending", model, SGD(model.parameters(), 0.1), [data], 1.0
        yield "bouncing between the walls", *bouncing(data, seed, kind), [data], 1.0


def in_float32(points: Iterator[Point]) -> Iterator[Point]:
    """Points made in double precision, where a minimum can be found, looked at in single precision."""
    for truth, model, optimizer, batches, share in points:
        yield truth, model.float(), optimizer, [(inputs.float(), labels) for inputs, labels in batches], share


def tell_apart(points: Iterator[Point]) -> None:
    right = total = 0
    for truth, model, optimizer, batches, share in points:
        point = look(model, optimizer, batches, share)
        slope, escape = point.relative_gradient(point.slope.value), -point.escape.get(point.escape_step, 0) / point.loss
        said = verdict(point, is_flat=None if share == 1 else truth != "still descending")
        right, total = right + (said == truth), total + 1
        spectrum = point.spectrum
        ratio = spectrum.smallest / spectrum.scale
        floor = spectrum.floor / spectrum.scale
        print(
            f"{truth:28} {'' if said == truth else '-> ' + said:28} gradient {slope:8.2g}"
            f"  smallest {ratio:8.1g} (floor {floor:6.2g})  over limit {point.over_limit.value:5.2g}"
            f"  gain/noise {point.gain.value / point.loss_to_noise if point.loss_to_noise else 0:7.2g}"
            f"  escape {100 * escape:5.2g} %  products {point.products}"
        )
    print(f"{right} of {total} right")


def points(seeds: range) -> None:
    train = digits(0).train
    data = train[0][:300], train[1][:300]
    data = data[0].double(), data[1]
    print("\nfull batches of 300 digits, 64-w-10 tanh, float64")
    tell_apart(full_batch_points(data, seeds, "units"))
    print("\nthe same in float32")
    tell_apart(in_float32(full_batch_points(data, seeds, "units")))
    print("\none layer of convolutions, float32; other seeds")
    tell_apart(in_float32(full_batch_points(data, range(100, 100 + len(seeds)), "convolutions")))


# ------------------------------------------------------------------------------ against the dense Hessian


def small_networks() -> Iterator[tuple[str, nn.Module]]:
    layers: dict[str, list[nn.Module]] = {
        "64-12-10 tanh": [nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)],
        "64-16-16-10 tanh": [nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)],
        "64-32-10 ReLU": [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)],
        "convolutions, ReLU": [
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32, 10)),
        ],
    }
    for name, modules in layers.items():
        torch.manual_seed(1)
        for module in modules:
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.double().reset_parameters()
        yield name, nn.Sequential(*modules)


def exact_ends(model: nn.Module, data: Batch) -> tuple[float, float]:
    surface = surface_of(model, [data])
    surface.gradients()
    dense = torch.stack([surface.product(unit) for unit in torch.eye(surface.weights.numel(), dtype=torch.float64)])
    exact = torch.linalg.eigvalsh((dense + dense.T) / 2)
    return float(exact[0]), float(exact[-1])


def eigenvalues(seeds: range) -> None:
    train = digits(0).train
    data = train[0][:300].double(), train[1][:300]
    print(f"\nby default, in float32, four batches; worst of {len(seeds)} starts")
    for name, model in small_networks():
        for steps, more in ((0, 0), (50, 50), (1000, 950), (3000, 2000)):
            descend(model, data, 0.2, more)
            low, high = exact_ends(model, data)
            single = copy.deepcopy(model).float()
            surface = surface_of(
                single, list(zip(torch.split(data[0].float(), 75), torch.split(data[1], 75), strict=True))
            )
            found = [measure(surface, None, seed, share=1.0).spectrum for seed in seeds]
            soon = [sharpness(surface, None, seed, 10)[0].largest for seed in seeds]
            print(
                f"{name}, {steps:4} updates: exact {low:8.2g} to {high:6.3g};"
                f" smallest off by {max(abs(each.smallest / low - 1) for each in found):.2%}"
                f" ({max(abs(each.smallest - low) for each in found) / high:.0e} of the largest),"
                f" largest by {max(abs(each.largest / high - 1) for each in found):.2%}, in at most"
                f" {max(each.products for each in found)} products; largest in 10 by"
                f" {max(abs(each / high - 1) for each in soon):.2%};"
                f" floor holds in {sum(each.floor <= low + 1e-6 * high for each in found)}"
            )
    inputs = data[0]
    data = (inputs - inputs.mean()) / inputs.std(), data[1]
    model = network("units", 12, 1, torch.float64)
    descend(model, data, 0.2, 50)
    low, high = exact_ends(model, data)
    surface = surface_of(model, [data])
    mean = surface.gradients()[1][0]
    print(f"\nexperiment 7's own point, net and starts, float64: exact {low:.5g} to {high:.5g}; worst of {len(seeds)}")
    for products in (5, 10, 15, 20, 30, 50):
        for name, added in (("random", 0.0), ("random and gradient", 1.0)):
            ends = []
            for seed in seeds:
                start = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                start = start / start.norm() + added * mean / mean.norm()
                ends.append(extreme_eigenvalues(surface.product, start, products, 0.0))
            print(
                f"{products:3} products, start {name:20} largest {max(abs(e.largest / high - 1) for e in ends):8.2%},"
                f" smallest {max(abs(e.smallest / low - 1) for e in ends):8.2%}"
            )


# ------------------------------------------------------------------------------ minibatches


def train(
    model: nn.Module, optimizer: Optimizer, data: Batch, size: int, steps: int, generator: torch.Generator
) -> list[float]:
    losses = []
    for _ in range(steps):
        picked = torch.randint(len(data[1]), (size,), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(model, (data[0][picked], data[1][picked]))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def sample_of(data: Batch, size: int, batches: int, generator: torch.Generator) -> list[Batch]:
    picked = torch.randperm(len(data[1]), generator=generator)[: size * batches].view(batches, size)
    return [(data[0][each], data[1][each]) for each in picked]


def minibatch_points(seeds: range) -> Iterator[Point]:
    data = digits(0).train
    optimizers: dict[str, Callable[[nn.Module], Optimizer]] = {
        "SGD": lambda model: SGD(model.parameters(), 0.5),
        "momentum": lambda model: SGD(model.parameters(), 0.05, momentum=0.9),
        "AdamW": lambda model: AdamW(model.parameters(), 0.02),
    }
    for name, make in optimizers.items():
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for truth, steps, factor in (("still descending", 10, 0.1), ("noise floor", 4000, 1.0)):
                model = network("units", 12, seed, torch.float32)
                optimizer = make(model)
                optimizer.param_groups[0]["lr"] *= factor
                train(model, optimizer, data, 8, steps, generator)
                print(f"{name:9}", end="")
                yield truth, model, optimizer, sample_of(data, 8, 16, generator), 16 * 8 / len(data[1])


def minibatches(seeds: range) -> None:
    print("\nbatches of 8, a sample of 16")
    tell_apart(minibatch_points(seeds))


# ------------------------------------------------------------------------------ whole runs


class Classifier(pl.LightningModule):
    """Any network on digits."""

    def __init__(self, model: nn.Module, make: Callable[[Iterator[nn.Parameter]], Any], smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.make, self.smoothing = model, make, smoothing

    @override
    def training_step(self, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]), batch[1], label_smoothing=self.smoothing)

    @override
    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def perceptron(batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    norm = [nn.BatchNorm1d(64)] if batch_norm else []
    return nn.Sequential(nn.Linear(64, 64), *norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10))


def cosine(parameters: Iterator[nn.Parameter]) -> Any:
    optimizer = AdamW(parameters, 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, RUN)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


RUN = 3000  # updates
RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[Iterator[nn.Parameter]], Any], int, float, float]] = {
    # network, optimizer, batch size, share of wrong labels, label smoothing
    "SGD": (perceptron, lambda p: SGD(p, 0.1), 32, 0.0, 0.0),
    "SGD, batches of 4": (perceptron, lambda p: SGD(p, 0.02), 4, 0.0, 0.0),
    "momentum, decay 1e-3": (perceptron, lambda p: SGD(p, 0.03, 0.9, weight_decay=1e-3), 32, 0.0, 0.0),
    "momentum, smoothing": (perceptron, lambda p: SGD(p, 0.03, 0.9), 32, 0.0, 0.1),
    "momentum, wrong labels": (perceptron, lambda p: SGD(p, 0.03, 0.9), 32, 0.2, 0.0),
    "Adam": (perceptron, lambda p: Adam(p, 1e-3), 32, 0.0, 0.0),
    "AdamW, cosine": (perceptron, cosine, 32, 0.0, 0.0),
    "AdamW, wrong labels": (partial(perceptron, False, 0.3), cosine, 32, 0.2, 0.0),
    "BatchNorm": (partial(perceptron, True), lambda p: SGD(p, 0.1, 0.9), 32, 0.0, 0.0),
    "BatchNorm, dropout": (partial(perceptron, True, 0.5), lambda p: SGD(p, 0.1, 0.9), 32, 0.1, 0.0),
    "full batch": (perceptron, lambda p: SGD(p, 0.3), 898, 0.0, 0.0),
    "full batch, smoothing": (perceptron, lambda p: SGD(p, 0.5), 898, 0.0, 0.1),
    "TOO HIGH: SGD": (perceptron, lambda p: SGD(p, 3.0), 32, 0.0, 0.0),
    "TOO HIGH: momentum": (perceptron, lambda p: SGD(p, 1.0, 0.9), 32, 0.0, 0.0),
    "TOO HIGH: full batch": (partial(network, "units", 12, 0, torch.float32), lambda p: SGD(p, 6.0), 898, 0.0, 0.1),
}


class Timed(CriticalPointProbe):
    """How long the looks take, of this process' own time."""

    took = 0.0

    @contextmanager
    @override
    def _surface(self, *given: Any) -> Iterator[Any]:
        started = time.process_time()
        with super()._surface(*given) as surface:
            yield surface
        self.took += time.process_time() - started


def runs(seeds: range) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, (make_model, make, size, wrong, smoothing) in RUNS.items():
        for seed in seeds:
            torch.manual_seed(seed)
            data, probe = TensorDataset(*digits(seed, wrong).train), Timed()
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = pl.Trainer(
                    accelerator="cpu",
                    devices=1,
                    max_steps=RUN,
                    max_epochs=-1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    default_root_dir=folder,
                    callbacks=[probe],
                )
                started = time.process_time()
                trainer.fit(
                    Classifier(make_model(), make, smoothing), DataLoader(data, size, shuffle=True, drop_last=True)
                )
                others = time.process_time() - started - probe.took
                lines = [json.loads(line) for line in (Path(folder) / "findings.jsonl").read_text().splitlines()]
            print(f"\n{name}, seed {seed}: looks took {probe.took / others:.1%} of the time of the run")
            for line in lines:
                products = line["evidence"]["products"]
                print(f"  {line['severity']:8} {line['rule']} at {line['step']}, {products}: {line['message'][:180]}")


# ------------------------------------------------------------------------------ cost


def plain_gradients(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        torch.autograd.grad(loss_of(model, batch), list(model.parameters()))


def cost(seeds: range) -> None:  # noqa: ARG001  # has none
    inputs, labels = digits(0).train
    many = [(inputs[start : start + 32], labels[start : start + 32]) for start in range(0, 256, 32)]
    for name, model, batches in (
        ("perceptron, 8 batches of 32", perceptron(), many),
        ("64-256-10, one batch of 898", network("units", 256, 0, torch.float32), [(inputs, labels)]),
        ("convolutions, one batch of 898", network("convolutions", 32, 0, torch.float32), [(inputs, labels)]),
    ):
        kept, anew = surface_of(model, batches), surface_of(model, batches)
        vector = kept.weights
        kept.gradients()
        works: dict[str, Callable[[], Any]] = {
            "gradient": partial(plain_gradients, model, batches),
            "kept": partial(kept.product, vector),
            "anew": partial(anew.product, vector),
        }
        times: dict[str, list[float]] = {each: [] for each in works}
        for _ in range(30):
            for each, work in works.items():
                started = time.process_time()
                work()
                times[each].append(time.process_time() - started)
        kept_ratio, anew_ratio = (
            statistics.median(times[each]) / statistics.median(times["gradient"]) for each in ("kept", "anew")
        )
        print(f"\n{name}: a product takes {kept_ratio:.2f} gradients with a graph that is kept, else {anew_ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"points": points, "eigenvalues": eigenvalues, "minibatches": minibatches, "runs": runs, "cost": cost}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for part in given.parts:
        parts[part](range(given.seeds))


if __name__ == "__main__":
    main()
