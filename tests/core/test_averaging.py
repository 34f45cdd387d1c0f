import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from one_rank import one_rank
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_recipes.core.averaging import ExponentialMovingAverage, decay_at, decay_from_half_life


def walk(steps: int, size: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, size, generator=generator).cumsum(0).to(dtype))


def follow(ema: ExponentialMovingAverage, positions: list[Tensor], tensor: Tensor | None = None) -> Tensor:
    """Hand the positions over one after the other; return the average."""
    tensor = positions[0].clone() if tensor is None else tensor
    tensors = {"x": tensor}
    for position in positions:
        tensor.copy_(position)
        ema.update(tensors)
    return ema.averages.get("x", torch.zeros(0))


def reference(positions: list[Tensor], decay: float) -> Tensor:
    """Each position with its weight: what it came in with, times every later decay."""
    decays = [decay_at(update, decay) for update in range(1, len(positions) + 1)]
    weights = [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(len(decays))]
    assert sum(weights) == pytest.approx(1)
    return sum((weight * position.double() for weight, position in zip(weights, positions)), torch.zeros(3).double())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 10, 300])
def test_the_average_is_its_definition(decay: float, steps: int) -> None:
    positions = walk(steps)
    average = follow(ExponentialMovingAverage(decay), positions)
    torch.testing.assert_close(average.double(), reference(positions, decay), rtol=1e-4, atol=1e-4)


def test_the_first_average_is_a_copy_and_nothing_before_it_counts() -> None:
    weight = torch.tensor([100.0])
    ema = ExponentialMovingAverage(0.999)
    assert not ema.exists
    weight.fill_(1.0)
    ema.update({"x": weight})
    assert ema.exists
    assert ema.averages["x"].item() == 1.0
    assert ema.averages["x"] is not weight


def test_the_first_updates_are_forgotten_soon() -> None:
    plain_would_keep = 0.999**100
    share_of_the_first_ten = math.prod(decay_at(update, 0.999) for update in range(11, 101))
    assert share_of_the_first_ten < 1e-12 < plain_would_keep


@pytest.mark.parametrize("every", [2, 4, 7])
def test_a_stride_has_the_same_memory_in_updates(every: int) -> None:
    ema = ExponentialMovingAverage(0.9, every_n_steps=every)
    tensor = torch.zeros(1)
    for _ in range(every * 100 + 1):  # long after the decay has warmed up, just after a move
        ema.update({"x": tensor})
    tensor.fill_(1.0)
    moved = []
    for _ in range(2 * every):
        ema.update({"x": tensor})
        moved.append(ema.averages["x"].item())
    assert moved == pytest.approx([0.0] * (every - 1) + [1 - 0.9**every] * every + [1 - 0.9 ** (2 * every)])


def test_start_step_is_the_number_of_updates_that_are_left_out() -> None:
    positions = walk(50)
    ema = ExponentialMovingAverage(0.9, start_step=30)
    follow(ema, positions[:30])
    assert not ema.exists
    assert not ema.averages
    average = follow(ema, positions[30:])
    torch.testing.assert_close(average.double(), reference(positions[30:], 0.9), rtol=1e-4, atol=1e-4)


def test_a_larger_batch_with_the_decay_to_that_power_is_the_same_average() -> None:
    fine = [torch.full((3,), step / 400) for step in range(1, 401)]
    coarse = fine[3::4]
    for decay in (0.95, 0.998):
        small = follow(ExponentialMovingAverage(decay), fine)
        large = follow(ExponentialMovingAverage(decay**4), coarse)
        torch.testing.assert_close(small, large, rtol=0, atol=0.01)


def test_half_life() -> None:
    assert decay_from_half_life(10) ** 10 == pytest.approx(0.5)


def test_a_tensor_that_appears_later_starts_from_its_value_then() -> None:
    ema = ExponentialMovingAverage(0.9)
    first, second = torch.zeros(2), torch.full((2,), 5.0)
    for _ in range(20):
        ema.update({"first": first})
    ema.update({"first": first, "second": second})
    assert torch.equal(ema.averages["second"], second)
    ema.update({"first": first, "second": second + 1})
    assert torch.all((ema.averages["second"] > 5) & (ema.averages["second"] < 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_single_precision_and_put_back_exactly(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, dtype=dtype)
    ema = ExponentialMovingAverage(0.999)
    for _ in range(20_000 // 10):
        ema.update({"x": tensor})
    tensor.fill_(1.01)
    target = tensor.float()
    for _ in range(2000):
        ema.update({"x": tensor})
    assert ema.averages["x"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["x"], target, rtol=0, atol=0.3 * (target[0].item() - 1))

    average, raw = ema.averages["x"].clone(), tensor.clone()
    ema.exchange_({"x": tensor})
    assert torch.equal(tensor, average.to(dtype))
    assert torch.equal(ema.average({"x": tensor})["x"], average)
    assert torch.equal(ema.raw({"x": tensor})["x"], raw)
    ema.exchange_({"x": tensor})
    assert torch.equal(tensor, raw)
    assert torch.equal(ema.averages["x"], average)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_while_a_tensor_holds_its_average_is_in_the_average_after(dtype: torch.dtype) -> None:
    tensor, ema = torch.tensor([0.1, 0.2, 0.3]).to(dtype), ExponentialMovingAverage(0.9)
    ema.update({"x": tensor})
    ema.update({"x": tensor * 1.1})
    average, raw = ema.averages["x"].clone(), tensor.clone()
    ema.exchange_({"x": tensor})
    tensor[1] = 7.0
    ema.exchange_({"x": tensor})
    assert torch.equal(tensor, raw)
    assert torch.equal(ema.averages["x"], torch.stack([average[0], torch.tensor(7.0), average[2]]))


def test_exchange_is_in_place_and_undoes_itself() -> None:
    positions = walk(30)
    tensor = positions[0].clone()
    ema = ExponentialMovingAverage(0.9)
    average = follow(ema, positions, tensor).clone()
    tensors, raw, memory = {"x": tensor}, tensor.clone(), tensor.data_ptr()
    for _ in range(2):
        assert torch.equal(ema.average(tensors)["x"], average)
        assert torch.equal(ema.raw(tensors)["x"], raw)
        ema.exchange_(tensors)
        assert ema.exchanged
        assert torch.equal(tensor, average)
        assert torch.equal(ema.average(tensors)["x"], average)
        assert torch.equal(ema.raw(tensors)["x"], raw)
        ema.exchange_(tensors)
        assert torch.equal(tensor, raw)
    assert tensor.data_ptr() == memory


def test_exchange_does_nothing_before_there_is_an_average() -> None:
    ema, tensor = ExponentialMovingAverage(start_step=5), torch.ones(2)
    ema.update({"x": tensor})
    ema.exchange_({"x": tensor})
    assert not ema.exchanged
    assert torch.equal(tensor, torch.ones(2))


def skipping(ema: ExponentialMovingAverage, positions: list[Tensor], skipped: set[int]) -> None:
    """The updates of a fused optimizer under a GradScaler: where one is skipped, the tensor stays."""
    tensor = torch.zeros(3)
    tensors: Mapping[str, Tensor] = {"x": tensor}
    remaining = iter(positions)
    for attempt in range(len(positions) + len(skipped)):
        if attempt not in skipped:
            tensor.copy_(next(remaining))
        ema.update(tensors, skipped=torch.tensor(float(attempt in skipped)))


@pytest.mark.parametrize("start_step", [0, 3])
def test_a_skipped_update_leaves_no_trace(start_step: int) -> None:
    positions = walk(40)
    skipped, never = (ExponentialMovingAverage(0.9, start_step=start_step) for _ in range(2))
    skipping(skipped, positions, {0, 1, 5, 20, 43})
    follow(never, positions)
    assert skipped.updates == never.updates == 40
    assert skipped.exists
    torch.testing.assert_close(skipped.averages["x"], never.averages["x"], rtol=1e-5, atol=1e-5)


def test_only_skipped_updates_make_no_average() -> None:
    ema = ExponentialMovingAverage(0.9)
    skipping(ema, [], {0, 1, 2})
    assert not ema.exists
    assert ema.updates == 0


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("skipped", [set(), {1, 7}])
def test_a_resumed_average_goes_on_as_if_nothing_had_been(every: int, skipped: set[int]) -> None:
    positions = walk(40)

    def run(cut: int | None) -> ExponentialMovingAverage:
        ema = ExponentialMovingAverage(0.95, every_n_steps=every)
        tensor = torch.zeros(3)
        for attempt, position in enumerate(positions):
            if attempt == cut:
                state = ema.state_dict()
                ema = ExponentialMovingAverage(0.95, every_n_steps=every)
                ema.load_state_dict(state)
            if attempt not in skipped:
                tensor.copy_(position)
            ema.update({"x": tensor}, torch.tensor(float(attempt in skipped)) if skipped else None)
        return ema

    assert torch.equal(run(None).averages["x"], run(17).averages["x"])
    assert str(run(None).state_dict()) == str(run(17).state_dict())


def test_what_is_loaded_goes_on_in_a_rule_that_has_averaged_already() -> None:
    positions = walk(60)
    whole, used = ExponentialMovingAverage(0.9), ExponentialMovingAverage(0.9)
    tensors = {"x": torch.zeros(3)}
    for position in positions[:20]:
        tensors["x"].copy_(position)
        used.update(tensors)
    follow(whole, positions[:40])
    used.load_state_dict(whole.state_dict())
    used.averages = {"x": used.averages["x"].clone()}
    for position in positions[40:]:
        tensors["x"].copy_(position)
        used.update(tensors)
    assert torch.equal(used.averages["x"], follow(whole, positions[40:]))


def test_the_same_mapping_is_gone_through_once() -> None:
    class Counted(dict[str, Tensor]):
        looks = 0

        def items(self) -> Any:
            self.looks += 1
            return super().items()

    tensors, ema = Counted(x=torch.zeros(3)), ExponentialMovingAverage(0.9)
    for _ in range(10):
        ema.update(tensors)
    assert tensors.looks == 1


def test_state_is_what_was_seen_not_what_was_asked() -> None:
    old, new = ExponentialMovingAverage(0.999), ExponentialMovingAverage(0.5)
    follow(old, walk(100))
    new.load_state_dict(old.state_dict())
    assert new.decay == 0.5
    assert new.updates == 100


def test_averages_on_another_device_are_kept_there() -> None:
    ema = ExponentialMovingAverage(0.9, device="meta")
    ema.update({"x": torch.zeros(2)})
    ema.update({"x": torch.ones(2)})
    assert ema.averages["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"decay": 0}, "decay"),
        ({"decay": 1.0}, "decay"),
        ({"decay": math.nan}, "decay"),
        ({"decay": "0.9"}, "decay"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{name} must be .*, got "):
        ExponentialMovingAverage(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"decay": 1}, "decay must be a number above 0 and below 1, got 1"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"start_step": -1}, "start_step must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wanted(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        ExponentialMovingAverage(**arguments)


def test_the_defaults_are_those_that_are_documented() -> None:
    ema = ExponentialMovingAverage()
    assert (ema.decay, ema.every_n_steps, ema.start_step, ema.device) == (0.999, 1, 0, None)
    assert (ema.updates, ema.exists, ema.exchanged, ema.averages) == (0, False, False, {})
    assert decay_at(1, 0.9) == 0.0
    assert decay_at(2, 0.9) == 3 / 20


def test_the_state_has_counters_and_the_averages_unless_they_are_exchanged() -> None:
    ema, tensors = ExponentialMovingAverage(0.5, every_n_steps=2), {"x": torch.ones(1)}
    assert ema.state_dict() == {"updates": 0, "pending": 1.0, "attempts": 0, "moved": False, "averages": {}}
    for _ in range(4):
        ema.update(tensors)
    state = ema.state_dict()
    assert state.pop("averages") == {"x": torch.ones(1)}
    assert json.loads(json.dumps(state)) == state == {
        "updates": 4, "pending": pytest.approx(5 / 22), "attempts": 0, "moved": True,
    }  # fmt: skip
    ema.exchange_(tensors)
    assert ema.state_dict()["averages"] == {}
    loaded = ExponentialMovingAverage(0.5)
    loaded.exchanged = True
    loaded.load_state_dict({**state, "averages": {"x": torch.zeros(1)}})
    assert (loaded.exchanged, loaded.updates, loaded.exists) == (False, 4, True)


def test_averages_of_what_is_gone_or_has_another_shape_start_anew() -> None:
    ema = ExponentialMovingAverage(0.9)
    tensors = {name: torch.ones(3) for name in ("kept", "gone", "lazy", "grown")}
    for _ in range(3):
        ema.update(tensors)
    now = {"kept": torch.zeros(3), "lazy": nn.UninitializedParameter(), "grown": torch.zeros(4)}
    ema.adapt(now)
    assert [*ema.averages] == ["kept"]
    now.pop("lazy")
    ema.update(now)
    assert ema.averages["grown"].tolist() == [0.0] * 4
    assert 0 < float(ema.averages["kept"][0]) < 1
    tensors["kept"].fill_(math.nan)  # the tensors of before are let go
    ema.update(now)
    assert torch.isfinite(ema.averages["kept"]).all()


def test_a_stride_may_skip_updates_too() -> None:
    ema, tensors = ExponentialMovingAverage(0.9, every_n_steps=2), {"x": torch.zeros(1)}
    for _ in range(200):
        ema.update(tensors, torch.tensor(0.0))
    tensors["x"].fill_(1.0)
    ema.update(tensors, torch.tensor(1.0))
    ema.update(tensors, torch.tensor(0.0))
    assert ema.averages["x"].item() == pytest.approx(0.1)  # of one update
    assert ema.updates == 201
    assert ema.state_dict()["attempts"] == 202


def test_dtensors_are_averaged_and_exchanged_shard_by_shard() -> None:
    with one_rank() as mesh:
        tensors = {"x": distribute_tensor(torch.zeros(2), mesh, [Shard(0)]), "y": torch.zeros(2)}
        ema = ExponentialMovingAverage(0.5)
        for _ in range(5):
            for tensor in tensors.values():
                tensor += 1
            ema.update(tensors)
        assert type(ema.averages["x"]) is Tensor
        assert torch.equal(ema.averages["x"], ema.averages["y"])
        average = ema.averages["x"].clone()
        ema.exchange_(tensors)
        assert torch.equal(ema.average(tensors)["x"], average)
        assert ema.raw(tensors)["x"].tolist() == [5.0, 5.0]
        assert torch.equal(tensors["x"].full_tensor(), average)
        ema.exchange_(tensors)
        assert tensors["x"].full_tensor().tolist() == [5.0, 5.0]
        ema.adapt(tensors)
        assert [*ema.averages] == ["x", "y"]
