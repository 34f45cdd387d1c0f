"""What every recipe promises, for each name that the package exports; a new export joins by being exported."""

import copy
import inspect
import pickle
import random
import types
import typing
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from matrix import RECIPES
from models import Adversaries, Regression, fp16, quiet_trainer, regression_data, same, weights_of

import lightning_recipes

NAMES = lightning_recipes.__all__
ARGUMENTS: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val_loss", "strict": False},  # cannot do without
    "OverfitCheck": {"max_steps": 10},  # the default takes its time, and these runs are many
    "SnapshotEnsemble": {"cycles": 2},  # more do not fit into the shortest runs
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:ensemble at step", "ignore:ensemble not judged", "ignore:validation data in the training data"
)  # toys


def make(name: str) -> Any:
    return getattr(lightning_recipes, name)(**ARGUMENTS.get(name, {}))


def fit(folder: Path, callbacks: list[pl.Callback], module: Any = None, epochs: int = 2, **settings: Any) -> pl.Trainer:
    if settings.get("plugins") == "fp16":
        settings["plugins"] = [fp16()]
    torch.manual_seed(3)
    trainer = quiet_trainer(
        folder, **{"max_epochs": epochs, "log_every_n_steps": 4, "callbacks": callbacks, **settings}
    )
    trainer.fit(module or Regression(batch_norm=True, dropout=0.1), regression_data(), regression_data(2))
    return trainer


def test_the_exports_are_sorted_and_there() -> None:
    assert sorted(NAMES) == NAMES
    assert all(hasattr(lightning_recipes, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str) -> None:
    exported = getattr(lightning_recipes, name)
    text = inspect.getdoc(exported)
    assert text is not None
    summary, *_ = text.split("\n")
    assert summary.endswith(".")
    for section in ("Example:", "References:"):
        assert section in text
    arguments = text.partition("\nArgs:")[2].partition("\nRaises:")[0]
    for argument in list(inspect.signature(exported).parameters):
        assert f"\n    {argument}: " in arguments


@pytest.mark.parametrize("name", RECIPES)
def test_the_linter_keeps_other_callbacks_from_importing_it(name: str) -> None:
    rules = (Path(lightning_recipes.__file__).parent / "callbacks" / "ruff.toml").read_text(encoding="utf-8")
    assert f'"{getattr(lightning_recipes, name).__module__}".msg' in rules


@pytest.mark.parametrize("name", RECIPES)
def test_its_arguments_are_plain_and_typed(name: str) -> None:
    hints, needed = typing.get_type_hints(getattr(lightning_recipes, name).__init__), ARGUMENTS.get(name, {})
    for parameter in inspect.signature(getattr(lightning_recipes, name)).parameters.values():
        assert parameter.name in hints
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert isinstance(parameter.default, (int, float, str, bool, types.NoneType)) or parameter.name in needed


@pytest.mark.parametrize("name", RECIPES)
def test_it_can_be_copied_and_pickled_before_fit(name: str, tmp_path: Path) -> None:
    for recipe in (copy.deepcopy(make(name)), pickle.loads(pickle.dumps(make(name)))):
        fit(tmp_path, [recipe], epochs=1)


@pytest.mark.parametrize("name", RECIPES)
def test_it_takes_no_name_that_lightning_gives_to_callbacks(name: str) -> None:
    assert not {"log", "log_dict"} & {*vars(type(make(name))), *vars(make(name))}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"plugins": "fp16"},
        {"accumulate_grad_batches": 5},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_val_batches": 0},
        {"num_sanity_val_steps": 0, "val_check_interval": 5},
        {"max_epochs": -1, "max_steps": 7},
        {"gradient_clip_algorithm": "norm", "deterministic": True},
        {"log_every_n_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_it_works_in_every_kind_of_run(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = fit(tmp_path, [make(name)], **settings)
    module = trainer.lightning_module
    assert all(value.isfinite().all() for value in module.state_dict().values())
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    assert "lightning_module_state_dict" not in vars(trainer.strategy)
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)


@pytest.mark.parametrize("name", RECIPES)
def test_barebones(name: str, tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, barebones=True, max_epochs=1, callbacks=[make(name)], default_root_dir=tmp_path
    )
    with pytest.warns(UserWarning, match=r"self.log\(.*barebones"):
        trainer.fit(Regression(), regression_data(), regression_data(2))


@pytest.mark.parametrize("name", RECIPES)
def test_manual_optimization_with_two_optimizers(name: str, tmp_path: Path) -> None:
    fit(tmp_path, [make(name)], Adversaries())


class Returns(Regression):
    """Its training step returns a dict, or None, in turn."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "more": 1} if batch_idx % 3 else None


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_steps_that_return_a_dict_or_none(name: str, tmp_path: Path) -> None:
    fit(tmp_path, [make(name)], Returns())


@pytest.mark.parametrize("name", RECIPES)
def test_an_iterable_without_length(name: str, tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(regression_data())

    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[make(name)])
    try:
        trainer.fit(Regression(), torch.utils.data.DataLoader(Stream(), batch_size=None), regression_data(2))
    except MisconfigurationException as error:
        assert "needs the length of the run" in str(error)


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_alone_and_before_and_after_fit(name: str, tmp_path: Path) -> None:
    module = Regression()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[make(name)])
    before = weights_of(module)
    for _ in range(2):
        trainer.validate(module, regression_data(2), verbose=False)
        trainer.test(module, regression_data(2), verbose=False)
        trainer.predict(module, regression_data(2))
        assert same(weights_of(module), before)
        trainer.fit(module, regression_data(), regression_data(2))
        before = weights_of(module)


@pytest.mark.parametrize("name", RECIPES)
def test_a_second_fit(name: str, tmp_path: Path) -> None:
    recipe, module = make(name), Regression()
    trainer = fit(tmp_path, [recipe], module, epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, regression_data(), regression_data(2))
    fit(tmp_path, [recipe], Regression(batch_norm=True), epochs=1)
    assert trainer.global_step == 24


@pytest.mark.parametrize("name", RECIPES)
def test_its_state_is_what_it_saw_and_is_restored_whole(name: str, tmp_path: Path) -> None:
    recipe = make(name)
    fit(tmp_path, [recipe], Regression(), accumulate_grad_batches=2)
    state = recipe.state_dict()
    torch.save(state, tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    restored = make(name)
    restored.load_state_dict(loaded)
    assert str(restored.state_dict()) == str(state)
    assert str(state) != str(make(name).state_dict())
    configuration = set(inspect.signature(type(recipe)).parameters)
    assert not configuration & set(state)


@pytest.mark.parametrize("name", RECIPES)
def test_two_of_a_kind_work_or_are_refused(name: str, tmp_path: Path) -> None:
    try:
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[make(name), make(name)])
    except RuntimeError as error:
        assert "more than one stateful callback" in str(error)
        return
    trainer.fit(Regression(), regression_data(), regression_data(2))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_before_backward"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_weights_that_were_trained(
    name: str, hook: str, error: type[BaseException], tmp_path: Path
) -> None:
    class Breaks(pl.Callback):
        trained: dict[str, Any]

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self.trained = weights_of(pl_module)

    def broken(trainer: pl.Trainer, *args: Any) -> None:
        if hook == "on_train_batch_end":
            Breaks.on_train_batch_end(breaks, trainer, *args)
        if trainer.global_step >= 12 and not trainer.sanity_checking:
            raise error("on purpose")

    breaks = Breaks()
    setattr(breaks, hook, broken)
    module = Regression()
    with pytest.raises((RuntimeError, SystemExit)):
        fit(tmp_path, [make(name), breaks], module)
    assert same(weights_of(module), breaks.trained)


class Task(Regression):
    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> Any:
        return regression_data()

    def val_dataloader(self) -> Any:
        return regression_data(2)


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])


def command_line(*arguments: str) -> LightningCLI:
    fixed = [
        "--seed_everything=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
    ]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=1"]
    return LightningCLI(Task, args=["fit", *fixed, *quiet, *arguments], save_config_kwargs={"overwrite": True})


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_configured_from_the_command_line_and_yaml(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"lightning_recipes.{name}"
    given = [f"--trainer.callbacks.{argument}={value}" for argument, value in ARGUMENTS.get(name, {}).items()]
    with pytest.raises(SystemExit):
        command_line(f"--trainer.callbacks+={path}", *given, "--print_config")
    printed = capsys.readouterr().out
    assert f"class_path: {path}\n" in printed
    (tmp_path / "config.yaml").write_text(printed)
    for arguments in ([f"--trainer.callbacks+={path}", *given], [f"--config={tmp_path / 'config.yaml'}"]):
        trainer: Any = command_line(*arguments).trainer
        assert any(isinstance(callback, getattr(lightning_recipes, name)) for callback in trainer.callbacks)


@pytest.mark.parametrize("name", RECIPES)
def test_its_help_reads_well(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(f"--trainer.callbacks.help=lightning_recipes.{name}")
    printed = capsys.readouterr().out
    for parameter in inspect.signature(getattr(lightning_recipes, name)).parameters:
        assert f".{parameter}" in printed


@pytest.mark.parametrize("name", RECIPES)
def test_the_trainer_of_pytorch_lightning_takes_it_in_a_list(name: str, tmp_path: Path) -> None:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Module(pytorch_lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=[make(name)],
    )
    trainer.fit(Module(), regression_data())
    assert trainer.global_step == 12


@pytest.mark.parametrize("name", RECIPES)
def test_it_works_with_the_defaults_of_a_trainer(name: str, tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[make(name)], default_root_dir=tmp_path)
    trainer.fit(Regression(), regression_data(), regression_data(2))
    assert trainer.global_step == 12


ORDERS = [RECIPES, RECIPES[::-1], *(random.Random(seed).sample(RECIPES, len(RECIPES)) for seed in range(6))]


@pytest.mark.parametrize("settings", [{}, {"plugins": "fp16"}, {"accumulate_grad_batches": 3}], ids=str)
def test_all_together_give_the_same_run_in_every_order(settings: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for number, order in enumerate(ORDERS if not settings else ORDERS[:3]):
        recipes: list[pl.Callback] = [make(name) for name in order]
        recipes.insert(1, ModelCheckpoint(tmp_path / str(number), save_top_k=-1, every_n_train_steps=4))
        trainer = fit(tmp_path, recipes, **settings)
        ends.append((weights_of(trainer.lightning_module), trainer.callback_metrics))
    for weights, metrics in ends[1:]:
        assert same(weights, ends[0][0])
        assert metrics == ends[0][1]
