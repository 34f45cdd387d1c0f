"""Trainings that were written before their author read the rules: other data, networks, optimizers and lengths of run.

What counts as right was decided before any of them was run: a rule that says what is wrong. Where no rule did, the name
is that of the rule that would have to be written.
"""

import io
import keyword
import math
import sysconfig
import token
import tokenize
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _zoo import Attention, Case, Letters, Recurrent, Run, Training, cnn, letters, mlp, named, on_letters
from _zoo import cosine as cosine
from _zoo_later import Patches, Rows, table
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from _data import digits, fashion  # isort: skip

Batch = tuple[Tensor, Tensor]
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SOURCES = ("argparse", "ast", "datetime", "inspect", "mailbox", "tarfile", "turtle", "typing")
TAGS = 6  # of a character in a line of code: none, name, keyword, operator, literal, comment


class Free(pl.LightningModule):
    """A training whose step is a function.

    Args:
        net: The network.
        step: The loss of the network and a batch.
        rate: Learning rate.
        optimizer: Class of it.
        validation: The same as the step where it is another.
        schedule: Makes a scheduler of the optimizer and the number of updates.
        options: More of the optimizer.
    """

    def __init__(
        self,
        net: nn.Module,
        step: Callable[[Any, Batch], Tensor],
        rate: float = 1e-3,
        optimizer: Any = torch.optim.Adam,
        validation: Callable[[Any, Batch], Tensor] | None = None,
        schedule: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.net, self.step, self.rate, self.optimizer = net, step, rate, optimizer
        self.validation, self.schedule, self.options = validation or step, schedule, options

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self.net, batch)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.validation(self.net, batch))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), self.rate, **self.options)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def of(loss: Callable[..., Tensor]) -> Callable[[Any, Batch], Tensor]:
    """The step whose loss is of outputs and targets."""
    return lambda net, batch: loss(net(batch[0]), batch[1])


cross_entropy, squares = of(functional.cross_entropy), of(functional.mse_loss)
binary = of(functional.binary_cross_entropy_with_logits)

# ---------------------------------------------------------------------------------------------------- data


def cut(inputs: Tensor, targets: Tensor, train: int, val: int, seed: int) -> tuple[Batch, Batch]:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    first, then = order[:train], order[train : train + val]
    return (inputs[first], targets[first]), (inputs[then], targets[then])


@cache
def photograph(name: str = "china.jpg") -> Tensor:
    """Colours, of shape (rows, columns, 3), standardised."""
    from sklearn.datasets import load_sample_image

    pixels = torch.tensor(load_sample_image(name)).float()[::3, ::3]
    return (pixels - pixels.mean((0, 1))) / pixels.std((0, 1))


def colours(seed: int, train: int = 4000) -> tuple[Batch, Batch]:
    """Waves of the place, and the colour of the pixel there."""
    picture = photograph()
    places = torch.cartesian_prod(*(torch.linspace(-1, 1, size) for size in picture.shape[:2]))
    waves = torch.cat([(frequency * math.pi * places) for frequency in (1, 2, 4, 8)], 1)
    inputs = torch.cat([places, waves.sin(), waves.cos()], 1)
    return cut(inputs, picture.reshape(-1, 3), train, 1000, seed)


def patches(seed: int, train: int = 3000) -> tuple[Batch, Batch]:
    """Grey patches of 8 x 8 pixels, and themselves."""
    grey = photograph("flower.jpg").mean(-1)
    every = grey.unfold(0, 8, 3).unfold(1, 8, 3).reshape(-1, 64)
    every = (every - every.mean()) / every.std()
    return cut(every, every, train, 500, seed)


@cache
def code(source: str) -> str:
    return (STANDARD_LIBRARY / f"{source}.py").read_text(encoding="utf-8")


def sources(seed: int, train: int = 2400) -> tuple[Batch, Batch]:
    """Pairs of characters in 64 of a module of the standard library, as numbers below 1,024, and which module it is."""
    inputs, targets = [], []
    for label, source in enumerate(SOURCES):
        codes = torch.tensor(list(code(source).encode())).long()
        pairs = (codes[:-1] * 31 + codes[1:]) % 1024
        inputs.append(pairs[: len(pairs) // 64 * 64].view(-1, 64)[:380])
        targets.append(torch.full((len(inputs[-1]),), label))
    return cut(torch.cat(inputs), torch.cat(targets), train, 500, seed)


@cache
def tagged_lines() -> Batch:
    """Characters of lines of code, filled up to 80 with zeros, and the kind of the token that each belongs to."""
    codes, kinds = [], []
    for source in SOURCES[:3]:
        lines = code(source).splitlines()
        tags = [[0] * len(line) for line in lines]
        for each in tokenize.generate_tokens(io.StringIO(code(source)).readline):
            kind = {token.NAME: 1, token.OP: 3, token.STRING: 4, token.NUMBER: 4, token.COMMENT: 5}.get(each.type, 0)
            kind = 2 if keyword.iskeyword(each.string) else kind
            if kind and each.start[0] == each.end[0]:
                row = tags[each.start[0] - 1]
                row[each.start[1] : each.end[1]] = [kind] * (each.end[1] - each.start[1])
        for line, row in zip(lines, tags, strict=True):
            if 4 < len(line) <= 80 and line.isascii():
                codes.append([*line.encode(), *[0] * (80 - len(line))])
                kinds.append([*row, *[0] * (80 - len(line))])
    return torch.tensor(codes), torch.tensor(kinds)


def tags(seed: int, train: int = 2000) -> tuple[Batch, Batch]:
    return cut(*tagged_lines(), train, 500, seed)


@cache
def images(seed: int, train: int = 3000) -> tuple[Batch, Batch]:
    data = fashion(seed, images=train)
    return data.train, (data.val[0][:1000], data.val[1][:1000])


def pairs(seed: int, train: int = 2000) -> tuple[Batch, Batch]:
    """Two images, half of the time of the same class, and whether they are."""
    parts = []
    for pictures, labels in images(seed, 2 * train):
        flat, half = pictures.flatten(1), len(labels) // 2
        order = torch.cat([labels[:half].argsort(), half + labels[half:].argsort()])
        order = torch.where(torch.arange(len(order)) % 2 == 0, order, order.flip(0))
        mates = order[:half], order[half : 2 * half]
        same = (labels[mates[0]] == labels[mates[1]]).float()
        parts.append((torch.stack([flat[mates[0]], flat[mates[1]]], 1), same))
    return parts[0], parts[1]


# ---------------------------------------------------------------------------------------------------- networks


class Bag(nn.Module):
    """Mean of embeddings, then two layers."""

    def __init__(self, width: int = 32, classes: int = len(SOURCES), dropout: float = 0.0) -> None:
        super().__init__()
        self.codes = nn.EmbeddingBag(1024, width)
        self.body = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, classes))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.body(self.codes(inputs))
        return outputs


class Tagger(nn.Module):
    """Says the kind of each character; reads in both directions, as it may."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.codes = nn.Embedding(128, width)
        self.body = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.last = nn.Linear(2 * width, TAGS)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.body(self.codes(inputs))[0]).transpose(1, 2)
        return outputs


class Tied(Letters):
    """The last layer's matrix is that of the embedding, which starts with a deviation of 1."""

    def __init__(self) -> None:
        super().__init__(Attention())
        self.last.weight = self.codes.weight


class Autoencoder(nn.Module):
    """Of 64 numbers, variational where asked for the divergence."""

    def __init__(self, bottleneck: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 64, 2 * bottleneck), mlp(bottleneck, 64, 64)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.both(inputs)[0]
        return outputs

    def both(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.encoder(inputs).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        outputs: Tensor = self.decoder(mean + noise * (0.5 * spread).exp())
        return outputs, 0.5 * (mean**2 + spread.exp() - 1 - spread).sum(1).mean()


def variational(weight: float) -> Callable[[Any, Batch], Tensor]:
    def step(net: Any, batch: Batch) -> Tensor:
        outputs, divergence = net.both(batch[0])
        loss: Tensor = functional.mse_loss(outputs, batch[1]) + weight / 64 * divergence
        return loss

    return step


def deep(width: int, layers: int) -> nn.Module:
    """Tanh, no residuals, weights of a tenth of what keeps the variance."""
    net: nn.Module = mlp(width, *[32] * layers, 10, activation=nn.Tanh)
    for layer in net.children():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.in_features))
    return net


def embed(net: Any, two: Tensor) -> Tensor:
    """Squared distances of the embeddings."""
    first, second = net(two[:, 0]), net(two[:, 1])
    distances: Tensor = ((first - second) ** 2).sum(1)
    return distances


def contrastive(root: bool) -> Callable[[Any, Batch], Tensor]:
    def step(net: Any, batch: Batch) -> Tensor:
        squares = embed(net, batch[0])
        distance = squares.sqrt() if root else (squares + 1e-6).sqrt()
        return (batch[1] * squares + (1 - batch[1]) * functional.relu(1 - distance) ** 2).mean()

    return step


# ---------------------------------------------------------------------------------------------------- broken

TOO_HIGH = ("learning rate too high", "learning rate looks too high", "divergence", "diverged", "early instability")
TOO_LOW = ("learning rate too low", "learning rate looks too low", "falls too slowly", "training loss does not fall")
MEMORISED = ("overfitting", "best at the start", "validation never improves")
ELSEWHERE = ("mismatch", "validation never improves")
TOO_STRONG = ("training loss above validation", "underfitting", "model bias")
NO_FINITE = ("not finite", "initial loss not finite", "loss not finite", "gradient not finite", "inputs not finite")
CUT_OFF = ("no gradient", "layer never changes", "zero gradient", "input without information")


def on(data: tuple[Batch, Batch], module: pl.LightningModule, **more: Any) -> Run:
    return Run(module, *data, **{"epochs": 8, **more})


def changed(data: tuple[Batch, Batch], train: Any = None, val: Any = None) -> tuple[Batch, Batch]:
    """With one part or both of them changed by a function of inputs and targets."""
    return train(*data[0]) if train else data[0], val(*data[1]) if val else data[1]


def next_label(inputs: Tensor, targets: Tensor) -> Batch:
    return inputs, targets.roll(1, 0)


def in_order(inputs: Tensor, targets: Tensor) -> Batch:
    order = targets.argsort(stable=True)
    return inputs[order], targets[order]


def frozen_head(net: nn.Module) -> nn.Module:
    [*net.children()][-1].requires_grad_(False)
    return net


def dead_convolutions(seed: int) -> Run:
    net: Any = cnn()
    with torch.no_grad():
        net[3].bias.fill_(-10.0)
    return on(images(seed), Training(net, rate=1e-3, optimizer="adamw"), batch=64)


def with_targets(inputs: Tensor, targets: Tensor) -> Batch:
    return torch.cat([inputs, 2 * targets - 1], 1), targets


class Accumulating(Free):
    """By hand; how is said by its arguments.

    Args:
        zero: Whether gradients are set to zero.
        every: Batches an update.
        twice: Whether a second optimizer has the same parameters.
    """

    def __init__(self, *args: Any, zero: bool = True, every: int = 1, twice: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self.automatic_optimization, self.zero, self.every, self.twice = False, zero, every, twice

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            optimizers: Any = self.optimizers()
            for optimizer in optimizers if self.twice else [optimizers]:
                optimizer.step()
            if self.zero:
                self.zero_grad()
        return loss

    @override
    def configure_optimizers(self) -> Any:
        return [Free.configure_optimizers(self) for _ in range(1 + self.twice)]


class BuiltInEvaluationMode(Training):
    """The backbone was put into evaluation mode when it was loaded."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.net.eval()


def copies(seed: int) -> Run:
    """Rare classes are repeated before the split."""
    (rows, labels), (more, more_labels) = images(seed, 600)
    rows, labels = torch.cat([rows, more[:400]]).repeat(4, 1, 1, 1), torch.cat([labels, more_labels[:400]]).repeat(4)
    return on(cut(rows, labels, 3000, 1000, seed), Training(cnn(), rate=1e-3, optimizer="adamw"), batch=64)


def raw_wine(seed: int) -> Run:
    from sklearn.datasets import load_wine

    inputs, labels = load_wine(return_X_y=True)
    data = cut(torch.tensor(inputs).float(), torch.tensor(labels), 120, 58, seed)
    return on(data, Training(mlp(13, 32, 3), rate=0.01), epochs=40, batch=16)


def constant_feature(seed: int) -> Run:
    """A column of ones is standardised too."""
    from sklearn.datasets import load_iris

    inputs, labels = load_iris(return_X_y=True)
    rows = torch.cat([torch.tensor(inputs).float(), torch.ones(150, 1)], 1)
    data = cut((rows - rows.mean(0)) / rows.std(0), torch.tensor(labels), 100, 50, seed)
    return on(data, Training(mlp(5, 16, 3)), epochs=20, batch=10)


class HalfWithoutGradient(Patches):
    """What comes before the last layer is taken for features that are given."""

    @override
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.last(self.body(tokens).mean(1).data)
        return logits


def exponential(optimizer: Any, _: int) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def by_integers(optimizer: Any, _: int) -> Any:
    """Meant as a warmup of a thousand updates."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step // 1000))


def half_period(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps // 6)


class SlowAverage(Training):
    """Validates an average of the weights that forgets nothing in ten thousand updates."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        average: Any = torch.optim.swa_utils
        self.average = average.AveragedModel(self.net, multi_avg_fn=average.get_ema_multi_avg_fn(0.9999))
        self.average.requires_grad_(False)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.net)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.average(batch[0]), batch[1]))


class Mixup(nn.Module):
    """Mixes images, and forgets the labels."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return 0.3 * inputs + 0.7 * inputs[torch.randperm(len(inputs))] if self.training else inputs


class Flipped(nn.GRU):
    """Reads from the end, and does not turn its outputs."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]  # a Module takes anything
        outputs: Tensor = super().forward(inputs.flip(1))[0]
        return outputs


class Same(nn.Module):
    """Convolutions over letters, filled up on both sides."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.then = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.then(self.first(inputs.transpose(1, 2)).relu()).relu().transpose(1, 2)
        return outputs


class OverTheBatch(nn.Module):
    """Takes the mean over the wrong one of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.GRU(14, 32, batch_first=True), nn.Linear(32, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        outputs = self.body(images[:, 0])[0]
        logits: Tensor = self.last(outputs[:, -1] + 10 * outputs[:, -1].mean(0))
        return logits


def over_time(net: Any, batch: Batch) -> Tensor:
    """Logits are of shape (batch, letters, places)."""
    return functional.nll_loss(net(batch[0]).log_softmax(2), batch[1])


def logarithms(net: Any, batch: Batch) -> Tensor:
    return functional.mse_loss(net(batch[0]).log(), batch[1].log())


def absolute(net: Any, batch: Batch) -> Tensor:
    return functional.l1_loss(net(batch[0]), batch[1][:, :1].squeeze(1))


def first_channel(inputs: Tensor, targets: Tensor) -> Batch:
    return inputs, targets[:, :1]


def penalised(net: Any, batch: Batch) -> Tensor:
    penalty = torch.stack([parameter.square().sum() for parameter in net.parameters()]).sum()
    return functional.cross_entropy(net(batch[0]), batch[1]) + 1.0 * penalty


class SameBatch(Training):
    """The first batch is kept, and taken again and again."""

    first: Any = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first = self.first or batch
        return super().training_step(self.first, batch_idx)


class GroupAtZero(Training):
    """The new head was given the learning rate of the frozen part."""

    @override
    def configure_optimizers(self) -> Any:
        net: Any = self.net
        others = [each for name, each in net.named_parameters() if not name.startswith("last")]
        groups = [{"params": others}, {"params": net.last.parameters(), "lr": 0.0}]
        return torch.optim.AdamW(groups, self.rate)


class TrainOnly(Training):
    """Inputs are standardised in the training step alone."""

    mean: Any = None
    deviation: Any = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(((batch[0] - self.mean) / self.deviation, batch[1]), batch_idx)


def train_only(seed: int) -> Run:
    run = raw_wine(seed)
    module = TrainOnly(mlp(13, 32, 3), rate=0.01)
    module.mean, module.deviation = run.train[0].mean(0), run.train[0].std(0)
    return on((run.train, run.val), module, epochs=40, batch=16)


def cancer(seed: int, module: pl.LightningModule, change: Any = None, **more: Any) -> Run:
    from sklearn.datasets import load_breast_cancer

    run = table(load_breast_cancer, seed, module, True)
    data = run.train, run.val
    return on(changed(data, change, change) if change else data, module, **{"epochs": 20, "batch": 16, **more})


def permuted(inputs: Tensor, targets: Tensor) -> Batch:
    return inputs, (3 * targets + 1) % 10


def large_targets(seed: int) -> Run:
    module = Free(mlp(18, 64, 1), squares, 1e-3)
    data = changed(colours(seed), lambda x, y: (x, 1e6 + 1e5 * y[:, :1]), lambda x, y: (x, 1e6 + 1e5 * y[:, :1]))
    return on(data, module, batch=64)


def few_images(seed: int, module: pl.LightningModule, train: int, val: int, **more: Any) -> Run:
    data = digits(seed)
    part = (data.train[0][:train], data.train[1][:train]), (data.val[0][:val], data.val[1][:val])
    return on(part, module, **more)


def repeated(inputs: Tensor, targets: Tensor) -> Batch:
    return inputs[:40].repeat(40, 1, 1, 1), targets[:40].repeat(40)


UNSEEN = [
    # those kinds that every list has, in other clothes
    Case(
        "labels of the next image",
        lambda seed: on(
            changed(images(seed), next_label, next_label), Training(Rows(), rate=2e-3, optimizer="adamw"), batch=64
        ),
        named(*MEMORISED, "underfitting", "training loss does not fall", "no progress", "labels say nothing"),
    ),
    Case(
        "softmax twice, transformer",
        lambda seed: on(
            images(seed),
            Free(Patches(), lambda net, b: functional.cross_entropy(net(b[0]).softmax(-1), b[1])),
            batch=64,
            epochs=3,
        ),
        named("softmax applied twice"),
    ),
    Case(
        "sum for mean, autoencoder",
        lambda seed: on(patches(seed), Free(mlp(64, 16, 64), of(nn.MSELoss(reduction="sum")))),
        named("loss is a sum"),
    ),
    Case(
        "not shuffled, embeddings",
        lambda seed: on(changed(sources(seed), in_order), Free(Bag(), cross_entropy, 3e-3), shuffle=False),
        named("labels all alike", "periodic training loss", "not shuffled"),
    ),
    Case(
        "head frozen",
        lambda seed: on(images(seed), Training(frozen_head(cnn(True)), rate=1e-3, optimizer="adamw"), batch=64),
        named("frozen parameters"),
    ),
    Case(
        "learning rate times 30, colours",
        lambda seed: on(colours(seed), Free(mlp(18, 64, 64, 3), squares, 0.1), batch=64),
        named(*TOO_HIGH),
    ),
    Case(
        "learning rate over 30, transformer",
        lambda seed: on(images(seed), Training(Patches(), rate=3e-5, optimizer="adamw"), batch=64, epochs=5),
        named(*TOO_LOW, "best at the end"),
    ),
    Case("dead convolutions", dead_convolutions, named(*CUT_OFF, "vanishing gradient", "dead units")),
    Case(
        "wrong sign, regression",
        lambda seed: on(
            colours(seed), Free(mlp(18, 64, 3), lambda net, b: -functional.mse_loss(net(b[0]), b[1])), batch=64
        ),
        named("wrong sign of the loss"),
    ),
    Case(
        "target among the inputs, table",
        lambda seed: cancer(seed, Free(mlp(31, 32, 1), binary), with_targets),
        named("target among the inputs"),
    ),
    Case(
        "zero_grad missing, Adam",
        lambda seed: on(sources(seed), Accumulating(Bag(), cross_entropy, 3e-3, zero=False)),
        named("gradients not set to zero"),
    ),
    Case(
        "evaluation mode from the beginning",
        lambda seed: on(images(seed), BuiltInEvaluationMode(cnn(True), rate=0.02), batch=64),
        named("evaluation mode in training"),
    ),
    Case("repeated before the split", copies, named("validation data in the training data")),
    Case(
        "validation transposed",
        lambda seed: on(
            changed(images(seed), None, lambda x, y: (x.transpose(2, 3), y)),
            Training(cnn(), rate=1e-3, optimizer="adamw"),
            batch=64,
        ),
        named(*ELSEWHERE),
    ),
    Case(
        "tied to a wide embedding",
        lambda seed: on_letters(seed, Training(Tied(), rate=1e-3, optimizer="adamw", accuracy=False), epochs=3),
        named("initial loss high"),
    ),
    Case(
        "too small, letters",
        lambda seed: on_letters(
            seed,
            Training(Letters(Recurrent(2, 2, batch_first=True), 2), rate=0.02, optimizer="adam", accuracy=False),
            epochs=6,
        ),
        named("underfitting", "small sample not learnt", "model bias", "slow on a small sample"),
    ),
    Case(
        "too big for the data, table",
        lambda seed: few_images(
            seed, Training(mlp(64, 512, 512, 10), rate=1e-3, optimizer="adamw"), 40, 300, epochs=150, batch=8
        ),
        named(*MEMORISED),
    ),
    # and others
    Case(
        "weight decay of 10, AdamW",
        lambda seed: on(sources(seed), Free(Bag(), cross_entropy, 3e-3, torch.optim.AdamW, weight_decay=10.0)),
        named("weight decay too large", "training loss does not fall", "training loss rises", "underfitting"),
    ),
    Case(
        "dropout of 0.9, embeddings",
        lambda seed: on(sources(seed), Free(Bag(dropout=0.9), cross_entropy, 3e-3)),
        named(*TOO_STRONG, "dropout too large"),
    ),
    Case(
        "BatchNorm of two images",
        lambda seed: on(images(seed, 1000), Training(cnn(True), rate=0.02), batch=2, epochs=3),
        named("evaluation mode differs", "batches too small for BatchNorm"),
    ),
    Case(
        "softmax over time",
        lambda seed: on(letters(seed), Free(Letters(Recurrent(48, 48, batch_first=True)), over_time, 3e-3), epochs=3),
        named("no log-probabilities", "the future is seen", "examples mixed"),
    ),
    Case(
        "mean over the batch in the network",
        lambda seed: on(images(seed), Training(OverTheBatch(), rate=2e-3, optimizer="adamw"), batch=32, epochs=5),
        named("examples mixed"),
    ),
    Case(
        "targets broadcast, absolute error",
        lambda seed: on(changed(colours(seed), first_channel, first_channel), Free(mlp(18, 64, 1), absolute), batch=64),
        named("targets broadcast"),
    ),
    Case(
        "one class only",
        lambda seed: on(
            changed(images(seed), lambda x, y: (x, 0 * y), lambda x, y: (x, 0 * y)),
            Training(cnn(), rate=1e-3, optimizer="adamw"),
            batch=64,
            epochs=3,
        ),
        named("labels all alike", "imbalanced classes", "one class only"),
    ),
    Case("raw table", raw_wine, named("initial loss high", "inputs not normalised")),
    Case("constant feature standardised", constant_feature, named(*NO_FINITE)),
    Case(
        "features without gradient",
        lambda seed: on(images(seed), Training(HalfWithoutGradient(), rate=2e-3, optimizer="adamw"), batch=64),
        named(*CUT_OFF),
    ),
    Case(
        "two optimizers on the same weights",
        lambda seed: on(sources(seed), Accumulating(Bag(), cross_entropy, 3e-3, twice=True)),
        named("parameters in several optimizers"),
    ),
    Case(
        "decay of epochs every batch, colours",
        lambda seed: on(
            colours(seed), Free(mlp(18, 64, 64, 3), squares, 3e-3, schedule=exponential), batch=64, epochs=12
        ),
        named("decayed too early", *TOO_LOW),
    ),
    Case(
        "warmup that stays at zero",
        lambda seed: on(sources(seed), Free(Bag(), cross_entropy, 3e-3, schedule=by_integers)),
        named(*TOO_LOW, "learning rate is zero", "layer never changes", "warmup longer than the run"),
    ),
    Case(
        "gradient values clipped at 1e-5",
        lambda seed: on(
            images(seed),
            Training(cnn(), rate=0.05),
            batch=64,
            settings={"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"},
        ),
        named(*TOO_LOW, "gradients clipped", "best at the end"),
    ),
    Case(
        "average of weights from the start",
        lambda seed: on(images(seed), SlowAverage(cnn(), rate=1e-3, optimizer="adamw"), batch=64),
        named("validation never improves", "mismatch", "average too slow"),
    ),
    Case(
        "mixed images, labels of one",
        lambda seed: on(images(seed), Training(nn.Sequential(Mixup(), cnn()), rate=1e-3, optimizer="adamw"), batch=64),
        named(*TOO_STRONG, "examples mixed"),
    ),
    Case("standardised in training only", train_only, named(*ELSEWHERE)),
    Case(
        "bfloat16 weights",
        lambda seed: on(
            images(seed), Training(cnn(), rate=1e-4, momentum=0.0), batch=64, settings={"precision": "bf16-true"}
        ),
        named("updates lost", *TOO_LOW),
    ),
    Case(
        "time reversed",
        lambda seed: on_letters(
            seed,
            Training(Letters(Flipped(48, 48, batch_first=True)), rate=3e-3, optimizer="adam", accuracy=False),
            epochs=4,
        ),
        named("the future is seen"),
    ),
    Case(
        "convolutions filled up on both sides",
        lambda seed: on_letters(seed, Training(Letters(Same()), rate=3e-3, optimizer="adam", accuracy=False), epochs=4),
        named("the future is seen"),
    ),
    Case(
        "padding counted, tags",
        lambda seed: on(tags(seed), Free(Tagger(), cross_entropy, 3e-3), epochs=3),
        named("padding counted", "imbalanced classes"),
    ),
    Case("targets of a million", large_targets, named("targets not normalised")),
    Case(
        "logarithm of what may be negative",
        lambda seed: on(
            changed(colours(seed), lambda x, y: (x, y.abs() + 1), lambda x, y: (x, y.abs() + 1)),
            Free(mlp(18, 64, 3), logarithms),
            batch=64,
        ),
        named(*NO_FINITE),
    ),
    Case(
        "root at zero",
        lambda seed: on(
            changed(pairs(seed), lambda x, y: (torch.cat([x, x[:20, :1].repeat(1, 2, 1)]), torch.cat([y, y[:20]]))),
            Free(mlp(196, 64, 16), contrastive(True)),
        ),
        named(*NO_FINITE),
    ),
    Case(
        "tanh for unbounded targets",
        lambda seed: on(
            changed(colours(seed), lambda x, y: (x, 5 + 3 * y), lambda x, y: (x, 5 + 3 * y)),
            Free(nn.Sequential(mlp(18, 64, 3), nn.Tanh()), squares),
            batch=64,
        ),
        named("activation on the output", "activation on the logits", "small sample not learnt", "outputs bounded"),
    ),
    Case(
        "sigmoid twice, table",
        lambda seed: cancer(seed, Free(nn.Sequential(mlp(30, 32, 1), nn.Sigmoid()), binary)),
        named("sigmoid applied twice"),
    ),
    Case(
        "raw outputs for log-probabilities",
        lambda seed: on(sources(seed), Free(Bag(), of(functional.nll_loss))),
        named("no log-probabilities"),
    ),
    Case(
        "single examples, high learning rate",
        lambda seed: on(images(seed, 800), Training(cnn(), rate=0.05), batch=1, epochs=2),
        named(*TOO_HIGH),
    ),
    Case(
        "forty images, forty times",
        lambda seed: on(
            changed(images(seed), repeated), Training(cnn(), rate=1e-3, optimizer="adamw"), batch=32, epochs=20
        ),
        named(*MEMORISED, "training examples repeated"),
    ),
    Case(
        "validation of eight",
        lambda seed: few_images(seed, Training(cnn_of_digits(), rate=2e-3, optimizer="adamw"), 800, 8, epochs=25),
        named("validation jumps"),
    ),
    Case(
        "deep, tanh, weights too small",
        lambda seed: on(images(seed), Training(deep(196, 12), rate=0.01), batch=64),
        named("vanishing gradient", "training loss does not fall", "small sample not learnt", "no progress"),
    ),
    Case(
        "divergence outweighs the reconstruction",
        lambda seed: on(patches(seed), Free(Autoencoder(), variational(100.0)), epochs=12),
        named("outputs hardly depend on the input", "input without information", "penalty outweighs the loss"),
    ),
    Case(
        "validation labels of another order",
        lambda seed: on(
            changed(images(seed), None, permuted), Training(Rows(), rate=2e-3, optimizer="adamw"), batch=64
        ),
        named(*ELSEWHERE),
    ),
    Case(
        "head at a learning rate of zero",
        lambda seed: on(images(seed), GroupAtZero(Patches(), rate=2e-3, optimizer="adamw"), batch=64, epochs=4),
        named("layer never changes", "learning rate is zero", "not in any optimizer"),
    ),
    Case(
        "penalty outweighs the loss",
        lambda seed: on(images(seed), Free(mlp(196, 64, 10), penalised), batch=64),
        named("penalty outweighs the loss", "initial loss high", "weight decay too large"),
    ),
    Case(
        "the same batch again and again",
        lambda seed: on(images(seed), SameBatch(cnn(), rate=1e-3, optimizer="adamw"), batch=32),
        named(*MEMORISED, "training examples repeated"),
    ),
    Case(
        "learning rate rises in the end",
        lambda seed: on(colours(seed), Free(mlp(18, 64, 64, 3), squares, 0.03, schedule=half_period), batch=64),
        named(
            "learning rate rises", "learning rate too high", "learning rate looks too high", "periodic training loss"
        ),
    ),
]


def cnn_of_digits() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
