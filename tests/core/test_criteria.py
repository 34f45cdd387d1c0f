import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_recipes.core.criteria import Watch, loss_of

CLASSES = torch.tensor([0, 1, 2, 2, 0])


def outputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize(
    ("module", "shape", "targets", "kind"),
    [
        (nn.CrossEntropyLoss(), (5, 3), CLASSES, "classes"),
        (nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), (5, 3), CLASSES, "classes"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), (5, 3), CLASSES, "classes"),
        (nn.CrossEntropyLoss(), (5, 3, 2), torch.stack([CLASSES, CLASSES], 1), "classes"),
        (nn.CrossEntropyLoss(), (5, 3), torch.full((5, 3), 1 / 3), "classes"),
        (nn.CrossEntropyLoss(ignore_index=2), (5, 3), CLASSES, "classes"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), (5, 3), torch.ones(5, 3), "binary"),
        (nn.MSELoss(), (5, 3), torch.ones(5, 3), "squares"),
        (nn.HuberLoss(), (5,), torch.ones(5), "squares"),
        (nn.L1Loss(reduction="none"), (5, 1), torch.ones(5, 1), "absolute"),
    ],
)
def test_a_criterion_is_noted_and_gives_its_value_for_constant_outputs(
    module: Any, shape: tuple[int, ...], targets: Tensor, kind: str
) -> None:
    given = outputs(*shape)
    with Watch() as watch:
        value = module(given, targets)
    (criterion,) = watch.part_of(value.mean())
    assert criterion.kind == kind
    assert criterion.mean == pytest.approx(float(value.detach().mean()))
    constant = torch.tensor([0.5, -1.0, 2.0])
    if kind == "classes":
        spread = constant.view(1, 3, *[1] * (len(shape) - 2)).expand(shape)
        assert float(criterion.at(constant)) == pytest.approx(float(module(spread, targets).mean()))
    else:
        assert float(criterion.at(torch.tensor(0.5))) == pytest.approx(
            float(module(torch.full(shape, 0.5), targets).mean())
        )
    assert criterion.value.grad_fn is None


def test_uniform_log_probabilities_and_probabilities_give_ln_c() -> None:
    with Watch() as watch:
        functional.nll_loss(outputs(5, 3).log_softmax(1), CLASSES)
        functional.binary_cross_entropy(outputs(5, 3).sigmoid(), torch.ones(5, 3))
    likelihood, binary = watch.part_of(None)
    assert float(likelihood.at(torch.full((3,), 7.0))) == pytest.approx(math.log(3))
    assert float(binary.at(torch.zeros(()))) == pytest.approx(math.log(2))
    assert (likelihood.activation, binary.activation) == ("log_softmax", "sigmoid")


def test_only_criteria_that_the_loss_is_made_of_count() -> None:
    weight = outputs(5, 3)
    with Watch() as watch:
        loss = functional.cross_entropy(weight, CLASSES) + weight.square().sum()
        functional.mse_loss(weight, torch.zeros(5, 3))  # looked at alone
        with torch.no_grad():
            functional.cross_entropy(weight, CLASSES)
    assert [each.name for each in watch.part_of(loss)] == ["cross_entropy"]


@pytest.mark.parametrize(("loss", "count"), [(None, 2), (torch.ones(()), 3)])
def test_without_a_graph_those_that_could_be_learnt_from_or_all_of_them_count(loss: Any, count: int) -> None:
    weight = outputs(5, 3)
    with Watch() as watch:
        for _ in range(2):
            functional.cross_entropy(weight, CLASSES)
        functional.cross_entropy(weight.detach(), CLASSES)
    assert len(watch.part_of(loss)) == count


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: torch.softmax(x, 1).view(5, 3), "softmax"),
        (lambda x: torch.relu(x + 0), "relu"),
        (lambda x: nn.ReLU(inplace=True)(x + 0), "relu"),
        (nn.Tanh(), "tanh"),
        (lambda x: torch.relu(x) + 1, ""),
        (lambda x: nn.Linear(3, 3)(x.relu()), ""),
    ],
)
def test_an_activation_right_before_is_noted(change: Any, name: str) -> None:
    with Watch() as watch:
        functional.cross_entropy(change(outputs(5, 3)), CLASSES)
    assert watch.seen[0].activation == name


def test_what_a_training_step_returns() -> None:
    one = torch.ones(())
    assert loss_of(one) is one
    assert loss_of({"loss": one, "more": 1}) is one
    assert loss_of(None) is None
    assert loss_of({}) is None
