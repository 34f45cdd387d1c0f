import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.profilers import PassThroughProfiler
from matrix import RECIPES, make
from models import Regression, quiet_trainer, regression_data

from lightning_recipes import GradientNoiseScale, LearningCurves, SnapshotEnsemble
from lightning_recipes.callbacks.noise_scale import MEASURING
from lightning_recipes.callbacks.trials import fit_quietly
from lightning_recipes.callbacks.unused import OF_EVERY_BATCH, OF_TRAINING, Unprofiled, pass_over_hooks_of

pytestmark = pytest.mark.filterwarnings("ignore")  # toys


# What has nothing to do on one device without accumulation, or once it has been called.
IN_THIS_RUN = {"GradientNoiseScale": MEASURING, "SnapshotEnsemble": ("on_train_batch_start",)}


class Counting(SnapshotEnsemble):
    """Counts the batches that it is told of."""

    calls = 0

    def on_train_batch_start(self, *args: Any) -> None:
        super().on_train_batch_start(*args)
        self.calls += 1


class Keeper(pl.Callback):
    """Calls another callback itself."""

    def __init__(self, kept: pl.Callback) -> None:
        self.kept, self.calls = kept, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.kept.setup(trainer, pl_module, stage)

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.kept.on_before_zero_grad(trainer, pl_module, optimizer)
        self.calls += 1


class Mine(LearningCurves):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def on_before_zero_grad(self, *args: Any) -> None:
        super().on_before_zero_grad(*args)
        self.calls += 1


def fit(folder: Path, callback: pl.Callback) -> pl.Trainer:
    trainer = quiet_trainer(folder, max_steps=3, callbacks=[callback])
    trainer.fit(Regression(), regression_data(3), regression_data(1))
    return trainer


@pytest.mark.parametrize("name", RECIPES)
def test_hooks_that_do_nothing_are_not_called(name: str, tmp_path: Path) -> None:
    recipe = make(name)
    fit(tmp_path, recipe)
    for hook in OF_EVERY_BATCH:
        does_nothing = getattr(type(recipe), hook) is getattr(pl.Callback, hook) or hook in IN_THIS_RUN.get(name, ())
        assert (getattr(recipe, hook) is None) is does_nothing


def test_hooks_with_nothing_to_do_in_a_run_are_not_called_in_it(tmp_path: Path) -> None:
    noise, ensemble = GradientNoiseScale(), SnapshotEnsemble(cycles=2)
    for batches in (1, 2, 1):
        trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[noise, ensemble], accumulate_grad_batches=batches)
        trainer.fit(Regression(), regression_data(8))
        assert [getattr(noise, hook) is None for hook in MEASURING] == 3 * [batches == 1]
        assert noise.rule.measured == (4 if batches > 1 else 0)
        assert ensemble.on_train_batch_start is None
        assert len(ensemble.rule.kept) == 2


def test_hooks_of_a_subclass_are_called(tmp_path: Path) -> None:
    ensemble = Counting(cycles=2)
    assert fit(tmp_path, ensemble).global_step == ensemble.calls


def test_a_subclass_may_call_what_its_parent_does_not_have(tmp_path: Path) -> None:
    mine = Mine()
    assert fit(tmp_path, mine).global_step == mine.calls


def test_a_recipe_in_the_hands_of_another_callback_is_left_as_it_is(tmp_path: Path) -> None:
    keeper = Keeper(LearningCurves())
    assert fit(tmp_path, keeper).global_step == keeper.calls


class Hooked(Regression):
    """Has one hook of its own, and one that is put in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"backward": 0, "step": 0}
        self.on_before_optimizer_step = self._count_step  # type: ignore[method-assign]  # as some libraries do

    def _count_step(self, *_: Any) -> None:
        self.calls["step"] += 1

    def on_after_backward(self) -> None:
        self.calls["backward"] += 1


def test_hooks_of_a_copied_module_that_do_nothing_are_not_called_and_others_are(tmp_path: Path) -> None:
    module = Hooked()
    pass_over_hooks_of(module, pl.LightningModule)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, regression_data(3), regression_data(1))
    assert trainer.global_step == module.calls["backward"] == module.calls["step"] == 3
    left_out = {hook for hook in OF_EVERY_BATCH if getattr(module, hook) is None}
    assert left_out == {*OF_TRAINING} - {"on_after_backward", "on_before_optimizer_step"}


def test_trials_leave_out_the_hooks_of_their_copy(tmp_path: Path) -> None:
    copied = Hooked()
    fit_quietly(copied, {"max_steps": 2, "accelerator": "cpu", "devices": 1}, regression_data(2))
    assert copied.calls == {"backward": 2, "step": 2}
    assert copied.on_train_batch_start is None


class Counted(PassThroughProfiler):
    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def start(self, action_name: str) -> None:
        self.started += 1


def test_a_profiler_that_measures_nothing_costs_nothing_and_another_one_measures(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[LearningCurves()])
    assert type(trainer.profiler) is PassThroughProfiler
    trainer.fit(Regression(), regression_data(3))
    assert isinstance(trainer.profiler, Unprofiled)
    with trainer.profiler.profile("one"), trainer.profiler.profile("within the other"):
        assert pickle.loads(pickle.dumps(trainer.profiler)).profile("one") is not None
    mine = Counted()
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[LearningCurves()], profiler=mine)
    trainer.fit(Regression(), regression_data(3))
    assert trainer.profiler is mine
    assert mine.started > 30
