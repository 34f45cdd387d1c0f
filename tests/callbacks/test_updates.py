import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from models import Adversaries, Derived, Regression, WithoutRate, fp16, quiet_trainer, regression_data, same, weights_of
from torch import Tensor, nn

from lightning_recipes import EMAWeights, PercentileGradientClipping, UpdateRatioMonitor
from lightning_recipes.callbacks import updates as module_under_test
from lightning_recipes.core.updates import UpdateRatioRule


class Record(UpdateRatioRule):
    """A rule that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, dict[str, float], float]] = []

    def update(self, step: int, ratios: Any, loss: float = math.nan, rate: float = 0.0, matrices: Any = None) -> None:
        super().update(step, ratios, loss, rate, matrices)
        self.told.append((step, dict(ratios), loss))


def watch(every: int = 1, **kwargs: Any) -> UpdateRatioMonitor:
    monitor = UpdateRatioMonitor(every, **kwargs)
    monitor.rule.make = Record
    return monitor


class ByHand(pl.Callback):
    """The slow definition: weights kept from one batch to the next, for trainings that step once a batch."""

    def __init__(self) -> None:
        self.ratios: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        squares: dict[str, list[float]] = {}
        for name, after in pl_module.named_parameters():
            layer = squares.setdefault(name.rpartition(".")[0], [0.0, 0.0])
            layer[0] += float((after.detach().double() - self.before[name]).pow(2).sum())
            layer[1] += float(self.before[name].pow(2).sum())
        self.ratios.append({name: math.sqrt(change / size) for name, (change, size) in squares.items()})


def fit(
    folder: Path, module: pl.LightningModule, *callbacks: Any, batches: int = 12, size: int = 8, **settings: Any
) -> pl.Trainer:
    torch.manual_seed(2)
    if settings.get("plugins") == "fp16":
        settings["plugins"] = [fp16()]
    trainer = quiet_trainer(folder, **{"max_epochs": 1, "callbacks": list(callbacks), **settings})
    trainer.fit(module, regression_data(batches, size))
    return trainer


def rule_of(monitor: UpdateRatioMonitor, index: int = 0) -> Record:
    rule = monitor.rule[index]
    assert isinstance(rule, Record)
    return rule


# ---------------------------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("settings", [{}, {"plugins": "fp16"}, {"gradient_clip_val": 0.1}], ids=str)
def test_it_is_the_true_update_of_every_optimizer(kind: Any, how: Any, settings: Any, tmp_path: Path) -> None:
    if how.get("fused") and "gradient_clip_val" in settings:
        settings = {}
    monitor, by_hand = watch(), ByHand()
    module = Regression(make_optimizer=lambda p: kind(p, lr=0.02, **how), schedule=True, batch_norm=True)
    fit(tmp_path, module, monitor, by_hand, EMAWeights(0.5), **settings)
    told = rule_of(monitor).told
    assert [step for step, *_ in told] == list(range(12))
    for (_, ratios, _), expected in zip(told, by_hand.ratios):
        assert ratios == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_a_step_that_calls_the_one_it_overrides_is_one(every: int, tmp_path: Path) -> None:
    monitor, by_hand = watch(every), ByHand()
    fit(tmp_path, Regression(make_optimizer=Derived), monitor, by_hand)
    told = rule_of(monitor).told
    assert [step for step, *_ in told] == list(range(0, 12, every))
    for (_, ratios, loss), expected in zip(told, by_hand.ratios[::every], strict=True):
        assert ratios == pytest.approx(expected, rel=2e-5)
        assert loss > 0


def test_updates_that_a_scaler_skips_are_none(tmp_path: Path) -> None:
    scaled = [fp16(2.0**40)]  # the first updates overflow
    monitor, by_hand = watch(), ByHand()
    sgd = lambda p: torch.optim.SGD(p, 0.01)  # noqa: E731
    fit(tmp_path, Regression(make_optimizer=sgd), monitor, by_hand, plugins=scaled, batches=60)
    real = [ratios for ratios in by_hand.ratios if any(ratios.values())]
    told = rule_of(monitor).told
    assert 3 < len(real) == len(told) < 60
    assert [step for step, *_ in told] == list(range(len(real)))
    for (_, ratios, loss), expected in zip(told, real):
        assert ratios == pytest.approx(expected, rel=2e-5)
        assert 0 < loss < 50

    fused = watch()
    module = Regression(make_optimizer=lambda p: torch.optim.SGD(p, 0.01, fused=True))
    fit(tmp_path, module, fused, plugins=[fp16(2.0**40)], batches=60)
    rule = rule_of(fused)
    assert rule.seen == 60
    assert rule.measured == len(real)
    assert all(math.isnan(ratio) for ratio in rule.told[0][1].values())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_measures_every_kth_update_with_its_loss(accumulate: int, tmp_path: Path) -> None:
    class Reports(Regression):
        losses: list[float]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

    monitor, module = watch(4), Reports()
    module.losses = []
    trainer = fit(tmp_path, module, monitor, batches=30, accumulate_grad_batches=accumulate, max_epochs=2)
    told = rule_of(monitor).told
    assert [step for step, *_ in told] == list(range(0, trainer.global_step, 4))
    for step, _, loss in told:
        of_update = module.losses[step * accumulate : (step + 1) * accumulate]
        assert loss == pytest.approx(sum(of_update) / accumulate, rel=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_each_optimizer_is_counted_by_itself_in_manual_optimization(raw: bool, tmp_path: Path) -> None:
    monitor = watch(5)
    fit(tmp_path, Adversaries(raw_optimizers=raw), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=4)
    first, second = rule_of(monitor), rule_of(monitor, 1)
    assert [step for step, *_ in first.told] == [0, 5, 10, 15, 20]  # steps twice a batch
    assert [step for step, *_ in second.told] == [0, 5, 10]
    assert list(first.told[0][1]) == ["first"]
    assert list(second.told[0][1]) == ["second"]
    assert all(math.isfinite(loss) for *_, loss in (*first.told, *second.told))


class Nested(Regression):
    """Manual optimization with an optimizer that calls its closure several times."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.raw)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


@pytest.mark.parametrize("kind", ["automatic", "manual", "raw"])
def test_lbfgs_and_closures_past_lightning(kind: str, tmp_path: Path) -> None:
    monitor, by_hand = watch(), ByHand()
    make = lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)  # noqa: E731
    module = Regression(make_optimizer=make) if kind == "automatic" else Nested(kind == "raw")
    fit(tmp_path, module, monitor, by_hand)
    told = rule_of(monitor).told
    skipped = kind == "raw"  # of these the first is missed
    assert [step for step, *_ in told] == list(range(skipped, 12))
    for (_, ratios, _), expected in zip(told, by_hand.ratios[skipped:]):
        assert ratios == pytest.approx(expected, rel=2e-5)


class Odd(Regression):
    """Parameters of every kind: none of a dimension, of the module itself, frozen, of zero, shared, sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.table = nn.Embedding(5, 1, sparse=True)
        self.net[-1].bias = self.head.bias

    def loss(self, batch: Any) -> Tensor:
        index = torch.arange(len(batch[0])) % 2
        return (self.scale * self.net(batch[0]) + self.head(batch[1]) + self.table(index) - batch[1]).pow(2).mean()


def test_parameters_of_every_kind(tmp_path: Path) -> None:
    monitor, module = watch(), Odd()
    module.make_optimizer = lambda p: torch.optim.SGD(list(p), 0.01)
    fit(tmp_path, module, monitor)
    told = rule_of(monitor).told
    assert set(told[0][1]) == {"Odd", "net.0", "net.3", "head", "table"}  # without what is frozen
    assert not math.isfinite(told[0][1]["head"])
    assert all(math.isfinite(ratio) for _, ratios, _ in told[1:] for ratio in ratios.values())


@pytest.mark.parametrize(
    ("per", "names"),
    [
        ("layer", {"net.0", "net.3"}),
        ("parameter", {"net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"}),
        ("group", {"body", "group 1"}),
    ],
)
def test_a_ratio_for_each_layer_parameter_or_group(per: Any, names: set[str], tmp_path: Path) -> None:
    class Groups(Regression):
        def configure_optimizers(self) -> Any:
            body, head = self.net[0].parameters(), self.net[-1].parameters()
            return torch.optim.Adam([{"params": body, "name": "body"}, {"params": head, "lr": 0.1}], lr=0.01)

    monitor = watch(per=per)
    fit(tmp_path, Groups(), monitor)
    assert set(rule_of(monitor).told[0][1]) == names


def test_in_turns_only_a_part_of_the_layers_is_copied(tmp_path: Path) -> None:
    copied = []

    class Meter(module_under_test.UpdateMeter):
        def __init__(self, parameters: Any, *more: Any) -> None:
            super().__init__(parameters, *more)
            copied.append(sum(parameter.numel() for parameter in parameters))

    whole, turns = watch(), watch(turns=2)
    fit(tmp_path, Regression(), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "UpdateMeter", Meter)
        fit(tmp_path, Regression(), turns)
    assert copied[:4] == [8 * 16 + 16, 17] * 2
    for (_, part, _), (_, ratios, _) in zip(rule_of(turns).told, rule_of(whole).told):
        assert len(part) == 1
        assert part == {name: ratios[name] for name in part}


def test_layers_unfrozen_later_are_measured_then(tmp_path: Path) -> None:
    class Unfreezes(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(batch_idx >= 6)

    monitor = watch()
    fit(tmp_path, Unfreezes(), monitor)
    told = [set(ratios) for _, ratios, _ in rule_of(monitor).told]
    assert told == [{"net.3"}] * 6 + [{"net.0", "net.3"}] * 6


def test_the_training_is_the_same_bit_for_bit_and_nothing_is_left(tmp_path: Path) -> None:
    for settings in ({}, {"plugins": "fp16"}, {"accumulate_grad_batches": 3}):
        ends = []
        for callbacks in ([], [UpdateRatioMonitor(1)]):
            module = Regression(batch_norm=True, dropout=0.2)
            fit(tmp_path, module, *callbacks, **settings)
            ends.append(weights_of(module))
        assert same(*ends)
    assert callbacks[0]._meters == {}
    assert callbacks[0]._losses == []
    copy.deepcopy(callbacks[0])


# ---------------------------------------------------------------------------------------------------------- tell


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    findings: list[Any] = []
    monkeypatch.setattr(module_under_test, "tell", lambda trainer, finding: findings.append(finding))
    return findings


def test_it_logs_a_few_scalars_or_all(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Regression(), UpdateRatioMonitor(2), logger=CSVLogger(tmp_path), log_every_n_steps=4)
    names = {name for name in trainer.callback_metrics if name.startswith("update_ratio")}
    assert names == {"update_ratio/median", "update_ratio/lowest", "update_ratio/highest"}
    trainer = fit(tmp_path, Regression(), UpdateRatioMonitor(2, log_all=True), log_every_n_steps=4)
    names = {name for name in trainer.callback_metrics if name.startswith("update_ratio")}
    assert len(names) == 5
    assert {"update_ratio/net.0", "update_ratio/net.3"} < names
    trainer = fit(tmp_path, Adversaries(), UpdateRatioMonitor(2), log_every_n_steps=4)
    assert "update_ratio/median/1" in trainer.callback_metrics


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fit(tmp_path, Regression(), UpdateRatioMonitor(2), logger=CSVLogger(tmp_path, "csv"), log_every_n_steps=4)
    assert len(list(tmp_path.rglob("update_ratio.png"))) == 1
    logger = TensorBoardLogger(tmp_path, "tensorboard")
    fit(tmp_path, Regression(), UpdateRatioMonitor(2), logger=logger, log_every_n_steps=4)
    assert len(list(tmp_path.rglob("update_ratio.png"))) == 1


def test_without_matplotlib_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fit(tmp_path, Regression(), UpdateRatioMonitor(2), logger=CSVLogger(tmp_path), log_every_n_steps=4)
    (line,) = [line for file in tmp_path.rglob("findings.jsonl") for line in file.read_text().splitlines()]
    assert json.loads(line)["rule"] == "no figures"


def test_a_healthy_run_is_told_nothing(tmp_path: Path, told: list[Any]) -> None:
    fit(tmp_path, Regression(batch_norm=True), UpdateRatioMonitor(), batches=600)
    assert told == []


@pytest.mark.parametrize("rate", [1e-4, 3.0])
def test_a_rate_that_is_wrong_is_named(rate: float, tmp_path: Path, told: list[Any]) -> None:
    make = lambda p: torch.optim.Adam(p, lr=rate)  # noqa: E731
    fit(tmp_path, Regression(make_optimizer=make), UpdateRatioMonitor(10), batches=1000 if rate < 1 else 300, size=64)
    expected = f"learning rate looks too {'low' if rate < 1 else 'high'}"
    assert [finding.rule for finding in told] == [expected]
    assert told[0].severity == "warning"


class Broken(Regression):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.extra = nn.Linear(16, 16)

    def loss(self, batch: Any) -> Tensor:
        hidden = self.net[1](self.net[0](batch[0]))
        if self.how == "detached":
            with torch.no_grad():
                more = self.extra(hidden)
        else:
            more = self.extra(hidden) * (0.0 if self.how == "zero" else 1.0)
        return (self.net[3](hidden + more) - batch[1]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        body = [*self.net.parameters()]
        if self.how in ("forgotten", "forgotten and detached"):
            return torch.optim.Adam(body, 0.01)
        rate = {"slow": 1e-14, "gated": 0.0}.get(self.how, 0.01)
        return torch.optim.Adam([{"params": body}, {"params": self.extra.parameters(), "lr": rate}], 0.01)


@pytest.mark.parametrize(
    ("how", "reason", "text"),
    [
        ("detached", "no gradient", "no gradient reaches"),
        ("zero", "zero gradient", "gradient is zero"),
        ("slow", "rounding", "lost in rounding"),
        ("gated", None, ""),
        ("used", None, ""),
    ],
)
def test_a_layer_that_never_changes_and_why(
    how: str, reason: str | None, text: str, tmp_path: Path, told: list[Any]
) -> None:
    fit(tmp_path, Broken(how), UpdateRatioMonitor(10), batches=250)
    assert [finding.rule for finding in told] == ["layer never changes"] * (reason is not None)
    if reason is not None:
        (finding,) = told
        assert finding.evidence == {"layers": "extra", "reason": reason, "measured_updates": 25}
        assert text in finding.message
        assert "None of 25 measured updates changed extra" in finding.message
        assert finding.severity == "warning"


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_a_layer_that_never_changes_without_a_learning_rate(
    defaults: dict[str, None], tmp_path: Path, told: list[Any]
) -> None:
    fit(tmp_path, WithoutRate(defaults), watch(), batches=30)
    assert [finding.evidence["layers"] for finding in told if finding.rule == "layer never changes"] == ["unused"]


def test_parameters_that_no_optimizer_has(tmp_path: Path, told: list[Any]) -> None:
    fit(tmp_path, Broken("forgotten"), UpdateRatioMonitor(), log_every_n_steps=2)
    (finding,) = told
    assert (finding.rule, finding.severity) == ("not in any optimizer", "warning")
    assert "extra.weight, extra.bias, though they get a gradient" in finding.message
    told.clear()

    class Target(Regression):
        """A copy that only ever predicts; harmless."""

        def __init__(self) -> None:
            super().__init__()
            self.target = copy.deepcopy(self.net)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net.parameters(), 0.01)

    fit(tmp_path, Target(), UpdateRatioMonitor(), log_every_n_steps=2)
    assert [finding.severity for finding in told] == ["info"]


def test_a_layer_far_from_the_others_is_named(tmp_path: Path, told: list[Any]) -> None:
    class Slow(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(2, nn.Linear(16, 16))

        def configure_optimizers(self) -> Any:
            slow, rest = self.net[0].parameters(), [*self.net[2].parameters(), *self.net[-1].parameters()]
            return torch.optim.Adam([{"params": slow, "lr": 1e-5}, {"params": rest}], 0.01)

    fit(tmp_path, Slow(), UpdateRatioMonitor(10), batches=400)
    (finding,) = told
    assert (finding.rule, finding.severity) == ("layer far from the others", "info")
    assert finding.evidence["layer"] == "net.0"
    assert "times as small as" in finding.message


def test_what_was_told_is_not_told_again(tmp_path: Path, told: list[Any]) -> None:
    fit(tmp_path, Broken("detached"), UpdateRatioMonitor(1), batches=500, log_every_n_steps=10)
    assert len(told) == 1
    assert told[0].step < 200  # before the end


# ---------------------------------------------------------------------------------------------------------- the rest


def test_a_second_training_starts_anew(tmp_path: Path) -> None:
    monitor = UpdateRatioMonitor(1)
    for _ in range(2):
        fit(tmp_path, Regression(), monitor)
        assert monitor.rule[0].seen == 12
    assert monitor._updates == {0: 12}


def test_what_is_not_read_yet_is_saved(tmp_path: Path) -> None:
    monitor, states = watch(5), []

    class Saves(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(monitor.state_dict())

    fit(tmp_path, Regression(), monitor, Saves(), log_every_n_steps=1000)
    torch.save(states[7], tmp_path / "state")
    restored = UpdateRatioMonitor(5)
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert restored._updates == {0: 8}
    assert len(restored._unread) == 2
    restored._read()
    assert restored.rule[0].seen == 2
    assert str(restored.rule[0].newest) == str(rule_of(monitor).told[1][1])


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.__class__ = DeepSpeedStrategy
    with pytest.raises(MisconfigurationException, match="cannot see the weights of DeepSpeed"):
        UpdateRatioMonitor().on_fit_start(trainer, Regression())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"every_n_steps": 2.0}, TypeError, "every_n_steps must be a whole number"),
        ({"per": "tensor"}, ValueError, "per must be 'layer' or 'group' or 'parameter', got 'tensor'"),
        ({"log_all": "no"}, TypeError, "log_all must be True or False"),
        ({"turns": 0}, ValueError, "turns must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UpdateRatioMonitor(**arguments)


def test_the_hooks_work_beside_clipping(tmp_path: Path) -> None:
    monitor, by_hand = watch(), ByHand()
    fit(tmp_path, Regression(), PercentileGradientClipping(), monitor, by_hand)
    for (_, ratios, _), expected in zip(rule_of(monitor).told, by_hand.ratios):
        assert ratios == pytest.approx(expected, rel=2e-5)
