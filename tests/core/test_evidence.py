import math
import pickle
import re
from functools import partial

import pytest
import torch
from members import evidence_of, world
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_recipes.core.ensembles import combined
from lightning_recipes.core.evidence import Evidence, Likelihoods, Squares
from lightning_recipes.core.selection import select


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_losses_are_those_of_the_averaged_predictions(task: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    if task == "classification":
        outputs, targets = torch.randn(3, 40, 4, 6, generator=generator), torch.randint(4, (40, 6), generator=generator)
        averaged = combined(outputs.double(), weights, "logits")
        expected = nn.functional.cross_entropy(averaged, targets, reduction="none").sum(1)
    elif task == "binary":
        outputs, targets = torch.randn(3, 40, 6, generator=generator), torch.rand(40, 6, generator=generator) > 0.5
        averaged = combined(outputs.double(), weights, "binary logits")
        loss = nn.functional.binary_cross_entropy_with_logits
        expected = loss(averaged, targets.double(), reduction="none").sum(1)
    else:
        outputs, targets = torch.randn(3, 40, 6, generator=generator), torch.randn(40, 6, generator=generator)
        expected = (combined(outputs.double(), weights, "mean") - targets).square().sum(1)
    evidence = evidence_of(outputs, targets)
    assert evidence.task == task
    table, finite = evidence.table()
    assert finite == [0, 1, 2]
    torch.testing.assert_close(table.losses(weights), expected, rtol=1e-5, atol=1e-6)
    assert table.counts.tolist() == [6.0] * 40
    part = torch.arange(40) % 3 == 0
    torch.testing.assert_close(table.part(part).losses(weights), expected[part], rtol=1e-5, atol=1e-6)
    assert table.loss(weights) == pytest.approx(expected.sum().item() / 240, rel=1e-5)


# ------------------------------------------------------------------------------ shapes, and what does not count


def test_classes_are_found_by_the_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 6, 5, 4, generator=generator), torch.randint(4, (6, 5), generator=generator)
    last = evidence_of(outputs, targets).table()[0].losses(torch.tensor([0.5, 0.5]).double())
    second = evidence_of(outputs.movedim(-1, 2), targets).table()[0].losses(torch.tensor([0.5, 0.5]).double())
    flat = Evidence()
    flat.update(outputs.reshape(2, 30, 4), targets)
    assert torch.equal(last, second)
    assert torch.equal(last, flat.table()[0].losses(torch.tensor([0.5, 0.5]).double()))
    square = torch.randn(2, 6, 5, 5, generator=generator)
    with pytest.raises(ValueError, match="could have the classes second or last: give dim"):
        evidence_of(square, targets)
    assert evidence_of(square, targets, dim=-1).samples == 6


def test_what_cannot_be_understood_is_refused() -> None:
    for outputs, targets, problem in (
        (torch.randn(2, 6, 3), torch.randint(3, (6, 3)), "do not tell the task"),
        (torch.randn(2, 6, 1), torch.randn(6), "do not tell the task"),
        (torch.randn(2, 6, 3), torch.randint(3, (5,)), "do not fit: give dim"),
    ):
        with pytest.raises(ValueError, match=problem):
            Evidence().update(outputs, targets)
    with pytest.raises(ValueError, match="regression needs a target for each output"):
        Evidence("regression").update(torch.randn(2, 6, 1), torch.randn(6))
    with pytest.raises(ValueError, match="a target for each position"):
        Evidence(dim=1).update(torch.randn(2, 6, 3), torch.randint(3, (6, 2)))
    with pytest.raises(ValueError, match="task must be 'auto' or"):
        Evidence("ranking")
    with pytest.raises(ValueError, match="no batch has been given"):
        select(Evidence())
    with pytest.raises(ValueError, match="how must be 'auto' or"):
        select(Evidence(), "median")
    evidence = evidence_of(torch.randn(2, 6, 3), torch.zeros(6).long())
    with pytest.raises(ValueError, match="outputs of the same members, got 3"):
        evidence.update(torch.randn(3, 6, 3), torch.zeros(6).long())
    with pytest.raises(ValueError, match="no target counts"):
        select(evidence_of(torch.randn(2, 6, 3), torch.full((6,), -100)))


def test_ignored_positions_do_not_count_even_where_they_are_no_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(3, 20, 5, 4, generator=generator), torch.randint(4, (20, 5), generator=generator)
    ignored = torch.rand(20, 5, generator=generator) < 0.4
    ignored[7] = True  # all of a row
    outputs[:, ignored] = math.nan
    evidence = evidence_of(outputs, targets.masked_fill(ignored, -100))
    table, finite = evidence.table()
    expected = -outputs[1].log_softmax(-1).gather(-1, targets[..., None])[~ignored].double()
    assert finite == [0, 1, 2]
    assert table.loss(torch.tensor([0, 1, 0]).double()) == pytest.approx(expected.mean().item(), rel=1e-5)
    assert len(table.counts) == 19
    assert table.counts.sum() == (~ignored).sum()
    hits = (outputs.argmax(-1) == targets)[:, ~ignored].double().mean(1)
    assert evidence.accuracies() == pytest.approx(hits.tolist())


def test_evidence_of_several_ranks_is_that_of_one() -> None:
    for kind in ("classification", "regression"):
        outputs, targets = world("equally good", 60, torch.Generator().manual_seed(0))
        if kind == "regression":
            outputs, targets = outputs[..., 0], targets.float()
        whole, first = evidence_of(outputs, targets), Evidence()
        first.extend(Evidence())
        first.extend(evidence_of(outputs[:, :23], targets[:23]))
        first.extend(pickle.loads(pickle.dumps(evidence_of(outputs[:, 23:], targets[23:]))))
        assert first.samples == whole.samples == 60
        one, other = select(whole), select(first)
        assert one.weights == pytest.approx(other.weights)
        assert one.gain == pytest.approx(other.gain)
        assert first.accuracies() == pytest.approx(whole.accuracies(), nan_ok=True)
        assert first.calibration_errors() == pytest.approx(whole.calibration_errors(), nan_ok=True)
        torch.testing.assert_close(first.disagreements(), whole.disagreements())
    with pytest.raises(ValueError, match="evidence of one task is wanted, got regression and classification"):
        first.extend(evidence_of(torch.randn(5, 4, 3), torch.zeros(4).long()))


# ------------------------------------------------------------------------------ the report


def test_accuracy_calibration_and_disagreement_are_those_of_torchmetrics_and_the_definition() -> None:
    outputs, targets = world("equally good", 300, torch.Generator().manual_seed(0))
    outputs[2] *= 1000  # saturated
    evidence = evidence_of(outputs, targets)
    for member in range(5):
        expected = multiclass_calibration_error(outputs[member], targets, num_classes=5, n_bins=15).item()
        assert evidence.calibration_errors()[member] == pytest.approx(expected, abs=1e-6)
        hits = (outputs[member].argmax(-1) == targets).double().mean().item()
        assert evidence.accuracies()[member] == pytest.approx(hits)
        for other in range(5):
            differs = (outputs[member].argmax(-1) != outputs[other].argmax(-1)).double().mean().item()
            assert evidence.disagreements()[member, other].item() == pytest.approx(differs)
    truth = targets > 2
    binary = evidence_of(outputs[..., 0], truth)
    expected = binary_calibration_error(outputs[0, :, 0].sigmoid(), truth.long(), n_bins=15).item()
    assert binary.calibration_errors()[0] == pytest.approx(expected, abs=1e-6)
    assert binary.accuracies()[1] == pytest.approx(((outputs[1, :, 0] > 0) == truth).double().mean().item())


def test_disagreement_of_regression_has_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    targets, noise = torch.randn(2000, generator=generator), torch.randn(2, 2000, generator=generator)
    outputs = targets + torch.stack([noise[0], noise[1], noise[0]])
    for scale in (1.0, 1e-3, 1e4):
        pairs = evidence_of(scale * outputs, scale * targets).disagreements()
        assert pairs[0, 1].item() == pytest.approx(1, abs=0.1)
        assert pairs[0, 2].item() == pytest.approx(0, abs=1e-6)


def test_the_best_weights_of_two_members_are_those_of_a_search() -> None:
    p = torch.tensor([[0.8, 0.3, 0.9, 0.5], [0.2, 0.9, 0.5, 0.6]]).double()
    likelihoods = Likelihoods(p.log(), torch.arange(4))
    residuals = torch.tensor([[1.0, -0.5, 2.0], [-0.8, 1.0, 1.0]]).double()
    products = residuals.T[:, :, None] * residuals.T[:, None, :]
    squares = Squares(products, torch.ones(3).double())
    for table, loss in (
        (likelihoods, lambda w: -(w @ p).log().mean()),
        (squares, lambda w: (w @ residuals).square().mean()),
    ):
        shares = [torch.tensor([place / 1000, 1 - place / 1000]).double() for place in range(1001)]
        best = min(shares, key=lambda w, of=loss: float(of(w)))
        assert 0.1 < float(best[0]) < 0.9
        found = table.simplex()
        assert float(found.sum()) == pytest.approx(1)
        assert found.tolist() == pytest.approx(best.tolist(), abs=5e-3)
        assert table.loss(found) == pytest.approx(float(loss(found)))
        assert float(table.losses(found).mean()) == pytest.approx(float(loss(found)))


def test_a_member_that_is_worse_everywhere_has_no_weight() -> None:
    residuals = torch.tensor([[1.0, -0.5, 2.0], [3.0, -4.0, 5.0]]).double()
    products = residuals.T[:, :, None] * residuals.T[:, None, :]
    assert Squares(products, torch.ones(3).double()).simplex().tolist() == pytest.approx([1.0, 0.0])


def test_a_regression_has_no_accuracies() -> None:
    evidence = evidence_of(torch.randn(3, 10), torch.randn(10))
    for values in (evidence.accuracies(), evidence.calibration_errors()):
        assert len(values) == 3
        assert all(map(math.isnan, values))


def test_what_is_refused_is_said_with_all_shapes() -> None:
    integers = torch.zeros(6, dtype=torch.long)
    for make, outputs, targets, problem in (
        (
            Evidence,
            torch.zeros(2, 6, 1),
            torch.zeros(6),
            "outputs (members, batch, ...) of the shape (2, 6, 1) and torch.float32 targets of the shape (6,) do not"
            " tell the task: give task='classification', 'binary' or 'regression', and targets that fit",
        ),
        (
            Evidence,
            torch.zeros(2, 6, 3),
            integers[:5],
            "outputs of shape (6, 3) and targets (5,) do not fit: give dim",
        ),
        (
            Evidence,
            torch.zeros(2, 4, 4, 4),
            torch.zeros(4, 4, dtype=torch.long),
            "outputs of shape (4, 4, 4) and targets (4, 4) could have the classes second or last: give dim",
        ),
        (
            partial(Evidence, "binary"),
            torch.zeros(2, 6, 1),
            integers.bool(),
            "binary needs a target for each output: outputs have the shape (members, batch, ...) (2, 6, 1), targets"
            " (6,)",
        ),
        (
            partial(Evidence, dim=1),
            torch.zeros(2, 6, 3),
            torch.zeros(6, 2, dtype=torch.long),
            "there must be a target for each position: outputs have the shape (members, batch, ...) (2, 6, 3) with the"
            " classes last, targets (6, 2)",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
            make().update(outputs, targets)
    for evidence, problem in (
        (Evidence(), "there is no evidence: no batch has been given"),
        (evidence_of(torch.full((2, 6, 3), math.nan), integers), "every member predicts NaN or infinities"),
        (evidence_of(torch.full((2, 6), math.inf), torch.zeros(6)), "every member predicts NaN or infinities"),
        (evidence_of(torch.zeros(2, 6, 3), integers - 100), "there is no evidence: no target counts"),
    ):
        with pytest.raises(ValueError, match=f"^{problem}$"):
            evidence.table()
    with pytest.raises(ValueError, match=r"^task must be 'auto' or 'classification' or 'binary' or 'regression', got"):
        Evidence("classes")
    for outputs, targets in ((torch.zeros(3, 6, 3), integers), (torch.zeros(3, 6), torch.zeros(6))):
        evidence = evidence_of(outputs[:2], targets)
        with pytest.raises(ValueError, match="^every batch must have outputs of the same members, got 3$"):
            evidence.update(outputs, targets)


def test_the_task_is_told_by_the_targets() -> None:
    for outputs, targets, task in (
        (torch.zeros(2, 6), torch.zeros(6), "regression"),
        (torch.zeros(2, 6), torch.zeros(6).bool(), "binary"),
        (torch.zeros(2, 6, 3), torch.zeros(6).long(), "classification"),
        (torch.zeros(2, 6, 3), torch.zeros(6).to(torch.uint8), "classification"),
    ):
        evidence = evidence_of(outputs, targets)
        assert (evidence.task, evidence.samples) == (task, 6)
        assert evidence.dim == (-1 if task == "classification" else None) or evidence.dim == 1
    for outputs, targets in (
        (torch.zeros(2, 6), torch.zeros(6).long()),
        (torch.zeros(2, 6, 3), torch.zeros(6).bool()),
        (torch.zeros(2, 6, 3), torch.zeros(6)),
    ):
        with pytest.raises(ValueError, match="do not tell the task"):
            Evidence().update(outputs, targets)


def test_a_confidence_of_1_has_a_bin_of_its_own() -> None:
    sure, nearly = [200.0, 0.0], [math.log(99), 0.0]
    evidence = evidence_of(torch.tensor([[sure, nearly]]), torch.tensor([1, 0]))
    assert evidence.calibration_errors() == pytest.approx([(1 + 0.01) / 2])  # in one bin it would be 0.99 / 2
    bits = evidence_of(torch.tensor([[-200.0, -200.0, 200.0]]), torch.tensor([False, True, True]))
    assert bits.calibration_errors() == pytest.approx([1 / 3])  # of the probability of 1


def test_a_member_whose_logits_are_infinite_predicts_nothing() -> None:
    outputs = torch.zeros(3, 4, 2)
    outputs[0, 1, 0] = math.inf
    outputs[1, 1, 0] = -math.inf  # of one class it may
    evidence = evidence_of(outputs, torch.ones(4).long())
    table, finite = evidence.table()
    assert (finite, table.members) == ([1, 2], 2)
    losses = evidence.losses()
    assert losses.shape == (3, 4)
    assert losses[0].isnan().all()
    two = math.log(2)
    assert losses[1:].flatten().tolist() == pytest.approx([two, 0.0, two, two, two, two, two, two])
    binary = evidence_of(torch.tensor([[0.0, math.inf], [0.0, 1.0]]), torch.tensor([True, False]))
    assert binary.table()[1] == [1]


def test_other_targets_may_be_ignored() -> None:
    evidence = Evidence(ignore_index=2)
    evidence.update(torch.zeros(2, 6, 3), torch.tensor([0, 1, 2, 2, 0, 1]))
    assert (evidence.samples, len(evidence.table()[0].counts)) == (6, 4)
    assert evidence.accuracies() == [0.5, 0.5]


def test_equal_errors_do_not_disagree_and_none_have_none() -> None:
    right = evidence_of(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 4.0]]), torch.tensor([1.0, 2.0]))
    assert right.disagreements().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    broken = evidence_of(torch.tensor([[1.0, 3.0], [1.0, math.nan]]), torch.tensor([1.0, 2.0]))
    assert broken.disagreements()[0, 1].isnan()
    assert broken.table()[1] == [0]


def test_what_every_member_takes_for_impossible_has_a_loss_that_is_finite() -> None:
    log_p = torch.tensor([[-math.inf, 0.0], [-math.inf, -2000.0]]).double()
    table = Likelihoods(log_p, torch.arange(2))
    assert table.losses(torch.tensor([0.5, 0.5]).double()).tolist() == pytest.approx([10_000 + 700, math.log(2)], abs=1)
