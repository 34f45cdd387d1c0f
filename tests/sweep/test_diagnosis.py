"""The tree on trainings of real digits."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from models import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import InitialLossCheck, InstabilityDetector, LearningCurves, UpdateRatioMonitor
from lightning_recipes.callbacks.telling import tell
from lightning_recipes.core.curves import CurvesRule
from lightning_recipes.core.findings import Finding
from lightning_recipes.sweep import diagnose, two_sample_test

Split = tuple[Tensor, Tensor]


@functools.cache
def digits() -> dict[str, Split]:
    """Real handwritten digits: 900 to train, 300 held out, 500 to validate."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = (images[order].float() / 16 - 0.3) / 0.38, labels[order]
    parts = {"train": slice(0, 900), "held_out": slice(900, 1200), "val": slice(1200, 1700)}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def trained(make: Callable[[], nn.Module], data: Split, seed: int = 0, steps: int = 400) -> nn.Module:
    torch.manual_seed(seed)
    net, (inputs, targets) = make(), data
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        part = torch.randint(len(inputs), (32,))
        loss = nn.functional.cross_entropy(net(inputs[part]), targets[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def losses(net: nn.Module, data: Split) -> Tensor:
    """Of each example."""
    return nn.functional.cross_entropy(net(data[0]), data[1], reduction="none")


def of_seeds(make: Callable[[], nn.Module], data: Split) -> list[float]:
    return [float(losses(trained(make, data, seed, 250), data).mean()) for seed in range(3)]


def test_a_network_that_is_too_small() -> None:
    data = digits()["train"]
    smaller = of_seeds(lambda: perceptron(64, 1, 10), data)
    net = trained(lambda: perceptron(64, 2, 10), data)
    diagnosis = diagnose(losses(net, data), losses(net, digits()["val"]), 0.1, smaller_train_loss=smaller)
    assert diagnosis.leaf == "model bias"
    assert "larger" in diagnosis.cures[0]
    larger = of_seeds(lambda: perceptron(64, 16, 10), data)
    assert diagnose(losses(net, data), trivial_loss=math.log(10), larger_train_loss=larger).leaf == "model bias"
    for_larger = diagnose(larger, trivial_loss=math.log(10), larger_train_loss=losses(healthy(), data))
    assert for_larger.leaf != "model bias"


def test_a_deep_network_that_does_not_train_while_a_shallow_one_does() -> None:
    data = digits()["train"]

    def deep() -> nn.Module:
        return perceptron(64, *[32] * 12, 10, activation=nn.Sigmoid)

    shallow = of_seeds(lambda: perceptron(64, 32, 10, activation=nn.Sigmoid), data)
    for reference in ({"target_loss": 0.1}, {"trivial_loss": math.log(10)}):
        diagnosis = diagnose(of_seeds(deep, data), smaller_train_loss=shallow, **reference)
        assert diagnosis.leaf == "optimization"


@functools.cache
def overfitted() -> nn.Module:
    return trained(lambda: perceptron(64, 128, 10), few(), steps=1500)


@functools.cache
def few() -> Split:
    """Few samples, three in ten with a wrong label."""
    inputs, labels = (each[:150] for each in digits()["train"])
    wrong = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < 0.3
    return inputs, torch.where(wrong, (labels + 3) % 10, labels)


def test_few_samples_with_wrong_labels() -> None:
    net, val = overfitted(), digits()["val"]
    train, validation, held_out = (losses(net, data) for data in (few(), val, digits()["held_out"]))
    with_held_out = diagnose(train, validation, 0.3, held_out_loss=held_out)
    with_inputs = diagnose(train, validation, trivial_loss=math.log(10), train_inputs=few()[0], val_inputs=val[0])
    assert (with_held_out.leaf, with_inputs.leaf) == ("overfitting", "overfitting")
    assert diagnose(train, validation, 0.3).leaf == "cannot tell"


@pytest.mark.parametrize(
    "change",
    [lambda images: -images, lambda images: images.roll(2, 2), lambda images: images.rot90(1, (1, 2))],
    ids=["inverted", "shifted", "rotated"],
)
def test_validation_data_of_another_distribution(change: Callable[[Tensor], Tensor]) -> None:
    train, (inputs, labels) = digits()["train"], digits()["val"]
    val = change(inputs.view(-1, 8, 8)).flatten(1), labels
    net = healthy()
    found = [losses(net, data) for data in (train, val, digits()["held_out"])]
    assert diagnose(*found[:2], 0.3, held_out_loss=found[2]).leaf == "mismatch"
    diagnosis = diagnose(*found[:2], 0.3, train_inputs=train[0], val_inputs=val[0])
    assert diagnosis.leaf == "mismatch"
    assert float(diagnosis.finding.evidence["auc"]) > 0.95


@functools.cache
def healthy() -> nn.Module:
    return trained(lambda: perceptron(64, 64, 10), digits()["train"])


def test_a_healthy_one() -> None:
    found = [losses(healthy(), digits()[name]) for name in ("train", "val")]
    for reference in ({"target_loss": 0.3}, {"trivial_loss": math.log(10)}):
        assert diagnose(*found, **reference).leaf == "done"


# ---------------------------------------------------------------------------------------------- the trainer


def curves(train: Callable[[float], float], val: Callable[[float], float]) -> CurvesRule:
    rule, generator = CurvesRule(), torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(2000, generator=generator)).tolist()
    for step in range(1, 2001):
        rule.update(train(step / 2000) + noise[step - 1], 0.1, step)
        if step % 100 == 0:
            rule.check(val(step / 2000), step)
    return rule


def with_curves(folder: Path, rule: CurvesRule) -> pl.Trainer:
    callback = LearningCurves()
    callback.rule = rule
    return quiet_trainer(folder, callbacks=[callback])


def test_losses_and_readings_come_from_the_curves(tmp_path: Path) -> None:
    slow = curves(lambda share: 2.3 - 0.3 * share, lambda share: 2.3 - 0.3 * share)
    assert diagnose(trivial_loss=2.3, trainer=with_curves(tmp_path, slow)).leaf == "optimization"
    overfits = curves(lambda share: 2.3 * math.exp(-9 * share), lambda share: 0.6 + (share - 0.3) ** 2)
    diagnosis = diagnose(trivial_loss=2.3, trainer=with_curves(tmp_path, overfits))
    assert diagnosis.leaf == "overfitting"
    assert float(diagnosis.finding.evidence["val_loss"]) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(TypeError, match="there must be a training loss"):
        diagnose(trivial_loss=2.3, trainer=with_curves(tmp_path, CurvesRule()))


@pytest.mark.parametrize("what", ["train", "val"])
@pytest.mark.parametrize("from_", [0.0, 0.5, 0.97])
def test_what_is_not_finite_at_the_end_is_mended_first(what: str, from_: float, tmp_path: Path) -> None:
    sound, breaks = (lambda share: 0.05), (lambda share: 0.05 if share < from_ else math.nan)
    rule = curves(breaks if what == "train" else sound, breaks)
    diagnosis = diagnose(trivial_loss=2.3, trainer=with_curves(tmp_path, rule))
    assert diagnosis.leaf == "defect"
    said = (
        "The training loss has not been finite since step" if what == "train" else "val_loss is not finite since step"
    )
    assert said in diagnosis.finding.message
    assert diagnosis.finding.advice.startswith("Mend that first: ")
    best = diagnose(0.05, 0.05, trivial_loss=2.3, trainer=with_curves(tmp_path, rule))  # of a checkpoint, say
    assert best.leaf == "done"


class Digits(pl.LightningModule):
    def __init__(self, rate: float, last: nn.Module) -> None:
        super().__init__()
        self.net, self.rate = nn.Sequential(perceptron(64, 64, 10), last), rate

    def loss(self, batch: Split) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Split, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


def fitted(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, max_epochs: int = 1) -> pl.Trainer:
    loaders = [DataLoader(TensorDataset(*digits()[name]), 32, shuffle=name == "train") for name in ("train", "val")]
    trainer = quiet_trainer(folder, max_epochs=max_epochs, callbacks=list(callbacks))
    trainer.fit(module, *loaders)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_where_it_began_is_known_to_the_detector(tmp_path: Path) -> None:
    class Breaks(Digits):
        def training_step(self, batch: Split, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.nan if self.global_step == 150 else 1)

    trainer = fitted(tmp_path, Breaks(0.02, nn.Identity()), LearningCurves(), InstabilityDetector(), max_epochs=8)
    diagnosis = diagnose(trainer=trainer, trivial_loss=2.3)
    assert diagnosis.leaf == "defect"
    assert "at step 150 there was a warning of not finite (diverged beside it)" in diagnosis.finding.message
    trainer = fitted(tmp_path, Breaks(0.02, nn.Identity()), LearningCurves(), InstabilityDetector("skip"), max_epochs=8)
    assert diagnose(trainer=trainer, trivial_loss=2.3).leaf == "done"


@pytest.mark.filterwarnings("ignore")  # which is what is tested
@pytest.mark.parametrize(
    ("rate", "last", "leaf", "said"),
    [
        (0.02, nn.Identity(), "done", "which is not high either"),
        (0.02, nn.Softmax(1), "defect", "a warning of softmax applied twice: "),
        (
            0.0002,
            nn.Identity(),
            "optimization",
            "and it was told: falls too slowly, learning rate looks too low",
        ),
    ],
)
def test_a_run_is_asked_for_what_its_callbacks_know(
    rate: float, last: nn.Module, leaf: str, said: str, tmp_path: Path
) -> None:
    callbacks = InitialLossCheck(), LearningCurves(), UpdateRatioMonitor()
    trainer = fitted(tmp_path, Digits(rate, last), *callbacks, max_epochs=15)
    diagnosis = diagnose(trainer=trainer)
    assert diagnosis.leaf == leaf
    assert said in diagnosis.finding.message
    assert diagnosis.finding.step == trainer.global_step
    assert diagnosis.finding.evidence.get("trivial_loss", 2.3) == pytest.approx(2.3, abs=0.03)
    assert diagnose(0.01, 0.02, target_loss=0.1).leaf == "done"  # of no trainer


class Says(pl.Callback):
    def __init__(self, **findings: Literal["info", "warning", "error"]) -> None:
        self.findings = findings

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for rule, severity in self.findings.items():
            tell(trainer, Finding(rule.replace("_", " "), severity, f"Saw {rule}.", f"Mend {rule}.", 0, {}, "none"))


@pytest.mark.filterwarnings("ignore")  # which is what is told
def test_the_severest_of_what_was_told_before_the_training_comes_first(tmp_path: Path) -> None:
    says = Says(flags="warning", sign="error", hint="info", learning_rate_too_low="warning")
    diagnosis = diagnose(0.01, target_loss=0.1, trainer=fitted(tmp_path, Digits(0.02, nn.Identity()), says))
    assert diagnosis.leaf == "defect"
    assert "a warning of sign (flags beside it): Saw sign." in diagnosis.finding.message
    assert diagnosis.cures == ("Mend sign.", "Mend flags.")


@pytest.mark.filterwarnings("ignore")  # which is what is told
def test_a_check_that_failed_is_no_defect_of_the_training(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Digits(0.02, nn.Identity()), Says(not_checked="warning"))
    assert diagnose(0.01, 0.02, target_loss=0.1, trainer=trainer).leaf == "done"


@pytest.mark.filterwarnings("ignore")  # which is what is told
def test_a_learning_rate_told_of_before_the_training_explains_its_loss(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Digits(0.02, nn.Identity()), Says(learning_rate_too_low="warning"))
    high = diagnose(1.0, target_loss=0.1, trainer=trainer)
    assert high.leaf == "optimization"
    assert high.finding.message.endswith("and it was told: learning rate too low.")
    low = diagnose(0.01, 0.02, target_loss=0.1, trainer=trainer)
    assert low.leaf == "done"
    assert low.finding.message.endswith("not high either, though it was told: learning rate too low.")


class TwoCriteria(Digits):
    def loss(self, batch: Split) -> Tensor:
        outputs = self.net(batch[0])
        return nn.functional.cross_entropy(outputs, batch[1]) + nn.functional.mse_loss(outputs.sum(1), batch[0].sum(1))


@pytest.mark.parametrize(("kind", "known"), [(Digits, True), (TwoCriteria, False)])
def test_the_constant_of_one_of_two_criteria_is_not_that_of_their_sum(
    kind: type[Digits], known: bool, tmp_path: Path
) -> None:
    check = InitialLossCheck()
    trainer = fitted(tmp_path, kind(0.001, nn.Identity()), check)
    assert len(check.results) == (1 if known else 2)
    assert ("trivial_loss" in diagnose(1.0, trainer=trainer).finding.evidence) is known


# ---------------------------------------------------------------------------------------------- two samples


def test_samples_of_one_distribution_are_told_apart_as_seldom_as_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    tests = []
    for seed in range(8):
        first, second = (torch.randn(150, 8, generator=generator) for _ in range(2))
        tests.append(two_sample_test(first, second, seed=seed))
    assert sum(abs(each.auc - 0.5) > each.chance for each in tests) <= 2
    assert sum(each.auc for each in tests) / 8 == pytest.approx(0.5, abs=0.03)
    assert all(each.samples == 300 for each in tests)


def test_what_only_a_curved_border_tells_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(400, 2, generator=generator), 2.5 * torch.randn(400, 2, generator=generator)
    found = two_sample_test(narrow, wide)
    assert found.auc - found.error > 0.7
    again = two_sample_test(narrow, wide, features=lambda inputs: inputs.abs())
    assert again.auc > 0.75


def test_batches_pairs_and_numbers_are_taken_and_the_random_state_left_alone() -> None:
    inputs, labels = digits()["train"]
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        whole = two_sample_test(inputs[:100], inputs[100:200])
    batches = [(inputs[:40], labels[:40]), (inputs[40:100], labels[40:100])]
    assert two_sample_test(batches, inputs[100:200]) == whole
    assert torch.equal(torch.random.get_rng_state(), before)
    assert two_sample_test(torch.zeros(30), torch.ones(30)).auc == 1.0
    assert two_sample_test(torch.zeros(30), torch.zeros(30)).auc == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "there must be a training loss"),
        ({"train_loss": 1.0, "trivial_loss": 0.0}, ValueError, "trivial_loss must be a number above 0"),
        ({"train_loss": 1.0, "target_loss": math.nan}, ValueError, "target_loss must be a finite number"),
        ({"train_loss": 1.0, "trainer": 3}, TypeError, "trainer must be a Trainer, got 3"),
        ({"train_loss": 1.0, "train_inputs": torch.zeros(30, 1)}, TypeError, "the inputs of both sets"),
        ({"train_loss": 1.0, "train_inputs": torch.zeros(9, 1), "val_inputs": torch.zeros(30, 1)}, ValueError, "20"),
        ({"train_loss": 1.0, "train_inputs": [3], "val_inputs": torch.zeros(30, 1)}, TypeError, "must be a tensor"),
        (
            {"train_loss": 1.0, "train_inputs": torch.zeros(30, 1), "val_inputs": torch.zeros(30, 2)},
            ValueError,
            "must have one shape",
        ),
        (
            {"train_loss": 1.0, "train_inputs": torch.full((30, 1), math.nan), "val_inputs": torch.zeros(30, 1)},
            ValueError,
            "inputs must be finite",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose(**arguments)
