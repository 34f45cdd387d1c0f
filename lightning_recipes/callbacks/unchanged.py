"""Put back what code has changed that a training must not notice."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states


@contextmanager
def isolate_rng() -> Iterator[None]:
    """Put the random states back when the context ends, by an exception too, which Lightning's own does not."""
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)
