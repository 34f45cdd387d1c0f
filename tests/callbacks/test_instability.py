import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from models import Adversaries, Regression, Resumable, fp16, quiet_trainer, regression_data, same, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import EMAWeights, InstabilityDetector, PercentileGradientClipping
from lightning_recipes.callbacks import instability as module_under_test
from lightning_recipes.callbacks import measuring
from lightning_recipes.callbacks.instability import TrainingInstability
from lightning_recipes.core.instability import Instability


class Troubled(Regression):
    """Something happens at given batches."""

    def __init__(self, trouble: dict[int, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trouble = trouble
        self.handles: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        what = self.trouble.get(batch_idx, "")
        inputs, targets = batch
        if what == "batch":
            inputs = inputs.clone().fill_(math.nan)
            self.trainer.callbacks[0]._batch = [inputs, targets]  # type: ignore[attr-defined]  # as if the loader had
        if what == "module":
            handle = self.net[1].register_forward_hook(lambda module, inputs, output: output / 0)
            self.handles.append(handle)
        else:
            while self.handles:
                self.handles.pop().remove()
        loss = self.loss((inputs, 200 * targets if what == "spike" else targets))
        return loss * math.nan if what == "forward" else loss

    def on_after_backward(self) -> None:
        if self.trouble.get(self.trainer.fit_loop.epoch_loop.batch_idx) == "gradient":
            self.net[0].bias.grad.fill_(math.inf)


def fit(folder: Path, module: pl.LightningModule, *callbacks: Any, batches: int = 80, **settings: Any) -> pl.Trainer:
    torch.manual_seed(2)
    trainer = quiet_trainer(folder, **{"max_epochs": 1, "callbacks": list(callbacks), **settings})
    trainer.fit(module, regression_data(batches))
    return trainer


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def findings_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=refuse)
        for file in folder.rglob("findings.jsonl")
        for line in file.read_text().splitlines()
    ]


class Record:
    """A rule that writes down what it is asked."""

    asked: list[tuple[float, ...]]

    def __init__(self) -> None:
        self.asked = []

    def update(self, *measured: Any) -> Instability | None:
        self.asked.append(measured)
        return None

    def is_striking(self, loss: float, norm: float) -> bool:
        return len(self.asked) % 2 == 0

    def forget(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ByHand(pl.Callback):
    """Loss and gradient norm of every update, the slow way."""

    def __init__(self) -> None:
        self.micro: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.losses.append(sum(pl_module.reported) / len(pl_module.reported))
        pl_module.reported.clear()
        gradients = [p.grad.double().flatten() for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(float(torch.cat(gradients).norm()))


class Reports(Regression):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reported: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.reported.append(loss.item())
        return loss


# ---------------------------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"plugins": "fp16"}])
def test_it_sees_the_true_loss_and_norm_of_every_update(
    settings: dict[str, Any], deferred: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: not deferred)
    if settings.get("plugins"):
        settings = {"plugins": [fp16(16.0)]}
    detector, by_hand = InstabilityDetector(), ByHand()
    detector.rule.make = Record  # type: ignore[assignment]
    clipping = PercentileGradientClipping(window=2, warmup_steps=0)
    fit(tmp_path, Reports(), by_hand, clipping, detector, batches=20, **settings)
    asked = detector.rule[0].asked  # type: ignore[attr-defined]
    tolerance = 1e-2 if "plugins" in settings else 1e-5
    assert [each[0] for each in asked] == pytest.approx(by_hand.losses, rel=tolerance)
    assert [each[1] for each in asked] == pytest.approx(by_hand.norms, rel=tolerance)  # from before the clipping
    assert {each[2] for each in asked} == {0.01}


@pytest.mark.parametrize("first", [True, False])
def test_the_norm_is_measured_once_for_both(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def count(tensors: list[Tensor]) -> Tensor:
        measured.append(len(tensors))
        return total_norm(tensors)

    total_norm = measuring.total_norm
    monkeypatch.setattr(measuring, "total_norm", count)
    callbacks = [InstabilityDetector(), PercentileGradientClipping()]
    fit(tmp_path, Regression(), *(callbacks if first else reversed(callbacks)), batches=10)
    assert measured == [4] * 11  # once more at the start, for the weights


def test_each_optimizer_has_its_own_rule(tmp_path: Path) -> None:
    detector = InstabilityDetector()
    fit(tmp_path, Adversaries(), detector, batches=12)
    assert detector.rule[0].step > detector.rule[1].step > 0


# ------------------------------------------------------------------------------------------------------------- tell


@pytest.mark.parametrize(
    ("trouble", "kind", "where"),
    [
        ("batch", "not finite", "first in the batch: batch[0]"),
        ("forward", "not finite", "first in the loss"),
        ("module", "not finite", "first in the forward pass, in net.1 (Tanh)"),
        ("gradient", "not finite", "first in the gradient of net.0.bias"),
        ("spike", "spike", ""),
    ],
)
def test_what_happened_is_told_with_the_place_the_numbers_and_the_cure(
    trouble: str, kind: str, where: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"{kind} at step 60: The .* at batch 60 of epoch 0"):
        fit(tmp_path, Troubled({60: trouble}), InstabilityDetector("skip"))
    (finding,) = findings_of(tmp_path)
    assert (finding["rule"], finding["step"]) == (kind, 60)
    evidence = finding["evidence"]
    assert (evidence["epoch"], evidence["batch_idx"], evidence["decision"]) == (0, 60, "cancelled")
    assert where in evidence["where"]
    assert evidence["learning_rate"] == 0.01
    assert finding["advice"].startswith("Repair" if trouble == "batch" else "Look" if kind == "not finite" else "If it")


@pytest.mark.filterwarnings("ignore")
def test_a_warning_says_that_the_weights_are_lost_and_what_would_have_saved_them(tmp_path: Path) -> None:
    module = Troubled({60: "forward"})
    fit(tmp_path / "warned", module, InstabilityDetector())
    (finding,) = findings_of(tmp_path / "warned")
    assert finding["advice"].endswith('no weight is of use; action="skip" cancels such updates.')
    module.trouble.clear()
    fit(tmp_path / "again", module, InstabilityDetector("skip"))
    finding = findings_of(tmp_path / "again")[0]
    assert finding["step"] == 0
    assert finding["evidence"]["where"].startswith("first in the weights")
    assert finding["advice"] == "The weights were lost before: go on from a checkpoint, or with a new model."
    fit(tmp_path / "scaled", Troubled({60: "forward"}), InstabilityDetector(), plugins=[fp16()])
    assert "no weight is of use" not in findings_of(tmp_path / "scaled")[0]["advice"]


@pytest.mark.parametrize(
    ("kind", "severity"), [("divergence", "info"), ("early instability", "info"), ("spike", "warning")]
)
def test_a_loss_may_rise_where_optimizers_work_against_each_other(
    kind: Any, severity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = InstabilityDetector()
    monkeypatch.setattr(
        module_under_test.InstabilityRule, "update", lambda *_, **__: Instability(kind, "loss", 0, 2.0, 1.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, Adversaries(), detector, batches=12)
    assert {(each["rule"], each["severity"]) for each in findings_of(tmp_path)} == {(kind, severity)}


def test_it_is_attributed_to_its_step_where_it_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: False)
    with pytest.warns(UserWarning, match="spike at step 60"):
        fit(tmp_path, Troubled({60: "spike"}), InstabilityDetector(), log_every_n_steps=50)
    assert [finding["step"] for finding in findings_of(tmp_path)] == [60]


def test_a_storm_of_skipped_updates_is_told_and_single_ones_are_not(tmp_path: Path) -> None:
    once, always = dict.fromkeys((5, 33), "gradient"), dict.fromkeys(range(40, 80), "gradient")
    fit(tmp_path, Troubled(once), InstabilityDetector("skip"), plugins=[fp16()])
    assert not findings_of(tmp_path)
    with pytest.warns(UserWarning, match=r"GradScaler storm at step 4\d"):
        fit(tmp_path, Troubled(always), InstabilityDetector("skip"), plugins=[fp16()])
    (finding,) = findings_of(tmp_path)
    assert finding["evidence"]["decision"] == "told"


@pytest.mark.parametrize(("action", "told", "journal"), [("warn", 1, [10]), ("skip", 2, [10, 236, 350])])
def test_a_kind_is_not_told_at_every_step(action: Any, told: int, journal: list[int], tmp_path: Path) -> None:
    trouble = dict.fromkeys([*range(10, 235), 236, *range(350, 360)], "forward")  # which breaks all weights at once
    with pytest.warns(UserWarning, match="not finite at step") as warned:
        fit(tmp_path, Troubled(trouble), InstabilityDetector(action), batches=400)
    assert len([each for each in warned if "not finite" in str(each.message)]) == told
    assert [finding["step"] for finding in findings_of(tmp_path)] == journal


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_short_last_batch_is_no_explosion(accumulate: int, tmp_path: Path) -> None:
    inputs = torch.randn(29 * 32 + 1, 8, generator=torch.Generator().manual_seed(0))
    targets = inputs.sum(1, keepdim=True) + 3 * torch.randn(len(inputs), 1, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(inputs, targets), 32, shuffle=True)
    detector = InstabilityDetector()
    trainer = quiet_trainer(tmp_path, max_epochs=12, callbacks=[detector], accumulate_grad_batches=accumulate)
    trainer.fit(Regression(), loader)
    assert detector.rule[0].examples.median == 32 * accumulate
    assert not (tmp_path / "findings.jsonl").exists()


def test_a_healthy_run_is_told_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Regression(batch_norm=True, dropout=0.2), InstabilityDetector(), batches=300)
    assert not findings_of(tmp_path)


# -------------------------------------------------------------------------------------------------------------- act


@pytest.mark.filterwarnings("ignore:not finite")
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_skip_cancels_the_update(settings: dict[str, Any], tmp_path: Path) -> None:
    module, skipped = Troubled({51: "forward"}), InstabilityDetector("skip")
    ema = EMAWeights(0.9)
    fit(tmp_path, module, skipped, ema, **settings)
    assert all(value.isfinite().all() for value in weights_of(module).values())
    updates = 80 // settings.get("accumulate_grad_batches", 1)
    assert ema.rule[0].updates == updates - 1


def everything(trainer: pl.Trainer, module: nn.Module, ema: EMAWeights, clipping: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "weights": weights_of(module),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "ema": [ema.rule[index].state_dict() for index in ema.rule],
            "clipping": clipping.rule.state_dict(),
        }
    )


class Photograph(pl.Callback):
    """The whole state after some batches."""

    def __init__(self, *at: int) -> None:
        self.at, self.taken = at, {}  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.at:
            ema, clipping = (
                next(each for each in trainer.callbacks if isinstance(each, kind))  # type: ignore[attr-defined]
                for kind in (EMAWeights, PercentileGradientClipping)
            )
            self.taken[batch_idx] = str(everything(trainer, pl_module, ema, clipping))


@pytest.mark.filterwarnings("ignore:not finite")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"plugins": "fp16"}, {"two": True}])
def test_a_rewind_brings_everything_back_bit_for_bit(settings: dict[str, Any], before: bool, tmp_path: Path) -> None:
    every = 10
    if settings.get("plugins"):
        settings = {"plugins": [fp16(16.0)]}
    module: Any = Troubled({57: "forward"}, schedule=True)
    if settings.pop("two", False):
        module, every = Adversaries(), 20

        def poisoned(batch: Any, batch_idx: int) -> Any:
            if batch_idx == 57:
                batch = [batch[0] * math.nan, batch[1]]
            return step(batch, batch_idx)

        step, module.training_step = module.training_step, poisoned
    detector = InstabilityDetector("rewind", keep_every=every)
    others = [EMAWeights(0.9), PercentileGradientClipping(window=20)]
    callbacks = [detector, *others] if before else [*others, detector]
    photograph = Photograph(*range(40, 58))
    fit(tmp_path, module, *callbacks, photograph, **settings)
    assert detector.rewinds == 1
    back = [batch for batch in range(40, 57) if photograph.taken[batch] == photograph.taken[57]]
    assert len(back) >= 1
    assert all(value.isfinite().all() for value in weights_of(module).values())


@pytest.mark.filterwarnings("ignore:(not finite|spike|burst|exploding|divergence)")
def test_a_rewind_cuts_the_learning_rate_as_often_as_it_goes_back_and_then_stops(tmp_path: Path) -> None:
    module = Troubled(dict.fromkeys((40, 60, 70), "forward"), schedule=True)
    detector = InstabilityDetector("rewind", max_rewinds=2, keep_every=5, lr_factor=0.5)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.lr_scheduler_configs[0].scheduler.base_lrs[0])

    trainer = fit(tmp_path, module, detector, Rates())
    assert rates == pytest.approx([0.01] * 40 + [0.005] * 20 + [0.0025] * 11)
    assert trainer.global_step == 71
    assert [finding["evidence"]["decision"] for finding in findings_of(tmp_path)] == ["went back"] * 2 + ["stopped"]
    assert all(value.isfinite().all() for value in weights_of(module).values())


@pytest.mark.filterwarnings("ignore:spike")
def test_the_bad_batches_right_behind_are_skipped_and_cost_no_further_rewind(tmp_path: Path) -> None:
    module = Troubled(dict.fromkeys(range(60, 76), "spike"))
    detector = InstabilityDetector("rewind", keep_every=20)
    trainer = fit(tmp_path, module, detector)
    assert (trainer.global_step, detector.rewinds) == (80, 1)
    told = [(finding["step"], finding["evidence"]["decision"]) for finding in findings_of(tmp_path)]
    assert told == [(60, "went back")]


@pytest.mark.filterwarnings("ignore:not finite")
@pytest.mark.parametrize("deferred", [False, True])
def test_stop_ends_the_run_with_the_last_good_state(
    deferred: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: not deferred)
    module = Troubled({51: "forward"})
    detector = InstabilityDetector("stop", keep_every=10)
    trainer = fit(tmp_path, module, detector, EMAWeights(0.9), log_every_n_steps=10)
    assert trainer.global_step == (60 if deferred else 52)
    assert all(value.isfinite().all() for value in weights_of(module).values())
    assert [finding["evidence"]["decision"] for finding in findings_of(tmp_path)] == ["stopped"]


@pytest.mark.filterwarnings("ignore:not finite")
def test_what_is_saved_before_it_is_judged_does_not_count_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: False)

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 55:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")

    module = Troubled({51: "forward"})
    fit(tmp_path, module, InstabilityDetector("stop", keep_every=10), SaveAt(), log_every_n_steps=10)
    assert all(value.isfinite().all() for value in weights_of(module).values())


@pytest.mark.filterwarnings("ignore:not finite")
def test_its_stop_outlives_a_wish_that_another_takes_back(tmp_path: Path) -> None:
    class TakesBack(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = False

    callbacks = TakesBack(), InstabilityDetector("stop")
    trainer = fit(tmp_path, Troubled({51: "forward"}), *callbacks, min_epochs=2, max_epochs=4, batches=60)
    assert trainer.global_step == 120


@pytest.mark.filterwarnings("ignore:not finite")
def test_raise_raises(tmp_path: Path) -> None:
    module = Troubled({51: "forward"})
    with pytest.raises(TrainingInstability, match="not finite at step 51"):
        fit(tmp_path, module, InstabilityDetector("raise"))
    assert all(value.isfinite().all() for value in weights_of(module).values())


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    detector = InstabilityDetector()
    for _ in range(2):
        fit(tmp_path, Regression(), detector, batches=20)
        assert detector.rule[0].step == 20


def test_nothing_of_the_training_is_kept_after_it(tmp_path: Path) -> None:
    detector = InstabilityDetector("rewind")
    fit(tmp_path, Regression(), detector, batches=20)
    assert (len(detector._good), detector._batch, detector._unread) == (0, None, [])


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("action", ["warn", "rewind"])
def test_a_resumed_run_goes_on_with_what_was_seen(action: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_to_read", lambda _: False)

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def run(*callbacks: Any, ckpt_path: Any = None) -> tuple[Any, InstabilityDetector]:
        detector, module = InstabilityDetector(action), Regression()
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[detector, *callbacks], log_every_n_steps=50)
        trainer.fit(module, Resumable(regression_data(33)), ckpt_path=ckpt_path)
        return module, detector

    whole, resumed = run(SaveAt()), run(ckpt_path=tmp_path / "cut.ckpt")
    assert same(weights_of(whole[0]), weights_of(resumed[0]))
    assert str(whole[1].rule.state_dict()) == str(resumed[1].rule.state_dict())


# ----------------------------------------------------------------------------------------------------------- refuse


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer._accelerator_connector.strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    with pytest.raises(MisconfigurationException, match="DeepSpeed"):
        InstabilityDetector().on_fit_start(trainer, Regression())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"action": "panic"}, ValueError, "action must be 'warn' or .* got 'panic'"),
        ({"max_rewinds": -1}, ValueError, "max_rewinds must be a whole number of at least 0, got -1"),
        ({"keep_every": 0}, ValueError, "keep_every must be a whole number of at least 1, got 0"),
        ({"lr_factor": 2.0}, ValueError, "lr_factor must be a number above 0 and at most 1, got 2.0"),
        ({"lr_factor": "half"}, TypeError, "lr_factor must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InstabilityDetector(**arguments)


def test_a_cure_names_a_measure_once_and_no_progress_is_told_against_the_start() -> None:
    for cure in module_under_test.CURES.values():
        assert cure.lower().count("warm") <= 1
        assert cure.lower().count("gradient clipping") + cure.startswith("Clip ") <= 1
    update = module_under_test._Update(0, 1.39, 0.1, 32, 0.05, step=308, epoch=4, batch_idx=56)
    found = module_under_test._finding(
        update, Instability("no progress", "loss", 308, 1.39, 1.43), "told", "", rivals=False
    )
    assert found.message == "The smoothed loss was 1.39 at batch 56 of epoch 4, and 1.43 at the start."


def test_what_keeps_coming_is_told_once_and_cancelled_no_longer(tmp_path: Path) -> None:
    module = Troubled(dict.fromkeys(range(60, 200), "spike"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, module, InstabilityDetector("skip"), batches=120)
    cancelled, given_up, *_ = findings_of(tmp_path)
    assert (cancelled["evidence"]["decision"], given_up["evidence"]["decision"]) == ("cancelled", "gave up")
    assert (given_up["rule"], given_up["step"]) == ("divergence", 89)
    assert "cancelled no longer" in given_up["message"]


# ------------------------------------------------------------------------------------------------- unusual trainings


class OneBackward(Regression):
    """One backward pass serves two optimizers; batch 5 is bad."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.seen = False, seen

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        loss = self.loss(batch) * (math.nan if batch_idx == 5 else 1)
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.zero_grad()
        if self.seen:
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(self.net(batch[0]).pow(2).mean(0))  # of another shape
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.01) for index in (0, 3)], []


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.filterwarnings("ignore:not finite")
def test_an_optimizer_without_a_backward_pass_of_its_own_is_held_too(seen: bool, tmp_path: Path) -> None:
    module, detector = OneBackward(seen), InstabilityDetector("skip")
    fit(tmp_path, module, detector, batches=10)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert detector._updates == 20
    assert [detector.rule[index].step for index in detector.rule] == ([10, 10] if seen else [1, 1])


@pytest.mark.parametrize(
    "recipe", [InstabilityDetector("skip"), PercentileGradientClipping(skip_nonfinite=True)], ids=["detector", "clip"]
)
@pytest.mark.filterwarnings("ignore:not finite", "ignore:gradient not finite")
def test_a_cancelled_update_leaves_the_statistics_of_batch_norm_alone(recipe: Any, tmp_path: Path) -> None:
    class Bad(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss((batch[0] * (math.nan if batch_idx == 5 else 1), batch[1]))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = copy.deepcopy(self.net[1].state_dict())

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                now = self.net[1].state_dict()
                self.undone = all(torch.equal(now[name], self.before[name]) for name in ("running_mean", "running_var"))

    module = Bad(batch_norm=True)
    fit(tmp_path, module, recipe, batches=10)
    assert module.undone
    assert recipe._statistics.held == []  # let go


class Unfreezes(Regression):
    """Another group of parameters, and a buffer of another size, in the second epoch; batch 5 of it is bad."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(1))
        self.register_buffer("scale", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(4), persistent=False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.bank = torch.zeros(len(self.bank) + 1)
        is_bad = self.trainer.fit_loop.epoch_loop.total_batch_idx == 15
        self.scale += math.nan if is_bad else 1
        return self.loss(batch) * (math.nan if is_bad else 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[3].parameters(), lr=0.01)


@pytest.mark.parametrize("action", ["rewind", "stop"])
@pytest.mark.filterwarnings("ignore:not finite", "ignore:not in any optimizer")
def test_the_last_good_state_is_of_the_present_groups_and_has_all_buffers(action: Any, tmp_path: Path) -> None:
    module, detector = Unfreezes(), InstabilityDetector(action, keep_every=4)
    trainer = fit(tmp_path, module, detector, batches=10, max_epochs=2)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert module.scale == (14 + 4 if action == "rewind" else 14)
    assert len(module.bank) == 1 + module.scale


@pytest.mark.parametrize(
    ("action", "bad", "decision"),
    [("rewind", 0, "cancelled"), ("rewind", 5, "went back"), ("stop", 0, "stopped"), ("stop", 5, "stopped")],
)
@pytest.mark.filterwarnings("ignore:not finite")
def test_layers_that_are_lazy_until_the_first_batch(action: Any, bad: int, decision: str, tmp_path: Path) -> None:
    class Lazy(Troubled):
        def configure_model(self) -> None:
            self.net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.LazyLinear(1))

    module = Lazy({bad: "forward"})
    trainer = fit(tmp_path, module, InstabilityDetector(action), batches=10)
    assert trainer.global_step == (10 if action == "rewind" else bad + 1)
    (finding,) = findings_of(tmp_path)
    assert finding["evidence"]["decision"] == decision
    if action == "stop":
        assert f"stopped{' with the last good state' if bad else ': no state was kept yet'}." in finding["message"]
    assert all(value.isfinite().all() for value in weights_of(module).values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.filterwarnings("ignore:spike")
def test_half_precision_can_cancel(fused: bool, tmp_path: Path) -> None:
    module = Troubled({50: "spike"}, make_optimizer=lambda p: torch.optim.Adam(p, 0.001, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(tmp_path, module, InstabilityDetector("skip"), batches=52, plugins=[plugin])
    (finding,) = findings_of(tmp_path)
    assert (finding["step"], finding["evidence"]["decision"]) == (50, "cancelled")


@pytest.mark.filterwarnings("ignore:not finite")
def test_a_step_that_differentiates_within_is_searched_no_further(tmp_path: Path) -> None:
    class Penalised(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs = batch[0].requires_grad_(True)
            outputs = self.net(inputs)
            (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
            return (outputs.pow(2).mean() + slope.pow(2).mean()) * (math.nan if batch_idx == 5 else 1)

    fit(tmp_path, Penalised(), InstabilityDetector("skip"), batches=8)
    assert findings_of(tmp_path)[0]["evidence"]["where"] == "first in the loss"
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[EMAWeights(0.9, buffers="recompute")])
    trainer.fit(Penalised(batch_norm=True), regression_data(4), regression_data(2))  # nor is it recomputed in vain


@pytest.mark.filterwarnings("ignore:not finite")
def test_sparse_gradients_and_batches_are_looked_at(tmp_path: Path) -> None:
    class Words(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(8, 4, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found = self.words(batch.to_dense().long())
            root = (found * 0).sum().sqrt() if batch_idx == 3 else 0  # the gradient of which is not finite
            return found.pow(2).mean() * (math.nan if batch_idx == 4 else 1) + root

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1)

    module = Words()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[InstabilityDetector("skip")])
    loader = DataLoader([torch.eye(8).to_sparse() for _ in range(6)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    assert module.words.weight.isfinite().all()
    assert "first in the gradient of words.weight" in findings_of(tmp_path)[0]["evidence"]["where"]


@pytest.mark.parametrize(("rate", "told"), [(1, 1.0), (torch.tensor(0.5), 0.5), (None, 0.0)])
@pytest.mark.filterwarnings("ignore:not finite")
def test_learning_rates_of_any_kind_are_told(rate: Any, told: float, tmp_path: Path) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.param_groups[0]["lr"] = rate
        if rate is None:
            del optimizer.param_groups[0]["lr"]
            optimizer.step = torch.optim.Optimizer.profile_hook_step(lambda _, closure: closure()).__get__(optimizer)  # type: ignore[method-assign]
        return optimizer

    fit(tmp_path, Troubled({1: "forward"}, make_optimizer=make), InstabilityDetector("skip"), batches=2)
    assert findings_of(tmp_path)[0]["evidence"]["learning_rate"] == told
