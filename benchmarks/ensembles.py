"""What a prediction of five members costs, beside a plain loop over them: one line for each model and batch.

python benchmarks/ensembles.py [mlp] [cnn] [transformer] [--seconds 3] [--batches 1,64,512] [--members 5]

The bar is 1.05 times the loop. ``vmap`` marks where the ensemble has chosen it; what it would have cost stands beside.
"""

import argparse
from collections.abc import Callable

import torch
from _timing import interleave
from torch import Tensor, nn
from typing_extensions import override

from lightning_recipes.core.ensembles import Ensemble, _Stacked, combined


class Tokens(nn.Module):
    """A small transformer classifier: 2 layers of width 64, 16 tokens of 4 features."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.positions = nn.Linear(4, 64), nn.Parameter(torch.randn(16, 64) * 0.02)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(self.inputs(inputs.view(-1, 16, 4)) + self.positions)
        logits: Tensor = self.head(hidden.mean(1))
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(128, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Tokens}


def measure(model: str, batch: int, members: int, seconds: float) -> str:
    torch.manual_seed(0)
    nets = [MODELS[model]().eval() for _ in range(members)]
    ensemble = Ensemble(nets)
    weights = torch.full((members,), 1 / members)
    inputs = torch.rand(batch, 64)
    stacked = _Stacked(nets)
    candidates: dict[str, Callable[[], object]] = {
        "loop": lambda: combined(torch.stack([net(inputs) for net in nets]), weights, "logits"),
        "ensemble": lambda: ensemble(inputs),
        "mean of softmax": lambda: torch.stack([net(inputs).softmax(-1) for net in nets]).mean(0),
        "vmap": lambda: combined(stacked((inputs,), {}), weights, "logits"),
    }
    with torch.inference_mode():
        expected = candidates["loop"]()
        ensemble(inputs)  # decides
        torch.testing.assert_close(ensemble(inputs), expected, rtol=1e-4, atol=1e-4)
        times = interleave(candidates, seconds, at_least=15)
    cells = [f"{min(times.rounds['loop']) * 1e6:>10.0f}"]
    for name in ("ensemble", "vmap", "mean of softmax"):
        low, middle, high = times.ratio(name, "loop")
        cells.append(f"{middle:>10.3f} ({low:.3f} to {high:.3f})".rjust(28))
    return f"{model:12}{batch:>6}" + "".join(cells) + ("  vmap" if any(ensemble._vmap_wins.values()) else "  loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="model", help=", ".join(MODELS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    parser.add_argument("--batches", default="1,64,512")
    parser.add_argument("--members", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("times of the plain loop (its members, one stack, log-mean-exp); medians of rounds, with quartiles")
    print(f"{'':12}{'batch':>6}{'loop, us':>10}{'Ensemble':>28}{'vmap':>28}{'mean of softmax':>28}  chosen")
    for model in options.models:
        for batch in map(int, options.batches.split(",")):
            print(measure(model, batch, options.members, options.seconds), flush=True)


if __name__ == "__main__":
    main()
