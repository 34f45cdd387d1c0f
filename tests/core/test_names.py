from collections.abc import Callable

import pytest

from lightning_recipes.core.names import base, better, doubt, split, tokens, trains


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("val/topAcc_1", ["val", "top", "acc", "1"]),
        ("VAL-Loss", ["val", "loss"]),
        ("_f1__score.", ["f1", "score"]),
        ("精度_损失", ["精度", "损失"]),
        ("", []),
    ],
)
def test_the_words_of_a_name(name: str, words: list[str]) -> None:
    assert tokens(name) == words


@pytest.mark.parametrize(
    ("name", "data", "measure"),
    [
        ("train_loss_step", "train", "loss"),
        ("training/loss", "train", "loss"),
        ("val_acc_epoch", "val", "acc"),
        ("valid/topAcc_1", "val", "top acc 1"),
        ("loss_validation", "val", "loss"),
        ("test_loss_raw_epoch", "test", "loss"),
        ("val_of_test", "val", "of"),  # the first one counts
        ("loss", "", "loss"),
        ("step", "", "step"),  # there is no other word
        ("val_epoch", "val", "epoch"),
        ("raw_loss", "", "raw loss"),
        ("val", "val", "val"),
        ("/", "", "/"),
    ],
)
def test_of_which_data_a_metric_is_and_what_it_measures(name: str, data: str, measure: str) -> None:
    assert (split(name), base(name)) == (data, measure)


@pytest.mark.parametrize(
    ("name", "is_so"),
    [
        ("loss", True),
        ("val_loss", True),
        ("epoch_loss", True),
        ("test_loss", False),
        ("epoch", False),
        ("step", False),
        ("hp_metric", False),
    ],
)
def test_what_a_training_logs_of_itself(name: str, is_so: bool) -> None:
    assert trains(name) is is_so


LOWER = "loss error err mse mae rmse nll perplexity ppl wer cer fid"
HIGHER = "acc accuracy f1 auc auroc precision recall iou miou dice bleu map psnr"


@pytest.mark.parametrize(
    ("names", "side"),
    [(LOWER, "min"), (HIGHER, "max"), ("score", ""), ("accLoss negLoss negative_mse minus_mae inverse_fid", "")],
)
def test_whether_lower_or_higher_is_better_is_in_some_names(names: str, side: str) -> None:
    for name in names.split():
        assert better(name) == better(f"val/{name.upper() if '_' not in name and name.islower() else name}") == side


@pytest.mark.parametrize(
    ("monitor", "mode", "meant"),
    [
        ("val_acc", "min", "max"),
        ("val/topAcc_1", "min", "max"),
        ("val_loss", "max", "min"),
        ("val_acc", "max", None),
        ("val_loss", "min", None),
        ("val_f1_loss", "max", None),
        ("neg_mse", "max", None),
        ("val_score", "min", None),
    ],
)
def test_a_mode_is_doubted_where_the_name_says_so(monitor: str, mode: str, meant: str | None) -> None:
    finding = doubt(monitor, mode, "EarlyStopping", "stop too early")
    assert (finding.advice if finding else None) == (meant and f"Set mode={meant!r}.")


def test_a_doubt_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    word_for_word(doubt("val_acc", "min", "EarlyStopping", "stop"), doubt("val_loss", "max", "ReduceOnPlateau", "cut"))
