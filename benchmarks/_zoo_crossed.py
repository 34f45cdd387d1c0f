"""Twelve healthy trainings, and defects, most of which are applied to three of them.

No training here has its data, network, optimizer, schedule, batch size and length in common with one of ``_zoo``.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from math import cos, pi
from pathlib import Path
from sysconfig import get_paths

import torch
from _zoo import mlp
from _zoo_defects import Pair, Reshaped, Split, Workload, put, relative, sgd, split, standardised
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


# ---------------------------------------------------------------------------------------------------- data


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


COSINE = {"schedule": relative(lambda done: 0.5 + 0.5 * cos(pi * min(done, 1)))}
LINEAR = {"schedule": relative(lambda done: max(0.02, 1 - done))}
WARM = {"schedule": relative(lambda done: min(1, 0.02 + 10 * done) * (0.5 + 0.5 * cos(pi * min(done, 1))))}
HAT = {"schedule": relative(lambda done: min(0.1 + 3 * done, max(0.01, 1.43 * (1 - done))))}


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
HEALTHY_CROSSED = [each.case() for each in WORKLOADS]


# ---------------------------------------------------------------------------------------------------- broken


# Each defect on workloads that it was seen to harm.
CROSSED = [
    *put("labels shifted", CLOTHES, PASSAGES),
    *put("target not shifted", SOURCE),
    *put("softmax twice", RESIDUAL, CAUSAL),
    *put("sigmoid twice", CANCER),
    *put("sum for mean", WINE, HALVES, CLOTHES),
    *put("not shuffled", CLOTHES, VISION, RESIDUAL),
    *put("layers frozen", HALVES, ROWS, CAUSAL),
    *put("learning rate times 30", CLOTHES, VISION, CAUSAL),
    *put("learning rate over 30", WINE, RESIDUAL, COPIED),
    *put("dead units", HALVES, RESIDUAL, PASSAGES),
    *put("wrong sign", CANCER, VISION, COPIED),
    *put("target leaked", HALVES, ROWS, CANCER),
    *put("zero_grad missing", COPIED, DIGITS, CAUSAL),
    *put("evaluation mode in training", RESIDUAL),
    *put("training mode in validation", PASSAGES),
    *put("validation data in the training data", DIGITS, VISION, ROWS),
    *put("validation data otherwise scaled", CANCER),
    *put("validation images upside down", ROWS),
    *put("validation images moved", RESIDUAL),
    *put("labels at random", CANCER, CLOTHES, DIGITS),
    *put("initialisation times 10", WINE, COPIED, SOURCE),
    *put("too small", VISION, width=4),
    *put("too small", SOURCE, width=2),
    *put("too small", COPIED, width=1),
    *put("too big for the data", HALVES, width=256, examples=60, epochs=100),
    *put("too big for the data", CLOTHES, width=24, examples=100, epochs=60),
    *put("too big for the data", CAUSAL, width=96, examples=40, epochs=60),
    *put("recurrent net explodes", ROWS, rate=0.5),
    *put("recurrent net explodes", SOURCE, rate=2.0),
    *put("not clipped at a high rate", SOURCE, rate=30.0, cells=nn.LSTM),
    *put("inputs not normalised", CANCER, WINE, ROWS, VISION),
    *put("body not in the optimizer", VISION, SOURCE, COPIED),
    *put("detached half-way", DIGITS, SOURCE, CAUSAL),
    *put("examples mixed", WINE, VISION, ROWS),
]

# And on others, whether it harms them or not.
ELSEWHERE = [
    *put("labels shifted", VISION, RESIDUAL, ROWS, DIGITS),
    *put("target not shifted", CAUSAL),
    *put("softmax twice", CLOTHES, DIGITS, PASSAGES),
    *put("sum for mean", RESIDUAL, DIGITS, CANCER),
    *put("not shuffled", DIGITS, ROWS),
    *put("layers frozen", CLOTHES, VISION, DIGITS),
    *put("learning rate times 30", RESIDUAL, ROWS, COPIED),
    *put("learning rate over 30", CLOTHES, VISION, SOURCE),
    *put("dead units", CLOTHES),
    *put("wrong sign", WINE, ROWS, SOURCE),
    *put("target leaked", DIGITS, WINE),
    *put("zero_grad missing", CLOTHES, RESIDUAL, PASSAGES),
    *put("training mode in validation", RESIDUAL, HALVES),
    *put("validation data in the training data", CLOTHES, WINE, RESIDUAL),
    *put("validation images upside down", VISION, DIGITS),
    *put("validation images moved", CLOTHES),
    *put("labels at random", VISION, ROWS, WINE),
    *put("initialisation times 10", DIGITS, VISION, CAUSAL),
    *put("too small", DIGITS, CAUSAL, width=2),
    *put("too small", ROWS, width=1),
    *put("too big for the data", DIGITS, PASSAGES, width=256, examples=60, epochs=100),
    *put("too big for the data", ROWS, width=96, examples=60, epochs=100),
    *put("inputs not normalised", CLOTHES, DIGITS),
    *put("body not in the optimizer", ROWS, CAUSAL, CLOTHES),
    *put("detached half-way", CLOTHES, VISION, RESIDUAL),
    *put("examples mixed", DIGITS, CANCER),
]
