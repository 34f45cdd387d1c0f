"""The modules and trainers that tests share: small, seeded, on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset


def quiet_trainer(folder: Any, **kwargs: Any) -> pl.Trainer:
    """A trainer on one CPU that says nothing and writes into ``folder``."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in kwargs.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(**{**settings, **kwargs})


def fp16(init_scale: float = 1024.0) -> MixedPrecision:
    """Half precision with a GradScaler on the CPU; ``precision="16-mixed"`` there silently means bf16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=4)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


class Regression(pl.LightningModule):
    """A small network that learns a noisy linear map.

    Args:
        batch_norm: Have a BatchNorm layer.
        dropout: Probability of dropout, 0 for none.
        make_optimizer: Makes the optimizer of the parameters.
        schedule: Let the learning rate fall at each step.
    """

    def __init__(
        self,
        batch_norm: bool = False,
        dropout: float = 0.0,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        schedule: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(16)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(8, 16), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=0.01))
        self.schedule = schedule

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class WithoutRate(Regression):
    """Its optimizer has no learning rate, or none that is a number; a layer of it is not used."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        super().__init__()
        self.defaults, self.unused = defaults, nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return _Descent(self.parameters(), self.defaults)


class Derived(torch.optim.Adam):
    """Calls the step that it overrides: torch has hooks around both."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # torch puts the hooks into a class when it is first used
        super().__init__(parameters, lr)

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Descent(Optimizer):
    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
        return loss


class Adversaries(pl.LightningModule):
    """Two networks, two optimizers, manual optimization: the first steps twice a batch, the second once."""

    def __init__(self, raw_optimizers: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(8, 1), nn.Linear(8, 1)
        self.raw_optimizers = raw_optimizers

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers(use_pl_optimizer=not self.raw_optimizers)  # type: ignore[misc]
        for optimizer, net in ((first, self.first), (first, self.first), (second, self.second)):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.first(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.first, self.second)], []


class GivenGradients(pl.LightningModule):
    """One weight whose gradient at each micro-batch is the batch's value: what happens to it is mental arithmetic."""

    def __init__(
        self,
        learning_rate: float = 1.0,
        weight: float = 0.0,
        make_optimizer: Callable[[Any, float], torch.optim.Optimizer] = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), weight))
        self.learning_rate, self.make_optimizer = learning_rate, make_optimizer
        self.weights: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters(), self.learning_rate)


def regression_data(batches: int = 12, batch_size: int = 8, shuffle: bool = False, **kwargs: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * batch_size, 8, generator=generator)
    targets = inputs.sum(1, keepdim=True) + 0.3 * torch.randn(len(inputs), 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=shuffle, **kwargs)


def given(values: Sequence[float]) -> DataLoader[Any]:
    """A loader of these values, one a batch."""
    return DataLoader([torch.tensor([value]) for value in values], batch_size=None)  # type: ignore[arg-type]


class Resumable:
    """Batches in an order of each epoch's own; goes on in the middle of an epoch, as a plain DataLoader does not."""

    def __init__(self, loader: DataLoader[Any], seed: int = 0) -> None:
        self.batches = list(loader)
        self.seed, self.epoch, self.position = seed, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.position >= len(self.batches):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[order[self.position - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]


class SeedEachStep(pl.Callback):
    """Make the random numbers of a step a function of the step, so that a resumed run draws the same."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # torch.manual_seed takes half a millisecond more, to note for other devices who has asked
        torch.default_generator.manual_seed(trainer.fit_loop.epoch_loop.total_batch_idx)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the module's state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Fragile(pl.LightningModule):
    """Residual blocks without normalisation, too large at the start: unstable at a high rate but for a warmup."""

    def __init__(self, learning_rate: float = 1e-4, seed: int = 0, gain: float = 1.4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.learning_rate = learning_rate
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(6))
        for block in self.blocks.modules():
            if isinstance(block, nn.Linear):
                nn.init.normal_(block.weight, std=gain * (2 / 32) ** 0.5)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        hidden = self.first(batch[0])
        for block in self.blocks:
            hidden = hidden + block(hidden)
        classes = (batch[1].flatten() / 2).round().clamp(-1, 2).long() + 1
        return nn.functional.cross_entropy(self.last(hidden), classes)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
