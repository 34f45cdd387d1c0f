"""Recipes that run trainings."""

from lightning_recipes.sweep.capacity import compare_capacity
from lightning_recipes.sweep.diagnosis import diagnose, two_sample_test
from lightning_recipes.sweep.ensembles import ensemble_from_checkpoints, train_ensemble
from lightning_recipes.sweep.learning_rate import learning_rate_sweep
from lightning_recipes.sweep.probe import EarlyInstability, early_instability_probe
from lightning_recipes.sweep.shared import OptunaRunner, RayRunner
from lightning_recipes.sweep.warmup import warmup_sweep

__all__ = [
    "EarlyInstability",
    "OptunaRunner",
    "RayRunner",
    "compare_capacity",
    "diagnose",
    "early_instability_probe",
    "ensemble_from_checkpoints",
    "learning_rate_sweep",
    "train_ensemble",
    "two_sample_test",
    "warmup_sweep",
]
