import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from surfaces import network, slow_hessian

from lightning_recipes.core.curvature import CriticalPoint, Estimate, judge, measure, verdict
from lightning_recipes.core.hessian import LossSurface, Spectrum, steps_of


def test_the_squared_gradient_is_unbiased_and_its_error_is_the_jackknife() -> None:
    _, _, surface = network()
    point = measure(surface, None)
    gradients = torch.stack(surface.gradients()[1])
    gram = gradients @ gradients.T
    pairs = [float(gram[i, j]) for i in range(5) for j in range(5) if i != j]
    assert point.slope.value == pytest.approx(sum(pairs) / 20)  # no gradient is multiplied with itself
    without = []
    for left_out in range(5):
        kept = [i for i in range(5) if i != left_out]
        without.append(sum(float(gram[i, j]) for i in kept for j in kept if i != j) / 12)
    centre = sum(without) / 5
    assert point.slope.error == pytest.approx(math.sqrt(4 / 5 * sum((each - centre) ** 2 for each in without)))
    whole = measure(surface, None, share=1.0).slope
    assert (whole.value, whole.error) == (pytest.approx(float(gradients.mean(0).square().sum())), 0)
    half = measure(surface, None, share=0.5).slope
    assert half.value == pytest.approx((point.slope.value + whole.value) / 2)


def test_few_batches_tell_nothing_of_the_noise() -> None:
    _, _, surface = network()
    surface.losses = surface.losses[:2]
    point = measure(surface, None)
    assert point.slope.error == math.inf
    assert verdict(point) == "critical point unclear"


def test_what_noise_loses_is_half_the_trace_of_curvature_and_covariance() -> None:
    model, batches, surface = network()
    steps = steps_of([torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)], list(model.parameters()))
    point = measure(surface, steps, batches_per_update=4)
    covariance = torch.cov(torch.stack(surface.gradients()[1]).T)
    expected = 0.4**2 * float(torch.trace(slow_hessian(model, batches) @ covariance)) / 2 / 4
    assert point.loss_to_noise == pytest.approx(expected)
    assert point.gain.value == pytest.approx(0.4 * point.slope.value)


def test_at_the_noise_floor_of_a_quadratic_gain_and_loss_are_equal() -> None:
    """By simulation: gradient descent with momentum on noise of a known size, its mean over a long run."""
    torch.manual_seed(0)
    curvature, lr, beta = torch.tensor([1.0, 0.1]), 0.02, 0.9
    weight, speed, gains = torch.zeros(4000, 2), torch.zeros(4000, 2), []
    for step in range(2000):
        speed = beta * speed + curvature * weight + torch.randn(4000, 2)
        weight = weight - lr * speed
        if step > 1500:
            gains.append(float((curvature * weight).square().sum(1).mean()) * lr / (1 - beta))
    lost = (lr / (1 - beta)) ** 2 * float(curvature.sum()) / 2
    assert sum(gains) / len(gains) == pytest.approx(lost, rel=0.03)


def test_weight_decay_is_a_part_of_the_loss() -> None:
    model, _, surface = network()
    parameters = list(model.parameters())
    decayed = steps_of([torch.optim.SGD(parameters, 0.2, weight_decay=0.3)], parameters)
    plain = steps_of([torch.optim.SGD(parameters, 0.2)], parameters)
    losses = [
        lambda loss=loss: loss() + 0.15 * sum(each.square().sum() for each in parameters) for loss in surface.losses
    ]
    found, expected = measure(surface, decayed), measure(LossSurface(losses, parameters), plain)
    assert found.loss == pytest.approx(expected.loss)
    for name in ("slope", "gain", "over_limit"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one.value, one.error) == (pytest.approx(other.value), pytest.approx(other.error)), name
    assert found.spectrum.smallest == pytest.approx(expected.spectrum.smallest)
    assert found.loss_to_noise == pytest.approx(expected.loss_to_noise)
    assert found.ahead == pytest.approx(expected.ahead)


def test_steps_ahead_are_parts_of_what_the_optimizer_would_make_of_the_mean_gradient() -> None:
    model, _, surface = network()
    point = measure(surface, steps_of([torch.optim.SGD(model.parameters(), 0.2)], list(model.parameters())))
    assert max(point.ahead) == 1.0
    gradient = torch.stack(surface.gradients()[1]).mean(0)
    for fraction, change in point.ahead.items():
        assert fraction > 0
        assert change == pytest.approx(surface.loss_at(-0.2 * fraction * gradient) - point.loss)


@pytest.mark.parametrize(("centre", "length"), [([3.0, 4.0], 5.0), ([0.0, 0.0], 1.0)])
def test_steps_out_of_a_saddle_have_lengths_in_those_of_the_weights(centre: list[float], length: float) -> None:
    saddle = torch.tensor(centre).double()
    weight = torch.nn.Parameter(saddle.clone())
    signs = torch.tensor([1.0, -1.0]).double()
    point = measure(LossSurface([lambda: 1 + (weight - saddle).square() @ signs], [weight]), None, share=1.0)
    assert len(point.escape) >= 2
    for step, change in point.escape.items():
        assert change == pytest.approx(-((length * step) ** 2))
        assert -step in point.escape
    assert verdict(point) == "saddle"


def test_what_is_within_rounding_was_not_seen() -> None:
    assert replace(POINT, ahead={1.0: 5e-7, 0.3: 1e-7}).best_fraction == 0
    assert replace(POINT, ahead={1.0: 5e-7, 0.3: -9e-7}).best_fraction == 0
    assert replace(POINT, ahead={1.0: 5e-7, 0.3: -2e-6}).best_fraction == 0.3
    for smallest, negative in ((1e-4, False), (-9e-4, False), (-1.1e-3, True)):  # of the largest, 1
        assert replace(POINT, spectrum=replace(FLAT, smallest=smallest)).has_negative_curvature == negative


def test_a_loss_that_is_not_finite_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ArithmeticError, match="the loss or its gradient is not finite"):
        measure(LossSurface([lambda: weight.sum() * math.inf], [weight]), None)


# ---------------------------------------------------------------------------------- verdicts

FLAT = Spectrum(0.1, 0.0, 1.0, 0.0, -0.01, torch.ones(1), 10, 0.0)
BENT = replace(FLAT, smallest=-0.5)
SMALL, LARGE = Estimate(1e-8), Estimate(1.0)
POINT = CriticalPoint(1.0, 8, SMALL, 10.0, FLAT, Estimate(0.5, 0.1), rounding=1e-6)


@pytest.mark.parametrize(
    ("changes", "is_flat", "said"),
    [
        ({}, None, "local minimum"),
        ({}, False, "local minimum"),
        ({"over_limit": Estimate(3.0)}, True, "local minimum"),
        ({"slope": LARGE, "over_limit": Estimate(1.2, 0.1)}, True, "bouncing between the walls"),
        ({"slope": LARGE, "over_limit": Estimate(1.2, 0.1)}, False, "still descending"),
        ({"slope": LARGE, "over_limit": Estimate(1.2, 0.3)}, None, "still descending"),
        ({"slope": LARGE, "ahead": {1.0: 0.1, 0.3: -0.2}}, True, "bouncing between the walls"),
        ({"slope": LARGE, "ahead": {1.0: -0.1, 0.3: -0.2}}, True, "still descending"),
        ({"slope": LARGE, "ahead": {1.0: 0.3, 0.3: 0.2}}, True, "still descending"),
        ({"slope": Estimate(1.0, 1.0), "ahead": {1.0: 0.1, 0.3: -0.2}}, True, "critical point unclear"),
        ({"spectrum": BENT, "escape": {0.1: -0.2, -0.1: -0.1}}, True, "saddle"),
        ({"spectrum": BENT, "escape": {0.1: -0.2, -0.1: 0.1}}, True, "saddle"),
        ({"spectrum": BENT, "escape": {0.1: -0.1, -0.1: 0.2}}, True, "critical point unclear"),
        ({"spectrum": BENT, "escape": {0.1: -1e-8, -0.1: -1e-8}}, True, "critical point unclear"),
        ({"spectrum": BENT, "slope": LARGE, "escape": {0.1: -0.2, -0.1: 0.1}}, True, "still descending"),
        ({"spectrum": BENT, "slope": Estimate(0.1, 9.0), "escape": {0.1: -0.2, -0.1: -0.1}}, True, "noise"),
        ({"slope": LARGE, "gain": Estimate(1.0, 0.1), "loss_to_noise": 0.1}, True, "still descending"),
        ({"slope": LARGE, "gain": Estimate(1.0, 0.1), "loss_to_noise": 1.0}, True, "noise floor"),
        ({"slope": LARGE, "gain": Estimate(1.0, 0.1), "loss_to_noise": 1.0}, False, "still descending"),
        ({"slope": LARGE, "gain": Estimate(4.0, 0.5), "loss_to_noise": 1.0}, True, "critical point unclear"),
        ({"slope": LARGE, "gain": Estimate(1.0, 0.1), "loss_to_noise": -1.0}, True, "still descending"),
    ],
)
def test_verdicts(changes: dict[str, Any], is_flat: bool | None, said: str) -> None:
    if said == "noise":
        changes, said = {**changes, "gain": Estimate(0.1, 0.1), "loss_to_noise": 1.0}, "noise floor"
    point = replace(POINT, **changes)
    assert verdict(point, is_flat) == said
    finding = judge(point, 7, is_flat)
    assert (finding.rule, finding.step) == (said, 7)
    assert finding.message.endswith(".")
    assert finding.advice.endswith(".")
    warns = is_flat and said in ("bouncing between the walls", "saddle")
    assert finding.severity == ("warning" if warns else "info")


def test_a_shallow_way_out_is_no_reason_to_act() -> None:
    finding = judge(replace(POINT, spectrum=BENT, escape={0.1: -1e-3, -0.1: -1e-3}), 0, True)
    assert (finding.rule, finding.severity) == ("saddle", "info")
    assert "shallow" in finding.advice


def test_each_verdict_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    noisy = replace(POINT, slope=Estimate(4.0, 0.5), spectrum=BENT, products=42)
    ahead, gain = {1.0: 0.25, 0.3: -0.125, 0.1: -0.5}, Estimate(0.5, 0.25)
    sharp = Spectrum(-0.5, 0.125, 8.0, 0.25, -0.75, torch.ones(1), 20, 0.0)
    points = (
        replace(noisy, over_limit=Estimate(2.5, 0.5), spectrum=sharp),
        replace(noisy, over_limit=Estimate(2.5, 0.5), ahead={1.0: -0.5, 0.3: -0.25}),
        replace(noisy, over_limit=Estimate(20.0), ahead=ahead),
        replace(noisy, ahead=ahead),
        replace(POINT, spectrum=BENT, escape={0.1: -0.2, -0.1: -0.1, 0.3: 0.1, -0.3: -0.4}),
        replace(POINT, spectrum=BENT, escape={0.1: -0.002, -0.1: -0.001}),
        POINT,
        replace(POINT, spectrum=replace(FLAT, floor=-math.inf), over_limit=Estimate(3.0, 1.0)),
        replace(noisy, gain=gain, loss_to_noise=0.5),
        replace(noisy, gain=gain, loss_to_noise=0.0, over_limit=Estimate(0.05)),
        replace(noisy, gain=Estimate(0.5), loss_to_noise=0.0625, loss=-2.0),
        replace(noisy, over_limit=Estimate(math.nan)),
        replace(noisy, slope=Estimate(-4.0, 5.0)),
    )
    word_for_word(*(judge(point, 7, is_flat=True) for point in points))
