import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import Regression, regression_data, same, weights_of
from torch import nn

from lightning_recipes.sweep import early_instability_probe


class Deep(Regression):
    """Without normalisation, and with an initialisation that makes it sharp."""

    def __init__(self, learning_rate: float, **kwargs: Any) -> None:
        super().__init__(make_optimizer=lambda p: torch.optim.SGD(p, learning_rate, momentum=0.9), **kwargs)
        self.net = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 1))


@pytest.mark.parametrize("schedule", [False, True])
def test_it_tells_the_edge_from_safe_ground(schedule: bool) -> None:
    safe = early_instability_probe(Deep(1e-3, schedule=schedule), regression_data(100), steps=200, accelerator="cpu")
    assert not safe.hides
    assert (safe.finding.rule, len(safe.losses)) == ("no early instability", 200)
    assert safe.learning_rate == pytest.approx(2e-3, rel=0.2)
    edge = early_instability_probe(Deep(0.5, schedule=schedule), regression_data(100), steps=200, accelerator="cpu")
    assert edge.hides
    assert edge.finding.rule == "early instability"
    assert edge.finding.step == edge.found[0].step


def test_everything_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Deep(0.2)
    before, random = weights_of(module), torch.get_rng_state()
    early_instability_probe(module, regression_data(20), steps=30, accelerator="cpu")
    assert same(weights_of(module), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert module._trainer is None
    assert not list(tmp_path.rglob("*"))
    assert all(parameter.grad is None for parameter in module.parameters())
    copy.deepcopy(module)


def test_what_the_gradients_go_through_is_in_it(tmp_path: Path) -> None:
    class Holds(pl.Callback):
        calls = 0

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            self.calls += 1
            for parameter in pl_module.parameters():
                parameter.grad = None

    holds = Holds()
    for callbacks in (holds, [holds]):
        probe = early_instability_probe(Deep(0.5), regression_data(1), steps=20, accelerator="cpu", callbacks=callbacks)
        assert len(set(probe.losses)) == 1
    assert holds.calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor must be a number above 0, got 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        early_instability_probe(Regression(), regression_data(2), **arguments)
