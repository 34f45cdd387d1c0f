import math
from collections.abc import Callable

import pytest

from lightning_recipes.core.capacity import compare


@pytest.mark.parametrize(
    ("model", "baseline", "constant", "verdict"),
    [
        ([0.9, 0.8, 1.0], [0.4, 0.5, 0.5], 2.3, "optimization"),
        ([0.4, 0.5, 0.5], [0.9, 0.8, 1.0], 2.3, "capacity"),
        ([0.4, 0.9, 0.5], [0.5, 0.6, 0.7], 2.3, "alike"),
        ([0.500, 0.501, 0.502], [0.499, 0.500, 0.501], 2.3, "alike"),  # certain, and of no importance
        ([0.011, 0.012, 0.011], [0.001, 0.002, 0.001], 2.3, "alike"),  # both have learnt it
        ([0.011, 0.012, 0.011], [0.001, 0.002, 0.001], math.nan, "optimization"),
        ([math.inf, 0.5, 0.5], [0.5, 0.6, 0.7], 2.3, "optimization"),
        ([0.5, 0.6, 0.7], [math.nan, 0.5, 0.5], 2.3, "capacity"),
        ([2.3, 2.3, 2.3], [2.29, 2.31, 2.3], 2.3, "neither learns"),
        ([1.06, 0.9, 1.2], [1.05, 0.91, 1.1], 0.97, "neither learns"),  # noise of a small sample
        ([2.3, 2.3, 2.3], [0.5, 0.6, 0.4], 2.3, "optimization"),
        ([0.9, 0.8, 1.0], [0.4, 0.5, 0.5], math.nan, "optimization"),
    ],
)
def test_the_verdict(model: list[float], baseline: list[float], constant: float, verdict: str) -> None:
    compared = compare(model, baseline, constant, 100)
    assert compared.verdict == verdict
    assert compared.finding.evidence["verdict"] == verdict
    assert compared.finding.severity == ("warning" if verdict in ("optimization", "neither learns") else "info")


@pytest.mark.parametrize(("losses", "advice"), [([math.inf] * 2, "Lower the learning rate"), ([2.3] * 2, "a bug")])
def test_where_neither_learns_it_says_why(losses: list[float], advice: str) -> None:
    finding = compare(losses, losses, 2.3).finding
    assert finding.evidence["verdict"] == "neither learns"
    assert advice in finding.advice


def test_the_difference_is_paired_by_seed() -> None:
    compared = compare([1.1, 2.1, 3.12], [1.0, 2.0, 3.0])
    assert compared.difference == pytest.approx(0.32 / 3)
    assert compared.difference_error == pytest.approx(0.0115470 / 3**0.5, rel=1e-4)
    assert compared.verdict == "optimization"
    losses = "2.107 against 2 (difference 0.11 ± 0.007, 3 seeds, 0 updates)"
    assert compared.finding.message == f"The smaller network reaches a lower training loss: {losses}."
    known = compare([1.1, 2.1, 3.12], [1.0, 2.0, 3.0], 9.0, 4000)
    assert "3 seeds, 4,000 updates; a constant has 9)." in known.finding.message
    assert known.finding.evidence["model_loss"] == known.model_loss == pytest.approx(6.32 / 3)
    assert (known.baseline_loss, known.finding.step) == (2.0, 4000)
    nothing_left = compare([0.1, 0.1], [0.0, 0.0], 1.0)
    assert nothing_left.verdict == "optimization"


@pytest.mark.parametrize("losses", [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_one_seed_tells_nothing(losses: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="two losses or more"):
        compare(*losses)


def test_each_verdict_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    low, high, constant = [0.4, 0.5, 0.5], [0.9, 0.8, 1.0], [2.3] * 3
    pairs = (
        (high, low),
        (low, high),
        ([0.5, 1.0, 0.5], [0.5, 0.5, 0.75]),
        (constant, constant),
        ([math.inf] * 3, constant),
    )
    word_for_word(*(compare(*pair, 2.3, 100).finding for pair in pairs))
