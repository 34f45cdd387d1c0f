import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from models import Adversaries, Derived, Regression, Resumable, fp16, quiet_trainer, regression_data, same, weights_of
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from lightning_recipes import EMAWeights, InstabilityDetector, LearningRateSchedule
from lightning_recipes.core.schedules import (
    Constant,
    Cosine,
    Linear,
    OneCycle,
    PiecewiseConstant,
    ReduceOnPlateau,
    Run,
    Warmup,
    WarmupStableDecay,
)

SCHEDULERS: dict[str, Any] = {
    "none": None,
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 36),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, [0.4, 0.2], total_steps=36),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Scheduled(Regression):
    """Two parameter groups, and a scheduler of the module's own or none; keeps the rates of each update."""

    def __init__(self, scheduler: str = "none", interval: str = "step", rates: Any = (0.1, 0.01), **more: Any) -> None:
        super().__init__(**more)
        self.scheduler, self.interval, self.rates = scheduler, interval, rates
        self.used: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[-1].parameters(), "lr": self.rates[1]}]
        optimizer = torch.optim.SGD(groups, lr=self.rates[0], momentum=0.5)
        self.momenta: list[float] = []

        def about_to_step(*_: Any) -> None:
            self.used.append([float(group["lr"]) for group in optimizer.param_groups])
            self.momenta.append(optimizer.param_groups[0]["momentum"])

        optimizer.register_step_pre_hook(about_to_step)
        if SCHEDULERS[self.scheduler] is None:
            return optimizer
        config = {"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": self.interval, "monitor": "val_loss"}
        if self.scheduler == "plateau":
            config["interval"] = "epoch"
        return {"optimizer": optimizer, "lr_scheduler": config}


def fit(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Any = None, **settings: Any
) -> pl.Trainer:
    trainer = quiet_trainer(folder, **{"max_epochs": 3, "callbacks": [*callbacks], **settings})
    trainer.fit(module, regression_data(), regression_data(2), ckpt_path=ckpt_path)
    return trainer


def used(folder: Path, scheduler: str, *callbacks: pl.Callback, interval: str = "step", **settings: Any) -> Any:
    module = Scheduled(scheduler, interval)
    fit(folder, module, *callbacks, **settings)
    return module.used


def times(rates: list[list[float]], factors: list[float]) -> Any:
    return [[rate * factor for rate in each] for each, factor in zip(rates, factors, strict=True)]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_with_a_scheduler_of_the_module_the_rate_is_the_product(scheduler: str, interval: str, tmp_path: Path) -> None:
    alone = used(tmp_path, scheduler, interval=interval)
    both = used(tmp_path, scheduler, LearningRateSchedule("linear"), interval=interval)
    assert len(alone) == len(both) == 36
    assert both == [pytest.approx(rates) for rates in times(alone, Linear().curve(36))]
    overlaid = LearningRateSchedule("cosine", warmup_steps="1 epoch", warmup="overlaid")
    curve = Warmup(12, Cosine(), "overlaid").curve(36)
    assert used(tmp_path, scheduler, overlaid, interval=interval) == [
        pytest.approx(rates) for rates in times(alone, curve)
    ]


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 30}, {"max_steps": 30}])
@pytest.mark.parametrize("scheduler", ["none", "lambda", "cosine", "one cycle"])
def test_behind_a_prepended_warmup_everything_is_as_without(
    scheduler: str, limit: dict[str, int], tmp_path: Path
) -> None:
    alone = used(tmp_path, scheduler, **limit)
    warmed = used(tmp_path, scheduler, LearningRateSchedule("constant", warmup_steps=7), **limit)
    assert len(warmed) == len(alone) + 7
    assert warmed[7:] == alone  # to the last digit
    assert warmed[:7] == [pytest.approx([rate * (step + 1) / 8 for rate in alone[0]]) for step in range(7)]
    shaped = used(tmp_path, scheduler, LearningRateSchedule("linear", warmup_steps=7), **limit)
    assert shaped[7:] == [pytest.approx(rates) for rates in times(alone, Linear().curve(len(alone)))]


def test_a_plateau_scheduler_waits_for_the_warmup(tmp_path: Path) -> None:
    alone = used(tmp_path, "plateau")
    warmed = used(tmp_path, "plateau", LearningRateSchedule("constant", warmup_steps="2 epochs"))
    assert len(warmed) == 60
    assert warmed[24:] == alone
    assert alone[0] != alone[-1]


@pytest.mark.parametrize("stepped", ["step", "epoch"])
def test_everybody_sees_the_effective_rate(stepped: str, tmp_path: Path) -> None:
    class Looks(pl.Callback):
        seen: dict[str, list[float]]

        def __init__(self) -> None:
            self.seen = {"on_train_batch_start": [], "on_before_optimizer_step": []}

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen["on_train_batch_start"].append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.seen["on_before_optimizer_step"].append(optimizer.param_groups[0]["lr"])

    module, first, last = Scheduled("lambda", stepped), Looks(), Looks()
    logger = CSVLogger(tmp_path)
    callbacks = [first, LearningRateMonitor("step"), LearningRateSchedule(), last, LearningRateMonitor("epoch")]
    fit(tmp_path, module, *callbacks, logger=logger, log_every_n_steps=1)
    rates = [each[0] for each in module.used]
    assert len({*rates}) == 36
    for looks in (first, last):
        assert looks.seen == {"on_train_batch_start": rates, "on_before_optimizer_step": rates}
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-SGD/pg1")
    logged = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert {*logged} == {*rates}


def test_accumulation_counts_updates(tmp_path: Path) -> None:
    rates = used(tmp_path, "none", LearningRateSchedule("linear"), accumulate_grad_batches=5)
    assert [rate for rate, _ in rates] == pytest.approx([0.1 * factor for factor in Linear().curve(9)])


def test_an_update_that_the_grad_scaler_skips_is_none(tmp_path: Path) -> None:
    module = Scheduled(rates=(1e-4, 1e-4))
    callback = LearningRateSchedule("linear", steps=36)
    fit(tmp_path, module, callback, plugins=[fp16(init_scale=2.0**40)])
    assert len(module.used) < 36
    assert callback.rule[0].step == len(module.used)
    assert [rate for rate, _ in module.used] == pytest.approx(
        [1e-4 * factor for factor in Linear().curve(36)[: len(module.used)]]
    )


class Stepped(Adversaries):
    """Steps its schedulers, and raw optimizers or not, by hand."""

    def configure_optimizers(self) -> Any:
        optimizers, _ = super().configure_optimizers()
        self.used: Any = {0: [], 1: []}
        for index, optimizer in enumerate(optimizers):
            optimizer.register_step_pre_hook(lambda each, *_, i=index: self.used[i].append(each.param_groups[0]["lr"]))
        return optimizers, [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()


@pytest.mark.parametrize("raw", [False, True])
def test_each_optimizer_stepped_by_hand_has_its_own_steps(raw: bool, tmp_path: Path) -> None:
    module = Stepped(raw)
    fit(tmp_path, module, LearningRateSchedule("linear", steps=36), max_epochs=2)
    twice, once = module.used[0], module.used[1]
    assert (len(twice), len(once)) == (48, 24)
    assert once == pytest.approx([0.01 / (1 + step) * (1 - step / 36) for step in range(24)])
    assert twice == pytest.approx([0.01 / (1 + step // 2) * max(0, 1 - step / 36) for step in range(48)])


def test_a_warmup_makes_a_run_of_several_optimizers_longer(tmp_path: Path) -> None:
    module = Stepped()
    trainer = fit(tmp_path, module, LearningRateSchedule("constant", warmup_steps=6), max_epochs=-1, max_steps=60)
    assert trainer.global_step == 60 + 2 * 6
    assert module.used[1][6:9] == pytest.approx([0.01, 0.005, 0.01 / 3])


def test_one_cycle_moves_the_momentum_of_those_that_have_one(tmp_path: Path) -> None:
    module = Scheduled()
    trainer = fit(tmp_path, module, LearningRateSchedule(OneCycle(rise=0.5)))
    assert module.momenta == pytest.approx([OneCycle(rise=0.5).momentum(step, Run(36)) for step in range(36)])
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.5
    lacks = Regression(make_optimizer=lambda parameters: torch.optim.Adagrad(parameters, lr=0.1))
    with pytest.raises(MisconfigurationException, match="moves the momentum, which Adagrad does not have"):
        fit(tmp_path, lacks, LearningRateSchedule("one cycle"))
    fit(tmp_path, lacks, LearningRateSchedule(OneCycle(cycle_momentum=False)))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_when_fit_ends_everything_is_as_it_was(error: type[BaseException] | None, tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if error is not None and trainer.global_step == 20:
                raise error

    module = Scheduled("lambda", "epoch")
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[LearningRateSchedule(warmup_steps=6), Breaks()])
    try:
        trainer.fit(module, regression_data())
    except (RuntimeError, SystemExit):
        assert error is not None
    (optimizer,) = trainer.optimizers
    epochs = 3 if error is None else 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + epochs))
    assert type(trainer.lr_scheduler_configs[0].scheduler) is LambdaLR
    assert not optimizer._optimizer_step_post_hooks
    assert (trainer.max_epochs, trainer.max_steps) == (3, -1)


@pytest.mark.parametrize("cut", [3, 7, 20])
@pytest.mark.parametrize("scheduler", ["none", "lambda", "cosine", "one cycle"])  # Lightning resumes no plateau exactly
def test_a_resumed_run_has_the_rates_of_one_that_was_not_cut(scheduler: str, cut: int, tmp_path: Path) -> None:
    def run(ckpt_path: Any = None) -> Any:
        module = Scheduled(scheduler)
        saves = ModelCheckpoint(tmp_path, f"{scheduler}-{{step}}", save_top_k=-1, every_n_train_steps=1)
        trainer = quiet_trainer(
            tmp_path, max_steps=30, max_epochs=-1, callbacks=[LearningRateSchedule("cosine", warmup_steps=7), saves]
        )
        trainer.fit(module, Resumable(regression_data()), regression_data(2), ckpt_path=ckpt_path)
        return module.used, weights_of(module)

    whole, weights = run()
    assert len(whole) == 37
    resumed, again = run(tmp_path / f"{scheduler}-step={cut}.ckpt")
    assert resumed == whole[cut:]
    assert same(weights, again)


def test_a_run_that_was_cut_within_what_was_added_goes_on(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, Scheduled(), LearningRateSchedule(warmup_steps=7), saves)
    module = Scheduled()
    fit(tmp_path, module, LearningRateSchedule(warmup_steps=7), ckpt_path=tmp_path / "step=40.ckpt")
    assert len(module.used) == 3


def test_the_schedule_of_a_resumed_run_is_the_one_it_is_given(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, Scheduled(), LearningRateSchedule("cosine"), saves)
    module = Scheduled()
    fit(tmp_path, module, LearningRateSchedule("linear"), ckpt_path=tmp_path / "step=18.ckpt")
    assert [rate for rate, _ in module.used] == pytest.approx([0.1 * factor for factor in Linear().curve(36)[18:]])


def test_a_second_fit_goes_on_and_another_one_starts_anew(tmp_path: Path) -> None:
    module, callback = Scheduled(), LearningRateSchedule("linear", steps=72)
    trainer = fit(tmp_path, module, callback)
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, regression_data())
    assert [rate for rate, _ in module.used] == pytest.approx([0.1 * factor for factor in Linear().curve(72)])
    module = Scheduled()
    fit(tmp_path, module, callback)
    assert module.used[0] == [0.1, 0.01]


@pytest.mark.parametrize("scheduler", ["none", "lambda", "cosine"])
def test_a_second_fit_has_the_rates_of_its_own_optimizers(scheduler: str, tmp_path: Path) -> None:
    rates = {}
    for callbacks in ([], [LearningRateSchedule("constant")]):
        module = Scheduled(scheduler)
        trainer = fit(tmp_path, module, *callbacks)
        trainer.fit_loop.max_epochs = 6
        module.rates = (0.02, 0.03)
        module.used.clear()
        trainer.fit(module, regression_data(), regression_data(2))
        rates[len(callbacks)] = module.used
    assert len(rates[0]) == 36
    assert rates[1] == rates[0]


def test_a_step_that_calls_the_one_it_overrides_is_one(tmp_path: Path) -> None:
    schedule = LearningRateSchedule()
    fit(tmp_path, Regression(make_optimizer=Derived), schedule)
    assert schedule.rule[0].step == 36


@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_gets_no_longer(batches: int, tmp_path: Path) -> None:
    module = Scheduled()
    fit(tmp_path, module, LearningRateSchedule("cosine", warmup_steps=100), fast_dev_run=batches)
    assert [rate for rate, _ in module.used] == pytest.approx([0.1 * (step + 1) / 101 for step in range(batches)])


@pytest.mark.parametrize("ckpt", [False, True])
def test_until_training_starts_the_end_is_as_asked(ckpt: bool, tmp_path: Path) -> None:
    class Asks(Scheduled):
        def on_fit_start(self) -> None:
            self.asked = self.trainer.estimated_stepping_batches

    last = None
    if ckpt:
        save = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=39)
        fit(tmp_path, Scheduled(), save, LearningRateSchedule("cosine", warmup_steps=5))
        last = tmp_path / "cut.ckpt"
    module = Asks()
    trainer = fit(tmp_path, module, LearningRateSchedule("cosine", warmup_steps=5), ckpt_path=last)
    assert module.asked == 36
    assert len(module.used) == (2 if ckpt else 41)
    assert (trainer.max_epochs, trainer.max_steps) == (3, -1)


@pytest.mark.parametrize(
    ("warmup_steps", "limit", "checks"),
    [
        (5, {"max_epochs": 3}, [12, 24, 36, 41]),
        (12, {"max_epochs": 3}, [12, 24, 36, 48]),
        (5, {"max_epochs": 3, "val_check_interval": 6}, [6, 12, 18, 24, 30, 36, 41]),
        (5, {"max_epochs": 3, "limit_val_batches": 0}, []),
        (5, {"max_epochs": -1, "max_steps": 30}, [12, 24]),  # nor does Lightning without a warmup
    ],
)
def test_a_run_that_ends_with_an_epoch_still_ends_with_a_validation(
    warmup_steps: int, limit: dict[str, Any], checks: list[int], tmp_path: Path
) -> None:
    class Validated(pl.Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                self.at.append(trainer.global_step)

    validated = Validated()
    fit(tmp_path, Scheduled(), LearningRateSchedule("cosine", warmup_steps=warmup_steps), validated, **limit)
    assert validated.at == checks


@pytest.mark.filterwarnings("ignore:learning rate never cut")
def test_a_mode_that_looks_wrong_is_told(tmp_path: Path) -> None:
    message = "By its name val_acc is better when higher, but ReduceOnPlateau has mode='min': it would cut the learning"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Scheduled(), LearningRateSchedule(ReduceOnPlateau("val_acc")), limit_val_batches=0)


def test_a_plateau_that_will_not_be_seen_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no plateau will be seen"):
        fit(tmp_path, Scheduled(), LearningRateSchedule(ReduceOnPlateau()), limit_val_batches=0)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (LearningRateSchedule("cosine", warmup_steps=1000, warmup="overlaid"), "1,000"),
        (LearningRateSchedule("cosine", warmup_steps="2 of the run", warmup="overlaid"), "72"),
        (LearningRateSchedule(Warmup(36, Cosine(), "overlaid")), "36"),
        (LearningRateSchedule(WarmupStableDecay(warmup_steps=100)), "100"),
        (LearningRateSchedule("constant", "1 of the run", "overlaid", steps=50), "50"),
    ],
)
def test_a_warmup_that_the_run_is_too_short_for_is_told_once(
    schedule: LearningRateSchedule, steps: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"A warmup of {steps} updates lies over a run of 36: .* of its peak") as told:
        fit(tmp_path, Scheduled(), schedule)
    assert len([each for each in told if "warmup longer" in str(each.message)]) == 1


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        (LearningRateSchedule("cosine", warmup_steps=1000, warmup="overlaid"), {"fast_dev_run": True}),
        (LearningRateSchedule("cosine", warmup_steps=35, warmup="overlaid"), {}),
        (LearningRateSchedule("cosine", warmup_steps=50), {}),
    ],
)
def test_a_warmup_that_fits_is_no_news(
    schedule: LearningRateSchedule, settings: dict[str, Any], tmp_path: Path
) -> None:
    fit(tmp_path, Scheduled(), schedule, **settings)


def test_two_schedules_make_a_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(LearningRateSchedule):
        """Of another state key."""

    said: list[str] = []
    monkeypatch.setattr("lightning_recipes.callbacks.learning_rates.rank_zero_info", said.append)
    rates = used(tmp_path, "cosine", LearningRateSchedule("linear"), Other("cosine"))
    assert said == ["The learning rate is the product of what LearningRateSchedule and Other make of it."]
    factors = [a * b for a, b in zip(Linear().curve(36), Cosine().curve(36), strict=True)]
    assert rates == [pytest.approx(each) for each in times(used(tmp_path, "cosine"), factors)]


@pytest.mark.filterwarnings("ignore:spike", "ignore:not finite")
def test_going_back_takes_the_schedule_back_and_a_cut_stays(tmp_path: Path) -> None:
    class Poisoned(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (math.nan if self.trainer.global_step == 25 else 1.0)

    module, callback = Poisoned("cosine"), LearningRateSchedule("linear")
    fit(tmp_path, module, callback, InstabilityDetector("rewind", keep_every=10, lr_factor=0.5))
    alone = used(tmp_path, "cosine", LearningRateSchedule("linear"))
    assert callback.rule[0].step == 36 - 6  # five good ones since the state that was kept, and the bad one
    assert module.used[:25] == alone[:25]
    assert module.used[26] == pytest.approx([rate / 2 for rate in alone[20]])
    assert module.used[35] == pytest.approx([rate / 2 for rate in alone[29]])


def test_the_length_of_the_run_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    for order in (1, -1):
        ema = EMAWeights(half_life="0.1 of the run")
        fit(tmp_path, Scheduled(), *[LearningRateSchedule(warmup_steps=12), ema][::order])
        assert ema.rule[0].decay == pytest.approx(2 ** (-1 / 3.6))


@pytest.mark.parametrize(
    ("limit", "steps"),
    [({"max_epochs": 3}, 12 + 3 + 3), ({"max_epochs": 3, "max_steps": 16}, 16), ({"max_epochs": 1}, 12)],
)
def test_the_length_of_the_run_is_that_of_a_scheduled_accumulation(
    limit: dict[str, int], steps: int, tmp_path: Path
) -> None:
    module = Scheduled()
    accumulation = GradientAccumulationScheduler({0: 1, 1: 4})
    fit(tmp_path, module, accumulation, LearningRateSchedule("linear"), **limit)
    assert [rate for rate, _ in module.used] == pytest.approx([0.1 * factor for factor in Linear().curve(steps)])


# ------------------------------------------------------------------------------------------ plateaus


class Stalls(Scheduled):
    """Its validation metric is what it is told to be."""

    def __init__(self, values: list[float], **more: Any) -> None:
        super().__init__(**more)
        self.values = iter(values)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("told", next(self.values))


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_a_plateau_cuts_the_rate_and_its_record_repeats_the_run(
    warmup_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0]
    callback = LearningRateSchedule(
        ReduceOnPlateau("told", gamma=0.3, patience=2, min_delta=0.0), warmup_steps=warmup_steps
    )
    module = Stalls(values)
    fit(tmp_path, module, callback, max_epochs=9)
    assert callback.plateau is not None
    assert len(callback.plateau.milestones) == 2
    assert len({rate for rate, _ in module.used[warmup_steps:]}) == 3
    record = yaml.safe_load((tmp_path / "schedule.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [record]}}))
    monkeypatch.setattr("sys.argv", ["train.py"])
    arguments = [f"--config={tmp_path / 'config.yaml'}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    trainer = LightningCLI(
        Regression, args=arguments, run=False, save_config_callback=None, seed_everything_default=1
    ).trainer
    (again,) = [each for each in trainer.callbacks if isinstance(each, LearningRateSchedule)]  # type: ignore[attr-defined]
    assert isinstance(again.schedule, PiecewiseConstant)
    repeated = Stalls([9.0] * 9)
    fit(tmp_path, repeated, again, max_epochs=9)
    assert repeated.used == module.used
    (line,) = {line.partition('"step"')[0] for line in (tmp_path / "findings.jsonl").read_text().splitlines()[:1]}
    assert re.search(r"told has not improved in 2 checks: the learning rate was multiplied by 0.3", line)


def test_a_plateau_goes_on_when_resumed(tmp_path: Path) -> None:
    values = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0]

    def run(epochs: int, told: list[float], ckpt_path: Any = None) -> Any:
        callback = LearningRateSchedule(ReduceOnPlateau("told", patience=2, min_delta=0.0))
        module = Stalls(told)
        fit(tmp_path, module, callback, max_epochs=epochs, ckpt_path=ckpt_path, enable_checkpointing=False)
        module.trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.used, callback.plateau and callback.plateau.milestones

    whole, milestones = run(8, values)
    run(5, values)
    rest, again = run(8, values[5:], tmp_path / "5.ckpt")
    assert rest == whole[60:]
    assert again == milestones


def test_a_metric_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"watches 'loss', which was not logged; there are: \['val_loss'\]"):
        fit(tmp_path, Regression(), LearningRateSchedule(ReduceOnPlateau("loss")))


# ------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_is_refused_when_fit_starts(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="needs the length of the run"):
        fit(tmp_path, Regression(), LearningRateSchedule(), max_epochs=-1, max_time={"seconds": 1})
    with pytest.raises(MisconfigurationException, match="needs the length of the run"):
        fit(
            tmp_path,
            Regression(),
            LearningRateSchedule(Constant(), "0.1 of the run"),
            max_epochs=-1,
            max_time={"seconds": 1},
        )
    trainer = fit(
        tmp_path,
        Regression(),
        LearningRateSchedule(steps=10),
        max_epochs=-1,
        max_time={"seconds": 1},
        limit_val_batches=0,
    )
    assert trainer.global_step > 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": "cosin"}, ValueError, "schedule must be 'constant' or 'cosine'"),
        ({"schedule": "reduce on plateau"}, ValueError, r"core.schedules.ReduceOnPlateau\('val_loss'\)"),
        ({"schedule": 0.1}, TypeError, "schedule must be one of lightning_recipes.core.schedules, or a name"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be a number above 0"),
        ({"warmup_steps": "long"}, ValueError, "warmup_steps must be a number of updates"),
        ({"warmup": "first"}, ValueError, "warmup must be 'prepended' or 'overlaid'"),
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearningRateSchedule(**arguments)


def test_checks_within_the_warmup_do_not_count(tmp_path: Path) -> None:
    callback = LearningRateSchedule(ReduceOnPlateau("told", patience=2, min_delta=0.0), warmup_steps="4 epochs")
    fit(tmp_path, Stalls([5.0] * 7), callback, max_epochs=3)
    assert callback.plateau is not None
    assert callback.plateau.milestones == [24]  # the second check behind the warmup
    again = LearningRateSchedule(ReduceOnPlateau("told", patience=2, min_delta=0.0))
    fit(tmp_path, Stalls([5.0] * 7), again, max_epochs=3)
    assert again.plateau is not None
    assert again.plateau.milestones == [36]


def test_a_metric_that_is_not_fresh_is_no_check(tmp_path: Path) -> None:
    class EverySecond(Scheduled):
        def on_validation_epoch_end(self) -> None:
            if self.trainer.current_epoch % 2 == 0 and not self.trainer.sanity_checking:
                self.log("told", 5.0)

    callback = LearningRateSchedule(ReduceOnPlateau("told", patience=3, min_delta=0.0))
    fit(tmp_path, EverySecond(), callback, max_epochs=6)
    assert callback.plateau is not None
    assert callback.plateau.checks.curve.values == [5.0] * 3
