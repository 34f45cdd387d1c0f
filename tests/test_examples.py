"""Every example runs, at a small size, from a folder of its own; and the numbers of the demo are what it says."""

import os
import runpy
import sys
from pathlib import Path

import pytest
from ranks import output_of

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "do_the_recipes_help.py": ["--seeds", "1", "--epochs", "5"],
    "do_i_need_warmup.py": ["--seeds", "1", "--steps", "1000"],
    "digits.py": ["fit", "--config", str(EXAMPLES / "digits.yaml"), "--config", str(EXAMPLES / "recipes.yaml")],
    "how_do_i_get_the_last_percent.py": ["--seeds", "1", "--steps", "750"],
    "is_it_broken.py": ["--epochs", "3"],
    "is_my_learning_rate_too_high.py": ["--steps", "300"],
    "is_my_run_stuck.py": ["--steps", "2000"],
    "what_gradient_clip_val.py": ["--epochs", "2"],
    "when_to_stop.py": ["--epochs", "45", "--seeds", "1"],
    "why_is_my_loss_spiking.py": ["--epochs", "10"],
}


def run(name: str, *arguments: str) -> str:
    def script() -> None:
        sys.path.insert(0, str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return output_of(script, [name, *arguments], Path.cwd())


@pytest.fixture(autouse=True)
def _data_is_there() -> None:
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        if os.environ.get("RECIPES_REQUIRE_DATA"):
            raise
        pytest.skip("scikit-learn, whose digits the examples use, is not installed")


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("[!_]*.py")} == SMALL.keys()


def test_the_recipes_rescue_the_demo(tmp_path: Path) -> None:
    lines = run("do_the_recipes_help.py", *SMALL["do_the_recipes_help.py"]).splitlines()
    assert lines[0].startswith("scikit-learn digits, 1797 images")
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:7]}
    error = {name: float(cells[0].rstrip("%")) for name, cells in rows.items()}
    assert error["nothing"] > 50
    assert error["PercentileGradientClipping"] < 40
    assert error["both"] < 20
    assert (tmp_path / "demo" / "both" / "seed_0").is_dir()


def test_the_average_helps_until_the_learning_rate_decays_and_five_snapshots_are_surer_than_one_run() -> None:
    lines = run("how_do_i_get_the_last_percent.py", *SMALL["how_do_i_get_the_last_percent.py"]).splitlines()
    raw, average, decayed, decayed_average, single, snapshots = (float(line.split()[-1]) for line in lines[2:8])
    assert average < raw
    assert decayed_average == pytest.approx(decayed, abs=0.03)
    assert snapshots < single
    assert sum(line.startswith("| snapshot") for line in lines) == 5


def test_a_clip_value_is_recommended(tmp_path: Path) -> None:
    printed = run("what_gradient_clip_val.py", *SMALL["what_gradient_clip_val.py"])
    assert "Set Trainer(gradient_clip_val=" in printed
    assert Path(printed.splitlines()[-1].partition(": ")[2]).exists()


def test_the_best_weights_are_better_than_the_last_and_cost_less() -> None:
    lines = run("when_to_stop.py", *SMALL["when_to_stop.py"]).splitlines()
    (*_, all_epochs, last), _, (*_, epochs, best) = (line.split() for line in lines[2:5])
    assert float(best) < float(last)
    assert int(epochs) < int(all_epochs)


def test_the_warmup_makes_a_high_rate_stable() -> None:
    lines = run("do_i_need_warmup.py", *SMALL["do_i_need_warmup.py"]).splitlines()
    low, high, warmed = (float(line.split()[-1].rstrip("%")) for line in lines if line.startswith("learning"))
    assert warmed < low < high
    assert sum("**recommended**" in line for line in lines) == 1


def test_a_rate_that_is_too_high_is_called_so_and_a_better_one_found() -> None:
    printed = run("is_my_learning_rate_too_high.py", *SMALL["is_my_learning_rate_too_high.py"])
    high, suggested = (line for line in printed.splitlines() if line.startswith("UpdateRatioMonitor at"))
    assert "  learning rate looks too high at step" in printed
    assert "  early instability at step" in printed
    assert float(suggested.split()[-1]) < 0.5 < float(high.split()[-1])
    assert "from 0.5 on the training is unstable" in printed


def test_mistakes_are_named_and_the_sound_training_is_left_alone(tmp_path: Path) -> None:
    _, *parts = run("is_it_broken.py", *SMALL["is_it_broken.py"]).split("\n\n")
    told = {name: text for name, _, text in (part.partition(": ") for part in parts)}
    assert "\n" not in told["as it should be"]
    for name, rule in (
        ("softmax twice", "softmax applied twice"),
        ("layers forgotten", "not in any optimizer"),
        ("weights too large", "initial loss high"),
    ):
        assert told[name].splitlines()[1].startswith(f"  {rule}: ")
    assert len(list(tmp_path.rglob("report.html"))) == 5


def test_a_poisoned_run_is_saved() -> None:
    _, *parts = run("why_is_my_loss_spiking.py", *SMALL["why_is_my_loss_spiking.py"]).split("\n\n")
    error = {part.partition(":")[0]: float(part.splitlines()[0].split()[-1].rstrip("%")) for part in parts}
    assert max(error["skip"], error["rewind"]) < 10 < 80 < error["warn"] == error["no recipe"]
    assert "spike at step 200" in parts[1]


def test_three_reasons_to_be_stuck_are_told_apart() -> None:
    printed = run("is_my_run_stuck.py", *SMALL["is_my_run_stuck.py"])
    places = [printed.index(verdict) for verdict in ("bouncing between", "saddle at step", "local minimum at step")]
    assert places == sorted(places)


def test_the_yaml_files_configure_the_recipes(tmp_path: Path) -> None:
    run("digits.py", *SMALL["digits.py"], "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")
    config = next(tmp_path.rglob("config.yaml")).read_text()
    assert "class_path: lightning_recipes.EMAWeights" in config
    assert "decay: 0.99\n" in config
