"""Whatever runs trainings of its own."""

from lightning_recipes.sweep.probe import EarlyInstability, early_instability_probe

__all__ = ["EarlyInstability", "early_instability_probe"]
