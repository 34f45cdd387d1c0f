import json
import math
from dataclasses import FrozenInstanceError

import pytest

from lightning_recipes.core.findings import Finding, listing


def test_a_finding_is_data() -> None:
    finding = Finding("spike", "warning", "The norm was 9.", "Clip.", 7, {"norm": 9.0}, "playbook")
    assert Finding(**json.loads(json.dumps(finding.as_dict()))) == finding
    assert finding.text == "spike at step 7: The norm was 9. Clip."
    with pytest.raises(FrozenInstanceError):
        finding.step = 8  # type: ignore[misc]


def test_what_json_has_not_is_a_string_and_a_finding_needs_no_evidence() -> None:
    evidence: dict[str, float | str] = {"loss": math.nan, "bound": -math.inf, "step": 3, "name": "inf"}
    finding = Finding("spike", "error", "It rose.", "Clip.", 7, evidence)
    assert finding.as_dict() == {
        "rule": "spike", "severity": "error", "message": "It rose.", "advice": "Clip.", "step": 7,
        "evidence": {"loss": "nan", "bound": "-inf", "step": 3, "name": "inf"}, "source": "",
    }  # fmt: skip
    assert Finding("spike", "error", "It rose.", "Clip.", 7).evidence == {}


def test_three_names_are_listed_at_most() -> None:
    lists = [listing(list("abcde"[:count])) for count in range(6)]
    assert lists == ["", "a", "a, b", "a, b, c", "a, b, c and 1 more", "a, b, c and 2 more"]
