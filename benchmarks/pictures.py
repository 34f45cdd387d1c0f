"""Draw the pictures of the recipes' pages, each from trainings on real data: docs/pictures/<page>.svg.

    python benchmarks/pictures.py [averaging] [clipping] ...

One seed each, to look at; what was measured over many is in benchmarks/LOG.md. Digits are scikit-learn's.
"""

import argparse
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jinja2 import Environment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from markupsafe import Markup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import Data, digits
from digits import DigitClassifier
from do_i_need_warmup import make as residual
from is_it_broken import LargeWeights, SoftmaxTwice
from is_my_run_stuck import Perceptron
from noise_scale import estimated, exact, trained
from why_is_my_loss_spiking import Poisoned

from lightning_recipes import (
    AtomicCheckpointIO,
    CriticalPointProbe,
    EarlyStopping,
    EMAWeights,
    InstabilityDetector,
    LearningCurves,
    LearningRateSchedule,
    PercentileGradientClipping,
    SnapshotEnsemble,
    TrainingReport,
    UpdateRatioMonitor,
    WarmupSweep,
)
from lightning_recipes.core.series import Bin, Series
from lightning_recipes.report import svg
from lightning_recipes.report.svg import Event, Line, Point
from lightning_recipes.sweep import compare_capacity, learning_rate_sweep

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
WIDTH, HEIGHT = 600, 260
LN_10 = math.log(10)


class Watch(pl.Callback):
    """Keep the training loss, and every few updates error and loss on the test data (or what ``measure`` returns).

    Args:
        data: The test data are its.
        every: Updates from one score to the next.
    """

    def __init__(self, data: Data, every: int = 20) -> None:
        self.data, self.every = data, every
        self.train = Series(120)
        self.losses: list[tuple[float, float]] = []
        self.scores: list[tuple[float, float, float]] = []
        self.metrics: list[tuple[float, dict[str, float]]] = []

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"])
        self.train.update(trainer.global_step, loss)
        self.losses.append((trainer.global_step, loss))
        if trainer.global_step % self.every == 0:
            self.scores.append((trainer.global_step, *score(pl_module, self.data)))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.metrics.append((trainer.global_step, values))

    def line(self, name: str, what: str) -> Line:
        """``error`` in percent or ``loss``, of the test data."""
        column = {"error": 1, "loss": 2}[what]
        return Line(name, [plain(each[0], each[column]) for each in self.scores])


@torch.no_grad()
def score(module: pl.LightningModule, data: Data) -> tuple[float, float]:
    """Test error in percent and test loss."""
    images, labels = data.test
    module.eval()
    logits: Tensor = module.net(images)  # type: ignore[operator]
    module.train()
    error = (logits.argmax(1) != labels).float().mean()
    return 100 * error.item(), nn.functional.cross_entropy(logits, labels).item()


def fit(
    module: pl.LightningModule,
    data: Data,
    callbacks: Sequence[pl.Callback],
    steps: int,
    batch_size: int = 32,
    images: int | None = None,
    validate: bool = False,
    **settings: Any,
) -> pl.Trainer:
    """Train for some updates with the first ``images``; ``validate`` on the validation data at each epoch's end."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*callbacks],
            **{
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                **settings,
            },
        )
        train = TensorDataset(*(tensor[:images] for tensor in data.train))
        val = DataLoader(TensorDataset(*data.val), 300) if validate else None
        trainer.fit(module, DataLoader(train, batch_size, shuffle=True, drop_last=True), val)
    return trainer


def classifier(kind: type[DigitClassifier], learning_rate: float, glitches: float = 0.0) -> DigitClassifier:
    pl.seed_everything(0, verbose=False)
    return kind(learning_rate, glitches)


def plain(x: float, y: float) -> Point:
    return Point(x, y, y, y)


def spread(each: Bin) -> Point:
    """Mean and one standard deviation of a bin of losses."""
    return Point(each.step, each.mean, max(1e-4, each.mean - each.deviation), each.mean + each.deviation)


def thinned(points: Sequence[Point], most: int = 150) -> list[Point]:
    return list(points[:: max(1, len(points) // most)])


def draw(title: str, description: str, lines: Sequence[Line], **options: Any) -> Markup:
    return svg.chart("p", title, description, lines, width=WIDTH, height=HEIGHT, **options)


def averaging() -> Markup:
    data = digits(wrong_labels=0.1)
    watch = Watch(data, every=10_000)
    recipe = EMAWeights(validate_raw=True)
    fit(
        classifier(DigitClassifier, 0.05),
        data,
        [recipe, watch],
        1500,
        batch_size=8,
        validate=True,
        val_check_interval=28,
    )
    lines = [
        Line(name, [plain(step, values[key]) for step, values in watch.metrics if key in values])
        for name, key in (("raw weights", "val_loss_raw"), ("their average", "val_loss"))
    ]
    return draw("Validation loss", "Of the raw weights and of their average, over a training with noisy labels.", lines)


def clipping() -> Markup:
    data, lines = digits(), []
    for name, recipes in (("no clipping", []), ("PercentileGradientClipping", [PercentileGradientClipping()])):
        watch = Watch(data, every=10)
        fit(classifier(DigitClassifier, 0.1, glitches=0.02), data, [*recipes, watch], 600)
        lines.append(watch.line(name, "error"))
    return draw("Test error, %", "With and without clipping; one batch in fifty is broken.", lines)


def curvature() -> Markup:
    data, lines, told = digits(), [], []
    for name, learning_rate, weight in (
        ("learning rate 6", 6.0, None),
        ("all weights start at 0", 0.2, 0.0),
        ("learning rate 2", 2.0, None),
    ):
        pl.seed_everything(0, verbose=False)
        watch, probe = Watch(data, every=10_000), CriticalPointProbe(patience=100, at_end=False)
        fit(Perceptron(learning_rate, weight), data, [probe, watch], 2500, batch_size=60, images=60)
        assert probe.finding is not None
        told.append(probe.finding)
        print(f"  {name}: {probe.finding.text}")
        lines.append(Line(f"{name}: {probe.finding.rule}", thinned([plain(*each) for each in watch.losses])))
    return draw("Training loss", "Of three trainings that are stuck, each in something else.", lines)


def curves() -> Markup:
    data = digits(wrong_labels=0.15)
    recipe = LearningCurves()
    fit(classifier(DigitClassifier, 0.02), data, [recipe], 1000, batch_size=16, images=200, validate=True)
    rule, found = recipe.rule, recipe.findings()
    for finding in found:
        print(f"  {finding.text}")
    checks = rule.checks
    lines = [
        Line("training, mean and spread", [spread(each) for each in rule.train.coarse(60)]),
        Line("validation", [plain(step, value) for step, value in zip(checks.steps, checks.values, strict=True)]),
    ]
    since = [Event(float(finding.evidence["best_step"]), "O", finding.rule) for finding in found[:1]]
    return draw("Loss", "Training falls, validation turns.", lines, events=since)


def early_stopping() -> Markup:
    data = digits()
    whole = Watch(data, every=10_000)
    fit(classifier(DigitClassifier, 0.02), data, [whole], 1200, batch_size=16, images=200, validate=True)
    trainer = fit(
        classifier(DigitClassifier, 0.02), data, [EarlyStopping("val_loss")], 1200, 16, images=200, validate=True
    )
    losses = [(step, values["val_loss"]) for step, values in whole.metrics]
    best = min(losses, key=lambda each: each[1])
    print(
        f"  stopped at {trainer.global_step}, best at {best[0]:.0f} with {best[1]:.3f}, in the end {losses[-1][1]:.3f}"
    )
    events = [Event(best[0], "B", "the best weights"), Event(trainer.global_step, "S", "stopped")]
    line = Line("validation loss, trained to the end", [plain(*each) for each in losses if each[0] > 40])
    return draw("Validation loss", "Best at B; stopped at S.", [line], events=events)


def initial_loss() -> Markup:
    data, lines = digits(), []
    for name, kind in (("as it should be", DigitClassifier), ("last weights 30 times too large", LargeWeights)):
        watch = Watch(data, every=10_000)
        fit(classifier(kind, 0.02), data, [watch], 120)
        print(f"  {name}: first loss {watch.losses[0][1]:.2f}")
        lines.append(Line(name, [plain(*each) for each in watch.losses]))
    return draw("Training loss", "Of the first updates.", lines, guides=[(LN_10, "ln 10")])


def instability() -> Markup:
    data, lines = digits(), []
    for name, recipes in (
        ("no recipe", []),
        ("skip", [InstabilityDetector("skip")]),
        ("rewind", [InstabilityDetector("rewind")]),
    ):
        watch = Watch(data, every=10)
        fit(classifier(Poisoned, 0.05), data, [*recipes, watch], 560)
        lines.append(watch.line(name, "error"))
    event = Event(200, "P", "twenty poisoned batches")
    return draw("Test error, %", "Twenty poisoned batches at P.", lines, events=[event])


def noise_scale() -> Markup:
    data, estimates, truths = digits(), [], []
    for updates in (0, 25, 50, 75, 100, 150, 200, 250, 300):
        net = trained(data, updates, seed=0)
        truth, estimate = exact(net, data), estimated(net, data, pairs=400, seed=0)
        print(f"  update {updates}: exact {truth:.3g}, estimate {estimate.text}")
        estimates.append(Point(updates, estimate.value, estimate.low, estimate.high))
        truths.append(plain(updates, truth))
    lines = [
        Line("estimate from 400 updates, 95 % interval", estimates, marks=True),
        Line("exact, from every example's gradient", truths, marks=True),
    ]
    return draw("Gradient noise scale, in examples", "It grows as the loss falls.", lines)


def overfit() -> Markup:
    data, lines = digits(), []
    sample = [(data.train[0][:16], data.train[1][:16])]
    for name, kind in (("as it should be", DigitClassifier), ("softmax twice", SoftmaxTwice)):
        watch = Watch(data, every=10_000)
        module = classifier(kind, 0.02)
        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                accelerator="cpu",
                max_epochs=200,
                callbacks=[watch],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(module, DataLoader(sample, batch_size=None))  # type: ignore[arg-type]
        lines.append(Line(name, [plain(*each) for each in watch.losses]))
    return draw("Loss on sixteen examples", "Learnt by heart, or not.", lines, guides=[(0.03 * LN_10, "learnt")])


def report() -> Markup:
    data = digits()
    with tempfile.TemporaryDirectory() as folder:
        recipes = [InstabilityDetector("skip"), PercentileGradientClipping(), TrainingReport()]
        fit(classifier(Poisoned, 0.05), data, recipes, 560, validate=True, default_root_dir=folder)
        page = (Path(folder) / "report.html").read_text(encoding="utf-8")
    first = re.search(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert first is not None
    return Markup(first.group())


def schedules() -> Markup:
    data, lines = digits(wrong_labels=0.1), []
    for schedule in ("constant", "cosine", "warmup stable decay"):
        watch = Watch(data, every=15)
        recipe = (
            LearningRateSchedule(schedule, warmup_steps=75, warmup="overlaid")
            if schedule == "cosine"
            else (LearningRateSchedule(schedule))
        )
        fit(classifier(DigitClassifier, 0.05), data, [recipe, watch], 1500, batch_size=8)
        lines.append(watch.line(schedule, "loss"))
    return draw("Test loss", "Of one training under three schedules.", lines)


def snapshots() -> Markup:
    data, lines = digits(wrong_labels=0.15), []
    recipe = SnapshotEnsemble(cycles=5)
    for name, learning_rate, callback in (
        ("one cosine", 0.1, LearningRateSchedule("cosine")),
        ("five cycles, the network", 0.2, recipe),
    ):
        watch = Watch(data, every=15)
        module = classifier(DigitClassifier, learning_rate)
        fit(module, data, [callback, watch], 1500, images=300, validate=True)
        lines.append(watch.line(name, "loss"))
    images, labels = data.test
    assert recipe.ensemble is not None
    with torch.no_grad():
        loss = nn.functional.cross_entropy(recipe.ensemble(images), labels).item()
    print(f"  ensemble: {loss:.3f}")
    return draw("Test loss", "Of the networks and of the ensemble.", lines, guides=[(loss, "the ensemble")])


def updates() -> Markup:
    data, lines = digits(wrong_labels=0.1), []
    for rate in (0.5, 0.03, 0.0005):
        recipe = UpdateRatioMonitor(every_n_steps=10)
        fit(classifier(DigitClassifier, rate), data, [recipe], 1000, batch_size=16)
        rule = recipe.rule[0]
        finding = rule.finding()
        told = finding.rule.removeprefix("learning rate ") if finding else "nothing to say"
        if finding:
            print(f"  {rate}: {finding.text}")
        points = [plain(each[0], each[1]) for each in rule.points if each[1] > 0]
        lines.append(Line(f"learning rate {rate:g}: {told}", points))
    return draw("Update over weight", "The median of the layers.", lines, guides=[(1e-3, "1e-3")])


def warmup() -> Markup:
    data, lines = digits(), []
    search = WarmupSweep(base_learning_rate=3e-3, show_progress=False)
    for name, rate, recipes in (
        ("rate 0.0001", 1e-4, []),
        ("rate 0.003", 3e-3, []),
        ("rate 0.003, WarmupSweep", 3e-3, [search]),
    ):
        watch = Watch(data, every=25)
        fit(residual(rate), data, [*recipes, LearningRateSchedule("cosine"), watch], 3000, batch_size=64)
        lines.append(watch.line(name, "error"))
    assert search.result is not None
    print(f"  {search.result.finding.text}")
    return draw("Test error, %", "Of a deep net without normalisation.", lines)


def learning_rate() -> Markup:
    data = digits(wrong_labels=0.1)
    train = DataLoader(TensorDataset(*data.train), 32, shuffle=True, drop_last=True)
    val = DataLoader(TensorDataset(*data.val), 300)
    result = learning_rate_sweep(
        classifier(DigitClassifier, 0.05),
        train_dataloaders=train,
        val_dataloaders=val,
        monitor="val_loss",
        max_steps=700,
        show_progress=False,
        accelerator="cpu",
    )
    print(f"  {result.finding.text}")
    rows = result.table()
    lines = [
        Line(
            f"{name} loss after {steps} updates",
            [plain(row["learning_rate"], row[key]) for row in rows if row["steps"] == steps and row["stable"]],
            marks=True,
        )
        for name, key, steps in (("training", "loss", 100), ("training", "loss", 700), ("validation", "val_loss", 700))
    ]
    return draw("Loss", "Over the learning rate.", lines, x_label="learning rate", log_x=True)


def diagnosis() -> Markup:
    data = digits()
    train = DataLoader(TensorDataset(*data.train), 64, shuffle=True, drop_last=True)

    def deep(depth: int) -> DigitClassifier:
        module = classifier(DigitClassifier, 0.05)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
        module.net = nn.Sequential(*layers, nn.Linear(64, 10))
        return module

    lines = []
    for name, depth in (("twelve sigmoid layers", 12), ("no hidden layer", 0)):
        watch = Watch(data, every=10_000)
        fit(deep(depth), data, [watch], 500, batch_size=64)
        lines.append(Line(name, [spread(each) for each in watch.train.coarse(60)]))
    print(
        f"  {compare_capacity(deep(12), deep(0), steps=500, train_dataloaders=train, accelerator='cpu').finding.text}"
    )
    return draw("Training loss", "The larger network has the higher loss.", lines)


def checkpointing() -> Markup:
    """Megabytes under the name of a checkpoint after a kill, of files written in place and by the recipe."""
    content = {"weights": torch.arange(8_000_000.0)}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, save in (
            ("written in place", torch.save),
            ("AtomicCheckpointIO", AtomicCheckpointIO().save_checkpoint),
        ):
            path = Path(folder) / f"{name}.ckpt"
            save(content, path)
            began = time.perf_counter()
            save(content, path)
            whole = time.perf_counter() - began
            points, torn = [], 0
            for number in range(25):
                share = (number + 0.5) / 25
                process = multiprocessing.get_context("fork").Process(target=_save, args=(save, content, path))
                process.start()
                time.sleep(share * whole)
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                points.append(plain(100 * share, path.stat().st_size / 1e6))
                torn += _torn(path)
                save(content, path)
            print(f"  {name}: {torn} of 25 torn")
            lines.append(Line(name, points, marks=True))
    return draw(
        "Megabytes under the checkpoint's name",
        "After a kill in the middle of a save.",
        lines,
        x_label="moment of the kill, % of the time that a save takes",
    )


def _save(save: Callable[..., None], content: Any, path: Path) -> None:
    save(content, path)


def _torn(path: Path) -> bool:
    try:
        TorchCheckpointIO().load_checkpoint(path)
    except Exception:  # whatever torch says of half a file
        return True
    return False


DRAWN = {
    function.__name__: function
    for function in (
        averaging,
        checkpointing,
        clipping,
        curvature,
        curves,
        diagnosis,
        early_stopping,
        initial_loss,
        instability,
        learning_rate,
        noise_scale,
        overfit,
        report,
        schedules,
        snapshots,
        updates,
        warmup,
    )
}


def standalone(picture: Markup) -> str:
    """A picture with the colours of the report's page, light and dark, and a ground of its own."""
    template = (ROOT / "lightning_recipes" / "report" / "template.html").read_text(encoding="utf-8")
    colours = template[template.index(":root {") : template.index("* { box-sizing")]
    marks = template[template.index(".label {") : template.index(".scroll {")]
    style = Environment(trim_blocks=True).from_string(colours + marks).render()
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups()  # type: ignore[union-attr]
    opening, rest = str(picture).split(">", 1)
    opening = opening.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"', 1)
    ground = f'<rect width="{width}" height="{height}" rx="6" fill="var(--card)"/>'
    title = re.search(r"<title[^>]*>(.*?)</title>", rest).group(1)  # type: ignore[union-attr]
    up = f'<text class="label quiet" x="8" y="{int(height) - 6}">up: {title.lower()}</text>'
    return f"{opening}><style>\n{style}</style>{ground}{rest.replace('</svg>', up + '</svg>')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help=", ".join(DRAWN))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for page in options.pages or DRAWN:
        began = time.perf_counter()
        path = PICTURES / f"{page}.svg"
        path.write_text(standalone(DRAWN[page]()), encoding="utf-8")
        print(
            f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
