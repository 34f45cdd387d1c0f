"""Trainings, healthy and broken: how they are made, and what should be said of them."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits, fashion

TEXT = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:200_000]
LETTERS = sorted(set(TEXT))
CONTEXT = 32  # characters
Loss = Callable[[Tensor, Tensor], Tensor]


class Training(pl.LightningModule):
    """One way of training, from which the defects differ.

    Args:
        net: The network.
        loss: Of outputs and targets.
        rate: Learning rate.
        optimizer: ``"sgd"`` with momentum, ``"adam"`` or ``"adamw"``.
        schedule: Makes a scheduler of the optimizer and the number of updates.
        accuracy: Whether to log one.
        trained: The parameters that the optimizer has; None for all.
        train_in_evaluation_mode: Have the network in evaluation mode.
        zero_grad: Whether gradients are set to zero, by hand.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss = functional.cross_entropy,
        rate: float = 0.05,
        optimizer: str = "sgd",
        schedule: Callable[[Any, int], Any] | None = None,
        accuracy: bool = True,
        trained: Callable[[nn.Module], Any] | None = None,
        train_in_evaluation_mode: bool = False,
        zero_grad: bool = True,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.net, self.loss = net, loss
        self.rate, self.kind, self.schedule, self.momentum = rate, optimizer, schedule, momentum
        self.accuracy, self.trained, self.weight_decay = accuracy, trained, weight_decay
        self.train_in_evaluation_mode, self.automatic_optimization = train_in_evaluation_mode, zero_grad

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        if self.train_in_evaluation_mode:
            self.net.eval()
        loss = self.loss(self.net(inputs), targets)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            optimizer: Any = self.optimizers()
            optimizer.step()
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        outputs = self.net(inputs)
        self.log("val_loss", self.loss(outputs, targets))
        if self.accuracy:
            self.log("val_accuracy", (outputs.argmax(1) == targets).float().mean())

    def made(self, parameters: list[Any]) -> torch.optim.Optimizer:
        """The optimizer of some parameters."""
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, self.rate, self.momentum, weight_decay=self.weight_decay)
        return (torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW)(parameters, self.rate)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.made([*(self.parameters() if self.trained is None else self.trained(self.net))])
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        module: The module.
        train: Inputs and targets.
        val: Likewise.
        epochs: How many.
        batch: Size of a batch.
        shuffle: Whether to.
        settings: More of the Trainer.
    """

    module: pl.LightningModule
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    epochs: int = 30
    batch: int = 32
    shuffle: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A training, and what should be said of it.

    Args:
        name: Of the defect, or of what is healthy.
        make: Makes it for a seed.
        named: Rules that name the defect; none for a healthy one.
        larger: Makes the same with a larger network.
    """

    name: str
    make: Callable[[int], Run]
    named: frozenset[str] = frozenset()
    larger: Callable[[int], Run] | None = None


# ---------------------------------------------------------------------------------------------------- networks


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU, between: Callable[[int], nn.Module] | None = None) -> Any:
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(len(sizes) - 1):
        layers.append(nn.Linear(sizes[index], sizes[index + 1]))
        if index < len(sizes) - 2:
            layers += [] if between is None else [between(sizes[index + 1])]
            layers.append(activation())
    return nn.Sequential(*layers)


def cnn(norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 10))


class Letters(nn.Module):
    """Predicts the next character at each position.

    Args:
        body: Takes and gives tensors of the shape (batch, characters, width).
        width: Of it.
    """

    def __init__(self, body: Callable[[Tensor], Tensor], width: int = 48) -> None:
        super().__init__()
        self.codes, self.places = nn.Embedding(len(LETTERS), width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.body, self.last = body, nn.Linear(width, len(LETTERS))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(self.codes(inputs) + self.places))
        return logits.transpose(1, 2)


class Recurrent(nn.GRU):
    """Gives its outputs alone."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]  # a Module takes anything
        outputs: Tensor = super().forward(inputs)[0]
        return outputs


class Attention(nn.TransformerEncoder):
    """Two layers.

    Args:
        causal: Whether a position sees only those before it.
        width: Of them.
    """

    def __init__(self, causal: bool = True, width: int = 48) -> None:
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        super().__init__(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.causal = causal

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]  # a Module takes anything
        mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1) if self.causal else None
        outputs: Tensor = super().forward(inputs, mask=mask)
        return outputs


# ---------------------------------------------------------------------------------------------------- data


def letters(seed: int, shift: int = 1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    codes = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    starts = torch.randperm(len(codes) // CONTEXT - 1, generator=torch.Generator().manual_seed(seed)) * CONTEXT
    windows = starts[:, None] + torch.arange(CONTEXT)
    pairs = codes[windows], codes[windows + shift]
    return (pairs[0][:3000], pairs[1][:3000]), (pairs[0][3000:4000], pairs[1][3000:4000])


def on_digits(seed: int, module: pl.LightningModule, wrong: float = 0.0, **more: Any) -> Run:
    data = digits(seed, wrong)
    return Run(module, data.train, data.val, **more)


def on_fashion(seed: int, module: pl.LightningModule, wrong: float = 0.0, **more: Any) -> Run:
    data = fashion(seed, wrong, images=5000)
    return Run(module, data.train, data.val, **{"epochs": 8, "batch": 64, **more})


def on_letters(seed: int, module: pl.LightningModule, shift: int = 1, **more: Any) -> Run:
    train, val = letters(seed, shift)
    return Run(module, train, val, **{"epochs": 8, **more})


def on_diabetes(seed: int, module: pl.LightningModule, scaled: bool = True, **more: Any) -> Run:
    from sklearn.datasets import load_diabetes

    inputs, targets = (torch.tensor(each).float() for each in load_diabetes(return_X_y=True))
    inputs, targets = inputs / inputs.std(0), targets[:, None]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    inputs, targets = inputs[order], targets[order]
    if scaled:
        targets = (targets - targets[:300].mean()) / targets[:300].std()
    return Run(module, (inputs[:300], targets[:300]), (inputs[300:], targets[300:]), **{"epochs": 20, **more})


def cosine(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def one_cycle(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps)


def early_decay(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 12), 0.01)


# ---------------------------------------------------------------------------------------------------- healthy


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, _bits(targets))


def _bits(labels: Tensor) -> Tensor:
    """Three questions about a digit: even, above four, a prime."""
    prime = torch.isin(labels, torch.tensor([2, 3, 5, 7]))
    return torch.stack([labels % 2 == 0, labels > 4, prime], 1).float()


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, label_smoothing=0.1)


HEALTHY = [
    Case("perceptron", lambda seed: on_digits(seed, Training(mlp(64, 64, 10)), epochs=12)),
    Case("perceptron, cosine", lambda seed: on_digits(seed, Training(mlp(64, 64, 64, 10), schedule=cosine), epochs=15)),
    Case(
        "perceptron, dropout",
        lambda seed: on_digits(
            seed,
            Training(mlp(64, 128, 128, 10, between=lambda _: nn.Dropout(0.3)), rate=1e-3, optimizer="adamw"),
            epochs=20,
        ),
    ),
    Case("convolutions, AdamW", lambda seed: on_fashion(seed, Training(cnn(), rate=1e-3, optimizer="adamw"))),
    Case("convolutions, BatchNorm, cosine", lambda seed: on_fashion(seed, Training(cnn(True), schedule=cosine))),
    Case(
        "perceptron, one cycle",
        lambda seed: on_fashion(seed, Training(mlp(196, 128, 10), schedule=one_cycle), epochs=6),
    ),
    Case(
        "recurrent, letters",
        lambda seed: on_letters(
            seed,
            Training(Letters(Recurrent(48, 48, batch_first=True)), rate=3e-3, optimizer="adam", accuracy=False),
        ),
    ),
    Case(
        "transformer, letters",
        lambda seed: on_letters(
            seed, Training(Letters(Attention()), rate=1e-3, optimizer="adamw", accuracy=False), epochs=6
        ),
    ),
    Case(
        "regression",
        lambda seed: on_diabetes(
            seed, Training(mlp(10, 32, 1), functional.mse_loss, rate=0.003, accuracy=False, weight_decay=0.01)
        ),
    ),
    Case("several labels", lambda seed: on_digits(seed, Training(mlp(64, 64, 3), bits, accuracy=False), epochs=15)),
    Case("smoothed labels", lambda seed: on_digits(seed, Training(mlp(64, 64, 10), smoothed), epochs=15)),
    Case("linear", lambda seed: on_digits(seed, Training(mlp(64, 10), rate=0.02), epochs=30)),
    Case("noisy labels", lambda seed: on_fashion(seed, Training(mlp(196, 64, 10), rate=0.01), wrong=0.1, epochs=6)),
    Case(
        "small batches",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rate=0.005, weight_decay=1e-3), epochs=8, batch=4),
    ),
]


# ---------------------------------------------------------------------------------------------------- broken


def twice(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.softmax(1), targets)


def rectified(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.relu(), targets)


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="sum")


def negative(logits: Tensor, targets: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, targets)


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(logits.argmax(1, keepdim=True).float() + 0 * logits[:, :1], targets[:, None].float())


class Constant(nn.Module):
    """The inputs are lost on the way."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return 0 * inputs


class Mixing(nn.Module):
    """A reshape across the batch."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.t().reshape(inputs.shape)


class Detached(nn.Module):
    """No gradient goes through."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.detach()


def scaled(net: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
    return net


def dead(net: nn.Sequential) -> nn.Module:
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear) and layer is not net[-1]:
                layer.bias.fill_(-20.0)
    return net


def frozen(net: nn.Sequential) -> nn.Module:
    for layer in [*net][:-1]:
        layer.requires_grad_(False)
    return net


def sorted_digits(seed: int, module: pl.LightningModule, **more: Any) -> Run:
    data = digits(seed)
    order = data.train[1].argsort()
    return Run(module, (data.train[0][order], data.train[1][order]), data.val, shuffle=False, **more)


def few_digits(seed: int, module: pl.LightningModule, train: int, val: int = 300, **more: Any) -> Run:
    data = digits(seed)
    (images, labels), held_out = data.train, data.val
    return Run(module, (images[:train], labels[:train]), (held_out[0][:val], held_out[1][:val]), **more)


def other_digits(seed: int, module: pl.LightningModule, change: Callable[[Tensor], Tensor], **more: Any) -> Run:
    data = digits(seed)
    return Run(module, data.train, (change(data.val[0]), data.val[1]), **more)


def changed_labels(seed: int, module: pl.LightningModule, change: Callable[[Tensor], Tensor], **more: Any) -> Run:
    data = digits(seed)
    return Run(module, (data.train[0], change(data.train[1])), data.val, **more)


def pixels(seed: int, module: pl.LightningModule) -> Run:
    run = on_fashion(seed, module)
    return replace(run, train=(90 * run.train[0] + 73, run.train[1]), val=(90 * run.val[0] + 73, run.val[1]))


def duplicated(seed: int, module: pl.LightningModule, **more: Any) -> Run:
    data = digits(seed)
    (images, labels), (val, val_labels) = data.train, data.val
    return Run(module, (torch.cat([images, val]), torch.cat([labels, val_labels])), (val, val_labels), **more)


def leaked(seed: int, module: pl.LightningModule, **more: Any) -> Run:
    data = digits(seed)
    pairs = [(torch.cat([images, labels[:, None].float()], 1), labels) for images, labels in (data.train, data.val)]
    return Run(module, pairs[0], pairs[1], **more)


def named(*rules: str) -> frozenset[str]:
    return frozenset(rules)


def shifted(labels: Tensor) -> Tensor:
    return (labels + 1) % 10


def shuffled(labels: Tensor) -> Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


BROKEN = [
    Case(
        "learning rate times 30",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rate=3.0)),
        named("learning rate too high", "learning rate looks too high", "divergence", "diverged", "not finite"),
    ),
    Case(
        "learning rate over 300",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rate=1e-4, momentum=0.0)),
        named("learning rate too low", "learning rate looks too low", "falls too slowly"),
    ),
    Case(
        "softmax twice",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), twice)),
        named("softmax applied twice"),
    ),
    Case("sum for mean", lambda seed: on_digits(seed, Training(mlp(64, 64, 10), summed)), named("loss is a sum")),
    Case(
        "not shuffled",
        lambda seed: sorted_digits(seed, Training(mlp(64, 64, 10))),
        named("labels all alike", "periodic training loss"),
    ),
    Case(
        "body frozen",
        lambda seed: on_digits(seed, Training(frozen(mlp(64, 8, 8, 10)))),
        named("frozen parameters"),
    ),
    Case(
        "head not in the optimizer",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), trained=lambda net: [*net.children()][1].parameters())),
        named("not in any optimizer"),
    ),
    Case(
        "dead units",
        lambda seed: on_digits(seed, Training(dead(mlp(64, 64, 64, 10)))),
        named("dead units", "input without information", "layer never changes", "vanishing gradient"),
    ),
    Case(
        "wrong sign",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), negative)),
        named("wrong sign of the loss"),
    ),
    Case(
        "examples mixed",
        lambda seed: on_digits(seed, Training(nn.Sequential(nn.Flatten(), Mixing(), *[*mlp(64, 64, 10)][1:]))),
        named("examples mixed"),
    ),
    Case(
        "zero_grad missing",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), zero_grad=False)),
        named("gradients not set to zero"),
    ),
    Case(
        "evaluation mode in training",
        lambda seed: on_fashion(seed, Training(cnn(True), rate=0.05, train_in_evaluation_mode=True)),
        named("evaluation mode in training"),
    ),
    Case(
        "validation data in the training data",
        lambda seed: duplicated(seed, Training(mlp(64, 64, 10))),
        named("validation data in the training data"),
    ),
    Case(
        "validation inverted",
        lambda seed: other_digits(seed, Training(mlp(64, 64, 10)), lambda images: -images),
        named("mismatch"),
    ),
    Case(
        "training labels shifted",
        lambda seed: changed_labels(seed, Training(mlp(64, 64, 10)), shifted),
        named("mismatch"),
    ),
    Case(
        "training labels shuffled",
        lambda seed: changed_labels(seed, Training(mlp(64, 64, 10)), shuffled),
        named("overfitting", "best at the start"),
    ),
    Case(
        "initialisation times 10",
        lambda seed: on_digits(seed, Training(scaled(mlp(64, 64, 64, 10), 10.0))),
        named("initial loss high"),
    ),
    Case(
        "initialisation over 30",
        lambda seed: on_digits(seed, Training(scaled(mlp(64, 64, 64, 64, 10), 1 / 30), momentum=0.0)),
        named("training loss does not fall", "falls too slowly", "learning rate too low", "small sample not learnt"),
    ),
    Case(
        "too small",
        lambda seed: on_fashion(seed, Training(mlp(196, 2, 10))),
        named("underfitting", "small sample not learnt", "model bias"),
    ),
    Case(
        "too big for the data",
        lambda seed: few_digits(seed, Training(mlp(64, 512, 512, 10)), 60, epochs=200),
        named("overfitting", "best at the start"),
    ),
    Case(
        "pixels not normalised",
        lambda seed: pixels(seed, Training(mlp(196, 64, 10))),
        named("initial loss high", "inputs not normalised"),
    ),
    Case(
        "inputs lost",
        lambda seed: on_digits(seed, Training(nn.Sequential(Constant(), *mlp(64, 64, 10)))),
        named("input without information"),
    ),
    Case(
        "logits rectified",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rectified)),
        named("activation on the logits"),
    ),
    Case(
        "detached",
        lambda seed: on_digits(seed, Training(nn.Sequential(*[*mlp(64, 64, 32)][:3], Detached(), nn.Linear(64, 10)))),
        named("no gradient", "layer never changes"),
    ),
    Case(
        "target among the inputs",
        lambda seed: leaked(seed, Training(mlp(65, 64, 10))),
        named("target among the inputs"),
    ),
    Case(
        "the future is seen",
        lambda seed: on_letters(
            seed, Training(Letters(Attention(causal=False)), rate=1e-3, optimizer="adamw", accuracy=False), epochs=4
        ),
        named("the future is seen"),
    ),
    Case(
        "targets are the inputs",
        lambda seed: on_letters(
            seed, Training(Letters(Attention()), rate=1e-3, optimizer="adamw", accuracy=False), shift=0, epochs=4
        ),
        named("target is the input"),
    ),
    Case(
        "targets not normalised",
        lambda seed: on_diabetes(
            seed, Training(mlp(10, 32, 1), functional.mse_loss, rate=1e-5, accuracy=False), scaled=False
        ),
        named("targets not normalised"),
    ),
    Case(
        "decayed too early",
        lambda seed: on_fashion(seed, Training(mlp(196, 64, 10), rate=0.005, momentum=0.0, schedule=early_decay)),
        named("decayed too early"),
    ),
    Case(
        "stopped too early",
        lambda seed: on_fashion(seed, Training(mlp(196, 64, 10), rate=0.003, momentum=0.0), epochs=4),
        named("best at the end", "falls too slowly"),
    ),
    Case(
        "validation set of 10",
        lambda seed: few_digits(seed, Training(mlp(64, 64, 10), rate=0.2), 800, 10),
        named("validation jumps"),
    ),
    Case(
        "recurrent net that explodes",
        lambda seed: on_letters(
            seed,
            Training(Letters(Recurrent(48, 48, batch_first=True)), rate=20.0, accuracy=False),
        ),
        named("learning rate too high", "learning rate looks too high", "divergence", "diverged", "not finite"),
    ),
]


# ---------------------------------------------------------------------------------------------------- looked at once


def sigmoid_twice(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits.sigmoid(), _bits(targets))


def no_log(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.nll_loss(logits.softmax(1), targets)


def favouring(net: nn.Sequential) -> nn.Module:
    head: Any = net[-1]
    with torch.no_grad():
        head.bias[3] = 20.0
    return net


def with_nan(seed: int, module: pl.LightningModule) -> Run:
    run = on_fashion(seed, module)
    run.train[0][1234, 0, 3, 3] = math.nan
    return run


def few_images(seed: int, module: pl.LightningModule, images: int, **more: Any) -> Run:
    run = on_fashion(seed, module, **more)
    return replace(run, train=(run.train[0][:images], run.train[1][:images]))


def noisy_validation(seed: int, module: pl.LightningModule) -> Run:
    run = on_fashion(seed, module)
    return replace(run, val=(run.val[0] + 2 * torch.randn(run.val[0].shape), run.val[1]))


def biases(net: nn.Module) -> Any:
    return [parameter for name, parameter in net.named_parameters() if name.endswith("bias")]


FRESH = [
    Case(
        "convolutions, learning rate times 100",
        lambda seed: on_fashion(seed, Training(cnn(), rate=0.1, optimizer="adamw")),
        named("learning rate too high", "learning rate looks too high", "divergence", "diverged", "early instability"),
    ),
    Case(
        "recurrent, learning rate over 100",
        lambda seed: on_letters(
            seed, Training(Letters(Recurrent(48, 48, batch_first=True)), rate=3e-5, optimizer="adam", accuracy=False)
        ),
        named("learning rate too low", "learning rate looks too low", "falls too slowly", "best at the end"),
    ),
    Case(
        "sigmoid twice",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 3), sigmoid_twice, accuracy=False)),
        named("sigmoid applied twice"),
    ),
    Case(
        "probabilities for their logarithms",
        lambda seed: on_fashion(seed, Training(cnn(), no_log, rate=1e-3, optimizer="adamw"), epochs=3),
        named("no log-probabilities"),
    ),
    Case(
        "validation images with noise",
        lambda seed: noisy_validation(seed, Training(cnn(), rate=1e-3, optimizer="adamw")),
        named("mismatch"),
    ),
    Case(
        "convolutions on 100 images",
        lambda seed: few_images(seed, Training(cnn(), rate=1e-3, optimizer="adamw"), 100, epochs=150),
        named("overfitting", "best at the start"),
    ),
    Case(
        "only biases in the optimizer",
        lambda seed: on_fashion(seed, Training(mlp(196, 64, 10), trained=biases), epochs=4),
        named("not in any optimizer"),
    ),
    Case(
        "momentum 0.999",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rate=0.05, momentum=0.999)),
        named("learning rate too high", "learning rate looks too high", "divergence", "diverged", "early instability"),
    ),
    Case(
        "a class favoured by the head",
        lambda seed: on_digits(seed, Training(favouring(mlp(64, 64, 10)))),
        named("initial loss high"),
    ),
    Case(
        "transformer, learning rate 1",
        lambda seed: on_letters(
            seed, Training(Letters(Attention()), rate=1.0, optimizer="adam", accuracy=False), epochs=3
        ),
        named("learning rate too high", "learning rate looks too high", "divergence", "diverged", "early instability"),
    ),
    Case(
        "recurrent, sum for mean",
        lambda seed: on_letters(
            seed,
            Training(Letters(Recurrent(48, 48, batch_first=True)), summed, 3e-3, "adam", accuracy=False),
            epochs=3,
        ),
        named("loss is a sum"),
    ),
    Case(
        "a pixel that is NaN",
        lambda seed: with_nan(seed, Training(mlp(196, 64, 10))),
        named("not finite", "initial loss not finite"),
    ),
    Case(
        "two epochs",
        lambda seed: on_fashion(seed, Training(cnn(), rate=1e-3, optimizer="adamw"), epochs=2),
        named("best at the end", "falls too slowly"),
    ),
    Case(
        "60 % of the labels wrong",
        lambda seed: on_digits(seed, Training(mlp(64, 256, 256, 10)), wrong=0.6),
        named("overfitting", "best at the start"),
    ),
    Case(
        "recurrent in both directions",
        lambda seed: on_letters(
            seed,
            Training(Letters(Recurrent(48, 24, batch_first=True, bidirectional=True)), accuracy=False, rate=0.5),
            epochs=3,
        ),
        named("the future is seen"),
    ),
    Case(
        "sigmoids, ten deep",
        lambda seed: on_digits(seed, Training(mlp(64, *[32] * 10, 10, activation=nn.Sigmoid))),
        named("small sample not learnt", "training loss does not fall", "no progress"),
    ),
]
