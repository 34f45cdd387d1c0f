"""Six more healthy trainings, and the defects of ``_zoo_crossed`` applied to them."""

from collections.abc import Callable
from functools import cache, partial
from pydoc_data import topics

import torch
from _zoo import Attention, mlp
from _zoo_crossed import LIBRARY, Outputs, Places, bce, clothes, flat
from _zoo_defects import Pair, Reshaped, Split, Workload, put, relative, sgd, split, standardised
from torch import nn
from torch.nn import functional

HELP = "\n".join(topics.topics[key] for key in sorted(topics.topics))[200_000:].encode("ascii", "ignore")
SOURCES = ("datetime", "difflib", "http/cookiejar", "locale", "xml/dom/minidom", "zipfile")
COLUMNS = 28  # of a line
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
        long = sorted({line.strip()[:COLUMNS] for line in text.splitlines() if len(line.strip()) >= 16})
        lines += [list(line.ljust(COLUMNS)) for line in long]
        labels += [label] * len(long)
    return torch.tensor(lines), torch.tensor(labels)


def lines(seed: int, train: int = 3200) -> Split:
    return split(*sources(), train, 800, seed)


def help_text(seed: int, shift: int = 1) -> Split:
    """Windows of Python's help, and the same a character later."""
    signs = torch.tensor(list(HELP))
    windows = torch.arange(len(signs) // CONTEXT - 1)[:, None] * CONTEXT + torch.arange(CONTEXT)
    return split(signs[windows], signs[windows + shift], 4000, 500, seed)


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
SQUARES = Workload("digits, MaxPool", squares, pooled, 8, 7, torch.optim.Adam, 4e-3, 12, 16)
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
LINES = Workload("lines, GRU", lines, gated, 40, 2, light, 0.03, 8, 50, options=DECAY)
HELPED = Workload("help, transformer", help_text, transformer, 32, 3, light, 0.015, 4, 32, options=RAMP)
ABOVE = Workload("digits above four, BatchNorm", above_four, deep, 40, 13, adamax, 8e-3, 12, 100, bce)
HEALTHY_MORE = [each.case() for each in (NUCLEI, SQUARES, PLAIN, LINES, HELPED, ABOVE)]


# ---------------------------------------------------------------------------------------------------- broken


# Each defect on workloads that it was seen to harm, or is there by construction.
MORE = [
    *put("labels shifted", PLAIN, LINES),
    *put("target not shifted", HELPED),
    *put("softmax twice", SQUARES, PLAIN),
    *put("sigmoid twice", ABOVE),
    *put("sum for mean", NUCLEI, PLAIN),
    *put("not shuffled", SQUARES, PLAIN, LINES),
    *put("layers frozen", SQUARES, PLAIN, HELPED),
    *put("learning rate times 30", NUCLEI, SQUARES, HELPED),
    *put("learning rate over 30", SQUARES, LINES, ABOVE),
    *put("dead units", NUCLEI, SQUARES, PLAIN),
    *put("wrong sign", NUCLEI, SQUARES),
    *put("target leaked", NUCLEI, ABOVE),
    *put("zero_grad missing", NUCLEI, PLAIN, ABOVE),
    *put("evaluation mode in training", ABOVE),
    *put("training mode in validation", LINES, ABOVE),
    *put("validation data in the training data", SQUARES, ABOVE),
    *put("validation data otherwise scaled", NUCLEI),
    *put("validation images moved", SQUARES),
    *put("validation images upside down", PLAIN),
    *put("validation text in capitals", HELPED),
    *put("labels at random", NUCLEI, SQUARES, ABOVE),
    *put("initialisation times 10", NUCLEI, SQUARES, PLAIN),
    *put("too small", PLAIN, width=2),
    *put("too small", SQUARES, width=1),
    *put("too small", HELPED, width=4),
    *put("too big for the data", NUCLEI, width=256, examples=40, epochs=200),
    *put("too big for the data", SQUARES, width=24, examples=80, epochs=60),
    *put("too big for the data", ABOVE, width=128, examples=60, epochs=60),
    *put("recurrent net explodes", LINES, rate=1.0),
    *put("inputs not normalised", NUCLEI, SQUARES, PLAIN),
    *put("body not in the optimizer", PLAIN, LINES),
    *put("detached half-way", SQUARES, ABOVE),
    *put("examples mixed", NUCLEI, ABOVE, LINES),
]

# The same on the others of the six, wherever it can be done.
REST = [
    *put("labels shifted", SQUARES, ABOVE),
    *put("softmax twice", LINES, HELPED),
    *put("sum for mean", SQUARES, LINES, HELPED, ABOVE),
    *put("not shuffled", NUCLEI, ABOVE),
    *put("layers frozen", NUCLEI, LINES, ABOVE),
    *put("learning rate times 30", PLAIN, LINES, ABOVE),
    *put("wrong sign", PLAIN, LINES, HELPED, ABOVE),
    *put("target leaked", SQUARES, PLAIN),
    *put("zero_grad missing", SQUARES, LINES, HELPED),
    *put("evaluation mode in training", LINES),
    *put("validation data in the training data", NUCLEI, PLAIN, LINES, HELPED),
    *put("validation images upside down", SQUARES),
    *put("labels at random", PLAIN, LINES, HELPED),
    *put("initialisation times 10", LINES, HELPED, ABOVE),
    *put("too small", NUCLEI, LINES, ABOVE, width=1),
    *put("too big for the data", PLAIN, width=512, examples=60, epochs=100),
    *put("too big for the data", LINES, width=128, examples=60, epochs=60),
    *put("too big for the data", HELPED, width=64, examples=20, epochs=60),
    *put("inputs not normalised", ABOVE),
    *put("body not in the optimizer", NUCLEI, SQUARES, HELPED, ABOVE),
    *put("detached half-way", NUCLEI, PLAIN, LINES, HELPED),
]
