import copy
import math
from typing import Any

import pytest
import torch
from surfaces import network, slow_hessian
from torch import Tensor, nn

from lightning_recipes.core import hessian
from lightning_recipes.core.curvature import measure, sharpness, verdict
from lightning_recipes.core.hessian import LossSurface, extreme_eigenvalues, steps_of


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


@pytest.mark.parametrize("seed", range(8))
def test_it_stops_as_soon_as_both_ends_are_within_the_tolerance(seed: int) -> None:
    matrix = torch.diag(torch.cat([torch.linspace(0, 1, 98), torch.tensor([-2.0, 3.0])]).double())
    found = extreme_eigenvalues(lambda vector: matrix @ vector, start(100, seed))
    sooner = extreme_eigenvalues(lambda vector: matrix @ vector, start(100, seed), found.products - 1)
    assert found.products < 20  # from there on not every product is looked at
    for each, within in ((found, True), (sooner, False)):
        low, high = each.smallest_error / abs(each.smallest), each.largest_error / abs(each.largest)
        assert (max(low, high) <= 0.003) == within


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


def test_the_floor_leaves_the_risk_that_it_says() -> None:
    """Of Kuczynski and Wozniakowski's bound, for a width that may be as much larger at both ends."""
    matrix = torch.diag(torch.randn(400, generator=torch.Generator().manual_seed(0)).double())
    found = extreme_eigenvalues(lambda vector: matrix @ vector, torch.randn(400).double(), max_products=25)
    below = found.smallest - found.floor
    share = below / (found.largest - found.smallest + 2 * below)
    assert 0 < share < 0.5
    assert 2 * 1.648 * math.sqrt(400) * math.exp(-math.sqrt(share) * (2 * found.products - 1)) == pytest.approx(
        0.05 / 2
    )
    few = extreme_eigenvalues(lambda vector: matrix @ vector, torch.randn(400).double(), max_products=5)
    assert few.floor == -math.inf


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


def dense(surface: LossSurface) -> Tensor:
    return torch.stack([surface.product(unit) for unit in torch.eye(surface.weights.numel(), dtype=torch.float64)])


def test_products_are_those_of_the_hessian() -> None:
    model, batches, surface = network()
    exact = slow_hessian(model, batches)
    assert torch.allclose(dense(surface), exact)
    assert surface.products == len(exact)
    surface.penalty = torch.full((len(exact),), 0.5, dtype=torch.float64)
    assert torch.allclose(dense(surface), exact + 0.5 * torch.eye(len(exact)))
    found, _ = sharpness(surface, None)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]) + 0.5, rel=0.01)


def test_graphs_that_are_kept_give_the_same_products_without_computing_a_loss() -> None:
    model, batches, surface = network()
    calls: list[int] = []
    surface.losses = [lambda loss=loss: calls.append(1) or loss() for loss in surface.losses]
    exact = slow_hessian(model, batches)
    surface.gradients()
    assert torch.allclose(dense(surface), exact)
    assert len(calls) == 5
    assert surface.work == 5 + 2 * 5 * len(exact)
    surface.loss_at(torch.zeros(len(exact), dtype=torch.float64))  # the weights change
    assert torch.allclose(dense(surface), exact)
    assert len(calls) == 10 + 5 * len(exact)
    for room in (1 << 20, 100, 0):  # bytes; one graph takes more than 100
        surface._room = room
        calls.clear()
        surface.gradients()
        surface.product(surface.weights)
        assert len(calls) == (5 if room > 100 else 10)


def test_a_graph_that_another_loss_has_spoilt_is_not_used() -> None:
    weight, centre = nn.Parameter(torch.ones(2)), torch.zeros(2)

    def loss() -> Tensor:
        centre.add_(1)
        return (weight * centre).square().sum()

    surface = LossSurface([loss, loss], [weight])
    surface.gradients()
    assert surface.product(torch.ones(2)).tolist() == [25, 25]  # of centres 3 and 4, computed anew; 2 and 2 were 8
    assert surface.failure is None


def test_what_cannot_be_counted_is_not_kept() -> None:
    weight = nn.Parameter(torch.ones(2))
    inner = torch.func.grad(lambda x: x.pow(3).sum())  # refuses to be looked into
    surface = LossSurface([lambda: inner(weight).sum()], [weight])
    _, (gradient,) = surface.gradients()
    assert gradient.tolist() == [6, 6]
    assert surface.product(torch.ones(2)).tolist() == [6, 6]
    assert surface.failure is None


def test_vectors_of_a_spectrum_fit_into_the_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "ROOM", 50 * 300 * 8)
    matrix = random_symmetric(300, 0)
    assert extreme_eigenvalues(lambda vector: matrix @ vector, start(300), 150, 0.0).products == 50
    monkeypatch.setattr(hessian, "ROOM", 0)
    assert extreme_eigenvalues(lambda vector: matrix @ vector, start(300), 150, 0.0).products == 30
    assert extreme_eigenvalues(lambda vector: matrix @ vector, start(300), 20, 0.0).products == 20


@pytest.mark.parametrize("kind", ["Tanh", "ReLU"])
@pytest.mark.parametrize("updates", [0, 50, 1000])
def test_both_ends_of_a_trained_network_are_within_one_percent_by_default(kind: str, updates: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), getattr(nn, kind)(), nn.Linear(16, 5)).double()
    inputs, labels = torch.randn(120, 10).double(), torch.randint(5, (120,))
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(updates):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    exact = torch.linalg.eigvalsh(slow_hessian(model, [(inputs, labels)]))
    low, high = float(exact[0]), float(exact[-1])
    single = copy.deepcopy(model).float()
    losses = [lambda: nn.functional.cross_entropy(single(inputs.float()), labels)]
    surface = LossSurface(losses, single.parameters())
    for seed in range(5):
        found = measure(surface, None, seed).spectrum
        assert found.largest == pytest.approx(high, rel=0.01)
        assert found.smallest == pytest.approx(low, rel=0.01, abs=1e-4 * high)
        assert found.floor <= low + 1e-6 * high
        assert sharpness(surface, None, seed, 15)[0].largest == pytest.approx(high, rel=0.01)


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
        if not 1e-8 < weight.abs().max() < 1e-2:
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


def trained(make: Any, updates: int = 3) -> tuple[Any, Tensor, Tensor]:
    """An optimizer after some updates, of a weight whose last entry never has a gradient, and the mean squares."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = make([weight])
    gradients = torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.1, 0.0], [-0.5, 0.2, 0.0]], dtype=torch.float64)[:updates]
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return optimizer, weight, gradients


def averaged(values: Tensor, beta: float) -> list[Tensor]:
    """The moving averages from 0 on, after each."""
    means = [torch.zeros_like(values[0])]
    for value in values:
        means.append(beta * means[-1] + (1 - beta) * value)
    return means[1:]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("kind", "setting", "decoupled"),
    [(torch.optim.Adam, False, False), (torch.optim.Adam, True, True), (torch.optim.AdamW, True, True)],
)
def test_steps_of_adam_are_preconditioned_by_the_corrected_mean_square(
    amsgrad: bool, kind: Any, setting: bool, decoupled: bool
) -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.5), "eps": 0.25, "weight_decay": 0.0, "amsgrad": amsgrad}
    optimizer, weight, gradients = trained(lambda p: kind(p, 0.5, **settings))
    optimizer.param_groups[0]["weight_decay"] = 0.125  # which were a part of the gradients
    optimizer.param_groups[0]["decoupled_weight_decay"] = setting
    squares = averaged(gradients.square(), 0.5)
    used = torch.stack(squares).amax(0) if amsgrad else squares[-1]
    scale = 1 / ((used / (1 - 0.5**3)).sqrt() + 0.25)
    steps = steps_of([optimizer], [weight])
    assert steps is not None
    torch.testing.assert_close(steps.sharpness_limit, 0.5 * scale * (1 - 0.8) / (2 * (1 + 0.8)))
    torch.testing.assert_close(steps.reach, 0.5 * scale)
    torch.testing.assert_close(steps.penalty, 0.125 / scale if decoupled else torch.full_like(scale, 0.125))


@pytest.mark.parametrize("centered", [False, True])
def test_steps_of_rmsprop_are_preconditioned_by_the_mean_square(centered: bool) -> None:
    settings: dict[str, Any] = {"alpha": 0.5, "eps": 0.25, "weight_decay": 0.0, "centered": centered, "momentum": 0.6}
    optimizer, weight, gradients = trained(lambda p: torch.optim.RMSprop(p, 0.5, **settings))
    squares = averaged(gradients.square(), 0.5)[-1]
    if centered:
        squares = squares - averaged(gradients, 0.5)[-1].square()
    scale = 1 / (squares.sqrt() + 0.25)
    steps = steps_of([optimizer], [weight])
    assert steps is not None
    torch.testing.assert_close(steps.sharpness_limit, 0.5 * scale / (2 * 1.6))
    torch.testing.assert_close(steps.reach, 0.5 * scale / (1 - 0.6))
    assert steps.penalty.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "limit", "reach"),
    [
        ({}, 2.0, 1.0),
        ({"momentum": 0.5}, 3.0, 2.0),
        ({"momentum": 0.5, "nesterov": True}, 1.5, 2.0),
        ({"momentum": 0.5, "dampening": 0.25}, 4.0, 1.5),
    ],
)
def test_steps_of_gradient_descent_and_its_momentum(settings: dict[str, Any], limit: float, reach: float) -> None:
    optimizer, weight, _ = trained(lambda p: torch.optim.SGD(p, 0.25, weight_decay=0.5, **settings))
    steps = steps_of([optimizer], [weight])
    assert steps is not None
    assert steps.is_uniform
    assert steps.sharpness_limit.tolist() == pytest.approx([0.25 / limit] * 3)
    assert steps.reach.tolist() == pytest.approx([0.25 * reach] * 3)
    assert steps.penalty.tolist() == [0.5] * 3


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_what_has_never_moved_has_no_steps_and_no_penalty(make: Any) -> None:
    optimizer, weight, _ = trained(lambda p: make(p, weight_decay=0.5), updates=0)
    steps = steps_of([optimizer], [weight])
    assert steps is not None
    assert steps.sharpness_limit.tolist() == steps.reach.tolist() == steps.penalty.tolist() == [0.0] * 3
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    of_half = steps_of([make([half])], [half])
    assert of_half is not None
    assert of_half.reach.dtype == torch.float32


def test_a_derivative_that_fails_gives_no_numbers_and_says_why() -> None:
    weight = nn.Parameter(torch.ones(3))

    def fails() -> Tensor:
        raise ValueError("no loss")

    surface = LossSurface([lambda: weight.sum(), fails], [weight])
    losses, gradients = surface.gradients()
    assert losses[0] == 3
    assert losses[1].isnan()
    assert gradients[0].tolist() == [1, 1, 1]
    assert gradients[1].shape == (3,)
    assert gradients[1].isnan().all()
    assert isinstance(surface.failure, ValueError)
    assert surface.product(torch.ones(3)).isnan().all()  # nothing is tried any more
    assert (surface.products, surface.work) == (1, 2 + 3 * 2)


def test_what_fails_with_graphs_that_are_kept_is_tried_without() -> None:
    weight, tries = nn.Parameter(torch.ones(3)), [0]

    def fails_once() -> Tensor:
        tries[0] += 1
        if tries[0] == 1:
            raise MemoryError
        return weight.square().sum()

    surface = LossSurface([fails_once], [weight])
    assert surface.gradients()[1][0].tolist() == [2, 2, 2]
    assert surface.failure is None
    assert surface.product(torch.ones(3)).tolist() == [2, 2, 2]
    assert (tries[0], surface.work) == (3, 1 + 3)


def test_ranks_that_do_not_all_keep_their_graphs_keep_none() -> None:
    weight = nn.Parameter(torch.ones(3))
    surface = LossSurface([lambda: weight.square().sum()], [weight], mean=lambda tensor: tensor / 2)
    losses, gradients = surface.gradients()
    assert (losses.tolist(), gradients[0].tolist()) == ([3.0], [2, 2, 2])  # its own
    assert surface.product(torch.ones(3)).tolist() == [1, 1, 1]
    assert surface.work == 1 + 3
    surface.penalty = torch.tensor([0.0, 1.0, 2.0])
    assert surface.product(torch.ones(3)).tolist() == [1, 2, 3]
    assert surface.loss_at(torch.ones(3)) == pytest.approx(12 / 2 + (0 + 4 + 8) / 2)
    assert surface.work == 1 + 3 + 3 + 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class Again(Doubled):
    pass


def test_functions_of_their_own_are_found_wherever_they_are() -> None:
    weight = nn.Parameter(torch.ones(3))
    inside = LossSurface([lambda: (Doubled.apply(weight.exp()) * Again.apply(weight)).sum().square()], [weight])
    assert inside.custom_functions() == ["Again", "Doubled"]
    assert LossSurface([lambda: weight.sum()], [weight]).custom_functions() == []


def test_the_smallest_may_be_off_by_a_part_of_a_hundredth_of_the_largest() -> None:
    matrix = torch.diag(torch.cat([torch.linspace(0.001, 0.9, 198), torch.tensor([100.0, 99.0])]).double())
    found = extreme_eigenvalues(lambda vector: matrix @ vector, start(200))
    assert 0.003 * abs(found.smallest) < found.smallest_error <= 0.003 * found.largest / 100
    exact = extreme_eigenvalues(lambda vector: matrix @ vector, start(200), tolerance=1e-9)
    assert exact.products > found.products
    assert found.scale == found.largest
    assert extreme_eigenvalues(lambda vector: -matrix @ vector, start(200)).scale == pytest.approx(100)


def test_at_most_a_hundred_and_fifty_products_are_taken() -> None:
    matrix = random_symmetric(200, 0)
    assert extreme_eigenvalues(lambda vector: matrix @ vector, start(200), tolerance=0.0).products == 150
    with pytest.raises(ArithmeticError, match="^a product with the Hessian is not finite$"):
        extreme_eigenvalues(lambda vector: vector * math.inf, start(5))
