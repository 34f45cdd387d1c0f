"""Kinds of defects and of healthy trainings that were run once, when everything else had been mended."""

from typing import Any

import lightning.pytorch as pl
import torch
from _zoo import (
    CONTEXT,
    Case,
    Letters,
    Run,
    Training,
    cnn,
    mlp,
    named,
    on_diabetes,
    on_digits,
    on_letters,
)
from _zoo_later import Rows
from _zoo_unseen import (
    ELSEWHERE,
    TOO_LOW,
    Accumulating,
    Autoencoder,
    Bag,
    Free,
    Tagger,
    changed,
    colours,
    contrastive,
    cross_entropy,
    images,
    on,
    pairs,
    patches,
    sources,
    tags,
    variational,
)
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

# ---------------------------------------------------------------------------------------------------- broken


class Restarting(Training):
    """Makes the network anew in each epoch, where it should have made the metrics anew."""

    @override
    def on_train_epoch_start(self) -> None:
        for module in self.net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()


class Forgetful(Accumulating):
    """Never calls step."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = Free.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        self.zero_grad()
        return loss


class Spoilt(Training):
    """From the fourth epoch on a worker gives labels in another order."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        return super().training_step((inputs, labels.flip(0) if self.current_epoch > 2 else labels), batch_idx)


class Cold(nn.Module):
    """Divides logits by a temperature of 1,000."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / 1000


class Whole(nn.Module):
    """Takes pixels for integers, and then back."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.sigmoid() * 0.999).long().float()


class Inverted(nn.TransformerEncoder):
    """The mask is true where it should be false."""

    def __init__(self, width: int = 48) -> None:
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        super().__init__(layer, 1, enable_nested_tensor=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]  # a Module takes anything
        outputs: Tensor = super().forward(inputs, mask=torch.ones(CONTEXT, CONTEXT).tril(-1).bool())
        return outputs


class Sideways(nn.Module):
    """batch_first is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.GRU(14, 32), nn.Linear(32, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(images[:, 0])[0][:, -1])
        return logits


class Plateau(Training):
    """Waits for the loss to rise."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.rate, 0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def scaled_down(net: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(net(batch[0]), batch[1]) / 1e5


def several(net: Any, batch: Any) -> Tensor:
    """Three questions that are no alternatives."""
    digits = batch[1]
    wanted = torch.stack([digits % 2 == 0, digits > 4, digits % 3 == 0], 1).float()
    return functional.cross_entropy(net(batch[0]), wanted)


def first_again(inputs: Tensor, targets: Tensor) -> Any:
    return inputs[:1].expand_as(inputs).clone(), targets


LAST = [
    Case(
        "step is never called",
        lambda seed: on(sources(seed), Forgetful(Bag(), cross_entropy, 3e-3)),
        named(*TOO_LOW, "layer never changes", "small sample not learnt", "no updates"),
    ),
    Case(
        "loss over 100,000",
        lambda seed: on(images(seed), Free(cnn(), scaled_down, 0.05, torch.optim.SGD, momentum=0.9), batch=64),
        named(*TOO_LOW, "initial loss low", "initial loss off", "small sample not learnt"),
    ),
    Case(
        "made anew in each epoch",
        lambda seed: on(images(seed), Restarting(cnn(), rate=1e-3, optimizer="adamw"), batch=64, epochs=10),
        named("periodic training loss", "weights made anew", "training loss does not fall"),
    ),
    Case(
        "labels wrong from the fourth epoch on",
        lambda seed: on(images(seed), Spoilt(Rows(), rate=2e-3, optimizer="adamw"), batch=64, epochs=10),
        named("training loss rises", "divergence", "diverged", "best at the start"),
    ),
    Case(
        "temperature of 1,000",
        lambda seed: on(images(seed), Training(nn.Sequential(cnn(), Cold()), rate=0.02), batch=64),
        named(*TOO_LOW, "small sample not learnt", "outputs hardly depend on the input"),
    ),
    Case(
        "inputs cut to integers",
        lambda seed: on(images(seed), Training(nn.Sequential(Whole(), cnn()), rate=1e-3, optimizer="adamw"), batch=64),
        named("input without information"),
    ),
    Case(
        "softmax for several labels",
        lambda seed: on_digits(seed, Free(mlp(64, 64, 3), several)),
        named("targets do not sum to 1", "initial loss high", "small sample not learnt", "initial loss off"),
    ),
    Case(
        "validation labels shuffled",
        lambda seed: on(
            changed(images(seed), None, lambda x, y: (x, y.roll(17))),
            Training(cnn(), rate=1e-3, optimizer="adamw"),
            batch=64,
        ),
        named(*ELSEWHERE),
    ),
    Case(
        "mask inverted",
        lambda seed: on_letters(
            seed, Training(Letters(Inverted()), rate=1e-3, optimizer="adamw", accuracy=False), epochs=4
        ),
        named("the future is seen"),
    ),
    Case(
        "batch_first missing",
        lambda seed: on(images(seed), Training(Sideways(), rate=2e-3, optimizer="adamw"), batch=32, epochs=5),
        named("examples mixed"),
    ),
    Case(
        "plateau of the wrong mode",
        lambda seed: on(images(seed), Plateau(cnn(), rate=0.01), batch=64, epochs=10),
        named("decayed too early", *TOO_LOW),
    ),
    Case(
        "always the first image",
        lambda seed: on(changed(images(seed), first_again), Training(cnn(), rate=1e-3, optimizer="adamw"), batch=64),
        named("input without information"),
    ),
]

# ---------------------------------------------------------------------------------------------------- healthy


class Adversarial(pl.LightningModule):
    """Makes patches of photographs out of noise, against a judge."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = mlp(16, 64, 64), mlp(64, 64, 1, activation=nn.LeakyReLU)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        optimizers: Any = self.optimizers()
        first, second = optimizers
        made = self.maker(torch.randn(len(real), 16))
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        loss = functional.binary_cross_entropy_with_logits
        of_judge = loss(self.judge(real), ones) + loss(self.judge(made.detach()), zeros)
        second.zero_grad()
        self.manual_backward(of_judge)
        second.step()
        of_maker = loss(self.judge(made), ones)
        first.zero_grad()
        self.manual_backward(of_maker)
        first.step()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """There is no validation loss."""

    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 2e-4, (0.5, 0.999)) for part in (self.maker, self.judge)]


def bandit(net: Any, batch: Any) -> Tensor:
    """Draws a class, and learns from whether it was right."""
    log_chances = net(batch[0]).log_softmax(1)
    drawn = log_chances.exp().multinomial(1)
    reward = (drawn[:, 0] == batch[1]).float()
    entropy = -(log_chances.exp() * log_chances).sum(1).mean()
    loss: Tensor = -((reward - reward.mean()) * log_chances.gather(1, drawn)[:, 0]).mean() - 0.01 * entropy
    return loss


def two_views(net: Any, batch: Any) -> Tensor:
    """InfoNCE on images with noise."""
    first, second = (functional.normalize(net(batch[0] + 0.3 * torch.randn_like(batch[0])), dim=1) for _ in range(2))
    return functional.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))


def density(net: Any, batch: Any) -> Tensor:
    """Three Gaussians for each colour."""
    weight, mean, spread = net(batch[0]).view(-1, 3, 3).unbind(1)
    spread = spread.clamp(-4, 4)
    parts = -0.5 * ((batch[1][:, :1] - mean) / spread.exp()) ** 2 - spread
    loss: Tensor = -(weight.log_softmax(1) + parts).logsumexp(1).mean()
    return loss


def pinball(net: Any, batch: Any) -> Tensor:
    """The ninth decile."""
    error = batch[1] - net(batch[0])
    return torch.maximum(0.9 * error, -0.1 * error).mean()


def without_padding(net: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(net(batch[0]), batch[1].masked_fill(batch[0] == 0, -100))


def fine_tuned(seed: int) -> Run:
    """A body that has learnt some other classes, and stays; the head is new."""
    (inputs, labels), (val, val_labels) = images(seed)
    net: Any = cnn()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    known = (labels < 6).nonzero().flatten()
    for step in range(150):
        old = known[torch.arange(64 * step, 64 * step + 64) % len(known)]
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(net(inputs[old]), labels[old])
        loss.backward()
        optimizer.step()
    net[:-1].requires_grad_(False)
    net[-1].reset_parameters()
    new, val_new = labels > 5, val_labels > 5
    data = (inputs[new], labels[new] - 6), (val[val_new], val_labels[val_new] - 6)
    return on(data, Training(net, rate=2e-3, optimizer="adamw"), epochs=6)


def noisy(seed: int) -> Run:
    run = on_diabetes(seed, Training(mlp(10, 16, 1), functional.mse_loss, 1e-3, "adamw", accuracy=False))
    chance = torch.Generator().manual_seed(seed)
    return on(
        changed((run.train, run.val), *[lambda x, y: (x, y + 2 * torch.randn(y.shape, generator=chance))] * 2),
        run.module,
        epochs=12,
    )


def rare_class(seed: int) -> Run:
    """One image in 20, and a head that starts at that share."""
    net: Any = mlp(196, 32, 2)
    with torch.no_grad():
        net[-1].bias.copy_(torch.tensor([0.95, 0.05]).log())
    parts = []
    for inputs, labels in images(seed):
        kept = (labels != 8) | (torch.arange(len(labels)) % 2 == 0)
        parts.append((inputs[kept], (labels[kept] == 8).long()))
    return on((parts[0], parts[1]), Training(net, rate=1e-3, optimizer="adamw"), batch=64, epochs=4)


def iris(seed: int) -> Run:
    from sklearn.datasets import load_iris

    inputs, labels = load_iris(return_X_y=True)
    rows = torch.tensor(inputs).float()
    rows = (rows - rows.mean(0)) / rows.std(0)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    data = (rows[order[:30]], torch.tensor(labels)[order[:30]]), (rows[order[30:]], torch.tensor(labels)[order[30:]])
    return on(data, Training(mlp(4, 8, 3), rate=0.02, weight_decay=1e-3), batch=6, epochs=20)


HEALTHY_LAST = [
    Case("regression, noise of twice the signal", noisy),
    Case("one in 20, head at the prior", rare_class),
    Case("thirty flowers", iris),
    Case("new head on a trained body", fine_tuned),
    Case("adversarial", lambda seed: on(patches(seed), Adversarial(), epochs=6)),
    Case("bandit", lambda seed: on(images(seed), Free(cnn(), bandit, 1e-3), batch=64, epochs=10)),
    Case("two views", lambda seed: on(images(seed), Free(mlp(196, 64, 16), two_views, 1e-3), batch=64, epochs=6)),
    Case("pairs", lambda seed: on(pairs(seed), Free(mlp(196, 64, 16), contrastive(False), 5e-4), epochs=4)),
    Case("mixture of densities", lambda seed: on(colours(seed), Free(mlp(18, 64, 9), density, 2e-3), batch=64)),
    Case(
        "tags, padding left out",
        lambda seed: on(tags(seed), Free(Tagger(), without_padding, 3e-3), epochs=4),
    ),
    Case(
        "variational autoencoder",
        lambda seed: on(patches(seed), Free(Autoencoder(), variational(1.0), 1e-3), epochs=10),
    ),
    Case("thirty updates", lambda seed: on_digits(seed, Training(mlp(64, 64, 10), rate=0.1), epochs=1, batch=32)),
    Case(
        "ninth decile, 2,000 updates",
        lambda seed: on(colours(seed), Free(mlp(18, 32, 3), pinball, 1e-3), epochs=32, batch=64),
    ),
]
