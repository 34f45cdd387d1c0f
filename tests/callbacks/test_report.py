import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from models import Adversaries, Regression, Resumable, SeedEachStep, quiet_trainer, regression_data, same, weights_of
from pages import Page
from ranks import run_on_ranks
from torch import Tensor

from lightning_recipes import EarlyStopping, InstabilityDetector, PercentileGradientClipping, TrainingReport
from lightning_recipes.__main__ import main
from lightning_recipes.callbacks.telling import log_scalars, note
from lightning_recipes.core.findings import Finding
from lightning_recipes.report.reading import read_run
from lightning_recipes.report.run import STEP_LOSS

pytestmark = pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")


class Logs(Regression):
    """Logs in every way that there is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_plain", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_end", float(self.current_epoch))


class Tells(pl.Callback):
    """A recipe that logs and tells at a step, behind the report."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if (step + 1) % 4 == 0:
            log_scalars(trainer, {"told": float(step)})
        if step == 10:
            note(trainer, Finding("seen", "warning", "It was seen.", "Cure it.", step))


def train(folder: Path, *callbacks: pl.Callback, module: Any = None, epochs: int = 3, **settings: Any) -> pl.Trainer:
    trainer = quiet_trainer(
        folder, **{"max_epochs": epochs, "log_every_n_steps": 4, "callbacks": list(callbacks), **settings}
    )
    trainer.fit(module or Logs(), regression_data(), regression_data(2), ckpt_path=settings.pop("ckpt_path", None))
    return trainer


def points(report: TrainingReport, name: str) -> list[tuple[int, float]]:
    return [(each.last, each.mean) for each in report.rule.series[name].bins]


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_without_a_logger_everything_logged_is_on_the_page(tmp_path: Path) -> None:
    report = TrainingReport()
    train(tmp_path, report, Tells())
    assert report.path == tmp_path / "report.html"
    assert len(points(report, STEP_LOSS)) == 36
    assert [step for step, _ in points(report, "train_plain")] == list(range(3, 36, 4))
    assert points(report, "told") == [(step, float(step)) for step in range(3, 36, 4)]
    assert [value for _, value in points(report, "epoch_end")] == [0.0, 1.0, 2.0]
    assert [step for step, _ in points(report, "val_loss")] == [11, 23, 35]
    assert "train_loss" not in report.rule.series
    assert {"train_loss_step", "train_loss_epoch", "lr-Adam"} <= set(report.rule.series)
    text = page(tmp_path).text
    for said in (
        "Finished after 36 updates",
        "It was seen.",
        "Cure it.",
        "training loss, mean ± spread",
        "torch",
    ):
        assert said in text
    assert "## Findings" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_it_has_what_a_logger_gets_at_the_same_steps(tmp_path: Path) -> None:
    report = TrainingReport()
    trainer = train(tmp_path, report, Tells(), LearningRateMonitor(), logger=CSVLogger(tmp_path))
    folder = Path(str(trainer.log_dir))
    (folder / "report.json").unlink()
    logged = read_run(folder).series
    del logged["epoch"]
    for name, series in logged.items():
        if not name.startswith("lr-"):
            assert [each.last for each in series.bins] == [step for step, _ in points(report, name)]
            values = [value for _, value in points(report, name)]
            assert [each.mean for each in series.bins] == pytest.approx(values, rel=1e-6)
    assert set(report.rule.series) == {*logged, STEP_LOSS}
    assert [step for step, _ in points(report, "lr-Adam")] == list(range(3, 36, 4))


def test_the_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    ends = [
        train(tmp_path / str(number), *callbacks, module=Logs(batch_norm=True, dropout=0.3))
        for number, callbacks in enumerate([(), (TrainingReport(1e-9),)])
    ]
    assert same(weights_of(ends[0].lightning_module), weights_of(ends[1].lightning_module))
    metrics = [dict(end.callback_metrics) for end in ends]
    assert metrics[0].keys() == metrics[1].keys()
    assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[0])
    assert "update_train_epoch_metrics" not in vars(ends[1]._logger_connector)


def test_the_loss_is_that_of_training_step_with_accumulation(tmp_path: Path) -> None:
    reports = [TrainingReport(), TrainingReport()]
    for report, accumulate in zip(reports, (1, 4)):
        optimizer = {"make_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
        train(tmp_path, report, module=Logs(**optimizer), epochs=1, accumulate_grad_batches=accumulate)  # type: ignore[arg-type]
    first, second = ([value for _, value in points(report, STEP_LOSS)] for report in reports)
    assert first == pytest.approx(second, rel=1e-6)
    assert [step for step, _ in points(reports[1], STEP_LOSS)] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no <b>luck</b>"), "Failed by RuntimeError"),
        (KeyboardInterrupt(), "Interrupted by Key"),
        (SIGTERMException(), "Interrupted by SIGTERM"),
    ],
)
def test_a_run_that_breaks_off_has_its_page(error: BaseException, said: str, tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 20:
                raise error

    with suppress(RuntimeError, SystemExit):
        train(tmp_path, TrainingReport(), Breaks())
    assert said in page(tmp_path).text
    assert "after 20 updates" in page(tmp_path).text
    assert "Best val_loss" in page(tmp_path).text


def test_stopping_early_is_said_with_its_reason(tmp_path: Path) -> None:
    train(tmp_path, TrainingReport(), LightningEarlyStopping("val_loss", mode="max", patience=1), epochs=5)
    assert "Stopped early (Monitored metric val_loss did not improve" in page(tmp_path).text


def test_it_is_refreshed_at_validations_but_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Looks(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(page(tmp_path).text)

    train(tmp_path, TrainingReport(1e-9), Looks(), num_sanity_val_steps=0)
    assert ["Running" in text for text in seen] == [True] * 3
    assert "Running after 12 updates" in seen[0]
    writes: list[Any] = []
    monkeypatch.setattr(TrainingReport, "_write", lambda *_: writes.append(1))
    train(tmp_path, TrainingReport(), val_check_interval=1)
    assert writes == [1, 1]  # at the start and at the end
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_findings_of_an_earlier_run_in_the_folder_are_not_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, TrainingReport(), Tells())
    assert len((tmp_path / "findings.jsonl").read_text().splitlines()) == 2
    assert "2 times" not in page(tmp_path).text
    assert main(["report", str(tmp_path)]) == 0
    text = page(tmp_path).text
    assert "It was seen." in text
    assert "2 times" not in text
    assert "Finished after 36 updates" in text
    assert "TrainingReport" in text


def test_a_resumed_run_shows_both_parts_and_resumes_exactly(tmp_path: Path) -> None:
    class SavesAt17(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 17:
                trainer.save_checkpoint(tmp_path / "17.ckpt")

    def part(folder: str, epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, TrainingReport]:
        report = TrainingReport()
        callbacks = [SeedEachStep(), report, Tells(), SavesAt17()]
        trainer = quiet_trainer(tmp_path / folder, max_epochs=epochs, callbacks=callbacks, log_every_n_steps=4)
        trainer.fit(Logs(dropout=0.2), Resumable(regression_data()), regression_data(2), ckpt_path=ckpt_path)
        return trainer, report

    whole, expected = part("whole", 4)
    torch.load(tmp_path / "17.ckpt", weights_only=True)
    resumed, report = part("resumed", 4, tmp_path / "17.ckpt")
    assert same(weights_of(whole.lightning_module), weights_of(resumed.lightning_module))
    for name in {*expected.rule} - {"train_loss_epoch"}:  # Lightning forgets the epoch's losses before a save
        assert points(report, name) == points(expected, name)
    text = page(tmp_path / "resumed").text
    for said in ("resumed at 17", "Finished after 48 updates", "It was seen."):
        assert said in text
    assert main(["report", str(tmp_path / "resumed")]) == 0
    assert "It was seen." in page(tmp_path / "resumed").text
    assert "2 times" not in page(tmp_path / "resumed").text


def test_a_fit_with_nothing_left_to_do_leaves_the_page_alone(tmp_path: Path) -> None:
    report = TrainingReport()
    trainer = train(tmp_path, report, epochs=2)
    before = (tmp_path / "report.html").read_text(encoding="utf-8")
    trainer.fit(trainer.lightning_module, regression_data(), regression_data(2))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert "Finished after 24 updates" in before
    train(tmp_path / "none", TrainingReport(), epochs=0)
    assert not (tmp_path / "none").exists()


def test_a_killed_run_has_not_the_page_of_the_one_before(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                seen.append((page(tmp_path).text, read_run(tmp_path).ended))

    train(tmp_path, TrainingReport(), epochs=1)
    train(tmp_path, TrainingReport(), Looks(), epochs=1)
    ((text, ended),) = seen
    assert "Running" in text
    assert "Finished" not in text
    assert ended == ""


def test_metrics_that_are_named_like_the_halves_of_others_stay(tmp_path: Path) -> None:
    class ByHand(Logs):
        def on_train_epoch_end(self) -> None:
            self.log("train_plain_epoch", float(self.current_epoch))

    report = TrainingReport()
    train(tmp_path, report, module=ByHand())
    assert [step for step, _ in points(report, "train_plain")] == list(range(3, 36, 4))
    assert [value for _, value in points(report, "train_plain_epoch")] == [0.0, 1.0, 2.0]
    assert "train_loss" not in report.rule.series


@pytest.mark.parametrize("names", [("body", "head"), ("body",), ()])
def test_learning_rates_have_the_names_of_their_groups(names: tuple[str, ...], tmp_path: Path) -> None:
    def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        groups = [{"params": each} for each in ([first], rest)] if len(names) != 1 else [{"params": [first, *rest]}]
        return torch.optim.SGD([{**group, **({"name": names[at]} if names else {})} for at, group in enumerate(groups)])

    report = TrainingReport()
    train(
        tmp_path, report, LearningRateMonitor(), module=Logs(make_optimizer=make_optimizer), logger=CSVLogger(tmp_path)
    )
    rates = {name for name in report.rule if name.startswith("lr-")}
    assert rates == {f"lr-SGD/{name}" for name in names or ("pg1", "pg2")}


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    report = TrainingReport()
    trainer = train(tmp_path, report, Tells(), epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, regression_data(), regression_data(2))
    assert len(points(report, STEP_LOSS)) == 24
    assert "It was seen." in page(tmp_path).text
    train(tmp_path / "new", report, epochs=1)
    assert len(points(report, STEP_LOSS)) == 12
    assert "It was seen." not in page(tmp_path / "new").text


def test_beside_the_recipes_their_doings_are_on_the_page(tmp_path: Path) -> None:
    class Poisoned(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.global_step == 20 and not self.trainer.sanity_checking else loss

    with pytest.warns(UserWarning, match="not finite"):
        train(tmp_path, TrainingReport(), PercentileGradientClipping(), InstabilityDetector("skip"), module=Poisoned())
    text = page(tmp_path).text
    for said in ("update skipped", "Gradient norm", "clipped_fraction", "action='skip'", "1 values not finite"):
        assert said in text


def test_an_exception_of_any_length_is_cut(tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                raise RuntimeError("x" * 50_000)

    with pytest.raises(RuntimeError):
        train(tmp_path, Breaks(), TrainingReport())
    assert "x…" in page(tmp_path).text
    assert "x" * 300 not in page(tmp_path).text
    assert "after 12 updates" in page(tmp_path).text


def test_hyper_parameters_are_escaped_and_cut(tmp_path: Path) -> None:
    class Named(Logs):
        def __init__(self, title: str = "<script>alert(1)</script>", blob: str = "x" * 5000) -> None:
            super().__init__()
            self.save_hyperparameters()

    train(tmp_path, TrainingReport(), module=Named(), epochs=1)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "x" * 300 not in html
    assert "alert(1)" in page(tmp_path).text


def test_callbacks_are_there_with_what_they_were_asked(tmp_path: Path) -> None:
    class Asked(pl.Callback):
        def __init__(self, options: Any = None, title: str = "", kept: int = 3) -> None:
            self.options, self.title, self.kept = options, title, kept

    train(tmp_path, TrainingReport(), Asked({}), Asked({"width": 8}, "x" * 5000), Asked(), epochs=1)
    text = page(tmp_path).text
    assert "options={}" in text
    assert "options={'width': 8}, title='xxx" in text
    assert "x" * 300 not in text
    assert "with its defaults" in text


def test_what_was_asked_is_not_what_came_of_it(tmp_path: Path) -> None:
    train(tmp_path, TrainingReport(), EarlyStopping("val_loss", patience=5), epochs=2)
    text = page(tmp_path).text
    assert "monitor='val_loss', patience=5" in text
    assert "min_delta" not in text


def test_values_that_are_not_finite_are_no_trouble(tmp_path: Path) -> None:
    class Broken(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(math.nan))

    train(tmp_path, TrainingReport(), module=Broken(), epochs=2)
    assert "val_loss was not finite" in page(tmp_path).text
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_manual_optimization_has_its_learning_rates(tmp_path: Path) -> None:
    report = TrainingReport()
    train(tmp_path, report, module=Adversaries())
    assert {"lr-SGD", "lr-SGD-1", "val_loss"} <= set(report.rule.series)
    assert STEP_LOSS not in report.rule.series


def test_nothing_is_left_behind_by_a_fast_dev_run_or_an_evaluation(tmp_path: Path) -> None:
    train(tmp_path, TrainingReport(), fast_dev_run=True)
    quiet_trainer(tmp_path, callbacks=[TrainingReport()]).validate(Logs(), regression_data(2), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.warns(UserWarning, match="report.html could not be written") as said:
        trainer = train(tmp_path, TrainingReport(1e-9))
    assert sum("could not be written" in str(each.message) for each in said) == 1
    assert trainer.global_step == 36
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_page_that_cannot_be_drawn_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_recipes.callbacks.report.render", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="could not write its page: ZeroDivisionError"):
        assert train(tmp_path, TrainingReport()).global_step == 36


def test_findings_that_cannot_be_read_end_no_training(tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").mkdir()
    report = TrainingReport()
    train(tmp_path, report)
    assert report.state_dict()["findings"] == []
    assert report.path is not None


def test_memory_is_bounded(tmp_path: Path) -> None:
    report = TrainingReport()
    train(tmp_path, report, ModelCheckpoint(tmp_path / "kept"), epochs=50, check_val_every_n_epoch=10)
    assert len(report.rule.series[STEP_LOSS].bins) <= 256
    assert sum(each.count for each in report.rule.series[STEP_LOSS].bins) == 600
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_what_lies_on_a_device_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [TrainingReport(), TrainingReport()]
    train(tmp_path, reports[0])
    monkeypatch.setattr("lightning_recipes.callbacks.measuring.free_to_read", lambda _: False)
    monkeypatch.setattr("lightning_recipes.callbacks.report.UNREAD", 10)
    train(tmp_path, reports[1])
    for name in reports[0].rule:
        assert points(reports[0], name) == points(reports[1], name)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "often", True])
def test_bad_arguments_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="every_n_seconds"):
        TrainingReport(value)


def train_on_ranks(folder: Path) -> tuple[float, list[str]]:
    class Synced(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

        def on_train_epoch_end(self) -> None:
            self.log("rank", float(self.global_rank), sync_dist=True)

    report = TrainingReport(1e-9)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    trainer = train(folder, report, module=Synced(), devices=2, strategy=strategy)
    return sum(float(value.sum()) for value in trainer.lightning_module.state_dict().values()), sorted(report.rule)


@pytest.mark.filterwarnings("ignore")
def test_one_of_two_ranks_writes_and_none_waits(tmp_path: Path) -> None:
    (first, names), (second, others) = run_on_ranks(train_on_ranks, tmp_path)
    assert first == second
    assert {"rank", "val_loss", "train_loss_epoch", STEP_LOSS} <= set(names)
    assert others == []
    text = page(tmp_path).text
    assert "rank: 0.5" in text
    assert "2 x cpu" in text
