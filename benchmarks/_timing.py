"""Time candidates next to each other in one process, and compare them round by round."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Times:
    """Seconds a call, by candidate, one list of rounds each."""

    rounds: dict[str, list[float]]

    def ratio(self, name: str, reference: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio within a round."""
        ratios = [one / other for one, other in zip(self.rounds[name], self.rounds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return low, middle, high


def interleave(candidates: dict[str, Callable[[], object]], seconds: float = 10.0, at_least: int = 9) -> Times:
    """Call every candidate once a round, in a new random order each, until the time is over; one thread.

    A call is repeated until it takes ten milliseconds. The clock is the CPU time of this process, so that the turns of
    other processes do not count; compare ratios, not times of different runs.
    """
    torch.set_num_threads(1)
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, int(0.01 / max(time.process_time() - start, 1e-7)))
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    names, order = list(candidates), random.Random(0)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while time.perf_counter() < end or len(rounds[names[0]]) < at_least:
            order.shuffle(names)
            for name in names:
                start = time.process_time()
                for _ in range(repeats[name]):
                    candidates[name]()
                rounds[name].append((time.process_time() - start) / repeats[name])
    finally:
        gc.enable()
    return Times(rounds)


def table(title: str, times: Times, *references: str, unit: dict[str, int] | None = None) -> None:
    """Print the ratio of every candidate to each reference, with its quartiles."""
    print(f"\n{title}")
    print(f"{'':44}" + "".join(f"{'x ' + reference:>36}" for reference in references))
    for name in times.rounds:
        cells = []
        for reference in references:
            low, middle, high = (part / (unit or {}).get(name, 1) for part in times.ratio(name, reference))
            cells.append(f"{middle:>16.3g} ({low:.3g} to {high:.3g})".rjust(36))
        print(f"{name:44}" + "".join(cells), flush=True)
