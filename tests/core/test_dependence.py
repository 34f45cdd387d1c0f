import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_recipes.core.criteria import Watch
from lightning_recipes.core.dependence import (
    Dependence,
    examples_of,
    first_examples,
    labels_alike,
    look,
    varied_examples,
)


def run(step: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    def criteria(batch: Any) -> Any:
        torch.manual_seed(0)
        with Watch() as watch:
            loss = step(batch)
        return watch.part_of(loss)

    return criteria


NET = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
BATCH = (torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0, 1, 2]))


def classify(change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Any], Any]:
    return run(lambda batch: functional.cross_entropy(NET(change(batch[0])), batch[1]))


def test_an_ordinary_step() -> None:
    found = look(classify(), BATCH)
    assert (found.examples, found.inputs, found.used, found.targets_given) == (8, 1, True, True)
    assert [found.mixed, found.fed, found.alike, found.future, found.copied] == [False] * 5
    assert len(found.zeroed) == 1


def others_alone(inputs: Tensor) -> Tensor:
    """No example has a part in its own output."""
    return inputs.sum(0) - inputs


def two_before(inputs: Tensor) -> Tensor:
    return inputs + inputs.roll(1, 0) + inputs.roll(2, 0)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.t().reshape(x.shape), lambda x: x - x.mean(0), lambda x: x.cumsum(0), others_alone, two_before],
)
def test_examples_that_are_mixed(change: Any) -> None:
    assert look(classify(change), BATCH).mixed


def test_what_a_mixup_mixes_is_not_a_defect() -> None:
    assert not look(classify(lambda x: 0.5 * x + 0.5 * x.roll(1, 0)), BATCH).mixed


STEPS_IN_TIME = (torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40).view(8, 5) % 3)


@pytest.mark.parametrize(
    ("change", "mixed", "in_turn"),
    [
        (lambda x: x.cumsum(0), False, True),
        (lambda x: x.cumsum(0) + 2 * x.flip(0).cumsum(0).flip(0), True, False),
        (lambda x: x - x.mean(0), True, False),
        (lambda x: x.cumsum(1), False, False),
    ],
)
def test_examples_that_depend_on_those_before_them_may_be_steps_in_time(
    change: Any, mixed: bool, in_turn: bool
) -> None:
    step = run(lambda b: functional.cross_entropy(NET(change(b[0])).flatten(0, 1), b[1].flatten()))
    found = look(step, STEPS_IN_TIME)
    assert (found.mixed, found.in_turn) == (mixed, in_turn)


def test_one_target_an_example_is_none_of_steps_in_time() -> None:
    found = look(classify(lambda x: x.cumsum(0)), BATCH)
    assert (found.mixed, found.in_turn) == (True, False)


def test_the_next_token_of_a_row_shows_that_rows_are_no_steps_in_time() -> None:
    net = Tokens(False)
    net.rnn.batch_first = False
    step = run(lambda b: flat(net(b[0]), b[1]))
    found = look(step, (IDS[:, :-1], IDS[:, 1:].clone()))
    assert (found.next_token, found.mixed, found.in_turn) == (True, True, False)
    found = look(step, (IDS[:, :-1].T, IDS[:, 1:].T.contiguous()))
    assert (found.next_token, found.mixed, found.in_turn) == (False, False, True)


def mixup(chance: torch.Generator, batch: Any) -> Tensor:
    share = torch.rand((), generator=chance)
    logits = NET(share * batch[0] + (1 - share) * batch[0].flip(0))
    return share * functional.cross_entropy(logits, batch[1]) + functional.cross_entropy(logits, batch[1].flip(0))


def test_of_outputs_by_random_numbers_of_their_own_nothing_is_told() -> None:
    chance = torch.Generator().manual_seed(0)
    found = look(run(lambda b: mixup(chance, b)), BATCH)
    assert (found.targets_given, found.inputs, found.used) == (True, 1, True)
    assert [found.mixed, found.in_turn, found.fed, found.future] == [False] * 4
    assert not found.zeroed
    targets = run(lambda b: functional.mse_loss(NET(b[0]), torch.randn(8, 3, generator=chance)))
    assert not look(targets, BATCH).targets_given


def test_an_input_that_is_not_used_and_one_that_is_alike() -> None:
    assert not look(classify(torch.zeros_like), BATCH).used
    same = look(classify(), (BATCH[0][:1].expand(8, 6), BATCH[1]))
    assert same.alike
    assert not same.used


def test_targets_made_in_the_step_are_known_as_such() -> None:
    step = run(lambda batch: functional.cross_entropy(NET(batch[0]) @ NET(batch[0]).T, torch.arange(len(batch[0]))))
    found = look(step, BATCH)
    assert not found.targets_given
    assert not found.mixed


def test_outputs_that_are_no_numbers_tell_nothing() -> None:
    found = look(classify(lambda x: x.cumsum(0) * torch.nan), BATCH)
    assert not found.mixed
    assert not found.used


def test_a_few_columns_of_numbers_are_no_tokens() -> None:
    batch = (torch.stack([BATCH[1] * 0, BATCH[1]], 1), BATCH[1])
    found = look(run(lambda b: functional.cross_entropy(b[0].float() @ torch.ones(2, 3), b[1])), batch)
    assert not found.next_token


def test_a_target_that_is_fed_to_the_network() -> None:
    step = run(lambda b: functional.cross_entropy(NET(b[0]) + functional.one_hot(b[1], 3), b[1]))
    assert look(step, BATCH).fed
    assert not look(classify(), BATCH).fed


class Tokens(nn.Module):
    def __init__(self, both_ways: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.letters = nn.Embedding(20, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(16 if both_ways else 8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.letters(ids))[0])  # type: ignore[no-any-return]


IDS = torch.randint(20, (6, 13), generator=torch.Generator().manual_seed(0))


def flat(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.reshape(-1, 20), targets.reshape(-1))


STEPS: dict[str, tuple[Callable[[nn.Module], Callable[[Any], Tensor]], Any]] = {
    "pairs": (
        lambda net: lambda b: functional.cross_entropy(net(b[0]).transpose(1, 2), b[1]),
        (IDS[:, :-1], IDS[:, 1:].clone()),
    ),
    "flat": (lambda net: lambda b: flat(net(b[0]), b[1]), (IDS[:, :-1].contiguous(), IDS[:, 1:].clone())),
    "ids alone": (lambda net: lambda b: flat(net(b["ids"][:, :-1]), b["ids"][:, 1:]), {"ids": IDS}),
    "shifted inside": (
        lambda net: lambda b: flat(net(b["ids"])[:, :-1], b["labels"][:, 1:]),
        {"ids": IDS, "labels": IDS.clone()},
    ),
}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("both_ways", [False, True])
def test_tokens_that_see_the_future(form: str, both_ways: bool) -> None:
    make, batch = STEPS[form]
    found = look(run(make(Tokens(both_ways))), batch)
    assert found.next_token
    assert found.future == both_ways
    assert not found.copied
    assert not found.mixed
    assert (found.least_loss > 0) == (not both_ways and len(set(IDS[:, 0].tolist())) < 6)


def test_the_least_loss_is_the_entropy_of_what_follows() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 3, 4, 5, 6, 7]])  # after the first token one of two, then all is known
    make, _ = STEPS["ids alone"]
    found = look(run(make(Tokens(False))), {"ids": ids})
    assert found.least_loss == pytest.approx(2 * torch.log(torch.tensor(2.0)).item() / 10)


CATEGORIES = torch.eye(6)[[0, 0, 0, 0, 1, 1, 2, 2]]
LABELS = torch.tensor([0, 1, 1, 1, 2, 2, 0, 1])
NUMBERS = torch.tensor([1.0, 3.0, 1.0, 3.0, 7.0, 7.0, -5.0, -5.0])
# Of four examples one label in four, of two all, of two each another; of four a variance of 1.
ENTROPY = (4 * (0.25 * math.log(4) + 0.75 * math.log(4 / 3)) + 2 * math.log(2)) / 8


@pytest.mark.parametrize(
    ("loss", "targets", "least"),
    [
        (functional.cross_entropy, LABELS, ENTROPY),
        (lambda o, y: functional.nll_loss(o.log_softmax(1), y), LABELS, ENTROPY),
        (lambda o, y: functional.binary_cross_entropy_with_logits(o[:, 0], y), (LABELS == 0).float(), ENTROPY),
        (lambda o, y: functional.mse_loss(o[:, 0], y), NUMBERS, 0.5),
        (lambda o, y: functional.l1_loss(o[:, :1], y[:, None]), NUMBERS, 0.5),
        (lambda o, y: functional.cross_entropy(o, y, weight=torch.arange(1.0, 4)), LABELS, 0.0),  # cannot be told
        (lambda o, y: functional.cross_entropy(o, y) + functional.mse_loss(o, o * 0), LABELS, 0.0),
    ],
)
def test_the_least_loss_of_equal_inputs_with_other_targets(loss: Any, targets: Tensor, least: float) -> None:
    step = run(lambda b: loss(NET(b["x"]), b["y"]))
    assert look(step, {"x": CATEGORIES, "y": targets}).least_loss == pytest.approx(least, abs=1e-6)
    numbered = {"number": torch.arange(8), "x": CATEGORIES, "y": targets}  # which no output depends on
    assert look(step, numbered).least_loss == pytest.approx(least, abs=1e-6)
    assert look(step, {"x": torch.arange(48.0).view(8, 6), "y": targets}).least_loss == 0


def test_inputs_that_tell_hardly_anything_set_no_least_loss() -> None:
    assert (
        look(classify(), (torch.eye(6)[[0, 0, 0, 0, 1, 1, 1, 1]], torch.tensor([0, 1, 2, 0, 0, 1, 2, 0]))).least_loss
        == 0
    )


@pytest.mark.parametrize("both_ways", [False, True])
def test_targets_that_are_the_input(both_ways: bool) -> None:
    make, _ = STEPS["pairs"]
    found = look(run(make(Tokens(both_ways))), (IDS, IDS.clone()))
    assert found.copied == (not both_ways)
    assert not found.future


def test_targets_that_are_shifted_in_the_step_are_not_the_input() -> None:
    net = Tokens(False)
    step = run(lambda b: flat(net(functional.pad(b[0][:, :-1], (1, 0), value=19)), b[1]))
    assert not look(step, (IDS, IDS)).copied
    assert not look(step, (IDS, IDS.clone())).copied


def test_tags_of_tokens_may_depend_on_what_comes_later() -> None:
    make, _ = STEPS["pairs"]
    found = look(run(make(Tokens(True))), (IDS, (IDS * 7 + 3) % 20))
    assert [found.next_token, found.future, found.copied] == [False] * 3


def test_taking_examples_of_a_batch() -> None:
    assert examples_of({"x": torch.ones(5, 2), "y": (torch.ones(5),)}) == 5
    assert examples_of([torch.ones(5, 2), torch.ones(4)]) == 0
    assert examples_of([torch.ones(5, 2), "name"]) == 0
    assert examples_of([torch.ones(5, 2), torch.ones(())]) == 0
    graph = torch.eye(5).to_sparse(), torch.ones(5, 2)
    assert examples_of(graph) == 0
    assert first_examples(graph, 3) is graph
    assert first_examples((torch.arange(5),), 3)[0].tolist() == [0, 1, 2]
    ragged = [torch.ones(5), torch.ones(4)]
    assert first_examples(ragged, 3) is ragged


def test_labels_that_are_alike_are_made_up_for() -> None:
    batches = [(torch.zeros(4, 2), torch.tensor([1, 1, 1, 1])), (torch.ones(4, 2), torch.tensor([0, 1, 2, 1]))]
    assert [labels_alike(batch) for batch in batches] == [True, False]
    assert labels_alike((torch.zeros(4, 2), torch.ones(4, 1).long()))
    assert not labels_alike((torch.zeros(4, 2), torch.ones(4, 3)))
    assert not labels_alike((torch.ones(4, 2).long(), torch.ones(4)))  # neither is a label
    assert sorted(varied_examples(batches, 4)[1].tolist()) == [0, 1, 1, 2]


def test_labels_that_are_alike_are_made_up_for_from_one_batch_where_each_is_padded_by_itself() -> None:
    alike, other = torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 1, 0])
    batches = [
        {"x": torch.zeros(4, 7), "y": alike},
        {"x": torch.ones(4, 2), "y": alike},
        {"x": torch.ones(4, 3), "y": other},
    ]
    sample = varied_examples(batches, 3)
    assert sample["x"].shape == (3, 3)
    assert sorted(sample["y"].tolist()) == [0, 1, 1]
    assert varied_examples(batches[:2], 3)["x"].shape == (3, 7)


def test_what_is_found_later_is_added() -> None:
    for name in ("used", "fed", "mixed", "in_turn", "future"):
        for earlier, later in ((True, False), (False, True)):
            either = Dependence(8, **{name: earlier}).or_(Dependence(8, **{name: later}))
            assert either == Dependence(8, **{name: True})
    assert Dependence(8).or_(Dependence(4, True, 2, alike=True, next_token=True, copied=True)) == Dependence(8)
    first = Dependence()
    assert first.or_(first) is first


def test_of_too_many_tensors_or_a_single_example_nothing_is_found_out() -> None:
    step = run(lambda b: functional.cross_entropy(NET(b[0]), b[-1]))
    inputs, labels = BATCH
    more = [torch.arange(8.0)] * 11
    assert look(step, (inputs, *more[:10], labels)).used
    assert look(step, (inputs, *more, labels)) == Dependence(8)
    assert look(step, (inputs[:2], labels[:2])).used
    assert look(step, (inputs[:1], labels[:1])) == Dependence(1)
    assert look(lambda batch: [], BATCH) == Dependence(8)


def test_a_step_that_does_not_take_what_is_changed_says_nothing_of_it() -> None:
    def refuses(batch: Any) -> Tensor:
        assert torch.equal(batch[0], BATCH[0])
        return functional.cross_entropy(NET(batch[0]), batch[1])

    found = look(run(refuses), BATCH)
    assert (found.targets_given, found.inputs, found.used, found.zeroed) == (True, 0, False, [])
    calls: list[int] = []

    def fails_again(batch: Any) -> Tensor:
        calls.append(1)
        assert len(calls) == 1
        return functional.cross_entropy(NET(batch[0]), batch[1])

    assert look(run(fails_again), BATCH) == Dependence(8)
    shorter = run(lambda b: functional.cross_entropy(NET(b[0])[: len(b[0]) - int(b[0][0, 0] != BATCH[0][0, 0])], b[1]))
    assert not look(shorter, BATCH).used


@pytest.mark.parametrize(("share", "mixed"), [(0.9e-4, False), (1.1e-4, True)])
def test_a_change_of_a_ten_thousandth_is_rounding(share: float, mixed: bool) -> None:
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1, 2])

    def step(batch: Any) -> Tensor:
        numbers = batch[0].double()
        return functional.cross_entropy(numbers + share * (numbers.sum(0) - numbers), batch[1])

    inputs = torch.zeros(8, 3)
    inputs[1] = 1.0  # takes the place of the first one
    assert look(run(step), (inputs, labels)).mixed is mixed


@pytest.mark.parametrize("first", [False, True])
def test_two_examples_in_turn_are_no_steps_in_time_and_all_after_the_first_half_are(first: bool) -> None:
    """The first half must not notice what is done to the second one."""
    weight = 2e-4 if first else 0.5e-4

    def step(batch: Any) -> Tensor:
        numbers = batch[0].double()
        half = numbers.cumsum(0) + weight * numbers.flip(0).cumsum(0).flip(0) * (torch.arange(8) < 4).view(8, 1, 1)
        return functional.cross_entropy(half.flatten(0, 1), batch[1].flatten())

    inputs = torch.zeros(8, 5, 3)
    inputs[1:4] = 1.0
    found = look(run(step), (inputs, STEPS_IN_TIME[1]))
    assert (found.mixed, found.in_turn) == (first, not first)


@pytest.mark.parametrize(
    ("rows", "length", "wrong", "ignored", "seen"),
    [
        (6, 12, 0, 0, True),
        (6, 12, 3, 0, True),  # 95 % of the targets are the next tokens
        (6, 12, 4, 0, False),
        (6, 12, 4, 24, False),
        (6, 12, 0, 24, True),
        (2, 4, 0, 0, True),
        (2, 4, 0, 1, False),  # seven tell nothing
        (6, 3, 0, 0, False),  # a few columns are no tokens
    ],
)
def test_targets_are_the_next_tokens_if_nearly_all_of_them_are(
    rows: int, length: int, wrong: int, ignored: int, seen: bool
) -> None:
    net = Tokens(False)
    ids = torch.randint(20, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    wanted = ids[:, 1:].clone().flatten()
    wanted[-wrong or len(wanted) :] += 1
    wanted[:ignored] = -100
    step = run(lambda b: functional.cross_entropy(net(b[0])[:, :-1].transpose(1, 2), b[1], ignore_index=-100))
    found = look(step, (ids, (wanted % 20).where(wanted >= 0, wanted).view(rows, length)))
    assert found.next_token is seen


def test_targets_that_are_all_one_token_tell_nothing() -> None:
    net = Tokens(False)
    step = run(lambda b: flat(net(b[0]), b[1]))
    ones = torch.ones(6, 12, dtype=torch.long)
    ones[:, 0] = torch.arange(6)
    found = look(step, (ones, ones.roll(-1, 1).clamp(1, 1)))
    assert not found.next_token


@pytest.mark.parametrize(("place", "nats"), [(31, 2 * math.log(2) / 80), (32, 0.0)])
def test_tokens_after_thirty_two_are_taken_for_known(place: int, nats: float) -> None:
    ids = torch.arange(41).repeat(2, 1) % 20
    ids[1, place + 1 :] += 1
    net = Tokens(False)
    step = run(lambda b: flat(net(b["ids"][:, :-1]), b["ids"][:, 1:]))
    found = look(step, {"ids": ids % 20})
    assert found.next_token
    assert found.least_loss == pytest.approx(nats)


@pytest.mark.parametrize(("apart", "least"), [(2.1, 9.0), (1.9, 0.0)])
def test_inputs_that_explain_a_tenth_set_a_least_loss(apart: float, least: float) -> None:
    """Of two kinds with a variance of 9 each; of all it is 10.1 or 9.9."""
    step = run(lambda b: functional.mse_loss(NET(b[0])[:, 0], b[1]))
    batch = (torch.eye(6)[[0, 0, 1, 1]], torch.tensor([0.0, 6.0, apart, 6 + apart]))
    assert look(step, batch).least_loss == pytest.approx(least)


def test_the_first_examples_and_labels_of_a_batch() -> None:
    whole = (torch.arange(5),)
    assert first_examples(whole, 5) is whole
    assert first_examples(whole, 4)[0].tolist() == [0, 1, 2, 3]
    assert examples_of(torch.ones(())) == examples_of([]) == examples_of(["name"]) == 0
    assert not labels_alike((torch.zeros(4, 2), torch.ones(4)))  # numbers are no labels
    assert not labels_alike([torch.ones(4, 1).long(), torch.ones(3)])
    labels = torch.tensor([3, 3, 3, 1, 3, 1, 2])
    batch = {"x": torch.arange(7.0).view(7, 1), "y": labels.view(7, 1)}
    varied = varied_examples([batch], 5)
    assert varied["y"].flatten().tolist() == [3, 1, 2, 3, 1]
    assert varied["x"].flatten().tolist() == [0, 3, 6, 1, 5]


def equal_halves(batch: Any) -> bool:
    return bool(torch.equal(batch[0][:4], batch[0][4:]))


def first_is_another(batch: Any) -> bool:
    return bool(torch.equal(batch[0][0], batch[0][1]))


@pytest.mark.parametrize(("of", "mixed"), [(equal_halves, True), (first_is_another, False)])
@pytest.mark.parametrize("how", ["raises", "nan", "nothing", "fewer"])
def test_what_a_step_does_not_do_for_a_changed_batch_is_not_told(of: Any, mixed: bool, how: str) -> None:
    """Steps in time, of which it is not seen that they are none, or that there are others."""

    def step(batch: Any) -> Tensor:
        logits, targets = NET(batch[0].cumsum(0)).flatten(0, 1), batch[1].flatten()
        if of(batch):
            if how == "raises":
                raise RuntimeError("there are two of them")
            logits = logits * (math.nan if how == "nan" else 1)
            if how == "fewer":
                logits, targets = logits[:-1], targets[:-1]
            if how == "nothing":
                return logits.sum()
        return functional.cross_entropy(logits, targets)

    found = look(run(step), STEPS_IN_TIME)
    assert (found.mixed, found.in_turn) == (mixed, False)
    assert (found.used, found.inputs) == (True, 1)


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("halved", [False, True])
def test_of_tokens_that_a_step_does_not_take_nothing_is_told(how: str, halved: bool) -> None:
    net = Tokens(False)
    column = slice(6) if halved else [*range(6), *range(7, 12)]  # that are left as they were

    def step(batch: Any) -> Tensor:
        if torch.equal(batch[0][:, column], IDS[:, :12][:, column]) and not torch.equal(batch[0], IDS[:, :12]):
            if how == "raises":
                raise RuntimeError("out of vocabulary")
            return flat(net(batch[0]) * math.nan, batch[1])
        return flat(net(batch[0]), batch[1])

    found = look(run(step), (IDS[:, :12], IDS[:, :12].clone()))
    assert not found.copied
    found = look(run(step), (IDS[:, :12], IDS[:, 1:].clone()))
    assert found.next_token is not halved
    assert not found.future


def test_targets_that_are_made_in_the_step_leave_no_least_loss() -> None:
    step = run(lambda b: functional.cross_entropy(NET(b[0]), torch.tensor([0, 1, 1, 1, 2, 2, 0, 1])))
    assert look(step, (CATEGORIES,)).least_loss == 0
    two = run(lambda b: functional.cross_entropy(NET(b[0]), b[1]) + functional.cross_entropy(NET(b[0]), b[1]))
    assert look(two, (CATEGORIES, LABELS)).least_loss == 0
    pixels = run(lambda b: functional.mse_loss(NET(b[0]), b[1]))  # of several targets each
    assert look(pixels, (CATEGORIES, LABELS.float().view(8, 1).expand(8, 3))).least_loss == 0


@pytest.mark.parametrize(("noise", "told"), [(0.09, True), (0.11, False)])
def test_outputs_are_the_same_again_up_to_a_ten_thousandth_of_the_largest(noise: float, told: bool) -> None:
    calls: list[int] = []

    def step(batch: Any) -> Tensor:
        calls.append(1)
        return functional.cross_entropy(batch[0].double() + noise * (len(calls) % 2), batch[1])

    inputs = torch.zeros(8, 3)
    inputs[2, 1] = 1000.0 - 2 * noise
    found = look(run(step), (inputs, BATCH[1]))
    assert found.used
    assert bool(found.zeroed) is told
