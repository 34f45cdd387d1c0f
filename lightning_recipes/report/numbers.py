"""Numbers as people write them."""

import math
from collections.abc import Sequence
from itertools import pairwise


def shown(value: float) -> str:
    """A number in four significant digits, with commas between thousands.

    Example:
        >>> [shown(value) for value in (1234567, 0.123456, 31.0, 2.5e-7, -0.0, float("nan"), 12345.678, 1e15)]
        ['1,234,567', '0.1235', '31', '2.5e-7', '0', 'NaN', '12,346', '1e15']
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1e12 or magnitude < 1e-4:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if magnitude >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{max(0, 3 - math.floor(math.log10(magnitude)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def labels(ticks: Sequence[float]) -> list[str]:
    """The numbers of an axis, in as many digits as tell them apart.

    Example:
        >>> labels([0, 500, 1000]), labels([2.3015, 2.302, 2.3025]), labels([12345.5, 12346])
        (['0', '500', '1,000'], ['2.3015', '2.3020', '2.3025'], ['12,345.5', '12,346.0'])
    """
    short = [shown(tick) for tick in ticks]
    step = min((after - before for before, after in pairwise(ticks)), default=math.inf)
    if all(abs(float(text.replace(",", "")) - tick) < step / 10 for text, tick in zip(short, ticks, strict=True)):
        return short
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def duration(seconds: float) -> str:
    """A time in the two largest units.

    Example:
        >>> [duration(seconds) for seconds in (0.25, 42.4, 125, 3725, 200_000)]
        ['0.25 s', '42 s', '2 min 5 s', '1 h 2 min', '2 d 7 h']
    """
    if seconds < 10:
        return f"{shown(float(f'{seconds:.2g}'))} s"
    whole = round(seconds)
    for unit, size, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"


def size(number_of_bytes: float) -> str:
    """An amount of memory.

    Example:
        >>> size(3 * 2**30), size(5_000_000)
        ('3 GiB', '4.8 MiB')
    """
    unit, factor = ("GiB", 2**30) if number_of_bytes >= 2**30 else ("MiB", 2**20)
    return f"{float(f'{number_of_bytes / factor:.2g}'):g} {unit}"
