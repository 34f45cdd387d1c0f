import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_recipes.core.criteria import Criterion, Watch, loss_of

CLASSES = torch.tensor([0, 1, 2, 2, 0])


def outputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


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


@pytest.mark.parametrize(
    ("function", "shape", "targets", "rows", "classes", "positions"),
    [
        (functional.cross_entropy, (5, 3), CLASSES, (5, 3), 3, 5),
        (functional.cross_entropy, (5, 3), torch.tensor([0, 1, -100, -100, 2]), (5, 3), 3, 3),
        (functional.cross_entropy, (3,), torch.tensor(1), (1, 3), 3, 1),
        (functional.cross_entropy, (3,), torch.tensor([0.2, 0.3, 0.5]), (1, 3), 3, 1),
        (functional.cross_entropy, (5, 3), torch.full((5, 3), 1 / 3), (5, 3), 3, 5),
        (functional.cross_entropy, (5, 3, 2, 4), CLASSES.view(5, 1, 1).expand(5, 2, 4), (40, 3), 3, 40),
        (functional.binary_cross_entropy_with_logits, (5, 3), torch.ones(5, 3), (5, 3), 2, 15),
        (functional.binary_cross_entropy_with_logits, (5,), torch.ones(5), (5, 1), 2, 5),
        (functional.mse_loss, (5, 3, 2), torch.ones(5, 3, 2), (5, 6), 0, 30),
        (functional.l1_loss, (), torch.ones(()), (1, 1), 0, 1),
    ],
)
def test_what_is_predicted_and_of_how_many_classes(
    function: Any, shape: tuple[int, ...], targets: Tensor, rows: tuple[int, int], classes: int, positions: int
) -> None:
    given = outputs(*shape)
    with Watch() as watch:
        value = function(given, targets)
    (criterion,) = watch.part_of(value)
    assert criterion.rows.shape == rows
    assert (criterion.classes, criterion.positions) == (classes, positions)
    assert float(criterion.value_at(given * 1)) == pytest.approx(float(value.detach()))
    if criterion.kind == "classes":
        of_rows = functional.cross_entropy(criterion.rows, targets.reshape(rows if targets.is_floating_point() else -1))
        assert float(of_rows) == pytest.approx(float(value.detach()))
        constant = torch.tensor([0.5, -1.0, 2.0])
        everywhere = constant.view(3, *[1] * (len(shape) - 2)).expand(shape)
        assert float(criterion.at(constant)) == pytest.approx(float(function(everywhere, targets)))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reduction_is_what_was_made_of_the_losses(
    size_average: bool | None, reduce: bool | None, reduction: str
) -> None:
    given = outputs(5, 3)
    each = functional.cross_entropy(given, CLASSES, reduction="none")
    with Watch() as watch:
        value = functional.cross_entropy(given, CLASSES, size_average=size_average, reduce=reduce, reduction=reduction)
    made = {"mean": each.mean(), "sum": each.sum(), "none": each}[watch.seen[0].reduction]
    torch.testing.assert_close(made, value)


def test_other_outputs_are_judged_in_single_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        functional.mse_loss(torch.zeros(5).bfloat16().requires_grad_(), torch.ones(5).bfloat16())
        value = watch.seen[0].value_at(torch.full((5,), 1 / 3))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(4 / 9, rel=1e-6)


def test_a_batch_of_nothing_is_not_noted() -> None:
    with Watch() as watch:
        functional.mse_loss(torch.zeros(0, 3).requires_grad_(), torch.zeros(0, 3))
    assert not watch.seen


def test_tensors_are_let_go_of() -> None:
    with Watch() as watch:
        activated = weakref.ref(torch.relu(outputs(5, 3)))
        made_up = weakref.ref(torch.zeros(3))
        assert activated() is not None  # or its memory would be that of another
        assert made_up() is not None
    assert activated() is made_up() is None
    assert not watch.seen


def written(targets: Tensor) -> Tensor:
    made = torch.zeros_like(targets)
    made[:] = targets
    return made


@pytest.mark.parametrize(
    ("make", "made_up"),
    [
        (lambda y: torch.zeros(len(y), dtype=torch.long), True),
        (lambda y: torch.zeros_like(y).to(torch.int32).long(), True),
        (lambda y: y.new_full(y.shape, 2).view(y.shape), True),
        (lambda y: torch.arange(len(y)).clamp(max=2), True),
        (lambda y: y, False),
        (lambda y: y * torch.ones_like(y), False),
        (written, False),
        (lambda y: torch.zeros_like(y).copy_(y), False),
    ],
)
def test_targets_that_the_step_makes_up_are_known(make: Any, made_up: bool) -> None:
    with Watch() as watch:
        functional.cross_entropy(outputs(5, 3), make(CLASSES))
    assert watch.seen[0].made_up == made_up


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


def first_rows_rectified(x: Tensor) -> Tensor:
    changed = x + 0
    changed[:2].relu_()
    return changed


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: torch.softmax(x, 1).view(5, 3), "softmax"),
        (lambda x: torch.relu(x + 0), "relu"),
        (lambda x: nn.ReLU(inplace=True)(x + 0), "relu"),
        (nn.Tanh(), "tanh"),
        (lambda x: torch.relu(x) + 1, ""),
        (lambda x: torch.cat([x, x]).relu()[:5], ""),  # a part of it, which may be of another kind
        (first_rows_rectified, ""),
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


@pytest.mark.parametrize(
    "name", ["softmax", "log_softmax", "sigmoid", "relu", "relu_", "tanh", "hardtanh", "relu6", "gelu"]
)
def test_these_activations_are_noted(name: str) -> None:
    activate: Any = getattr(functional, name, None) or getattr(torch, name)
    with Watch() as watch:
        functional.cross_entropy(activate(outputs(5, 3) + 0, **({"dim": 1} if "soft" in name else {})), CLASSES)
    assert watch.seen[0].activation == (name.rstrip("_") if name != "gelu" else "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(5, dtype=torch.long),
        lambda: torch.ones(5, dtype=torch.long),
        lambda: torch.full((5,), 2),
        lambda: torch.arange(5) * 0,
        lambda: CLASSES.new_zeros(5),
        lambda: CLASSES.new_ones(5),
        lambda: torch.ones_like(CLASSES),
        lambda: torch.full_like(CLASSES, 1),
    ],
)
def test_these_make_targets_up(make: Any) -> None:
    with Watch() as watch:
        functional.cross_entropy(outputs(5, 3), make())
        functional.cross_entropy(outputs(5, 3), torch.tensor([0, 1, 2, 2, 0]))
    assert [each.made_up for each in watch.seen] == [True, False]


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (functional.cross_entropy, "classes"),
        (functional.nll_loss, "classes"),
        (functional.binary_cross_entropy_with_logits, "binary"),
        (functional.binary_cross_entropy, "binary"),
        (functional.mse_loss, "squares"),
        (functional.huber_loss, "squares"),
        (functional.smooth_l1_loss, "squares"),
        (functional.l1_loss, "absolute"),
    ],
)
def test_every_kind_of_criterion_is_called_by_name_or_by_place(function: Any, kind: str) -> None:
    given = outputs(5, 3).sigmoid()
    targets = CLASSES if kind == "classes" else torch.ones(5, 3)
    with Watch() as watch:
        function(given, targets)
        function(target=targets, input=given)
        functional.soft_margin_loss(given, torch.ones(5, 3))  # none of them
    assert [(each.kind, each.name, each.reduction) for each in watch.seen] == [(kind, function.__name__, "mean")] * 2
    assert all(each.outputs is given and each.targets is targets for each in watch.seen)


def test_a_criterion_far_off_in_the_graph_is_not_looked_for() -> None:
    for steps, found in ((1900, 1), (2100, 0)):
        with Watch() as watch:
            loss = functional.cross_entropy(outputs(5, 3), CLASSES)
            for _ in range(steps):
                loss = -loss
        assert len(watch.part_of(loss)) == found


def test_a_loss_is_one_number() -> None:
    assert loss_of(torch.ones(1)) is not None
    assert loss_of(torch.ones(2)) is loss_of({"loss": torch.ones(2)}) is loss_of(1.0) is loss_of({"loss": 1.0}) is None


def test_arguments_are_those_of_the_call_and_the_defaults() -> None:
    with Watch() as watch:
        functional.cross_entropy(outputs(5, 3), CLASSES, None, None, 2, label_smoothing=0.5)
    (call,) = watch.seen
    assert (call.arguments["ignore_index"], call.arguments["label_smoothing"]) == (2, 0.5)
    assert call.arguments["reduction"] == "mean"
    assert {"input", "target"}.isdisjoint(call.arguments)
    assert call.valid.tolist() == [True, True, False, False, True]


def test_a_mean_of_single_losses_in_half_precision_is_one_in_single_precision() -> None:
    with Watch() as watch:
        functional.mse_loss(torch.full((3,), 1.0).half(), torch.tensor([0.0, 0.0, 0.5]).half(), reduction="none")
    assert watch.seen[0].mean == pytest.approx((1 + 1 + 0.25) / 3, rel=1e-6)


def test_one_output_that_several_targets_are_compared_with_has_their_shape() -> None:
    with Watch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, too
        functional.mse_loss(torch.zeros(4, 1).requires_grad_(), torch.ones(4, 3))
        constant = watch.seen[0].at(torch.tensor([1.0, 2.0, 3.0]))
    assert float(constant) == pytest.approx((0 + 1 + 4) / 3)


def test_each_call_is_one_of_its_own() -> None:
    given, targets = outputs(5, 3), torch.ones(5, 3)
    with Watch() as watch:
        for _ in range(2):
            functional.mse_loss(given, targets)
    first, second = watch.seen
    assert first != second
    assert {first, second, watch} == {*watch.seen, watch}
    bare = Criterion(functional.mse_loss, {}, given, targets, first.value)
    assert (bare.activation, bare.made_up) == ("", False)
