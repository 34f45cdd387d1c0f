"""What the recipes cost, beside their peers and the limits of the machine: one table of ratios for each question.

    python benchmarks/speed.py [average] [clip] [threshold] [loop] [import] [--seconds 10] [--models resnet,small,gpt2]

Peers are optional: pip install ema-pytorch zclip autoclip
"""

import argparse
import compileall
import importlib
import logging
import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _steps import measure_steps
from _timing import Times, interleave, table
from torch import Tensor, nn

import lightning_recipes
from lightning_recipes.core.averaging import ExponentialMovingAverage
from lightning_recipes.core.clipping import PercentileThreshold, clipping_factor, scale_, total_norm

Call = Callable[[], object]
DECAY = 0.999


# ------------------------------------------------------------------------------ tensors of known shapes


def resnet() -> list[Tensor]:
    """The parameters of an ImageNet ResNet-18: 62 tensors, 11.7 million elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if block == 0 and out != width:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [torch.randn(shape) for shape in [*shapes, (1000, 512), (1000,)]]


def small() -> list[Tensor]:
    """2,000 tensors of 1,000 elements."""
    return [torch.randn(1000) for _ in range(2000)]


def gpt2() -> list[Tensor]:
    """The parameters of GPT-2 small: 148 tensors, 124 million elements."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    shapes = [(50257, d), (1024, d), *block * 12, (d,), (d,)]
    return [torch.randn(shape) for shape in shapes]


MODELS: dict[str, Callable[[], list[Tensor]]] = {"resnet": resnet, "small": small, "gpt2": gpt2}


class Holder(pl.LightningModule):
    """A module that is nothing but parameters."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)


def peer(name: str, make: Callable[[Any], Call]) -> dict[str, Call]:
    """A candidate of a package that may be absent."""
    try:
        return {name: make(importlib.import_module(name.split()[0].replace("-", "_")))}
    except ImportError:
        print(f"({name} is not installed)")
        return {}


# ------------------------------------------------------------------------------ one update of an average


def settled(every: int = 1) -> ExponentialMovingAverage:
    """An average whose decay has warmed up."""
    ema = ExponentialMovingAverage(DECAY, every_n_steps=every)
    ema._updates = 100_000
    return ema


def measure_average(model: str, seconds: float) -> Times:
    tensors = MODELS[model]()
    named, shadow = {str(i): tensor for i, tensor in enumerate(tensors)}, [tensor.clone() for tensor in tensors]
    flat, other = torch.cat([tensor.flatten() for tensor in tensors]), torch.zeros(sum(t.numel() for t in tensors))
    one, four = settled(), settled(4)
    module = Holder(tensors)

    def lightnings() -> Call:
        utils: Any = torch.optim.swa_utils
        average = utils.AveragedModel(module, avg_fn=utils.get_ema_avg_fn(DECAY))
        return lambda: average.update_parameters(module)

    def every_fourth() -> None:
        for _ in range(4):
            four.update(named)

    candidates: dict[str, Call] = {
        "limit": lambda: other.lerp_(flat, 1 - DECAY),
        "foreach": lambda: torch._foreach_lerp_(shadow, tensors, 1 - DECAY),
        "EMAWeights": lambda: one.update(named),
        "EMAWeights, every 4th step": every_fourth,
        "lightning": lightnings(),
        **peer(
            "ema-pytorch",
            lambda ema: ema.EMA(module, beta=DECAY, update_after_step=-2, update_every=1, use_foreach=True).update,
        ),
    }
    return interleave(candidates, seconds)


# ------------------------------------------------------------------------------ one clipped step


def measure_clip(model: str, seconds: float) -> Times:
    """Ten steps at norms of which one is above the 90th percentile."""
    gradients = MODELS[model]()
    module = Holder([torch.zeros_like(gradient) for gradient in gradients])
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    base = total_norm(gradients).item()
    block = [0.86, 1.02, 0.95, 1.08, 0.91, 1.60, 1.05, 0.98, 0.89, 1.00]

    def ten(step: Callable[[float], object]) -> Call:
        def run() -> None:
            for factor in block:
                step(factor)

        return run

    rule = PercentileThreshold()
    for factor in block * 100:
        rule.update(base * factor)

    def ours(factor: float) -> None:
        norm = total_norm(gradients).item() * factor
        applied = clipping_factor(norm, rule.update(norm))
        if applied < 1:
            scale_(gradients, 1.0)  # what it costs; the gradients stay for the next round
            scaled.append(applied)

    scaled: list[float] = []
    candidates: dict[str, Call] = {
        "torch": ten(lambda _: nn.utils.clip_grad_norm_(module.parameters(), 1.2 * base, foreach=True)),
        "norm only": ten(lambda _: nn.utils.get_total_norm(gradients)),
        "PercentileGradientClipping": ten(ours),
        **peer("zclip", lambda zclip: _zclip(zclip, module, ten)),
    }
    times = interleave(candidates, seconds)
    assert scaled, "nothing was clipped: no fair comparison"
    return times


def _zclip(zclip: Any, module: nn.Module, ten: Callable[[Callable[[float], object]], Call]) -> Call:
    clipper = zclip.ZClip(max_grad_norm=None)
    return ten(lambda _: clipper.step(module))


# ------------------------------------------------------------------------------ the threshold alone


def measure_threshold(seconds: float) -> Times:
    """One norm in, one threshold out, after a thousand and after a million steps; against numpy on the same window."""
    numpy: Any = importlib.import_module("numpy")
    generator = random.Random(0)
    norms = [generator.lognormvariate(0, 0.5) for _ in range(100_003)]
    rules = {steps: PercentileThreshold() for steps in (1000, 1_000_000)}
    for steps, rule in rules.items():
        for step in range(steps):
            rule.update(norms[step % len(norms)])
    window: list[float] = norms[:1000]
    position = iter(range(10**12))

    def numpys() -> None:
        step = next(position)
        window[step % 1000] = norms[step % len(norms)]
        numpy.percentile(window, 90)

    def step_of(rule: PercentileThreshold) -> Call:
        own = iter(range(10**12))
        return lambda: rule.update(norms[next(own) % len(norms)])

    candidates: dict[str, Call] = {"numpy": numpys}
    candidates |= {f"after {steps:,} steps": step_of(rule) for steps, rule in rules.items()}
    times = interleave(candidates, seconds)
    for name in candidates:
        print(f"{name}: {statistics.median(times.rounds[name]) * 1e6:.1f} microseconds here")
    return times


# ------------------------------------------------------------------------------ import


IMPORTS = """
import time
seconds = [time.process_time()]
import lightning.pytorch
seconds.append(time.process_time())
import lightning_recipes
print(seconds[1] - seconds[0], time.process_time() - seconds[1])
"""


def measure_import(processes: int) -> None:
    """CPU time in fresh processes, of which each imports Lightning and then the library."""
    compileall.compile_dir(Path(lightning_recipes.__file__).parent, quiet=1)  # as an installed package is
    alone, more = [], []
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
        lightning, recipes = map(float, done.stdout.split())
        alone.append(lightning)
        more.append(recipes / lightning)
    shares = sorted(more)
    low, high = shares[processes // 4], shares[3 * processes // 4]
    print(f"\nimport lightning.pytorch, median of {processes} fresh processes: {statistics.median(alone):.2f} s here")
    print(f"import lightning_recipes adds {statistics.median(shares):.1%} (half of them: {low:.1%} to {high:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ["average", "clip", "threshold", "loop", "import"]
    parser.add_argument("questions", nargs="*", default=questions, metavar="question", help=", ".join(questions))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each table")
    parser.add_argument("--models", default="resnet,small", help="of resnet, small, gpt2")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    models = options.models.split(",")
    for model in models if "average" in options.questions else []:
        times = measure_average(model, options.seconds)
        fourth = {"EMAWeights, every 4th step": 4}
        table(f"One update of an average, {model}", times, "limit", "foreach", "lightning", unit=fourth)
    for model in models if "clip" in options.questions else []:
        table(f"One clipped step, {model}", measure_clip(model, options.seconds), "torch")
    if "threshold" in options.questions:
        times = measure_threshold(options.seconds)
        table("The threshold of one step, window 1,000", times, "numpy", "after 1,000 steps")
    if "loop" in options.questions:
        measure_steps(options.seconds)
    if "import" in options.questions:
        measure_import(15)


if __name__ == "__main__":
    main()
