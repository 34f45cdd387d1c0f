import math
import re
from collections.abc import Callable, Mapping

import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_recipes.core.selection import folds_of, gain_of
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


def test_weights_that_cancel_are_no_average() -> None:
    soup = greedy_soup(
        lambda state: 1 / state["weight"].abs().expand(20), [{"weight": torch.tensor(w)} for w in (1.0, -1.0)]
    )
    assert (soup.how, soup.weights, soup.gain) == ("best", (1.0, 0.0), 0.0)
    alone = greedy_soup(two_valleys, [{"weight": torch.tensor(1.0)}])
    assert (alone.how, alone.tried, alone.gain, alone.gain_error) == ("best", "best", 0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_soup_is_worth_is_measured_on_samples_that_did_not_choose_it(seed: int) -> None:
    losses_of, states = basin(samples=60, noise=1.0), [*around([0.4] * 4), {"weight": torch.full((8,), 0.6)}]
    soup = greedy_soup(losses_of, states, seed)

    def mean_of(members: list[int]) -> Tensor:
        return losses_of({"weight": torch.stack([states[member]["weight"] for member in members]).mean(0)}).double()

    def greedy(chosen: Tensor) -> list[int]:
        order = sorted(range(5), key=lambda member: float(mean_of([member])[chosen].mean()))
        taken = order[:1]
        for member in order[1:]:
            if mean_of([*taken, member])[chosen].mean() < mean_of(taken)[chosen].mean():
                taken.append(member)
        return taken

    folds, judged, best = folds_of(60, seed), torch.zeros(60).double(), torch.zeros(60).double()
    for fold in range(5):
        others = folds != fold
        members = greedy(others) if soup.tried == "greedy" else range(5)
        judged[~others] = mean_of(list(members))[~others]
        best[~others] = mean_of(greedy(others)[:1])[~others]
    expected = judged if soup.how == soup.tried else best
    torch.testing.assert_close(soup.losses, expected)
    everywhere = torch.ones(60, dtype=torch.bool)
    of_all = mean_of(greedy(everywhere)[:1])
    gain, error, beyond = gain_of(best - judged, of_all - judged, torch.ones(60).double())
    assert (soup.gain, soup.gain_error) == (pytest.approx(gain), pytest.approx(error))
    assert (soup.how == soup.tried) == beyond
    members = greedy(everywhere) if soup.how == "greedy" else range(5) if beyond else greedy(everywhere)[:1]
    assert [place for place, weight in enumerate(soup.weights) if weight] == sorted(members)


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


@pytest.mark.parametrize("points", [1, 5])
def test_a_barrier_has_to_be_beyond_the_noise_of_the_highest_of_so_many_points(points: int) -> None:
    noise = torch.tensor([1.0, -1.0] * 50).double()
    limit = scipy.stats.t.ppf(1 - 0.05 / points, 99) * float(noise.std()) / 10
    for height, beyond in ((0.99 * limit, False), (1.01 * limit, True)):
        found = barrier(
            lambda state, h=height: (noise + h) * float(state["weight"].abs() < 0.9),
            {"weight": torch.tensor(1.0)},
            {"weight": torch.tensor(-1.0)},
            points,
        )
        assert found.height == pytest.approx(height)
        assert found.error == pytest.approx(float(noise.std()) / 10)
        assert found.beyond_noise == beyond


def test_a_bowl_has_no_barrier() -> None:
    first, second = around([0.5, 0.7])
    found = barrier(basin(), first, second)
    assert found.height < 0
    assert not found.beyond_noise
    assert barrier(basin(), first, first).height == pytest.approx(0, abs=1e-6)
    level = barrier(lambda state: torch.ones(10), first, second, points=3)
    assert (level.height, level.error, level.beyond_noise) == (0.0, 0.0, False)


def test_a_loss_that_is_no_number_is_a_barrier() -> None:
    def losses_of(state: Mapping[str, Tensor]) -> Tensor:
        return state["weight"].log().expand(10)

    found = barrier(losses_of, {"weight": torch.tensor(1.0)}, {"weight": torch.tensor(-1.0)})
    assert found.height == math.inf
    assert found.beyond_noise
    with pytest.raises(ValueError, match="points must be a whole number of at least 1"):
        barrier(losses_of, {}, {}, points=0)


def test_the_defaults_are_those_that_are_documented() -> None:
    states, losses_of = [*around([0.4] * 4), {"weight": torch.full((8,), 0.6)}], basin(samples=60, noise=1.0)
    assert len(barrier(losses_of, *states[:2]).losses) == 9 + 2
    default, other = greedy_soup(losses_of, states), greedy_soup(losses_of, states, seed=1)
    assert default.gain == greedy_soup(losses_of, states, 0).gain != other.gain


def test_a_soup_and_a_barrier_say_what_they_are_of() -> None:
    states = around([0.5] * 4)
    soup = greedy_soup(basin(noise=0.0), states)
    share = 1 / sum(weight > 0 for weight in soup.weights)
    assert {*soup.weights} <= {0.0, share}
    assert (soup.losses.dtype, len(soup.losses)) == (torch.float64, 400)
    broken = barrier(
        lambda state: state["weight"].log().expand(10), *({"weight": torch.tensor(w)} for w in (1.0, -1.0))
    )
    assert math.isnan(broken.error)
    assert broken.losses[0] == 0.0


def test_one_network_is_as_good_up_to_the_noise_of_the_difference() -> None:
    soup = greedy_soup(basin(samples=100), around([0.5] * 2))
    noise = torch.tensor([1.0, -1.0] * 50)
    limit = scipy.stats.t.ppf(0.95, 99) * float(noise.std()) / 10
    for worse, as_good in ((0.99 * limit, True), (1.01 * limit, False)):
        assert soup.is_as_good_as(soup.losses - worse + noise.double()) is as_good


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: greedy_soup(two_valleys, [{"weight": torch.tensor(math.nan)}]),
            "there is no state whose losses are numbers",
        ),
        (lambda: barrier(two_valleys, {}, {}, 0), "points must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_refused_is_told_with_what_is_wanted(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make()
