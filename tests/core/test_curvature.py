import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_recipes.core.curvature import (
    CriticalPoint,
    Estimate,
    LossSurface,
    Spectrum,
    StallRule,
    extreme_eigenvalues,
    judge,
    measure,
    sharpness,
    steps_of,
    verdict,
)


def random_symmetric(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


def start(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------- Lanczos


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ends_of_a_spectrum_and_their_bounds(seed: int, dtype: torch.dtype) -> None:
    matrix = random_symmetric(60, seed, dtype)
    exact = torch.linalg.eigvalsh(matrix.double())
    for products in (3, 8, 20, 60):
        found = extreme_eigenvalues(lambda vector: matrix @ vector, start(60, seed, dtype), products, 0.0)
        slack = 1e-5 * found.scale
        assert exact[0] - slack <= found.smallest <= found.largest <= exact[-1] + slack
        assert (exact - found.smallest).abs().min() <= found.smallest_error + slack
        assert (exact - found.largest).abs().min() <= found.largest_error + slack
        assert found.floor <= exact[0] + slack
        curvature = found.direction @ matrix @ found.direction
        assert float(curvature) == pytest.approx(found.smallest, abs=slack)
        assert float(found.direction.norm()) == pytest.approx(1, abs=1e-4)
        assert found.asymmetry < 1e-5
        assert found.products == products
    assert found.smallest == pytest.approx(float(exact[0]), rel=1e-4)
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-4)
    assert found.floor == found.smallest


def test_it_stops_when_the_ends_that_are_wanted_are_found() -> None:
    matrix = torch.diag(torch.cat([torch.linspace(0, 1, 98), torch.tensor([-30.0, 100.0])]).double())
    both = extreme_eigenvalues(lambda vector: matrix @ vector, start(100))
    largest = extreme_eigenvalues(lambda vector: matrix @ vector, start(100), ends="largest")
    assert largest.products <= both.products <= 6
    assert both.smallest == pytest.approx(-30, rel=1e-3)
    assert largest.largest == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("factor", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_invariant_subspace_is_exact(factor: float, dtype: torch.dtype) -> None:
    found = extreme_eigenvalues(lambda vector: factor * vector, start(50, dtype=dtype), tolerance=0.0)
    assert (found.products, found.smallest_error, found.largest_error) == (1, 0.0, 0.0)
    assert found.smallest == found.largest == found.floor == pytest.approx(factor)
    single = extreme_eigenvalues(lambda vector: factor * vector, torch.ones(1, dtype=dtype))
    assert single.largest == factor


def test_a_matrix_of_rank_one_takes_two_products() -> None:
    vector = start(40, 1)
    found = extreme_eigenvalues(lambda other: (vector @ other) * vector, start(40), tolerance=0.0)
    assert found.products == 2
    assert found.largest == pytest.approx(float(vector @ vector))
    assert found.smallest == pytest.approx(0, abs=1e-10)


def test_the_floor_holds_as_often_as_it_says() -> None:
    matrix = torch.diag(torch.cat([torch.tensor([-1.0]), torch.linspace(0, 1, 299)]).double())
    held = sum(extreme_eigenvalues(lambda v: matrix @ v, start(300, seed), 8, 0.0).floor <= -1 for seed in range(40))
    assert held >= 38
    assert extreme_eigenvalues(lambda v: matrix @ v, start(300), 3, 0.0).floor == -math.inf


def test_what_is_not_finite_or_not_symmetric_is_noticed() -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        extreme_eigenvalues(lambda vector: vector * math.nan, start(5))
    matrix = random_symmetric(30, 0) + torch.randn(30, 30, generator=torch.Generator().manual_seed(1)).triu(1)
    assert extreme_eigenvalues(lambda vector: matrix @ vector, start(30)).asymmetry > 0.1


# ---------------------------------------------------------------------------------- the loss


def network(seed: int = 0) -> tuple[nn.Module, list[Any], LossSurface]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(6, 3).double(), torch.randint(2, (6,))) for _ in range(5)]
    losses = [lambda batch=batch: functional.cross_entropy(model(batch[0]), batch[1]) for batch in batches]
    return model, batches, LossSurface(losses, model.parameters())


def dense(surface: LossSurface) -> Tensor:
    return torch.stack([surface.product(unit) for unit in torch.eye(surface.weights.numel(), dtype=torch.float64)])


def slow_hessian(model: nn.Module, batches: list[Any]) -> Tensor:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}
        each = [functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y) for x, y in batches]
        return torch.stack(each).mean()

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call,no-any-return]


def test_products_are_those_of_the_hessian() -> None:
    model, batches, surface = network()
    exact = slow_hessian(model, batches)
    assert torch.allclose(dense(surface), exact)
    assert surface.products == len(exact)
    surface.penalty = torch.full((len(exact),), 0.5, dtype=torch.float64)
    assert torch.allclose(dense(surface), exact + 0.5 * torch.eye(len(exact)))
    found, _ = sharpness(surface, None)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]) + 0.5, rel=0.01)


def test_a_loss_that_is_linear_or_has_no_part_in_a_parameter() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    assert torch.equal(LossSurface([lambda: used.sum()], [used, unused]).product(torch.ones(5)), torch.zeros(5))
    surface = LossSurface([lambda: used.square().sum()], [used, unused])
    assert surface.product(torch.ones(5)).tolist() == [2, 2, 0, 0, 0]
    assert surface.gradients()[1][0].tolist() == [2, 2, 0, 0, 0]


def test_a_loss_further_on_leaves_the_weights_bit_for_bit() -> None:
    model, _, surface = network()
    before = surface.weights
    step = torch.randn_like(before)
    there = surface.loss_at(step)
    assert torch.equal(surface.weights, before)
    with torch.no_grad():
        nn.utils.vector_to_parameters(before + step, model.parameters())
    assert surface.loss_at(torch.zeros_like(step)) == pytest.approx(there)


# ---------------------------------------------------------------------------------- what the optimizer can follow

OPTIMIZERS: list[Any] = [
    lambda p, lr: torch.optim.SGD(p, lr),
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.6, dampening=0.6),
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.3),
    lambda p, lr: torch.optim.Adam(p, lr, betas=(0.9, 1.0 - 1e-12)),
    lambda p, lr: torch.optim.Adam(p, lr, betas=(0.9, 1.0 - 1e-12), weight_decay=0.3),
    lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.8, 1.0 - 1e-12), weight_decay=3e-5),
    lambda p, lr: torch.optim.RMSprop(p, lr, alpha=1.0 - 1e-12, momentum=0.5),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("beyond", [False, True])
def test_a_quadratic_is_left_beyond_the_limit_and_nowhere_else(make: Any, beyond: bool) -> None:
    """With the second moments held where they are, as the theory has them."""
    curvature = torch.tensor([3.0, 0.5], dtype=torch.float64)
    weight = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def loss() -> Tensor:
        return (curvature * weight.square()).sum() / 2

    def over_limit(lr: float) -> tuple[torch.optim.Optimizer, float]:
        optimizer = make([weight], lr)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()  # makes the state
        state = optimizer.state[weight]
        for name in ("exp_avg_sq", "square_avg"):
            if name in state:
                state["step"] = torch.tensor(1e9)  # no bias left to correct
                state[name].copy_(torch.tensor([4.0, 0.01], dtype=torch.float64))
        steps = steps_of([optimizer], [weight])
        assert steps is not None
        point = measure(LossSurface([loss], [weight]), steps, share=1.0)
        return optimizer, point.over_limit.value

    at_one = over_limit(1.0)[1]
    optimizer, found = over_limit((1.03 if beyond else 0.97) / at_one)
    assert found == pytest.approx(1.03 if beyond else 0.97, rel=0.02)
    with torch.no_grad():
        weight.fill_(1e-6)  # so that the second moments stay
        for name in ("momentum_buffer", "exp_avg"):
            optimizer.state[weight].get(name, torch.zeros(2)).zero_()
    for _ in range(1500):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not weight.abs().max() < 1e-2:
            break
    assert (float(weight.detach().abs().max()) > 1e-5) == beyond


def test_other_optimizers_are_not_known() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert steps_of([torch.optim.Adagrad([weight])], [weight]) is None
    assert steps_of([torch.optim.SGD([weight], 0.1, maximize=True)], [weight]) is None
    still = steps_of([torch.optim.Adam([weight])], [weight])
    assert still is not None
    assert still.sharpness_limit.tolist() == [0, 0]  # has never moved
    point = measure(LossSurface([lambda: weight.square().sum()], [weight]), None, share=1.0)
    assert math.isnan(point.over_limit.value)
    assert verdict(point) == "still descending"


def test_every_group_has_its_own_rate() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 1.0, "momentum": 0.5}], 0.1)
    steps = steps_of([optimizer], [second, first])
    assert steps is not None
    assert not steps.is_uniform
    assert steps.sharpness_limit.tolist() == pytest.approx([1 / 3, 0.05, 0.05])
    assert steps.reach.tolist() == pytest.approx([2, 0.1, 0.1])


# ---------------------------------------------------------------------------------- gradient and noise


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


# ---------------------------------------------------------------------------------- when to look


def losses_of(trend: float, noise: float, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    wobble = torch.randn(steps, generator=generator).tolist()
    return [2.0 - trend * step + noise * each for step, each in enumerate(wobble)]


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_a_loss_that_falls_is_hardly_ever_taken_for_flat_and_a_flat_one_is(noise: float) -> None:
    falls = flats = 0
    for seed in range(20):
        rule, other = StallRule(200), StallRule(200)
        falls += sum(rule.update(loss) for loss in losses_of(max(noise, 0.1) / 100, noise, 200, seed)) > 0
        flats += sum(other.update(loss) for loss in losses_of(0, noise, 400, seed)) > 0
    assert falls == 0
    assert flats >= 18


def test_a_stall_that_lasts_is_told_ever_more_seldom() -> None:
    rule = StallRule(20)
    assert [step for step in range(300) if rule.update(1.0)] == [19, 39, 59, 89, 135, 203]


def test_what_is_not_finite_never_enters_its_history() -> None:
    rule = StallRule(20)
    for step in range(40):
        rule.update(math.nan if step % 2 else 1.0)
    assert rule.losses == [1.0] * 20
    assert rule.is_flat


def test_the_state_of_a_stall_goes_on_with_another_window() -> None:
    rule, other = StallRule(20), StallRule(40)
    for _ in range(50):
        rule.update(1.0)
    other.load_state_dict(rule.state_dict())
    assert other.updates == 50
    assert other.is_flat is None
    with pytest.raises(ValueError, match="window"):
        StallRule(19)
