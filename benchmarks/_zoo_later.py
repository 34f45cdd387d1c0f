"""Trainings that were written when the rules stood: other defects, other data, other networks.

What counts as right was decided before any of them was run: a rule that says what is wrong, not one that only says that
something is; where no rule did, the name is that of the rule that would have to be written.
"""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from _zoo import (
    CONTEXT,
    LETTERS,
    Attention,
    Case,
    Letters,
    Recurrent,
    Run,
    Training,
    cnn,
    cosine,
    letters,
    mlp,
    named,
    on_diabetes,
    on_digits,
    on_fashion,
    on_letters,
)
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

# ---------------------------------------------------------------------------------------------------- healthy


class Residual(nn.Module):
    """A block of two layers beside the identity, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = inputs + self.body(inputs)
        return outputs


class Rows(nn.Module):
    """Reads an image row by row, and says its class at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.GRU(14, 48, batch_first=True), nn.Linear(48, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(images[:, 0])[0][:, -1])
        return logits


class Patches(nn.Module):
    """A transformer on 7 x 7 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(49, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.last = nn.Linear(width, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.last(self.body(tokens).mean(1))
        return logits


class LongShort(nn.LSTM):
    """Gives its outputs alone."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]  # a Module takes anything
        outputs: Tensor = super().forward(inputs)[0]
        return outputs


class Noise(nn.Module):
    """Adds some to the inputs while training."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0.3 * torch.randn_like(inputs) if self.training else inputs


def groups() -> nn.Module:
    return nn.Sequential(
        Noise(),
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def warmup_and_cosine(optimizer: Any, steps: int) -> Any:
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 10)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], [steps // 10])


def table(load: Any, seed: int, module: pl.LightningModule, binary: bool = False, **more: Any) -> Run:
    """A table of scikit-learn's, standardised; two thirds to train."""
    inputs, labels = load(return_X_y=True)
    rows, targets = torch.tensor(inputs).float(), torch.tensor(labels)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows, targets, cut = rows[order], targets[order], 2 * len(rows) // 3
    rows = (rows - rows[:cut].mean(0)) / rows[:cut].std(0)
    targets = targets[:, None].float() if binary else targets
    return Run(module, (rows[:cut], targets[:cut]), (rows[cut:], targets[cut:]), **more)


def breast_cancer(seed: int) -> Run:
    from sklearn.datasets import load_breast_cancer

    net = nn.Sequential(nn.Linear(30, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    loss = functional.binary_cross_entropy_with_logits
    module = Training(net, loss, 1e-3, "adamw", accuracy=False)
    return table(load_breast_cancer, seed, module, True, epochs=20, batch=16)


def wine(seed: int) -> Run:
    from sklearn.datasets import load_wine

    module = Training(mlp(13, 16, 3, activation=nn.Tanh), rate=0.02, weight_decay=0.01, schedule=cosine)
    return table(load_wine, seed, module, epochs=30, batch=8)


def to_itself(seed: int) -> Run:
    run = on_digits(seed, Training(mlp(64, 32, 8, 32, 64), functional.mse_loss, 2e-3, "adam", accuracy=False))
    return replace(run, train=(run.train[0], run.train[0].clone()), val=(run.val[0], run.val[0].clone()))


def weighted(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, torch.tensor([1.0, 5.0]))


def one_of_ten(seed: int, module: pl.LightningModule, **more: Any) -> Run:
    """Seven or not."""
    run = on_digits(seed, module, **more)
    return replace(run, train=(run.train[0], (run.train[1] == 7).long()), val=(run.val[0], (run.val[1] == 7).long()))


HEALTHY_LATER = [
    Case("breast cancer, LayerNorm", breast_cancer),
    Case("wine, tanh, weight decay", wine),
    Case(
        "LSTM, letters, clipped at 1",
        lambda seed: on_letters(
            seed,
            Training(Letters(LongShort(48, 48, batch_first=True)), rate=3e-3, optimizer="adam", accuracy=False),
            epochs=6,
            settings={"gradient_clip_val": 1.0},
        ),
    ),
    Case(
        "rows of images, GRU", lambda seed: on_fashion(seed, Training(Rows(), rate=2e-3, optimizer="adamw"), epochs=6)
    ),
    Case(
        "patches, transformer, warmup",
        lambda seed: on_fashion(
            seed, Training(Patches(), rate=2e-3, optimizer="adamw", schedule=warmup_and_cosine), epochs=6
        ),
    ),
    Case(
        "residual blocks, cosine",
        lambda seed: on_fashion(
            seed,
            Training(
                nn.Sequential(nn.Flatten(), nn.Linear(196, 64), Residual(64), Residual(64), nn.Linear(64, 10)),
                rate=0.02,
                schedule=cosine,
                weight_decay=1e-3,
            ),
            epochs=6,
        ),
    ),
    Case("autoencoder", to_itself),
    Case(
        "is it a seven, weighted",
        lambda seed: one_of_ten(seed, Training(mlp(64, 32, 2), weighted, 1e-3, "adamw"), epochs=20),
    ),
    Case(
        "regression, Huber, dropout",
        lambda seed: on_diabetes(
            seed,
            Training(
                mlp(10, 32, 1, between=lambda _: nn.Dropout(0.2)), functional.huber_loss, 1e-3, "adamw", accuracy=False
            ),
        ),
    ),
    Case(
        "convolutions, GroupNorm, noise",
        lambda seed: on_digits(seed, Training(groups(), rate=2e-3, optimizer="adamw"), epochs=15),
    ),
]


# ---------------------------------------------------------------------------------------------------- broken


def over_batch(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.nll_loss(logits.log_softmax(0), targets)


def broadcast(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets[:, 0])


class ValidatesInTrainingMode(Training):
    """Calls train() where eval() belongs."""

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net.train()
        super().validation_step(batch, batch_idx)


class Erasing(nn.Module):
    """While training, hardly a pixel is left."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * (torch.rand_like(inputs) > 0.95) if self.training else inputs


class CarefulAdam(Training):
    """Epsilon is 1, as it is good for one famous network."""

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3, eps=1.0)


class LettersWithoutGradient(Letters):
    """The embedding is computed where no gradient is recorded."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            codes = self.codes(inputs)
        logits: Tensor = self.last(self.body(codes + self.places))
        return logits.transpose(1, 2)


class LettersReshaped(Letters):
    """Brought to (batch, classes, characters) by a view."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(self.codes(inputs) + self.places))
        return logits.reshape(len(inputs), len(LETTERS), CONTEXT)


class Padded(Letters):
    """Knows one letter more, which stands for nothing."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(Recurrent(width, width, batch_first=True), width)
        self.codes, self.last = nn.Embedding(len(LETTERS) + 1, width), nn.Linear(width, len(LETTERS) + 1)


def padded(seed: int) -> Run:
    """Texts of 2 to 32 letters, the shorter ones the more frequent, filled up to 32."""
    chance = torch.Generator().manual_seed(seed)
    pairs = []
    for inputs, targets in letters(seed):
        lengths = (2 + 31 * torch.rand(len(inputs), 1, generator=chance) ** 2).long()
        empty = torch.arange(CONTEXT) >= lengths
        pairs.append((inputs.masked_fill(empty, len(LETTERS)), targets.masked_fill(empty, len(LETTERS))))
    module = Training(Padded(), rate=3e-3, optimizer="adam", accuracy=False)
    return Run(module, pairs[0], pairs[1], epochs=4)


def other_statistics(seed: int) -> Run:
    run = on_fashion(seed, Training(cnn(), rate=1e-3, optimizer="adamw"))
    return replace(run, val=(0.35 * run.val[0] + 0.29, run.val[1]))


def rare(seed: int) -> Run:
    """One image in 100 is of the class that is looked for."""
    run = on_fashion(seed, Training(mlp(196, 64, 2), rate=0.01))
    parts = []
    for images, labels in (run.train, run.val):
        wanted = labels == 6
        kept = ~wanted | (wanted.cumsum(0) <= len(labels) // 110)
        parts.append((images[kept], wanted[kept].long()))
    return replace(run, train=parts[0], val=parts[1])


def by_class(seed: int) -> Run:
    """Split before anything was shuffled: 0 to 6 are trained on, 7 to 9 validate."""
    run = on_digits(seed, Training(mlp(64, 64, 10)))
    images, labels = torch.cat([run.train[0], run.val[0]]), torch.cat([run.train[1], run.val[1]])
    early = labels < 7
    return replace(run, train=(images[early], labels[early]), val=(images[~early], labels[~early]))


def raw_validation(seed: int) -> Run:
    module = Training(mlp(10, 32, 1), functional.mse_loss, 0.003, accuracy=False, weight_decay=0.01)
    run, raw = on_diabetes(seed, module), on_diabetes(seed, module, scaled=False)
    return replace(run, val=raw.val)


def zeros(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


def divided_twice(seed: int) -> Run:
    run = on_fashion(seed, Training(mlp(196, 64, 10)))
    tiny = [((0.35 * images + 0.29) / 255, labels) for images, labels in (run.train, run.val)]
    return replace(run, train=tiny[0], val=tiny[1])


def singly(seed: int) -> Run:
    run = on_fashion(seed, Training(cnn(True), rate=0.005), epochs=3, batch=1)
    return replace(run, train=(run.train[0][:1500], run.train[1][:1500]))


def every_batch(optimizer: Any, _: int) -> Any:
    """Meant to halve the learning rate every ten epochs."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)


def endless_warmup(optimizer: Any, _: int) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1e-6, total_iters=100_000)


SLOW = ("falls too slowly", "learning rate too low", "learning rate looks too low", "training loss does not fall")
TOO_STRONG = ("training loss above validation", "underfitting", "model bias")  # of a regularisation
NOT_THE_SAME = ("mismatch", "validation never improves")

LATER = [
    Case(
        "softmax over the batch",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), over_batch)),
        named("no log-probabilities", "examples mixed"),
    ),
    Case(
        "targets broadcast",
        lambda seed: on_diabetes(seed, Training(mlp(10, 32, 1), broadcast, 0.003, accuracy=False)),
        named("targets broadcast", "small sample not learnt"),
    ),
    Case(
        "validation in training mode",
        lambda seed: on_digits(
            seed,
            ValidatesInTrainingMode(
                mlp(64, 128, 128, 10, between=lambda _: nn.Dropout(0.5)), rate=1e-3, optimizer="adamw"
            ),
            epochs=20,
        ),
        named("training mode in validation"),
    ),
    Case(
        "augmentation destroys the label",
        lambda seed: on_fashion(seed, Training(nn.Sequential(Erasing(), cnn()), rate=1e-3, optimizer="adamw")),
        named(*TOO_STRONG),
    ),
    Case(
        "dropout of 0.95",
        lambda seed: on_digits(
            seed, Training(mlp(64, 128, 128, 10, between=lambda _: nn.Dropout(0.95)), rate=1e-3, optimizer="adamw")
        ),
        named(*TOO_STRONG, "dropout too large"),  # the last one was written since
    ),
    Case("validation with other statistics", other_statistics, named(*NOT_THE_SAME)),
    Case(
        "gradients clipped at 0.0001",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10)), settings={"gradient_clip_val": 1e-4}),
        named(*SLOW, "gradients clipped"),
    ),
    Case(
        "weight decay of 0.5",
        lambda seed: on_fashion(seed, Training(mlp(196, 64, 10), weight_decay=0.5)),
        named("training loss does not fall", "training loss rises", "weight decay too large", "underfitting"),
    ),
    Case(
        "epsilon of 1",
        lambda seed: on_digits(seed, CarefulAdam(mlp(64, 64, 10))),
        named(*SLOW, "best at the end"),
    ),
    Case(
        "embedding without gradient",
        lambda seed: on_letters(
            seed,
            Training(
                LettersWithoutGradient(Recurrent(48, 48, batch_first=True)),
                rate=3e-3,
                optimizer="adam",
                accuracy=False,
            ),
            epochs=4,
        ),
        named("no gradient", "layer never changes"),
    ),
    Case("one in 100", rare, named("imbalanced classes")),
    Case(
        "schedule of epochs stepped every batch",
        lambda seed: on_fashion(seed, Training(cnn(), rate=0.02, schedule=every_batch)),
        named("decayed too early", "training loss does not fall", "learning rate looks too low"),
    ),
    Case(
        "warmup longer than the run",
        lambda seed: on_letters(
            seed,
            Training(Letters(Attention()), rate=1e-3, optimizer="adamw", schedule=endless_warmup, accuracy=False),
            epochs=4,
        ),
        named(
            *SLOW, "best at the end", "warmup longer than the run", "learning rate rises"
        ),  # the last was written since
    ),
    Case("padding counted in the loss", padded, named("padding counted", "imbalanced classes")),
    Case(
        "view for transpose",
        lambda seed: on_letters(
            seed,
            Training(LettersReshaped(Recurrent(48, 48, batch_first=True)), rate=3e-3, optimizer="adam", accuracy=False),
            epochs=4,
        ),
        named("the future is seen", "examples mixed", "small sample not learnt"),
    ),
    Case(
        "regression out of a ReLU",
        lambda seed: on_diabetes(
            seed, Training(nn.Sequential(mlp(10, 32, 1), nn.ReLU()), functional.mse_loss, 0.003, accuracy=False)
        ),
        named("small sample not learnt", "activation on the output"),
    ),
    Case("validation targets not normalised", raw_validation, named(*NOT_THE_SAME)),
    Case(
        "twenty updates",
        lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rate=1e-3, optimizer="adamw"), epochs=20, batch=1000),
        named("best at the end", "falls too slowly"),
    ),
    Case(
        "weights of zero",
        lambda seed: on_digits(seed, Training(zeros(mlp(64, 64, 10)))),
        named("no gradient", "layer never changes", "training loss does not fall", "small sample not learnt"),
    ),
    Case(
        "pixels divided by 255 twice",
        divided_twice,
        named(
            "outputs hardly depend on the input",
            "input without information",
            "training loss does not fall",
            "inputs not normalised",
        ),
    ),
    Case("split by class", by_class, named(*NOT_THE_SAME)),
    Case("BatchNorm of single images", singly, named("evaluation mode differs", "batches too small for BatchNorm")),
]
