import copy
import json
import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from models import Regression, Resumable, SeedEachStep, quiet_trainer, regression_data, same, weights_of
from torch import Tensor

from lightning_recipes import EarlyStopping, EMAWeights
from lightning_recipes.core.early_stopping import AnyOf, GeneralizationLoss, Patience, ProgressQuotient, SuccessiveRises


class Scripted(Regression):
    """Reports a given validation loss at each check, and counts the checks."""

    def __init__(self, losses: list[float], at_the_end_of: str = "validation", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses, self.checks, self.at_the_end_of, self.name = losses, 0, at_the_end_of, "val_loss"

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        if self.at_the_end_of == "validation" and not self.trainer.sanity_checking:
            self._report()

    def on_train_epoch_end(self) -> None:
        if self.at_the_end_of == "training":
            self._report()

    def _report(self) -> None:
        self.log(self.name, self.losses[min(self.checks, len(self.losses) - 1)])
        self.checks += 1


class Remember(pl.Callback):
    """What the model held while it was validated, and what it was trained to."""

    def __init__(self) -> None:
        self.validated: list[dict[str, Tensor]] = []
        self.trained: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.trained = weights_of(pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and batch_idx == 0:
            self.validated.append(weights_of(pl_module))


def fit(
    folder: Path,
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    epochs: int = 10,
    ckpt_path: Any = None,
    data: Any = None,
    **settings: Any,
) -> pl.Trainer:
    torch.manual_seed(2)
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=list(callbacks), **settings)
    trainer.fit(module, data or regression_data(4), regression_data(2), ckpt_path=ckpt_path)
    return trainer


def findings_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.rglob("findings.jsonl") for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- when it stops


@pytest.mark.parametrize("at_the_end_of", ["validation", "training"])
def test_it_stops_as_lightnings_does_where_there_is_no_noise(at_the_end_of: str, tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=2)
    trainer = fit(tmp_path, Scripted([5.0, 4.0, 4.5, 4.6, 1.0], at_the_end_of), stopping)
    assert trainer.current_epoch == 4
    assert (stopping.stopped_epoch, stopping.wait_count, float(stopping.best_score)) == (3, 2, 4.0)
    assert stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert "val_loss did not improve in the last 2 checks. Best score: 4.000" in str(stopping.stopping_reason_message)
    assert trainer.early_stopping_callbacks == [stopping]


def test_an_epoch_without_validation_is_no_check(tmp_path: Path) -> None:
    module, stopping = Scripted([5.0, 4.0, 4.5, 4.6]), EarlyStopping("val_loss", 0.0, 2, check_on_train_epoch_end=True)
    trainer = fit(tmp_path, module, stopping, epochs=12, check_val_every_n_epoch=2)
    assert trainer.current_epoch == 8
    assert stopping.rule.curve.values == pytest.approx([5.0, 4.0, 4.5, 4.6])
    assert stopping.rule.curve.steps == [8, 16, 24, 32]


def test_a_metric_of_the_training_is_fresh_every_epoch(tmp_path: Path) -> None:
    class Constant(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("constant", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = fit(tmp_path, Constant(), EarlyStopping("constant", patience=3))
    assert trainer.current_epoch == 4


def test_several_validations_an_epoch(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", criterion=Patience(0.9, "epochs"))
    trainer = fit(tmp_path, Scripted([5.0, 4.0, 4.5, 4.6, 4.7, 4.8]), stopping, val_check_interval=0.5)
    assert stopping.rule.curve.epochs == [0.5, 1.0, 1.5, 2.0]
    assert trainer.global_step == 8


def test_a_wish_to_stop_before_min_epochs_is_judged_anew(tmp_path: Path) -> None:
    recovers, stopping = Scripted([5.0, 6.0, 7.0, 4.0, 3.0, 2.0, 1.0]), EarlyStopping("val_loss", patience=2)
    trainer = fit(tmp_path, recovers, stopping, epochs=7, min_epochs=5)
    assert trainer.current_epoch == 7
    assert (stopping.stopped_epoch, stopping.stopping_reason) == (0, EarlyStoppingReason.NOT_STOPPED)
    trainer = fit(tmp_path, Scripted([5.0, 6.0, 7.0, 8.0]), stopping, epochs=7, min_epochs=5)
    assert trainer.current_epoch == 5
    assert stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED


@pytest.mark.parametrize("first", [True, False])
def test_what_others_ask_of_the_trainer_is_left_alone(first: bool, tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 3 or trainer.should_stop

    callbacks = [EarlyStopping("val_loss", 0.0, 1), Stop()]
    trainer = fit(
        tmp_path, Scripted([5.0, 6.0, 7.0, 4.0, 3.0, 2.0, 1.0]), *callbacks[:: 1 if first else -1], min_epochs=6
    )
    assert trainer.current_epoch == 6


@pytest.mark.parametrize(
    ("losses", "arguments", "reason"),
    [
        ([5.0, 1.0, 2.0, 3.0], {"stopping_threshold": 1.5}, EarlyStoppingReason.STOPPING_THRESHOLD),
        ([5.0, 4.0, math.nan, 4.5], {}, EarlyStoppingReason.NON_FINITE_METRIC),
        ([1.0, 2.0, 3.0, 4.0, 4.0], {"criterion": SuccessiveRises(1, 2)}, EarlyStoppingReason.PATIENCE_EXHAUSTED),
    ],
)
def test_a_wish_stands_until_there_is_an_improvement(
    losses: list[float], arguments: dict[str, Any], reason: EarlyStoppingReason, tmp_path: Path
) -> None:
    stopping = EarlyStopping("val_loss", 0.0, 20, **arguments)
    trainer = fit(tmp_path, Scripted(losses), stopping, min_epochs=6)
    assert trainer.current_epoch == 6
    assert stopping.stopping_reason is reason
    assert 0 < stopping.stopped_epoch < 4


@pytest.mark.parametrize("settings", [{"min_steps": 11}, {"min_steps": 12}, {"min_epochs": 3}, {"min_steps": 13}])
def test_a_wish_is_followed_when_lightnings_would_be(settings: dict[str, int], tmp_path: Path) -> None:
    def steps_with(stopping: pl.Callback) -> int:
        module = Scripted([5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0, 9.0])
        return fit(tmp_path, module, stopping, val_check_interval=3, **settings).global_step

    assert steps_with(EarlyStopping("val_loss", 0.0, 2)) == steps_with(LightningEarlyStopping("val_loss", 0.0, 2)) > 10


def test_a_wish_that_is_followed_is_not_taken_back_by_the_last_validation(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", 0.0, 2)
    trainer = fit(tmp_path, Scripted([5.0, 6.0, 7.0, 1.0]), stopping, val_check_interval=3, min_steps=13)
    assert (trainer.global_step, stopping.rule.curve.values[-1]) == (13, 1.0)
    assert (stopping.stopped_epoch, stopping.stopping_reason) == (2, EarlyStoppingReason.PATIENCE_EXHAUSTED)


@pytest.mark.parametrize("first", [True, False])
def test_one_that_takes_its_wish_back_leaves_that_of_another_alone(first: bool, tmp_path: Path) -> None:
    fickle = EarlyStopping("val_loss", patience=1, restore_best_weights=False)
    firm = EarlyStopping("val_loss", divergence_threshold=5.5, patience=1, mode="min", min_delta=10.0)
    callbacks = [fickle, firm] if first else [firm, fickle]
    firm.monitor = "other"

    class Two(Scripted):
        def _report(self) -> None:
            self.log("other", 1.0)
            super()._report()

    trainer = fit(tmp_path, Two([5.0, 4.0, 6.0, 3.0, 2.0, 1.0]), *callbacks, min_epochs=4)
    assert trainer.current_epoch == 4
    assert fickle.stopped_epoch == 0


def test_no_check_before_start_epoch_counts(tmp_path: Path) -> None:
    losses = [5.0, math.nan, 7.0, 8.0, 4.5, 4.6, 4.7, 4.8]
    stopping = EarlyStopping("val_loss", 0.0, 2, start_epoch=4)
    trainer = fit(tmp_path, Scripted(losses), stopping)
    assert trainer.current_epoch == 7


@pytest.mark.parametrize("check_finite", [True, False])
def test_nan_stops_or_counts_and_never_improves(check_finite: bool, tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=3, check_finite=check_finite)
    trainer = fit(tmp_path, Scripted([5.0, 4.0, math.nan, 4.1, 4.2]), stopping)
    assert trainer.current_epoch == (3 if check_finite else 5)
    assert float(stopping.best_score) == 4.0
    reason = EarlyStoppingReason.NON_FINITE_METRIC if check_finite else EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert stopping.stopping_reason is reason


def test_noise_is_the_least_improvement_by_default(tmp_path: Path) -> None:
    wobbling = [1.0, 0.9, 0.97, 0.88, 0.99, 0.87, 0.95, 0.9, 0.98, 0.86]
    stopping = EarlyStopping("val_loss", patience=2)
    trainer = fit(tmp_path, Scripted(wobbling), stopping)
    assert trainer.current_epoch == 10
    assert -0.15 < stopping.min_delta < -0.03
    plain = EarlyStopping("val_loss", 0.0, 2)
    assert fit(tmp_path, Scripted([*wobbling[:2], 0.97, 0.98]), plain).current_epoch == 4


@pytest.mark.filterwarnings("ignore:overfitting")
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_score_is_that_of_the_weights_that_are_kept(mode: Literal["min", "max"], tmp_path: Path) -> None:
    falling = [2.05, 1.15, 0.7, 0.44, 0.24, 0.15, 0.09, 0.05, 0.06, 0.09, 0.11, 0.13, 0.15, 0.17]
    scores = falling if mode == "min" else [-loss for loss in falling]
    module, stopping, remember = Scripted(scores), EarlyStopping("scripted", mode=mode), Remember()
    module.name = "scripted"
    fit(tmp_path, module, stopping, remember, epochs=14)
    assert stopping.best_score == torch.tensor(scores[7]) == stopping.state_dict()["best_score"]
    assert f"Best score: {scores[7]:.3f}" in str(stopping.stopping_reason_message)
    assert f"in the last {stopping.wait_count} checks" in str(stopping.stopping_reason_message)
    assert same(weights_of(module), remember.validated[7])


def test_a_criterion_of_several_decides_in_the_place_of_patience(tmp_path: Path) -> None:
    criterion = AnyOf([Patience(5), GeneralizationLoss(30)])
    stopping = EarlyStopping("val_loss", criterion=criterion)
    trainer = fit(tmp_path, Scripted([5.0, 4.0, 4.5, 6.0]), stopping)
    assert trainer.current_epoch == 4
    assert "val_loss is 50 % worse than its best" in str(stopping.stopping_reason_message)


class LogsEachEpoch(Scripted):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss


def test_the_training_loss_is_that_of_the_steps_or_of_the_metric_that_is_named(tmp_path: Path) -> None:
    module, stopping = Regression(), EarlyStopping("val_loss", criterion=ProgressQuotient(1000.0, 2))
    losses: list[float] = []

    class Collect(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
            losses.append(2 * loss.item())

    fit(tmp_path, module, Collect(), stopping, epochs=2, accumulate_grad_batches=2)
    expected = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert stopping.rule.curve.train == pytest.approx(expected)
    named = EarlyStopping("val_loss", train_monitor="val_loss")
    fit(tmp_path, Scripted([3.0, 2.0]), named, epochs=2)
    assert named.rule.curve.train == pytest.approx([3.0, 2.0])
    with pytest.raises(RuntimeError, match="train_monitor='loss' is no metric that is logged; there are: val_loss"):
        fit(tmp_path, Scripted([3.0, 2.0]), EarlyStopping("val_loss", train_monitor="loss"))
    with pytest.raises(RuntimeError, match="train_monitor='loss' is no metric"):
        fit(tmp_path, Scripted([3.0]), EarlyStopping("val_loss", train_monitor="loss"), val_check_interval=2)
    late = EarlyStopping("val_loss", train_monitor="epoch_loss")
    fit(tmp_path, LogsEachEpoch([3.0, 2.0, 1.0]), late, epochs=2, val_check_interval=2)
    assert [math.isnan(loss) for loss in late.rule.curve.train] == [True, True, False, False]
    lenient = EarlyStopping("val_loss", train_monitor="loss", strict=False)
    fit(tmp_path, Scripted([3.0, 2.0]), lenient, epochs=1)
    assert math.isnan(lenient.rule.curve.train[0])


# ------------------------------------------------------------------------------------------------- the best weights


@pytest.mark.parametrize("averaging", [None, "before", "after"])
@pytest.mark.parametrize("epochs", [10, 4])
def test_the_model_leaves_with_the_weights_that_were_validated_best(
    averaging: str | None, epochs: int, tmp_path: Path
) -> None:
    module, stopping, remember = Scripted([5.0, 3.0, 3.5, 3.6, 3.7]), EarlyStopping("val_loss"), Remember()
    ema = EMAWeights(0.9)
    callbacks = {None: [stopping], "before": [ema, stopping], "after": [stopping, ema]}[averaging]
    fit(tmp_path, module, *callbacks, remember, epochs=epochs)
    assert same(weights_of(module), remember.validated[1])
    assert not same(weights_of(module), remember.validated[-1])
    if averaging:
        with ema.raw_weights(module):
            assert same(weights_of(module), remember.trained)
        assert same(weights_of(module), remember.validated[1])


class Opposed(Scripted):
    def _report(self) -> None:
        self.log("val_acc", self.losses[min(self.checks, len(self.losses) - 1)])
        super()._report()


@pytest.mark.parametrize("first", [True, False])
def test_of_several_metrics_the_first_decides_which_is_told_once(first: bool, tmp_path: Path) -> None:
    callbacks = [EarlyStopping("val_loss", patience=20), EarlyStopping("val_acc", patience=20, mode="max")]
    remember = Remember()
    module = Opposed([3.0, 2.0, 4.0])
    best = "val_loss" if first else "val_acc"
    with pytest.warns(UserWarning, match=f"weights that are best by {best}, the first in the list") as told:
        fit(tmp_path, module, *callbacks[:: 1 if first else -1], remember, epochs=3)
    assert sum("best weights of several metrics" in str(each.message) for each in told) == 1
    assert same(weights_of(module), remember.validated[1 if first else 2])
    callbacks[1].restore_best_weights = False
    fit(tmp_path, Opposed([3.0, 2.0, 4.0]), *callbacks, epochs=3)


class Fails(pl.Callback):
    def __init__(self, error: BaseException, hook: str) -> None:
        self.error = error
        setattr(self, hook, self._fail)

    def _fail(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 3:
            raise self.error


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path")  # OnExceptionCheckpoint makes Lightning look for one
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_validation_epoch_end"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("averaging", [None, "before", "after"])
def test_after_an_exception_too_and_the_checkpoint_of_it_has_the_trained_weights(
    averaging: str | None, error: BaseException, hook: str, tmp_path: Path
) -> None:
    module, stopping, remember = Scripted([5.0, 3.0, 3.5, 3.6]), EarlyStopping("val_loss"), Remember()
    ema, saves = EMAWeights(0.9), OnExceptionCheckpoint(tmp_path)
    callbacks = {None: [stopping], "before": [ema, stopping], "after": [stopping, ema]}[averaging]
    with pytest.raises((RuntimeError, SystemExit)):
        fit(tmp_path, module, *callbacks, remember, Fails(copy.copy(error), hook), saves)
    assert same(weights_of(module), remember.validated[1])
    checkpoint = torch.load(saves.ckpt_path, weights_only=True)
    assert same(checkpoint["raw_weights" if averaging else "state_dict"], remember.trained)


def test_nothing_is_restored_where_nothing_was_measured_or_wanted(tmp_path: Path) -> None:
    for stopping in (EarlyStopping("no_such", strict=False), EarlyStopping("val_loss", restore_best_weights=False)):
        module, remember = Scripted([1.0, 2.0, 3.0]), Remember()
        fit(tmp_path, module, stopping, remember, epochs=3)
        assert same(weights_of(module), remember.trained)


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=2)
    fit(tmp_path, Scripted([0.1, 4.0, 4.5]), stopping)
    module, remember = Scripted([5.0, 4.0, 4.5, 4.6]), Remember()
    trainer = fit(tmp_path, module, stopping, remember)
    assert trainer.current_epoch == 4
    assert same(weights_of(module), remember.validated[1])


def test_evaluation_does_not_forget_the_fit(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss")
    module = Scripted([5.0, 4.0])
    trainer = fit(tmp_path, module, stopping, epochs=2)
    trainer.validate(module, dataloaders=regression_data(2), verbose=False)
    assert stopping.rule.curve.values == [5.0, 4.0]


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.filterwarnings("ignore:mode looks wrong")
@pytest.mark.parametrize("step", [6, 11, 13, 19])
def test_a_resumed_run_ends_bit_for_bit_where_the_other_ends(step: int, tmp_path: Path) -> None:
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def run(*callbacks: pl.Callback, ckpt_path: Any = None) -> tuple[Any, EarlyStopping]:
        module, stopping = (
            Regression(dropout=0.3),
            EarlyStopping("val_loss", mode="max", patience=5),
        )  # the first is best
        data = Resumable(regression_data(4))
        fit(tmp_path, module, SeedEachStep(), stopping, *callbacks, epochs=6, ckpt_path=ckpt_path, data=data)
        return module, stopping

    whole, first = run(SaveAt())
    resumed, second = run(ckpt_path=tmp_path / "cut.ckpt")
    assert same(weights_of(whole), weights_of(resumed))
    for rule in (first.rule, second.rule):
        rule.curve.seconds = []
    assert first.rule == second.rule
    assert (first.wait_count, first.best_score) == (second.wait_count, second.best_score)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_has_its_own_patience_and_the_old_count(tmp_path: Path) -> None:
    losses = [5.0, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5, 4.6]
    saves = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, Scripted(losses), EarlyStopping("val_loss", patience=2), saves)
    module, stopping = Scripted(losses), EarlyStopping("val_loss", patience=4)
    module.checks = 4
    trainer = fit(tmp_path, module, stopping, ModelCheckpoint(tmp_path), ckpt_path=saves.last_model_path)
    assert trainer.current_epoch == 6
    assert stopping.patience == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("patience", "steps"), [(2, 13), (4, 16)])
def test_a_wish_that_waits_is_resumed_with_its_patience(patience: int, steps: int, tmp_path: Path) -> None:
    losses = [5.0, 6.0, 7.0, 7.0, 7.0]
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole = fit(tmp_path, Scripted(losses), EarlyStopping("val_loss", 0.0, 2), saves, min_steps=13)
    assert whole.global_step == 13
    module, stopping = Scripted(losses), EarlyStopping("val_loss", 0.0, patience, strict=False)
    settings = {"ckpt_path": tmp_path / "epoch=2.ckpt", "min_steps": 13, "limit_val_batches": 0}
    resumed = fit(tmp_path, module, stopping, copy.deepcopy(saves), epochs=4, **settings)
    assert resumed.global_step == steps


def test_a_checkpoint_of_lightnings_own_is_resumed(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=4)
    stopping.load_state_dict({"wait_count": 2, "stopped_epoch": 0, "best_score": torch.tensor(0.5), "patience": 3})
    assert (stopping.wait_count, stopping.patience, float(stopping.best_score)) == (2, 4, 0.5)


# ------------------------------------------------------------------------------------------------- what it tells


def test_at_the_end_it_tells_what_the_curves_say(tmp_path: Path) -> None:
    rising = [5.0, 4.0, 3.0, 3.5, *(3.6 + 0.1 * check for check in range(8))]
    with pytest.warns(UserWarning, match="overfitting at step"):
        fit(tmp_path, Scripted(rising), EarlyStopping("val_loss", 0.0, 8), epochs=12)
    (finding,) = findings_of(tmp_path)
    assert "val_loss was best at step 12 of 44 (epoch 3)" in finding["message"]
    assert finding["evidence"]["best"] == 3.0


def test_a_mode_that_the_name_speaks_against_is_told_at_the_start(tmp_path: Path) -> None:
    module = Scripted([0.1, 0.5, 0.6, 0.7, 0.75, 0.8, 0.83, 0.85, 0.86, 0.87])
    module.name = "val_acc"
    with pytest.warns(UserWarning, match="mode looks wrong at step 0: By its name val_acc is better when higher"):
        fit(tmp_path, module, EarlyStopping("val_acc", patience=20))
    (finding,) = findings_of(tmp_path)
    assert finding["advice"] == "Set mode='max'."


@pytest.mark.parametrize("restore", [True, False])
def test_weights_that_are_restored_are_not_asked_for(restore: bool, tmp_path: Path) -> None:
    rising = [5.0, 4.0, 3.0, 3.5, *(3.6 + 0.1 * check for check in range(8))]
    stopping = EarlyStopping("val_loss", 0.0, 8, restore_best_weights=restore)
    with pytest.warns(UserWarning, match="The model has the weights" if restore else "or keep the weights"):
        fit(tmp_path, Scripted(rising), stopping, epochs=12)


def test_a_short_run_is_told_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Regression(), EarlyStopping("val_loss"), epochs=3)
    assert not findings_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patience": -1}, ValueError, "patience must be a whole number of at least 0, got -1"),
        ({"patience": "3"}, TypeError, "patience must be a whole number"),
        ({"min_delta": "little"}, ValueError, "min_delta must be .* got 'little'"),
        ({"start_epoch": -1}, ValueError, "start_epoch must be a whole number of at least 0, got -1"),
        ({"restore_best_weights": "yes"}, TypeError, "restore_best_weights must be True or False, got 'yes'"),
        ({"mode": "lowest"}, ValueError, "mode must be 'min' or 'max', got 'lowest'"),
        ({"criterion": 3}, TypeError, "criterion must be one of lightning_recipes.core.early_stopping, got 3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EarlyStopping("val_loss", **arguments)
