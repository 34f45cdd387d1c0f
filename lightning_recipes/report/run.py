"""What is known of one training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_recipes.core.findings import Finding
from lightning_recipes.core.names import trains
from lightning_recipes.core.series import Series

STEP_LOSS = "loss of training_step"  # the series of every step, which no logger has

LARGEST_STEP = 2**63  # of an int64

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
        logged = [series.bins[-1].last + 1 for name, series in self.series.items() if series.bins and trains(name)]
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
        """What :meth:`as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        run, empty = cls(**{name: values[name] for name in PLAIN}), cls()
        for name in PLAIN:
            if type(getattr(run, name)) is not type(getattr(empty, name)):
                raise TypeError(f"{name} is not that of a run")
        texts = [text for name in PLAIN[4:] for text in getattr(run, name).values()]
        if not all(isinstance(step, int) for step in run.resumed) or not all(isinstance(text, str) for text in texts):
            raise TypeError("not of a run")
        for name, each in values["series"].items():
            run.series[name] = Series.of_rows(each["bins"], each["width"], newest=each["newest"])
        run.findings = [finding_of(each) for each in values["findings"]]
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
    texts = (finding.rule, finding.severity, finding.message, finding.advice, finding.source)
    if (
        not all(isinstance(text, str) for text in texts)
        or not isinstance(finding.step, int)
        or abs(finding.step) > LARGEST_STEP
        or not isinstance(finding.evidence, dict)
        or not all(isinstance(value, str | int | float) for value in finding.evidence.values())
    ):
        raise ValueError("not a finding")
    return finding
