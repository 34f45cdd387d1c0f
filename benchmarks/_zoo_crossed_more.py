"""Six more healthy trainings, and the defects of ``_zoo_crossed`` applied to them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pydoc_data import topics

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
HEALTHY_MORE = [Case(each.name, each.make) for each in (NUCLEI, SQUARES, PLAIN, LINES, HELPED, ABOVE)]


# ---------------------------------------------------------------------------------------------------- broken


def otherwise_scaled(workload: Workload) -> Workload:
    return replace(workload, data=lambda seed: (workload.data(seed)[0], workload.data(seed, raw=True)[1]))


def capitals(data: Split) -> Split:
    """What is validated on was written in them."""
    inputs, targets = (torch.where((signs >= 97) & (signs <= 122), signs - 32, signs) for signs in data[1])
    return data[0], (inputs, targets)


def sigmoided(net: nn.Sequential, _: int) -> nn.Sequential:
    return nn.Sequential(*net, nn.Sigmoid())


# Each defect on workloads that it was seen to harm, or is there by construction.
MORE = [
    *crossed("labels shifted", SHIFTED, with_data(shifted), PLAIN, LINES),
    *crossed("target not shifted", COPY, unmoved, HELPED),
    *crossed("softmax twice", SOFTMAX, with_net(softmaxed), SQUARES, PLAIN),
    *crossed("sigmoid twice", SIGMOID, with_net(sigmoided), ABOVE),
    *crossed("sum for mean", SUM, with_loss(multiplied), NUCLEI, PLAIN),
    *crossed("not shuffled", ORDERED, ordered, SQUARES, PLAIN, LINES),
    *crossed("layers frozen", FROZEN, with_net(frozen), SQUARES, PLAIN, HELPED),
    *crossed("learning rate times 30", TOO_HIGH, with_rate(30), NUCLEI, SQUARES, HELPED),
    *crossed("learning rate over 30", TOO_LOW, with_rate(1 / 30), SQUARES, LINES, ABOVE),
    *crossed("dead units", DEAD, with_net(dead), NUCLEI, SQUARES, PLAIN),
    *crossed("wrong sign", NEGATIVE, with_loss(negative), NUCLEI, SQUARES),
    *crossed("target leaked", LEAKED, with_data(leaked), NUCLEI, ABOVE),
    *crossed("zero_grad missing", CARRIED, with_options(zero_grad=False), NUCLEI, PLAIN, ABOVE),
    *crossed("evaluation mode in training", EVALUATION, with_options(train_in_evaluation_mode=True), ABOVE),
    *crossed("training mode in validation", AWAKE, with_options(validate_in_training_mode=True), LINES, ABOVE),
    *crossed("validation data in the training data", DUPLICATED, with_data(duplicated), SQUARES, ABOVE),
    *crossed("validation data otherwise scaled", SHIFTED, otherwise_scaled, NUCLEI),
    *crossed("validation images moved", SHIFTED, with_data(moved), SQUARES),
    *crossed("validation images upside down", SHIFTED, with_data(upside_down), PLAIN),
    *crossed("validation text in capitals", SHIFTED, with_data(capitals), HELPED),
    *crossed("labels at random", UNRELATED, with_data(unrelated), NUCLEI, SQUARES, ABOVE),
    *crossed("initialisation times 10", TENFOLD, with_net(tenfold), NUCLEI, SQUARES, PLAIN),
    *crossed("too small", SMALL, smaller(2), PLAIN),
    *crossed("too small", SMALL, smaller(1), SQUARES),
    *crossed("too small", SMALL, smaller(4), HELPED),
    *crossed("too big for the data", LARGE, larger(256, 40, 200), NUCLEI),
    *crossed("too big for the data", LARGE, larger(24, 80, 60), SQUARES),
    *crossed("too big for the data", LARGE, larger(128, 60, 60), ABOVE),
    *crossed("recurrent net explodes", EXPLODING, exploding(1.0, rectified), LINES),
    *crossed("inputs not normalised", RAW, raw, NUCLEI),
    *crossed("inputs not normalised", RAW, with_data(raw_pixels), SQUARES, PLAIN),
    *crossed("body not in the optimizer", HEAD, head_alone, PLAIN, LINES),
    *crossed("detached half-way", CUT, with_net(detached), SQUARES, ABOVE),
    *crossed("examples mixed", MIXED, turned, NUCLEI, ABOVE),
    *crossed("examples mixed", MIXED, sideways, LINES),
]

# The same on the others of the six, wherever it can be done.
REST = [
    *crossed("labels shifted", SHIFTED, with_data(shifted), SQUARES, ABOVE),
    *crossed("softmax twice", SOFTMAX, with_net(softmaxed), LINES, HELPED),
    *crossed("sum for mean", SUM, with_loss(multiplied), SQUARES, LINES, HELPED, ABOVE),
    *crossed("not shuffled", ORDERED, ordered, NUCLEI, ABOVE),
    *crossed("layers frozen", FROZEN, with_net(frozen), NUCLEI, LINES, ABOVE),
    *crossed("learning rate times 30", TOO_HIGH, with_rate(30), PLAIN, LINES, ABOVE),
    *crossed("wrong sign", NEGATIVE, with_loss(negative), PLAIN, LINES, HELPED, ABOVE),
    *crossed("target leaked", LEAKED, with_data(leaked), SQUARES, PLAIN),
    *crossed("zero_grad missing", CARRIED, with_options(zero_grad=False), SQUARES, LINES, HELPED),
    *crossed("evaluation mode in training", EVALUATION, with_options(train_in_evaluation_mode=True), LINES),
    *crossed("validation data in the training data", DUPLICATED, with_data(duplicated), NUCLEI, PLAIN, LINES, HELPED),
    *crossed("validation images upside down", SHIFTED, with_data(upside_down), SQUARES),
    *crossed("labels at random", UNRELATED, with_data(unrelated), PLAIN, LINES, HELPED),
    *crossed("initialisation times 10", TENFOLD, with_net(tenfold), LINES, HELPED, ABOVE),
    *crossed("too small", SMALL, smaller(1), NUCLEI, LINES, ABOVE),
    *crossed("too big for the data", LARGE, larger(512, 60, 100), PLAIN),
    *crossed("too big for the data", LARGE, larger(128, 60, 60), LINES),
    *crossed("too big for the data", LARGE, larger(64, 20, 60), HELPED),
    *crossed("inputs not normalised", RAW, with_data(raw_pixels), ABOVE),
    *crossed("body not in the optimizer", HEAD, head_alone, NUCLEI, SQUARES, HELPED, ABOVE),
    *crossed("detached half-way", CUT, with_net(detached), NUCLEI, PLAIN, LINES, HELPED),
]
