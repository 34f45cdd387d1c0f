from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import same, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes import EMAWeights
from lightning_recipes.core.ensembles import Ensemble
from lightning_recipes.sweep import OptunaRunner, ensemble_from_checkpoints, train_ensemble

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def points(number: int, seed: int, **loader: Any) -> DataLoader[Any]:
    """Three classes, one in five labels is wrong."""
    chance = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 2, generator=chance)
    targets = (inputs[:, 0] > 0).long() + (inputs.norm(dim=1) > 1.3).long()
    wrong = torch.rand(number, generator=chance) < 0.2
    targets[wrong] = torch.randint(3, (int(wrong.sum()),), generator=chance)
    return DataLoader(TensorDataset(inputs, targets), 16, **loader)


def nll(network: nn.Module, data: DataLoader[Any]) -> float:
    inputs, targets = data.dataset[:]
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network(inputs), targets))


def make(seed: int) -> Classifier:
    return Classifier()


def ensemble(folder: Path, seeds: int = 3, **arguments: Any) -> Any:
    train, val = points(160, 1, shuffle=True), points(400, 2)
    settings = {"max_epochs": 30, **QUIET, **arguments}
    return train_ensemble(make, folder, seeds, train, val, **settings)


def test_independent_networks_are_better_together(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found, test = ensemble(tmp_path), points(4000, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.report.selection.verdict == "gain"
    assert [member.name for member in found.report.members] == ["seed_0", "seed_1", "seed_2"]
    alone = []
    for seed in range(3):
        network = Classifier()
        network.load_state_dict(torch.load(tmp_path / f"seed_{seed}.pt", weights_only=True))
        alone.append(nll(network, test))
    assert nll(found.ensemble, test) < min(alone)
    assert len(set(alone)) == 3
    assert found.soup is None


def test_a_seed_is_a_start_and_an_order_and_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensemble(tmp_path / "one", seeds=2)
    again = ensemble(tmp_path / "two", seeds=2)
    for one, other in zip(first.ensemble.members, again.ensemble.members, strict=True):
        assert same(weights_of(one), weights_of(other))
    runs: list[int] = []
    fit = pl.Trainer.fit
    monkeypatch.setattr(
        pl.Trainer, "fit", lambda trainer, *a, **k: runs.append(trainer.max_epochs) or fit(trainer, *a, **k)
    )
    more = ensemble(tmp_path / "one", seeds=3)
    assert runs.count(30) == 2  # the learning rate is asked for, and one network was missing
    assert len(more.report.members) == 3


def test_the_order_is_that_of_the_seed_whatever_was_drawn_before(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    train = DataLoader(points(160, 1).dataset, 16, shuffle=True, generator=generator)
    found = []
    for folder in ("one", "two"):
        before = generator.get_state()
        found.append(train_ensemble(make, tmp_path / folder, 2, train, points(100, 2), max_epochs=1, **QUIET).ensemble)
        assert torch.equal(generator.get_state(), before)
    assert all(same(weights_of(a), weights_of(b)) for a, b in zip(found[0].members, found[1].members, strict=True))


def test_each_run_has_callbacks_of_its_own(tmp_path: Path) -> None:
    ema = EMAWeights(0.9)
    found = ensemble(tmp_path, seeds=2, callbacks=ema, max_epochs=3)
    assert len(found.report.members) == 2
    assert not ema.has_average


def test_it_is_shared_among_processes(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    alone = ensemble(tmp_path / "alone", seeds=2, max_epochs=2)
    shared = ensemble(tmp_path / "shared", seeds=2, max_epochs=2, runner=OptunaRunner(tmp_path / "sweep.log"))
    assert str(shared.report) == str(alone.report)
    (tmp_path / "shared" / "seed_1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"seed_1.pt: trained, but gone; put them back, or give the runner"):
        ensemble(tmp_path / "shared", seeds=2, max_epochs=2, runner=OptunaRunner(tmp_path / "sweep.log"))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return points(160, 1)

    def val_dataloader(self) -> Any:
        return points(100, 2)


def test_a_datamodule_will_do(tmp_path: Path) -> None:
    found = train_ensemble(make, tmp_path, 2, datamodule=Data(), max_epochs=2, **QUIET)
    assert found.report.samples == 100
    with pytest.raises(ValueError, match="give val_dataloaders or a datamodule"):
        train_ensemble(make, tmp_path, 2, points(160, 1), max_epochs=2, **QUIET)


class Normalized(Classifier):
    """Gets its inputs a hundred times too large in a validation."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] / (1 if self.trainer.training else 100), batch[1]]


class Large(Data):
    def val_dataloader(self) -> Any:
        inputs, targets = points(100, 2).dataset[:]
        return {"val": DataLoader(TensorDataset(100 * inputs, targets), 16 // self.trainer.world_size)}


class LargeData(Large):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Normalized.on_after_batch_transfer(self, batch, dataloader_idx)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
@pytest.mark.parametrize(("network", "data"), [(Normalized, Large), (Classifier, LargeData)])
def test_networks_are_weighed_on_batches_as_the_trainer_gives_them(network: Any, data: Any, tmp_path: Path) -> None:
    expected = train_ensemble(make, tmp_path / "plain", 2, datamodule=Data(), max_epochs=2, **QUIET)
    found = train_ensemble(lambda _: network(), tmp_path, 2, datamodule=data(), max_epochs=2, **QUIET)
    for one, other in zip(found.report.members, expected.report.members, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert found.report.samples == 100
    assert found.ensemble(torch.ones(1, 2)).shape == (1, 3)


class OnlyTrains(Classifier):
    """Has nothing for a validation, and hooks that need a training."""

    validation_step = pl.LightningModule.validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, self.trainer.max_epochs * 10)]

    def on_fit_start(self) -> None:
        assert self.optimizers()


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_several_loaders_will_do(tmp_path: Path) -> None:
    loaders = [points(100, 2), points(50, 3)]
    found = train_ensemble(lambda _: OnlyTrains(), tmp_path, 1, points(160, 1), loaders, max_epochs=1, **QUIET)
    assert found.report.samples == 150


def test_a_network_that_is_gone_is_trained_again(tmp_path: Path) -> None:
    first = ensemble(tmp_path, seeds=2, max_epochs=1)
    (tmp_path / "seed_1.pt").unlink()
    again = ensemble(tmp_path, seeds=2, max_epochs=1)
    assert same(weights_of(first.ensemble), weights_of(again.ensemble))


def test_checkpoints_of_one_training_can_be_averaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, paths, val = Classifier(), [], points(400, 2)
    for part in range(3):
        trainer = pl.Trainer(max_epochs=10, **QUIET)
        trainer.fit(module, points(160, 1))
        paths.append(tmp_path / f"{part}.ckpt")
        trainer.save_checkpoint(paths[-1])
    found = ensemble_from_checkpoints(paths, Classifier(), val, soup=True)
    assert [member.name for member in found.report.members] == ["0", "1", "2"]
    assert found.soup is not None
    averaged = Classifier()
    averaged.load_state_dict(found.soup.state)
    best = min(member.loss for member in found.report.members)
    assert nll(averaged, val) <= best + 1e-6
    alone = ensemble_from_checkpoints(paths, module, val, weighting="uniform").ensemble
    assert isinstance(alone, Ensemble)
    assert alone.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_a_module_may_keep_its_activations(tmp_path: Path) -> None:
    class Keeps(Classifier):
        def forward(self, inputs: Tensor) -> Tensor:
            self.net[0].features = self.net[0](inputs)
            self.activations = {"logits": [self.net(inputs)]}
            return self.activations["logits"][0]

    module = Keeps()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    inputs = torch.ones(1, 2)
    expected = module(inputs)
    assert module.activations["logits"][0].requires_grad
    found = ensemble_from_checkpoints([tmp_path / "a.pt"] * 2, module, points(100, 2), weighting="uniform")
    assert torch.allclose(found.ensemble(inputs).softmax(1), expected.softmax(1))


def test_members_of_the_same_file_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "checkpoints" / "last.ckpt" for folder in ("first", "second")]
    for path in paths:
        path.parent.mkdir(parents=True)
        torch.save(Classifier().state_dict(), path)
    found = ensemble_from_checkpoints(paths, Classifier(), points(100, 2))
    assert [member.name for member in found.report.members] == [
        "first/checkpoints/last.ckpt",
        "second/checkpoints/last.ckpt",
    ]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt does not fit Classifier: Error.s. in loading state_dict"):
        ensemble_from_checkpoints([tmp_path / "other.pt"], Classifier(), points(10, 1))
    torch.save({"state_dict": Classifier().state_dict(), "hyper_parameters": {"root": tmp_path}}, tmp_path / "path.pt")
    with pytest.raises(ValueError, match=r"path.pt has more in it .*pathlib.PosixPath.*safe_globals..pathlib"):
        ensemble_from_checkpoints([tmp_path / "path.pt"], Classifier(), points(10, 1))
    with torch.serialization.safe_globals([type(tmp_path)]):
        assert ensemble_from_checkpoints([tmp_path / "path.pt"], Classifier(), points(10, 1)).report.samples == 10
    with pytest.raises(ValueError, match="at least one checkpoint"):
        ensemble_from_checkpoints([], Classifier(), points(10, 1))
    torch.save(Classifier().state_dict(), tmp_path / "fits.pt")
    with pytest.raises(TypeError, match="a batch must be a pair of inputs and targets"):
        ensemble_from_checkpoints([tmp_path / "fits.pt"], Classifier(), [torch.ones(3, 2)])
