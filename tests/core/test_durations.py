import math
import re
from typing import Any

import pytest

from lightning_recipes.core.durations import Duration, parse_duration


@pytest.mark.parametrize(
    ("said", "updates"),
    [
        (500, 500),
        (2.5, 2.5),
        (1, 1),
        ("1", 1),
        ("1.5", 1.5),
        ("500", 500),
        ("500 updates", 500),
        ("5e2 updates", 500),
        ("1 step", 1),
        ("2 epochs", 100),
        ("1 Epoch", 50),
        ("0.5 epochs", 25),
        ("0.1 of the run", 100),
        (".1 of the run", 100),
        ("0.1", 100),
        (0.1, 100),
        ("0.5 updates", 0.5),
        ("10%", 100),
        ("2.5 % of the run", 25),
    ],
)
def test_durations_as_people_say_them(said: float | str, updates: float) -> None:
    duration = parse_duration("half_life", said)
    assert duration.in_updates(updates_per_epoch=50, updates_per_run=1000) == pytest.approx(updates)
    assert parse_duration("half_life", duration.text) == duration


@pytest.mark.parametrize(
    "said",
    ["", "two", "2 weeks", "epochs", "-2 epochs", "0 epochs", 0, -1, math.nan, "1 of run", "%", "5% epochs", "0%"],
)
def test_what_is_not_understood_is_refused(said: float | str) -> None:
    with pytest.raises(ValueError, match="half_life must be a number"):
        parse_duration("half_life", said)


@pytest.mark.parametrize("said", [None, True, [2]])
def test_what_is_neither_number_nor_words_is_refused(said: object) -> None:
    with pytest.raises(TypeError, match="half_life must be a number"):
        parse_duration("half_life", said)  # type: ignore[arg-type]


@pytest.mark.parametrize("unknown", [math.inf, -1, 0])
def test_a_length_that_nobody_knows_is_an_error_that_says_what_to_do(unknown: float) -> None:
    with pytest.raises(ValueError, match="'2 epochs' needs the length of an epoch.*give it in updates"):
        Duration(2, "epochs").in_updates(unknown, 1000)
    with pytest.raises(ValueError, match=r"'0.1 of the run' needs the length of the run"):
        Duration(0.1, "runs").in_updates(10, unknown)
    assert Duration(7, "updates").in_updates(unknown, unknown) == 7


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (" 3 steps ", Duration(3, "updates")),
        ("3UPDATES", Duration(3, "updates")),
        ("1 update", Duration(1, "updates")),
        ("1 epoch", Duration(1, "epochs")),
        ("1.e-1", Duration(0.1, "runs")),
        ("2E+1 epochs", Duration(20, "epochs")),
        ("3 of the run", Duration(3, "runs")),
        ("10% OF THE RUN", Duration(0.1, "runs")),
        ("200%", Duration(2, "runs")),
        (0.999, Duration(0.999, "runs")),
    ],
)
def test_the_unit_of_a_duration(said: float | str, read: Duration) -> None:
    assert parse_duration("half_life", said) == read


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (Duration(1000.0, "updates"), "1000 updates"),
        (Duration(2, "epochs"), "2 epochs"),
        (Duration(0.1, "runs"), "0.1 of the run"),
    ],
)
def test_a_duration_in_words(duration: Duration, text: str) -> None:
    assert duration.text == text
    if duration.unit != "updates":
        length = "the run" if duration.unit == "runs" else "an epoch"
        problem = (
            f"'{text}' needs the length of {length}, which is not known here (a loader without length, or no max_steps)"
            ": give it in updates"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
            duration.in_updates(math.inf, math.inf)


def test_what_is_refused_is_named() -> None:
    rule = "warmup must be a number of updates, '2 epochs' or '0.1 of the run', got '2 weeks'"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        parse_duration("warmup", "2 weeks")
    with pytest.raises(ValueError, match=r"^warmup must be a number above 0, got 0\.0$"):
        parse_duration("warmup", "0 %")
    nothing: Any = None
    with pytest.raises(TypeError, match="^warmup must be a number above 0, got None$"):
        parse_duration("warmup", nothing)
