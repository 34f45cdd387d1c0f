"""Members of known quality, and what they predict."""

import torch
from torch import Tensor

from lightning_recipes.core.evidence import Evidence

SPREADS = {
    "one is the truth": [0.3, 0.3, 0.3, 0.3, 0.0],
    "identical": [0.0] * 5,
    "early ones are weak": [6.0, 4.0, 3.0, 0.5, 0.0],
    "equally good": [1.0] * 5,
}


def world(kind: str, samples: int, generator: torch.Generator, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits of five members, which are the true ones with noise of their own, and classes drawn of the true ones."""
    truth = 2 * torch.randn(samples, classes, generator=generator)
    uniform = torch.rand(samples, 1, generator=generator)
    targets = (truth.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=classes - 1)
    noise = torch.randn(5, samples, classes, generator=generator)
    return truth + noise * torch.tensor(SPREADS[kind]).view(-1, 1, 1), targets


def evidence_of(outputs: Tensor, targets: Tensor, task: str = "auto", batch: int = 37, **kwargs: int) -> Evidence:
    evidence = Evidence(task, **kwargs)
    for start in range(0, len(targets), batch):
        evidence.update(outputs[:, start : start + batch], targets[start : start + batch])
    return evidence
