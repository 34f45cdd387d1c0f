"""Refuse a bad argument where it is given, with its name, the rule it breaks and its value."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any


def check_real(name: str, value: object, low: float, high: float) -> float:
    """Return ``value`` as a float if it is a number in the open interval ``(low, high)``.

    Raises:
        TypeError: If ``value`` is not a number (a bool or a string is none).
        ValueError: If it is not inside the interval; NaN never is.

    Example:
        >>> check_real("percentile", 90, 0, 100)
        90.0
        >>> check_real("percentile", 100, 0, 100)
        Traceback (most recent call last):
            ...
        ValueError: percentile must be a number above 0 and below 100, got 100
    """
    bounds = " and ".join(f"{side} {end:g}" for side, end in (("above", low), ("below", high)) if math.isfinite(end))
    rule = f"{name} must be a number {bounds}" if bounds else f"{name} must be a finite number"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{rule}, got {value!r}")
    number = float(value)
    if not low < number < high:
        raise ValueError(f"{rule}, got {value!r}")
    return number


def check_count(name: str, value: object, low: int) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``low``.

    Raises:
        TypeError: If ``value`` is not an integer (a bool or a float is none).
        ValueError: If it is below ``low``.

    Example:
        >>> check_count("window", 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: window must be a whole number of at least 1, got 0
    """
    rule = f"{name} must be a whole number of at least {low}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{rule}, got {value!r}")
    if value < low:
        raise ValueError(f"{rule}, got {value!r}")
    return int(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_choice("buffers", "avg", ("average", "copy"))
        Traceback (most recent call last):
            ...
        ValueError: buffers must be 'average' or 'copy', got 'avg'
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_name(name: str, value: object, of: str) -> str:
    """Return ``value`` if it is a string with something in it.

    Raises:
        TypeError: If it is anything else.

    Example:
        >>> check_name("monitor", None, "a metric")
        Traceback (most recent call last):
            ...
        TypeError: monitor must be the name of a metric, got None
    """
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be the name of {of}, got {value!r}")
    return value


def check_list(name: str, value: object, of: str) -> tuple[Any, ...]:
    """Return what is in ``value`` if it is a list or anything like one: a tuple, an array, a ListConfig of Hydra.

    Raises:
        TypeError: If it is not, and a string is not.

    Example:
        >>> check_list("milestones", "10", "durations")
        Traceback (most recent call last):
            ...
        TypeError: milestones must be a list of durations, got '10'
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of {of}, got {value!r}")
    return tuple(value)


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        TypeError: If it is anything else: ``"no"`` is true to Python and not to the person who wrote it.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value
