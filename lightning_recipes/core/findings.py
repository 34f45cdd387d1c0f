"""What a recipe saw and what to do about it, as data."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]
NAMED = 3  # names at most that a message has


@dataclass(frozen=True)
class Finding:
    """One thing that a recipe noticed in a run.

    Args:
        rule: Short name of the rule that fired; the same for every finding of its kind.
        severity: ``"info"`` (good to know), ``"warning"`` (worth an action) or ``"error"`` (the result is wrong).
        message: One sentence with the measured numbers.
        advice: What to do next, one sentence.
        step: Optimizer updates done when it was noticed.
        evidence: The numbers (and names) behind the message, by name.
        source: Where the rule comes from: a section of the playbook or a paper.

    Example:
        >>> finding = Finding("aggressive clipping", "warning", "61 % were clipped.", "Halve the learning rate.", 400)
        >>> finding.text
        'aggressive clipping at step 400: 61 % were clipped. Halve the learning rate.'
    """

    rule: str
    severity: Severity
    message: str
    advice: str
    step: int
    evidence: dict[str, float | str] = field(default_factory=dict)
    source: str = ""

    @property
    def text(self) -> str:
        """The finding in one line."""
        return f"{self.rule} at step {self.step}: {self.message} {self.advice}"

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain values, as a line of ``findings.jsonl`` has it; JSON has no NaN, which is a string."""
        evidence = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self.evidence.items()
        }
        return {**asdict(self), "evidence": evidence}


def listing(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are.

    Example:
        >>> listing(["net.0", "net.2", "net.4", "net.6", "head"])
        'net.0, net.2, net.4 and 2 more'
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
