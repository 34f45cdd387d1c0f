"""In a notebook: processes are forked by Lightning, and a cell is interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import os, signal, sys, threading
sys.path.insert(0, os.environ["TESTS"])
import lightning.pytorch as pl
import torch
from matrix import RECIPES, make
from models import Regression, regression_data

torch.set_num_threads(1)


class Interrupts(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 15 and {interrupt}:
            os.kill(os.getpid(), signal.SIGINT)


trainer = pl.Trainer(
    accelerator="cpu", max_epochs=3, log_every_n_steps=4, callbacks=[*map(make, RECIPES), Interrupts()], {settings}
)
trainer.fit(Regression(), regression_data(24), regression_data(2))
"""


def run_cell(folder: Path, interrupt: bool, settings: str) -> str:
    """Run it in IPython's kernel where there is one, or else in a process of its own; return what it prints."""
    code = TRAIN.format(interrupt=interrupt, settings=settings)
    environment = {**os.environ, "TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    try:
        import nbclient
        import nbformat
    except ImportError:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == int(interrupt), done.stderr
        return done.stderr
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, kernel_name="python3")
    client.execute(cwd=str(folder), env=environment)
    outputs = notebook.cells[0].outputs
    errors = [output.ename for output in outputs if output.output_type == "error"]
    assert errors == ["SystemExit"] * interrupt  # Lightning's
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.everything
@pytest.mark.filterwarnings("ignore")
def test_two_forked_ranks_train_with_every_recipe_and_tell_each_finding_once(tmp_path: Path) -> None:
    said = run_cell(tmp_path, False, "strategy='ddp_notebook', devices=2")
    folder = tmp_path / "lightning_logs" / "version_0"
    findings = [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]
    assert len(findings) >= 3
    for finding in findings:
        assert said.count(f"{finding['rule']} at step {finding['step']}: {finding['message']}") == 1
    assert (folder / "report.html").exists()


@pytest.mark.everything
@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_cell_leaves_the_page(tmp_path: Path) -> None:
    run_cell(tmp_path, True, "devices=1")
    page = (tmp_path / "lightning_logs" / "version_0" / "report.md").read_text()
    assert "Interrupted by KeyboardInterrupt after 1" in page
