import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_recipes.core.diagnosis import CURES, Diagnosis, Evidence, Measured, TwoSamples, decide, measured
from lightning_recipes.core.findings import Finding

ALIKE, APART, UNSURE = TwoSamples(0.5, 0.04, 0.04, 800), TwoSamples(0.9, 0.04, 0.04, 800), TwoSamples(0.6, 0.1, 0.1, 90)


def diagnosed(train: Any, val: Any = None, **more: Any) -> Diagnosis:
    named = {name: measured(name, more.pop(name)) for name in ("smaller", "larger", "held_out") if name in more}
    return decide(Evidence(measured("train", train), None if val is None else measured("val", val), **named, **more))


TREE: list[tuple[str, dict[str, Any]]] = [
    ("cannot tell", {"train": 0.5}),  # high or low?
    ("cannot tell", {"train": 0.5, "trivial": 2.3}),  # in between
    ("optimization", {"train": 0.5, "trivial": 2.3, "smaller": 0.1}),  # but beaten
    ("cannot tell", {"train": 2.0, "trivial": 2.3}),  # of which kind?
    ("optimization", {"train": 2.0, "trivial": 2.3, "smaller": 0.5}),
    ("nothing learnt", {"train": 2.28, "trivial": 2.3}),
    ("nothing learnt", {"train": 2.28, "trivial": 2.3, "smaller": 2.29}),  # nor does the smaller one
    ("optimization", {"train": 2.28, "trivial": 2.3, "smaller": 1.5}),
    ("optimization", {"train": 2.28, "trivial": 2.3, "rules": frozenset({"diverged"})}),
    ("optimization", {"train": 1.9, "trivial": 2.3, "rules": frozenset({"learning rate looks too high"})}),
    ("cannot tell", {"train": [2.0, 2.2, 2.28], "trivial": 2.3}),  # not surely nothing
    ("cannot tell", {"train": 2.28, "target": 0.1}),  # what would a constant give?
    ("nothing learnt", {"train": 2.28, "target": 0.1, "rules": frozenset({"training loss does not fall"})}),
    ("nothing learnt", {"train": 1.9, "val": 2.4, "trivial": 2.3}),  # by heart
    ("nothing learnt", {"train": 1.9, "val": 2.4, "held_out": 2.4, "trivial": 2.3}),
    ("mismatch", {"train": 1.9, "val": 2.4, "held_out": 2.0, "trivial": 2.3}),
    ("cannot tell", {"train": 1.9, "val": 2.1, "held_out": 1.9, "trivial": 2.3}),  # which is the lesser trouble
    ("mismatch", {"train": 1.8, "val": 4.6, "held_out": 1.8, "trivial": 3.2}),
    ("model bias", {"train": 1.8, "val": 4.6, "held_out": 1.8, "trivial": 3.2, "larger": 0.9}),  # first
    ("optimization", {"train": [1.9, 2.0, 2.1], "target": 0.1, "smaller": [0.5, 0.4, 0.6]}),
    ("cannot tell", {"train": [1.0, 2.0, 3.0], "target": 0.1, "smaller": [0.5, 2.4, 1.0]}),  # too uncertain
    ("model bias", {"train": 1.0, "target": 0.1, "smaller": 1.5}),
    ("model bias", {"train": 1.0, "target": 0.1, "smaller": 0.99}),
    ("optimization", {"train": 1.0, "target": 0.1, "rules": frozenset({"falls too slowly"})}),
    ("optimization", {"train": 1.0, "target": 0.1, "smaller": 1.5, "rules": frozenset({"decayed too early"})}),
    ("cannot tell", {"train": 1.0, "target": 0.1, "rules": frozenset({"overfitting"})}),
    ("model bias", {"train": 2.0, "trivial": 2.3, "larger": 0.5}),
    ("model bias", {"train": 1.0, "target": 0.5, "larger": 0.94}),
    ("cannot tell", {"train": 1.0, "target": 0.5, "larger": 0.96}),  # not what it lacks
    ("cannot tell", {"train": [1.0, 1.1, 1.2], "target": 0.5, "larger": [0.9, 1.0, 1.1]}),
    ("cannot tell", {"train": 1.0, "target": 0.5, "smaller": 1.0, "larger": 1.0}),
    ("model bias", {"train": 0.5, "trivial": 2.3, "larger": 0.24}),  # in between, and most of it gone
    ("cannot tell", {"train": 0.5, "trivial": 2.3, "larger": 0.26}),
    ("cannot tell", {"train": 0.25, "trivial": 2.3, "larger": 0.03}),  # a tenth of a trivial loss is little
    ("cannot tell", {"train": 2.0, "trivial": 2.3, "larger": 1.78}),
    ("model bias", {"train": 2.0, "trivial": 2.3, "larger": 1.76}),
    ("mismatch", {"train": 0.4, "val": 1.5, "trivial": 2.3, "held_out": 0.5, "larger": 0.1}),  # the gap first
    ("optimization", {"train": 2.0, "trivial": 2.3, "smaller": 0.5, "larger": 0.1}),
    ("optimization", {"train": 2.0, "trivial": 2.3, "larger": 0.1, "rules": frozenset({"falls too slowly"})}),
    ("nothing learnt", {"train": 1.9, "val": 2.4, "trivial": 2.3, "larger": 0.1}),  # more of it by heart
    ("cannot tell", {"train": 0.01, "target": 0.1}),  # and validation?
    ("done", {"train": 0.01, "val": 0.05, "target": 0.1}),
    ("done", {"train": 0.01, "val": [0.05, 0.15, 0.14, 0.12], "target": 0.1}),  # not surely above
    ("done", {"train": 0.01, "val": 0.12, "trivial": 2.3}),
    ("cannot tell", {"train": 0.01, "val": 0.9, "trivial": 2.3}),
    ("cannot tell", {"train": 0.01, "val": [0.1, 0.2, 0.6], "trivial": 2.3}),
    ("overfitting", {"train": 0.01, "val": 0.9, "trivial": 2.3, "held_out": 0.8}),
    ("mismatch", {"train": 0.01, "val": 0.9, "trivial": 2.3, "held_out": 0.1}),
    ("cannot tell", {"train": 0.01, "val": [0.8, 0.9, 1.0], "trivial": 2.3, "held_out": [0.2, 0.5, 0.8]}),
    ("overfitting", {"train": 0.01, "val": 0.9, "trivial": 2.3, "samples": ALIKE}),
    ("mismatch", {"train": 0.01, "val": 0.9, "trivial": 2.3, "samples": APART}),
    ("cannot tell", {"train": 0.01, "val": 0.9, "trivial": 2.3, "samples": UNSURE}),
    (
        "overfitting",
        {"train": 0.01, "val": 0.9, "trivial": 2.3, "samples": UNSURE, "rules": frozenset({"overfitting"})},
    ),
    ("overfitting", {"train": 0.01, "val": 0.9, "target": 0.1, "held_out": 0.8, "samples": APART}),
    ("overfitting", {"train": 0.01, "val": 0.9, "target": 0.1, "rules": frozenset({"overfitting"})}),
    ("cannot tell", {"train": 0.4, "val": 0.7, "trivial": 2.3, "held_out": 0.4}),
    ("mismatch", {"train": 0.4, "val": 1.5, "trivial": 2.3, "held_out": 0.5}),  # the gap comes first
    ("overfitting", {"train": 0.4, "val": 1.5, "trivial": 2.3, "held_out": 1.4}),
    ("cannot tell", {"train": 1.1, "val": 2.18, "trivial": 2.3, "held_out": 1.2}),
    ("mismatch", {"train": 1.1, "val": 2.19, "trivial": 2.3, "held_out": 1.2}),  # nor is anything of use there
    ("done", {"train": 0.5, "val": 0.5, "target": 0.5}),  # at the target is low
    ("done", {"train": 0.9, "val": 1.9, "trivial": 10.0}),
    ("overfitting", {"train": 0.9, "val": 1.91, "trivial": 10.0, "held_out": 1.9}),
    ("cannot tell", {"train": 1.0, "val": 1.0, "trivial": 10.0}),  # a tenth is not low
    ("cannot tell", {"train": 5.0, "trivial": 10.0, "rules": frozenset({"diverged"})}),  # nor a half high
    ("optimization", {"train": 5.1, "trivial": 10.0, "rules": frozenset({"diverged"})}),
    ("mismatch", {"train": -3.0, "val": -1.0, "target": -2.5, "held_out": -2.9}),
]


@pytest.mark.parametrize(("expected", "arguments"), TREE)
def test_every_way_down_the_tree(expected: str, arguments: dict[str, Any]) -> None:
    assert diagnosed(**arguments).leaf == expected


def test_a_leaf_has_its_evidence_and_its_cures() -> None:
    diagnosis = decide(Evidence(Measured(2.0), Measured(2.1), trivial=2.3, smaller=Measured(0.5, 0.1), step=70))
    finding = diagnosis.finding
    assert (finding.rule, finding.severity, finding.step) == ("optimization", "warning", 70)
    assert "2, high against the trivial loss of 2.3, and a smaller network reaches 0.5 ± 0.1" in finding.message
    assert diagnosis.cures == CURES["optimization"]
    assert all(cure in finding.advice for cure in diagnosis.cures)
    assert finding.evidence["smaller_loss_error"] == 0.1
    mismatch = decide(Evidence(Measured(0.01), Measured(0.9), trivial=2.3, samples=APART)).finding
    assert "AUC of 0.900 ± 0.04 (800 examples; by chance 0.5 ± 0.04)" in mismatch.message
    unknown = decide(Evidence(Measured(1.0)))
    assert (unknown.finding.severity, unknown.finding.advice[:7]) == ("info", "Measure")


def test_what_is_broken_is_mended_before_anything_is_told_apart() -> None:
    found = [Finding(name, "warning", f"It has {name}.", f"Mend {name}.", 0) for name in ("a", "b", "c")]
    for losses in ((0.01, 0.02), (2.3, 2.3), (0.01, 2.0)):
        diagnosis = decide(Evidence(*map(Measured, losses), trivial=2.3, defects=tuple(found)))
        assert (diagnosis.leaf, diagnosis.finding.severity) == ("defect", "warning")
        assert "before the training there was a warning of a (b, c beside it): It has a." in diagnosis.finding.message
        assert diagnosis.finding.advice == "Mend that first: Mend a."
        assert diagnosis.cures == ("Mend a.", "Mend b.", "Mend c.")
    alone = decide(Evidence(Measured(0.01), defects=tuple(found[:1])))
    assert "a warning of a: It has a." in alone.finding.message


def test_a_sample_is_as_sure_as_it_is() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    loss = measured("loss", values)
    assert loss.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert loss.error == pytest.approx(1.984 * float(values.std()) / 10, rel=1e-3)
    assert measured("loss", 3).error == 0
    numbers = [0.5, 0.25, 0.75]
    for given in (np.array(numbers, np.float32), [*np.array(numbers, np.float32)], torch.tensor([numbers])):
        assert measured("loss", given) == measured("loss", numbers)
    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5, requires_grad=True)):
        assert measured("loss", number) == Measured(0.5)
    for bad in ([], [1.0, math.nan], math.inf):
        with pytest.raises(ValueError, match="loss must be finite and at least one number"):
            measured("loss", bad)
    for wrong in ("low", True, ["low"]):
        with pytest.raises(TypeError, match="loss must be a number or a sequence of numbers"):
            measured("loss", wrong)  # type: ignore[arg-type]


def test_what_was_given_is_the_evidence_and_what_is_missing_is_to_be_measured() -> None:
    given = Evidence(Measured(2.0), Measured(2.1), 0.1, 2.3, Measured(2.0, 1.0), None, Measured(2.1), ALIKE)
    diagnosis = decide(given)
    losses = {"train_loss": 2.0, "val_loss": 2.1, "smaller_loss": 2.0, "held_out_loss": 2.1}
    errors = {f"{name}_error": 1.0 if name == "smaller_loss" else 0.0 for name in losses}
    others = {"target_loss": 0.1, "trivial_loss": 2.3, "auc": 0.5, "auc_error": 0.04, "auc_by_chance": 0.04}
    assert diagnosis.finding.evidence == {**losses, **errors, **others}
    assert "that of a smaller network is 2 ± 1: too uncertain to compare" in diagnosis.finding.message
    assert diagnosis.cures == ("both training losses with more seeds",)
    alone = decide(Evidence(Measured(2.0), target=0.1))
    assert alone.finding.evidence == {"train_loss": 2.0, "train_loss_error": 0.0, "target_loss": 0.1}
    assert "smaller_train_loss" in alone.cures[0]
    for smaller, said in ((2.5, "lower than the 2.5"), (2.0, "no higher than the 2")):
        assert said in decide(Evidence(Measured(2.0), target=0.1, smaller=Measured(smaller))).finding.message
    for larger, said in (
        (0.5, "and a larger network reaches 0.5."),
        (2.0, "that of a larger network is 2: size is not"),
    ):
        diagnosis = decide(Evidence(Measured(2.0), target=0.1, larger=Measured(larger)))
        assert said in diagnosis.finding.message
        assert diagnosis.finding.evidence["larger_loss"] == larger
    done = decide(Evidence(Measured(0.1), Measured(0.1), target=0.1)).finding
    assert (done.severity, done.advice[:15]) == ("info", "Nothing to cure")
    assert done.message.endswith("which is not high either.")
    rules = frozenset({"learning rate looks too high", "overfitting"})
    though = decide(Evidence(Measured(0.1), Measured(0.1), target=0.1, rules=rules)).finding.message
    assert though.endswith("not high either, though it was told: learning rate looks too high.")


def test_each_leaf_is_told_word_for_word(word_for_word: Callable[..., None]) -> None:
    found = tuple(Finding(name, "warning", f"It has {name}.", f"Mend {name}.", 0) for name in ("a", "b", "c"))
    one_way = [
        {"train": 0.5, "val": 1.0, "trivial": 2.3, "defects": found},
        {"train": 0.5, "val": 1.0, "defects": (replace(found[0], step=1200),)},
        {"train": [2.0, 2.1, 2.2], "val": [2.2, 2.3, 2.4], "target": 0.1, "trivial": 9.0, "smaller": [0.4, 0.5, 0.6]},
        {"train": 2.0, "trivial": 2.3, "larger": [0.4, 0.5, 0.6], "step": 300},
        {"train": 0.01, "val": 0.9, "target": 0.1, "held_out": [0.7, 0.8, 0.9]},
        {"train": 0.01, "val": 0.9, "trivial": 2.3, "samples": TwoSamples(0.9, 0.04, 0.03, 8000)},
        {"train": 0.01, "val": 0.05, "target": 0.1, "rules": frozenset({"diverged", "saddle"})},
    ]
    messages = [f"{expected}: {diagnosed(**arguments).finding.message}" for expected, arguments in TREE]
    ways = [diagnosed(**arguments) for _, arguments in TREE]
    advice = sorted({f"{way.leaf}: {way.finding.advice}" for way in ways})
    word_for_word(messages, advice, *(diagnosed(**each).finding for each in one_way))


@pytest.mark.parametrize(
    ("error", "given", "said"),
    [
        (TypeError, "low", "loss must be a number or a sequence of numbers, got 'low'"),
        (ValueError, [], "loss must be finite and at least one number, got []"),
    ],
)
def test_what_is_no_loss_is_refused_with_what_it_is(error: type[Exception], given: Any, said: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(said)}$"):
        measured("loss", given)
