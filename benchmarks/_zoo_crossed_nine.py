"""Eight more healthy trainings on other questions, and the defects of ``_zoo_crossed`` applied to them."""

import ast
import re
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from math import cos, pi

import torch
from _zoo import mlp
from _zoo_crossed import LIBRARY, Outputs, bce, clothes
from _zoo_defects import Pair, Reshaped, Split, Workload, put, relative, sgd, split, standardised
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

CATEGORIES = ("Ll", "Lu", "Lo", "M", "N", "P", "Sm", "So")
CHARACTERS = 40  # of a name
RUN = 32  # letters, of each of which it is asked whether a space follows
LINE = 32  # characters, each of which is predicted of those before
TURNS = 8  # of a whole one
HASHES = 3001

# ---------------------------------------------------------------------------------------------------- data


@cache
def named_characters() -> Pair:
    """Names of characters, in small letters, and which general category each is of."""
    names: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for code in range(0x20000):
        name, category = unicodedata.name(chr(code), ""), unicodedata.category(chr(code))
        group = category if category in CATEGORIES else category[0]
        if group in names and name and not any(sign.isdigit() for sign in name):
            names[group].append(name.lower()[:CHARACTERS].ljust(CHARACTERS))
    generator = torch.Generator().manual_seed(0)
    rows, labels = [], []
    for label, alike in enumerate(names.values()):
        unique = sorted({*alike})
        some = torch.randperm(len(unique), generator=generator)[:650].tolist()
        rows += [[*unique[place].encode("ascii")] for place in some]
        labels += [label] * len(some)
    return torch.tensor(rows), torch.tensor(labels)


def names(seed: int) -> Split:
    return split(*named_characters(), 4200, 800, seed)


@cache
def tiles() -> Pair:
    """Of two photographs, tiles of 8 x 8 pixels in colour, and the same of 16 x 16."""
    from sklearn.datasets import load_sample_images

    every = []
    for picture in load_sample_images().images:
        pixels = torch.tensor(picture).float().permute(2, 0, 1) / 255
        cut: Tensor = pixels.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4)
        every.append(cut.reshape(-1, 3, 16, 16))
    fine = torch.cat(every)
    fine = (fine - fine.mean()) / fine.std()
    return functional.avg_pool2d(fine, 2), fine


def finer(seed: int) -> Split:
    return split(*tiles(), 1680, 380, seed)


def turned(seed: int) -> Split:
    """Clothes, turned, and by how many eighths of a whole turn."""
    generator = torch.Generator().manual_seed(seed)

    def each(data: Pair) -> Pair:
        turns = torch.randint(TURNS, (len(data[0]),), generator=generator)
        angles = 2 * pi / TURNS * turns
        row = torch.stack([angles.cos(), -angles.sin(), 0 * angles], 1)
        other = torch.stack([angles.sin(), angles.cos(), 0 * angles], 1)
        places = functional.affine_grid(torch.stack([row, other], 1), list(data[0].shape), align_corners=False)
        return functional.grid_sample(data[0], places, padding_mode="border", align_corners=False), turns

    train, val = clothes(seed, pixels=14, images=6000)
    return each(train), each(val)


def overlaid(seed: int) -> Split:
    """Two pieces of clothing, the brighter of each pixel, and of which classes they are."""
    generator = torch.Generator().manual_seed(seed)

    def two(data: Pair, number: int) -> Pair:
        first, second = torch.randint(len(data[0]), (2, number), generator=generator)
        labels = functional.one_hot(data[1], 10)
        return torch.maximum(data[0][first], data[0][second]), (labels[first] | labels[second]).float()

    train, val = clothes(seed, pixels=14, images=6000)
    return two(train, 6000), two(val, 1000)


@cache
def documented() -> Pair:
    """What the standard library's docstrings say, without spaces, and after which letters there was one."""
    texts: dict[str, None] = {}
    for path in sorted(LIBRARY.glob("[a-i]*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts[(ast.get_docstring(node) or "").lower()] = None
    text = " ".join(re.findall("[a-z]+", " ".join(texts)))
    letters = [ord(sign) for sign in text if sign != " "]
    followed = [float(text[place + 1 : place + 2] == " ") for place, sign in enumerate(text) if sign != " "]
    starts = {tuple(letters[start : start + RUN]): start for start in range(0, len(letters) - RUN + 1, RUN)}
    places = torch.tensor([*starts.values()])[:, None] + torch.arange(RUN)
    return torch.tensor(letters)[places], torch.tensor(followed)[places]


def spaces(seed: int) -> Split:
    return split(*documented(), 3200, 500, seed)


@cache
def comments() -> Tensor:
    """All that stands in the standard library behind a sharp, as characters."""
    found: dict[str, None] = {}
    for path in sorted(LIBRARY.glob("*.py")):
        found |= dict.fromkeys(re.findall(r"^\s*# (.{12,})$", path.read_text("utf-8"), re.MULTILINE))
    return torch.tensor([*"\n".join(found).encode("ascii", "ignore")])


def commented(seed: int, shift: int = 1) -> Split:
    """Windows of comments, and the same a character later."""
    signs = comments()
    places = torch.arange(len(signs) // LINE - 1)[:, None] * LINE + torch.arange(LINE)
    return split(signs[places], signs[places + shift], 4000, 500, seed)


def serum(seed: int, raw: bool = False) -> Split:
    """A lipoprotein in the blood of patients, of the nine other things measured."""
    from sklearn.datasets import load_diabetes

    table = torch.tensor(load_diabetes(scaled=False).data).float()
    targets = (table[:, 5:6] - table[:, 5].mean()) / table[:, 5].std()
    data = split(torch.cat([table[:, :5], table[:, 6:]], 1), targets, 330, 112, seed)
    return data if raw else standardised(data)


# ---------------------------------------------------------------------------------------------------- networks


class Mixer(nn.Module):
    """Mixes the rows of each channel, then the channels of each row.

    Args:
        rows: How many.
        width: Channels.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.rows = nn.Sequential(nn.Linear(rows, 2 * rows), nn.GELU(), nn.Linear(2 * rows, rows))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        between = inputs + self.rows(self.first(inputs).transpose(1, 2)).transpose(1, 2)
        outputs: Tensor = between + self.channels(self.second(between))
        return outputs


def threes(codes: Tensor) -> Tensor:
    """A number for each three characters that follow each other."""
    return (codes[:, :-2] * 961 + codes[:, 1:-1] * 31 + codes[:, 2:]) % HASHES


def bag(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [Reshaped(threes), nn.EmbeddingBag(HASHES, width), nn.BatchNorm1d(width)]
    layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.4)]
    return nn.Sequential(*layers, nn.Linear(width, len(CATEGORIES)))


def upscaling(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))


def wide(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(50 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, TURNS))


def mixing(width: int) -> nn.Sequential:
    start = nn.Flatten(1, 2), nn.Linear(28, width)
    end = nn.LayerNorm(width), Reshaped(lambda tokens: tokens.mean(1)), nn.Linear(width, 10)
    return nn.Sequential(*start, Mixer(28, width), Mixer(28, width), *end)


def averaged(width: int) -> nn.Sequential:
    """Convolutions to the end, with nothing flattened."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise((1, width, 2 * width, 2 * width, 4 * width))):
        layers += [nn.Conv2d(before, after, 3, 2 - number % 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def both_ways(width: int, batch_first: bool = True, cells: Callable[..., nn.Module] = nn.GRU) -> nn.Sequential:
    start = nn.Embedding(128, 16), Outputs(cells(16, width, batch_first=batch_first, bidirectional=True))
    return nn.Sequential(*start, nn.Linear(2 * width, 1), nn.Flatten())


def simple(width: int, batch_first: bool = True, cells: Callable[..., nn.Module] = nn.RNN) -> nn.Sequential:
    start = nn.Embedding(128, 32), Outputs(cells(32, width, batch_first=batch_first))
    return nn.Sequential(*start, nn.Linear(width, 128), Reshaped(lambda outputs: outputs.transpose(1, 2)))


def swish(width: int) -> nn.Sequential:
    net: nn.Sequential = mlp(9, width, width, 1, activation=nn.SiLU)
    return net


# ---------------------------------------------------------------------------------------------------- healthy

WAVES = {"schedule": relative(lambda done: 0.52 + 0.48 * cos(pi * (2 * min(done, 0.999) % 1)))}
TRAPEZOID = {"schedule": relative(lambda done: max(0.01, min(1.0, 0.02 + 20 * done, 4 * (1 - done))))}
INVERSE = {"schedule": relative(lambda done: min(1.0, 0.02 + 15 * done) * (1 + 20 * done) ** -0.75)}
SQUARE = {"schedule": relative(lambda done: max(0.0, 1 - done) ** 2 + 0.005)}
LATE = {"schedule": relative(lambda done: 1.0 if done < 0.7 else 0.1)}

adafactor = partial(torch.optim.Adafactor, weight_decay=0.01)
amsgrad = partial(torch.optim.Adam, amsgrad=True, weight_decay=1e-4)
slow = partial(torch.optim.Adam, betas=(0.95, 0.999))
decayed = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.05)
pushed = partial(torch.optim.RMSprop, momentum=0.5, alpha=0.95)
asgd = partial(torch.optim.ASGD, weight_decay=1e-3)

NAMES = Workload("names, bag of threes", names, bag, 48, 6, adafactor, 0.015, 9, 70, options=SQUARE)
FINER = Workload(
    "photographs, finer", finer, upscaling, 32, 4, amsgrad, 4e-3, 10, 20, functional.mse_loss, options=WAVES
)
TURNED = Workload("clothes, turned", turned, wide, 16, 9, sgd(0.9, 5e-4, True), 0.06, 8, 80, options=TRAPEZOID)
MIXER = Workload(
    "clothes, rows mixed",
    partial(clothes, pixels=28, images=5000),
    mixing,
    32,
    4,
    decayed,
    0.012,
    7,
    64,
    options=INVERSE,
)
OVERLAID = Workload("clothes, two at once", overlaid, averaged, 16, 14, slow, 6e-3, 8, 100, bce, options=LATE)
SPACES = Workload(
    "spaces, GRU both ways",
    spaces,
    both_ways,
    32,
    2,
    pushed,
    5e-3,
    7,
    60,
    bce,
    settings={"gradient_clip_val": 1.0},
)
COMMENTS = Workload(
    "comments, simple cells",
    commented,
    simple,
    96,
    2,
    decayed,
    0.01,
    6,
    32,
    options=TRAPEZOID,
    settings={"gradient_clip_val": 0.5},
)
SERUM = Workload("serum, ASGD", serum, swish, 32, 5, asgd, 0.1, 20, 6, functional.mse_loss)
WORKLOADS = (NAMES, FINER, TURNED, MIXER, OVERLAID, SPACES, COMMENTS, SERUM)
HEALTHY_NINE = [each.case() for each in WORKLOADS]


# ---------------------------------------------------------------------------------------------------- broken

# Each defect on workloads that it was seen to harm, or is there by construction.
NINE = [
    *put("labels shifted", NAMES, TURNED, MIXER),
    *put("target not shifted", COMMENTS),
    *put("softmax twice", TURNED, MIXER, COMMENTS),
    *put("sigmoid twice", OVERLAID, SPACES),
    *put("sum for mean", FINER, MIXER, SERUM),
    *put("not shuffled", NAMES, TURNED, SERUM),
    *put("layers frozen", NAMES, MIXER, SERUM),
    *put("learning rate times 30", FINER, TURNED, SPACES),
    *put("learning rate over 30", NAMES, TURNED, SERUM),
    *put("dead units", FINER, TURNED, OVERLAID),
    *put("wrong sign", NAMES, OVERLAID, COMMENTS),
    *put("target leaked", TURNED, MIXER, SERUM),
    *put("zero_grad missing", FINER, TURNED, MIXER),
    *put("evaluation mode in training", NAMES, OVERLAID),
    *put("training mode in validation", NAMES, TURNED),
    *put("validation data in the training data", OVERLAID, SPACES, COMMENTS),
    *put("validation data otherwise scaled", SERUM),
    *put("validation images upside down", FINER, TURNED),
    *put("validation images moved", MIXER, OVERLAID),
    *put("validation text in capitals", NAMES, SPACES, COMMENTS),
    *put("labels at random", NAMES, OVERLAID, SERUM),
    *put("initialisation times 10", NAMES, FINER, SPACES),
    *put("too small", NAMES, FINER, TURNED, SERUM, width=1),
    *put("too big for the data", TURNED, width=32, examples=150, epochs=60),
    *put("too big for the data", OVERLAID, width=24, examples=150, epochs=60),
    *put("too big for the data", SPACES, width=96, examples=60, epochs=60),
    *put("too big for the data", COMMENTS, width=192, examples=60, epochs=60),
    *put("recurrent net explodes", SPACES, COMMENTS, rate=5.0),
    *put("not clipped at a high rate", SPACES, rate=30.0, cells=nn.GRU),
    *put("not clipped at a high rate", COMMENTS, rate=10.0, cells=nn.RNN),
    *put("inputs not normalised", FINER, TURNED, SERUM),
    *put("body not in the optimizer", TURNED, OVERLAID, COMMENTS),
    *put("detached half-way", FINER, MIXER, COMMENTS),
    *put("examples mixed", SPACES, COMMENTS, SERUM),
]
