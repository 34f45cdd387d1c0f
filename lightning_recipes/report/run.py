"""What is known of one training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.series import Series

STEP_LOSS = "loss of training_step"  # the series of every step, which no logger has

PLAIN = ("name", "ended", "resumed", "steps", "hyperparameters", "callbacks", "setup", "costs")


@dataclass
class Run:
    """What is known of one training; everything may be missing.

    Args:
        name: Of the run.
        ended: How it ended: ``"finished"``, ``"running"``, ``"stopped early"``..., with a reason; empty if not known.
        series: What was logged, by name; ``STEP_LOSS`` has the loss of every step.
        findings: In the order in which they were told.
        steps: Updates made; 0 if not known.
        resumed: Steps at which it was resumed.
        bins: The histogram of gradient norms, each ``(lower edge, upper edge, count)``.
        hyperparameters: Name and value.
        callbacks: Name and arguments.
        setup: Versions, devices: name and value.
        costs: Time, speed, memory: name and value.
        ensemble: The text of ``ensemble.md``.
        pictures: Title and ``data:`` URI of pictures that others made.
        sources: Where all this was read, for people.
        notes: What to know when reading it.
    """

    name: str = ""
    ended: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    steps: int = 0
    resumed: list[int] = field(default_factory=list)
    bins: list[tuple[float, float, float]] = field(default_factory=list)
    hyperparameters: dict[str, str] = field(default_factory=dict)
    callbacks: dict[str, str] = field(default_factory=dict)
    setup: dict[str, str] = field(default_factory=dict)
    costs: dict[str, str] = field(default_factory=dict)
    ensemble: str = ""
    pictures: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """How many are known to have been made."""
        logged = [series.bins[-1].last + 1 for series in self.series.values() if series.bins]
        return self.steps or max(logged, default=0)

    def as_dict(self) -> dict[str, Any]:
        """As plain values without NaN."""
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "series": {
                name: {"width": each.width, "newest": each.newest, "bins": each.as_rows()}
                for name, each in self.series.items()
            },
            "findings": [finding.as_dict() for finding in self.findings],
        }

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> "Run":
        """What :meth:`as_dict` gave."""
        run = cls(**{name: values[name] for name in PLAIN if name in values})
        for name, each in values.get("series", {}).items():
            run.series[name] = Series.of_rows(each["bins"], each["width"], newest=each["newest"])
        run.findings = [finding_of(each) for each in values.get("findings", ())]
        return run


def finding_of(values: Mapping[str, Any]) -> Finding:
    """A finding from a line of ``findings.jsonl``.

    Raises:
        ValueError: If it is none.
    """
    names = Finding.__dataclass_fields__
    try:
        finding = Finding(**{name: value for name, value in values.items() if name in names})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a finding: {error}") from None
    if not isinstance(finding.step, int) or not all(
        isinstance(each, str) for each in list(asdict(finding).values())[:4]
    ):
        raise ValueError("not a finding")
    return finding
