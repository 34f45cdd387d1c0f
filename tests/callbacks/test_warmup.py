import json
import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import Fragile, Regression, Resumable, fp16, quiet_trainer, regression_data, same, weights_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_recipes import (
    InstabilityDetector,
    LearningRateSchedule,
    OverfitCheck,
    PercentileGradientClipping,
    WarmupSweep,
)
from lightning_recipes.callbacks import warmup as module_under_test
from lightning_recipes.core.schedules import Cosine
from lightning_recipes.core.trials import Outcome, Trial, load_outcomes

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:warmup does not help"),
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'"),
]
STEPS = 300  # warmups of 10 and 30


class Watched(Fragile):
    """Keeps the learning rate of each update; with a scheduler of its own, or none."""

    def __init__(self, scheduler: Any = None, interval: str = "step", dropout: float = 0.0, **more: Any) -> None:
        super().__init__(**more)
        self.scheduler, self.interval = scheduler, interval
        self.dropout = torch.nn.Dropout(dropout)
        self.used: list[float] = []
        self.noise: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.noise.append(random.random() + float(np.random.rand()) + float(torch.rand(())))
        return super().training_step([self.dropout(batch[0]), batch[1]], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        if self.scheduler is None:
            return optimizer
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def data(**more: Any) -> Any:
    return regression_data(20, 16, shuffle=True, **more)


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, loader: Any = None, **more: Any) -> Any:
    ckpt_path = more.pop("ckpt_path", None)
    settings = {"max_steps": STEPS, "max_epochs": -1, "callbacks": [*callbacks], **more}
    trainer = quiet_trainer(folder, **settings)
    pl.seed_everything(5, verbose=False)
    trainer.fit(module, loader or data(), regression_data(2), ckpt_path=ckpt_path)
    return trainer


def decided(monkeypatch: pytest.MonkeyPatch, rate: float, warmup_steps: int) -> None:
    """Have every trial come out as if just that warmup made just that rate stable."""

    def outcome(self: Any, trial: Trial) -> Outcome:
        stable = trial.learning_rate <= rate * 1.01 and trial.warmup_steps >= warmup_steps
        return Outcome(stable, 0.5 if stable else math.nan, trial.steps)

    monkeypatch.setattr(module_under_test.ModuleTrials, "__call__", outcome)


def test_it_finds_the_warmup_and_trains_with_it(tmp_path: Path) -> None:
    module, sweep = Watched(), WarmupSweep(seeds=2)
    trainer = fit(tmp_path, module, sweep, max_steps=1000)
    assert sweep.result is not None
    best = sweep.result.best
    assert best is not None
    assert best.learning_rate == pytest.approx(0.003)
    assert best.warmup_steps == sweep.warmup_steps == 100
    assert trainer.global_step == len(module.used) == 1100
    assert module.used[:100] == pytest.approx([0.003 * (step + 1) / 101 for step in range(100)])
    assert module.used[100:] == pytest.approx([0.003] * 1000)
    assert all(value.isfinite().all() for value in weights_of(module).values())
    assert load_outcomes(tmp_path / "warmup_sweep.json").keys() == sweep.result.outcomes.keys()
    assert (tmp_path / "warmup_sweep.png").read_bytes()[:4] == b"\x89PNG"
    (finding,) = map(json.loads, (tmp_path / "findings.jsonl").read_text().splitlines())
    assert finding["rule"] == "warmup found"
    assert (trainer.max_steps, trainer.max_epochs) == (1000, -1)


LOADERS: dict[str, Any] = {
    "shuffled": lambda: data(),
    "own generator": lambda: data(generator=torch.Generator().manual_seed(7)),
    "workers": lambda: data(num_workers=1, persistent_workers=True),
    "resumable": lambda: Resumable(regression_data(20, 16)),
    "several": lambda: {"a": data(), "b": data(generator=torch.Generator().manual_seed(7))},
}


class Either(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


@pytest.mark.parametrize(
    ("loader", "precision"),
    [
        ("workers", "32"),
        ("several", "fp16"),
        *(
            pytest.param(loader, precision, marks=pytest.mark.everything)
            for loader in LOADERS
            for precision in ("32", "bf16-mixed", "fp16")
        ),
    ],
)
def test_a_sweep_that_changes_nothing_leaves_no_trace(loader: str, precision: str, tmp_path: Path) -> None:
    ends: list[Any] = []
    for callbacks in ([], [WarmupSweep(base_learning_rate=1e-4, seeds=2)]):
        settings = {"plugins": [fp16()]} if precision == "fp16" else {"precision": precision}
        module, logger = Either(dropout=0.1), CSVLogger(tmp_path, name=str(len(callbacks)))
        clipping = PercentileGradientClipping()
        trainer = fit(tmp_path, module, *callbacks, clipping, loader=LOADERS[loader](), logger=logger, **settings)
        logged = (Path(logger.log_dir) / "metrics.csv").read_text()
        state = [optimizer.state_dict() for optimizer in trainer.optimizers]
        left = torch.rand(3), np.random.rand(3).tolist(), random.random()
        ends.append((module.used, module.noise, weights_of(module), state, logged, clipping.state_dict(), left))
    assert callbacks[0].result.finding.rule == "no warmup needed"
    without, with_it = ends
    assert without[:2] == with_it[:2]
    assert same(without[2], with_it[2])
    assert str(without[3:]) == str(with_it[3:])


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 4e-4, total_steps=STEPS, cycle_momentum=False),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_behind_the_warmup_the_run_is_the_one_it_was_at_the_rate_that_was_found(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interval = "epoch" if scheduler == "plateau" else "step"
    warmup = 10
    own = 4e-4 if scheduler == "one cycle" else 1e-4
    decided(monkeypatch, own * 3, warmup)
    alone = Watched(SCHEDULERS[scheduler], interval)
    fit(tmp_path, alone)
    warmed = Watched(SCHEDULERS[scheduler], interval)
    sweep = WarmupSweep(base_learning_rate=own * 3)
    trainer = fit(tmp_path, warmed, sweep)
    assert sweep.warmup_steps == warmup
    assert trainer.global_step == STEPS + warmup
    if scheduler == "plateau":  # waits for the end of the first epoch behind the warmup
        assert warmed.used[warmup:20] == pytest.approx([3 * rate for rate in alone.used[:10]])
    else:
        assert warmed.used[warmup:] == pytest.approx([3 * rate for rate in alone.used])
    first = 3 * alone.used[0]
    assert warmed.used[:warmup] == pytest.approx([first * (step + 1) / (warmup + 1) for step in range(warmup)])


def test_with_a_schedule_of_ours_the_warmup_comes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 3e-4, 30)
    for order in (1, -1):
        module = Watched()
        callbacks = [WarmupSweep(base_learning_rate=3e-4), LearningRateSchedule("cosine")][::order]
        fit(tmp_path, module, *callbacks)
        assert len(module.used) == STEPS + 30
        assert module.used[30:] == pytest.approx([3e-4 * factor for factor in Cosine().curve(STEPS)])
        assert module.used[:30] == pytest.approx([3e-4 * (step + 1) / 31 for step in range(30)])


def test_trials_see_peak_rates_and_schedulers_stand_still(tmp_path: Path) -> None:
    module, sweep = Watched(SCHEDULERS["one cycle"]), WarmupSweep(base_learning_rate=4e-4, seeds=1)
    fit(tmp_path, module, sweep)
    constant = Watched(learning_rate=4e-4)
    other = WarmupSweep(base_learning_rate=4e-4, seeds=1)
    fit(tmp_path, constant, other)
    assert sweep.result is not None
    assert other.result is not None
    assert sweep.result.table()[-1]["loss"] == other.result.table()[-1]["loss"]


@pytest.mark.parametrize(
    ("scheduler", "cut"),
    [
        pytest.param(scheduler, cut, marks=[] if row == column else [pytest.mark.everything])
        for row, scheduler in enumerate([None, "lambda", "cosine", "one cycle"])
        for column, cut in enumerate([5, 10, 15, 150])
    ],
)
def test_a_resumed_run_has_the_result_and_sweeps_no_more(
    scheduler: Any, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(monkeypatch, 2e-4, 10)

    def run(ckpt_path: Any = None) -> Any:
        module = Watched(SCHEDULERS.get(scheduler))
        saves = ModelCheckpoint(tmp_path, f"{scheduler}-{{step}}", save_top_k=-1, every_n_train_steps=5)
        sweep = WarmupSweep(base_learning_rate=2e-4)
        fit(tmp_path, module, sweep, saves, loader=Resumable(regression_data(20, 16)), ckpt_path=ckpt_path)
        return module.used, weights_of(module), sweep

    whole, weights, sweep = run()
    assert len(whole) == STEPS + 10
    rest, again, resumed = run(tmp_path / f"{scheduler}-step={cut}.ckpt")
    assert rest == whole[cut:]
    assert same(weights, again)
    assert (resumed.result, resumed.warmup_steps) == (None, sweep.warmup_steps)


def test_a_run_that_was_cut_within_what_was_added_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 3e-4, 30)
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    fit(tmp_path, Watched(), WarmupSweep(base_learning_rate=3e-4), saves)
    module, saves = Watched(), ModelCheckpoint(tmp_path, "again-{step}", save_top_k=-1, every_n_train_steps=5)
    fit(tmp_path, module, WarmupSweep(base_learning_rate=3e-4), saves, ckpt_path=tmp_path / "step=315.ckpt")
    assert len(module.used) == 15


def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    first = WarmupSweep(base_learning_rate=1e-3, seeds=2, path=str(path))
    fit(tmp_path, Watched(), first)
    kept = json.loads(path.read_text())["trials"]
    path.write_text(json.dumps({"trials": kept[1:]}))
    ran: list[Trial] = []
    again = WarmupSweep(base_learning_rate=1e-3, seeds=2, path=str(path))
    train = module_under_test.ModuleTrials.__call__

    def noted(self: Any, trial: Trial) -> Outcome:
        ran.append(trial)
        return train(self, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test.ModuleTrials, "__call__", noted)
        fit(tmp_path, Watched(), again)
    assert len(ran) == 1
    assert first.result is not None
    assert again.result is not None
    assert again.result.best == first.result.best
    assert len(json.loads(path.read_text())["trials"]) == len(kept)


def test_the_map_is_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 3e-4, 30)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, Watched(), WarmupSweep(base_learning_rate=3e-4), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["warmup_sweep"]
    assert "findings/warmup found/text_summary" in events.Tags()["tensors"]
    assert (Path(logger.log_dir) / "warmup_sweep.png").exists()
    assert (Path(logger.log_dir) / "warmup_sweep.json").exists()


def test_going_back_behind_an_instability_keeps_the_warmup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 3e-4, 30)

    class Poisoned(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (math.nan if self.trainer.global_step == 25 else 1.0)

    module = Poisoned()
    with pytest.warns(UserWarning, match="not finite"):
        fit(tmp_path, module, WarmupSweep(base_learning_rate=3e-4), InstabilityDetector("rewind", keep_every=10))
    assert module.used[26:36] == pytest.approx([3e-4 * min(1, (step + 1) / 31) for step in range(20, 30)])


def test_a_second_fit_sweeps_no_more_and_another_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 3e-4, 10)
    module, sweep = Watched(), WarmupSweep(base_learning_rate=3e-4)
    trainer = fit(tmp_path, module, sweep)
    first = sweep.result
    trainer.fit_loop.epoch_loop.max_steps = 400
    trainer.fit(module, data())
    assert sweep.result is first
    assert trainer.global_step == 410
    fit(tmp_path, Watched(), sweep)
    assert sweep.result is not first


SCHEDULES: dict[str, Any] = {
    "none": None,
    "in sequence": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, 1.0, 50), CosineAnnealingLR(optimizer, 250)], [50]
    ),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 1e-4, 1e-3, 20, cycle_momentum=False),
}


@pytest.mark.filterwarnings("ignore:.*scheduler.step")
@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_the_rate_that_was_found_is_that_of_the_whole_run_and_of_the_next(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {}
    for callbacks in ([], [WarmupSweep(base_learning_rate=3e-3)]):
        module = Watched(SCHEDULES[scheduler], learning_rate=3e-4)
        decided(monkeypatch, 3e-3, 30)
        trainer = fit(tmp_path, module, *callbacks)
        trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
        trainer.fit(module, data(), regression_data(2))
        used[len(callbacks)] = module.used
    assert len(used[0]) == 2 * STEPS
    ratios = {round(after / before, 6) for before, after in zip(used[0], used[1][30:], strict=True)}
    assert len(ratios) == 1


def test_a_run_of_unknown_length_is_refused_and_a_short_one_left_alone(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"needs the length of the run.*give max_steps"):
        fit(tmp_path, Watched(), WarmupSweep(), max_steps=-1, max_time={"seconds": 1})
    module, sweep = Watched(), WarmupSweep()
    fit(tmp_path, module, sweep, max_steps=99)
    assert sweep.result is None
    assert len(module.used) == 99
    assert "The run has 99 updates" in (tmp_path / "findings.jsonl").read_text()


def test_a_sweep_that_fails_costs_no_more_than_the_sweep(tmp_path: Path) -> None:
    class Alone(Watched):
        def on_train_start(self) -> None:
            if self.trainer.max_steps != STEPS:
                raise OSError("no such folder")

    module, sweep = Alone(), WarmupSweep()
    with pytest.warns(UserWarning, match="OSError: no such folder"):
        trainer = fit(tmp_path, module, sweep)
    assert trainer.global_step == STEPS
    assert (sweep.result, sweep.warmup_steps) == (None, 0)


def test_two_warmups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 3e-4, 10)
    for order in (1, -1):
        callbacks = [WarmupSweep(base_learning_rate=3e-4), LearningRateSchedule("cosine", warmup_steps=10)][::order]
        with pytest.raises(MisconfigurationException, match="leave out the warmup_steps"):
            fit(tmp_path, Watched(), *callbacks)


def test_trials_have_the_datamodule_and_leave_what_the_run_needs(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        scale, torn_down = 1.0, 0

        def train_dataloader(self) -> Any:
            return data()

        def teardown(self, stage: str) -> None:
            self.torn_down += 1

    there, ended = [], []

    class Needs(Fragile):
        def setup(self, stage: str) -> None:
            there[:] = ["cache"]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert there
            return self.trainer.datamodule.scale * super().training_step(batch, batch_idx)

        def on_train_end(self) -> None:
            ended.append(self)

        def teardown(self, stage: str) -> None:
            there.clear()

    given = Data()
    sweep = WarmupSweep(seeds=1, max_steps=100)
    quiet_trainer(tmp_path, max_steps=5, max_epochs=-1, callbacks=[sweep]).fit(Needs(), datamodule=given)
    assert sweep.result is not None
    assert (len(ended), there, given.torn_down) == (1, [], 1)


def test_fast_dev_run_sweeps_nothing(tmp_path: Path) -> None:
    sweep = WarmupSweep()
    trainer = quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[sweep])
    trainer.fit(Regression(), regression_data(), regression_data(2))
    assert sweep.result is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be"),
        ({"times": 0}, "times must be"),
        ({"base_learning_rate": 1.0, "unstable_base_learning_rate": 1.0}, "not both"),
        ({"max_steps": 5}, "max_steps must be a whole number of at least 100"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupSweep(**arguments)


def test_what_the_gradients_go_through_is_in_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tamed(pl.Callback):
        in_trials = True
        updates = 0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1e-6)
            self.updates += 1

    class Looking(pl.Callback):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("has no business in a trial")

    clipping, tamed, sweep = PercentileGradientClipping(), Tamed(), WarmupSweep(3e-3, seeds=1)
    fit(tmp_path, Watched(), sweep, Looking(), tamed, clipping, max_steps=100)
    tame, neither = WarmupSweep(3e-3, seeds=1), WarmupSweep(3e-3, seeds=1)
    fit(tmp_path, Watched(), tame, max_steps=100, gradient_clip_val=1e-6)
    fit(tmp_path, Watched(), neither, max_steps=100)
    assert tamed.updates == clipping.rule[0].count == 100
    needs = [
        each.result is not None and each.result.finding.rule != "no warmup needed" for each in (sweep, tame, neither)
    ]
    assert needs == [False, False, True]


class MadeForTheRun(Watched):
    """Asks the trainer how long the run will be, as the documentation of Lightning shows it."""

    def configure_optimizers(self) -> Any:
        assert (self.trainer.estimated_stepping_batches, self.trainer.max_epochs) == (120, 6)
        optimizer = torch.optim.SGD(self.parameters(), 1e-4)
        return {"optimizer": optimizer, "lr_scheduler": OneCycleLR(optimizer, 1e-4, 120)}


@pytest.mark.filterwarnings("ignore:small sample", "ignore:learning rate", "ignore:validation data")
@pytest.mark.parametrize("order", [1, -1])
def test_trials_make_their_schedules_for_the_run(order: int, tmp_path: Path) -> None:
    sweep, check = WarmupSweep(base_learning_rate=1e-4, seeds=1), OverfitCheck(max_steps=10)
    module = MadeForTheRun()
    trainer = fit(tmp_path, module, *[sweep, check][::order], max_steps=-1, max_epochs=6)
    assert sweep.result is not None
    assert check.fits
    assert len(module.used) == trainer.global_step == 120 + (sweep.warmup_steps or 0)
