import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from models import Regression, quiet_trainer, regression_data

from lightning_recipes import OverfitCheck, UpdateRatioMonitor
from lightning_recipes.callbacks.telling import note, tell
from lightning_recipes.core.findings import Finding


def rules_of(folder: Path) -> list[str]:
    return [json.loads(line)["rule"] for line in (folder / "findings.jsonl").read_text().splitlines()]


class Says(pl.Callback):
    """The same at every step, and at every second one something new."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tell(trainer, Finding("same", "warning", "Again.", "Stop it.", step=batch_idx))
        note(trainer, Finding("noted", "info", "Again.", "Stop it.", step=batch_idx))
        tell(trainer, Finding("new", "info", "Again.", "Go on.", step=0, evidence={"half": batch_idx // 2}))


@pytest.mark.filterwarnings("ignore:same at step")
def test_the_same_is_told_once_a_fit_whoever_says_it(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Says(), Says()])
    for fits in (1, 2):
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(Regression(), regression_data(4))
        rules = rules_of(tmp_path)
        assert {rule: rules.count(rule) for rule in rules} == {"same": fits, "noted": fits, "new": 2 * fits}


def test_a_warning_is_shown_in_every_fit(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # as Python and notebooks have it
        for _ in range(2):
            trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Says(), Says()])
            trainer.fit(Regression(), regression_data(1))
    told = [each for each in seen if str(each.message).startswith("same at step")]
    assert [str(each.message) for each in told] == 2 * ["same at step 0: Again. Stop it."]
    assert {each.filename for each in told} == {"lightning_recipes"}  # not where in it


class Forgets(Regression):
    """A part is in no optimizer."""

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net[0].parameters())


@pytest.mark.filterwarnings("ignore:not in any optimizer")
def test_two_callbacks_that_see_one_defect_tell_it_once(tmp_path: Path) -> None:
    callbacks = [OverfitCheck(max_steps=10), UpdateRatioMonitor(1)]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, log_every_n_steps=2)
    trainer.fit(Forgets(), regression_data(8))
    assert rules_of(tmp_path).count("not in any optimizer") == 1
