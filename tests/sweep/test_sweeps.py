import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Fragile, Regression, regression_data, same, weights_of

from lightning_recipes.core.learning_rate import LearningRateSearch, learning_rate_sensitivity
from lightning_recipes.core.trials import Outcome, Trial
from lightning_recipes.sweep import learning_rate_sweep, warmup_sweep

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1}


def quadratic(seed: int) -> Any:
    """Stable up to a learning rate of 2 / 10."""
    weight = torch.nn.Parameter(torch.rand(2) + 1)
    curvature = torch.tensor([1.0, 10.0])
    return torch.optim.SGD([weight], lr=0.01), lambda: (curvature * weight**2).sum() / 2


def test_the_best_rate_and_the_edge_of_a_problem_that_is_known() -> None:
    result = learning_rate_sweep(quadratic, [0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.19, 0.3, 1.0], steps=60)
    assert result.best is not None
    assert result.summary["lowest_loss_at"] in (0.1, 0.19)
    assert result.summary["edge"] == 0.3
    assert result.best.learning_rate == 0.06  # nearest to a quarter of the edge
    assert "Train at 0.06" in result.finding.advice
    assert "a long run is best at a lower rate" in result.finding.advice
    assert "from 0.3 on the training is unstable" in result.finding.message
    unstable = [trial for trial, outcome in result.outcomes.items() if not outcome.stable]
    assert [trial.learning_rate for trial in unstable] == [0.3, 1.0]
    assert all(math.isnan(result.outcomes[trial].loss) and result.outcomes[trial].steps < 20 for trial in unstable)
    at_edge = learning_rate_sweep(quadratic, [0.001, 0.01, 0.1, 0.3])
    assert at_edge.summary["at_edge"] == 1
    assert at_edge.finding.rule == "best at the edge of stability"
    assert learning_rate_sweep(quadratic, [0.001, 0.01]).finding.rule == "best at the end of the grid"
    assert learning_rate_sweep(quadratic, [0.5, 1.0]).best is None


@pytest.mark.parametrize(
    ("max_steps", "edge", "best"),
    [(None, 10.0, 0.05), (1000, 10.0, 0.05), (200, 10.0, 0.1), (None, 0.2, 0.05), (None, 0.12, 0.02), (200, 0.12, 0.1)],
)
def test_a_long_run_is_best_at_a_lower_rate(max_steps: int | None, edge: float, best: float) -> None:
    rates = [0.01, 0.02, 0.05, 0.1, edge]
    search = LearningRateSearch(rates, steps=100, max_steps=max_steps)
    outcomes = {
        trial: Outcome(rate < edge, 1 / rate, 100, losses=(9.0, 1.0))
        for rate, trial in zip(rates, search.ask({}), strict=True)
    }
    found = search.result(outcomes)
    assert found.summary["lowest_loss_at"] == 0.1
    assert found.best == Trial(best, 100)


def test_every_trial_has_one_start_and_one_order(tmp_path: Path) -> None:
    starts: list[list[float]] = []

    def make(seed: int) -> Any:
        weight = torch.nn.Parameter(torch.randn(3))
        drawn: list[float] = weight.tolist()
        starts.append(drawn)

        def loss() -> Any:
            noise = torch.randn(())
            drawn.append(float(noise))
            return (weight**2).sum() + noise.abs()

        return torch.optim.SGD([weight], lr=0.1), loss

    torch.manual_seed(9)
    before = torch.get_rng_state()
    learning_rate_sweep(make, [0.001, 0.01, 0.1], steps=20, seeds=2)
    assert torch.equal(torch.get_rng_state(), before)
    starts = [drawn for drawn in starts if len(drawn) > 3]  # not the looks at the learning rate
    assert len(starts) == 6
    assert starts[0] == starts[1] == starts[2] != starts[3] == starts[4] == starts[5]


def test_groups_keep_their_ratio() -> None:
    seen: list[tuple[float, float]] = []

    def make(seed: int) -> Any:
        one, other = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.02}])
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(tuple(group["lr"] for group in optimizer.param_groups))  # type: ignore[arg-type]
        )
        return optimizer, lambda: one**2 + other**2

    learning_rate_sweep(make, [0.05, 0.2], steps=20)
    assert {*seen} == {(0.05, 0.01), (0.2, 0.04)}


def test_a_module_is_left_alone_and_gives_what_a_plain_loop_gives() -> None:
    module, rates = Regression(), [0.001, 0.01, 0.1]
    before, noise = weights_of(module), torch.get_rng_state()
    result = learning_rate_sweep(module, rates, 40, train_dataloaders=regression_data(), **QUIET)
    assert same(weights_of(module), before)
    assert torch.equal(torch.get_rng_state(), noise)
    assert module._trainer is None

    def make(seed: int) -> Any:
        plain, batches = Regression(), [*regression_data()] * 4
        left = iter(batches)
        return plain.configure_optimizers(), lambda: plain.loss(next(left))

    alone = learning_rate_sweep(make, rates, 40)
    assert [row["loss"] for row in result.table()] == pytest.approx([row["loss"] for row in alone.table()])
    assert result.summary["initial_loss"] == pytest.approx(alone.summary["initial_loss"])


def test_sensitivity_is_wortsmans() -> None:
    losses = {1e-3: 0.5, 1e-2: 0.25, 1e-1: 4.0, 1.0: math.nan}
    assert learning_rate_sensitivity(losses, 2.0) == pytest.approx((0.5 + 0.25 + 2.0 + 2.0) / 4 - 0.25)


def test_a_sweep_that_was_cut_goes_on_from_its_file(tmp_path: Path) -> None:
    path, made = tmp_path / "sweep.json", []

    def make(seed: int) -> Any:
        made.append(seed)
        return quadratic(seed)

    whole = learning_rate_sweep(make, [0.001, 0.01, 0.1], path=path)
    saved = json.loads(path.read_text())["trials"]
    path.write_text(json.dumps({"trials": saved[:-1]}))
    made.clear()
    again = learning_rate_sweep(make, [0.001, 0.01, 0.1], path=path)
    assert again.best == whole.best
    assert len(made) == 3  # two looks and one trial


def test_a_factory_of_modules_has_another_start_for_each_seed() -> None:
    result = warmup_sweep(
        lambda seed: Fragile(1e-4, seed), 1000, 3e-3, seeds=2, train_dataloaders=regression_data(40, 16), **QUIET
    )
    firsts = {trial.seed: outcome.losses[0] for trial, outcome in result.outcomes.items() if outcome.losses}
    assert firsts[0] != firsts[1]
    assert result.best is not None
    assert result.best.warmup_steps in (30, 100)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(TypeError, match="make must be a LightningModule or a function of a seed, got 3"):
        learning_rate_sweep(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"make\(seed\) must return"):
        learning_rate_sweep(lambda seed: seed)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="are for a LightningModule"):
        learning_rate_sweep(quadratic, accelerator="cpu")
    with pytest.raises(ValueError, match="learning_rates must rise"):
        learning_rate_sweep(quadratic, [0.1, 0.01])
    with pytest.raises(ValueError, match="steps must be a whole number of at least 20"):
        learning_rate_sweep(quadratic, steps=5)


def test_a_search_asks_for_what_is_missing() -> None:
    search = LearningRateSearch((0.1, 1.0), 20, 2)
    asked = search.ask({Trial(0.1, 20): Outcome(True, 1.0, 20)})
    assert asked == [Trial(1.0, 20), Trial(0.1, 20, 0, 1), Trial(1.0, 20, 0, 1)]
