import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from models import Adversaries, Regression, fp16, quiet_trainer, regression_data
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_recipes import InitialLossCheck

pytestmark = [
    pytest.mark.filterwarnings("ignore:wrong sign of the loss"),
    pytest.mark.filterwarnings("ignore:initial loss off"),
    pytest.mark.filterwarnings("ignore:initial loss not finite"),
]


def check(folder: Path, module: Any = None, data: Any = None, **settings: Any) -> InitialLossCheck:
    given = settings.pop("given", {})
    recipe = InitialLossCheck(**given)
    trainer = quiet_trainer(folder, **{"max_steps": 2, "callbacks": [recipe], **settings})
    trainer.fit(module or Regression(batch_norm=True, dropout=0.1), data or regression_data())
    return recipe


def findings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


def test_what_is_measured_is_the_mean_of_the_losses_before_the_first_update(tmp_path: Path) -> None:
    module = Regression()
    losses = [float(module.loss(batch).detach()) for batch in list(regression_data())[:10]]
    targets = torch.cat([batch[1] for batch in list(regression_data())[:10]])
    (result,) = check(tmp_path, module, logger=CSVLogger(tmp_path)).results
    assert result.loss == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert result.uniform == pytest.approx(float(targets.square().mean()), rel=1e-5)
    assert result.constant == pytest.approx(float(targets.var(correction=0)), rel=1e-5)
    assert result.batches == 10
    logged = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "initial_loss,initial_loss_expected" in logged


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-6),
        ({"precision": "bf16-mixed"}, 0.02),
        ({"precision": "64-true"}, 1e-5),
        ({"plugins": [fp16()]}, 1e-3),
        ({"accumulate_grad_batches": 4}, 1e-6),
        ({"limit_train_batches": 3}, 1.0),
    ],
)
def test_it_is_the_same_in_every_kind_of_run(settings: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    (alone,) = check(tmp_path / "alone", Regression()).results
    (result,) = check(tmp_path, Regression(), **settings).results
    assert result.loss == pytest.approx(alone.loss, rel=tolerance)
    assert result.batches == (3 if "limit_train_batches" in settings else 10)


def test_manual_optimization_and_several_optimizers(tmp_path: Path) -> None:
    (result,) = check(tmp_path, Adversaries()).results
    assert math.isnan(result.penalty)  # nothing is returned
    assert findings(tmp_path)[0]["rule"] == "initial loss as expected"


class Strange(Regression):
    """With a loss that nobody knows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


def test_a_loss_that_is_not_known_can_be_said(tmp_path: Path) -> None:
    check(tmp_path / "not said", Strange())
    assert findings(tmp_path / "not said")[0]["rule"] == "initial loss not judged"
    recipe = check(tmp_path / "number", Strange(), given={"expected_loss": 8.5})
    assert findings(tmp_path / "number")[0]["rule"] == "initial loss as expected"
    assert recipe.results[0].criterion == "loss"

    def variance(module: pl.LightningModule, batch: Any) -> float:
        assert isinstance(module, Strange)
        return float(batch[1].square().mean()) / 10

    check(tmp_path / "function", Strange(), given={"expected_loss": variance})
    assert findings(tmp_path / "function")[0]["rule"] == "initial loss off"


def test_a_wrong_sign_warns(tmp_path: Path) -> None:
    class Flipped(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self.loss(batch)

    with pytest.warns(UserWarning, match="wrong sign of the loss at step 0"):
        check(tmp_path, Flipped())


OPTIMIZERS = [
    ("SGD", True),
    ("ASGD", True),
    ("Adam", False),
    ("RMSprop", False),
    ("Rprop", False),
    ("Adafactor", False),
]


@pytest.mark.filterwarnings("ignore:loss is a sum")
@pytest.mark.parametrize(("name", "warns"), OPTIMIZERS)
def test_a_sum_in_a_regression_matters_to_optimizers_that_do_not_scale_the_gradient(
    name: str, warns: bool, tmp_path: Path
) -> None:
    class Summed(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return functional.mse_loss(self.net(batch[0]), batch[1], reduction="sum")

        def configure_optimizers(self) -> Any:
            return getattr(torch.optim, name)(self.parameters(), lr=1e-3)

    check(tmp_path, Summed())
    assert [each["severity"] for each in findings(tmp_path) if each["rule"] == "loss is a sum"] == [
        "warning" if warns else "info"
    ]


def test_the_first_thing_that_is_not_finite_is_told(tmp_path: Path) -> None:
    broken: Any = [[torch.full((4, 8), math.nan), torch.ones(4, 1)]] * 3
    check(tmp_path, data=DataLoader(broken, batch_size=None))
    assert findings(tmp_path)[0]["message"].endswith("the inputs have NaN or infinities.")


def test_a_module_with_nothing_to_train_is_looked_at_too(tmp_path: Path) -> None:
    class Frozen(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]).detach(), batch[1]) + 0 * self.free

        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Parameter(torch.zeros(()))

    assert len(check(tmp_path, Frozen()).results) in (0, 1)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"expected_loss": "2.3"}, TypeError),
        ({"expected_loss": math.nan}, ValueError),
        ({"batches": 1}, ValueError),
        ({"batches": 2.0}, TypeError),
    ],
)
def test_bad_arguments_are_refused(asked: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(asked))} must be"):
        InitialLossCheck(**asked)


def test_it_is_skipped_on_resume_and_in_a_fast_dev_run(tmp_path: Path) -> None:
    module = Regression()
    trainer = quiet_trainer(tmp_path / "first", max_epochs=1, callbacks=[InitialLossCheck()])
    trainer.fit(module, regression_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    recipe = InitialLossCheck()
    resumed = quiet_trainer(tmp_path / "resumed", max_epochs=2, callbacks=[recipe])
    resumed.fit(Regression(), regression_data(), ckpt_path=tmp_path / "run.ckpt")
    assert not recipe.results
    assert recipe.state_dict()["measured"]["initial_loss"] > 0
    assert not check(tmp_path / "dev", fast_dev_run=True).results
    assert not (tmp_path / "dev").exists() or not list((tmp_path / "dev").rglob("findings*"))


def test_loaders_that_can_be_read_once_are_left_alone(tmp_path: Path) -> None:
    once = iter(list(regression_data()))
    assert not check(tmp_path, data=once).results
    assert len(list(once)) in (9, 10)  # two updates, and one read ahead
