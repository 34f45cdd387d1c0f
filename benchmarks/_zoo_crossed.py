"""Twelve healthy trainings, and defects, most of which are applied to three of them.

No training here has its data, network, optimizer, schedule, batch size and length in common with one of ``_zoo``.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from math import cos, pi
from pathlib import Path
from sysconfig import get_paths
from typing import Any

import torch
from _zoo import Case, Detached, Loss, Run, Training, mlp, named, scaled
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _data import digits, fashion

LIBRARY = Path(get_paths()["stdlib"])
MODULES = ("_pydecimal", "argparse", "ipaddress", "mailbox", "pickletools", "statistics", "tarfile", "turtle")
CODE = ("".join((LIBRARY / f"{name}.py").read_text("utf-8") for name in ("inspect", "typing"))).encode(
    "ascii", "ignore"
)
SIGNS = sorted(set(CODE))
WORDS = 400
Pair = tuple[Tensor, Tensor]
Split = tuple[Pair, Pair]


class Crossed(Training):
    """A training with any optimizer, in any mode.

    Args:
        make: Makes the optimizer of parameters and a learning rate.
        validate_in_training_mode: Let dropout and the statistics of batches go on in validation.
        more: See Training.
    """

    def __init__(
        self, make: Callable[[Any, float], torch.optim.Optimizer], validate_in_training_mode: bool = False, **more: Any
    ) -> None:
        super().__init__(**more)
        self.make, self.validate_in_training_mode = make, validate_in_training_mode

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.validate_in_training_mode:
            self.net.train()
        super().validation_step(batch, batch_idx)

    @override
    def made(self, parameters: list[Any]) -> torch.optim.Optimizer:
        return self.make(parameters, self.rate)


@dataclass(frozen=True)
class Workload:
    """A training that a defect changes with ``replace``.

    Args:
        name: What is trained on what.
        data: Makes inputs and targets, to train and to validate, for a seed.
        net: Makes the network for a width.
        width: Of it.
        cut: The layer at which it is cut, where a defect cuts it.
        optimizer: Made of parameters and a learning rate.
        rate: Learning rate.
        epochs: How many.
        batch: Size of a batch.
        loss: Of outputs and targets.
        shuffle: Whether to.
        options: More of Crossed.
        settings: More of the Trainer.
    """

    name: str
    data: Callable[..., Split]
    net: Callable[..., nn.Sequential]
    width: int
    cut: int
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    rate: float
    epochs: int
    batch: int
    loss: Loss = functional.cross_entropy
    shuffle: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int) -> Run:
        """The training for a seed, of which depend the split and the start."""
        torch.manual_seed(seed)
        train, val = self.data(seed)
        accuracy = not train[1].is_floating_point()
        more: dict[str, Any] = {"rate": self.rate, "accuracy": accuracy, **self.options}
        module = Crossed(self.optimizer, net=self.net(self.width), loss=self.loss, **more)
        return Run(module, train, val, self.epochs, self.batch, self.shuffle, self.settings)


# ---------------------------------------------------------------------------------------------------- data


def split(inputs: Tensor, targets: Tensor, train: int, val: int, seed: int) -> Split:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(7000 + seed))
    first, second = order[:train], order[train : train + val]
    return (inputs[first], targets[first]), (inputs[second], targets[second])


def standardised(data: Split) -> Split:
    (inputs, targets), (val, val_targets) = data
    mean, std = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    return ((inputs - mean) / std, targets), ((val - mean) / std, val_targets)


def cancer(seed: int, raw: bool = False) -> Split:
    from sklearn.datasets import load_breast_cancer

    inputs, targets = (torch.tensor(each).float() for each in load_breast_cancer(return_X_y=True))
    data = split(inputs, targets[:, None], 400, 169, seed)
    return data if raw else standardised(data)


def wine(seed: int, raw: bool = False) -> Split:
    from sklearn.datasets import load_wine

    inputs, targets = (torch.tensor(each) for each in load_wine(return_X_y=True))
    data = split(inputs.float(), targets.long(), 120, 58, seed)
    return data if raw else standardised(data)


def clothes(seed: int, pixels: int, images: int) -> Split:
    data = fashion(seed, pixels=pixels, images=images)
    return data.train, (data.val[0][:1000], data.val[1][:1000])


def halves(seed: int) -> Split:
    """The upper half of a piece of clothing, and how bright the lower half is."""
    train, val = clothes(seed, 14, 4000)
    pairs = [(images[:, 0, :7].flatten(1), images[:, 0, 7:].mean((1, 2))[:, None]) for images, _ in (train, val)]
    mean, std = pairs[0][1].mean(), pairs[0][1].std()
    (inputs, targets), (val_inputs, val_targets) = pairs
    return (inputs, (targets - mean) / std), (val_inputs, (val_targets - mean) / std)


def flat(seed: int) -> Split:
    data = digits(seed)
    return data.train, data.val


def copied(seed: int) -> Split:
    data = digits(seed)
    return (data.train[0], data.train[0].clone()), (data.val[0], data.val[0].clone())


def code(seed: int, context: int, train: int, val: int, shift: int = 1) -> Split:
    """Windows of the standard library's source code, and the same a character later."""
    signs = torch.tensor([SIGNS.index(sign) for sign in CODE])
    windows = torch.arange(len(signs) // context - 1)[:, None] * context + torch.arange(context)
    return split(signs[windows], signs[windows + shift], train, val, seed)


@cache
def passages() -> Pair:
    """Five lines each from one of eight modules, as the words in them, and which module it is."""
    texts, labels = [], []
    for label, name in enumerate(MODULES):
        lines = [line for line in (LIBRARY / f"{name}.py").read_text("utf-8").splitlines() if line.strip()]
        pieces = ["\n".join(lines[start : start + 5]) for start in range(0, len(lines), 5)][:280]
        texts += [re.findall(r"[a-z]{2,}", piece.lower()) for piece in pieces]
        labels += [label] * len(pieces)
    common = [word for word, _ in Counter(word for text in texts for word in text).most_common(WORDS)]
    places = {word: place for place, word in enumerate(common)}
    counts = torch.zeros(len(texts), WORDS)
    for row, text in enumerate(texts):
        for word in text:
            if word in places:
                counts[row, places[word]] += 1
    return counts.log1p(), torch.tensor(labels)


def words(seed: int) -> Split:
    return standardised(split(*passages(), 1500, 400, seed))


# ---------------------------------------------------------------------------------------------------- networks


class Outputs(nn.Module):
    """Those of a recurrent net, without its states.

    Args:
        cells: The net.
    """

    def __init__(self, cells: nn.Module) -> None:
        super().__init__()
        self.cells = cells

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.cells(inputs)[0]
        return outputs


class Reshaped(nn.Module):
    """Something that has no parameters.

    Args:
        change: What is done.
    """

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.change(inputs)


class Residual(nn.Module):
    """Two convolutions and a way around them.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = (inputs + self.body(inputs)).relu()
        return outputs


class Places(nn.Module):
    """Adds to each patch where it is.

    Args:
        patches: How many.
        width: Of one.
    """

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(0.3 * torch.randn(patches, width))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.codes


class Causal(nn.Conv1d):
    """Sees what came before."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(functional.pad(inputs, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


def tanh(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(30, width, width, 1, activation=nn.Tanh)
    return net


def selu(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(13, width, 3, activation=nn.SELU)
    return net


def batch_norm(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(98, width, width, 1, between=nn.BatchNorm1d)
    return net


def layer_norm(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(64, width, width, 10, activation=nn.GELU, between=nn.LayerNorm)
    return net


def dropout(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(WORDS, width, 8, between=lambda _: nn.Dropout(0.5))
    return net


def autoencoder(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(64, 48, width, 48, 64, activation=nn.LeakyReLU)
    return net


def group_norm(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise((1, width, 2 * width, 2 * width)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * width, 10))


def residual(width: int) -> nn.Sequential:
    stem = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(
        *stem, Residual(width), Residual(width), nn.AvgPool2d(3, 2), nn.Flatten(), nn.Linear(9 * width, 10)
    )


def patches(images: Tensor) -> Tensor:
    return functional.unfold(images, 7, stride=7).transpose(1, 2)


def vision(width: int, batch_first: bool = True) -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=batch_first, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
    start = Reshaped(patches), nn.Linear(49, width), Places(16, width)
    return nn.Sequential(*start, encoder, Reshaped(lambda tokens: tokens.mean(1)), nn.Linear(width, 10))


def rows(width: int, batch_first: bool = True, cells: Callable[..., nn.Module] = nn.LSTM) -> nn.Sequential:
    start = Reshaped(lambda images: images.reshape(-1, 8, 8)), Outputs(cells(8, width, batch_first=batch_first))
    return nn.Sequential(*start, Reshaped(lambda outputs: outputs[:, -1]), nn.Linear(width, 10))


def recurrent(width: int, cells: Callable[..., nn.Module] = nn.LSTM) -> nn.Sequential:
    start = nn.Embedding(len(SIGNS), 32), Outputs(cells(32, width, batch_first=True))
    return nn.Sequential(*start, nn.Linear(width, len(SIGNS)), Reshaped(lambda outputs: outputs.transpose(1, 2)))


def convolutional(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Embedding(len(SIGNS), width), Reshaped(lambda codes: codes.transpose(1, 2))]
    for dilation in (1, 2, 4):
        layers += [Causal(width, width, 3, dilation=dilation), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv1d(width, len(SIGNS), 1))


# ---------------------------------------------------------------------------------------------------- healthy


def relative(shape: Callable[[float], float]) -> Callable[[Any, int], Any]:
    """A schedule of the share of the training that is over."""
    return lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps))


COSINE = {"schedule": relative(lambda done: 0.5 + 0.5 * cos(pi * min(done, 1)))}
LINEAR = {"schedule": relative(lambda done: max(0.02, 1 - done))}
WARM = {"schedule": relative(lambda done: min(1, 0.02 + 10 * done) * (0.5 + 0.5 * cos(pi * min(done, 1))))}
HAT = {"schedule": relative(lambda done: min(0.1 + 3 * done, max(0.01, 1.43 * (1 - done))))}


def sgd(momentum: float, decay: float, nesterov: bool = False) -> Callable[[Any, float], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, momentum=momentum, weight_decay=decay, nesterov=nesterov)


adam = partial(torch.optim.Adam, weight_decay=3e-3)
adamw = partial(torch.optim.AdamW, weight_decay=0.1)
adagrad = partial(torch.optim.Adagrad, weight_decay=3e-3)
bce = functional.binary_cross_entropy_with_logits
large, small = partial(clothes, pixels=28), partial(clothes, pixels=14, images=3000)
long, short = partial(code, context=64, train=1600, val=300), partial(code, context=40, train=2400, val=400)
CLIPPED = {"gradient_clip_val": 0.5}

CANCER = Workload("cancer, tanh", cancer, tanh, 16, 5, adam, 2e-3, 8, 20, bce)
WINE = Workload("wine, SELU", wine, selu, 24, 3, sgd(0.5, 0.01), 0.02, 25, 10)
HALVES = Workload(
    "halves, BatchNorm", halves, batch_norm, 64, 7, sgd(0.9, 1e-3), 0.02, 12, 40, functional.huber_loss, options=COSINE
)
CLOTHES = Workload(
    "clothes, GroupNorm",
    partial(large, images=6000),
    group_norm,
    12,
    9,
    sgd(0.9, 3e-3, True),
    0.03,
    5,
    50,
    options=COSINE,
)
RESIDUAL = Workload("clothes, residual", small, residual, 12, 6, sgd(0.8, 1e-3), 0.1, 8, 60, options=HAT)
DIGITS = Workload("digits, LayerNorm", flat, layer_norm, 48, 7, adamw, 2e-3, 12, 24, options=LINEAR)
VISION = Workload("clothes, patches", partial(large, images=4000), vision, 48, 4, adamw, 3e-3, 8, 50, options=WARM)
ROWS = Workload("digits, rows", flat, rows, 48, 2, torch.optim.Adam, 5e-3, 10, 30, settings={"gradient_clip_val": 1.0})
SOURCE = Workload(
    "code, LSTM", short, recurrent, 96, 2, torch.optim.RMSprop, 0.015, 8, 48, options=LINEAR, settings=CLIPPED
)
CAUSAL = Workload("code, convolutions", long, convolutional, 48, 8, adamw, 0.015, 8, 20, options=COSINE)
COPIED = Workload(
    "digits, autoencoder", copied, autoencoder, 12, 4, torch.optim.Adam, 3e-3, 40, 45, functional.mse_loss
)
PASSAGES = Workload("words, dropout", words, dropout, 64, 4, adagrad, 0.01, 10, 25)
TABLES, IMAGES, TEXTS = (
    [CANCER, WINE, HALVES],
    [CLOTHES, RESIDUAL, DIGITS, VISION, ROWS, COPIED],
    [SOURCE, CAUSAL, PASSAGES],
)
WORKLOADS = [*TABLES, *IMAGES, *TEXTS]
HEALTHY_CROSSED = [Case(each.name, each.make) for each in WORKLOADS]


# ---------------------------------------------------------------------------------------------------- broken


def crossed(
    defect: str, rules: frozenset[str], change: Callable[[Workload], Workload], *workloads: Workload
) -> list[Case]:
    return [Case(f"{defect}: {workload.name}", change(workload).make, rules) for workload in workloads]


def with_data(change: Callable[[Split], Split]) -> Callable[[Workload], Workload]:
    return lambda workload: replace(workload, data=lambda seed: change(workload.data(seed)))


def with_net(change: Callable[[nn.Sequential, int], nn.Sequential]) -> Callable[[Workload], Workload]:
    """Something is done to the network, which is cut at a layer."""

    def changed(workload: Workload) -> Workload:
        return replace(workload, net=lambda width: change(workload.net(width), workload.cut))

    return changed


def with_loss(change: Callable[[Loss, Tensor, Tensor], Tensor]) -> Callable[[Workload], Workload]:
    def changed(workload: Workload) -> Workload:
        return replace(workload, loss=lambda outputs, targets: change(workload.loss, outputs, targets))

    return changed


def with_options(**options: Any) -> Callable[[Workload], Workload]:
    return lambda workload: replace(workload, options={**workload.options, **options})


def with_rate(factor: float) -> Callable[[Workload], Workload]:
    return lambda workload: replace(workload, rate=workload.rate * factor)


def shifted(data: Split) -> Split:
    (inputs, targets), val = data
    return (inputs, (targets + 1) % (int(targets.max()) + 1)), val


def ordered(workload: Workload) -> Workload:
    """By class, as files often are, and read as they are."""

    def by_class(data: Split) -> Split:
        (inputs, targets), val = data
        order = targets.flatten().argsort()
        return (inputs[order], targets[order]), val

    return replace(with_data(by_class)(workload), shuffle=False)


def leaked(data: Split) -> Split:
    """The target in place of the last column, or of the last pixel."""
    scale = data[0][1].float().mean(), data[0][1].float().std()
    for inputs, targets in data:
        inputs.flatten(1)[:, -1] = (targets.flatten() - scale[0]) / scale[1]
    return data


def duplicated(data: Split) -> Split:
    (inputs, targets), (val, val_targets) = data
    order = torch.randperm(len(inputs) + len(val), generator=torch.Generator().manual_seed(0))
    return (torch.cat([inputs, val])[order], torch.cat([targets, val_targets])[order]), (val, val_targets)


def unrelated(data: Split) -> Split:
    """Inputs and targets were put in different orders before the split."""
    generator = torch.Generator().manual_seed(0)
    (inputs, targets), (val, val_targets) = data
    every = torch.cat([targets, val_targets])
    every = every[torch.randperm(len(every), generator=generator)]
    return (inputs, every[: len(inputs)]), (val, every[len(inputs) :])


def upside_down(data: Split) -> Split:
    return data[0], (data[1][0].flip(-1), data[1][1])


def moved(data: Split) -> Split:
    return data[0], (data[1][0].roll((5, 5), (-2, -1)), data[1][1])


def first(examples: int) -> Callable[[Split], Split]:
    return lambda data: ((data[0][0][:examples], data[0][1][:examples]), data[1])


def raw_pixels(data: Split) -> Split:
    """From 0 to 255."""
    low, high = data[0][0].min(), data[0][0].max()
    train, val = ((255 * (inputs - low) / (high - low), labels) for inputs, labels in data)
    return train, val


def frozen(net: nn.Sequential, cut: int) -> nn.Sequential:
    for layer in [*net][:cut]:
        layer.requires_grad_(False)
    return net


def tenfold(net: nn.Sequential, _: int) -> nn.Sequential:
    scaled(net, 10)
    return net


def detached(net: nn.Sequential, cut: int) -> nn.Sequential:
    return nn.Sequential(*[*net][:cut], Detached(), *[*net][cut:])


def dead(net: nn.Sequential, cut: int) -> nn.Sequential:
    biases: list[Any] = []
    for layer in [*net][:cut]:
        if isinstance(layer, nn.ReLU):
            nn.init.constant_(biases[-1], -20.0)
        biases += [layer.bias] if isinstance(getattr(layer, "bias", None), nn.Parameter) else []
    return net


def head_alone(workload: Workload) -> Workload:
    return with_options(trained=lambda net: net[workload.cut :].parameters())(workload)


def smaller(width: int) -> Callable[[Workload], Workload]:
    return lambda workload: replace(workload, width=width)


def larger(width: int, examples: int, epochs: int) -> Callable[[Workload], Workload]:
    return lambda workload: replace(with_data(first(examples))(workload), width=width, epochs=epochs)


def exploding(rate: float, cells: Callable[..., nn.Module]) -> Callable[[Workload], Workload]:
    """Without the clipping of gradients that a recurrent net was given."""

    def changed(workload: Workload) -> Workload:
        net: Any = workload.net
        return replace(workload, net=partial(net, cells=cells), rate=rate, optimizer=sgd(0.9, 0.0), settings={})

    return changed


def rectified(*sizes: int, **more: Any) -> nn.Module:
    return nn.RNN(*sizes, nonlinearity="relu", **more)


def turned(workload: Workload) -> Workload:
    """By a reshape, where it should have been by a transposition."""
    first = Reshaped(lambda inputs: inputs.t().reshape(inputs.shape))
    return replace(workload, net=lambda width: nn.Sequential(first, *workload.net(width)))


TOO_HIGH = named(
    "learning rate too high",
    "learning rate looks too high",
    "divergence",
    "diverged",
    "early instability",
    "bouncing between the walls",
)
TOO_LOW = named("learning rate too low", "learning rate looks too low", "falls too slowly")
EXPLODING = TOO_HIGH | {"exploding gradient"}
SMALL = named("underfitting", "model bias")
EVALUATION = named("evaluation mode in training")
SOFTMAX = named("softmax applied twice", "activation on the logits")
SIGMOID = named("sigmoid applied twice", "activation on the logits")
RAW = named("inputs not normalised")
FROZEN = named("frozen parameters", "layer never changes")
DEAD = named(
    "dead units", "outputs hardly depend on the input", "vanishing gradient", "no gradient", "layer never changes"
)
MIXED = named("examples mixed")
SHIFTED = named("mismatch")
COPY = named("target is the input")
SUM = named("loss is a sum")
ORDERED = named("labels all alike", "periodic training loss")
NEGATIVE = named("wrong sign of the loss")
LEAKED = named("target among the inputs")
CARRIED = named("gradients not set to zero")
AWAKE = named("evaluation mode differs", "training mode in validation")
DUPLICATED = named("validation data in the training data")
UNRELATED = named("input without information", "overfitting", "nothing learnt")
TENFOLD = named("initial loss high", "initial loss off")
LARGE = named("overfitting")
HEAD = named("not in any optimizer", "layer never changes")
CUT = named("no gradient", "layer never changes")


def softmaxed(net: nn.Sequential, _: int) -> nn.Sequential:
    return nn.Sequential(*net, nn.Softmax(1))


def multiplied(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    return len(outputs) * loss(outputs, targets)


def negative(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    return -loss(outputs, targets)


def unmoved(workload: Workload) -> Workload:
    return replace(workload, data=partial(workload.data, shift=0))


def raw(workload: Workload) -> Workload:
    return replace(workload, data=partial(workload.data, raw=True))


def rescaled(workload: Workload) -> Workload:
    return replace(workload, data=lambda seed: (cancer(seed)[0], cancer(seed, raw=True)[1]))


def sideways(workload: Workload) -> Workload:
    return replace(workload, net=partial(workload.net, batch_first=False))


# Each defect on workloads that it was seen to harm.
CROSSED = [
    *crossed("labels shifted", SHIFTED, with_data(shifted), CLOTHES, PASSAGES),
    *crossed("target not shifted", COPY, unmoved, SOURCE),
    *crossed("softmax twice", SOFTMAX, with_net(softmaxed), RESIDUAL, CAUSAL),
    *crossed("sigmoid twice", SIGMOID, with_net(lambda net, _: nn.Sequential(*net, nn.Sigmoid())), CANCER),
    *crossed("sum for mean", SUM, with_loss(multiplied), WINE, HALVES, CLOTHES),
    *crossed("not shuffled", ORDERED, ordered, CLOTHES, VISION, RESIDUAL),
    *crossed("layers frozen", FROZEN, with_net(frozen), HALVES, ROWS, CAUSAL),
    *crossed("learning rate times 30", TOO_HIGH, with_rate(30), CLOTHES, VISION, CAUSAL),
    *crossed("learning rate over 30", TOO_LOW, with_rate(1 / 30), WINE, RESIDUAL, COPIED),
    *crossed("dead units", DEAD, with_net(dead), HALVES, RESIDUAL, PASSAGES),
    *crossed("wrong sign", NEGATIVE, with_loss(negative), CANCER, VISION, COPIED),
    *crossed("target leaked", LEAKED, with_data(leaked), HALVES, ROWS, CANCER),
    *crossed("zero_grad missing", CARRIED, with_options(zero_grad=False), COPIED, DIGITS, CAUSAL),
    *crossed("evaluation mode in training", EVALUATION, with_options(train_in_evaluation_mode=True), RESIDUAL),
    *crossed("training mode in validation", AWAKE, with_options(validate_in_training_mode=True), PASSAGES),
    *crossed("validation data in the training data", DUPLICATED, with_data(duplicated), DIGITS, VISION, ROWS),
    *crossed("validation data otherwise scaled", SHIFTED, rescaled, CANCER),
    *crossed("validation images upside down", SHIFTED, with_data(upside_down), ROWS),
    *crossed("validation images moved", SHIFTED, with_data(moved), RESIDUAL),
    *crossed("labels at random", UNRELATED, with_data(unrelated), CANCER, CLOTHES, DIGITS),
    *crossed("initialisation times 10", TENFOLD, with_net(tenfold), WINE, COPIED, SOURCE),
    *crossed("too small", SMALL, smaller(4), VISION),
    *crossed("too small", SMALL, smaller(2), SOURCE),
    *crossed("too small", SMALL, smaller(1), COPIED),
    *crossed("too big for the data", LARGE, larger(256, 60, 100), HALVES),
    *crossed("too big for the data", LARGE, larger(24, 100, 60), CLOTHES),
    *crossed("too big for the data", LARGE, larger(96, 40, 60), CAUSAL),
    *crossed("recurrent net explodes", EXPLODING, exploding(0.5, rectified), ROWS),
    *crossed("recurrent net explodes", EXPLODING, exploding(2.0, rectified), SOURCE),
    *crossed("not clipped at a high rate", EXPLODING, exploding(30.0, nn.LSTM), SOURCE),
    *crossed("inputs not normalised", RAW, raw, CANCER, WINE),
    *crossed("inputs not normalised", RAW, with_data(raw_pixels), ROWS, VISION),
    *crossed("body not in the optimizer", HEAD, head_alone, VISION, SOURCE, COPIED),
    *crossed("detached half-way", CUT, with_net(detached), DIGITS, SOURCE, CAUSAL),
    *crossed("examples mixed", MIXED, turned, WINE),
    *crossed("examples mixed", MIXED, sideways, VISION, ROWS),
]

# And on others, whether it harms them or not.
ELSEWHERE = [
    *crossed("labels shifted", SHIFTED, with_data(shifted), VISION, RESIDUAL, ROWS, DIGITS),
    *crossed("target not shifted", COPY, unmoved, CAUSAL),
    *crossed("softmax twice", SOFTMAX, with_net(softmaxed), CLOTHES, DIGITS, PASSAGES),
    *crossed("sum for mean", SUM, with_loss(multiplied), RESIDUAL, DIGITS, CANCER),
    *crossed("not shuffled", ORDERED, ordered, DIGITS, ROWS),
    *crossed("layers frozen", FROZEN, with_net(frozen), CLOTHES, VISION, DIGITS),
    *crossed("learning rate times 30", TOO_HIGH, with_rate(30), RESIDUAL, ROWS, COPIED),
    *crossed("learning rate over 30", TOO_LOW, with_rate(1 / 30), CLOTHES, VISION, SOURCE),
    *crossed("dead units", DEAD, with_net(dead), CLOTHES),
    *crossed("wrong sign", NEGATIVE, with_loss(negative), WINE, ROWS, SOURCE),
    *crossed("target leaked", LEAKED, with_data(leaked), DIGITS, WINE),
    *crossed("zero_grad missing", CARRIED, with_options(zero_grad=False), CLOTHES, RESIDUAL, PASSAGES),
    *crossed("training mode in validation", AWAKE, with_options(validate_in_training_mode=True), RESIDUAL, HALVES),
    *crossed("validation data in the training data", DUPLICATED, with_data(duplicated), CLOTHES, WINE, RESIDUAL),
    *crossed("validation images upside down", SHIFTED, with_data(upside_down), VISION, DIGITS),
    *crossed("validation images moved", SHIFTED, with_data(moved), CLOTHES),
    *crossed("labels at random", UNRELATED, with_data(unrelated), VISION, ROWS, WINE),
    *crossed("initialisation times 10", TENFOLD, with_net(tenfold), DIGITS, VISION, CAUSAL),
    *crossed("too small", SMALL, smaller(2), DIGITS, CAUSAL),
    *crossed("too small", SMALL, smaller(1), ROWS),
    *crossed("too big for the data", LARGE, larger(256, 60, 100), DIGITS, PASSAGES),
    *crossed("too big for the data", LARGE, larger(96, 60, 100), ROWS),
    *crossed("inputs not normalised", RAW, with_data(raw_pixels), CLOTHES, DIGITS),
    *crossed("body not in the optimizer", HEAD, head_alone, ROWS, CAUSAL, CLOTHES),
    *crossed("detached half-way", CUT, with_net(detached), CLOTHES, VISION, RESIDUAL),
    *crossed("examples mixed", MIXED, turned, DIGITS, CANCER),
]
