"""Minimum, saddle, walls, noise or slope? Points that are known to be one of them, on real digits.

    python benchmarks/curvature.py [points] [eigenvalues] [minibatches] [runs] [cost] [--seeds 5]

The points are made, not found: saddles by zeroed weights and by a unit that is there twice (Fukumizu and Amari, 2000),
minima by L-BFGS, bouncing by a learning rate of three times the edge, noise by small batches.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
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
from lightning_recipes.core.curvature import CriticalPoint, measure, verdict
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

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def surface_of(model: nn.Module, batches: list[Batch]) -> LossSurface:
    return LossSurface([partial(loss_of, model, batch) for batch in batches], model.parameters())


def look(
    model: nn.Module, optimizer: Optimizer, batches: list[Batch], share: float = 1.0, max_products: int = 30
) -> CriticalPoint:
    parameters = list(model.parameters())
    return measure(surface_of(model, batches), steps_of([optimizer], parameters), 0, max_products, share)


# ------------------------------------------------------------------------------ full batches: experiment 7 of the facts


def zero_saddle(data: Batch, seed: int, kind: str) -> nn.Module:
    model = network(kind, 12, seed, data[0].dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        share = torch.bincount(data[1], minlength=10).to(data[0]) / len(data[1])
        last: nn.Linear = model[-1]  # type: ignore[index]
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


def tell_apart(points: Iterator[Point], max_products: int = 30) -> None:
    right = total = 0
    for truth, model, optimizer, batches, share in points:
        point = look(model, optimizer, batches, share, max_products)
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


def eigenvalues(seeds: range) -> None:
    train = digits(0).train
    data = train[0][:300].double(), train[1][:300]
    for moment, steps in (("before training", 0), ("after 50 steps", 50), ("after 1,000 steps", 1000)):
        model = network("units", 12, 1, torch.float64)
        descend(model, data, 0.2, steps)
        surface = surface_of(model, [data])
        size = surface.weights.numel()
        dense = torch.stack([surface.product(unit) for unit in torch.eye(size, dtype=torch.float64)])
        exact = torch.linalg.eigvalsh((dense + dense.T) / 2)
        print(f"\n{size} parameters, {moment}: exact {exact[0]:.5g} to {exact[-1]:.5g}; worst of {len(seeds)} starts")
        for products in (5, 10, 15, 20, 30, 40):
            found = []
            for seed in seeds:
                start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                found.append(extreme_eigenvalues(surface.product, start, products, tolerance=0.0))
            low = max(abs(each.smallest / float(exact[0]) - 1) for each in found)
            high = max(abs(each.largest / float(exact[-1]) - 1) for each in found)
            held = sum(each.floor <= float(exact[0]) for each in found)
            print(f"{products:3} products: largest {high:8.2%}, smallest {low:8.2%}; floor holds in {held}")


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


def runs(seeds: range) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, (make_model, make, size, wrong, smoothing) in RUNS.items():
        for seed in seeds:
            torch.manual_seed(seed)
            data = TensorDataset(*digits(seed, wrong).train)
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                took = []
                for probes in (False, True):
                    module = Classifier(make_model(), make, smoothing)
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
                        callbacks=[CriticalPointProbe()] if probes else [],
                    )
                    started = time.perf_counter()
                    trainer.fit(module, DataLoader(data, size, shuffle=True, drop_last=True))
                    took.append(time.perf_counter() - started)
                lines = [json.loads(line) for line in (Path(folder) / "findings.jsonl").read_text().splitlines()]
            print(f"\n{name}, seed {seed}: {took[1] / took[0]:.2f} of the time without")
            for line in lines:
                print(f"  {line['severity']:8} {line['rule']} at {line['step']}: {line['message'][:200]}")


# ------------------------------------------------------------------------------ cost


def cost(seeds: range) -> None:  # noqa: ARG001  # has none
    data = digits(0).train
    for kind, width in (("units", 256), ("convolutions", 32)):
        model = network(kind, width, 0, torch.float32)
        surface = surface_of(model, [data])
        vector = surface.weights
        times: dict[str, list[float]] = {"gradient": [], "product": []}
        for _ in range(20):
            for name, work in (("gradient", surface.gradients), ("product", partial(surface.product, vector))):
                started = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - started)
        ratio = statistics.median(times["product"]) / statistics.median(times["gradient"])
        print(f"\n{kind}: a product takes {ratio:.2f} gradients")


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
