import torch

from lightning_recipes.core.repeats import Repeats, repeats


def test_repeated_examples_are_counted_once_each_whatever_their_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        images = torch.arange(400).view(40, 10).to(dtype) if dtype != torch.uint8 else torch.arange(40).repeat(10, 1).T
        images = images.to(dtype) if dtype != torch.bfloat16 else torch.randn(40, 10).bfloat16()
        labels = torch.zeros(40, dtype=torch.long)
        train = [(images[:16], labels[:16]), {"x": images[16:32], "y": labels[16:32]}]
        assert repeats(train, [(images[28:], labels[28:])]) == Repeats(4, 32, 0)


def test_what_repeats_by_itself_is_no_leak() -> None:
    coins = torch.randint(2, (320, 4), generator=torch.Generator().manual_seed(0))
    found = repeats([coins[:160]], [coins[160:]])
    assert found.found == 16
    assert not found.is_leak
    assert Repeats(10, 320, 3).is_leak
    assert not Repeats(10, 320, 4).is_leak
    assert not Repeats(2, 20, 0).is_leak
    assert not Repeats(5, 320, 0).is_leak  # below two per cent


def test_batches_without_inputs_have_no_repeats() -> None:
    assert repeats([torch.ones(3)], [torch.ones(3)]) == Repeats()
    assert repeats([], [torch.ones(3, 3)]) == Repeats()
    assert repeats(["text"], [torch.ones(0, 3)]) == Repeats()


def test_the_inputs_are_the_first_tensor_with_examples_and_features() -> None:
    images = torch.arange(12.0).view(6, 2)
    batch = {"scale": torch.tensor(1.0), "labels": torch.zeros(6), "images": images, "masks": torch.ones(6, 2)}
    assert repeats([batch], [images[:2]]) == Repeats(2, 6, 0)
