import json
import logging
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from models import Fragile, Regression, regression_data, same, weights_of

from lightning_recipes import PercentileGradientClipping
from lightning_recipes.core.learning_rate import LearningRateSearch
from lightning_recipes.core.trials import SweepResult, Trial
from lightning_recipes.sweep import (
    compare_capacity,
    early_instability_probe,
    learning_rate_sweep,
    train_ensemble,
    warmup_sweep,
)

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1}


def quadratic(seed: int) -> Any:
    """Stable up to a learning rate of 2 / 10."""
    weight = torch.nn.Parameter(torch.rand(2) + 1)
    curvature = torch.tensor([1.0, 10.0])
    return torch.optim.SGD([weight], lr=0.01), lambda: (curvature * weight**2).sum() / 2


def test_a_sweep_is_worth_more_than_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "sweep.json"
    with pytest.warns(UserWarning, match="sweep.json could not be written .File exists.: the sweep goes on") as told:
        result = learning_rate_sweep(quadratic, [0.01, 0.1], steps=60, path=path)
    assert len(told) == 1
    assert result.best == learning_rate_sweep(quadratic, [0.01, 0.1], steps=60).best


def test_the_best_rate_and_the_edge_of_a_problem_that_is_known() -> None:
    rates = [0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.19, 0.3, 1.0]
    result = learning_rate_sweep(quadratic, rates, steps=60)
    assert result.best is not None
    assert result.summary["lowest_early_at"] in (0.1, 0.19)
    assert result.summary["edge"] == 0.3
    assert result.best == Trial(0.1, 500, validates=True)  # not beside the cliff
    assert "Train at 0.1" in result.finding.advice
    assert "from 0.3 on the training is unstable" in result.finding.message
    unstable = [trial for trial, outcome in result.outcomes.items() if not outcome.stable]
    assert {trial.learning_rate for trial in unstable} <= {0.3, 1.0}
    assert all(math.isnan(result.outcomes[trial].loss) and result.outcomes[trial].steps < 20 for trial in unstable)
    assert result.steps <= LearningRateSearch(rates, 60).most_steps == 9 * 60 + 8 * 500
    at_edge = learning_rate_sweep(quadratic, [0.001, 0.01, 0.1, 0.3], max_steps=100)
    assert at_edge.summary["at_edge"] == 1
    assert at_edge.finding.rule == "best at the edge of stability"
    assert learning_rate_sweep(quadratic, [0.001, 0.01]).finding.rule == "best at the end of the grid"
    assert learning_rate_sweep(quadratic, [0.5, 1.0]).best is None


def test_a_run_that_is_no_longer_has_one_kind_of_trial() -> None:
    result = learning_rate_sweep(quadratic, [0.01, 0.05, 0.1, 0.15], max_steps=50)
    assert result.best is not None
    assert len(result.outcomes) == 4


def test_the_validation_loss_decides() -> None:
    """By heart is not by understanding: the higher the rate, the lower this training loss and the higher the other."""

    def make(seed: int) -> Any:
        weight = torch.nn.Parameter(torch.ones(1))
        return torch.optim.SGD([weight], lr=0.01), lambda: (weight**2).sum(), lambda: (weight - 0.5).abs()

    rates = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005]
    result = learning_rate_sweep(make, rates, 50, max_steps=300)
    assert result.best is not None
    assert result.best.learning_rate == 0.001  # (1 - 0.002)^300 = 0.55
    assert "The validation loss after 300 steps is lowest" in result.finding.message
    assert all((outcome.val_loss is not None) == trial.validates for trial, outcome in result.outcomes.items())
    assert "| val_loss |" in result.to_markdown()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Validated(Regression):
    """Notes when it is validated."""

    checks: ClassVar[list[int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.checks.append(self.trainer.global_step)


def test_a_module_is_validated_once_when_a_long_trial_is_over() -> None:
    Validated.checks.clear()
    module, data = Validated(make_optimizer=sgd), regression_data(7)
    settings: dict[str, Any] = {"train_dataloaders": data, "val_dataloaders": regression_data(2), **QUIET}
    result = learning_rate_sweep(module, [0.01, 0.1, 1e5], 20, max_steps=30, monitor="val_loss", **settings)
    assert Validated.checks == [30] * 4
    assert result.best is not None
    trained = Regression(make_optimizer=sgd)
    trainer = pl.Trainer(max_steps=30, logger=False, enable_checkpointing=False, enable_progress_bar=False, **QUIET)
    trainer.fit(trained, data)
    with torch.no_grad():
        expected = torch.stack([trained.loss(batch) for batch in regression_data(2)]).mean()
    assert result.outcomes[Trial(0.1, 30, validates=True)].val_loss == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(MisconfigurationException, match="logs no 'val_acc', but val_loss"):
        learning_rate_sweep(module, [0.01, 0.1], 20, max_steps=30, monitor="val_acc", **settings)


def test_a_plateau_scheduler_without_its_metric_stands_still() -> None:
    class Plateau(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    result = learning_rate_sweep(Plateau(), [0.01, 0.1], 30, max_steps=20, train_dataloaders=regression_data(), **QUIET)
    assert all(outcome.stable for outcome in result.outcomes.values())


def test_a_schedule_for_the_length_of_a_run_is_made_for_the_steps_asked_or_for_the_epochs() -> None:
    made: list[tuple[float, int | None]] = []

    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer, steps = torch.optim.SGD(self.parameters(), 0.1), self.trainer.estimated_stepping_batches
            made.append((steps, self.trainer.max_epochs))
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, int(steps))]

    data = regression_data()
    asked: Any = {"steps": 20, "max_steps": 40, "train_dataloaders": data, **QUIET}
    by_steps = learning_rate_sweep(Scheduled(), [0.001, 0.01], **asked)
    assert {steps for steps, _ in made} == {20, 40}  # the two kinds of trials
    made.clear()
    by_epochs = learning_rate_sweep(Scheduled(), [0.001, 0.01], max_epochs=1, **asked)
    assert {*made} == {(len(data), 1)}
    assert by_epochs.table() == by_steps.table()
    assert [trial.steps for trial in by_epochs.outcomes if by_epochs.outcomes[trial].steps] == [20, 20, 40, 40]


def test_what_the_gradients_go_through_is_in_the_trials() -> None:
    def tried(**settings: Any) -> bool:
        data = regression_data(40, 16)
        asked = {"steps": 60, "max_steps": 60, "train_dataloaders": data, "show_progress": False, **QUIET}
        result = learning_rate_sweep(Regression(make_optimizer=sgd), [1e-4, 3.0], **asked, **settings)
        return result.outcomes[Trial(3.0, 60, validates=True)].stable

    clipping = PercentileGradientClipping()
    assert not tried()
    assert tried(gradient_clip_val=1e-3)
    assert tried(callbacks=Tamed())
    tried(callbacks=[clipping])
    assert not list(clipping.rule)  # a copy was used


class Tamed(pl.Callback):
    """Hardly lets a gradient through."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1e-3)


def test_what_raises_once_it_is_broken_is_unstable_and_what_raises_else_is_seen() -> None:
    def make(seed: int, fine: bool = False) -> Any:
        weight = torch.nn.Parameter(torch.ones(1))

        def loss() -> Any:
            if fine or not weight.isfinite().all():
                raise ValueError("expected a real number")
            return (weight**4).sum()

        return torch.optim.SGD([weight], lr=0.1), loss

    result = learning_rate_sweep(make, [0.01, 10.0], 20, max_steps=20)
    assert not result.outcomes[Trial(10.0, 20, validates=True)].stable
    with pytest.raises(ValueError, match="a real number"):
        learning_rate_sweep(lambda seed: make(seed, fine=True), [0.01, 10.0])

    class Strict(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not all(parameter.isfinite().all() for parameter in self.parameters()):
                raise ValueError("expected a real number")
            return loss

    asked: Any = {"steps": 40, "max_steps": 40, "train_dataloaders": regression_data(), **QUIET}
    broken = learning_rate_sweep(Strict(), [0.01, 1e30], **asked)
    assert not broken.outcomes[Trial(1e30, 40, validates=True)].stable


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
    learning_rate_sweep(make, [0.001, 0.01, 0.1], seeds=2, max_steps=20)
    assert torch.equal(torch.get_rng_state(), before)
    starts = [drawn for drawn in starts if len(drawn) > 3]  # not the looks at the learning rate
    assert len(starts) == 6
    assert starts[0] == starts[1] == starts[2] != starts[3] == starts[4] == starts[5]


def test_a_module_may_write_into_the_folder_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(Regression):
        folders: ClassVar[list[Path]] = []

        def on_train_start(self) -> None:
            logger: Any = self.logger
            checkpoints: Any = self.trainer.checkpoint_callback
            names = [self.trainer.log_dir, logger.log_dir, logger.save_dir, logger.root_dir, checkpoints.dirpath]
            for name in names:
                Path(name, "figure.txt").write_text("1")
                self.folders.append(Path(name))

    monkeypatch.chdir(tmp_path)
    learning_rate_sweep(Writes(), [0.01, 0.1], 20, 1, 20, train_dataloaders=regression_data(4), **QUIET)
    assert len(Writes.folders) == 2 * 5
    assert not any(folder.exists() for folder in Writes.folders)
    assert not list(tmp_path.iterdir())


def test_groups_keep_their_ratio() -> None:
    seen: list[tuple[float, float]] = []

    def make(seed: int) -> Any:
        one, other = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.02}])
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(tuple(group["lr"] for group in optimizer.param_groups))  # type: ignore[arg-type]
        )
        return optimizer, lambda: one**2 + other**2

    learning_rate_sweep(make, [0.05, 0.2], max_steps=20)
    assert {*seen} == {(0.05, 0.01), (0.2, 0.04)}


def test_a_module_is_left_alone_and_gives_what_a_plain_loop_gives(caplog: pytest.LogCaptureFixture) -> None:
    module, rates = Regression(), [0.001, 0.01, 0.1]
    before, noise = weights_of(module), torch.get_rng_state()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for logger in loggers:
        caplog.set_level(logging.INFO, logger.name)
    result = learning_rate_sweep(module, rates, max_steps=40, train_dataloaders=regression_data(), **QUIET)
    assert same(weights_of(module), before)
    assert torch.equal(torch.get_rng_state(), noise)
    assert module._trainer is None
    assert [logger.level for logger in loggers] == [logging.INFO] * 2

    def make(seed: int) -> Any:
        plain, batches = Regression(), [*regression_data()] * 4
        left = iter(batches)
        return plain.configure_optimizers(), lambda: plain.loss(next(left))

    alone = learning_rate_sweep(make, rates, max_steps=40)
    assert [row["loss"] for row in result.table()] == pytest.approx([row["loss"] for row in alone.table()])
    assert result.summary["initial_loss"] == pytest.approx(alone.summary["initial_loss"])


def test_the_first_group_may_have_no_rate() -> None:
    def make(seed: int, rate: float = 0.1) -> Any:
        frozen, weight = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        groups = [{"params": [frozen], "lr": 0.0}, {"params": [weight], "lr": rate}]
        return torch.optim.SGD(groups, lr=0.1), lambda: (weight**2 + 0 * frozen).sum()

    def alone(seed: int) -> Any:
        weight = torch.nn.Parameter(torch.ones(1))
        return torch.optim.SGD([weight], lr=0.1), lambda: (weight**2).sum()

    sweep: dict[str, Any] = {"learning_rates": [0.001, 0.01, 0.1], "max_steps": 100}
    assert learning_rate_sweep(make, **sweep).outcomes == learning_rate_sweep(alone, **sweep).outcomes
    with pytest.raises(ValueError, match="all learning rates of the optimizer are 0: give it one"):
        learning_rate_sweep(lambda seed: make(seed, 0.0), **sweep)

    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": others}], lr=0.1)

    module = Regression(make_optimizer=two_groups)
    found = learning_rate_sweep(module, [0.01, 0.1], 20, 1, 20, train_dataloaders=regression_data(4), **QUIET)
    assert all(outcome.stable for outcome in found.outcomes.values())
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    with pytest.raises(ValueError, match="all learning rates of the optimizer are 0"):
        learning_rate_sweep(module, [0.01, 0.1], 20, 1, 20, train_dataloaders=regression_data(4), **QUIET)


def test_a_file_that_is_none_of_a_sweep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    for text in ("", "[]", "{}", '{"trials": [{"trial": {}}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"sweep.json has no outcomes of a sweep .* or delete it to start anew"):
            learning_rate_sweep(quadratic, [0.01, 0.1], path=path)


def test_a_sweep_that_was_cut_goes_on_from_its_file(tmp_path: Path) -> None:
    path, made = tmp_path / "sweep.json", []

    def make(seed: int) -> Any:
        made.append(seed)
        return quadratic(seed)

    whole = learning_rate_sweep(make, [0.001, 0.01, 0.1], path=path, max_steps=40)
    saved = json.loads(path.read_text())["trials"]
    path.write_text(json.dumps({"trials": saved[:-1]}))
    made.clear()
    again = learning_rate_sweep(make, [0.001, 0.01, 0.1], path=path, max_steps=40)
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
    with pytest.raises(ValueError, match="val_dataloaders need a monitor.*: give monitor='val_loss'"):
        learning_rate_sweep(Fragile(), val_dataloaders=regression_data())
    for data in (regression_data(), pl.LightningDataModule()):
        with pytest.raises(TypeError, match=f"learning_rates comes here, got {type(data).__name__}: give data by name"):
            learning_rate_sweep(Fragile(), data)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"max_steps comes here, got {type(data).__name__}: give data by name"):
            warmup_sweep(Fragile(), data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning_rates must rise"):
        learning_rate_sweep(quadratic, [0.1, 0.01])
    with pytest.raises(TypeError, match=r"learning_rates must be a list of numbers, got 0\.1"):
        learning_rate_sweep(quadratic, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be a whole number of at least 20"):
        learning_rate_sweep(quadratic, steps=5)


@pytest.mark.parametrize(
    ("sweep", "wrong", "message"),
    [
        (learning_rate_sweep, "train_dataloader", "neither learning_rate_sweep nor a Trainer: did you mean train_data"),
        (learning_rate_sweep, "seed", "neither learning_rate_sweep nor a Trainer: did you mean seeds?"),
        (partial(warmup_sweep, max_steps=1000), "acelerator", "nor a Trainer: did you mean accelerator?"),
        (partial(compare_capacity, baseline=quadratic), "qxz", "qxz is an argument of neither compare_capacity"),
        (early_instability_probe, "step", "neither early_instability_probe nor a Trainer: did you mean steps?"),
        (partial(train_ensemble, folder="all"), "max_epoch", "nor a Trainer: did you mean max_epochs?"),
    ],
)
def test_an_argument_that_nobody_has_is_refused_by_name(
    sweep: Any, wrong: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        sweep(Fragile(), **{wrong: 3})
    assert "steps at most" not in caplog.text


def test_a_monitor_needs_a_validation() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return regression_data(7)

    class Validating(Data):
        def val_dataloader(self) -> Any:
            return regression_data(2)

    class Whole(Regression):
        def val_dataloader(self) -> Any:
            return regression_data(2)

    class Training(Regression):
        validation_step = pl.LightningModule.validation_step

    def sweep(module: Any, **data: Any) -> SweepResult:
        return learning_rate_sweep(module, [0.01, 0.1], 20, max_steps=30, monitor="val_loss", **QUIET, **data)

    for module in (Regression(make_optimizer=sgd), lambda _: Regression(make_optimizer=sgd)):
        for data in ({"train_dataloaders": regression_data(7)}, {"datamodule": Data()}):
            with pytest.raises(ValueError, match="monitor='val_loss' needs validation data: give val_dataloaders, or"):
                sweep(module, **data)
    with pytest.raises(ValueError, match="monitor='val_loss' needs a validation_step, which Training has not"):
        sweep(Training(), datamodule=Validating())
    validated = (
        sweep(Regression(make_optimizer=sgd), datamodule=Validating()),
        sweep(Whole(make_optimizer=sgd), train_dataloaders=regression_data(7)),
    )
    assert all("The validation loss" in each.finding.message for each in validated)
