"""What the README shows works when it is pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_recipes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = Path(__file__).parents[1] / "examples"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run_in_a_fresh_folder(code: str, tmp_path: Path) -> None:
    (tmp_path / "pasted.py").write_text(code)
    command = [sys.executable, "-W", "ignore", "pasted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("events.out.tfevents*")) or re.search(
        "early instability at step|learning rate", done.stdout
    )


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_configure_a_training(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipes.yaml").write_text(text)
    configs = ["--config", str(EXAMPLES / "digits.yaml"), "--config", "recipes.yaml"]
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=20", "--trainer.enable_progress_bar=false"]
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "digits.py"), "fit", *configs, *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    asked = {entry["class_path"] for entry in yaml.safe_load(text)["trainer"]["callbacks"]}
    assert asked == {entry["class_path"] for entry in written["trainer"]["callbacks"]}


def test_every_export_has_a_row() -> None:
    for name in lightning_recipes.__all__:
        assert re.search(rf"^\| `{name}` \|", README, re.MULTILINE)


def test_what_it_names_exists() -> None:
    root = Path(__file__).parents[1]
    for name in re.findall(r"(?:examples|benchmarks|lightning_recipes)/[\w./]*\w", README):
        assert (root / name).exists(), name
    assert {"demo", "test", "test-all"} == set(re.findall(r"^    make ([\w-]+)", README, re.MULTILINE))
    targets = (root / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", targets, re.MULTILINE) for target in ("demo", "test", "test-all"))
