import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_recipes.core.arguments import (
    check_choice,
    check_count,
    check_flag,
    check_list,
    check_name,
    check_real,
)


@pytest.mark.parametrize("value", [0, 100, -1, 101, math.nan, math.inf])
def test_a_number_outside_the_interval_is_refused_with_its_name_and_value(value: float) -> None:
    with pytest.raises(ValueError, match=r"percentile must be a number above 0 and below 100, got "):
        check_real("percentile", value, 0, 100)


@pytest.mark.parametrize("value", ["90", True, None, [90]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="percentile must be a number"):
        check_real("percentile", value, 0, 100)


def test_a_number_without_upper_bound() -> None:
    assert check_real("half_life", 3, 0, math.inf) == 3.0
    with pytest.raises(ValueError, match=r"half_life must be a number above 0, got inf"):
        check_real("half_life", math.inf, 0, math.inf)


def test_any_finite_number() -> None:
    assert check_real("target_loss", -3, -math.inf, math.inf) == -3.0
    with pytest.raises(ValueError, match="target_loss must be a finite number, got nan"):
        check_real("target_loss", math.nan, -math.inf, math.inf)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_count_is_a_whole_number_of_at_least_its_minimum(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="window must be a whole number of at least 1, got"):
        check_count("window", value, 1)
    assert check_count("window", 1, 1) == 1


def test_a_choice_names_the_choices() -> None:
    assert check_choice("buffers", "copy", ("average", "copy")) == "copy"
    with pytest.raises(ValueError, match="buffers must be 'average' or 'copy', got 'none'"):
        check_choice("buffers", "none", ("average", "copy"))


def test_a_flag_is_true_or_false() -> None:
    assert check_flag("measure_only", False) is False
    with pytest.raises(TypeError, match="measure_only must be True or False, got 'no'"):
        check_flag("measure_only", "no")


def test_the_bounds_of_an_interval_are_named_where_there_are_any() -> None:
    assert check_real("share", Fraction(1, 2), 0, 1) == 0.5
    assert isinstance(check_real("share", 1, 0, 2), float)
    with pytest.raises(ValueError, match="^share must be a number below 1.5, got 1.5$"):
        check_real("share", 1.5, -math.inf, 1.5)
    with pytest.raises(TypeError, match="^share must be a number above 0 and below 1, got 'x'$"):
        check_real("share", "x", 0, 1)
    assert type(check_count("window", np.int64(3), 3)) is int
    with pytest.raises(ValueError, match="^window must be a whole number of at least 3, got 2$"):
        check_count("window", 2, 3)
    with pytest.raises(TypeError, match=r"^window must be a whole number of at least 3, got 4\.0$"):
        check_count("window", 4.0, 3)


@pytest.mark.parametrize("value", ["", None, 3])
def test_a_name_is_a_string_with_something_in_it(value: object) -> None:
    assert check_name("monitor", "val_loss", "a metric") == "val_loss"
    with pytest.raises(TypeError, match=f"^monitor must be the name of a metric, got {value!r}$"):
        check_name("monitor", value, "a metric")


@pytest.mark.parametrize("value", ["10", {"a": 1}, 3, None])
def test_a_list_is_anything_like_one_but_words_and_mappings(value: object) -> None:
    for given in ([1, 2], (1, 2), np.array([1, 2]), iter([1, 2])):
        assert check_list("milestones", given, "durations") == (1, 2)
    with pytest.raises(TypeError, match=f"^milestones must be a list of durations, got {value!r}$"):
        check_list("milestones", value, "durations")
