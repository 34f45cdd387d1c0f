import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_recipes.core.criteria import Watch
from lightning_recipes.core.targets import constant_of, fit, padding


@pytest.mark.parametrize(
    ("loss", "targets", "expected"),
    [
        (functional.l1_loss, torch.tensor([[0.0], [1.0], [10.0]]), [1.0]),
        (functional.mse_loss, torch.tensor([[0.0], [1.0], [11.0]]), [4.0]),
        (functional.binary_cross_entropy_with_logits, torch.tensor([[1.0], [1.0], [0.0]]), [math.log(2)]),
        (
            lambda o, t: functional.binary_cross_entropy_with_logits(o, t, pos_weight=torch.tensor(3.0)),
            torch.tensor([[1.0], [0.0]]),
            [math.log(3)],
        ),
    ],
)
def test_the_best_constant_output(loss: Any, targets: Tensor, expected: list[float]) -> None:
    with Watch() as watch:
        loss(torch.zeros(len(targets), 1).requires_grad_(), targets)
    best = constant_of(watch.seen)
    assert best.tolist() == pytest.approx(expected, rel=1e-5)
    call = watch.seen[0]
    for other in (best - 0.01, best + 0.01):
        assert call.at(best) <= call.at(other)


def test_whose_target_each_output_has() -> None:
    for outputs, targets in (((8, 1), (8, 1)), ((8,), (8,)), ((8, 3), (1,)), ((8, 3), (8, 1)), ((8, 3), (3,))):
        assert fit(outputs, targets)
    for outputs, targets in (((8, 1), (8,)), ((8,), (8, 1)), ((8, 1), (8, 3)), ((1,), (8,))):
        assert not fit(outputs, targets)


def test_padding_is_a_class_that_fills_rows_up_and_is_nowhere_else() -> None:
    rows = torch.tensor([[1, 2, 9, 9], [3, 9, 9, 9], [1, 2, 3, 4]])
    assert padding([rows]) == (pytest.approx(5 / 12), 9)
    assert padding([rows.flip(1)])[0] == 0
    assert padding([torch.tensor([[1, 9, 2, 9], [9, 1, 9, 9]])])[0] == 0
    assert padding([torch.tensor([1, 9, 9])]) == (0.0, -1)


def test_padding_of_the_inputs_may_have_the_target_of_something_else() -> None:
    tokens = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [5, 6, 7, 8]])
    kinds = torch.tensor([[1, 3, 3, 3], [2, 3, 3, 3], [3, 1, 3, 2]])
    assert padding([kinds], [tokens]) == (pytest.approx(5 / 12), 3)
    assert padding([kinds], [tokens[:, :3]]) == (0.0, -1)
    assert padding([kinds], [torch.tensor([[5, 0, 0, 0], [0, 7, 0, 0], [5, 6, 7, 8]])]) == (0.0, -1)
    kinds[0, 3] = 1  # has a meaning there
    assert padding([kinds], [tokens]) == (0.0, -1)
