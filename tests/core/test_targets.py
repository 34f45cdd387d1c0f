import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_recipes.core.criteria import Criterion, Watch
from lightning_recipes.core.targets import between, clustered, commonest, constant_of, fit, padding, unnormalised


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


LABELS = torch.tensor([0, 1, 1, 2, 2, 2])
SOFT = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])


@pytest.mark.parametrize(
    ("shape", "targets", "more", "expected"),
    [
        ((6, 3), LABELS, {}, [1 / 6, 2 / 6, 3 / 6]),
        ((6, 3), LABELS, {"label_smoothing": 0.3}, [0.7 / 6 + 0.1, 1.4 / 6 + 0.1, 2.1 / 6 + 0.1]),
        ((6, 3), LABELS, {"weight": torch.tensor([3.0, 1.0, 1.0])}, [3 / 8, 2 / 8, 3 / 8]),
        ((6, 3), LABELS, {"ignore_index": 1}, [1 / 4, 0.0, 3 / 4]),
        ((6, 3, 2), LABELS.view(6, 1).expand(6, 2), {}, [1 / 6, 2 / 6, 3 / 6]),
        ((2, 3), SOFT, {}, [0.15, 0.2, 0.65]),
        ((2, 3, 2), SOFT.unsqueeze(2).expand(2, 3, 2), {}, [0.15, 0.2, 0.65]),
        ((3,), SOFT[0], {}, [0.2, 0.3, 0.5]),
    ],
)
def test_the_best_constant_probabilities_of_classes(
    shape: tuple[int, ...], targets: Tensor, more: dict[str, Any], expected: list[float]
) -> None:
    with Watch() as watch:
        for part in range(2):
            functional.cross_entropy(torch.zeros(shape).requires_grad_(), targets if part else targets.clone(), **more)
    best = constant_of(watch.seen)
    assert best.softmax(0).tolist() == pytest.approx(expected, abs=1e-6)
    call = watch.seen[0]
    for step in torch.eye(3) * 0.01:
        assert call.at(best) <= min(call.at(best + step), call.at(best - step)) + 1e-7


def test_the_best_constant_of_each_column() -> None:
    targets = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([3.0, 2.0])
    with Watch() as watch:
        for rows in (targets[:2], targets[2:]):
            for loss in (functional.mse_loss, functional.l1_loss, functional.binary_cross_entropy_with_logits):
                more = {"pos_weight": weights} if loss is functional.binary_cross_entropy_with_logits else {}
                loss(torch.zeros(rows.shape).requires_grad_(), rows, **more)
    of_kind = [constant_of(watch.seen[kind::3]).tolist() for kind in range(3)]
    assert of_kind[:2] == [pytest.approx([0.4, 0.6]), [0.0, 1.0]]
    with Watch() as watch:
        functional.mse_loss(torch.zeros(5).requires_grad_(), targets[:, 0])
        functional.mse_loss(torch.zeros(5, 2).requires_grad_(), targets)
        functional.binary_cross_entropy_with_logits(torch.zeros(5, 2).requires_grad_(), torch.ones(5, 2))
    assert constant_of(watch.seen[:1]).tolist() == pytest.approx(0.4)
    assert constant_of(watch.seen[:2]).tolist() == pytest.approx((2 * 0.4 + 0.6) / 3)
    assert constant_of(watch.seen[2:]).isfinite().all()
    assert of_kind[2] == pytest.approx([math.log(3 * 0.4 / 0.6), math.log(2 * 0.6 / 0.4)])


def test_targets_far_from_0_or_large() -> None:
    def said(targets: Tensor, spread: float = 0.0, loss: Any = functional.mse_loss) -> str:
        with Watch() as watch:
            loss(torch.zeros(targets.shape).requires_grad_(), targets)
        return unnormalised(watch.seen, spread)

    unit = torch.tensor([1.0, -1.0] * 8)
    assert (
        said(unit)
        == said(10 * unit)
        == said(20 * unit, spread=2.0)
        == said(9.9 * unit)
        == said(9.9 * unit, spread=0.5)
        == said(19 * unit, spread=2.0)
        == ""
    )
    assert said(10.1 * unit) == "mean 0 and standard deviation 10.1"
    assert said(unit + 2.9) == ""
    assert said(unit - 3.1) != said(21 * unit, spread=2.0) != ""
    assert said(unit + 100) == said(unit + 100, loss=functional.l1_loss) == "mean 100 and standard deviation 1"
    assert said(unit - 100) == "mean -100 and standard deviation 1"
    assert said(1000 * unit) == "mean 0 and standard deviation 1e+03"
    assert said(1000 * unit, spread=1000.0) == ""
    assert said((unit > 0).float(), loss=functional.binary_cross_entropy_with_logits) == ""


def test_the_commonest_label() -> None:
    assert commonest(LABELS) == 0.5


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
    assert padding([rows, torch.tensor([[5, 9]])]) == (pytest.approx(6 / 14), 9)
    assert padding([rows, torch.tensor([[9], [9]])]) == (0.0, -1)
    assert padding([torch.tensor([[1, 9], [2, 9], [3, 4]])])[0] == 0  # an end of every row, it may be
    assert padding([torch.tensor([[1, 2, 3, 9], [9, 9, 9, 9], [5, 6, 5, 4]])]) == (pytest.approx(5 / 12), 9)
    assert padding([]) == (0.0, -1)


def test_padding_of_the_inputs_may_have_the_target_of_something_else() -> None:
    tokens = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [5, 6, 7, 8]])
    kinds = torch.tensor([[1, 3, 3, 3], [2, 3, 3, 3], [3, 1, 3, 2]])
    assert padding([kinds], [tokens]) == (pytest.approx(5 / 12), 3)
    assert padding([kinds], [tokens[:, :3]]) == (0.0, -1)
    assert padding([kinds], [torch.tensor([[5, 0, 0, 0], [0, 7, 0, 0], [5, 6, 7, 8]])]) == (0.0, -1)
    kinds[0, 3] = 1  # has a meaning there
    assert padding([kinds], [tokens]) == (0.0, -1)


def seen(loss: Any, outputs: Tensor, targets: Tensor, **more: Any) -> list[Criterion]:
    with Watch() as watch:
        loss(outputs.requires_grad_(), targets, **more)
    return watch.seen


def test_what_never_is_has_a_constant_that_is_finite() -> None:
    absent = constant_of(seen(functional.cross_entropy, torch.zeros(2, 2), torch.tensor([0, 0])))
    assert absent.tolist() == pytest.approx([0.0, math.log(1e-12)], abs=1e-4)
    none = constant_of(seen(functional.cross_entropy, torch.zeros(2, 2), torch.full((2,), -100)))
    assert none.tolist() == pytest.approx([math.log(1e-12)] * 2, rel=1e-6)
    for label, sign in ((1.0, 1), (0.0, -1)):
        targets = torch.full((4, 1), label)
        best = constant_of(seen(functional.binary_cross_entropy_with_logits, torch.zeros(4, 1), targets))
        assert best.tolist() == pytest.approx([sign * math.log(1e6)], abs=0.1)


def test_weights_of_columns_that_are_not_told_apart_count_by_their_mean() -> None:
    targets, weights = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]]), torch.tensor([2.0, 4.0])
    calls = seen(functional.binary_cross_entropy_with_logits, torch.zeros(2, 1, 2), targets, pos_weight=weights)
    assert constant_of(calls).tolist() == pytest.approx(math.log(3))


def test_how_much_of_the_variance_lies_between_batches() -> None:
    batches = [torch.tensor([0, 2]), torch.tensor([4, 6, 8]), torch.tensor([5])]
    every = torch.cat(batches).double()
    within = (2 + 8 + 0) / (6 - 3)  # squares about the means 1, 6 and 5
    assert between(batches) == pytest.approx(1 - within / float(every.var()))
    assert between([torch.zeros(3), torch.zeros(2)]) == 0.0
    assert between([torch.zeros(3), torch.ones(2)]) == 1.0


def test_labels_are_clustered_that_no_shuffle_spreads_as_far() -> None:
    pure = [torch.full((4,), label) for label in (7, 7, 3, 3)]
    assert clustered(pure)
    assert clustered([*pure, torch.tensor([3])])
    mixed = [torch.tensor([7, 3, 7, 3])] * 4
    assert not clustered(mixed)
    assert not clustered([torch.tensor([7, 7]), torch.tensor([3, 3])])  # as every third shuffle
    assert not clustered([torch.full((4,), 7)] * 3)  # all are as far


def test_padding_of_two_columns_is_seen_and_of_one_it_is_not() -> None:
    assert padding([torch.tensor([[9, 9], [1, 9], [2, 3]])])[0] == 0  # as often at the end of a row as before
    assert padding([torch.tensor([[9, 9], [9, 9], [2, 3]])]) == (pytest.approx(4 / 6), 9)
    assert padding([torch.tensor([[9], [9], [2]])]) == (0.0, -1)
    tokens = torch.tensor([[0, 0], [0, 0], [5, 6]])
    assert padding([torch.tensor([[1, 1], [1, 1], [1, 2]])], [tokens]) == (pytest.approx(4 / 6), 1)


def test_shuffles_leave_the_random_numbers_of_the_training_alone() -> None:
    before = torch.get_rng_state()
    labels = torch.tensor([7, 7, 7, 3, 3, 3, 7, 3]).split(2)
    assert len({clustered(labels) for _ in range(3)}) == 1
    assert torch.equal(torch.get_rng_state(), before)
