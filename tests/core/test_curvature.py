import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from surfaces import network, slow_hessian
from torch import Tensor

from lightning_recipes.core.curvature import CriticalPoint, Estimate, judge, measure, sharpness, verdict
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slope": Estimate(0.25)}, "local minimum"),  # |gradient| |weights| / loss is 0.05
        ({"slope": Estimate(0.26)}, "still descending"),
        ({"slope": Estimate(0.0, 0.13)}, "local minimum"),  # with 1.895 standard errors, of 8 batches
        ({"slope": Estimate(0.0, 0.14)}, "critical point unclear"),
        ({"slope": Estimate(0.5, 0.25)}, "still descending"),
        ({"slope": Estimate(0.5, 0.27)}, "critical point unclear"),
        ({"slope": Estimate(1.0), "over_limit": Estimate(1.25, 0.25)}, "still descending"),
        ({"slope": Estimate(1.0), "over_limit": Estimate(1.25, 0.24)}, "bouncing between the walls"),
        ({"slope": Estimate(1.0), "ahead": {1.0: -0.05, 0.3: -0.5}}, "still descending"),
        ({"slope": Estimate(1.0), "ahead": {1.0: -0.04, 0.3: -0.5}}, "bouncing between the walls"),
        ({"slope": Estimate(1.0), "gain": Estimate(4.0), "loss_to_noise": 1.0}, "noise floor"),
        ({"slope": Estimate(1.0), "gain": Estimate(4.1), "loss_to_noise": 1.0}, "still descending"),
        ({"slope": Estimate(1.0), "gain": Estimate(3.0, 0.5), "loss_to_noise": 1.0}, "noise floor"),
        ({"slope": Estimate(1.0), "gain": Estimate(3.0, 0.55), "loss_to_noise": 1.0}, "critical point unclear"),
        ({"slope": Estimate(1.0), "gain": Estimate(0.0), "loss_to_noise": -1.0}, "noise floor"),
    ],
)
def test_the_bounds_of_the_verdicts(changes: dict[str, Any], said: str) -> None:
    point = replace(POINT, **{"loss": 100.0, **changes})
    assert verdict(point) == said
    assert verdict(replace(point, loss=-100.0)) == said


def test_a_single_batch_has_errors_as_they_are() -> None:
    assert replace(POINT, batches=1).quantile == 1.0
    assert replace(POINT, batches=2).quantile == pytest.approx(6.314, abs=1e-3)  # Student's t with one degree


def test_a_way_out_is_worth_an_action_from_one_per_cent_on() -> None:
    for lowers, severity in ((0.0099, "info"), (0.01, "warning")):
        point = replace(POINT, spectrum=BENT, escape={0.1: -lowers, -0.1: -lowers})
        assert judge(point, 0, is_flat=True).severity == severity
        assert judge(point, 0, is_flat=False).severity == judge(point, 0).severity == "info"


def test_the_spectrum_alone_and_what_the_optimizer_can_follow() -> None:
    model, batches, surface = network()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.2}, {"params": others, "lr": 0.05}]
    exact = slow_hessian(model, batches)
    largest = float(torch.linalg.eigvalsh(exact)[-1])
    root = torch.cat([torch.full((first.numel(),), 0.1), torch.full((len(exact) - first.numel(),), 0.025)]).sqrt()
    scaled = float(torch.linalg.eigvalsh(root[:, None] * exact * root)[-1])
    for optimizer, limit in (
        (torch.optim.SGD(model.parameters(), 0.2), 0.1 * largest),
        (torch.optim.SGD(groups), scaled),
    ):
        steps = steps_of([optimizer], list(model.parameters()))
        spectrum, over = sharpness(surface, steps)
        assert spectrum.largest == pytest.approx(largest, rel=0.01)
        assert over.value == pytest.approx(limit, rel=0.01)
        assert over.error <= 0.003 * over.value
        point = measure(surface, steps)
        assert point.over_limit.value == pytest.approx(limit, rel=0.01)
        few, _ = sharpness(surface, steps, max_products=2)
        assert few.products == measure(surface, steps, max_products=2).spectrum.products == 2
        seeds = [measure(surface, steps, seed, 2) for seed in (0, 1)]
        assert seeds[0].over_limit == measure(surface, steps, max_products=2).over_limit != seeds[1].over_limit
        assert sharpness(surface, steps, 1, 2)[1] == seeds[1].over_limit
    assert math.isnan(sharpness(surface, None)[1].value)


def test_what_is_measured_has_the_size_of_the_sample_and_of_the_weights() -> None:
    model, _, surface = network()
    steps = steps_of([torch.optim.SGD(model.parameters(), 0.2)], list(model.parameters()))
    before = surface.products
    point = measure(surface, steps)
    assert point.products == surface.products > before + 5
    assert point.batches == 5
    assert point.loss == pytest.approx(float(surface.gradients()[0].mean()))
    assert point.weight_norm == pytest.approx(float(surface.weights.norm()))
    assert point.rounding == pytest.approx(8 * 2.0**-52 * point.loss)
    assert [*point.ahead] == [1.0, 0.3, 0.1, 0.03]
    assert not point.escape  # it is not critical
    several = measure(surface, steps, batches_per_update=2)
    assert several.loss_to_noise == pytest.approx(point.loss_to_noise / 2)
    ranks = measure(surface, steps, ranks=2)  # of which the other one has the same batches
    assert ranks.batches == 10


class Crooked(torch.autograd.Function):
    """The square, with a second derivative that is that of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (2 * x + x.roll(1) - x.roll(1).detach())


def test_a_wrong_second_derivative_is_refused_and_named() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8).double())
    surface = LossSurface([lambda: Crooked.apply(weight).sum()], [weight])
    with pytest.raises(
        ArithmeticError,
        match=r"^the Hessian is not symmetric, by \d+%: an operation of the model has a wrong second derivative"
        r" \(Crooked\?\), or the loss is not the same each time$",
    ):
        measure(surface, None)

    def crooked_by_a_hook() -> Tensor:
        values = weight * 1
        values.register_hook(lambda gradient: gradient + weight.roll(1) - weight.roll(1).detach())
        return values.square().sum()

    with pytest.raises(ArithmeticError, match="wrong second derivative, or the loss is not the same each time$"):
        measure(LossSurface([crooked_by_a_hook], [weight]), None)


def test_of_a_slope_that_is_not_beyond_its_noise_nothing_is_told() -> None:
    for error, said in ((0.0, "still descending"), (1.0 / POINT.quantile, "critical point unclear")):
        assert verdict(replace(POINT, slope=Estimate(1.0, error))) == said
