import math
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from one_rank import one_rank
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_recipes.core.clipping import NormHistory, PercentileThreshold, clipping_factor, scale_, total_norm


def share_at_or_below(value: float, norms: Sequence[float]) -> float:
    return sum(norm <= value for norm in norms) / len(norms)


def percentile_of(norms: Sequence[float], percentile: float) -> float:
    """The definition: the smallest norm with at least that share of the norms at or below it."""
    return min(norm for norm in norms if 100 * share_at_or_below(norm, norms) >= percentile - 1e-9)


def reference(
    seen: Sequence[float],
    last_threshold: float,
    percentile: float,
    window: int,
    warmup_steps: int,
    weight_norm: float = math.inf,
) -> float:
    """The rule as its docstring has it, taken anew from all norms that were seen."""
    if not seen:
        return weight_norm if warmup_steps else math.inf
    recent, last = seen[-min(window, 200) :], seen[-window:]
    bound = min(2 * percentile_of(recent, 75), 4 * percentile_of(recent, 50))
    plain = percentile_of(last, percentile)
    if len(seen) < warmup_steps:
        threshold = min(bound, weight_norm) if len(seen) < 10 else bound
    elif plain <= bound:
        threshold = plain
    else:
        threshold = percentile_of([norm for norm in last if norm <= bound], percentile)
    return min(threshold, percentile_of(recent, 50)) if seen[-1] > 10 * last_threshold else threshold


def healthy(count: int, seed: int = 0, deviation: float = 0.5) -> list[float]:
    """A stationary stream of norms, in single precision as gradients give them."""
    generator = random.Random(seed)
    return [torch.tensor(generator.lognormvariate(0, deviation)).item() for _ in range(count)]


def thresholds(rule: PercentileThreshold, norms: Sequence[float]) -> list[float]:
    return [rule.update(norm) for norm in norms]


def wild(count: int, seed: int) -> list[float]:
    """A stream with everything in it: outliers, zeros, NaN and infinity."""
    generator = random.Random(seed)
    norms = healthy(count, seed, deviation=0.8)
    return [generator.choice([math.nan, math.inf, 1e5, 0.0]) if generator.random() < 0.1 else norm for norm in norms]


@pytest.mark.parametrize("percentile", [1, 10, 50, 90, 99.5])
@pytest.mark.parametrize(("window", "warmup_steps"), [(1, 0), (2, 1), (10, 0), (30, 20), (120, 20)])
def test_the_threshold_is_its_definition(percentile: float, window: int, warmup_steps: int) -> None:
    rule = PercentileThreshold(percentile, window, warmup_steps)
    seen: list[float] = []
    last_threshold = math.inf
    for norm in wild(200, seed=window):
        threshold = rule.update(norm, weight_norm=1.5)
        assert threshold == reference(seen, last_threshold, percentile, window, warmup_steps, 1.5)
        if 0 < norm < math.inf:
            seen.append(norm)
            last_threshold = threshold


def test_a_healthy_stream_meets_the_plain_percentile() -> None:
    norms = healthy(2000)
    measured = thresholds(PercentileThreshold(90, window=500, warmup_steps=20), norms)
    for step in range(50, 2000, 50):
        assert measured[step] == percentile_of(norms[max(0, step - 500) : step], 90)


def skewed(kind: str, count: int) -> list[float]:
    generator = random.Random(1)
    draws = {
        "lognormal 0.2": lambda: generator.lognormvariate(0, 0.2),
        "lognormal 0.5": lambda: generator.lognormvariate(0, 0.5),
        "lognormal 0.9": lambda: generator.lognormvariate(0, 0.9),
        "exponential": lambda: generator.expovariate(1),
        "half normal": lambda: abs(generator.gauss(0, 1)),
        "uniform": lambda: generator.uniform(0.5, 1.5),
    }
    return [draws[kind]() for _ in range(count)]


@pytest.mark.parametrize(
    "kind", ["lognormal 0.2", "lognormal 0.5", "lognormal 0.9", "exponential", "half normal", "uniform"]
)
def test_of_a_stationary_stream_ten_percent_are_clipped(kind: str) -> None:
    norms = skewed(kind, 6000)
    measured = thresholds(PercentileThreshold(), norms)
    clipped = sum(norm > threshold for norm, threshold in zip(norms[1000:], measured[1000:], strict=True)) / 5000
    assert clipped == pytest.approx(0.10, abs=0.03)


def test_a_spike_is_judged_by_the_past_not_by_itself() -> None:
    rule = PercentileThreshold(window=100)
    before = thresholds(rule, healthy(100))[-1]
    assert rule.update(1e6) == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize("seen", [15, 30, 100, 1500])
def test_a_burst_of_spikes_does_not_open_the_gate(seen: int) -> None:
    rule = PercentileThreshold()
    thresholds(rule, [1.0 + 0.1 * math.sin(step) for step in range(seen)])
    first, *others = thresholds(rule, [1e5] * 10)
    assert first < 2.2
    assert max(others) < 1.1


def test_outliers_in_a_fifth_of_the_updates_leave_the_percentile_of_the_others() -> None:
    generator = random.Random(2)
    norms = [1e4 if generator.random() < 0.2 else norm for norm in healthy(3000, deviation=0.3)]
    measured = thresholds(PercentileThreshold(), norms)
    clean = [norm for norm in norms if norm < 100]
    assert measured[-1] == pytest.approx(percentile_of(clean, 90), rel=0.1)


def test_a_level_that_has_changed_is_followed() -> None:
    rule = PercentileThreshold()
    thresholds(rule, healthy(1500))
    measured = thresholds(rule, [10 * norm for norm in healthy(1500, seed=1)])
    assert measured[0] < 3
    assert measured[250] > 10  # a part of the window is enough: not all of it has to pass
    assert measured[-1] == pytest.approx(10 * math.exp(1.28 * 0.5), rel=0.15)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing_but_its_count(bad: float) -> None:
    rule, other = PercentileThreshold(window=20), PercentileThreshold(window=20)
    norms = healthy(50)
    assert thresholds(other, norms) == [
        threshold
        for norm, threshold in zip([*norms[:30], bad, *norms[30:]], thresholds(rule, [*norms[:30], bad, *norms[30:]]))
        if math.isfinite(norm)
    ]
    assert (rule.nonfinite, rule.count) == (1, 50)
    assert str({**rule.state_dict(), "nonfinite": 0}) == str(other.state_dict())


def test_a_gradscalers_skipped_updates_are_not_counted() -> None:
    rule = PercentileThreshold()
    rule.counts_nonfinite = False
    rule.update(math.inf)
    rule.update(torch.tensor(math.nan))
    rule.flush()
    assert rule.nonfinite == 0


def test_the_first_gradients_are_held_to_the_length_of_the_weights() -> None:
    rule = PercentileThreshold(warmup_steps=20)
    assert rule.update(1e6, weight_norm=7.0) == 7.0
    assert rule.update(1e6, weight_norm=0.1) == 7.0  # nor does the first outlier excuse the second
    for _ in range(8):
        rule.update(1.0)
    assert rule.update(5.0) == 2.0


def test_weights_of_length_zero_hold_nothing_back() -> None:
    assert PercentileThreshold().update(3.0, weight_norm=0.0) == math.inf
    assert PercentileThreshold().update(torch.tensor(3.0), weight_norm=torch.tensor(0.0)).item() == math.inf


def test_without_warmup_the_first_gradient_passes() -> None:
    rule = PercentileThreshold(warmup_steps=0)
    assert rule.update(1e6, weight_norm=7.0) == math.inf


@pytest.mark.parametrize("window", [1, 3, 50, 1000])
@pytest.mark.parametrize("warmup_steps", [0, 3, 20])
def test_tensors_get_the_same_thresholds_as_numbers(window: int, warmup_steps: int) -> None:
    numbers, tensors = (PercentileThreshold(90, window, warmup_steps) for _ in range(2))
    for norm in wild(600, seed=window):
        expected = numbers.update(norm, 1.5)
        measured = tensors.update(torch.tensor(norm), torch.tensor(1.5))
        assert isinstance(measured, Tensor)
        assert measured.item() == expected
    assert str(numbers.state_dict()) == str(tensors.state_dict())
    assert numbers.clipped_fraction() == tensors.clipped_fraction()


def test_tensors_are_read_before_they_are_forgotten() -> None:
    rule = PercentileThreshold(window=10)
    for norm in healthy(2500):
        rule.update(torch.tensor(norm))
    assert rule.count == 2000
    rule.flush()
    assert (rule.count, rule.history.count) == (2500, 2500)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("cut", [0, 5, 30, 700])
def test_a_resumed_rule_goes_on_as_if_nothing_had_been(cut: int, as_tensor: bool) -> None:
    norms = [torch.tensor(norm) if as_tensor else norm for norm in wild(800 + cut, seed=3)]
    whole, first, second = (PercentileThreshold(window=300) for _ in range(3))
    expected = [float(whole.update(norm, 2.0)) for norm in norms]
    measured = [float(first.update(norm, 2.0)) for norm in norms[:cut]]
    second.load_state_dict(first.state_dict())
    measured += [float(second.update(norm, 2.0)) for norm in norms[cut:]]
    assert measured == expected
    assert str(second.state_dict()) == str(whole.state_dict())


def test_state_is_what_was_seen_not_what_was_asked() -> None:
    old = PercentileThreshold(90, window=100)
    norms = healthy(300)
    thresholds(old, norms)
    for as_tensor in (False, True):
        new = PercentileThreshold(50, window=40)
        new.load_state_dict(old.state_dict())
        measured = new.update(torch.tensor(1.0) if as_tensor else 1.0)
        assert float(measured) == percentile_of(norms[-40:], 50)


def test_the_state_can_be_loaded_safely(tmp_path: object) -> None:
    rule = PercentileThreshold()
    thresholds(rule, wild(100, seed=5))
    torch.save(rule.state_dict(), f"{tmp_path}/state")
    loaded = torch.load(f"{tmp_path}/state", weights_only=True)
    assert str(loaded) == str(rule.state_dict())


def test_the_state_does_not_grow_with_the_run() -> None:
    def size(rule: PercentileThreshold) -> int:
        state = rule.state_dict()
        tensors = [state["norms"], state["thresholds"], *state["history"].values()]
        return sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))

    rule = PercentileThreshold(window=100)
    thresholds(rule, healthy(5000))
    early = size(rule)
    thresholds(rule, healthy(50_000, seed=1))
    assert size(rule) < 1.5 * early


def test_clipped_fraction_and_typical_factor_are_those_of_the_window() -> None:
    rule = PercentileThreshold(window=10, warmup_steps=0)
    measured = thresholds(rule, [1.0] * 10 + [4.0] * 3)
    assert (rule.clipped_fraction(), rule.typical_factor()) == (0.3, 1.0)
    rising = [5 * 1.5**step for step in range(10)]
    measured = thresholds(rule, rising)
    factors = sorted(min(1, threshold / norm) for norm, threshold in zip(rising, measured, strict=True))
    assert rule.clipped_fraction() == sum(factor < 1 for factor in factors) / 10 > 0.5
    assert rule.typical_factor() == factors[5] < 1
    assert (PercentileThreshold().clipped_fraction(), PercentileThreshold().typical_factor()) == (0.0, 1.0)


def test_a_share_is_no_percentile() -> None:
    with pytest.raises(
        ValueError, match=r"percentile is in percent: at 0.9 nearly every update is clipped; 90 is usual"
    ):
        PercentileThreshold(percentile=0.9)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"percentile": 0}, "percentile"),
        ({"percentile": 100}, "percentile"),
        ({"percentile": math.nan}, "percentile"),
        ({"percentile": "90"}, "percentile"),
        ({"window": 0}, "window"),
        ({"window": 10.5}, "window"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{name} must be .*, got "):
        PercentileThreshold(**arguments)  # type: ignore[arg-type]


def test_history_keeps_every_extreme_in_bounded_memory() -> None:
    history = NormHistory()
    norms = healthy(30_000)
    norms[12_345] = 1e6
    norms[23_456] = 1e-6
    for norm in norms:
        history.add(norm, 2.0)
    assert len(history.low) <= NormHistory.POINTS
    assert history.updates_per_point * len(history.low) >= 30_000
    assert (max(history.high), min(history.low)) == (1e6, 1e-6)
    point = 12_345 // history.updates_per_point
    covered = norms[point * history.updates_per_point : (point + 1) * history.updates_per_point]
    assert (history.low[point], history.high[point]) == (min(covered), max(covered))


def test_history_knows_the_percentiles_of_all_norms() -> None:
    history = NormHistory()
    norms = [0.0, 0.0, *healthy(1500, deviation=1.5)]
    for norm in norms:
        history.add(norm, math.inf)
    for percentile in (10, 50, 90, 99):
        exact = percentile_of(norms, percentile)
        assert history.percentile(percentile) == pytest.approx(exact, rel=0.011)
        assert history.share_above(exact) == pytest.approx(1 - percentile / 100, abs=0.01)
    assert sum(count for *_, count in history.histogram()) == 1502
    assert history.histogram()[0] == (0.0, 0.0, 2)
    assert NormHistory().percentile(90) == 0.0
    octave = NormHistory()
    for step in range(1000):
        octave.add(1 + step / 1000, math.inf)
    assert len(octave.histogram()) == 64


def test_total_norm_is_the_norm_of_everything() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    expected = torch.cat([tensor.flatten() for tensor in tensors]).double().norm()
    assert total_norm(tensors).item() == pytest.approx(expected.item(), rel=1e-6)
    assert total_norm([]).item() == 0.0


def test_total_norm_of_half_precision_is_single_precision() -> None:
    tensors = [torch.randn(1000, dtype=torch.bfloat16), torch.randn(10)]
    expected = torch.cat([tensor.double() for tensor in tensors]).norm()
    norm = total_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


def test_total_norm_and_scaling_of_sparse_gradients() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert total_norm([gradient, torch.ones(2)]).item() == pytest.approx(math.sqrt(4 * 4 + 4 + 2))
    scale_([gradient], 0.5)
    assert total_norm([gradient]).item() == pytest.approx(math.sqrt(20) / 2)


def test_total_norm_is_no_less_accurate_than_torchs() -> None:
    tensors = [torch.randn(300, 1000), torch.randn(100_000), torch.randn(10)]
    exact = math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))
    own, torchs = total_norm(tensors).item(), torch.nn.utils.get_total_norm(tensors).item()
    assert abs(own - exact) <= abs(torchs - exact) + 1e-7 * exact


@pytest.mark.parametrize(
    ("norm", "threshold", "factor"),
    [(4, 1, 0.25), (1, 1, 1), (0.5, 1, 1), (math.nan, 1, 1), (math.inf, 1, 1), (3, 0, 1), (3, math.inf, 1), (0, 0, 1)],
)
def test_clipping_factor(norm: float, threshold: float, factor: float) -> None:
    assert clipping_factor(norm, threshold) == factor
    assert clipping_factor(torch.tensor(float(norm)), torch.tensor(float(threshold))).item() == factor


def test_scaling_by_a_number_or_a_tensor() -> None:
    for factor in (0.5, torch.tensor(0.5)):
        gradients = [torch.ones(3), torch.ones(2, 2)]
        scale_(gradients, factor)
        assert all(torch.equal(gradient, torch.full_like(gradient, 0.5)) for gradient in gradients)


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "tensor"])
def test_norms_of_0_leave_no_trace(make: type[float]) -> None:
    """As of a loss that counts at two updates in five: an explosion is clipped all the same."""
    norms = [norm if step % 5 < 2 else 0.0 for step, norm in enumerate(healthy(500))]
    rule, without = PercentileThreshold(warmup_steps=5), PercentileThreshold(warmup_steps=5)
    for norm in norms:
        rule.update(make(norm))
    thresholds(without, [norm for norm in norms if norm])
    assert float(rule.update(make(1e6))) == pytest.approx(without.update(1e6), rel=1e-6)
    rule.flush()
    assert (rule.count, rule.nonfinite) == (201, 0)
    assert rule.clipped_fraction() == without.clipped_fraction() < 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"percentile": 0.5}, "percentile is in percent: at 0.5 nearly every update is clipped; 90 is usual"),
        ({"percentile": 100}, "percentile must be a number above 0 and below 100, got 100"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wanted(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        PercentileThreshold(**arguments)


def test_the_defaults_are_those_that_are_documented() -> None:
    rule = PercentileThreshold()
    assert (rule.percentile, rule.window, rule.warmup_steps, rule.counts_nonfinite) == (90.0, 1000, 20, True)
    assert (rule.count, rule.nonfinite, rule.weight_norm, rule.threshold()) == (0, 0, None, math.inf)
    assert (rule.clipped_fraction(), rule.typical_factor()) == (0.0, 1.0)
    assert PercentileThreshold(1).percentile == 1.0


def test_the_history_is_written_with_the_threshold_of_each_update() -> None:
    history = NormHistory()
    for step in range(NormHistory.POINTS + 3):
        history.add(float(1 + step % 4), float(step))
    assert (history.updates_per_point, history.count) == (2, NormHistory.POINTS + 3)
    assert (len(history.low), len(history.high), len(history.thresholds)) == (1026, 1026, 1026)
    assert (history.low[:2], history.high[:2]) == ([1.0, 3.0], [2.0, 4.0])
    assert history.thresholds[:2] == [1.0, 3.0]  # the last of each
    assert (history.low[-2:], history.high[-2:], history.thresholds[-2:]) == ([1.0, 3.0], [2.0, 3.0], [2049.0, 2050.0])
    assert history.share_above(2.5) == pytest.approx(0.5, abs=0.001)
    assert NormHistory().share_above(1.0) == 0.0
    state, restored = history.state_dict(), NormHistory()
    assert {*state} == {"count", "updates_per_point", "curve", "bins", "zeros"}
    restored.load_state_dict(state)
    for each in (history, restored):
        each.add(0.0, 7.0)
    assert restored.low == history.low
    assert (restored.high, restored.thresholds, restored.bins) == (history.high, history.thresholds, history.bins)
    assert (restored.zeros, restored.histogram()) == (1, history.histogram())


def test_a_norm_is_read_of_tensors_of_every_kind() -> None:
    mixed = [torch.full((4,), 2.0, dtype=torch.float64), torch.full((9,), 1.0, dtype=torch.float16)]
    norm = total_norm(mixed)
    assert (norm.dtype, norm.item()) == (torch.float64, 5.0)
    for size in (2**16, 2**16 + 4):  # in one tensor, or one by one
        assert total_norm([torch.ones(size - 4), torch.ones(4)]).item() == pytest.approx(math.sqrt(size))
    scale_([], 0.5)


def test_dtensors_are_clipped_as_one_with_the_others() -> None:
    with one_rank() as mesh:
        gradients = [distribute_tensor(torch.tensor([each]), mesh, [Shard(0)]) for each in (2.0, 4.0)]
        gradients += [torch.tensor([4.0, 8.0]), torch.tensor([21.0], dtype=torch.float16)]
        assert total_norm(gradients).item() == pytest.approx(math.sqrt(4 + 16 + 16 + 64 + 441))
        scale_(gradients, 0.5)
        assert [each.full_tensor().item() for each in gradients[:2]] == [1.0, 2.0]
        assert [each.tolist() for each in gradients[2:]] == [[2.0, 4.0], [10.5]]
        assert total_norm(gradients[:2]).item() == pytest.approx(math.sqrt(5))


def test_what_was_read_is_not_read_again() -> None:
    rule = PercentileThreshold()
    for _ in range(2):
        for norm in (1.0, math.nan, 0.0, 2.0):
            rule.update(torch.tensor(norm))
        for _ in range(3):
            rule.flush()
    assert (rule.count, rule.nonfinite) == (4, 2)


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "tensor"])
def test_a_norm_at_the_bound_is_within_it(make: Any) -> None:
    rule = PercentileThreshold(window=100, warmup_steps=0)
    for norm in [9.0] * 13 + [2.0] * 12 + [1.0] * 75:  # the bound is twice the upper quartile
        rule.update(make(norm))
    assert float(rule.update(make(1.0))) == 2.0  # nine tenths of 87, and not of 75


def test_a_parameter_is_a_tensor_like_others() -> None:
    weights = [torch.nn.Parameter(torch.full((4,), 2.0)), torch.full((9,), 1.0)]
    assert total_norm(weights).item() == 5.0
