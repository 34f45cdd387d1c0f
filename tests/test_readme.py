"""What the README and the recipes' pages show works when it is pasted, and what they name exists."""

import ast
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from ranks import output_of

import lightning_recipes
import lightning_recipes.sweep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
CODE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lightning_recipes").rglob("*.py"))
SECTIONS = ["When", "When not", "Use", "What it tells", "What it costs", "Measured", "Source"]
SMALL = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=8", "--trainer.enable_progress_bar=false"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def section(page: str, name: str) -> str:
    return re.split(r"^## .*$", page.partition(f"\n## {name}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def told(page: str) -> list[str]:
    """Keys and rules that a page explains, each at the head of a line of its list."""
    heads = [
        head
        for item in re.split(r"^- ", section(page, "What it tells"), flags=re.MULTILINE)[1:]
        for head in re.findall(r"(?:^|\. |, )(?=`|\*\*)([^:]*?):\s", item, re.DOTALL)
    ]
    names = [name for head in heads for name in re.findall(r"\*\*(.+?)\*\*|`([\w/]+)`", head, re.DOTALL)]
    return [re.sub(r"\s+", " ", rule or key) for rule, key in names]


def findings(folder: Path) -> list[str]:
    lines = [json.loads(line) for path in folder.rglob("findings.jsonl") for line in path.read_text().splitlines()]
    return [line["rule"] for line in lines if line["severity"] != "info"]


def test_the_first_block_runs_in_a_fresh_folder(tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    (tmp_path / "pasted.py").write_text(code)
    command = [sys.executable, "-W", "ignore", "pasted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert list(tmp_path.rglob("report.html"))
    assert findings(tmp_path) == []


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_run_when_they_are_pasted(name: str, tmp_path: Path) -> None:
    for number, code in enumerate(blocks(PAGES[name], "python")):
        folder = tmp_path / str(number)
        folder.mkdir()
        output_of(partial(exec, compile(code, "pasted.py", "exec"), {"__name__": "__main__"}), ["pasted.py"], folder)
        announced = [rule.strip() for rule in re.findall(r"# warns: ([^(\n]+)", code)]
        assert findings(folder) == announced
        assert "print(" in code or announced or list(folder.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=f"{name}-{number}")
        for name, page in {"README": README, **PAGES}.items()
        for number, text in enumerate(blocks(page, "yaml"))
    ],
)
def test_yaml_blocks_configure_a_training(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    pytest.importorskip("sklearn")
    from digits import DigitClassifier, Digits
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "recipes.yaml").write_text(text)
    configs = ["--config", str(ROOT / "examples" / "digits.yaml"), "--config", "recipes.yaml"]
    output_of(lambda: LightningCLI(DigitClassifier, Digits), ["digits.py", "fit", *configs, *SMALL], tmp_path)
    asked = yaml.safe_load(text)
    written = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert_within(asked, written)


def assert_within(asked: object, written: object) -> None:
    """All that was asked for is in what was used."""
    if isinstance(asked, dict):
        assert isinstance(written, dict)
        if "class_path" in asked and "class_path" not in written:
            asked = asked["init_args"]  # jsonargparse writes a dataclass by its fields
        for key, value in asked.items():
            assert_within(value, written[key])
    elif isinstance(asked, list):
        for value, other in zip(asked, written, strict=True):  # type: ignore[call-overload]
            assert_within(value, other)
    else:
        assert asked == written


def test_every_recipe_has_a_row_and_a_page() -> None:
    pages = dict(re.findall(r"^\[(\w+)\]: docs/(\w+)\.md$", README, re.MULTILINE))
    rows = re.findall(r"^\| \[(\w+)\] \| (.+?) \| .+? \| .+? \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == sorted(lightning_recipes.__all__, key=str.lower)
    assert all(len(job.split()) <= 12 for _, job in rows)
    assert {*pages.values()} == PAGES.keys()
    assert pages.keys() == {*lightning_recipes.__all__, "diagnose", "learning_rate_sweep"}
    for name, stem in pages.items():
        assert PAGES[stem].startswith(f"# {name}\n")
        found = re.findall(r"^## (.+)$", PAGES[stem], re.MULTILINE)
        assert [each for each in found if each in SECTIONS] == SECTIONS
        assert all(section(PAGES[stem], each).strip() for each in SECTIONS)
        assert blocks(PAGES[stem], "python")
        assert blocks(PAGES[stem], "yaml")
    for name in lightning_recipes.sweep.__all__:
        assert name in pages or any(name in page for page in PAGES.values())


def test_every_picture_is_on_a_page_and_says_what_it_shows() -> None:
    script = (ROOT / "benchmarks" / "pictures.py").read_text(encoding="utf-8")
    pictures = {path.stem: path for path in (ROOT / "docs" / "pictures").iterdir()}
    for name, page in PAGES.items():
        ((words, stem),) = re.findall(r"^!\[(.+)\]\(pictures/(\w+)\.svg\)$", page, re.MULTILINE)
        assert stem == name
        assert len(words) > 60
        assert f"\ndef {stem}() -> Markup:" in script
        path = pictures.pop(stem)
        assert path.stat().st_size < 60_000
        tags = {element.tag.partition("}")[2] for element in ElementTree.parse(path).iter()}
        assert {"title", "desc", "polyline"} <= tags
        assert not tags & {"script", "image", "foreignObject"}
    assert not pictures


def test_every_key_and_rule_is_explained_in_one_place() -> None:
    names = [name for page in PAGES.values() for name in told(page)]
    assert len(names) > 100
    assert sorted({name for name in names if names.count(name) > 1}) == []
    code = CODE + re.sub(r"\{[^{}]*\}", "*", CODE)  # the parts of an f-string that are filled in
    for name in names:
        varied = re.sub(r"(.*[/ ])\S+$", r"\1*", name)
        assert any(each in code for each in (f'"{name}', f'"*{name}', f" {name}=", f'"{varied}')), name


def test_every_rule_with_a_literal_name_is_explained() -> None:
    rules = set()
    for node in ast.walk(ast.parse(CODE)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
            named = [keyword.value for keyword in node.keywords if keyword.arg == "rule"]
            rules |= {each.value for each in [*node.args[:1], *named] if isinstance(each, ast.Constant)}
    assert len(rules) > 15
    assert sorted(rules - {name for page in PAGES.values() for name in told(page)}) == []


def test_what_it_names_exists() -> None:
    for folder, page in ((ROOT, README), *((ROOT / "docs", page) for page in PAGES.values())):
        for name in re.findall(r"(?:examples|benchmarks|lightning_recipes|tests)/[\w./]*\w", page):
            assert (ROOT / name).exists(), name
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert link.startswith("http") or (folder / link).exists(), link
    assert {"demo", "test", "test-all"} == set(re.findall(r"^    make ([\w-]+)", README, re.MULTILINE))
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", targets, re.MULTILINE) for target in ("demo", "test", "test-all"))


def test_it_is_read_in_a_terminal() -> None:
    for page in (README, *PAGES.values()):
        lines = [line for line in page.splitlines() if not line.startswith(("![", "|"))]
        assert max(map(len, lines)) <= 132
        assert max(map(len, re.findall(r"^\|.*", page, re.MULTILINE)), default=0) <= 150
    assert len(README.splitlines()) < 180
