import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_recipes.core.criteria import Watch
from lightning_recipes.core.dependence import examples_of, first_examples, labels_alike, look, varied_examples


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
