import random

import numpy as np
import pytest
import torch

from lightning_recipes.callbacks.trials import seed_all


@pytest.mark.parametrize("available", [False, True])
def test_every_source_of_random_numbers_is_seeded(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    seed_all(3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
