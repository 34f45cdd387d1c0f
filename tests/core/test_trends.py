import random

import pytest

from lightning_recipes.core.trends import trend


def test_the_interval_of_a_slope_has_the_truth_in_it_as_often_as_it_says() -> None:
    for correlation in (0.0, 0.9):
        within = 0
        for seed in range(400):
            chance, noise, values = random.Random(seed), 0.0, []
            for place in range(1000):
                noise = correlation * noise + chance.gauss(0, 1)
                values.append(noise - 2 * place / 1000)
            line = trend(values)
            within += abs(line.change + 2) <= line.error
        assert 0.91 <= within / 400 <= 0.99


def test_a_line_is_found_exactly() -> None:
    line = trend([5.0 - 3 * place / 40 for place in range(40)])
    assert line.change == pytest.approx(-3)
    assert line.error == pytest.approx(0, abs=1e-9)
    assert line.falls
