"""What the checks before training say of healthy trainings, and of trainings with one defect each.

    python benchmarks/sanity.py [--seeds 4] [--only WORD] [--other]

scikit-learn's digits and breast cancer data, and English prose from Python's own help texts, one character a token. A
healthy training must not get a warning; a broken one counts as flagged with any finding of a rule that fits its defect
(bold: with a warning or an error; a mere note may be given to a healthy one, too). Rules were mended on the set-ups of
``--other`` as well: they are more kinds of trainings, not held-out ones.
"""

import argparse
import json
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_recipes import InitialLossCheck, OverfitCheck
from lightning_recipes.callbacks.trials import quiet

Data = tuple[Tensor, Tensor]
SCALE = ("initial loss high", "inputs not normalised")


def digits(labels: Callable[[Tensor], Tensor] = lambda y: y, inputs: Callable[[Tensor], Tensor] = lambda x: x) -> Data:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    return inputs(x), labels(y.long())


def cancer() -> Data:
    from sklearn.datasets import load_breast_cancer

    x, y = (torch.tensor(array) for array in load_breast_cancer(return_X_y=True))
    return ((x - x.mean(0)) / x.std(0)).float(), y.long()


def prose(length: int = 32, shift: int = 1) -> tuple[Data, int]:
    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:100_000]
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    starts = torch.randint(len(ids) - length - 1, (600,), generator=torch.Generator().manual_seed(0))
    windows = ids[starts[:, None] + torch.arange(length + 1)]
    return (windows[:, :-1], windows[:, shift : length + shift]), len(letters)


def mlp(
    sizes: tuple[int, ...] = (64, 64, 64, 10),
    activation: Callable[[], nn.Module] = nn.ReLU,
    batch_norm: bool = False,
    gain: float = 0.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        if gain:
            nn.init.normal_(linear.weight, std=gain / math.sqrt(fan_in))
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index < len(sizes) - 2:
            layers += [nn.BatchNorm1d(fan_out)] if batch_norm else []
            layers.append(activation())
            layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)


def cnn(batch_norm: bool = False) -> nn.Sequential:
    def norm(channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels)] if batch_norm else []

    first = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), *norm(16), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), *norm(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(128, 10))


class Then(nn.Module):
    """A network with a function before or behind it."""

    def __init__(self, net: nn.Module, after: Callable[[Tensor], Tensor] | None = None, before: Any = None) -> None:
        super().__init__()
        self.net, self.after, self.before = net, after, before

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs if self.before is None else self.before(inputs))
        return outputs if self.after is None else self.after(outputs)


class Characters(nn.Module):
    """A pre-LN transformer of two layers."""

    def __init__(self, letters: int, width: int = 48, length: int = 32, causal: bool = True) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.letters.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head, self.causal = nn.LayerNorm(width), nn.Linear(width, letters), causal

    @override
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.letters(ids) + self.places[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]) if self.causal else None
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=False)
        outputs: Tensor = self.head(self.norm(hidden)).transpose(1, 2)
        return outputs


class Recurrent(nn.Module):
    """A GRU of two layers."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters, self.rnn = nn.Embedding(letters, 32), nn.GRU(32, 64, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(64, letters)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.rnn(self.letters(ids))[0]).transpose(1, 2)
        return outputs


class Task(pl.LightningModule):
    """A training.

    Args:
        net: What is trained.
        loss: Given outputs and targets.
        optimizer: Given the parameters.
        trained: Given the network, those that the optimizer gets.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
        optimizer: Callable[[Any], Any] = lambda parameters: torch.optim.Adam(parameters, 3e-3),
        trained: Callable[[Any], Any] = nn.Module.parameters,
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer, self.trained = net, loss, optimizer, trained

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer(self.trained(self.net))


class NeverZeroes(Task):
    """Its gradients add up."""

    @override
    def optimizer_zero_grad(self, *_: Any) -> None:
        pass


class ManualNeverZeroes(Task):
    """Likewise, by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()  # type: ignore[union-attr]  # one optimizer


class Manual(Task):
    """Optimized by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Dicts(Task):
    """Batches are dicts, and so is what the step returns."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(self.net(batch["image"].float()), batch["label"]["class"])
        self.log("loss", loss)
        return {"loss": loss, "more": 1}


class Gan(pl.LightningModule):
    """Two networks against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.made, self.judge = mlp((8, 64, 64)), mlp((64, 64, 1))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        first, second = optimizers
        real, ones = batch[0], torch.ones(len(batch[0]), 1)
        fake = self.made(torch.randn(len(real), 8))
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(functional.binary_cross_entropy_with_logits(self.judge(fake), ones))
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        logits = torch.cat([self.judge(real), self.judge(fake.detach())])
        targets = torch.cat([ones, 0 * ones])
        self.manual_backward(functional.binary_cross_entropy_with_logits(logits, targets))
        second.step()
        self.untoggle_optimizer(second)

    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-3) for net in (self.made, self.judge)], []


class Autoencoder(Task):
    """Variational."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self.net[0](batch[0]).chunk(2, 1)  # type: ignore[index]  # a Sequential
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        error: Tensor = functional.mse_loss(self.net[1](code), batch[0], reduction="sum") / len(mean)  # type: ignore[index]  # a Sequential
        loss: Tensor = error + divergence
        return loss


class Contrastive(Task):
    """Two noisy views of an image belong together."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = (
            functional.normalize(self.net(batch[0] + 0.1 * torch.randn_like(batch[0])), dim=1) for _ in range(2)
        )
        return functional.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))


class Diffusion(Task):
    """Learns the noise."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time, noise = torch.rand(len(batch[0]), 1), torch.randn_like(batch[0])
        return functional.mse_loss(self.net(torch.cat([batch[0] * (1 - time) + noise * time, time], 1)), noise)


class WithPenalty(Task):
    """With weight decay as a term of the loss."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = 1e-3 * torch.stack([weight.square().sum() for weight in self.net.parameters()]).sum()
        return super().training_step(batch, batch_idx) + penalty  # type: ignore[no-any-return]  # a tensor


class NextToken(Task):
    """One tensor of ids, shifted here."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = batch[0] if isinstance(batch, list | tuple) else batch
        logits = self.net(ids[:, :-1]).transpose(1, 2)
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def changed(net: nn.Module, change: Callable[[Any], None]) -> nn.Module:
    change(net)
    return net


def bias(net: Any) -> None:
    net[-1].bias.data[0] = 5.0


def zero_head(net: Any) -> None:
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)


def freeze(net: Any) -> None:
    for parameter in net.parameters():
        parameter.requires_grad_(False)


def adam(rate: float) -> Callable[[Any], Any]:
    return lambda parameters: torch.optim.Adam(parameters, rate)


def shuffled(labels: Tensor) -> Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


Case = tuple[str, Callable[[], pl.LightningModule], Callable[[], Any], tuple[str, ...]]


def cases() -> Iterator[Case]:
    """Name, module, data, rules that fit (none: healthy)."""
    text, letters = prose()

    def of(net: Callable[[], nn.Module], **more: Any) -> Callable[[], Task]:
        return lambda: Task(net(), **more)

    yield "mlp", of(mlp), digits, ()
    yield "mlp, He init", of(lambda: mlp(gain=2**0.5)), digits, ()
    yield "mlp, tanh", of(lambda: mlp(activation=nn.Tanh)), digits, ()
    yield "mlp, BatchNorm", of(lambda: mlp(batch_norm=True)), digits, ()
    yield "mlp, dropout .3", of(lambda: mlp(dropout=0.3)), digits, ()
    yield "cnn", of(cnn), digits, ()
    yield "cnn, BatchNorm", of(lambda: cnn(True)), digits, ()
    yield "mlp, 2 classes", of(lambda: mlp((30, 32, 2))), cancer, ()
    yield "transformer", of(lambda: Characters(letters)), lambda: text, ()
    yield "mlp, zero head", of(lambda: changed(mlp(), zero_head)), digits, ()

    yield "logits x 10", of(lambda: Then(mlp(), lambda x: 10 * x)), digits, SCALE
    yield "logits x 30", of(lambda: Then(mlp(), lambda x: 30 * x)), digits, SCALE
    yield "init gain 4", of(lambda: mlp(gain=4.0)), digits, SCALE
    yield "init gain 0.05", of(lambda: mlp(gain=0.05)), digits, ("outputs hardly depend on the input",)
    yield "pixels 0..255", of(mlp), lambda: digits(inputs=lambda x: x * 100 + 80), SCALE
    yield "bias of a class + 5", of(lambda: changed(mlp(), bias)), digits, SCALE
    yield "double softmax", of(lambda: Then(mlp(), lambda x: x.softmax(1))), digits, ("softmax applied twice",)
    yield "ReLU on logits", of(lambda: Then(mlp(), torch.relu)), digits, ("activation on the logits",)
    yield (
        "sign flipped",
        of(mlp, loss=lambda o, t: -functional.cross_entropy(o, t)),
        digits,
        ("wrong sign of the loss",),
    )
    yield "all frozen", of(lambda: changed(mlp(), freeze)), digits, ("nothing to train",)
    yield "body not in optimizer", of(mlp, trained=lambda n: n[-1].parameters()), digits, ("not in any optimizer",)
    yield "head not in optimizer", of(mlp, trained=lambda n: n[:-1].parameters()), digits, ("not in any optimizer",)
    yield "no zero_grad", lambda: NeverZeroes(mlp()), digits, ("gradients not set to zero",)
    yield "input constant", of(mlp), lambda: digits(inputs=lambda x: 0 * x), ("input without information",)
    yield "batch mixed", of(lambda: Then(mlp(), None, lambda x: x.t().reshape(x.shape))), digits, ("examples mixed",)
    yield "learning rate / 100", of(mlp, optimizer=adam(3e-5)), digits, ("learning rate too low",)
    yield "learning rate x 100", of(mlp, optimizer=adam(0.3)), digits, ("learning rate too high",)
    yield "no causal mask", of(lambda: Characters(letters, causal=False)), lambda: text, ("the future is seen",)
    yield "target = input", of(lambda: Characters(letters)), lambda: prose(shift=0)[0], ("target is the input",)
    yield "labels + 1", of(mlp), lambda: digits(lambda y: (y + 1) % 10), ("(cannot be seen)",)
    yield "labels shuffled", of(mlp), lambda: digits(shuffled), ("(cannot be seen)",)


def other_cases() -> Iterator[Case]:
    """More kinds of trainings."""
    text, letters = prose()
    ids = torch.cat([text[0], text[1][:, -1:]], 1)

    def of(net: Callable[[], nn.Module], **more: Any) -> Callable[[], Task]:
        return lambda: Task(net(), **more)

    def regression(scale: float = 1.0, shift: float = 0.0) -> Data:
        x, _ = cancer()
        return x[:, 1:], x[:, :1] * scale + shift

    def many(outputs: Tensor, targets: Tensor) -> Tensor:
        bits = torch.stack([(targets >> place) & 1 for place in range(4)], 1).float()
        return functional.binary_cross_entropy_with_logits(outputs, bits)

    def rare() -> Data:
        x, y = digits()
        kept = (y != 1) | (torch.arange(len(y)) % 20 == 0)
        return x[kept], (y[kept] == 1).long()

    def sgd(rate: float, **more: Any) -> Callable[[Any], Any]:
        return lambda parameters: torch.optim.SGD(parameters, rate, **more)

    def warmed(parameters: Any) -> Any:
        optimizer = torch.optim.AdamW(parameters, 1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, label_smoothing=0.1)

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 20.0]))

    binary = functional.binary_cross_entropy_with_logits
    column: dict[str, Any] = {"loss": lambda o, t: functional.mse_loss(o, t)}
    yield "cnn, SGD .01", of(lambda: cnn(True), optimizer=sgd(0.01)), digits, ()
    yield "mlp, SGD .01", of(mlp, optimizer=sgd(0.01)), digits, ()
    yield "mlp, SGD .1 momentum", of(mlp, optimizer=sgd(0.1, momentum=0.9)), digits, ()
    yield "mlp, Adam 1e-3", of(mlp, optimizer=adam(1e-3)), digits, ()
    yield "mlp, AdamW, decay .1", of(mlp, optimizer=lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1)), digits, ()
    yield "mlp, long warmup", of(mlp, optimizer=warmed), digits, ()
    yield "mlp, dropout .5", of(lambda: mlp(dropout=0.5)), digits, ()
    yield "mlp, label smoothing", of(mlp, loss=smooth), digits, ()
    yield "mlp, nll_loss", of(lambda: Then(mlp(), lambda x: x.log_softmax(1)), loss=functional.nll_loss), digits, ()
    yield "mlp, 5 % positive", of(lambda: mlp((64, 32, 2))), rare, ()
    yield "mlp, class weights", of(lambda: mlp((64, 32, 2)), loss=weighted), rare, ()
    yield "mlp, multi-label", of(lambda: mlp((64, 64, 4)), loss=many), digits, ()
    yield (
        "mlp, binary logit",
        of(lambda: mlp((30, 32, 1)), loss=lambda o, t: binary(o[:, 0], t.float())),
        cancer,
        (),
    )
    yield "linear softmax", of(lambda: mlp((64, 10)), optimizer=sgd(0.1)), digits, ()
    yield "regression", of(lambda: mlp((29, 64, 1)), **column), regression, ()
    yield (
        "regression, targets 100 ± 10",
        of(lambda: mlp((29, 64, 1)), **column),
        lambda: regression(10.0, 100.0),
        ("targets not normalised",),
    )
    yield "regression, L1", of(lambda: mlp((29, 64, 1)), loss=functional.l1_loss), regression, ()
    yield "regression, Huber", of(lambda: mlp((29, 64, 1)), loss=functional.huber_loss), regression, ()
    yield "linear regression", of(lambda: mlp((29, 1)), **column, optimizer=sgd(0.01)), regression, ()
    yield "GRU", of(lambda: Recurrent(letters), optimizer=adam(2e-3)), lambda: text, ()
    yield "transformer, ids alone", lambda: NextToken(Characters(letters), optimizer=adam(1e-3)), lambda: (ids,), ()
    yield "transformer, 3e-4", of(lambda: Characters(letters), optimizer=adam(3e-4)), lambda: text, ()
    yield "manual optimization", lambda: Manual(mlp()), digits, ()
    yield "dict batches", lambda: Dicts(mlp()), lambda: "dicts", ()
    yield "GAN", Gan, digits, ()
    yield (
        "autoencoder, variational",
        lambda: Autoencoder(nn.Sequential(mlp((64, 64, 16)), mlp((8, 64, 64)))),
        digits,
        (),
    )
    yield "contrastive", lambda: Contrastive(mlp((64, 64, 32)), optimizer=adam(1e-3)), digits, ()
    yield "diffusion", lambda: Diffusion(mlp((65, 128, 128, 64)), optimizer=adam(1e-3)), digits, ()
    yield "penalty in the loss", lambda: WithPenalty(mlp()), digits, ()
    yield "L-BFGS", of(mlp, optimizer=lambda p: torch.optim.LBFGS(p, 0.5)), digits, ()
    yield "frozen features", lambda: Task(frozen_features(), optimizer=adam(1e-2)), digits, ()

    yield (
        "sum reduction",
        of(mlp, loss=lambda o, t: functional.cross_entropy(o, t, reduction="sum")),
        digits,
        ("loss is a sum",),
    )
    yield (
        "sigmoid twice",
        of(lambda: Then(mlp((64, 64, 4)), torch.sigmoid), loss=many),
        digits,
        ("sigmoid applied twice",),
    )
    yield "nll_loss of logits", of(mlp, loss=functional.nll_loss), digits, ("no log-probabilities",)
    yield "manual, no zero_grad", lambda: ManualNeverZeroes(mlp()), digits, ("gradients not set to zero",)
    yield "input not used", of(lambda: Then(mlp(), None, torch.zeros_like)), digits, ("input without information",)
    yield "SGD 1e-4", of(mlp, optimizer=sgd(1e-4)), digits, ("learning rate too low",)
    yield "SGD 10", of(mlp, optimizer=sgd(10.0)), digits, ("learning rate too high",)
    yield "all labels alike", of(mlp), lambda: digits(lambda y: 0 * y + 3), ("labels all alike",)
    yield (
        "input with NaN",
        of(mlp),
        lambda: digits(inputs=lambda x: (x - x.mean(0)) / x.std(0)),
        ("initial loss not finite",),
    )
    yield "GRU sees the future", of(lambda: Both(letters)), lambda: text, ("the future is seen",)
    yield "tanh on logits", of(lambda: Then(mlp(), torch.tanh)), digits, ("activation on the logits",)
    yield "attention over the batch", of(lambda: Then(mlp(), None, across)), digits, ("examples mixed",)
    yield (
        "detached",
        of(lambda: Then(mlp((64, 64, 10)), None, Then(mlp((64, 64)), torch.Tensor.detach))),
        digits,
        ("no gradient",),
    )


class Both(Recurrent):
    """In both directions."""

    def __init__(self, letters: int) -> None:
        super().__init__(letters)
        self.rnn, self.head = nn.GRU(32, 64, batch_first=True, bidirectional=True), nn.Linear(128, letters)


def across(inputs: Tensor) -> Tensor:
    return (inputs @ inputs.T / 8).softmax(0) @ inputs + inputs


def frozen_features() -> nn.Module:
    net = mlp((64, 256, 10))
    freeze(net[0])
    return net


def loader_of(data: Any) -> DataLoader[Any]:
    if data == "dicts":
        x, y = digits()
        rows = [{"image": image, "label": {"class": label}} for image, label in zip(x, y, strict=True)]
        return DataLoader(rows, 32, shuffle=True)  # type: ignore[arg-type]  # a list is a dataset
    return DataLoader(TensorDataset(*data), 32, shuffle=True)


def check(make: Callable[[], pl.LightningModule], data: Any, seed: int) -> list[dict[str, Any]]:
    """The findings before training."""
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        module, loader = make(), loader_of(data)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=2,
            limit_train_batches=1000,
            callbacks=[InitialLossCheck(), OverfitCheck(), _Enough()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        with suppress(_Done):
            trainer.fit(module, loader)
        return [json.loads(line) for line in (Path(folder) / "findings.jsonl").read_text().splitlines()]


class _Done(Exception):
    pass


class _Enough(pl.Callback):
    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise _Done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", default="")
    parser.add_argument("--other", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    try:
        import sklearn  # noqa: F401  # the data
    except ImportError:
        print("scikit-learn is not installed: pip install 'lightning-recipes[examples]'")
        return
    torch.set_num_threads(1)
    print("| training | seconds | as it should be | findings |\n|---|---|---|---|")
    for name, make, data, fits in other_cases() if given.other else cases():
        if given.only not in name:
            continue
        found: Counter[str] = Counter()
        right, start = 0, time.perf_counter()
        for seed in range(given.seeds):
            findings = check(make, data(), seed)
            warned = [each for each in findings if each["severity"] != "info"]
            right += any(each["rule"] in fits for each in findings) if fits else not warned
            found.update(f"**{each['rule']}**" if each in warned else each["rule"] for each in findings)
            if given.verbose:
                for each in findings:
                    print("   ", each["severity"], each["rule"], "-", each["message"], each["advice"])
        seconds = (time.perf_counter() - start) / given.seeds
        said = ", ".join(f"{rule} {count}" for rule, count in found.most_common())
        kind = f"{name} ({fits[0]})" if fits else f"{name}, healthy"
        print(f"| {kind} | {seconds:.1f} | {right}/{given.seeds} | {said} |", flush=True)


if __name__ == "__main__":
    main()
