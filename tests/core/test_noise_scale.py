import json
import math
import re
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_recipes.core.noise_scale import NoiseScale, NoiseScaleRule, components, estimate


def exact(gradients: Tensor) -> tuple[float, float]:
    """The trace of the covariance and the squared mean, from every example's gradient."""
    mean = gradients.mean(0)
    return float((gradients - mean).pow(2).sum(1).mean()), float(mean @ mean)


def pairs_of(gradients: Tensor, small: int, large: int, count: int, seed: int = 0) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    batches = gradients[torch.randint(0, len(gradients), (count, large), generator=generator)]
    norms = zip(*(part.mean(1).pow(2).sum(1).tolist() for part in (batches[:, :small], batches)), strict=True)
    return [components(*each, small, large) for each in norms]


def population(signal: float, dimensions: int = 50, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1, dimensions, dtype=torch.float64)
    return torch.randn(2000, dimensions, generator=generator, dtype=torch.float64) * spread + signal


@pytest.mark.parametrize("batches", [(8, 64), (8, 16), (1, 2)])
def test_the_components_are_unbiased(batches: tuple[int, int]) -> None:
    gradients = population(0.1)
    variance, squared = exact(gradients)
    pairs = pairs_of(gradients, *batches, count=6000)
    for number, truth in enumerate((variance, squared)):
        values = [pair[number] for pair in pairs]
        assert abs(statistics.mean(values) - truth) < 4 * statistics.stdev(values) / math.sqrt(len(values))


def test_the_interval_covers_the_truth_as_often_as_it_says_near_zero_too() -> None:
    for signal in (0.3, 0.05, 0.01):
        gradients = population(signal)
        variance, squared = exact(gradients)
        covered, certain = 0, 0
        for seed in range(200):
            scale = estimate(pairs_of(gradients, 8, 64, 50, seed))
            covered += scale.low <= variance / squared <= scale.high
            certain += scale.is_certain
        assert 180 <= covered <= 199
        assert certain == 200 if signal == 0.3 else certain < 60 if signal == 0.01 else True


def test_the_delta_method_gives_the_spread_of_repeated_estimates() -> None:
    gradients = population(0.15)
    scales = [estimate(pairs_of(gradients, 8, 64, 200, seed)) for seed in range(60)]
    spread = statistics.stdev(scale.value for scale in scales)
    assert statistics.mean(scale.error for scale in scales) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("signal", [0.3, 0.1])
def test_at_the_ends_of_the_interval_the_difference_is_1_96_standard_errors_from_0(signal: float) -> None:
    pairs = pairs_of(population(signal), 8, 64, 50)
    scale = estimate(pairs)

    def of_ratio(ratio: float) -> tuple[float, float]:
        left = [variance - ratio * squared for variance, squared in pairs]
        return statistics.fmean(left), statistics.stdev(left) / math.sqrt(50)

    for end, side in ((scale.low, 1), (scale.high, -1)):
        mean, error = of_ratio(end)
        assert mean == pytest.approx(side * 1.96 * error)
    mean, error = of_ratio(scale.value)
    assert mean == pytest.approx(0, abs=1e-9)
    assert scale.error == pytest.approx(error / scale.squared_gradient)
    squares = [squared for _, squared in pairs]
    assert scale.squared_gradient == pytest.approx(statistics.fmean(squares))
    assert scale.squared_gradient_error == pytest.approx(statistics.stdev(squares) / math.sqrt(50))
    assert scale.variance == pytest.approx(statistics.fmean(variance for variance, _ in pairs))


def test_there_is_a_value_up_to_an_error_of_half_the_squared_gradient() -> None:
    for spread, certain in ((0.99, True), (1.01, False)):  # over 2 / sqrt(4 x 3)
        deviation = spread / 2 * math.sqrt(3)
        pairs = [(16.0, 1 + sign * deviation) for sign in (1, -1, 1, -1)]
        assert estimate(pairs).is_certain == certain


def test_there_is_no_point_estimate_where_the_gradient_is_lost_in_noise() -> None:
    scale = estimate(pairs_of(population(0.0), 8, 64, 400))
    assert not scale.is_certain
    assert math.isnan(scale.error)
    assert scale.high == math.inf
    assert scale.text.startswith(">= ")
    assert scale.low > 100


def test_edges() -> None:
    for pairs in ([], [(16.0, 1.0)]):
        scale = estimate(pairs)
        assert (scale.updates, scale.low, scale.high, scale.text) == (len(pairs), 0.0, math.inf, "unknown")
    same = estimate([(16.0, 1.0)] * 5)
    assert (same.value, same.low, same.high, same.error) == (16.0, 16.0, 16.0, 0.0)
    no_noise = estimate([(-1.0, 1.0), (1.5, 1.0), (-0.7, 1.0)])  # S cannot be told from zero
    assert not no_noise.is_certain
    assert no_noise.low == 0.0


def rule_of(pairs: list[tuple[float, float]], batch: int) -> NoiseScaleRule:
    rule = NoiseScaleRule()
    rule.pairs.extend(pairs)
    rule.batch = float(batch)
    return rule


@pytest.mark.parametrize(("batch", "verdict"), [(1, "small"), (4, "small"), (10, "balanced"), (64, "large")])
def test_the_batch_is_compared_with_the_noise_scale(batch: int, verdict: str) -> None:
    pairs = pairs_of(population(0.15, dimensions=200), 8, 64, 400)
    finding = rule_of(pairs, batch).finding(7)
    assert finding is not None
    assert finding.severity == "info"
    assert (finding.evidence["verdict"], finding.step) == (verdict, 7)
    assert "nan" not in finding.text


def test_twice_the_batch_or_half_of_it_is_of_its_order() -> None:
    for batch, verdict in ((7.9, "small"), (8, "balanced"), (32, "balanced"), (32.1, "large")):
        rule = rule_of([(16.0, 1.0)] * 100, 1)
        rule.batch = batch
        finding = rule.finding(0)
        assert finding is not None
        assert finding.evidence["verdict"] == verdict
        assert (f"{verdict} against it" in finding.message) == (verdict != "balanced")
        assert "a bound" not in finding.message
    short = NoiseScaleRule(window=10)
    short.pairs.extend([(16.0, 1.0)] * 9)
    assert short.finding(0) is None
    short.update(3.0, 1.5, 8, 32)
    assert (short.batch, short.measured) == (32.0, 1)
    assert short.finding(0) is not None  # the window is full
    short.pairs.extend([(-1.0, 1.0), (2.0, 1.0)] * 5)
    assert short.finding(0) is None  # not even a bound


def test_a_bound_says_that_it_is_one_and_no_more_than_it_can() -> None:
    pairs = pairs_of(population(0.0), 8, 64, 400)
    for batch, verdict in ((8, "small"), (10**6, "unknown")):
        finding = rule_of(pairs, batch).finding(0)
        assert finding is not None
        assert finding.evidence["verdict"] == verdict
        assert ">= " in finding.message
        assert "a bound" in finding.message
    assert rule_of(pairs[:99], 8).finding(0) is None


def test_what_is_not_finite_stays_out_and_the_window_slides() -> None:
    rule = NoiseScaleRule(window=3)
    for small in (math.nan, math.inf, 1.0, 2.0, 3.0, 4.0):
        rule.update(small, 0.5, 8, 32)
    rule.update(1.0, math.inf, 8, 32)
    assert list(rule.pairs) == [components(small, 0.5, 8, 32) for small in (2.0, 3.0, 4.0)]
    assert rule.measured == 4
    restored = NoiseScaleRule(window=2)
    restored.load_state_dict(rule.state_dict())
    assert (restored.window, len(restored.pairs), restored.measured) == (2, 2, 4)


@pytest.mark.parametrize(("window", "error"), [(1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_windows_are_refused(window: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'window must be a whole number of at least 2, got {window!r}')}$"):
        NoiseScaleRule(window)  # type: ignore[arg-type]


def test_what_is_said_of_the_batch_size_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    certain = [(16.0, 1.25), (20.0, 1.0), (12.0, 0.75)] * 40
    lost = [(16.0, 1.0), (20.0, -0.875)] * 60
    cases = ((certain, 4), (certain, 16), (certain, 1024), (lost, 4), (lost, 1024))
    word_for_word(*(rule_of(pairs, batch).finding(70) for pairs, batch in cases))


def test_a_resumed_rule_goes_on_as_if_nothing_had_been() -> None:
    whole, first, second = (NoiseScaleRule(8) for _ in range(3))
    for rule, steps in ((whole, range(20)), (first, range(11))):
        for step in steps:
            rule.update(3.0 + 0.1 * step, 1.5, 8, 32 + step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(11, 20):
        second.update(3.0 + 0.1 * step, 1.5, 8, 32 + step)
    assert second.state_dict() == whole.state_dict()
    assert second.finding(5) == whole.finding(5)
    assert (second.batch, second.measured, len(second.pairs)) == (51.0, 20, 8)
    assert NoiseScaleRule().window == 400


@pytest.mark.parametrize(
    ("error", "text"), [(30.4, "1.02e+03 ± 30"), (0.0123, "1.02e+03 ± 0.01"), (0.0, "1.02e+03 ± 0")]
)
def test_an_error_has_one_digit_and_no_exponent(error: float, text: str) -> None:
    assert NoiseScale(1024.0, 900.0, 1200.0, error, 1.0, 0.1, 1024.0, 9).text == text
