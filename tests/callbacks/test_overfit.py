"""OverfitCheck, and that neither check leaves a trace on the run behind it."""

import json
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from models import Adversaries, Regression, Resumable, fp16, quiet_trainer, regression_data, same, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from lightning_recipes import EMAWeights, InitialLossCheck, OverfitCheck
from lightning_recipes.callbacks import overfit as module_under_test
from lightning_recipes.callbacks.rehearsal import unharmed

pytestmark = pytest.mark.filterwarnings(
    "ignore:not in any optimizer",
    "ignore:validation data in the training data",  # those of the tests are
    "ignore:gradients not set to zero",
    "ignore:wrong sign of the loss",
    "ignore:nothing to train",
    "ignore:examples mixed",
    "ignore:evaluation mode in training",
    "ignore:Found .* module.s. in eval mode",
    "ignore:learning rate too",
    "ignore:dead units",
    "ignore:model bias",
    "ignore:input without information",
    "ignore:loss not finite",
    "ignore:small sample not learnt",
    "ignore:no gradient",
    "ignore:weight decay too large",
    "ignore:evaluation mode differs",
    "ignore:You're resuming from a checkpoint that ended before",
)


class Noted(Regression):
    """Whatever a check could leave behind: random numbers of three kinds, lists, a schedule, logs, buffers."""

    def __init__(self, **more: Any) -> None:
        super().__init__(batch_norm=True, dropout=0.2, schedule=True, **more)
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.drawn.append(random.random() + float(np.random.rand()) + float(torch.rand(())))
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


class ByHand(Adversaries):
    drawn = ()


def train(folder: Path, callbacks: list[Any], module: Any, loader: Any, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    environment = dict(os.environ)
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=[*callbacks, EMAWeights(0.9)],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, loader, regression_data(2))
    assert dict(os.environ) == environment
    lines = (Path(trainer.log_dir or "") / "metrics.csv").read_text().splitlines()
    losses = [dict(zip(lines[0].split(","), line.split(","), strict=True)).get("loss", "") for line in lines[1:]]
    return {
        "weights": str(weights_of(module)),
        "optimizers": str([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "random": str([torch.get_rng_state(), np.random.get_state(), random.getstate()]),
        "drawn": module.drawn,
        "losses": [loss for loss in losses if loss],
        "steps": trainer.global_step,
        "loader": str(getattr(loader, "state_dict", dict)()),
    }


def loader_of(kind: str) -> Any:
    if kind == "resumable":
        return Resumable(regression_data())
    generator = torch.Generator().manual_seed(2) if kind == "generator" else None
    return regression_data(shuffle=True, generator=generator)


@pytest.mark.parametrize(
    ("settings", "loader", "manual"),
    [
        ({}, "shuffled", False),
        ({}, "generator", False),
        ({}, "resumable", False),
        ({"accumulate_grad_batches": 3}, "shuffled", False),
        ({"plugins": "fp16"}, "shuffled", False),
        ({"precision": "bf16-mixed", "gradient_clip_val": 0.5}, "shuffled", False),
        ({}, "shuffled", True),
    ],
)
def test_the_training_behind_the_checks_is_bit_for_bit_the_one_without(
    settings: dict[str, Any], loader: str, manual: bool, tmp_path: Path
) -> None:
    ends = []
    for name, callbacks in (("without", []), ("with", [InitialLossCheck(), OverfitCheck(max_steps=10)])):
        own = {**settings, "plugins": [fp16()]} if "plugins" in settings else settings
        module = ByHand() if manual else Noted()
        ends.append(train(tmp_path / name, callbacks, module, loader_of(loader), **own))
    for key, value in ends[0].items():
        assert ends[1][key] == value, key


class Ends(Regression):
    """Takes away in the end what it trains with."""

    there: ClassVar[list[str]] = []

    def setup(self, stage: str) -> None:
        self.there.append("cache")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.there
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        self.trainer.callback_metrics["val_loss"]

    def teardown(self, stage: str) -> None:
        self.there.pop()


class Takes(Regression):
    """Changes the batch that it is given."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        targets = batch.pop()
        return nn.functional.mse_loss(self.net(batch.pop().add_(1)), targets)


class Averages(Regression):
    """Prepares batches with what it has seen of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        return [batch[0] - self.mean, batch[1]]


class Asks(Regression):
    """Looks at the data that it is trained on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert len(self.trainer.train_dataloader.dataset) == 96
        return self.trainer.datamodule.scale * self.loss(batch)


class Given(pl.LightningDataModule):
    scale = 2.0
    torn_down = 0

    def train_dataloader(self) -> Any:
        return regression_data()

    def teardown(self, stage: str) -> None:
        self.torn_down += 1


class Unrated(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"weight_decay": 0.1})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.1 * parameter.grad)
        return loss


def compiled() -> Any:
    torch.compiler.reset()
    return torch.compile(Regression(batch_norm=True), backend="eager")


class Draws(Dataset[Any]):
    """Has random numbers of its own, somewhere."""

    def __init__(self) -> None:
        self.data, self.transforms = regression_data().dataset, [SimpleNamespace(rng=np.random.default_rng(0))]

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        return inputs + self.transforms[0].rng.random(), targets


class Epochs(Sampler[int]):
    epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(torch.randperm(96, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return 96


class Stream(IterableDataset[Any]):
    def __init__(self, once: bool) -> None:
        self.data, self.epoch = list(regression_data().dataset), 0  # type: ignore[call-overload]
        self.left = iter(self.data) if once else None

    def __iter__(self) -> Any:
        self.epoch += 1
        return self.left or iter(self.data[self.epoch :] + self.data[: self.epoch])


@pytest.mark.filterwarnings("ignore:The .* is deprecated", "ignore:overfits", "ignore:constant")
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (Ends, regression_data),
        (Takes, regression_data),
        (Averages, regression_data),
        (Asks, Given),
        (lambda: Regression(make_optimizer=Unrated), regression_data),
        (compiled, regression_data),
        (Regression, lambda: DataLoader(torch.utils.data.Subset(Draws(), range(90)), 8)),
        (Regression, lambda: DataLoader(regression_data().dataset, 8, sampler=Epochs())),
        (Regression, lambda: DataLoader(Stream(False), 8)),
        (Regression, lambda: DataLoader(Stream(True), 8)),
    ],
)
def test_whatever_modules_and_data_do_the_checks_leave_no_trace(make: Any, data: Any, tmp_path: Path) -> None:
    ends, batches = [], []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches[-1].append(str(batch))

    for callbacks in ([], [InitialLossCheck(), OverfitCheck(max_steps=10)]):
        torch.manual_seed(5)
        batches.append([])
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[*callbacks, Note()])
        module, given = make(), data()
        trainer.fit(module, given) if data is Given else trainer.fit(module, given, regression_data(2))
        ends.append(weights_of(trainer.lightning_module))
        assert getattr(given, "torn_down", 1) == 1
    assert batches[0] == batches[1]
    assert len(batches[0]) >= 12
    assert same(*ends)
    rules = [json.loads(line)["rule"] for file in tmp_path.glob("findings*") for line in file.read_text().splitlines()]
    assert "not checked" not in rules
    stream = getattr(getattr(given, "dataset", None), "left", None)
    assert bool(callbacks[1].fits) == (stream is None)


def classes_of(inputs: Tensor) -> Tensor:
    return (inputs[:, :3] + 0.1 * inputs[:, 3:6]).argmax(1)


class Classifier(pl.LightningModule):
    """Three classes.

    Args:
        rate: Learning rate of Adam.
        parts: That the optimizer has.
    """

    def __init__(self, rate: float = 0.01, parts: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
        self.rate, self.parts = rate, parts

    def outputs(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.outputs(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        parts = self.parameters() if self.parts is None else self.net[self.parts].parameters()
        return torch.optim.Adam(parts, self.rate, weight_decay=0.1)


class Flipped(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": -super().training_step(batch, batch_idx)}


class NeverZeroes(Classifier):
    def optimizer_zero_grad(self, *_: Any) -> None:
        pass


class Mixes(Classifier):
    def outputs(self, inputs: Tensor) -> Tensor:
        return self.net(inputs.t().reshape(inputs.shape))  # type: ignore[no-any-return]


class Blind(Classifier):
    def outputs(self, inputs: Tensor) -> Tensor:
        return self.net(torch.zeros_like(inputs))  # type: ignore[no-any-return]


class Asleep(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.eval()
        return super().training_step(batch, batch_idx)


class PretrainedBody(Classifier):
    """Its frozen part is asleep, as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)).eval().requires_grad_(False)

    def outputs(self, inputs: Tensor) -> Tensor:
        return self.net(inputs + self.body(inputs))  # type: ignore[no-any-return]


class Frozen(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Zeros(Classifier):
    """No weight is anything else at the start."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Dead(Classifier):
    """No hidden unit gives anything but 0."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.net[0].bias, -20.0)  # type: ignore[arg-type]  # of a linear layer


class Narrow(pl.LightningModule):
    """Copies its inputs through a single number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(), nn.Linear(32, 1), nn.Linear(1, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[0].clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class ZeroHead(Classifier):
    """Starts at equal logits, as it may."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.net[3].weight)


class Decays(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.5)


class Twice(Classifier):
    """Two optimizers have all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [super(Twice, self).configure_optimizers() for _ in range(2)]


class Accumulates(Classifier):
    """By hand, and right: two backward passes for an update."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=False)
        for half in (slice(0, 8), slice(8, None)):
            loss = nn.functional.cross_entropy(self.outputs(batch[0][half]), batch[1][half], reduction="sum")
            self.manual_backward(loss / len(batch[0]))
        optimizer.step()


def check(folder: Path, module: Any, inputs: Any = None, shuffle: bool = True, **given: Any) -> tuple[Any, list[str]]:
    recipe = OverfitCheck(**given)
    torch.manual_seed(1)
    x = torch.randn(96, 8) if inputs is None else inputs
    loader = DataLoader(TensorDataset(x, classes_of(torch.nan_to_num(x))), 32, shuffle=shuffle)
    quiet_trainer(folder, max_steps=1, callbacks=[recipe]).fit(module, loader)
    lines = (folder / "findings.jsonl").read_text().splitlines()
    return recipe, [json.loads(line)["rule"] for line in lines]


@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (Classifier, ["overfits a small sample"]),
        (Accumulates, ["overfits a small sample"]),
        (Flipped, ["wrong sign of the loss"]),
        (Asleep, ["evaluation mode in training", "overfits a small sample"]),
        (PretrainedBody, ["overfits a small sample"]),
        (NeverZeroes, ["gradients not set to zero", "overfits a small sample"]),
        (Mixes, ["examples mixed", "overfits a small sample"]),
        (Blind, ["input without information", "no gradient"]),
        (Frozen, ["nothing to train"]),
        (Twice, ["parameters in several optimizers", "overfits a small sample"]),
        (Zeros, ["no gradient", "input without information"]),
        (Dead, ["dead units"]),
        (Narrow, ["model bias"]),
        (ZeroHead, ["overfits a small sample"]),
        (Decays, ["weight decay too large", "overfits a small sample"]),
        (lambda: Classifier(parts=slice(2)), ["not in any optimizer"]),
        (lambda: Classifier(1e-5), ["learning rate too low"]),
        (lambda: Classifier(30.0), ["learning rate too high"]),
    ],
)
def test_each_defect_is_named_before_training(make: Any, rules: list[str], tmp_path: Path) -> None:
    if make is Frozen:
        with pytest.raises(RuntimeError, match="does not require grad"):
            check(tmp_path, make())
        assert json.loads((tmp_path / "findings.jsonl").read_text())["rule"] == "nothing to train"
        return
    recipe, found = check(tmp_path, make())
    if rules[-1] == "overfits a small sample":
        assert set(rules) == set(found)
        assert recipe.fits[0].excess <= 0.03
        assert recipe.fits[0].steps <= 200
    else:
        assert found[0] == rules[0]
    assert recipe.symptoms.examples == 16


def test_inputs_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    _, found = check(tmp_path, Classifier(), torch.full((96, 8), torch.nan))
    assert found[0] == "loss not finite"


def test_noise_of_the_modules_own_mixes_no_examples(tmp_path: Path) -> None:
    class Noisy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            noise = 0.01 * torch.randn(batch[0].shape, generator=self.generator)
            return super().training_step([batch[0] + noise, batch[1]], batch_idx)

    module = Noisy()
    module.generator = torch.Generator()
    assert "examples mixed" not in check(tmp_path, module)[1]


def test_a_sample_of_one_label_is_made_up_for_from_later_batches(tmp_path: Path) -> None:
    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    inputs = inputs[classes_of(inputs).argsort()]
    recipe, found = check(tmp_path, Classifier(), inputs, shuffle=False)
    assert found == ["overfits a small sample"]
    assert not recipe.symptoms.one_label


def test_a_schedule_with_a_warmup_is_at_its_top_and_warmed_up_to(
    tmp_path: Path,
) -> None:
    rates: list[float] = []

    class Warmed(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=500)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    _, found = check(tmp_path, Warmed())
    assert found == ["overfits a small sample"]
    assert rates[:12] == pytest.approx([0.001 * step for step in range(1, 11)] + [0.01, 0.01])


@pytest.mark.parametrize("recipe", [OverfitCheck, InitialLossCheck])
@pytest.mark.parametrize("kind", ["plateau", "one cycle", "parts of the run"])
def test_a_schedule_is_made_as_in_the_run_and_stays_where_it_begins(recipe: Any, kind: str, tmp_path: Path) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer, all_steps = super().configure_optimizers(), int(self.trainer.estimated_stepping_batches)
            assert (all_steps, self.trainer.max_epochs) == (9, 3)
            assert self.trainer.train_dataloader is not None
            scheduler: Any = {
                "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
                "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, all_steps),
                "parts of the run": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, all_steps // 6),
            }[kind]()
            interval = "epoch" if kind == "plateau" else "step"
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val_loss"},
            }

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.outputs(batch[0]), batch[1]))

    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, classes_of(inputs)), 32)
    quiet_trainer(tmp_path, max_epochs=3, callbacks=[recipe()]).fit(Scheduled(), loader, loader)
    found = [json.loads(line)["rule"] for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert found[-1] in ("overfits a small sample", "initial loss as expected")


def test_it_takes_several_small_batches_and_batches_it_cannot_divide(tmp_path: Path) -> None:
    class Odd(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, targets, _ = batch
            return nn.functional.cross_entropy(self.outputs(inputs), targets)

    def loader(*more: Any) -> Any:
        torch.manual_seed(0)
        data: Any = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), *more) for _ in range(6)]
        return DataLoader(data, batch_size=None)

    small = OverfitCheck()
    quiet_trainer(tmp_path / "small", max_steps=1, callbacks=[small]).fit(Classifier(), loader())
    assert (small.symptoms.examples, small.fits[0].learnt) == (16, True)
    odd = OverfitCheck()
    quiet_trainer(tmp_path / "odd", max_steps=1, callbacks=[odd]).fit(Odd(), loader("a name"))
    assert (odd.symptoms.examples, odd.fits[0].learnt) == (0, True)


@pytest.mark.parametrize(("size", "told"), [(1, True), (8, False), (32, False)])
def test_batch_norm_of_few_examples_is_another_network_in_evaluation_mode(
    size: int, told: bool, tmp_path: Path
) -> None:
    class Normed(Classifier):
        """What tells the classes apart is the level of a signal, which BatchNorm takes from a single one."""

        def __init__(self) -> None:
            super().__init__(0.02)
            self.net = nn.Sequential(nn.Conv1d(1, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))

    torch.manual_seed(0)
    signals = torch.randn(64, 1, 8) * torch.rand(64, 1, 1).mul(8).exp2() + 10 * torch.randn(64, 1, 1)
    data = DataLoader(TensorDataset(signals, torch.randint(3, (64,))), size)
    recipe = OverfitCheck()
    quiet_trainer(tmp_path, max_steps=1, callbacks=[recipe]).fit(Normed(), data)
    rules = [json.loads(line)["rule"] for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert recipe.fits[0].learnt
    assert ("evaluation mode differs" in rules) == told


@pytest.mark.parametrize("asked", [{"examples": 1}, {"max_steps": 9}])
def test_bad_arguments_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))} must be"):
        OverfitCheck(**asked)


def test_it_is_skipped_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[OverfitCheck(max_steps=10)])
    trainer.fit(Regression(), regression_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(module_under_test, "rehearse", None)
    recipe = OverfitCheck(max_steps=10)
    resumed = quiet_trainer(tmp_path, max_steps=4, callbacks=[recipe])
    resumed.fit(Regression(), regression_data(), ckpt_path=tmp_path / "run.ckpt")
    assert len(recipe.fits) >= 1
    dev = OverfitCheck()
    quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[dev]).fit(Regression(), regression_data())
    assert not dev.fits


@pytest.mark.parametrize("repeated", [False, True])
def test_validation_data_among_the_training_data_are_found(repeated: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(160, 8)
    data = TensorDataset(x, classes_of(x))
    recipe, module = OverfitCheck(), Classifier()
    module.validation_step = module.training_step  # type: ignore[assignment]
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[recipe], num_sanity_val_steps=1)
    val = DataLoader(torch.utils.data.Subset(data, range(80 if repeated else 128, 160)), 16)
    trainer.fit(module, DataLoader(torch.utils.data.Subset(data, range(128)), 32, shuffle=True), val)
    assert recipe.symptoms.repeats.examples == 128
    assert recipe.symptoms.repeats.found == (48 if repeated else 0)
    rules = [json.loads(line)["rule"] for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert ("validation data in the training data" in rules) == repeated


@pytest.mark.parametrize("check", [InitialLossCheck, OverfitCheck])
def test_a_module_that_cannot_be_copied_for_the_check_trains_all_the_same(
    check: type[pl.Callback], tmp_path: Path
) -> None:
    class Once(Regression):
        """Remembers the only trainer that it will work with."""

        def on_fit_start(self) -> None:
            self.own = vars(self).get("own", id(self.trainer))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            noise = torch.rand(())
            if id(self.trainer) != self.own:
                raise RuntimeError("another trainer")
            return noise * super().training_step(batch, batch_idx)

    ends = []
    for callbacks in ([], [check()]):
        torch.manual_seed(0)
        module = Once()
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(module, regression_data(4, 32))
        ends.append(weights_of(module))
    assert same(*ends)
    told = [str(each.message) for each in said if "not checked" in str(each.message)]
    assert len(told) == 1
    assert f"{check.__name__} could not train a copy of the module: RuntimeError: another trainer." in told[0]


def test_of_several_ranks_a_check_that_fails_ends_the_run() -> None:
    ranks: Any = SimpleNamespace(world_size=2)  # the other one may wait for this one
    with pytest.raises(ValueError, match="on one rank"), unharmed(ranks, "OverfitCheck"):
        raise ValueError("on one rank")
