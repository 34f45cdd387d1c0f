"""Every argument of every recipe from Python, the command line, YAML and Hydra: good ones and wrong ones."""

import copy
import inspect
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from matrix import RECIPES
from models import Regression, quiet_trainer, regression_data

import lightning_recipes
from lightning_recipes.core.early_stopping import AllOf, AnyOf, Patience
from lightning_recipes.core.schedules import PiecewiseConstant

CORE = "lightning_recipes.core"
STOPPING = f"{CORE}.early_stopping"
CRITERION = {
    "class_path": f"{STOPPING}.AnyOf",
    "init_args": {
        "criteria": [
            {"class_path": f"{STOPPING}.Patience", "init_args": {"amount": 2, "unit": "epochs"}},
            {"class_path": f"{STOPPING}.SuccessiveRises", "init_args": {"rises": 3}},
        ]
    },
}
SCHEDULE = {
    "class_path": f"{CORE}.schedules.PiecewiseConstant",
    "init_args": {"milestones": [2, "0.8 of the run"], "factors": [0.1, 0.01]},
}
GIVEN: list[tuple[str, dict[str, Any]]] = [  # every argument, and none as it is by default
    (
        "CriticalPointProbe",
        {"every_n_steps": 50, "patience": 30, "batches": 4, "max_products": 20, "at_end": False},
    ),
    ("EMAWeights", {"decay": 0.9, "every_n_steps": 2, "start_step": 3, "buffers": "copy"}),
    ("EMAWeights", {"half_life": "0.1 of the run", "device": "cpu", "validate_raw": True}),
    (
        "EarlyStopping",
        {
            "monitor": "val_acc",
            "min_delta": "1%",
            "patience": 5,
            "verbose": True,
            "mode": "max",
            "strict": False,
            "check_finite": False,
            "stopping_threshold": 0.99,
            "divergence_threshold": 0.1,
            "check_on_train_epoch_end": True,
            "log_rank_zero_only": True,
            "criterion": CRITERION,
            "train_monitor": "train_loss",
            "start_epoch": 1,
            "restore_best_weights": False,
        },
    ),
    ("GradientNoiseScale", {"window": 50, "batch_size": 8}),
    ("InitialLossCheck", {"expected_loss": 0.5, "batches": 3}),
    ("InstabilityDetector", {"action": "skip", "max_rewinds": 1, "keep_every": 10, "lr_factor": 0.5}),
    ("LearningCurves", {"monitor": "val_acc", "target_loss": 0.1}),
    ("LearningRateSchedule", {"schedule": SCHEDULE, "warmup_steps": "2 epochs", "warmup": "overlaid", "steps": 90}),
    ("OverfitCheck", {"examples": 4, "max_steps": 20}),
    (
        "PercentileGradientClipping",
        {"percentile": 80.0, "window": 100, "warmup_steps": 5, "skip_nonfinite": True, "measure_only": True},
    ),
    (
        "SnapshotEnsemble",
        {
            "cycles": 2,
            "cycle_steps": 40,
            "warmup_steps": 4,
            "reset_momentum": True,
            "weights": "average",
            "storage": "files",
            "dtype": "float16",
            "weighting": "uniform",
            "combine": "mean",
            "module": "net",
            "split_batch": "torch.utils.data.default_convert",
            "evaluate": True,
        },
    ),
    ("TrainingReport", {"every_n_seconds": 1.5}),
    ("UpdateRatioMonitor", {"every_n_steps": 3, "per": "group", "log_all": True, "turns": 2}),
    (
        "WarmupSweep",
        {
            "base_learning_rate": 0.5,
            "seeds": 2,
            "exhaustive": True,
            "max_steps": 200,
            "path": "sweep.json",
            "show_progress": False,
        },
    ),
    ("WarmupSweep", {"unstable_base_learning_rate": 0.05, "times": 100.0}),
]
WRONG = (None, "nonsense", "", -1, 0, 1.5, math.nan, True, [1], {"a": 1}, 10**9)
NAMES = {  # of anything
    ("EarlyStopping", "monitor"),
    ("EarlyStopping", "train_monitor"),
    ("LearningCurves", "monitor"),
    ("SnapshotEnsemble", "module"),
    ("WarmupSweep", "path"),
}
ARGUMENTS = [
    (name, argument) for name in RECIPES for argument in inspect.signature(getattr(lightning_recipes, name)).parameters
]


def needed(name: str) -> dict[str, Any]:
    return {"monitor": "val_loss"} if name == "EarlyStopping" else {}


def config() -> list[dict[str, Any]]:
    return [{"class_path": f"lightning_recipes.{name}", "init_args": arguments} for name, arguments in GIVEN]


class Task(Regression):
    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("sys.argv", ["train.py"])
    fixed = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    return lambda *arguments: LightningCLI(
        Task, args=["fit", *fixed, *arguments], run=True, seed_everything_default=False, save_config_callback=None
    )


def test_the_table_has_every_argument_and_no_default() -> None:
    given = {(name, argument) for name, arguments in GIVEN for argument in arguments}
    assert given == {*ARGUMENTS}
    for name, arguments in GIVEN:
        parameters = inspect.signature(getattr(lightning_recipes, name)).parameters
        assert all(parameters[argument].default != value for argument, value in arguments.items())


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=lambda value: value)
def test_a_wrong_value_is_refused_with_the_name_of_the_argument(name: str, argument: str) -> None:
    recipe = getattr(lightning_recipes, name)
    default = inspect.signature(recipe).parameters[argument].default
    refused = []
    for value in WRONG:
        try:
            recipe(**{**needed(name), argument: value})
        except (TypeError, ValueError) as error:
            assert argument in str(error)
            assert "got" in str(error)
            assert repr(value) in str(error)
            refused.append(repr(value))
    assert {"[1]", "{'a': 1}"} <= {*refused}
    if default is not None:
        assert "None" in refused
    if not isinstance(default, bool) and argument != "check_on_train_epoch_end":
        assert "True" in refused
    if not isinstance(default, str) and (name, argument) not in NAMES:
        assert "'nonsense'" in refused
    if isinstance(default, bool):
        assert len(refused) == len(WRONG) - 1
    elif isinstance(default, int | float):
        assert "-1" in refused
        assert "nan" in refused


@pytest.mark.parametrize("name", RECIPES)
def test_an_argument_that_it_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'patiense'"):
        getattr(lightning_recipes, name)(**needed(name), patiense=3)


@pytest.mark.parametrize(
    ("name", "argument", "value", "says"),
    [
        ("EMAWeights", "decay", "1.5", "decay must be a number above 0 and below 1, got 1.5"),
        ("EMAWeights", "half_life", "2 weeks", "half_life must be a number of updates, '2 epochs' or"),
        ("LearningRateSchedule", "schedule", "cosin", "schedule must be 'constant' or 'cosine' or"),
        ("EarlyStopping", "patience", "-1", "patience must be a whole number of at least 0, got -1"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    name: str, argument: str, value: str, says: str, command_line: Any
) -> None:
    given = {**needed(name), argument: value}
    arguments = [f"--trainer.callbacks.{each}={given}" for each, given in given.items()]
    with pytest.raises(ValueError, match=says):
        command_line(f"--trainer.callbacks+=lightning_recipes.{name}", *arguments)


@pytest.mark.parametrize("argument", ["decay=high", "buffers=avg", "decai=0.9"])
def test_the_command_line_names_the_argument(
    argument: str, command_line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line("--trainer.callbacks+=lightning_recipes.EMAWeights", f"--trainer.callbacks.{argument}")
    assert argument.partition("=")[0] in capsys.readouterr().err.rpartition("error:")[2]


@pytest.mark.parametrize("name", RECIPES)
def test_its_help_is_for_a_terminal(name: str, command_line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(f"--trainer.callbacks.help=lightning_recipes.{name}")
    printed = " ".join(capsys.readouterr().out.split())
    assert ":`" not in printed
    assert "torch.Tensor" not in printed
    for argument, parameter in inspect.signature(getattr(lightning_recipes, name)).parameters.items():
        said = printed.rpartition(f"--trainer.callbacks.{argument} ")[2].partition(" --trainer")[0]
        default = {None: "null"}.get(parameter.default, parameter.default)
        ending = "(required, type: " if parameter.default is parameter.empty else f"default: {default}"
        assert ending in said
        assert len(re.split(r"\((?:type|required)", said)[0].split()) >= 4, "a sentence"


@pytest.mark.filterwarnings("ignore:Found EarlyStopping")
def test_a_printed_configuration_gives_itself(
    command_line: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": config()}}))
    printed = []
    for file in ("asked.yaml", "printed.yaml"):
        with pytest.raises(SystemExit):
            command_line(f"--config={file}", "--print_config")
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    callbacks = yaml.safe_load(printed[1])["trainer"]["callbacks"]
    for asked, given in zip(config(), callbacks, strict=True):
        assert asked["class_path"] == given["class_path"]
        assert has(given["init_args"], asked["init_args"])


def has(given: Any, asked: Any) -> bool:
    """Whether a configuration has all that was asked for, beside its defaults."""
    if isinstance(asked, dict):
        return all(name in given and has(given[name], value) for name, value in asked.items())
    if isinstance(asked, list):
        return len(given) == len(asked) and all(map(has, given, asked))
    return bool(given == asked)


def recipes() -> list[pl.Callback]:
    """All of them with the table's arguments."""
    every = []
    for name, given in GIVEN:
        arguments = {key: plain(value) for key, value in given.items()}
        every.append(getattr(lightning_recipes, name)(**arguments))
    return every


def plain(value: Any) -> Any:
    """The object that a configuration describes."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if value == "torch.utils.data.default_convert":
        from torch.utils.data import default_convert

        return default_convert
    if isinstance(value, dict):
        module, _, name = value["class_path"].rpartition(".")
        made = getattr(__import__(module, fromlist=[name]), name)
        return made(**{key: plain(each) for key, each in value["init_args"].items()})
    return value


@pytest.mark.parametrize("position", range(len(GIVEN)), ids=[name for name, _ in GIVEN])
def test_it_is_copied_and_pickled_with_all_its_arguments(position: int) -> None:
    recipe, (_, given) = recipes()[position], GIVEN[position]
    for other in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert vars(other).keys() == vars(recipe).keys()
        for argument in given:
            if argument in vars(recipe) and argument != "min_delta":
                assert getattr(other, argument) == getattr(recipe, argument)


class ListOfAConfiguration(Sequence[Any]):
    """As OmegaConf's ListConfig: a sequence, and not a list."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, place: Any) -> Any:
        return self.values[place]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


def test_sequences_need_not_be_lists_and_become_tuples() -> None:
    schedule = PiecewiseConstant(ListOfAConfiguration(2, "4 epochs"), ListOfAConfiguration(0.1, 0.01))
    assert schedule == PiecewiseConstant([2, "4 epochs"], [0.1, 0.01])
    assert schedule.milestones == (2, "4 epochs")
    for of in (AnyOf, AllOf):
        assert of(ListOfAConfiguration(Patience(1))).criteria == (Patience(1),)


@pytest.mark.parametrize("wrong", ["10", 10, None, {"a": 1}])
def test_what_is_no_list_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(TypeError, match="milestones must be a list of durations, got"):
        PiecewiseConstant(wrong, [0.1])
    with pytest.raises(TypeError, match="factors must be a list of numbers, got"):
        PiecewiseConstant([10], wrong)
    for of in (AnyOf, AllOf):
        with pytest.raises(TypeError, match="criteria must be a list of criteria, got"):
            of(wrong)
        with pytest.raises(TypeError, match="criteria must be some of"):
            of([wrong])


def hydras(value: Any) -> Any:
    """A configuration as Hydra has it."""
    if isinstance(value, list):
        return [hydras(each) for each in value]
    if value == "torch.utils.data.default_convert":
        return {"_target_": "hydra.utils.get_method", "path": value}
    if isinstance(value, dict):
        arguments = {key: hydras(each) for key, each in value["init_args"].items()}
        convert = {"_convert_": "all"} if "criteria" in arguments else {}  # or the criteria become mappings
        return {"_target_": value["class_path"], **arguments, **convert}
    return value


def test_hydra_is_told_how_to_have_several_criteria() -> None:
    hydra = pytest.importorskip("hydra")
    node = hydras(CRITERION)
    del node["_convert_"]
    with pytest.raises(hydra.errors.InstantiationException, match="write _convert_: all beside"):
        hydra.utils.instantiate(node)


@pytest.mark.parametrize("convert", ["none", "all"])
def test_hydra_makes_them_all(convert: str, tmp_path: Path) -> None:
    hydra, omegaconf = pytest.importorskip("hydra"), pytest.importorskip("omegaconf")
    asked = omegaconf.OmegaConf.create([hydras(each) for each in config()])
    made = hydra.utils.instantiate(asked, _convert_=convert)
    for recipe, plainly in zip(made, recipes(), strict=True):
        assert type(recipe) is type(plainly)
        for argument, value in vars(plainly).items():
            if isinstance(value, bool | int | float | str):
                assert repr(vars(recipe)[argument]) == repr(value)
        copy.deepcopy(recipe)
        pickle.dumps(recipe)
    some = [each for each in made if type(each).__name__ in ("EarlyStopping", "LearningRateSchedule")]
    some[0].monitor, some[0].mode = "val_loss", "min"
    trainer = quiet_trainer(tmp_path, callbacks=some, max_epochs=2)
    trainer.fit(Regression(), regression_data(), regression_data(2))
    assert trainer.global_step == 24
    assert some[1].schedule == PiecewiseConstant([2, "0.8 of the run"], [0.1, 0.01])
