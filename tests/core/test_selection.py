import math
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import scipy.optimize
import scipy.stats
import torch
from members import evidence_of, world
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_recipes.core.ensembles import combined
from lightning_recipes.core.selection import (
    Report,
    Selection,
    compared,
    disagreement,
    folds_of,
    gain_of,
    paired,
    quantile,
    report,
    select,
)


def nll(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    kept = weights > 0
    probabilities = (weights[kept].view(-1, 1, 1) * outputs[kept].double().softmax(-1)).sum(0)
    return -probabilities[torch.arange(len(targets)), targets].log()


def chosen(kind: str, samples: int, seed: int) -> tuple[Selection, Tensor]:
    """The selection on one draw, and its gain over the best member of that draw on fresh samples."""
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = world(kind, samples, generator)
    selection = select(evidence_of(outputs, targets, batch=samples), seed=seed)
    alone = torch.eye(5, dtype=torch.float64)
    best = min(range(5), key=lambda member: nll(outputs, targets, alone[member]).mean().item())
    fresh = world(kind, 1000, generator)
    weights = torch.tensor(selection.weights, dtype=torch.float64)
    return selection, nll(*fresh, alone[best]) - nll(*fresh, weights)


def certain(gains: Tensor, deviations: float) -> bool:
    """Whether the mean is below zero by so many standard errors."""
    return gains.mean().item() < -deviations * gains.std().item() / len(gains) ** 0.5


# ------------------------------------------------------------------------------ whether the choice is right


@pytest.mark.parametrize("kind", ["one is the truth", "early ones are weak"])
@pytest.mark.parametrize("samples", [20, 200])
def test_what_is_chosen_is_not_worse_than_the_best_member(kind: str, samples: int) -> None:
    draws = [chosen(kind, samples, seed) for seed in range(20)]
    claims = [certain(gains, 1.645) for selection, gains in draws if selection.verdict == "gain"]
    assert sum(claims) <= 3  # of 20: 5 % and two standard deviations
    assert not any(certain(gains, 4) for _, gains in draws)
    for selection, _ in draws:
        assert (selection.verdict == "gain") == (selection.how != "best") == (max(selection.weights) < 1)


def test_the_uniform_ensemble_would_have_been_worse_there() -> None:
    outputs, targets = world("early ones are weak", 1000, torch.Generator().manual_seed(0))
    selection = select(evidence_of(outputs, targets), "uniform")
    assert selection.gain < -5 * selection.gain_error
    assert selection.weights == pytest.approx([0.2] * 5)
    assert selection.verdict == "noise"


def test_a_gain_that_is_there_is_found() -> None:
    draws = [chosen("equally good", 200, seed) for seed in range(10)]
    assert sum(selection.verdict == "gain" for selection, _ in draws) >= 9
    assert all(gains.mean() > 0 for selection, gains in draws if selection.verdict == "gain")


@pytest.mark.parametrize("samples", [1, 2, 20, 200])
def test_identical_members_are_alike_and_gain_nothing(samples: int) -> None:
    selection, gains = chosen("identical", samples, 0)
    assert selection.verdict == "alike"
    assert max(selection.weights) == 1.0
    assert selection.gain == pytest.approx(0, abs=1e-9)
    assert gains.abs().max() == 0


def test_one_sample_or_one_member_claims_nothing() -> None:
    selection, _ = chosen("equally good", 1, 0)
    assert selection.how == "best"
    assert selection.gain_error == math.inf
    outputs, targets = world("equally good", 50, torch.Generator().manual_seed(0))
    for how in ("auto", "uniform", "greedy", "simplex", "best"):
        selection = select(evidence_of(outputs[:1], targets), how)
        assert selection.weights == (1.0,)
        assert selection.gain == selection.gain_over_last == 0.0
    assert "There is one member" in report(evidence_of(outputs[:1], targets), selection).finding.message


# ------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("seed", range(3))
def test_simplex_weights_are_the_optimum_of_a_general_solver(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = world("early ones are weak", 300, generator)
    p = outputs.double().softmax(-1)[:, torch.arange(300), targets].numpy()
    residuals = torch.randn(5, 300, generator=generator).double().numpy() * numpy.arange(1, 6)[:, None]

    def solved(loss: object) -> float:
        rule = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
        start = numpy.full(5, 0.2)
        return scipy.optimize.minimize(loss, start, bounds=[(0, 1)] * 5, constraints=rule, tol=1e-12).fun

    def likelihood(weights: numpy.ndarray) -> float:
        return -numpy.log(weights @ p + 1e-300).mean()

    def squares(weights: numpy.ndarray) -> float:
        return ((weights @ residuals) ** 2).mean()

    weights = numpy.array(select(evidence_of(outputs, targets), "simplex").weights)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert likelihood(weights) == pytest.approx(solved(likelihood), abs=1.1e-5)
    evidence = evidence_of(torch.from_numpy(residuals), torch.zeros(300).double())
    weights = numpy.array(select(evidence, "simplex").weights)
    assert weights.sum() == pytest.approx(1)
    assert squares(weights) == pytest.approx(solved(squares), rel=2e-5)


def test_greedy_weights_are_those_of_the_definition() -> None:
    outputs, targets = world("equally good", 100, torch.Generator().manual_seed(3))
    p = outputs.double().softmax(-1)[:, torch.arange(100), targets]
    taken: list[int] = []
    paths = []
    for _ in range(25):
        losses = [-p[[*taken, member]].mean(0).log().mean().item() for member in range(5)]
        taken.append(losses.index(min(losses)))
        paths.append((min(losses), len(taken)))
    best = taken[: min(paths)[1]]
    expected = [best.count(member) / len(best) for member in range(5)]
    assert select(evidence_of(outputs, targets), "greedy").weights == pytest.approx(expected)


def test_noise_is_judged_over_rows_not_over_positions() -> None:
    outputs, targets = world("equally good", 30, torch.Generator().manual_seed(0))
    one = select(evidence_of(outputs, targets), "uniform")
    repeated = select(
        evidence_of(outputs.unsqueeze(2).expand(-1, -1, 50, -1), targets.unsqueeze(1).expand(-1, 50)), "uniform"
    )
    assert repeated.gain == pytest.approx(one.gain)
    assert repeated.gain_error == pytest.approx(one.gain_error)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_members_without_numbers_have_weight_0_and_are_named(task: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if task == "classification":
        outputs, targets = world("equally good", 100, generator)
    else:
        targets = torch.randn(100, generator=generator)
        outputs = targets + torch.randn(5, 100, generator=generator)
    outputs[1, 3] = math.nan
    outputs[4, 50].view(-1)[0] = math.inf
    evidence = evidence_of(outputs, targets)
    for how in ("auto", "uniform"):
        selection = select(evidence, how)
        made = report(evidence, selection, names=["a", "b", "c", "d", "e"])
        assert selection.weights[1] == selection.weights[4] == 0
        assert sum(selection.weights) == pytest.approx(1)
        assert math.isnan(selection.gain_over_last)
        assert made.finding.message.endswith("No numbers come from b, e, weight 0.")
        assert made.finding.severity == "warning"
        assert [math.isnan(member.loss) for member in made.members] == [False, True, False, False, True]
    with pytest.raises(ValueError, match="every member predicts NaN"):
        select(evidence_of(outputs[[1, 4]], targets))


def test_a_target_that_is_impossible_to_some_members_or_all_is_no_end() -> None:
    outputs, targets = world("equally good", 100, torch.Generator().manual_seed(0))
    outputs[0, 0, targets[0]] = -math.inf
    evidence = evidence_of(outputs, targets)
    assert all(math.isfinite(select(evidence, how).loss) for how in ("auto", "greedy", "simplex", "best"))
    assert select(evidence, "best").weights[0] == 0
    outputs[:, 0, targets[0]] = -math.inf
    assert math.isfinite(select(evidence_of(outputs, targets)).loss)


def test_every_sample_is_judged_by_weights_that_were_fitted_without_it() -> None:
    outputs, targets = world("equally good", 40, torch.Generator().manual_seed(0))
    selection = select(evidence_of(outputs, targets), "simplex", seed=3)
    whole, _ = evidence_of(outputs, targets).table()
    folds, losses = folds_of(40, 3), torch.zeros(40, dtype=torch.float64)
    for fold in range(5):
        others, own = folds != fold, folds == fold
        table, _ = evidence_of(outputs[:, others], targets[others]).table()
        losses[own] = whole.losses(table.simplex())[own]
    assert selection.loss == pytest.approx(float(losses.mean()))
    assert selection.loss != pytest.approx(whole.loss(whole.simplex()), rel=1e-3)


def test_a_mean_over_positions_has_the_error_of_a_ratio_over_samples() -> None:
    differences, counts = torch.tensor([2.0, -1.0, 6.0, 1.0]), torch.tensor([1.0, 1.0, 4.0, 2.0])
    left = [2.0 - 1, -1.0 - 1, 6.0 - 4, 1.0 - 2]  # of 8 over 8
    error = math.sqrt(4 / 3 * sum(value**2 for value in left)) / 8
    assert paired(differences, counts) == (1.0, pytest.approx(error))
    assert paired(differences[:1], counts[:1]) == (2.0, math.inf)


@pytest.mark.parametrize("confidence", [0.95, 0.975, 0.994])
def test_the_quantile_is_students(confidence: float) -> None:
    for samples, close in ((2, 1e-9), (3, 1e-9), (4, 0.01), (5, 3e-3), (10, 1e-4), (30, 1e-6)):
        exact = scipy.stats.t.ppf(confidence, samples - 1)
        assert quantile(samples, confidence) == pytest.approx(exact, rel=close)


def test_folds_are_of_equal_size_and_at_random() -> None:
    folds = folds_of(103, 0)
    assert folds.bincount().tolist() == [21, 21, 21, 20, 20]
    assert not torch.equal(folds, folds_of(103, 1))
    assert folds.tolist() != sorted(folds.tolist())


def test_disagreement_is_the_mean_over_pairs() -> None:
    targets = torch.zeros(4, dtype=torch.long)
    outputs = torch.nn.functional.one_hot(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]), 2).float()
    evidence = evidence_of(outputs, targets)
    assert disagreement(evidence, [0, 1, 2]) == pytest.approx((0.25 + 0.5 + 0.25) / 3)
    assert disagreement(evidence, [0, 2]) == pytest.approx(0.5)
    assert disagreement(evidence, [1]) == 0.0
    members = report(evidence, select(evidence, "uniform")).members
    assert [member.disagreement for member in members] == pytest.approx([0.375, 0.25, 0.375])


def test_a_gain_has_to_be_beyond_its_noise() -> None:
    noise, ones = torch.tensor([1.0, -1.0] * 50), torch.ones(100)
    for mean, beyond in ((0.15, False), (0.18, True)):  # 1.66 standard errors of 0.1005
        assert gain_of(noise + mean, ones, ones)[2] is beyond
    gain, error, beyond = gain_of(noise + 0.18, noise + 0.09, ones)  # the best on all samples is nearly as good
    assert (gain, error, beyond) == (pytest.approx(0.09), pytest.approx(0.1, rel=0.01), False)


@pytest.mark.parametrize(("excess", "tried"), [(0.0, "simple"), (0.09, "simple"), (0.11, "complex")])
def test_of_rules_within_a_standard_error_of_the_lowest_the_simplest_is_tried(excess: float, tried: str) -> None:
    noise, ones = torch.tensor([1.0, -1.0] * 50), torch.ones(100)  # a standard error of 0.1005
    losses = {"best": 5 * ones, "worst": 4 * ones, "simple": 3 + noise + excess, "complex": 3 * ones}
    assert compared(losses, 4.5 * ones, ones)[:2] == (tried, pytest.approx(2.0 - excess * (tried == "simple")))
    assert compared({"best": ones}, ones, ones) == ("best", 0.0, 0.0, False)


def test_the_report_of_a_gain() -> None:
    outputs, targets = world("equally good", 400, torch.Generator().manual_seed(0))
    evidence = evidence_of(outputs, targets)
    selection = select(evidence)
    weights = torch.tensor(selection.weights)
    averaged = combined(outputs[weights > 0], weights[weights > 0], "logits")
    made = report(evidence, selection, evidence_of(averaged[None], targets), ["1", "2", "3", "4", "5"], step=70)
    assert made.accuracy == pytest.approx((averaged.argmax(-1) == targets).double().mean().item())
    expected = multiclass_calibration_error(averaged, targets, num_classes=5, n_bins=15).item()
    assert made.calibration_error == pytest.approx(expected, abs=1e-5)
    assert made.members[0].loss == pytest.approx(nn.functional.cross_entropy(outputs[0], targets).item(), rel=1e-5)
    assert made.finding.step == 70
    assert f"is better than the best member by {selection.gain:.3g} ± {selection.gain_error:.2g}" in made.finding.text
    assert selection.gain_over_last > 2 * selection.gain_over_last_error
    lines = made.to_markdown().splitlines()
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert lines[7].startswith("| **ensemble** | 1 |")
    assert made._repr_html_().count("<tr>") == 7
    without = report(evidence, selection)
    assert math.isnan(without.accuracy)


def test_the_report_of_no_gain_and_of_members_that_are_alike() -> None:
    outputs, targets = world("early ones are weak", 400, torch.Generator().manual_seed(0))
    evidence = evidence_of(outputs, targets)
    made = report(evidence, select(evidence))
    assert "is not better than the best member beyond noise" in made.finding.message
    assert made.finding.message.endswith("member 4 is used alone.")
    assert made.accuracy == evidence.accuracies()[4]
    asked = report(evidence, select(evidence, "uniform"))
    assert asked.finding.message.endswith("5 members are used, as asked.")
    same = evidence_of(outputs[[4] * 3] + 0.001 * torch.randn(3, 400, 5), targets)
    made = report(same, select(same))
    assert made.selection.verdict == "alike"
    assert made.disagreement < 0.01
    assert "The members hardly differ" in made.finding.message
    assert "Raise the learning rate of restarts or shorten the cycles" in made.finding.advice


def test_what_is_said_of_an_ensemble_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    def made(levels: list[float], loss: float = 0.5, **more: Any) -> Report:
        """Members whose outputs are off by so much, of targets of 1."""
        outputs = 1 + torch.tensor(levels)[:, None, None] * torch.tensor([1.0, -1.0]).repeat(5)[:, None]
        chosen = Selection(**{**SELECTION, "weights": (1.0, *[0.0] * (len(levels) - 1)), "loss": loss, **more})
        evidence = evidence_of(outputs, torch.ones(10, 1))
        return report(evidence, chosen, names=["early", "middle", "late"][: len(levels)], step=70)

    both = {"weights": (0.75, 0.25, 0.0), "how": "greedy", "tried": "greedy"}
    broken = [0.5, math.nan, 1.0]
    reports = [
        made([0.5, -0.5, 1.0], **both, verdict="gain"),
        made(broken, **both, verdict="gain"),
        made([0.5, -0.5, 1.0], verdict="noise"),
        made([0.5, -0.5, 1.0], verdict="noise", weights=(0.5, 0.25, 0.25), gain_error=0.0),
        made([0.5, 0.5, 0.5], verdict="alike"),
        made([0.5, math.inf, math.nan], verdict="noise"),
        made([0.5]),
    ]
    tables = [[each.to_markdown(), each._repr_html_()] for each in reports[:2]]
    word_for_word(*(each.finding for each in reports), *tables)


SELECTION: dict[str, Any] = {
    "how": "best", "tried": "last 2", "gain": 0.125, "gain_error": 0.0625, "gain_over_last": 0.25,
    "gain_over_last_error": 0.03125, "verdict": "noise",
}  # fmt: skip


def test_the_accuracy_is_of_members_that_predict_numbers() -> None:
    outputs = torch.tensor([[[2.0, 0.0]] * 4, [[math.nan, 0.0]] * 4, [[0.0, 2.0]] * 4])
    evidence = evidence_of(outputs, torch.tensor([0, 0, 0, 1]))
    made = report(evidence, select(evidence, "best"))
    assert [member.accuracy for member in made.members] == pytest.approx([0.75, math.nan, 0.25], nan_ok=True)
    sure = 1 / (1 + math.exp(-2))  # of each prediction
    errors = [sure - 0.75, math.nan, sure - 0.25]
    assert [member.calibration_error for member in made.members] == pytest.approx(errors, nan_ok=True, abs=1e-6)
    assert (made.accuracy, made.samples) == (0.75, 4)
    assert made.calibration_error == made.members[0].calibration_error
    assert [member.name for member in made.members] == ["0", "1", "2"]
    assert made.members[0].disagreement == made.members[2].disagreement == 1.0  # with each other


def test_the_losses_of_all_rules_that_were_tried_are_told() -> None:
    outputs, targets = world("equally good", 60, torch.Generator().manual_seed(0))
    evidence = evidence_of(outputs, targets)
    made = select(evidence)
    assert [*made.candidates] == ["best", "last 2", "last 3", "last 4", "uniform", "greedy", "simplex"]
    for how in ("best", "uniform", "greedy", "simplex"):
        asked = select(evidence, how)
        assert [*asked.candidates] == (["best"] if how == "best" else ["best", how])
        assert asked.loss == asked.candidates[how] == made.candidates[how]
        assert (asked.how, asked.tried) == (how, how)
    last = nll(outputs, targets, torch.eye(5)[4])
    uniform = nll(outputs, targets, torch.full((5,), 0.2))
    gain = select(evidence, "uniform")
    assert gain.gain_over_last == pytest.approx((last - uniform).mean().item(), rel=1e-4)
    assert gain.gain_over_last_error == pytest.approx((last - uniform).std().item() / math.sqrt(60), rel=1e-4)


def test_a_rule_that_is_unknown_is_refused() -> None:
    outputs, targets = world("equally good", 10, torch.Generator().manual_seed(0))
    said = "how must be 'auto' or 'uniform' or 'greedy' or 'simplex' or 'best', got 'all'"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        select(evidence_of(outputs, targets), "all")
