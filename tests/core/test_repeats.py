from typing import Any

import pytest
import torch

from lightning_recipes.core.repeats import Repeats, repeats, target_column


def test_repeated_examples_are_counted_once_each_whatever_their_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        images = torch.arange(400).view(40, 10).to(dtype) if dtype != torch.uint8 else torch.arange(40).repeat(10, 1).T
        images = images.to(dtype) if dtype != torch.bfloat16 else torch.randn(40, 10).bfloat16()
        labels = torch.zeros(40, dtype=torch.long)
        train = [(images[:16], labels[:16]), {"x": images[16:32], "y": labels[16:32]}]
        assert repeats(train, [(images[28:], labels[28:])]) == Repeats(4, 32, 0, 12)


def test_what_repeats_by_itself_is_no_leak() -> None:
    coins = torch.randint(2, (320, 4), generator=torch.Generator().manual_seed(0))
    found = repeats([coins[:160]], [coins[160:]])
    assert found.found == 16
    assert found.is_leak
    assert not found.is_sure
    assert Repeats(10, 320, 3).is_sure
    assert not Repeats(10, 320, 4).is_sure
    assert not Repeats(2, 20, 0).is_leak
    assert not Repeats(2, 20, 0).is_sure
    assert not Repeats(5, 320, 0).is_leak  # below two per cent


def test_a_mask_of_padding_is_no_example() -> None:
    def batches(seed: int) -> list[dict[str, torch.Tensor]]:
        chance = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 99, (40, 12), generator=chance)
        ids[torch.arange(12) >= torch.randint(4, 12, (40, 1), generator=chance)] = 0
        return [{"attention_mask": ids.sign(), "input_ids": ids}]

    assert repeats(batches(0), batches(1)) == Repeats(0, 40, 0, 40)
    assert repeats(batches(0), [*batches(1), *batches(0)]).found == 40
    assert repeats(batches(0), [batches(0)[0]["attention_mask"]]).validation == 0  # has no such tensor


def test_batches_without_inputs_have_no_repeats() -> None:
    assert repeats([torch.ones(3)], [torch.ones(3)]) == Repeats()
    assert repeats([], [torch.ones(3, 3)]) == Repeats(validation=3)
    assert repeats(["text"], [torch.ones(0, 3)]) == Repeats()


def test_the_inputs_are_the_first_tensor_with_examples_and_features() -> None:
    images = torch.arange(12.0).view(6, 2)
    batch = {"scale": torch.tensor(1.0), "labels": torch.zeros(6), "images": images, "masks": torch.ones(6, 2)}
    assert repeats([batch], [images[:2]]) == Repeats(2, 6, 0, 2)


CHANCE = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(96, 3, generator=CHANCE), torch.randint(4, (96,), generator=CHANCE)
PRICES = torch.randn(96, 1, generator=CHANCE)


@pytest.mark.parametrize(
    ("extra", "targets", "column"),
    [
        (LABELS, LABELS, 3),
        (7.0 - 2 * LABELS, LABELS, 3),
        ((LABELS == 2), LABELS, 3),  # one of four columns that say the class
        (torch.tensor([5.0, 1.0, 1.0, 9.0])[LABELS], LABELS.float(), 3),
        ((LABELS == 2) & (torch.arange(96) > 20), LABELS, -1),  # a feature that is right but for some examples
        (torch.ones(96), LABELS, -1),
        (torch.arange(96), (torch.arange(96) < 4).long(), -1),
        (torch.arange(96) < 4, (torch.arange(96) < 4).long(), -1),  # too few to tell
        (1e6 + 30 * PRICES[:, 0].double(), PRICES, 3),
        (PRICES[:, 0] + 0.01 * INPUTS[:, 0], PRICES, -1),
        (torch.ones(96), PRICES, -1),
    ],
)
def test_a_column_that_gives_the_target_away(extra: Any, targets: torch.Tensor, column: int) -> None:
    table = torch.cat([INPUTS, extra[:, None]], 1)
    batches = list(zip(table.split(32), targets.split(32), strict=True))
    assert target_column(batches) == column
    assert target_column([{"labels": y, "inputs": x} for x, y in batches]) == column
    assert target_column(batches[:1]) in (column, -1)


def test_a_value_of_an_image_that_gives_the_target_away() -> None:
    chance = torch.Generator().manual_seed(0)
    images, labels = torch.randn(300, 1, 14, 14, generator=chance), torch.randint(4, (300,), generator=chance)
    images[:, 0, 3, 5] = labels / 3
    assert target_column([(images, labels)]) == 3 * 14 + 5
    assert target_column([(images[:, 0], labels)]) == 3 * 14 + 5
    more = (torch.randn(64, 1, 14, 14, generator=chance), labels[:64])
    assert target_column([(images, labels), more]) == 3 * 14 + 5  # which are not looked at any more
    assert target_column([(images[:255], labels[:255])]) == -1  # of so many values one may fit by chance
    assert target_column([(images.flatten(1)[:, :80], labels)]) == 47
    assert target_column([(torch.cat([INPUTS, LABELS[:, None]], 1).view(96, 2, 2), LABELS)]) == 3
    assert target_column([(images.flatten(1)[:255, :80], labels[:255])]) == 47
    assert target_column([(images[..., None].expand(-1, -1, -1, -1, 100), labels)]) == -1  # too large


def test_of_other_batches_no_column_is_told() -> None:
    table = torch.cat([INPUTS, LABELS[:, None]], 1)
    assert target_column([]) == -1
    assert target_column([(table[:31], LABELS[:31])]) == -1
    assert target_column([(table, LABELS, LABELS)]) == -1
    assert target_column([(table, LABELS), (table[:, 1:], LABELS)]) == -1


@pytest.mark.parametrize(
    ("found", "is_leak", "is_sure"),
    [
        (Repeats(3, 150), True, True),
        (Repeats(3, 151), False, False),
        (Repeats(3, 0), True, True),
        (Repeats(2, 10), False, False),
        (Repeats(20, 1000, 6), True, True),
        (Repeats(20, 1000, 7), True, False),
        (Repeats(19, 1000), False, False),
    ],
)
def test_three_repeats_or_two_per_cent_are_a_leak(found: Repeats, is_leak: bool, is_sure: bool) -> None:
    assert (found.is_leak, found.is_sure) == (is_leak, is_sure)


def test_the_examples_of_all_batches_are_counted() -> None:
    images = torch.arange(40.0).view(10, 2, 2)
    again = torch.cat([images[:4], images[:3], images[7:]])
    assert repeats([again[:4], again[4:]], [images[2:6], images[6:9]]) == Repeats(4, 10, 3, 7)
    views = images.transpose(1, 2)  # of other strides
    assert repeats([images], [views]).found == repeats([images], [views.contiguous()]).found
    assert repeats([images.to_sparse(), images], [images[:3].requires_grad_()]) == Repeats(3, 10, 0, 3)


def told_by(examples: int, columns: int, aside: int) -> int:
    """The last of so many columns is 1 for the first class, of which there are so many examples."""
    labels = (torch.arange(examples) < aside).long()
    noise = torch.randn(examples, columns - 1, generator=torch.Generator().manual_seed(0))
    return target_column([(torch.cat([noise, labels[:, None]], 1), labels)])


@pytest.mark.parametrize(
    ("examples", "columns", "aside", "is_told"),
    [
        (32, 4, 8, True),
        (31, 4, 8, False),
        (32, 4, 7, False),
        (32, 4, 24, True),
        (32, 4, 25, False),
        (32, 100, 16, True),
        (255, 101, 100, False),
        (256, 101, 100, True),
        (256, 2**14, 100, True),
        (256, 2**14 + 1, 100, False),
    ],
)
def test_how_many_examples_tell_that_a_column_is_the_target(
    examples: int, columns: int, aside: int, is_told: bool
) -> None:
    assert told_by(examples, columns, aside) == (columns - 1 if is_told else -1)


def test_two_thousand_examples_of_a_table_are_enough() -> None:
    labels = torch.arange(4000) % 2
    for spoilt, column in ((1999, -1), (2000, 0)):
        table = torch.stack([labels, labels * 0], 1)
        table[spoilt] = 5
        batches = zip(table.split(500), labels.split(500), strict=True)
        assert target_column(batches) == column
    wide = torch.cat([(torch.arange(512) % 2)[:, None], torch.zeros(512, 100)], 1)
    wide[256] = 5  # of so many columns 256 are enough
    assert target_column(zip(wide.split(128), labels[:512].split(128), strict=True)) == 0


@pytest.mark.parametrize(("kinds", "column"), [(8, -1), (9, 0)])
def test_targets_of_more_than_an_eighth_as_many_kinds_are_numbers(kinds: int, column: int) -> None:
    """A column that is a multiple of the target but for its first example: of classes it tells nothing."""
    targets = torch.arange(64.0) % kinds
    table = torch.stack([3 - 2 * targets, targets * 0], 1).double()
    table[0, 0] += 1e-5
    assert target_column([(table, targets)]) == column


@pytest.mark.parametrize(("off", "column"), [(5.5e-4, 0), (6.2e-4, -1)])
def test_a_multiple_of_the_target_may_be_rounded(off: float, column: int) -> None:
    targets = torch.arange(64.0).double()
    noise = off * torch.tensor([1.0, -1.0, -1.0, 1.0]).double().repeat(16)  # of no trend
    assert target_column([(torch.stack([targets + noise, noise], 1), targets)]) == column


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(40, 3), torch.ones(40, 2)),
        (torch.ones(40, 3), torch.ones(39)),
        (torch.ones(40), torch.ones(40)),
        (torch.ones(40, 3), torch.ones(())),
        (torch.ones(40, 3),),
    ],
)
def test_what_is_no_table_with_a_target_tells_nothing(batch: Any) -> None:
    assert target_column([batch]) == -1
