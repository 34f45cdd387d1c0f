"""Six more healthy trainings, and the defects of ``_zoo_crossed`` applied to them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from _zoo import Attention, Case, mlp
from _zoo_crossed import (
    AWAKE,
    CARRIED,
    COPY,
    CUT,
    DEAD,
    DUPLICATED,
    EVALUATION,
    EXPLODING,
    FROZEN,
    HEAD,
    LARGE,
    LEAKED,
    LIBRARY,
    MIXED,
    NEGATIVE,
    ORDERED,
    RAW,
    SHIFTED,
    SIGMOID,
    SMALL,
    SOFTMAX,
    SUM,
    TENFOLD,
    TOO_HIGH,
    TOO_LOW,
    UNRELATED,
    Outputs,
    Pair,
    Places,
    Reshaped,
    Split,
    Workload,
    bce,
    clothes,
    crossed,
    dead,
    detached,
    duplicated,
    exploding,
    first,
    flat,
    frozen,
    head_alone,
    larger,
    leaked,
    moved,
    multiplied,
    negative,
    ordered,
    raw,
    raw_pixels,
    rectified,
    relative,
    sgd,
    shifted,
    sideways,
    smaller,
    softmaxed,
    split,
    standardised,
    tenfold,
    turned,
    unmoved,
    unrelated,
    upside_down,
    with_data,
    with_loss,
    with_net,
    with_options,
    with_rate,
)
from pydoc_data import topics
from torch import Tensor, nn
from torch.nn import functional

HELP = "\n".join(topics.topics[key] for key in sorted(topics.topics))[200_000:].encode("ascii", "ignore")
SOURCES = ("datetime", "difflib", "http/cookiejar", "locale", "xml/dom/minidom", "zipfile")
COLUMNS = 40  # of a line
CONTEXT = 32  # characters, as Attention has it

# ---------------------------------------------------------------------------------------------------- data


def nuclei(seed: int, raw: bool = False) -> Split:
    """The fractal dimension of a tumour's nuclei, of which the other means and their errors tell."""
    from sklearn.datasets import load_breast_cancer

    table = torch.tensor(load_breast_cancer().data).float()
    targets = (table[:, 9:10] - table[:, 9].mean()) / table[:, 9].std()
    data = split(torch.cat([table[:, :9], table[:, 10:20]], 1), targets, 400, 169, seed)
    return data if raw else standardised(data)


def squares(seed: int) -> Split:
    """Digits, of 8 x 8 pixels."""
    train, val = ((images.view(-1, 1, 8, 8), labels) for images, labels in flat(seed))
    return train, val


def above_four(seed: int) -> Split:
    train, val = ((images, (labels > 4).float()[:, None]) for images, labels in flat(seed))
    return train, val


@cache
def sources() -> Pair:
    """Lines, as characters, and in which of six modules they stand."""
    lines, labels = [], []
    for label, name in enumerate(SOURCES):
        text = (LIBRARY / f"{name}.py").read_text("utf-8").encode("ascii", "ignore")
        long = sorted({line.strip()[:COLUMNS] for line in text.splitlines() if len(line.strip()) >= 20})
        lines += [list(line.ljust(COLUMNS)) for line in long]
        labels += [label] * len(long)
    return torch.tensor(lines), torch.tensor(labels)


def lines(seed: int, train: int = 4000) -> Split:
    return split(*sources(), train, 800, seed)


def help_text(seed: int, shift: int = 1) -> Split:
    """Windows of Python's help, and the same a character later."""
    signs = torch.tensor(list(HELP))
    windows = torch.arange(len(signs) // CONTEXT - 1)[:, None] * CONTEXT + torch.arange(CONTEXT)
    return split(signs[windows], signs[windows + shift], 6000, 800, seed)


# ---------------------------------------------------------------------------------------------------- networks


def regression(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(19, width, width, 1)
    return net


def pooled(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 32), nn.ReLU(), nn.Linear(32, 10))


def plain(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(196, width, width, width, 10)
    return net


def gated(width: int, batch_first: bool = True, cells: Callable[..., nn.Module] = nn.GRU) -> nn.Sequential:
    start = nn.Embedding(128, 24), Outputs(cells(24, width, batch_first=batch_first))
    return nn.Sequential(
        *start, Reshaped(lambda outputs: outputs.amax(1)), nn.Dropout(0.3), nn.Linear(width, len(SOURCES))
    )


def transformer(width: int) -> nn.Sequential:
    start = nn.Embedding(128, width), Places(CONTEXT, width), Attention(width=width)
    return nn.Sequential(*start, nn.Linear(width, 128), Reshaped(lambda outputs: outputs.transpose(1, 2)))


def deep(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(64, width, width, width, width, 1, activation=nn.Tanh, between=nn.BatchNorm1d)
    return net


# ---------------------------------------------------------------------------------------------------- healthy

STEPS = {"schedule": relative(lambda done: 1.0 if done < 0.5 else 0.2 if done < 0.8 else 0.04)}
DECAY = {"schedule": relative(lambda done: 0.03**done)}
RAMP = {"schedule": relative(lambda done: min((done + 0.002) / 0.1, (1.02 - done) / 0.92))}
adamax = partial(torch.optim.Adamax, weight_decay=1e-3)
light = partial(torch.optim.AdamW, weight_decay=0.05)

NUCLEI = Workload("nuclei, ReLU", nuclei, regression, 32, 5, sgd(0.0, 1e-3), 0.02, 30, 8, functional.mse_loss)
SQUARES = Workload("digits, MaxPool", squares, pooled, 8, 7, torch.optim.Adam, 1e-3, 12, 16)
PLAIN = Workload(
    "clothes, ReLU",
    partial(clothes, pixels=14, images=8000),
    plain,
    96,
    7,
    sgd(0.9, 1e-3),
    0.05,
    12,
    128,
    options=STEPS,
)
LINES = Workload("lines, GRU", lines, gated, 64, 2, light, 5e-3, 8, 32, options=DECAY)
HELPED = Workload("help, transformer", help_text, transformer, 64, 3, light, 3e-3, 5, 64, options=RAMP)
ABOVE = Workload("digits above four, BatchNorm", above_four, deep, 40, 13, adamax, 4e-3, 15, 100, bce)
