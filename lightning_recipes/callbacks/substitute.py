"""Have another function in the place of a method, for one object and for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def substitute(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put ``function`` in the place of a method of this one object; return what puts the method back."""
    held, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, function)

    def restore() -> None:
        if held:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return restore


@contextmanager
def substituted(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Within the context the object has ``functions`` in the place of its methods of those names."""
    restores = [substitute(owner, name, function) for name, function in functions.items()]
    try:
        yield
    finally:
        for restore in reversed(restores):
            restore()
