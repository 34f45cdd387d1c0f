"""The usual defects, each as a change that can be made to any training."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from _zoo import Case, Detached, Loss, Run, Training, named, scaled
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

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

    def case(self, name: str = "", named: frozenset[str] = frozenset()) -> Case:
        """What should be said of it; the larger network is four times as wide."""
        return Case(name or self.name, self.make, named, replace(self, width=4 * self.width).make)


Change = Callable[..., Workload]


# ------------------------------------------------------------------------------------------ parts of trainings


def split(inputs: Tensor, targets: Tensor, train: int, val: int, seed: int) -> Split:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(7000 + seed))
    first, second = order[:train], order[train : train + val]
    return (inputs[first], targets[first]), (inputs[second], targets[second])


def standardised(data: Split) -> Split:
    (inputs, targets), (val, val_targets) = data
    mean, std = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    return ((inputs - mean) / std, targets), ((val - mean) / std, val_targets)


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


def relative(shape: Callable[[float], float]) -> Callable[[Any, int], Any]:
    """A schedule of the share of the training that is over."""
    return lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps))


def sgd(momentum: float, decay: float, nesterov: bool = False) -> Callable[[Any, float], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, momentum=momentum, weight_decay=decay, nesterov=nesterov)


# ----------------------------------------------------------------------------------------- changes of trainings


def with_data(change: Callable[[Split], Split]) -> Change:
    return lambda workload: replace(workload, data=lambda seed: change(workload.data(seed)))


def with_net(change: Callable[[nn.Sequential, int], nn.Sequential]) -> Change:
    """Something is done to the network, which is cut at a layer."""

    def changed(workload: Workload) -> Workload:
        return replace(workload, net=lambda width: change(workload.net(width), workload.cut))

    return changed


def with_loss(change: Callable[[Loss, Tensor, Tensor], Tensor]) -> Change:
    def changed(workload: Workload) -> Workload:
        return replace(workload, loss=lambda outputs, targets: change(workload.loss, outputs, targets))

    return changed


def with_options(**options: Any) -> Change:
    return lambda workload: replace(workload, options={**workload.options, **options})


def with_rate(factor: float) -> Change:
    return lambda workload: replace(workload, rate=workload.rate * factor)


def takes(function: Callable[..., Any], name: str) -> bool:
    return name in signature(function).parameters


# ---------------------------------------------------------------------------------------------------- defects


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


def smaller(workload: Workload, width: int) -> Workload:
    return replace(workload, width=width)


def larger(workload: Workload, width: int, examples: int, epochs: int) -> Workload:
    return replace(with_data(first(examples))(workload), width=width, epochs=epochs)


def rectified(*sizes: int, **more: Any) -> nn.Module:
    return nn.RNN(*sizes, nonlinearity="relu", **more)


def exploding(workload: Workload, rate: float, cells: Callable[..., nn.Module] = rectified) -> Workload:
    """Without the clipping of gradients that a recurrent net was given."""
    return replace(workload, net=partial(workload.net, cells=cells), rate=rate, optimizer=sgd(0.9, 0.0), settings={})


def mixed(workload: Workload) -> Workload:
    """Sequence for batch, or by a reshape where it should have been by a transposition."""
    if takes(workload.net, "batch_first"):
        return replace(workload, net=partial(workload.net, batch_first=False))
    first = Reshaped(lambda inputs: inputs.t().reshape(inputs.shape))
    return replace(workload, net=lambda width: nn.Sequential(first, *workload.net(width)))


def softmaxed(net: nn.Sequential, _: int) -> nn.Sequential:
    return nn.Sequential(*net, nn.Softmax(1))


def sigmoided(net: nn.Sequential, _: int) -> nn.Sequential:
    return nn.Sequential(*net, nn.Sigmoid())


def multiplied(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    return len(outputs) * loss(outputs, targets)


def negative(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    return -loss(outputs, targets)


def unmoved(workload: Workload) -> Workload:
    return replace(workload, data=partial(workload.data, shift=0))


def raw(workload: Workload) -> Workload:
    """Columns as they were measured, pixels from 0 to 255."""
    if takes(workload.data, "raw"):
        return replace(workload, data=partial(workload.data, raw=True))
    return with_data(raw_pixels)(workload)


def otherwise_scaled(workload: Workload) -> Workload:
    return replace(workload, data=lambda seed: (workload.data(seed)[0], workload.data(seed, raw=True)[1]))


def capitals(data: Split) -> Split:
    """What is validated on was written in them."""
    inputs, targets = (torch.where((signs >= 97) & (signs <= 122), signs - 32, signs) for signs in data[1])
    return data[0], (inputs, targets)


TOO_HIGH = named(
    "learning rate too high",
    "learning rate looks too high",
    "divergence",
    "diverged",
    "early instability",
    "bouncing between the walls",
)
# Of each defect the findings that name it, and the change, which may ask for more.
DEFECTS: dict[str, tuple[frozenset[str], Change]] = {
    "labels shifted": (named("mismatch"), with_data(shifted)),
    "target not shifted": (named("target is the input"), unmoved),
    "softmax twice": (named("softmax applied twice", "activation on the logits"), with_net(softmaxed)),
    "sigmoid twice": (named("sigmoid applied twice", "activation on the logits"), with_net(sigmoided)),
    "sum for mean": (named("loss is a sum"), with_loss(multiplied)),
    "not shuffled": (named("labels all alike", "periodic training loss"), ordered),
    "layers frozen": (named("frozen parameters", "layer never changes"), with_net(frozen)),
    "learning rate times 30": (TOO_HIGH, with_rate(30)),
    "learning rate over 30": (
        named("learning rate too low", "learning rate looks too low", "falls too slowly"),
        with_rate(1 / 30),
    ),
    "dead units": (
        named(
            "dead units",
            "outputs hardly depend on the input",
            "vanishing gradient",
            "no gradient",
            "layer never changes",
        ),
        with_net(dead),
    ),
    "wrong sign": (named("wrong sign of the loss"), with_loss(negative)),
    "target leaked": (named("target among the inputs"), with_data(leaked)),
    "zero_grad missing": (named("gradients not set to zero"), with_options(zero_grad=False)),
    "evaluation mode in training": (
        named("evaluation mode in training"),
        with_options(train_in_evaluation_mode=True),
    ),
    "training mode in validation": (
        named("evaluation mode differs", "training mode in validation"),
        with_options(validate_in_training_mode=True),
    ),
    "validation data in the training data": (
        named("validation data in the training data"),
        with_data(duplicated),
    ),
    "validation data otherwise scaled": (named("mismatch"), otherwise_scaled),
    "validation images upside down": (named("mismatch"), with_data(upside_down)),
    "validation images moved": (named("mismatch"), with_data(moved)),
    "validation text in capitals": (named("mismatch"), with_data(capitals)),
    "labels at random": (named("input without information", "overfitting", "nothing learnt"), with_data(unrelated)),
    "initialisation times 10": (named("initial loss high", "initial loss off"), with_net(tenfold)),
    "too small": (named("underfitting", "model bias"), smaller),
    "too big for the data": (named("overfitting"), larger),
    "recurrent net explodes": (TOO_HIGH | {"exploding gradient"}, exploding),
    "not clipped at a high rate": (TOO_HIGH | {"exploding gradient"}, exploding),
    "inputs not normalised": (named("inputs not normalised"), raw),
    "body not in the optimizer": (named("not in any optimizer", "layer never changes"), head_alone),
    "detached half-way": (named("no gradient", "layer never changes"), with_net(detached)),
    "examples mixed": (named("examples mixed"), mixed),
}


def put(defect: str, *workloads: Workload, **more: Any) -> list[Case]:
    """The workloads with a defect.

    Args:
        defect: Of the table.
        workloads: What it is put into.
        more: That its change asks for.
    """
    rules, change = DEFECTS[defect]
    return [change(workload, **more).case(f"{defect}: {workload.name}", rules) for workload in workloads]
