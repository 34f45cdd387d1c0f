import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from one_rank import one_rank
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_recipes.core import updates as module_under_test
from lightning_recipes.core.updates import UpdateMeter, UpdateRatioRule, update_ratios


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def slow_ratio(before: list[Tensor], after: list[Tensor]) -> float:
    """The definition, element by element, in double precision."""
    changed = math.sqrt(sum(float((b.double() - a.double()).pow(2).sum()) for b, a in zip(before, after)))
    size = math.sqrt(sum(float(b.double().pow(2).sum()) for b in before))
    return changed / size if size else math.nan


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratios_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    net = network().to(dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    layers = [layer for layer in net if list(layer.parameters())]
    owners = [number for number, layer in enumerate(layers) for _ in layer.parameters()]
    for _ in range(5):
        net(torch.randn(32, 6, dtype=dtype)).pow(2).mean().backward()
        before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
        meter = UpdateMeter(list(net.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        after = [[p.detach() for p in layer.parameters()] for layer in layers]
        expected = [slow_ratio(old, new) for old, new in zip(before, after)]
        norms = meter.norms()
        assert norms.dtype is dtype
        # single precision: the difference of two weights is exact, their sizes are summed in another order
        assert update_ratios(norms.tolist(), owners) == pytest.approx(
            expected, rel=1e-5 if dtype is torch.float32 else 1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    weights = [torch.full((100_000,), 100.0, dtype=dtype), torch.full((3, 3), 0.5, dtype=dtype)]
    before = [weight.clone() for weight in weights]
    meter = UpdateMeter(weights)
    weights[0].mul_(1.25)
    weights[1].add_(0.25)
    norms = meter.norms()
    assert norms.dtype is torch.float32
    assert update_ratios(norms.tolist(), [0, 1]) == pytest.approx(
        [slow_ratio([b], [a]) for b, a in zip(before, weights)], rel=1e-6
    )


def test_mixed_kinds_of_tensors_and_edges() -> None:
    weights = [
        torch.ones(3),
        torch.tensor(2.0),  # of no dimension
        torch.ones(2, dtype=torch.float64),
        torch.zeros(4),  # of no size: no ratio
        torch.ones(5),  # does not change
        torch.ones(0),  # an empty shard
        torch.tensor([3 + 4j]),
    ]
    meter = UpdateMeter(weights)
    weights[0] += 0.1
    weights[1] -= 1
    weights[2] *= 1.5
    weights[3] += 1
    weights[6] *= 2
    ratios = update_ratios(meter.norms().tolist(), [0, 1, 2, 3, 4, 0, 5])
    assert ratios[:3] == pytest.approx([0.1, 0.5, 0.5])
    assert not math.isfinite(ratios[3])
    assert ratios[4:] == pytest.approx([0.0, 1.0])


def test_a_bias_of_zero_is_no_edge_beside_its_weight() -> None:
    weights = [torch.full((2, 2), 1.0), torch.zeros(2)]
    meter = UpdateMeter(weights)
    weights[1] += 0.02
    assert update_ratios(meter.norms().tolist(), [0, 0]) == pytest.approx([0.02 * math.sqrt(2) / 2])


def test_an_optimizer_without_anything_to_train() -> None:
    assert update_ratios(UpdateMeter([]).norms().tolist(), []) == []


# ---------------------------------------------------------------------------------------------------------- judgement


def ran(
    ratio: Any, loss: Any, count: int = 60, every: int = 10, rate: Any = lambda share: 0.1, layers: int = 3
) -> UpdateRatioRule:
    """A rule that saw a run; ratio, loss and rate are functions of the share of the run that is over."""
    rule = UpdateRatioRule()
    for number in range(count):
        share = number / count
        wobble = 1 + 0.1 * math.sin(7 * number)
        ratios = {f"layer {layer}": ratio(share) * wobble for layer in range(layers)}
        rule.update(every * number, ratios, loss(share) * wobble**0.3, rate(share))
    return rule


def learns(share: float) -> float:
    return 0.05 + 2 * math.exp(-12 * share)


def creeps(share: float) -> float:
    return 2.3 - share


def stays(share: float) -> float:
    return 2.3


def explodes(share: float) -> float:
    return 2.3 if share < 0.2 else math.nan


@pytest.mark.parametrize(
    ("ratio", "loss", "rate", "expected"),
    [
        (lambda share: 5e-3 * (1 - share), learns, None, None),  # a healthy run, with a linear decay
        (lambda share: 1e-2 * math.exp(-8 * share), learns, None, None),  # converges: the ratio falls
        (lambda share: 3e-4, creeps, None, "too low"),
        (lambda share: 3e-4 * (1 - share), creeps, None, "too low"),
        (lambda share: 3e-4, learns, None, None),  # slow weights and no harm done: fine-tuning
        (lambda share: 3e-4, stays, None, None),  # dead, or hopeless: the ratio cannot tell
        (lambda share: 1e-3 * share, creeps, lambda share: share, None),  # in its warmup
        (lambda share: 1e-3, creeps, lambda share: min(share, 0.45), "too low"),
        # A cubic decay, with a loss that falls as the rates add up: it ends flat.
        (lambda share: 3e-4, lambda share: 0.2 + (1 - share) ** 4, lambda share: (1 - share) ** 3, "too low"),
        (lambda share: 2e-3, lambda share: 0.2 + (1 - share) ** 2, lambda share: 1 - share, None),
        # And with one that falls ever faster.
        (lambda share: 2e-3, lambda share: 2.3 - share**2, None, "too low"),
        (lambda share: 5e-3, lambda share: 2.3 - share**2, None, None),
        (lambda share: 3e-4, lambda share: 2.3 + 4 * share - 6 * share**2, None, None),  # after a rise
        (lambda share: 3e-4, creeps, lambda share: 0.1 if share < 0.98 else 0.0, "too low"),
        (lambda share: 3e-4, creeps, lambda share: 0.0, "too low"),  # the rate is not known
        (lambda share: 3e-2, learns, None, "too high"),
        (lambda share: 1.5e-2, learns, None, "too high"),
        (lambda share: 1e-1 if share < 0.3 else 1e-8, stays, None, "died"),
        (lambda share: 1e-1 if share < 0.3 else 0.0, stays, None, "died"),
        (lambda share: 1e-1 if share < 0.2 else math.nan, explodes, None, "died"),
        (lambda share: 1e-3 if share < 0.3 else 1e-8, stays, None, None),  # died of something else
        (lambda share: 1e-4, lambda share: 2.3 - 4 * share if share < 0.5 else 2.0, None, None),  # gave its gain back
        (lambda share: 0.5 if share == 0 else 4e-3, learns, None, "too high for the start"),
    ],
)
def test_the_verdict(ratio: Any, loss: Any, rate: Any, expected: str | None) -> None:
    rule = ran(ratio, loss, rate=rate or (lambda share: 0.1))
    assert rule.verdict() == expected
    finding = rule.finding()
    assert (finding is None) == (expected is None)
    if finding is not None:
        assert finding.rule == f"learning rate looks too {'low' if expected == 'too low' else 'high'}"
        assert finding.step == 591
        assert expected != "too low" or (finding.severity == "warning") == (rule.peak() < 1.3e-3)
        assert "nan" not in finding.message.replace("is nan", "")


@pytest.mark.parametrize(
    ("ratio", "severity"), [(3e-2, "warning"), (1.5e-2, "info"), (lambda share: 2.0 if not share else 4e-3, "warning")]
)
def test_only_what_is_far_too_high_is_a_warning(ratio: Any, severity: str) -> None:
    finding = ran(ratio if callable(ratio) else lambda share: ratio, learns).finding()
    assert finding is not None
    assert finding.severity == severity


def test_a_loss_below_zero() -> None:
    assert ran(lambda share: 3e-4, lambda share: -1 - 5 * share).verdict() == "too low"
    assert ran(lambda share: 3e-4, lambda share: -5.0).verdict() is None


def test_nothing_is_said_of_few_updates_or_without_a_loss() -> None:
    assert ran(lambda share: 0.1, learns, count=19).verdict() is None
    assert ran(lambda share: 0.1, learns, count=60).verdict(enough=100) is None
    assert ran(lambda share: 3e-4, lambda share: math.nan, count=60).verdict() is None
    assert UpdateRatioRule().finding(enough=0) is None
    assert ran(lambda share: 0.0, stays).finding() is None  # nothing ever moved


def test_an_update_as_large_as_the_weights_is_told_of_however_short_a_run() -> None:
    for first, said in ((0.99, None), (1.01, "too high for the start")):
        for count, every in ((1, 1), (19, 10), (30, 1)):
            assert plain(5e-3, first, count, every).verdict() == said
    finding = plain(5e-3, 1.19, 7).finding()
    assert finding is not None
    assert finding.severity == "warning"
    assert finding.message == "The first update changed the weights by 119% of their size."


def test_the_level_is_that_of_the_layers_with_a_matrix() -> None:
    rule = UpdateRatioRule()
    rule.update(0, {"norm": 1.0, "a": 1e-3, "b": 3e-3, "zero": math.nan, "still": 0.0}, matrices=["a", "b", "zero"])
    assert rule.summary == {"lowest": 1e-3, "median": 2e-3, "highest": 3e-3}
    rule.update(1, {"norm": 1.0, "a": 0.0, "b": 0.0}, matrices=["a", "b"])
    assert rule.summary["median"] == 1.0  # of those that moved
    rule.update(2, {"norm": math.inf})
    assert rule.summary == {}


def test_the_level_and_the_peak_are_of_medians_over_the_layers() -> None:
    rule = UpdateRatioRule()
    for step in range(40):
        rule.update(step, {"a": 1e-4, "b": 1e-3, "c": 5e-3 if 10 <= step < 30 else 1.0}, matrices=["a", "b", "c"])
    assert rule.level() == pytest.approx(1e-3)
    assert rule.peak() == pytest.approx(1e-3)


def test_layers_that_never_move() -> None:
    rule = UpdateRatioRule()
    for step in range(30):
        rule.update(step, {"still": 0.0, "moves": 1e-3, "late": 1e-3 if step > 25 else 0.0, "zero": math.nan})
        assert rule.unmoved() == ([] if step < 19 else ["still"] if step > 25 else ["still", "late"])
    for step in range(30):
        rule.update(step, dict.fromkeys(["still", "moves", "late"], 0.0))  # learning rate 0: nobody's fault
    assert rule.unmoved() == ["still"]
    assert rule.measured == 30


@pytest.mark.parametrize("factor", [1 / 200, 1 / 20, 1.0, 200.0])
def test_a_layer_far_from_the_others(factor: float) -> None:
    rule = UpdateRatioRule()
    for step in range(30):
        ratios = {"a": 1e-3, "b": 2e-3, "c": 1.5e-3 * factor, "d": 1.2e-3}
        rule.update(step, ratios, learns(step / 30))
    found = rule.apart()
    if 1 / 50 < factor < 50:
        assert found is None
    else:
        assert found == (
            "c",
            pytest.approx(1.5e-3 * factor),
            pytest.approx(statistics.median([1e-3, 1.2e-3, 2e-3]), rel=0.5),
        )


def test_memory_is_bounded_and_the_run_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "POINTS", 16)
    rule = ran(lambda share: 5e-3, learns, count=1000)
    assert 8 <= len(rule.points) < 16
    steps = [point[0] for point in rule.points]
    assert steps == [float(10 * rule.points_each * number) for number in range(len(steps))]
    assert steps[-1] >= 8500
    assert rule.measured == 1000


def test_its_state_is_restored_whole() -> None:
    rule = ran(lambda share: 5e-3 if share < 0.9 else math.nan, explodes)
    restored = UpdateRatioRule()
    restored.load_state_dict(rule.state_dict())
    rule.update(1, {"layer 0": 1.0})
    assert str(restored.state_dict()) != str(rule.state_dict())
    restored.update(1, {"layer 0": 1.0})
    assert str(restored.state_dict()) == str(rule.state_dict())


def plain(ratio: float, first: float = 0.0, count: int = 60, every: int = 10, loss: Any = learns) -> UpdateRatioRule:
    """A run whose ratio is the same at each update but for the first one."""
    rule = UpdateRatioRule()
    for number in range(count):
        rule.update(every * number, {"layer": first or ratio} if not number else {"layer": ratio}, loss(number / count))
    return rule


def test_the_bounds_of_the_verdict_are_those_of_its_table() -> None:
    for below, above, verdict in (
        (plain(1.19e-2), plain(1.21e-2), "too high"),
        (plain(5e-3, 0.29), plain(5e-3, 0.31), "too high for the start"),
        (plain(1.31e-3, loss=creeps), plain(1.29e-3, loss=creeps), "too low"),
        (plain(1.99e-2, loss=stays), plain(2.01e-2, loss=stays), "died"),
        (plain(1e-3, 0.049, loss=stays), plain(1e-3, 0.051, loss=stays), "died"),  # a single one that stands out
        (plain(1.5e-2, count=19, every=11), plain(1.5e-2, count=20, every=11), "too high"),
        (plain(1.5e-2, count=40, every=5), plain(1.5e-2, count=41, every=5), "too high"),  # 196 updates, and 201
    ):
        assert (below.verdict(), above.verdict()) == (None, verdict)
    for ratio, first, warns in ((1.99e-2, 0.0, False), (2.01e-2, 0.0, True), (5e-3, 0.9, False), (5e-3, 1.1, True)):
        finding = plain(ratio, first).finding()
        assert finding is not None
        assert (finding.severity == "warning") == warns


def test_a_run_has_died_that_gains_less_than_a_tenth_or_gives_a_third_back() -> None:
    for gain, back, died in ((0.19, 0.0, True), (0.21, 0.0, False), (1.0, 0.29, False), (1.0, 0.31, True)):
        rule = plain(
            3e-2,
            loss=lambda share, g=gain, b=back: 2.0 if share < 0.2 else 2.0 - g if share < 0.7 else 2.0 - g + b,
        )
        assert (rule.verdict() == "died") == died


def test_a_loss_that_begins_about_0_has_not_died() -> None:
    def fit(level: float, last: float = 0.0) -> UpdateRatioRule:
        rule = UpdateRatioRule()
        for number in range(60):
            loss = level + (0.05 if number % 2 else -0.05) - (0.1 if 10 <= number < 30 else 0.0)
            rule.update(10 * number, {"layer": 3e-2 if number < 20 else 1e-3}, last if number > 40 and last else loss)
        return rule

    assert fit(0.01).verdict() is None  # as that of a policy gradient, whose reward may rise
    assert fit(0.01, math.nan).verdict() == "died"
    assert fit(0.2).verdict() == fit(-0.2).verdict() == "died"
    assert ran(lambda share: 3e-2 if share < 0.3 else 1e-3, lambda share: 0.01 + 9 * share).verdict() == "died"


def test_a_run_that_stays_where_it_began_has_learned_nothing_rather_than_died() -> None:
    for loss, idle in (
        (lambda share: 2.3, True),
        (lambda share: 2.3 if share < 0.3 or share > 0.6 else 1.0, False),
        (lambda share: 2.3 if share < 0.3 else 23.0, False),
        (lambda share: 2.3 if share < 0.3 else math.nan, False),
    ):
        finding = plain(3e-2, loss=loss).finding()
        assert finding is not None
        assert ("in a run that has learned nothing" in finding.message) is idle
        assert ("before the run died" in finding.message) is not idle


def test_a_gain_is_steady_that_is_not_made_early() -> None:
    for early, late, low in ((0.4, 0.3, True), (0.75, 0.2, False), (0.4, 0.03, False)):
        gained = [0.0, early, 1 - late, 1.0, 1.0]  # of all, at the beginning, a quarter, the half, seven eighths
        rule = plain(
            3e-4,
            count=400,
            every=1,
            loss=lambda share, y=gained: 3 - float(numpy.interp(share, [0.0, 0.25, 0.5, 0.87, 1.0], y)),
        )
        assert (rule.verdict() == "too low") == low


def test_a_gain_behind_the_half_counts_beyond_its_noise() -> None:
    for noise, low in ((0.0, True), (0.3, True), (1.5, False)):
        rule = plain(
            3e-4, count=400, every=1, loss=lambda share, n=noise: 2.3 - share + n * ((round(400 * share) + 2) % 5 - 2)
        )
        assert (rule.verdict() == "too low") == low


def test_the_finding_has_what_was_measured() -> None:
    rule = plain(1.5e-2, 0.1)
    finding = rule.finding()
    assert finding is not None
    assert finding.evidence == {
        "verdict": "too high",
        "highest_ratio": 1.5e-2,
        "middle_ratio": 1.5e-2,
        "first_ratio": 0.1,
        "first_loss": learns(0.0),
        "last_loss": pytest.approx(learns(0.87), rel=0.05),
        "measured_updates": 60,
    }
    later = UpdateRatioRule()
    later.update(5, {"layer": 0.9})
    assert later.kick == 0.0  # not of the first update


def test_parameters_without_an_optimizer_are_named_up_to_three() -> None:
    finding = module_under_test.not_optimized(list("abcdefg"), True)
    assert (finding.severity, finding.evidence["count"]) == ("warning", 7)
    assert "No optimizer has a, b, c and 4 more, though they get a gradient." in finding.message
    finding = module_under_test.not_optimized(list("abc"), False)
    assert finding.severity == "info"
    assert "a, b, c, nor do they" in finding.message


def test_what_ratios_say_is_kept_word_for_word(word_for_word: Callable[..., None]) -> None:
    def falls(share: float) -> float:
        return 2.25 - share

    rules = [
        plain(5e-4, loss=falls),
        plain(2e-3, count=400, every=1, loss=lambda share: 2.25 - share**2),
        plain(1.5e-2),
        plain(5e-2),
        plain(5e-3, 0.5),
        plain(5e-3, 1.25, 7),
        plain(3e-2, loss=lambda share: 2.25),
        plain(3e-2, loss=lambda share: 2.25 if share < 0.3 or share > 0.6 else 1.0),
        plain(3e-2, loss=lambda share: 2.25 if share < 0.3 else math.nan),
    ]
    absent = [module_under_test.not_optimized(list("abcde"), has_gradient) for has_gradient in (True, False)]
    word_for_word(*(rule.finding() for rule in rules), *absent)


def test_a_state_is_plain_data_and_a_rule_goes_on_from_it() -> None:
    def feed(rule: UpdateRatioRule, steps: range) -> None:
        for step in steps:
            ratios = {"body": 1e-3 * (1 + step % 3), "norm": 0.5 if step else 0.1, "still": 0.0}
            rule.update(step, ratios, 2.0 - step / 100, 0.1, matrices=["body", "still"])

    whole, first, second = UpdateRatioRule(), UpdateRatioRule(), UpdateRatioRule()
    feed(whole, range(60))
    feed(first, range(25))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.summary == first.summary
    feed(second, range(25, 60))
    assert second.state_dict() == whole.state_dict()
    assert {*whole.state_dict()} == {
        "points", "points_each", "step", "seen", "measured", "kick", "first_loss", "layers", "matrices", "newest",
    }  # fmt: skip
    assert (second.kick, second.first_loss, second.step) == (1e-3, 2.0, 59)
    assert second.unmoved() == ["still"]


def test_a_part_of_a_run_is_of_one_measured_update_at_least() -> None:
    rule = UpdateRatioRule()
    assert (rule.level(), rule.peak()) == (0.0, 0.0)
    for step in range(4):
        rule.update(step, {"layer": 10.0**-step})
    assert [rule.level(share, share) for share in (0.0, 0.25, 0.5, 0.75)] == [1.0, 0.1, 0.01, 0.001]
    assert rule.level() == pytest.approx(0.055)  # of the second and the third
    assert rule.level(0, 1) == rule.level(0.25, 0.75)
    assert rule.peak() == 1.0
    for step in range(4, 10):
        rule.update(step, {"layer": 1e-6})
    assert rule.peak() == 0.1  # but for the highest tenth


def test_the_norms_of_dtensors_are_those_of_the_whole() -> None:
    with one_rank() as mesh:
        weights = [
            distribute_tensor(torch.tensor([[3.0], [4.0]]), mesh, [Shard(0)]),
            torch.full((4,), 3.0),
            distribute_tensor(torch.full((9,), 2.0), mesh, [Replicate()]),
            distribute_tensor(torch.tensor([[6.0, 8.0]]), mesh, [Shard(0)]),
        ]
        meters = UpdateMeter(weights), UpdateMeter(weights, lambda squares: squares * 4)
        for factor, weight in zip((0.5, 1.0, 2.0, 3.0), weights, strict=True):
            weight *= factor
        for meter, of_whole in zip(meters, (1.0, 2.0), strict=True):
            expected = torch.tensor([[5.0, 6.0, 6.0, 10.0], [2.5, 0.0, 6.0, 20.0]])
            assert torch.equal(meter.norms(), of_whole * expected)
