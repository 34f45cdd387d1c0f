import json
from dataclasses import FrozenInstanceError

import pytest

from lightning_recipes.core.findings import Finding


def test_a_finding_is_data() -> None:
    finding = Finding("spike", "warning", "The norm was 9.", "Clip.", 7, {"norm": 9.0}, "playbook")
    assert Finding(**json.loads(json.dumps(finding.as_dict()))) == finding
    assert finding.text == "spike at step 7: The norm was 9. Clip."
    with pytest.raises(FrozenInstanceError):
        finding.step = 8  # type: ignore[misc]
