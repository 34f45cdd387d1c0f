"""Eight more healthy trainings, and the defects of ``_zoo_crossed`` applied to them."""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from _zoo import mlp, smoothed
from _zoo_crossed import LIBRARY, Outputs, Places, bce, clothes, flat
from _zoo_crossed_more import HELP
from _zoo_defects import Pair, Reshaped, Split, Workload, put, relative, sgd, split, standardised
from torch import nn
from torch.nn import functional

KINDS = ("doctest", "email/_header_value_parser", "logging/__init__", "unittest/mock")
PROGRAMS = ("asyncio/base_events", "imaplib", "optparse", "subprocess")
WINDOW = 64  # characters, of which it is asked where they stand
PIECE = 40  # characters, which are counted
SPAN = 48  # characters, each of which is predicted of those before

# ---------------------------------------------------------------------------------------------------- data


def source(name: str) -> list[int]:
    return list((LIBRARY / f"{name}.py").read_text("utf-8").encode("ascii", "ignore"))


def diabetes(seed: int, raw: bool = False) -> Split:
    """How far it went in a year, of ten things measured before."""
    from sklearn.datasets import load_diabetes

    inputs, targets = (torch.tensor(each).float() for each in load_diabetes(return_X_y=True, scaled=False))
    data = split(inputs, (targets[:, None] - targets.mean()) / targets.std(), 330, 112, seed)
    return data if raw else standardised(data)


def iris(seed: int, raw: bool = False) -> Split:
    from sklearn.datasets import load_iris

    inputs, targets = (torch.tensor(each) for each in load_iris(return_X_y=True))
    data = split(inputs.float(), targets.long(), 100, 50, seed)
    return data if raw else standardised(data)


@cache
def counted() -> Pair:
    """How often each character is in a piece of text, and whether that is of Python's help or of its source."""
    texts = [list(HELP), [sign for name in PROGRAMS for sign in source(name)]]
    tables, labels = [], []
    for label, text in enumerate(texts):
        pieces = torch.tensor(text[: 2500 * PIECE]).view(-1, PIECE)
        table: Any = functional.one_hot(pieces, 128).sum(1)[:, 32:127].float()
        tables.append(table.unique(dim=0))
        labels.append(torch.full((len(tables[-1]), 1), float(1 - label)))
    return torch.cat(tables), torch.cat(labels)


def counts(seed: int, raw: bool = False) -> Split:
    inputs, targets = counted()
    data = split(inputs, targets, 4000, 900, seed)
    return data if raw else standardised(data)


def pairs(seed: int) -> Split:
    """Two digits, one upon the other, and what they add up to."""
    generator = torch.Generator().manual_seed(seed)

    def added(data: Pair, number: int) -> Pair:
        images, labels = data
        first, second = torch.randint(len(images), (2, number), generator=generator)
        sums = (labels[first] + labels[second]).float()[:, None]
        return torch.cat([images[first], images[second]], 1).view(-1, 16, 8), (sums - 9) / 4

    train, val = flat(seed)
    return added(train, 4000), added(val, 600)


@cache
def windows() -> Pair:
    """Characters, and in which of four modules they stand."""
    texts, labels = [], []
    for label, name in enumerate(KINDS):
        text = source(name)
        pieces: Any = torch.tensor(text[: len(text) // WINDOW * WINDOW]).view(-1, WINDOW)[:1250]
        texts.append(pieces.unique(dim=0))
        labels.append(torch.full((len(texts[-1]),), label))
    return torch.cat(texts), torch.cat(labels)


def kinds(seed: int) -> Split:
    return split(*windows(), 4000, 900, seed)


def programs(seed: int, shift: int = 1) -> Split:
    """Windows of four modules, and the same a character later."""
    signs = torch.tensor([sign for name in PROGRAMS for sign in source(name)])
    places = torch.arange(len(signs) // SPAN - 1)[:, None] * SPAN + torch.arange(SPAN)
    return split(signs[places], signs[places + shift], 2400, 400, seed)


# ---------------------------------------------------------------------------------------------------- networks


def slope(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(10, width, width, 1)
    return net


def log_softmax(width: int) -> nn.Sequential:
    return nn.Sequential(*mlp(4, width, width, 3), nn.LogSoftmax(1))


def narrowing(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(95, 2 * width, width, 1, between=lambda _: nn.Dropout(0.2))
    return net


def separable(width: int) -> nn.Sequential:
    """Convolutions of each channel alone, then of all at one place."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
    for before, after in pairwise((width, 2 * width, 4 * width)):
        layers += [nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False), nn.Conv2d(before, after, 1)]
        layers += [nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36 * width, 10))


def normalised(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(784, width, width, width, 10, between=nn.LayerNorm)
    return net


def attentive(width: int, batch_first: bool = True) -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(width, 2, 3 * width, 0.0, "gelu", batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    start = nn.Linear(8, width), Places(16, width), encoder
    return nn.Sequential(*start, nn.Flatten(), nn.Linear(16 * width, 1))


def strided(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Embedding(128, 16), Reshaped(lambda codes: codes.transpose(1, 2))]
    for before, after in ((16, width), (width, width)):
        layers += [nn.Conv1d(before, after, 5, stride=2, padding=2), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(width, len(KINDS)))


def stacked(width: int, batch_first: bool = True, cells: Callable[..., nn.Module] = nn.GRU) -> nn.Sequential:
    start = nn.Embedding(128, 24), Outputs(cells(24, width, num_layers=2, batch_first=batch_first))
    return nn.Sequential(*start, nn.Linear(width, 128), Reshaped(lambda outputs: outputs.transpose(1, 2)))


# ---------------------------------------------------------------------------------------------------- healthy

HALVED = {"schedule": relative(lambda done: 0.5 ** int(6 * done))}
CYCLE = {"schedule": relative(lambda done: max(0.01, 1 - abs(done - 0.3) / (0.3 if done < 0.3 else 0.7)))}
ROOT = {"schedule": relative(lambda done: min(1.0, 0.02 + 12 * done) * max(0.0, 1 - done) ** 0.5)}
FALLING = {"schedule": relative(lambda done: 0.05**done)}
FLAT = {"schedule": relative(lambda done: min(1.0, 0.02 + 3 * (1 - done)))}
nadam = partial(torch.optim.NAdam, weight_decay=0.02)
adadelta = partial(torch.optim.Adadelta, weight_decay=5e-3)
rmsprop = partial(torch.optim.RMSprop, weight_decay=1e-3)
radam = partial(torch.optim.RAdam, weight_decay=1e-4)
quick = partial(torch.optim.Adam, betas=(0.8, 0.98))
heavy = partial(torch.optim.AdamW, weight_decay=0.3)

DIABETES = Workload("diabetes, smooth L1", diabetes, slope, 16, 5, nadam, 2e-3, 15, 16, functional.smooth_l1_loss)
IRIS = Workload(
    "iris, log-probabilities", iris, log_softmax, 10, 5, adadelta, 10.0, 25, 8, functional.nll_loss, options=FALLING
)
COUNTS = Workload("counts, dropout", counts, narrowing, 32, 4, rmsprop, 6e-3, 8, 64, bce, options=HALVED)
SEPARABLE = Workload(
    "clothes, separable",
    partial(clothes, pixels=28, images=4000),
    separable,
    8,
    8,
    sgd(0.9, 1e-3),
    0.05,
    6,
    40,
    options=CYCLE,
)
SMOOTHED = Workload(
    "clothes, smoothed labels",
    partial(clothes, pixels=28, images=10000),
    normalised,
    64,
    7,
    heavy,
    2e-3,
    12,
    256,
    smoothed,
    options=FLAT,
)
PAIRS = Workload(
    "digits added, attention", pairs, attentive, 32, 3, radam, 0.02, 6, 36, functional.l1_loss, options=ROOT
)
KIND = Workload("modules, convolutions", kinds, strided, 48, 5, torch.optim.AdamW, 8e-3, 9, 100)
PROGRAM = Workload("programs, GRU", programs, stacked, 64, 2, quick, 8e-3, 6, 24, settings={"gradient_clip_val": 2.0})
WORKLOADS = (DIABETES, IRIS, COUNTS, SEPARABLE, SMOOTHED, PAIRS, KIND, PROGRAM)
HEALTHY_EIGHT = [each.case() for each in WORKLOADS]


# ---------------------------------------------------------------------------------------------------- broken

# Each defect on workloads that it was seen to harm, or is there by construction.
EIGHT = [
    *put("labels shifted", IRIS, SEPARABLE, SMOOTHED, KIND),
    *put("target not shifted", PROGRAM),
    *put("softmax twice", SEPARABLE, SMOOTHED, KIND, PROGRAM),
    *put("sigmoid twice", COUNTS),
    *put("sum for mean", DIABETES, COUNTS, SEPARABLE, SMOOTHED, PROGRAM),
    *put("not shuffled", COUNTS, SEPARABLE, SMOOTHED, KIND),
    *put("layers frozen", SEPARABLE, SMOOTHED, PAIRS, KIND, PROGRAM),
    *put("learning rate times 30", COUNTS, SEPARABLE, PAIRS, KIND, PROGRAM),
    *put("learning rate over 30", DIABETES, IRIS, SEPARABLE, PROGRAM),
    *put("dead units", DIABETES, SEPARABLE, SMOOTHED, KIND),
    *put("wrong sign", DIABETES, COUNTS, SEPARABLE, PAIRS, PROGRAM),
    *put("target leaked", DIABETES, IRIS, SMOOTHED, PAIRS),
    *put("zero_grad missing", IRIS, COUNTS, SEPARABLE, PAIRS, KIND),
    *put("evaluation mode in training", SEPARABLE, KIND),
    *put("training mode in validation", COUNTS, KIND),
    *put("validation data in the training data", DIABETES, COUNTS, SEPARABLE, KIND, PROGRAM),
    *put("validation data otherwise scaled", DIABETES, IRIS),
    *put("validation images moved", SEPARABLE),
    *put("validation images upside down", SMOOTHED, PAIRS),
    *put("validation text in capitals", KIND, PROGRAM),
    *put("labels at random", DIABETES, COUNTS, SMOOTHED, PAIRS, KIND),
    *put("initialisation times 10", DIABETES, IRIS, COUNTS, SMOOTHED, PROGRAM),
    *put("too small", DIABETES, COUNTS, SEPARABLE, KIND, width=1),
    *put("too small", PAIRS, PROGRAM, width=4),
    *put("too small", SMOOTHED, width=3),
    *put("too big for the data", DIABETES, width=256, examples=60, epochs=100),
    *put("too big for the data", COUNTS, width=64, examples=100, epochs=100),
    *put("too big for the data", SEPARABLE, width=16, examples=80, epochs=60),
    *put("too big for the data", SMOOTHED, width=256, examples=100, epochs=100),
    *put("too big for the data", KIND, width=128, examples=150, epochs=60),
    *put("too big for the data", PROGRAM, width=128, examples=40, epochs=60),
    *put("recurrent net explodes", PROGRAM, rate=1.0),
    *put("not clipped at a high rate", PROGRAM, rate=30.0, cells=nn.GRU),
    *put("inputs not normalised", DIABETES, PAIRS),
    *put("body not in the optimizer", COUNTS, SEPARABLE, SMOOTHED, PAIRS, PROGRAM),
    *put("detached half-way", DIABETES, SEPARABLE, SMOOTHED, PAIRS, KIND),
    *put("examples mixed", DIABETES, COUNTS, PAIRS, PROGRAM),
]
