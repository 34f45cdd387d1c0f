"""Remember what was logged of a training, by its names."""

from collections.abc import Iterator
from typing import Any

import torch

from lightning_recipes.core.series import Series

FIRST = ("loss", "val", "epoch", "lr", "learning_rate")  # in the names that matter most
NAMES = 256  # series at most


class Record:
    """The series of a training by their names, 256 of them at most: losses, validations, epochs and learning rates take
    the place of others where there are more.

    Example:
        >>> record = Record()
        >>> record.update("val_loss", 100, 0.5)
        >>> list(record)
        ['val_loss']
    """

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.left_out = 0  # points of other names

    def __iter__(self) -> Iterator[str]:
        return iter(self.series)

    def update(self, name: str, step: int, value: float) -> None:
        """Remember a value."""
        if name not in self.series and len(self.series) >= NAMES:
            spare = [each for each in self.series if not _matters(each)] if _matters(name) else []
            if not spare:
                self.left_out += 1
                return
            self.left_out += self.series.pop(spare[-1]).points
        self.series.setdefault(name, Series()).update(step, value)

    def state_dict(self) -> dict[str, Any]:
        return {
            "series": {
                name: {
                    "width": series.width,
                    "newest": series.newest,
                    "bins": torch.tensor(series.as_rows(), dtype=torch.float64),
                }
                for name, series in self.series.items()
            },
            "left_out": self.left_out,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.series = {
            name: Series.of_rows(state["bins"].tolist(), state["width"], newest=state["newest"])
            for name, state in state_dict["series"].items()
        }
        self.left_out = state_dict["left_out"]


def _matters(name: str) -> bool:
    return any(word in name.lower() for word in FIRST)
