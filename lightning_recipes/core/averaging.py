"""Average the weights along the training: the average is often the better model."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_recipes.core.arguments import check_count, check_real

HALF_PRECISION = (torch.float16, torch.bfloat16)
WARMUP = 18  # early on the memory of the average is a seventeenth of the training so far


def decay_from_half_life(half_life: float) -> float:
    """The decay under which the share of a weight in the average halves every ``half_life`` updates.

    Example:
        >>> round(decay_from_half_life(693), 5)
        0.999
    """
    return math.exp(-math.log(2) / half_life)


def decay_at(update: int, decay: float) -> float:
    """The decay of one update: ``min(decay, (1 + update) / (18 + update))``, and 0 at the first, which copies.

    While ``decay`` does not limit it the memory of the average is a fixed share of the training so far (a power law:
    half of it lies in the last 4 % of the updates). So the initial weights are gone at once and the next ones soon,
    which a plain ``decay`` drags along for thousands of updates. A uniform mean of the first updates, as a bias
    correction would give, remembers too much of a time when the weights move fast, and the usual 10 in the place of
    18 does so at times (``benchmarks/LOG.md``). A batch ``k`` times as large with ``decay ** k`` gives the same
    average.

    Args:
        update: 1 for the first update that is averaged.
        decay: The decay that is reached in the end, above 0 and below 1.

    Example:
        >>> [round(decay_at(update, 0.9), 2) for update in (1, 2, 10, 100)]
        [0.0, 0.15, 0.39, 0.86]
    """
    return min(decay, (1 + update) / (WARMUP + update)) if update > 1 else 0.0


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, as a plain tensor on the same memory; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


class ExponentialMovingAverage:
    """Exponential moving average of tensors: ``average <- decay * average + (1 - decay) * tensor`` at each update.

    The decay of each update is :func:`decay_at`; the first average is a copy. With ``every_n_steps`` the averages move
    at every n-th update by the product of the n decays, so that their memory in updates is the same for every n.
    A tensor that first appears at a later update starts from its value then. Memory is one copy of the tensors, in
    single precision for half-precision ones, which could not hold the small steps of an average. DTensors are averaged
    shard by shard. An update is one ``torch._foreach_lerp_`` over lists that are kept, and reads nothing back.

    Attributes:
        averages: The average of each tensor by name; empty before the first, the raw values while ``exchanged``.
        exchanged: Whether the tensors hold the averages at the moment.

    Args:
        decay: What the average keeps of itself at an update, above 0 and below 1.
        every_n_steps: Updates from one move of the averages to the next, at least 1.
        start_step: Updates before the first that is averaged, at least 0.
        device: Where to keep the averages; None for each where its tensor is.

    Raises:
        TypeError: If an argument is not a number of its kind.
        ValueError: If it is out of its range.

    Example:
        >>> weight, ema = torch.zeros(1), ExponentialMovingAverage(decay=0.5)
        >>> for _ in range(3):
        ...     weight += 1
        ...     ema.update({"weight": weight})
        >>> ema.averages  # 4/21 of (3/20 of 1 and 17/20 of 2) and 17/21 of 3
        {'weight': tensor([2.7810])}

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992
        Busbridge et al., How to Scale Your EMA, 2023: https://arxiv.org/abs/2307.13813
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024 (power-law averages):
        https://arxiv.org/abs/2312.02696
    """

    def __init__(
        self,
        decay: float = 0.999,
        every_n_steps: int = 1,
        start_step: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        self.decay = check_real("decay", decay, 0, 1)
        self.every_n_steps = check_count("every_n_steps", every_n_steps, 1)
        self.start_step = check_count("start_step", start_step, 0)
        self.device = device
        self.averages: dict[str, Tensor] = {}
        self.exchanged = False
        # These three are scalar tensors once an update may have been skipped and only the device knows.
        self._updates: int | Tensor = 0
        self._pending: float | Tensor = 1.0  # product of the decays since the averages last moved
        self._moved: bool | Tensor = False
        self._attempts = 0
        self._raw_halves: dict[str, Tensor] = {}  # raw values of half-precision tensors while exchanged
        self._planned: Mapping[str, Tensor] | None = None
        self._alike: tuple[list[Tensor], list[Tensor]] = ([], [])  # averages and tensors of one dtype and device
        self._unlike: list[tuple[Tensor, Tensor]] = []  # pairs that differ in either

    @property
    def updates(self) -> int:
        """Updates that happened; a host read where only the device knows."""
        return int(self._updates)

    @property
    def exists(self) -> bool:
        """Whether there is an average yet; a host read where only the device knows."""
        return bool(self._moved)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], skipped: Tensor | None = None) -> None:
        """Take in the tensors as an optimizer's update left them.

        Args:
            tensors: What to average, by name, of any floating dtype. To hand over the same mapping at each update
                saves going through it.
            skipped: Scalar tensor, not 0 where the optimizer left the tensors alone so that this was no update, as
                ``optimizer.found_inf`` says that a GradScaler sets for fused optimizers. It is not read back.
        """
        if skipped is None and isinstance(self._updates, int):
            self._updates += 1
            update = self._updates - self.start_step
            if update < 1:
                return
            self._pending *= decay_at(update, self.decay)
            moves = (update - 1) % self.every_n_steps == 0
            self._moved = True
        else:
            moves = self._attempt(skipped if skipped is not None else torch.zeros(()))
        if moves:
            self._move(tensors)

    def _attempt(self, skipped: Tensor) -> bool:
        """Count an update that may not have happened, on the device; return whether it is time to move."""
        device = skipped.device
        happened = skipped == 0
        self._updates = torch.as_tensor(self._updates, device=device) + happened
        update = self._updates - self.start_step
        decay = ((1 + update) / (WARMUP + update)).clamp(max=self.decay)
        decay = torch.where(update > 1, decay, (update < 1).to(decay.dtype))
        pending = torch.as_tensor(self._pending, dtype=decay.dtype, device=device)
        self._pending = torch.where(happened, pending * decay, pending)
        self._attempts += 1
        moves = self._attempts % self.every_n_steps == 0
        if moves:
            self._moved = torch.as_tensor(self._moved, device=device) | (update >= 1)
        return moves

    def _move(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors is not self._planned:
            self._plan(tensors)
        if isinstance(self._pending, Tensor):
            for average, tensor in [*zip(*self._alike, strict=True), *self._unlike]:
                weight = (1 - self._pending).to(average.device, average.dtype)
                average.lerp_(tensor.to(average.device, average.dtype), weight)
        else:
            if self._alike[0]:
                torch._foreach_lerp_(*self._alike, 1 - self._pending)
            for average, tensor in self._unlike:
                average.lerp_(tensor.to(average.device, average.dtype), 1 - self._pending)
        self._pending = 1.0

    def _plan(self, tensors: Mapping[str, Tensor]) -> None:
        self._alike, self._unlike = ([], []), []
        for name, tensor in tensors.items():
            shard = local(tensor)
            dtype = torch.float32 if shard.dtype in HALF_PRECISION else shard.dtype
            average = self.averages[name] if name in self.averages else shard.detach().clone()
            average = average.to(self.device or shard.device, dtype)
            self.averages[name] = average
            if average.dtype == shard.dtype and average.device == shard.device:
                self._alike[0].append(average)
                self._alike[1].append(shard)
            else:
                self._unlike.append((average, shard))
        sharded = any(local(tensor) is not tensor for tensor in tensors.values())
        self._planned = None if sharded else tensors  # a shard may be given new memory: ask again each time

    @torch.no_grad()
    def exchange_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the averages into the tensors and keep the raw values in their place, or the other way round.

        Nothing happens before there is an average. What is written into a tensor while it holds its average is in the
        average after. Beyond one tensor at a time no memory is needed, but for half-precision tensors, whose averages
        do not fit into them and stay.
        """
        if not self.exists:
            return
        for name, average in self.averages.items():
            shard = local(tensors[name])
            raw = shard.detach().clone()
            if average.dtype == shard.dtype:
                shard.copy_(average)
                average.copy_(raw)
            elif self.exchanged:
                held = raw.to(average.device)
                average.copy_(torch.where(average.to(held.dtype) == held, average, held.to(average.dtype)))
                shard.copy_(self._raw_halves.pop(name))
            else:
                shard.copy_(average)
                self._raw_halves[name] = raw
        self.exchanged = not self.exchanged

    def average(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average of each of its tensors by name, wherever it is at the moment; this rank's shard of DTensors."""
        return {
            name: local(tensors[name]).detach() if self.exchanged and name not in self._raw_halves else average
            for name, average in self.averages.items()
        }

    def raw(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The raw value of each averaged tensor by name, wherever it is at the moment; likewise."""
        kept = {**self.averages, **self._raw_halves} if self.exchanged else {}
        return {name: kept[name] if kept else local(tensors[name]).detach() for name in self.averages}

    def adapt(self, tensors: Mapping[str, Tensor]) -> None:
        """Drop the averages of tensors that are none of these, or have another shape now: they start anew."""
        self.forget()
        self.averages = {
            name: average
            for name, average in self.averages.items()
            if name in tensors and not is_lazy(tensors[name]) and local(tensors[name]).shape == average.shape
        }

    def forget(self) -> None:
        """Let go of the tensors that the averages were taken of; the averages stay."""
        self._planned, self._alike, self._unlike = None, ([], []), []

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the averages if they are not exchanged (else only the tensors have them)."""
        averages = {} if self.exchanged else dict(self.averages)
        return {
            "updates": self.updates,
            "pending": float(self._pending),
            "attempts": self._attempts,
            "moved": self.exists,
            "averages": averages,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._attempts = state_dict["updates"], state_dict["attempts"]
        self._pending, self._moved = state_dict["pending"], state_dict["moved"]
        self.averages = dict(state_dict["averages"])
        self.exchanged, self._raw_halves = False, {}
        self.forget()
