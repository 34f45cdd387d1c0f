import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from lightning_recipes.core.soups import barrier, greedy_soup

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def basin(samples: int = 400, noise: float = 0.3) -> Loss:
    """Squared distance of one weight vector to a target that differs a little from sample to sample."""
    targets = noise * torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return lambda state: (state["weight"] - targets).square().sum(-1)


def around(spreads: list[float]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"weight": spread * torch.randn(8, generator=generator)} for spread in spreads]


def two_valleys(state: Mapping[str, Tensor]) -> Tensor:
    """Zero at -1 and 1, with a hill between them."""
    noise = 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    return (state["weight"].square() - 1).square() + noise


def test_members_of_one_basin_are_averaged() -> None:
    states, losses_of = around([0.5] * 4), basin()
    soup = greedy_soup(losses_of, states)
    members = [index for index, weight in enumerate(soup.weights) if weight > 0]
    assert soup.how == soup.tried
    assert len(members) > 1
    assert soup.gain > 2 * soup.gain_error
    torch.testing.assert_close(soup.state["weight"], torch.stack([states[m]["weight"] for m in members]).mean(0))
    best = min(losses_of(state).mean().item() for state in states)
    assert losses_of(soup.state).mean().item() < best


@pytest.mark.parametrize("bad", [math.nan, 50.0])
def test_a_bad_member_is_left_out_by_the_greedy_soup(bad: float) -> None:
    states = [*around([0.5] * 4), {"weight": torch.full((8,), bad)}]
    soup = greedy_soup(basin(), states)
    assert soup.weights[4] == 0
    assert soup.how != "best"
    if not math.isnan(bad):
        assert soup.how == "greedy"


def test_the_best_member_is_used_where_averages_are_worse() -> None:
    states = [{"weight": torch.tensor(1.0)}, {"weight": torch.tensor(-0.99)}]
    soup = greedy_soup(two_valleys, states)
    assert soup.how == "best"
    assert soup.weights == (1.0, 0.0)
    assert torch.equal(soup.state["weight"], states[0]["weight"])
    assert soup.gain <= 0
    assert greedy_soup(two_valleys, states[:1]).weights == (1.0,)
    with pytest.raises(ValueError, match="no state whose losses are numbers"):
        greedy_soup(two_valleys, [{"weight": torch.tensor(math.nan)}])


def test_an_average_of_equal_members_claims_nothing() -> None:
    soup = greedy_soup(basin(), around([0.5]) * 3)
    assert soup.how == "best"
    assert soup.gain == 0.0


def test_every_set_of_members_is_measured_once() -> None:
    measured: list[float] = []
    losses_of = basin()

    def counted(state: Mapping[str, Tensor]) -> Tensor:
        measured.append(state["weight"].sum().item())
        return losses_of(state)

    greedy_soup(counted, around([0.5] * 4))
    assert len(measured) == len(set(measured)) <= 15


def test_one_network_is_as_good_as_several_or_is_not() -> None:
    soup = greedy_soup(basin(), around([0.5] * 4))
    noise = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(2))
    assert soup.is_as_good_as(soup.losses + 0.02 + noise)
    assert soup.is_as_good_as(soup.losses)
    assert not soup.is_as_good_as(soup.losses - 0.1 + noise)


def test_a_barrier_is_the_height_over_the_line_between_the_ends() -> None:
    first, second = {"weight": torch.tensor(1.0)}, {"weight": torch.tensor(-1.0)}
    found = barrier(two_valleys, first, second, points=3)
    assert found.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.height == pytest.approx(1.0, abs=1e-6)
    assert found.beyond_noise
    assert found.losses[2] - found.losses[0] == pytest.approx(1.0, abs=1e-6)


def test_a_bowl_has_no_barrier() -> None:
    first, second = around([0.5, 0.7])
    found = barrier(basin(), first, second)
    assert found.height < 0
    assert not found.beyond_noise
    assert barrier(basin(), first, first).height == pytest.approx(0, abs=1e-6)


def test_a_loss_that_is_no_number_is_a_barrier() -> None:
    def losses_of(state: Mapping[str, Tensor]) -> Tensor:
        return state["weight"].log().expand(10)

    found = barrier(losses_of, {"weight": torch.tensor(1.0)}, {"weight": torch.tensor(-1.0)})
    assert found.height == math.inf
    assert found.beyond_noise
    with pytest.raises(ValueError, match="points must be a whole number of at least 1"):
        barrier(losses_of, {}, {}, points=0)
