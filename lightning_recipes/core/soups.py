"""Average the weights of several networks instead of their predictions, where the loss allows it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_recipes.core.arguments import check_count
from lightning_recipes.core.ensembles import average_weights
from lightning_recipes.core.selection import CONFIDENCE, compared, folds_of, paired, quantile

State = Mapping[str, Tensor]
Rule = Callable[[Tensor], tuple[int, ...]]


@dataclass(frozen=True)
class Soup:
    """Averaged weights, one network, and whether they beat the best member.

    Args:
        state: The averaged weights, or the best member's if the average does not beat it beyond noise.
        weights: Of each member in it.
        how: ``"best"``, ``"uniform"`` or ``"greedy"``: what ``state`` is.
        tried: Which average was compared with the best member.
        gain: By how much its loss is below the best member's, cross-validated.
        gain_error: Standard error of that.
        losses: Loss of each sample under ``how``, cross-validated.
    """

    state: dict[str, Tensor]
    weights: tuple[float, ...]
    how: str
    tried: str
    gain: float
    gain_error: float
    losses: Tensor

    def is_as_good_as(self, ensemble_losses: Tensor) -> bool:
        """Whether averaged predictions are not better beyond noise: then one network does the work of several.

        Args:
            ensemble_losses: Loss of each sample under the averaged predictions, for the same samples.
        """
        worse, error = paired(self.losses - ensemble_losses.double().cpu(), torch.ones_like(self.losses))
        return worse <= quantile(len(self.losses)) * error


def greedy_soup(losses_of: Callable[[State], Tensor], states: Sequence[State], seed: int = 0) -> Soup:
    """Average the weights of those members that go together, if that beats the best member.

    The greedy soup starts with the best member and takes in each other one, from good to bad, if the loss falls. It
    and the average of all are fitted on four fifths of the samples and judged on the rest, as in
    :func:`~lightning_recipes.core.selection.select`. A member whose losses are no numbers is never taken.

    Args:
        losses_of: Gives the loss of each held-out sample for a state dict, shape (samples,), in the same order each
            time. It is called about twice as often as there are members.
        states: State dict of each member.
        seed: Of the folds.

    Raises:
        ValueError: If there is no state whose losses are numbers.

    References:
        Wortsman et al., Model soups, 2022: https://arxiv.org/abs/2203.05482
    """
    ingredients = _Ingredients(losses_of, states)
    rules: dict[str, Rule] = {"best": ingredients.best}
    if len(ingredients.alone) > 1:
        rules |= {"uniform": ingredients.uniform, "greedy": ingredients.greedy}
    folds = folds_of(len(ingredients.losses(ingredients.alone[0])), seed)
    ones, everywhere = torch.ones(len(folds), dtype=torch.float64), folds >= 0
    judged = {name: torch.zeros_like(ones) for name in rules}
    for fold in range(int(folds.max()) + 1):
        inside = folds == fold
        for name, rule in rules.items():
            judged[name][inside] = ingredients.losses(rule(inside if inside.all() else ~inside))[inside]
    tried, gain, error, beyond = compared(judged, ingredients.losses(ingredients.best(everywhere)), ones)
    how = tried if beyond else "best"
    members = rules[how](everywhere)
    return Soup(
        state=average_weights([states[member] for member in members]),
        weights=tuple(1 / len(members) if member in members else 0.0 for member in range(len(states))),
        how=how,
        tried=tried,
        gain=gain,
        gain_error=error,
        losses=judged[how],
    )


class _Ingredients:
    """The losses of averages, each measured once, and the rules by which members are taken on some of the samples."""

    def __init__(self, losses_of: Callable[[State], Tensor], states: Sequence[State]) -> None:
        self.losses_of, self.states = losses_of, states
        self.known: dict[tuple[int, ...], Tensor] = {}
        self.alone = [(member,) for member in range(len(states)) if self.losses((member,)).isfinite().all()]
        if not self.alone:
            raise ValueError("there is no state whose losses are numbers")

    def losses(self, members: tuple[int, ...]) -> Tensor:
        if members not in self.known:
            found = self.losses_of(average_weights([self.states[member] for member in members]))
            self.known[members] = found.detach().double().cpu().nan_to_num(math.inf, math.inf, math.inf)
        return self.known[members]

    def best(self, chosen: Tensor) -> tuple[int, ...]:
        return min(self.alone, key=lambda one: float(self.losses(one)[chosen].mean()))

    def uniform(self, _: Tensor) -> tuple[int, ...]:
        return tuple(member for (member,) in self.alone)

    def greedy(self, chosen: Tensor) -> tuple[int, ...]:
        members = self.best(chosen)
        for one in sorted(self.alone, key=lambda one: float(self.losses(one)[chosen].mean())):
            more = tuple(sorted({*members, *one}))
            if self.losses(more)[chosen].mean() < self.losses(members)[chosen].mean():
                members = more
        return members


@dataclass(frozen=True)
class Barrier:
    """The loss along the straight line between two networks.

    Args:
        positions: From 0, the first network, to 1, the second.
        losses: At each position.
        height: Largest excess over the straight line between the two losses; infinite if a loss is no number.
        error: Standard error of it.
        beyond_noise: Whether there is a barrier; if not, the weights of the two can be averaged.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    height: float
    error: float
    beyond_noise: bool


def barrier(losses_of: Callable[[State], Tensor], first: State, second: State, points: int = 9) -> Barrier:
    """Measure whether the loss rises between two networks, in which case their averaged weights are no good.

    Args:
        losses_of: Gives the loss of each held-out sample for a state dict, shape (samples,).
        first: State dict of one network.
        second: Of the other.
        points: Between the two.

    References:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020:
        https://arxiv.org/abs/1912.05671
    """
    steps = check_count("points", points, 1) + 1
    positions = [step / steps for step in range(steps + 1)]
    losses = [losses_of(average_weights((first, second), (1 - t, t))).detach().double().cpu() for t in positions]
    ones = torch.ones_like(losses[0])
    excess = [
        paired(each - (1 - t) * losses[0] - t * losses[-1], ones)
        for t, each in zip(positions[1:-1], losses[1:-1], strict=True)
    ]
    height, error = max(excess) if all(math.isfinite(mean) for mean, _ in excess) else (math.inf, math.nan)
    limit = quantile(len(ones), 1 - (1 - CONFIDENCE) / points)  # the highest of so many
    return Barrier(
        positions=tuple(positions),
        losses=tuple(float(each.mean()) for each in losses),
        height=height,
        error=error,
        beyond_noise=height == math.inf or height > limit * error,
    )
