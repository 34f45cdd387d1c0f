"""What a rule says, kept in files, so that each change of a word or a number is seen."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_regressions.data_regression import DataRegressionFixture

from lightning_recipes.core.findings import Finding


@pytest.fixture
def word_for_word(request: pytest.FixtureRequest, data_regression: DataRegressionFixture) -> Callable[..., None]:
    """Compares findings and other plain data with the module's file in ``words/``; ``--force-regen`` writes it anew."""

    def check(*told: Any) -> None:
        path = request.path.parent / "words" / f"{request.path.stem.removeprefix('test_')}.yml"
        plain = [each.as_dict() if isinstance(each, Finding) else each for each in told]
        data_regression.check({"told": plain}, fullpath=path, round_digits=4)

    return check
