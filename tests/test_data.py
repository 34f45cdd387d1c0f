"""Every recipe, alone and all together, with whatever a Trainer takes as data, and in every use of a Trainer.

A run is cut in the middle of an epoch and resumed. One that only watches leaves the weights as they would be without,
and where Lightning alone ends where the uninterrupted run ends, so do they all, bit for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from matrix import ALL, CHANGE_TRAINING, RECIPES, Loader, SaveOften, Stop, make, same, what_it_ends_with
from models import Regression, SeedEachStep, quiet_trainer, regression_data
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_recipes import LearningCurves

pytestmark = pytest.mark.filterwarnings("ignore")  # toys
BATCHES, EPOCHS, STOP = 11, 2, 16

# ------------------------------------------------------------------------------ what a batch can be


@dataclass
class Example:
    inputs: Tensor
    targets: Tensor
    weight: Tensor | None = None


class Named(NamedTuple):
    inputs: Tensor
    targets: Tensor


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "list": (lambda x, y: [x, y], lambda batch: (batch[0], batch[1])),
    "tensor": (lambda x, y: torch.cat([x, y], 1), lambda batch: (batch[:, :-1], batch[:, -1:])),
    "dict with text and None": (
        lambda x, y: {"id": ["a"] * len(x), "x": x, "weight": None, "y": y},
        lambda batch: (batch["x"], batch["y"]),
    ),
    "nested": (lambda x, y: ({"x": x, "scale": 1.0}, [y, None], 3), lambda batch: (batch[0]["x"], batch[1][0])),
    "dataclass": (Example, lambda batch: (batch.inputs, batch.targets)),
    "named tuple": (Named, lambda batch: (batch.inputs, batch.targets)),
}


class Learns(Regression):
    """From batches of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(dropout=0.2, schedule=True)
        self.kind = kind

    def loss(self, batch: Any) -> Tensor:
        return super().loss(KINDS[self.kind][1](batch))


class LearnsFromTwo(Regression):
    """The batches of two loaders at a time."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self.loss(each) for each in batch.values() if each is not None)


class ValidatesTwice(Regression):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


class PassesOver(Regression):
    """Every third batch, in each way."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else {"loss": self.loss(batch), "more": "text"}


# ------------------------------------------------------------------------------ loaders


class Stream(Loader):
    """Nobody knows how long it is."""

    __len__ = None  # type: ignore[assignment]


class Some:
    """The same, in order."""

    def __iter__(self) -> Iterator[Any]:
        return iter(regression_data(2))


class Workers(Loader):
    """Two processes read ahead."""

    def __iter__(self) -> Iterator[Any]:
        if self.position >= len(self.batches):
            self.position = 0
        rest = [self.batches[number] for number in self.order()[self.position :]]
        for batch in DataLoader(rest, batch_size=None, num_workers=2):  # type: ignore[arg-type]
            self.position += 1
            yield batch


def loader(kind: Any = Loader, batches: int = BATCHES, batch: str = "list") -> Any:
    made = kind(regression_data(batches))
    made.batches = [KINDS[batch][0](*each) for each in made.batches]
    return made


@dataclass
class Case:
    """What a run is given."""

    train: Callable[[], Any] = loader
    module: Callable[[], pl.LightningModule] = lambda: Learns("list")
    val: Callable[[], Any] = lambda: regression_data(2)
    settings: dict[str, Any] = field(default_factory=dict)


def _of_a_kind(kind: str) -> Case:
    return Case(
        lambda: loader(batch=kind),
        lambda: Learns(kind),
        lambda: DataLoader(loader(batches=2, batch=kind).batches, None),
    )


CASES: dict[str, Case] = {
    **{kind: _of_a_kind(kind) for kind in KINDS},
    "no length": Case(lambda: loader(Stream), settings={"max_steps": EPOCHS * BATCHES}),
    "workers": Case(lambda: loader(Workers), val=lambda: regression_data(2, num_workers=1)),
    "two loaders": Case(lambda: CombinedLoader({"a": loader(), "b": loader(batches=14)}, "min_size"), LearnsFromTwo),
    "two loaders, one again and again": Case(lambda: {"a": loader(), "b": loader(batches=3)}, LearnsFromTwo),
    "two loaders, to the end of both": Case(
        lambda: CombinedLoader({"a": loader(), "b": loader(batches=3)}, "max_size"), LearnsFromTwo
    ),
    "two validation loaders": Case(
        module=ValidatesTwice, val=lambda: [regression_data(2), regression_data(1)], settings={"val_check_interval": 4}
    ),
    "validation without length": Case(val=Some),
    "batches passed over": Case(module=PassesOver),
    "limits": Case(
        settings={"limit_train_batches": 9, "limit_val_batches": 1, "inference_mode": False, "max_time": "00:01:00:00"}
    ),
    "every second epoch": Case(settings={"check_val_every_n_epoch": 2, "num_sanity_val_steps": -1}),
    "loaders made anew": Case(settings={"reload_dataloaders_every_n_epochs": 1}),
}


# ------------------------------------------------------------------------------ runs


def train(case: Case, folder: Path, recipes: dict[str, Any], stop: bool = False, resume: bool = False) -> Any:
    """Train; return all that the run ends with."""
    path = folder / "last.ckpt"
    trainer = quiet_trainer(
        folder,
        callbacks=[
            SeedEachStep(),
            *recipes.values(),
            SaveOften(path, validate_every=4),
            *([Stop("exception", STOP)] if stop else []),
        ],
        **{"max_epochs": EPOCHS, "log_every_n_steps": 7, "num_sanity_val_steps": 1, **case.settings},
    )
    torch.manual_seed(7)
    module = case.module()
    trainer.fit(module, case.train(), case.val(), ckpt_path=path if resume else None)
    return what_it_ends_with(trainer, module, recipes, alone=len(recipes) == 1)


def cut(case: Case, folder: Path, recipes: Callable[[], dict[str, Any]]) -> Any:
    """Stop it in the middle of an epoch, and go on."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        train(case, folder, recipes(), stop=True)
    return train(case, folder, recipes(), resume=True)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """What Lightning alone ends with, uninterrupted and resumed."""

    @cache
    def trained(name: str) -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp("bare")
        return train(CASES[name], folder, {}), cut(CASES[name], folder / "cut", dict)

    return trained


def check(case: Case, recipes: Callable[[], dict[str, Any]], without: tuple[Any, Any], folder: Path) -> None:
    """Go through all that is promised."""
    whole, resumed = train(case, folder, recipes()), cut(case, folder / "cut", recipes)
    if not CHANGE_TRAINING & set(recipes()):
        for watched, alone in zip((whole, resumed), without, strict=True):
            assert same(watched["raw"], alone["raw"]), "the training is another one"
            assert watched["optimizers"] == alone["optimizers"]
    if same(*without):
        for key, value in whole.items():
            assert same(resumed[key], value), f"resumed, {key}"


SAMPLE = {
    *((ALL, case) for case in ("no length", "two loaders, one again and again", "dataclass")),
    ("InitialLossCheck", "workers"),  # each looks at the data before training, or keeps batches
    ("CriticalPointProbe", "batches passed over"),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=[] if (name, case) in SAMPLE else [pytest.mark.everything])
        for name in (*RECIPES, ALL)
        for case in CASES
    ],
)
def test_what_a_recipe_promises(name: str, case: str, bare: Any, tmp_path: Path) -> None:
    names = RECIPES if name == ALL else [name]
    check(CASES[case], lambda: {each: make(each) for each in names}, bare(case), tmp_path)


# ------------------------------------------------------------------------------ the check can fail


class Forgets(LearningCurves):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class WantsPairs(LearningCurves):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mean()


class WantsTheLength(LearningCurves):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        len(trainer.train_dataloader)


class WantsTheLoss(LearningCurves):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        outputs["loss"]


class LooksAhead(LearningCurves):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        next(iter(trainer.train_dataloader["b"]))


class ChangesTheBatch(LearningCurves):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.inputs.mul_(2)


@pytest.mark.parametrize(
    ("broken", "case", "said"),
    [
        (Forgets, "batches passed over", "resumed, states"),
        (WantsPairs, "dataclass", "not subscriptable"),
        (WantsTheLength, "no length", "not callable"),
        (WantsTheLoss, "batches passed over", "loss|not subscriptable"),
        (LooksAhead, "two loaders, one again and again", "the training is another one"),
        (ChangesTheBatch, "dataclass", "the training is another one"),
    ],
)
def test_a_recipe_that_breaks_a_promise_is_found_out(
    broken: type[pl.Callback], case: str, said: str, bare: Any, tmp_path: Path
) -> None:
    with pytest.raises((AssertionError, TypeError, KeyError, AttributeError), match=said):
        check(CASES[case], lambda: {"LearningCurves": broken()}, bare(case), tmp_path)


# ------------------------------------------------------------------------------ uses

WATCH = "all that watch"
USES: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run of three": {"fast_dev_run": 3},
    "overfit_batches": {"overfit_batches": 2},
    "barebones": {"barebones": True},
    "no training": {"limit_train_batches": 0},
    "no epochs": {"max_epochs": 0},
    "no steps": {"max_steps": 0},
    "no time": {"max_time": "00:00:00:00"},
    "all of the sanity check": {"num_sanity_val_steps": -1},
    "half": {"limit_train_batches": 0.5, "limit_val_batches": 0.5, "val_check_interval": 0.5},
    "anomalies": {"detect_anomaly": True, "inference_mode": False},
    "profiler": {"profiler": "simple", "log_every_n_steps": 1},
}


def names_of(name: str) -> list[str]:
    return {ALL: RECIPES, WATCH: [each for each in RECIPES if each not in CHANGE_TRAINING]}.get(name, [name])


def use(folder: Path, recipes: dict[str, Any], settings: dict[str, Any], evaluate: bool = False) -> Any:
    """Train; return all that the run ends with."""
    own = {} if "barebones" in settings else {"max_epochs": 2, "log_every_n_steps": 7}
    trainer = quiet_trainer(folder, callbacks=[SeedEachStep(), *recipes.values()], **{**own, **settings})
    if "barebones" in settings:
        trainer.fit_loop.max_epochs = 2
    torch.manual_seed(7)
    module = Regression(batch_norm=True, dropout=0.1)
    data = regression_data(BATCHES), regression_data(2)
    for _ in range(2 if evaluate else 0):
        before = what_it_ends_with(trainer, module, recipes, alone=False)
        trainer.validate(module, data[1], verbose=False)
        trainer.test(module, data[1], verbose=False)
        trainer.predict(module, data[1])
        after = what_it_ends_with(trainer, module, recipes, alone=False)
        assert same(after["raw"], before["raw"]), "an evaluation has changed the weights"
        trainer.fit(module, *data)
        trainer.fit_loop.max_epochs = 4
    if not evaluate:
        trainer.fit(module, *data)
    return what_it_ends_with(trainer, module, recipes, alone=len(recipes) == 1)


@pytest.fixture(scope="session")
def unwatched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What Lightning alone ends with."""
    return cache(lambda name: use(tmp_path_factory.mktemp("bare"), {}, USES[name]))


SAMPLED_USES = ("barebones", "fast_dev_run of three", "half", "no epochs", "no time")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name == WATCH and kind in SAMPLED_USES else [pytest.mark.everything])
        for name in (*RECIPES, ALL, WATCH)
        for kind in USES
    ],
)
def test_every_use_of_a_trainer(name: str, kind: str, unwatched: Any, tmp_path: Path) -> None:
    names = names_of(name)
    ended = use(tmp_path, {each: make(each) for each in names}, USES[kind])
    if not CHANGE_TRAINING & set(names):
        assert same(ended["raw"], unwatched(kind)["raw"]), "the training is another one"
        assert ended["optimizers"] == unwatched(kind)["optimizers"]


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.everything) for name in RECIPES), ALL])
def test_recipes_begin_anew_in_another_training(name: str, tmp_path: Path) -> None:
    names = names_of(name)
    recipes = {each: make(each) for each in names}
    first = use(tmp_path, recipes, {}, evaluate=True)
    again = use(tmp_path, recipes, {}, evaluate=True)
    for key, value in first.items():
        assert same(again[key], value), f"again, {key}"
