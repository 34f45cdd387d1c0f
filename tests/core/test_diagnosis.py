import math
from typing import Any

import pytest
import torch

from lightning_recipes.core.diagnosis import CURES, Evidence, Measured, TwoSamples, decide, measured

ALIKE, APART, UNSURE = TwoSamples(0.5, 0.04, 0.04, 800), TwoSamples(0.9, 0.04, 0.04, 800), TwoSamples(0.6, 0.1, 0.1, 90)


def leaf(train: Any, val: Any = None, **more: Any) -> str:
    named = {name: measured(name, more.pop(name)) for name in ("smaller", "held_out") if name in more}
    return decide(
        Evidence(measured("train", train), None if val is None else measured("val", val), **named, **more)
    ).leaf


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("cannot tell", {"train": 0.5}),  # high or low?
        ("cannot tell", {"train": 0.5, "trivial": 2.3}),  # in between
        ("optimization", {"train": 0.5, "trivial": 2.3, "smaller": 0.1}),  # but beaten
        ("cannot tell", {"train": 2.0, "trivial": 2.3}),  # of which kind?
        ("optimization", {"train": 2.0, "trivial": 2.3, "smaller": 0.5}),
        ("optimization", {"train": [1.9, 2.0, 2.1], "target": 0.1, "smaller": [0.5, 0.4, 0.6]}),
        ("cannot tell", {"train": [1.0, 2.0, 3.0], "target": 0.1, "smaller": [0.5, 2.4, 1.0]}),  # too uncertain
        ("model bias", {"train": 1.0, "target": 0.1, "smaller": 1.5}),
        ("model bias", {"train": 1.0, "target": 0.1, "smaller": 0.99}),
        ("optimization", {"train": 1.0, "target": 0.1, "curves": frozenset({"falls too slowly"})}),
        ("optimization", {"train": 1.0, "target": 0.1, "smaller": 1.5, "curves": frozenset({"decayed too early"})}),
        ("cannot tell", {"train": 1.0, "target": 0.1, "curves": frozenset({"overfitting"})}),
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
        ("overfitting", {"train": 0.01, "val": 0.9, "target": 0.1, "held_out": 0.8, "samples": APART}),
        ("overfitting", {"train": 0.01, "val": 0.9, "target": 0.1, "curves": frozenset({"overfitting"})}),
        ("cannot tell", {"train": 0.4, "val": 0.7, "trivial": 2.3, "held_out": 0.4}),
        ("mismatch", {"train": 0.4, "val": 1.5, "trivial": 2.3, "held_out": 0.5}),  # the gap comes first
        ("overfitting", {"train": 0.4, "val": 1.5, "trivial": 2.3, "held_out": 1.4}),
        ("mismatch", {"train": -3.0, "val": -1.0, "target": -2.5, "held_out": -2.9}),
    ],
)
def test_every_way_down_the_tree(expected: str, arguments: dict[str, Any]) -> None:
    assert leaf(**arguments) == expected


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


def test_a_sample_is_as_sure_as_it_is() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    loss = measured("loss", values)
    assert loss.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert loss.error == pytest.approx(1.984 * float(values.std()) / 10, rel=1e-3)
    assert measured("loss", 3).error == 0
    for bad in ([], [1.0, math.nan], math.inf):
        with pytest.raises(ValueError, match="loss must be finite and at least one number"):
            measured("loss", bad)
    for wrong in ("low", True, ["low"]):
        with pytest.raises(TypeError, match="loss must be a number or a sequence of numbers"):
            measured("loss", wrong)  # type: ignore[arg-type]
