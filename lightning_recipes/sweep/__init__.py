"""Recipes that run trainings."""

from lightning_recipes.sweep.learning_rate import learning_rate_sweep
from lightning_recipes.sweep.probe import EarlyInstability, early_instability_probe
from lightning_recipes.sweep.shared import OptunaRunner, RayRunner
from lightning_recipes.sweep.warmup import warmup_sweep

__all__ = [
    "EarlyInstability",
    "OptunaRunner",
    "RayRunner",
    "early_instability_probe",
    "learning_rate_sweep",
    "warmup_sweep",
]
