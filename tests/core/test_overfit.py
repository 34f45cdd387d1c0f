import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_recipes.core.criteria import Criterion, Watch
from lightning_recipes.core.dependence import Dependence
from lightning_recipes.core.fits import Fit
from lightning_recipes.core.overfit import Symptoms, activation_of, judge, narrowest, nothing_to_train, shrinks
from lightning_recipes.core.repeats import Repeats

TARGETS = torch.tensor([0, 1, 2, 2])
GIVEN = Dependence(examples=16, targets_given=True, inputs=1, used=True)
HEALTHY = Symptoms(examples=16, known=True, trainable=1000, dependence=GIVEN)
LEARNT = Fit(1.0, 40, 0.02, learnt=True, stuck=False, first_loss=2.3, last_loss=0.05)
FAILED = Fit(1.0, 300, 0.9, learnt=False, stuck=True, first_loss=2.3, last_loss=2.0)


def criterion(logits: Any, targets: Any = TARGETS, loss: Any = functional.cross_entropy, **more: Any) -> Criterion:
    with Watch() as watch:
        loss(logits() if callable(logits) else logits, targets, **more)
    return watch.seen[0].detach_()


def found(fits: Any, **symptoms: Any) -> list[tuple[str, str]]:
    of_dependence = {name: value for name, value in symptoms.items() if name in Dependence.__dataclass_fields__}
    own = {name: value for name, value in symptoms.items() if name not in of_dependence}
    seen = replace(HEALTHY, dependence=replace(GIVEN, **of_dependence), **own)
    return [(finding.rule, finding.severity) for finding in judge(fits, seen)]


SLOW = replace(FAILED, excess=0.2, stuck=False)
RISES = replace(FAILED, excess=50.0, last_loss=-100.0, most_excess=50.0)
TEN = replace(LEARNT, factor=10.0)


@pytest.mark.parametrize(
    ("fits", "symptoms", "first"),
    [
        ([LEARNT], {}, ("overfits a small sample", "info")),
        ([replace(LEARNT, most_excess=40.0)], {}, ("learning rate too high", "info")),
        ([FAILED], {}, ("small sample not learnt", "warning")),
        ([FAILED, TEN], {}, ("learning rate too low", "warning")),
        ([FAILED, replace(FAILED, factor=10.0, excess=0.3)], {}, ("learning rate too low", "warning")),
        ([FAILED, replace(LEARNT, factor=0.01)], {}, ("learning rate too high", "warning")),
        ([SLOW, TEN], {}, ("slow on a small sample", "info")),
        ([SLOW], {}, ("slow on a small sample", "info")),
        ([RISES], {}, ("wrong sign of the loss", "error")),
        ([RISES], {"optimizers": 2}, ("small sample not learnt", "info")),
        ([FAILED], {"one_label": True}, ("labels all alike", "info")),
        ([FAILED], {"activation": "relu"}, ("activation on the logits", "warning")),
        ([FAILED], {"activation": "softmax"}, ("softmax applied twice", "warning")),
        ([FAILED], {"used": False}, ("input without information", "warning")),
        ([FAILED], {"inputs": 0, "used": False}, ("input without information", "warning")),
        ([FAILED], {"unowned": {"a": True}}, ("not in any optimizer", "warning")),
        ([FAILED], {"unowned": {"a": False}}, ("small sample not learnt", "warning")),
        ([FAILED], {"carried": True}, ("gradients not set to zero", "error")),
        ([FAILED], {"far": True}, ("targets not normalised", "warning")),
        ([SLOW], {"far": True}, ("targets not normalised", "info")),
        ([LEARNT], {"shrinks": 0.25}, ("weight decay too large", "warning")),
        ([LEARNT], {"shrinks": 0.005}, ("overfits a small sample", "info")),
        ([LEARNT], {"drops": 0.95}, ("dropout too large", "warning")),
        ([LEARNT], {"drops": 0.8}, ("overfits a small sample", "info")),
        ([LEARNT], {"alone": 0.8}, ("evaluation mode differs", "warning")),
        ([LEARNT], {"alone": 0.3}, ("overfits a small sample", "info")),
        ([FAILED], {"used": False, "without_gradient": ["a.weight"]}, ("input without information", "warning")),
        (
            [FAILED],
            {"used": False, "without_gradient": ["a.weight"], "zeros": ["a.weight"]},
            ("no gradient", "warning"),
        ),
        ([replace(FAILED, first_excess=math.nan)], {}, ("loss not finite", "error")),
        ([replace(LEARNT, excess=-1.0, last_loss=-0.9)], {}, ("no log-probabilities", "warning")),
        ([replace(LEARNT, excess=-1.0, last_loss=-0.9)], {"least_loss": 0.4}, ("no log-probabilities", "warning")),
        ([replace(LEARNT, excess=-1.0, last_loss=0.1)], {"least_loss": 0.4}, ("overfits a small sample", "info")),
        ([FAILED], {"without_gradient": ["a", "b", "c", "d"]}, ("no gradient", "warning")),
        ([LEARNT], {"without_gradient": ["a"]}, ("no gradient", "info")),
        ([LEARNT], {"unmoved": ["a"]}, ("updates lost", "info")),
        ([LEARNT], {"repeats": Repeats(9, 90, 3)}, ("validation data in the training data", "warning")),
        ([LEARNT], {"repeats": Repeats(9, 90, 4)}, ("validation data in the training data", "info")),
        ([LEARNT], {"repeats": Repeats(1, 90, 4)}, ("overfits a small sample", "info")),
        ([LEARNT], {"repeats": Repeats(0, 90, 0, 29)}, ("few validation examples", "info")),
        ([LEARNT], {"repeats": Repeats(0, 90, 0, 30)}, ("overfits a small sample", "info")),
        ([LEARNT], {"shared": ["a"]}, ("parameters in several optimizers", "info")),
        ([LEARNT], {"mixed": True}, ("examples mixed", "warning")),
        ([LEARNT], {"mixed": True, "in_turn": True}, ("examples mixed", "warning")),
        ([LEARNT], {"in_turn": True}, ("examples mixed", "info")),
        ([LEARNT], {"future": True}, ("the future is seen", "error")),
        ([LEARNT], {"copied": True}, ("target is the input", "warning")),
        ([LEARNT], {"column": 2}, ("target among the inputs", "warning")),
        ([LEARNT], {"leaked": True}, ("target among the inputs", "warning")),
        (
            [replace(FAILED, excess=math.inf, first_excess=math.nan, first_loss=-0.02, last_loss=-0.13)],
            {"known": False},
            ("small sample not learnt", "info"),
        ),
        ([FAILED], {"known": False}, ("small sample not learnt", "info")),
        ([FAILED], {"targets_given": False}, ("small sample not learnt", "info")),
        ([FAILED], {"penalty": 0.3}, ("small sample not learnt", "info")),
        ([FAILED], {"frozen": 1000}, ("frozen parameters", "info")),
        ([LEARNT], {"frozen": 1000}, ("overfits a small sample", "info")),
        ([LEARNT], {"frozen": 1000, "untrained": ["head"]}, ("frozen parameters", "info")),
        ([FAILED], {"trainable": 10}, ("small sample not learnt", "info")),
        ([FAILED], {"narrowest": ("a", 2), "outputs": 10}, ("model bias", "warning")),
        ([FAILED], {"narrowest": ("a", 3), "outputs": 12}, ("small sample not learnt", "warning")),
        ([FAILED], {"narrowest": ("a", 2)}, ("small sample not learnt", "warning")),
        ([FAILED, TEN], {"narrowest": ("a", 2), "outputs": 10}, ("learning rate too low", "warning")),
        (
            [FAILED, replace(TEN, excess=0.3, learnt=False)],
            {"narrowest": ("a", 2), "outputs": 10},
            ("learning rate too low", "warning"),
        ),
        ([SLOW], {"narrowest": ("a", 2), "outputs": 10}, ("slow on a small sample", "info")),
        ([FAILED], {"narrowest": ("a", 2), "outputs": 10, "frozen": 1000}, ("frozen parameters", "info")),
        ([FAILED], {"dead": ("net.1", 30, 32)}, ("dead units", "warning")),
        ([LEARNT], {"dead": ("net.1", 30, 32)}, ("dead units", "info")),
        ([FAILED], {"dead": ("net.1", 32, 32), "used": False}, ("dead units", "warning")),
        ([FAILED], {"dead": ("net.1", 32, 32), "used": False, "alike": True}, ("dead units", "warning")),
        (
            [FAILED],
            {"dead": ("net.1", 32, 32), "zeros": ["a"], "used": False},
            ("input without information", "warning"),
        ),
    ],
)
def test_each_outcome_is_named(fits: list[Fit], symptoms: dict[str, Any], first: tuple[str, str]) -> None:
    assert found(fits, **symptoms)[0] == first


@pytest.mark.parametrize(
    ("layers", "narrow"),
    [
        ([nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 8)], ("0", 24)),
        ([nn.GRU(8, 3, bidirectional=True), nn.Linear(6, 8)], ("0", 6)),
        ([nn.LSTM(8, 6, proj_size=2), nn.Linear(2, 8)], ("0", 2)),
        ([nn.GRUCell(8, 2), nn.Linear(2, 8)], ("0", 2)),
        ([nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1), nn.Flatten(), nn.Linear(64, 10)], ("2", 4)),
        ([nn.Sequential(nn.Linear(8, 3)), nn.Linear(3, 8)], ("0.0", 3)),
        ([nn.Linear(1, 8), nn.Linear(8, 1)], ("0", 8)),  # one output at each position
        ([nn.ParameterList([torch.zeros(1, 1, 8)]), nn.LayerNorm(8), nn.Linear(8, 10)], None),
    ],
)
def test_the_narrowest_layer(layers: list[nn.Module], narrow: tuple[str, int] | None) -> None:
    assert narrowest(nn.Sequential(*layers)) == narrow


def test_a_narrow_layer_is_not_blamed_where_there_is_another_cause() -> None:
    narrow: dict[str, Any] = {"narrowest": ("a", 2), "outputs": 10}
    for cause in ({"carried": True}, {"unowned": {"a": True}}):
        assert "model bias" not in dict(found([FAILED], **narrow, **cause))


def test_nothing_to_train_is_an_error() -> None:
    assert nothing_to_train(7).severity == "error"


def test_an_activation_before_the_loss_is_looked_for_where_it_hurts() -> None:
    binary = functional.binary_cross_entropy_with_logits
    assert activation_of([criterion(lambda: torch.zeros(4, 3).softmax(1))]) == "softmax"
    assert activation_of([criterion(lambda: torch.zeros(4, 3).sigmoid(), torch.zeros(4, 3), binary)]) == "sigmoid"
    assert activation_of([criterion(lambda: torch.zeros(4, 3).log_softmax(1))]) == ""
    assert activation_of([criterion(lambda: torch.zeros(4, 3).sigmoid(), torch.zeros(4, 3), functional.mse_loss)]) == ""


def test_what_weight_decay_alone_does_to_the_weights() -> None:
    for make, settings in (
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {}),
        (torch.optim.Adam, {}),
    ):
        weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer: Any = make([weight], lr=0.001, weight_decay=0.5, **settings)
        expected = shrinks(optimizer, optimizer.param_groups[0], 0.001)
        if make is torch.optim.Adam:
            assert expected == 0.0
            continue
        for _ in range(500):  # momentum takes its time
            before = weight.item()
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        assert 1 - weight.item() / before == pytest.approx(expected, rel=0.06)


def messages(fits: Any, **symptoms: Any) -> str:
    return " ".join(finding.text for finding in judge(fits, replace(HEALTHY, **symptoms)))


def test_the_numbers_are_those_that_were_measured() -> None:
    (finding,) = judge([FAILED, replace(FAILED, factor=10.0, excess=0.3, steps=120)], HEALTHY, 7)
    assert finding.step == 7
    assert finding.evidence == {
        "examples": 16,
        "updates": 300,
        "excess": 0.9,
        "first_loss": 2.3,
        "last_loss": 2.0,
        "factor": 10.0,
        "excess_at_factor": 0.3,
    }
    assert (
        "16 examples were not learnt in 300 updates (90% of the loss of a constant output is left)" in finding.message
    )
    assert "with 10 times the learning rate they come down to 30% in 120" in finding.message
    (lower,) = judge([FAILED, replace(LEARNT, factor=0.1), replace(LEARNT, factor=0.01, excess=0.0)], HEALTHY)
    assert "with 1/10 of the learning rate they are in 40" in lower.message  # the nearest that does
    assert "nor with the learning rate times 10, 0.1" in messages(
        [FAILED, replace(FAILED, factor=10.0), replace(FAILED, factor=0.1)]
    )
    assert "(the loss is not finite)" in messages([replace(FAILED, excess=math.inf, last_loss=3.0)])
    assert "(loss 2.3 to 2)" in messages([FAILED], known=False)


def test_why_a_failure_may_be_in_order() -> None:
    for symptoms, reason in (
        ({"known": False}, "what the loss can become is not known"),
        ({"optimizers": 2}, "the objectives of several optimizers"),
        ({"dependence": replace(GIVEN, targets_given=False)}, "targets are made in the training step"),
        ({"penalty": 0.03}, "the loss has other terms"),
        ({"frozen": 3000}, "75% of the parameters are frozen"),
        ({"trainable": 31}, "31 parameters may be too few"),
    ):
        assert f"; {reason}" in messages([FAILED], **symptoms)
    for healthy in ({"penalty": 0.02}, {"trainable": 32}):
        assert found([FAILED], **healthy) == [("small sample not learnt", "warning")]


def test_what_another_learning_rate_would_not_change_is_explained() -> None:
    assert not HEALTHY.explained
    for symptoms in (
        {"known": False},
        {"optimizers": 2},
        {"unowned": {"a": False, "b": True}},
        {"carried": True},
        {"activation": "relu"},
        {"one_label": True},
        {"far": True},
        {"dependence": replace(GIVEN, targets_given=False)},
        {"dependence": replace(GIVEN, used=False)},
        {"dependence": replace(GIVEN, alike=True)},
    ):
        assert replace(HEALTHY, **symptoms).explained, symptoms
    assert not replace(HEALTHY, unowned={"a": False}).explained


def test_the_bounds_of_what_is_said_beside() -> None:
    for at, beyond, rule in (
        ({"drops": 0.85}, {"drops": 0.86}, "dropout too large"),
        ({"shrinks": 0.01}, {"shrinks": 0.011}, "weight decay too large"),
        ({"alone": 0.5}, {"alone": 0.51}, "evaluation mode differs"),
        ({"repeats": Repeats(2, 100)}, {"repeats": Repeats(3, 100)}, "validation data in the training data"),
    ):
        assert found([LEARNT], **at) == [("overfits a small sample", "info")]
        assert found([LEARNT], **beyond)[0] == (rule, "warning")
    assert "leaves one unit in 20" in messages([LEARNT], drops=0.95)
    assert "halves the weights every 3 updates" in messages([LEARNT], shrinks=0.25)
    assert "3 of 100 training examples" in messages([LEARNT], repeats=Repeats(3, 100))
    fits, risen = [replace(LEARNT, most_excess=10.0)], [replace(LEARNT, most_excess=10.1)]
    assert (found(fits)[0][0], found(risen)[0][0]) == ("overfits a small sample", "learning rate too high")
    assert found([replace(LEARNT, most_excess=19.0, first_excess=2.0)])[0][0] == "overfits a small sample"
    for excess, rule in ((-0.03, "overfits a small sample"), (-0.031, "no log-probabilities")):
        assert found([replace(LEARNT, excess=excess)])[0][0] == rule


def test_layers_in_evaluation_mode_and_names() -> None:
    assert found([LEARNT], asleep=["a"])[0] == ("evaluation mode in training", "warning")
    assert ("evaluation mode in training", "info") in found([LEARNT], asleep=["a"], awake=True)
    assert "the layers a, b, c and 1 more are in" in messages([LEARNT], asleep=list("abcd"))
    assert "a, b, c are in" in messages([LEARNT], asleep=list("abc"))
    assert "a start at 0." in messages([FAILED], without_gradient=["a"], zeros=["a"])
    assert ("frozen parameters", "info") not in found([LEARNT], frozen=1000)
    assert "50% of the parameters are frozen; 16 examples were not learnt" in messages([FAILED], frozen=1000)
    assert nothing_to_train(1234).message == "None of the 1,234 parameters requires a gradient."


def test_every_outcome_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    inputs, blind = replace(GIVEN, alike=True), replace(GIVEN, used=False)
    everything = Symptoms(
        examples=16,
        known=True,
        optimizers=2,
        trainable=3000,
        frozen=1000,
        untrained=["body"],
        unowned={"head.weight": True, "teacher.weight": False},
        shared=["head.bias"],
        without_gradient=["a", "b", "c", "d"],
        unmoved=["norm"],
        asleep=["norm", "dropout"],
        dead=("net.1", 30, 32),
        repeats=Repeats(9, 90, 4, 25),
        column=2,
        drops=0.95,
        shrinks=0.0001,
        alone=0.75,
        carried=True,
        batch_norm=True,
        dependence=replace(GIVEN, mixed=True, future=True, copied=True),
    )
    more = replace(
        HEALTHY,
        examples=0,
        without_gradient=["a"],
        zeros=["a"],
        asleep=["norm"],
        awake=True,
        repeats=Repeats(9, 90),
        drops=1.0,
        shrinks=0.25,
        leaked=True,
        dependence=replace(GIVEN, in_turn=True),
    )
    tenth, lower = replace(FAILED, factor=10.0, excess=0.3, steps=120), replace(FAILED, factor=0.1)
    cases: list[tuple[list[Fit], Symptoms]] = [
        ([LEARNT], everything),
        ([FAILED], replace(more, shrinks=0.02)),
        ([LEARNT], replace(HEALTHY, examples=0)),
        ([FAILED], replace(HEALTHY, dead=("", 32, 32), dependence=blind)),
        ([FAILED], replace(HEALTHY, without_gradient=["a"], dependence=replace(GIVEN, mixed=True))),
        ([LEARNT], replace(HEALTHY, frozen=1000, untrained=["head"])),
        ([replace(FAILED, first_excess=math.nan)], HEALTHY),
        ([FAILED], replace(HEALTHY, one_label=True)),
        ([RISES], HEALTHY),
        ([replace(LEARNT, excess=-1.0, last_loss=-0.9)], HEALTHY),
        ([replace(LEARNT, most_excess=40.0)], HEALTHY),
        ([FAILED], replace(HEALTHY, dependence=inputs)),
        ([FAILED], replace(HEALTHY, dependence=blind)),
        ([FAILED], replace(HEALTHY, activation="softmax")),
        ([FAILED], replace(HEALTHY, activation="relu")),
        ([replace(FAILED, first_excess=50.0)], replace(HEALTHY, far=True)),
        ([FAILED, tenth], HEALTHY),
        ([FAILED, lower, replace(LEARNT, factor=0.01)], HEALTHY),
        ([FAILED, TEN], replace(HEALTHY, known=False)),
        ([SLOW, TEN], HEALTHY),
        ([SLOW], HEALTHY),
        ([FAILED], replace(HEALTHY, narrowest=("a", 2), outputs=10)),
        ([FAILED], replace(HEALTHY, carried=True)),
        ([FAILED], replace(HEALTHY, optimizers=2)),
        ([FAILED], replace(HEALTHY, dependence=replace(GIVEN, targets_given=False))),
        ([FAILED], replace(HEALTHY, penalty=0.1)),
        ([FAILED], replace(HEALTHY, frozen=3000)),
        ([FAILED], replace(HEALTHY, trainable=31)),
        ([FAILED, tenth], replace(HEALTHY, trainable=31)),
        ([replace(FAILED, excess=math.inf, last_loss=3.0), lower, replace(lower, factor=0.01)], HEALTHY),
    ]
    word_for_word(nothing_to_train(1234, 5), *(finding for case in cases for finding in judge(*case, 7)))


def test_where_nothing_was_seen_the_training_alone_is_judged() -> None:
    (learnt,) = judge([LEARNT], Symptoms())
    assert learnt.message.endswith("learnt by heart in 40 updates, as they should be.")
    assert (learnt.step, learnt.evidence["examples"]) == (0, 0)
    (failed,) = judge([FAILED], Symptoms())
    assert "(loss 2.3 to 2); what the loss can become is not known." in failed.message
    (failed,) = judge([FAILED], Symptoms(known=True, dependence=GIVEN))
    assert "(90% of the loss of a constant output is left), nor" not in failed.message
    assert failed.severity == "warning"


def test_what_keeps_the_logits_of_which_loss_from_what_they_have_to_be() -> None:
    for activation, loss, squashed in (
        ("softmax", functional.cross_entropy, True),
        ("sigmoid", functional.cross_entropy, True),
        ("relu", functional.cross_entropy, True),
        ("relu6", functional.cross_entropy, True),
        ("tanh", functional.cross_entropy, True),
        ("hardtanh", functional.cross_entropy, True),
        ("log_softmax", functional.cross_entropy, False),
        ("softmax", functional.binary_cross_entropy_with_logits, True),
        ("sigmoid", functional.binary_cross_entropy_with_logits, True),
        ("relu", functional.binary_cross_entropy_with_logits, True),
        ("relu6", functional.binary_cross_entropy_with_logits, False),
        ("tanh", functional.binary_cross_entropy_with_logits, False),
        ("sigmoid", functional.binary_cross_entropy, False),
    ):
        call = replace(
            criterion(torch.full((4, 3), 0.5), TARGETS if loss is functional.cross_entropy else torch.ones(4, 3), loss),
            activation=activation,
        )
        plain = replace(call, activation="")
        assert activation_of([plain, call]) == (activation if squashed else "")
    assert activation_of([]) == ""


def test_weight_decay_is_capped_where_momentum_never_lets_go() -> None:
    weight = torch.ones(1, requires_grad=True)
    for momentum, times in ((0.9, 10), (0.99, 100), (0.999, 100)):
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, weight_decay=0.5)
        assert shrinks(optimizer, optimizer.param_groups[0], 0.25) == pytest.approx(0.125 * times)
