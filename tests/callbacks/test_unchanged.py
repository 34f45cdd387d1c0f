import random

import numpy as np
import pytest
import torch

from lightning_recipes.callbacks.unchanged import isolate_rng


def test_random_states_are_put_back_after_an_exception_too() -> None:
    def state() -> str:
        return str([torch.get_rng_state(), np.random.get_state(), random.getstate()])

    before = state()
    with pytest.raises(ValueError, match="drawn"), isolate_rng():
        raise ValueError(f"drawn {torch.rand(())}, {np.random.rand()}, {random.random()}")
    assert state() == before
