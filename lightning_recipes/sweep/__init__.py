"""Recipes that run trainings."""

from lightning_recipes.sweep.probe import EarlyInstability, early_instability_probe
from lightning_recipes.sweep.warmup import warmup_sweep

__all__ = ["EarlyInstability", "early_instability_probe", "warmup_sweep"]
