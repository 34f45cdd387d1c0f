import importlib.util
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from models import (
    Adversaries,
    Derived,
    GivenGradients,
    Regression,
    fp16,
    given,
    quiet_trainer,
    regression_data,
    same,
    weights_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_recipes import PercentileGradientClipping
from lightning_recipes.callbacks import measuring
from lightning_recipes.core.clipping import PercentileThreshold


def fused_sgd(parameters: Any, learning_rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, fused=True)


def steps_of(
    gradients: list[float],
    callback: PercentileGradientClipping,
    folder: Path,
    make_optimizer: Callable[[Any, float], torch.optim.Optimizer] = torch.optim.SGD,
    weight: float = 0.0,
    **trainer: Any,
) -> list[float]:
    """What each batch moved the one weight by, at learning rate 1: the clipped gradient, negative."""
    module = GivenGradients(weight=weight, make_optimizer=make_optimizer)
    quiet_trainer(folder, max_epochs=1, callbacks=[callback], **trainer).fit(module, given(gradients))
    return [before - after for before, after in zip([weight, *module.weights], module.weights)]


def findings_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("findings.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def expected_steps(gradients: list[float], rule: PercentileThreshold) -> list[float]:
    return [math.copysign(min(abs(g), rule.update(abs(g))), g) for g in gradients]


WAVE = [1 + 0.3 * math.sin(step) for step in range(60)]


def test_each_update_is_clipped_at_the_threshold_of_those_before_it(tmp_path: Path) -> None:
    gradients = [*WAVE, -50.0, 0.5, 1e5, *WAVE]
    steps = steps_of(gradients, PercentileGradientClipping(warmup_steps=5), tmp_path, weight=100.0)
    rule = PercentileThreshold(warmup_steps=5)
    assert steps == pytest.approx(expected_steps(gradients, rule), abs=1e-4)
    assert steps[60] > -2 < 2 > steps[62]


def test_the_first_gradient_does_no_harm_if_huge_and_passes_if_normal(tmp_path: Path) -> None:
    assert steps_of([1e6], PercentileGradientClipping(), tmp_path, weight=4.0)[0] == pytest.approx(4.0)
    assert steps_of([0.9], PercentileGradientClipping(), tmp_path, weight=4.0)[0] == pytest.approx(0.9)


@pytest.mark.parametrize("free_to_read", [True, False])
def test_reading_and_not_reading_the_norm_give_the_same_weights(
    free_to_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: free_to_read)
    gradients = [*WAVE, 1e4, math.nan, 0.0, *WAVE]
    module = GivenGradients(weight=4.0)
    callback = PercentileGradientClipping()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback], log_every_n_steps=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, given(gradients))
    rule = PercentileThreshold()
    weight = 4.0
    for gradient, measured in zip(gradients[:61], module.weights):
        weight -= min(gradient, rule.update(gradient, 4.0))
        assert measured == pytest.approx(weight, abs=1e-4)
    assert list(callback.rule[0].norms.arrived) == pytest.approx([*WAVE, 1e4, *WAVE])


def test_accumulated_gradients_count_once_an_update(tmp_path: Path) -> None:
    callback = PercentileGradientClipping(warmup_steps=0)
    gradients = [3.0, 3.0, 3.0] * 5 + [30.0, 30.0, 30.0] + [6.0]  # the last window is short
    steps = steps_of(gradients, callback, tmp_path, accumulate_grad_batches=3)
    rule = callback.rule[0]
    assert list(rule.norms.arrived) == pytest.approx([3.0] * 5 + [30.0, 2.0])
    assert [step for step in steps if step] == pytest.approx([3.0] * 6 + [2.0])


def test_manual_optimization_with_two_optimizers_counts_each_ones_updates(tmp_path: Path) -> None:
    callback = PercentileGradientClipping()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback], log_every_n_steps=1)
    trainer.fit(Adversaries(), regression_data(batches=7))
    assert (callback.rule[0].count, callback.rule[1].count) == (14, 7)
    assert {"grad_norm/0", "grad_norm/1", "grad_norm_threshold/0"} <= trainer.callback_metrics.keys()


def test_an_optimizer_stepped_past_lightning_is_told(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping()])
    with pytest.warns(UserWarning, match="Optimizer . was stepped past Lightning"):
        trainer.fit(Adversaries(raw_optimizers=True), regression_data(batches=3))
    assert [finding["rule"] for finding in findings_of(tmp_path)] == ["optimizer not observed"] * 2


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, fused_sgd])
@pytest.mark.parametrize("free_to_read", [True, False])
def test_fp16_is_clipped_unscaled_and_skipped_steps_leave_no_trace(
    make_optimizer: Callable[..., Any], free_to_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: free_to_read)
    callback = PercentileGradientClipping(warmup_steps=2)
    gradients = [1.0, math.inf, 1.0, 1.0, 1.0, 8.0, math.nan, 1.0]
    steps = steps_of(gradients, callback, tmp_path, make_optimizer, weight=64.0, plugins=[fp16()])
    assert steps == pytest.approx([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    rule = callback.rule[0]
    rule.flush()
    assert list(rule.norms.arrived) == pytest.approx([1.0, 1.0, 1.0, 1.0, 8.0, 1.0])
    assert rule.nonfinite == 0
    assert not findings_of(tmp_path)


def test_half_precision_weights(tmp_path: Path) -> None:
    callback = PercentileGradientClipping(warmup_steps=0)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback], precision="bf16-true")
    trainer.fit(Regression(), regression_data())
    assert callback.rule[0].count == 12


def test_a_gradient_that_is_not_finite_is_counted_told_and_left_alone(tmp_path: Path) -> None:
    callback = PercentileGradientClipping()
    with pytest.warns(UserWarning, match="NaN or infinite in 1 of 4 updates, which clipping cannot mend") as told:
        steps = steps_of([1.0, 1.0, math.nan, 1.0, 1.0, 1.0], callback, tmp_path, weight=4.0, log_every_n_steps=2)
    assert len([warning for warning in told if "NaN or infinite" in str(warning.message)]) == 1
    assert math.isnan(steps[2])
    assert list(callback.rule[0].norms.arrived) == [1.0] * 5
    assert "skip_nonfinite=True" in findings_of(tmp_path)[0]["advice"]


@pytest.mark.parametrize("free_to_read", [True, False])
def test_skip_nonfinite_cancels_the_update(free_to_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: free_to_read)
    callback = PercentileGradientClipping(skip_nonfinite=True)
    with pytest.warns(UserWarning, match="which were cancelled"):
        steps = steps_of(
            [1.0, math.nan, 1.0, math.inf, 1.0],
            callback,
            tmp_path,
            lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.5),
            weight=4.0,
        )
    assert steps == pytest.approx([1.0, 0.0, 1.5, 0.0, 1.75])  # not even the momentum moves the weight
    assert findings_of(tmp_path)[0]["evidence"]["decision"] == "cancelled"


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_are_not_finite_any_more_are_told_once_and_counted_in_the_end(tmp_path: Path) -> None:
    steps_of([1.0] * 5 + [math.nan] * 55, PercentileGradientClipping(), tmp_path, log_every_n_steps=1)
    assert [finding["evidence"]["nonfinite"] for finding in findings_of(tmp_path)] == [1, 55]


@pytest.mark.parametrize("value", [0.5, 1])
def test_gradient_clip_val_is_refused_beside_it(value: float, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping()], gradient_clip_val=value)
    with pytest.raises(MisconfigurationException, match="unset gradient_clip_val"):
        trainer.fit(Regression(), regression_data())


def test_an_overridden_configure_gradient_clipping_is_refused_beside_it(tmp_path: Path) -> None:
    class Clips(Regression):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=1.0)

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping()])
    with pytest.raises(MisconfigurationException, match="replaces Clips.configure_gradient_clipping.*remove that"):
        trainer.fit(Clips(), regression_data())


def test_one_that_is_called_by_hand_is_not(tmp_path: Path) -> None:
    class Clips(Adversaries):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=1.0)

    callback = PercentileGradientClipping()
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(Clips(), regression_data())
    assert callback.rule[0].count > 0


def test_a_step_that_calls_the_one_it_overrides_is_one(tmp_path: Path) -> None:
    callback = PercentileGradientClipping()
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(
        Regression(make_optimizer=Derived), regression_data(12)
    )
    assert callback.rule[0].count == 12
    assert findings_of(tmp_path) == []


def test_lbfgs_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping()])
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        trainer.fit(Regression(make_optimizer=torch.optim.LBFGS), regression_data())


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer._accelerator_connector.strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    with pytest.raises(MisconfigurationException, match="DeepSpeed.*'gradient_clipping' in the DeepSpeed config"):
        PercentileGradientClipping().on_fit_start(trainer, Regression())


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    module = Regression()
    module.requires_grad_(False)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping()])
    with pytest.raises(MisconfigurationException, match="nothing to clip"):
        trainer.fit(module, regression_data())


def test_measure_only_clips_nothing_and_recommends_a_value(tmp_path: Path) -> None:
    without, measured = Regression(), Regression()
    quiet_trainer(tmp_path, max_epochs=10, gradient_clip_val=0.7).fit(without, regression_data())
    callback = PercentileGradientClipping(measure_only=True)
    trainer = quiet_trainer(tmp_path, max_epochs=10, gradient_clip_val=0.7, callbacks=[callback])
    trainer.fit(measured, regression_data())
    assert same(weights_of(without), weights_of(measured))
    (finding,) = findings_of(tmp_path)
    assert finding["rule"] == "recommended gradient_clip_val"
    value, norms = finding["evidence"]["gradient_clip_val"], callback.rule[0].norms.arrived
    assert sum(norm <= value for norm in norms) / len(norms) == pytest.approx(0.9, abs=0.03)
    assert f"gradient_clip_val={value:g}" in finding["advice"]


def test_measure_only_recommends_nothing_from_too_little(tmp_path: Path) -> None:
    steps_of([1.0] * 5, PercentileGradientClipping(measure_only=True), tmp_path)
    assert [finding["rule"] for finding in findings_of(tmp_path)] == ["no gradient_clip_val"]


def test_clipping_more_than_half_is_told_with_the_learning_rate_to_take(tmp_path: Path) -> None:
    rising = [1.03**step for step in range(150)]
    with pytest.warns(UserWarning, match="extremely aggressive clipping") as told:
        steps_of(rising, PercentileGradientClipping(), tmp_path, weight=4.0, log_every_n_steps=10)
    assert len([warning for warning in told if "aggressive" in str(warning.message)]) == 1
    (finding,) = findings_of(tmp_path)
    assert finding["evidence"]["clipped_fraction"] > 0.5
    factor = finding["evidence"]["typical_factor"]
    assert 0 < factor < 0.95
    assert f"Cut the learning rate instead, to about {factor:.0%} of what it is." == finding["advice"]


def test_norms_that_creep_up_need_no_smaller_learning_rate_yet(tmp_path: Path) -> None:
    creeping = [1.001**step for step in range(150)]
    with pytest.warns(UserWarning, match="extremely aggressive clipping"):
        steps_of(creeping, PercentileGradientClipping(), tmp_path, weight=4.0, log_every_n_steps=10)
    (finding,) = findings_of(tmp_path)
    assert re.search(r"were cut to 99\.\d% of their length at the median", finding["message"])
    assert "hardly shortens" in finding["advice"]


def test_a_steady_run_has_nothing_to_tell(tmp_path: Path) -> None:
    steps_of(WAVE * 3, PercentileGradientClipping(), tmp_path, weight=4.0, log_every_n_steps=5)
    assert not findings_of(tmp_path)


def test_scalars_are_logged_unclipped_at_lightnings_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    steps_of(
        [*[1.0] * 19, 50.0, 1.0], PercentileGradientClipping(), tmp_path, weight=4.0, logger=logger, log_every_n_steps=5
    )
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert set(rows[0].split(",")) == {"step", "grad_norm", "grad_norm_threshold", "clipped_fraction"}
    logged = [dict(zip(rows[0].split(","), map(float, row.split(",")), strict=True)) for row in rows[1:]]
    assert [row["step"] for row in logged] == [4, 9, 14, 19]
    assert logged[-1]["grad_norm"] == 50.0
    assert logged[-1]["grad_norm_threshold"] == 2.0
    assert logged[-1]["clipped_fraction"] == pytest.approx(1 / 20)


def test_tensorboard_gets_a_figure_and_a_histogram_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    steps_of(WAVE * 40, PercentileGradientClipping(), tmp_path, weight=4.0, logger=logger)
    events = EventAccumulator(logger.log_dir, {"images": 0, "histograms": 0, "scalars": 0}).Reload()
    assert [image.step for image in events.Images("grad_norm")] == [999, 1999, 2400]
    assert [histogram.step for histogram in events.Histograms("grad_norm")] == [999, 1999, 2400]
    last = events.Histograms("grad_norm")[-1].histogram_value
    assert last.num == 2400
    assert last.sum == pytest.approx(sum(WAVE * 40), rel=0.01)
    assert len(events.Scalars("grad_norm")) == 48


def test_other_loggers_get_a_picture_beside_the_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    steps_of(WAVE, PercentileGradientClipping(), tmp_path, weight=4.0, logger=logger)
    assert (Path(logger.log_dir) / "grad_norm.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    steps_of(WAVE, PercentileGradientClipping(), tmp_path, weight=4.0, logger=CSVLogger(tmp_path))
    (finding,) = findings_of(tmp_path)
    assert "lightning-recipes[plots]" in finding["advice"]


def test_a_remote_folder_gets_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="gradient not finite"):
        steps_of([1.0, math.nan] * 5, PercentileGradientClipping(), "memory://runs", logger=False)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"logger": False}])
def test_runs_that_leave_nothing_behind(settings: dict[str, Any], tmp_path: Path) -> None:
    steps_of([1.0] * 3, PercentileGradientClipping(), tmp_path, **settings)
    assert not list(tmp_path.rglob("*"))


def test_training_steps_without_a_loss_are_passed_over(tmp_path: Path) -> None:
    class Sometimes(GivenGradients):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = PercentileGradientClipping()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        trainer.fit(Sometimes(), given([1.0] * 6))
    assert callback.rule[0].count == 3


def test_a_second_fit_goes_on_with_the_norms_of_the_first(tmp_path: Path) -> None:
    callback, module = PercentileGradientClipping(), Regression()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    trainer.fit(module, regression_data())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, regression_data())
    assert callback.rule[0].count == 24


class Broken(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("broken")


def test_an_exception_leaves_no_hook_behind(tmp_path: Path) -> None:
    module = Regression()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module.make_optimizer = lambda parameters: optimizer
    with pytest.raises(RuntimeError, match="broken"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping(), Broken()]).fit(
            module, regression_data()
        )
    assert not optimizer._optimizer_step_post_hooks
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[PercentileGradientClipping()]).fit(module, regression_data())
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:gradient not finite")
def test_an_optimizer_that_is_used_again_has_norms_and_findings_of_its_own(tmp_path: Path) -> None:
    class Reuses(GivenGradients):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.optimizer = getattr(self, "optimizer", None) or super().configure_optimizers()
            return self.optimizer

    module = Reuses(0.0)
    for first in (3.0, 5.0):
        folder, clipping = tmp_path / str(first), PercentileGradientClipping()
        trainer = quiet_trainer(folder, max_epochs=1, callbacks=[clipping])
        trainer.fit(module, given([first, math.nan, 2.0]))
        assert clipping.rule[0].norms.arrived[0] == first
        assert "gradient not finite" in (folder / "findings.jsonl").read_text()
