import math

import pytest

from lightning_recipes.core.arguments import check_choice, check_count, check_flag, check_real


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
