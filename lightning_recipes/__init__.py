"""The deep-learning training playbook as PyTorch Lightning callbacks."""

from lightning_recipes.callbacks.averaging import EMAWeights
from lightning_recipes.callbacks.clipping import PercentileGradientClipping
from lightning_recipes.callbacks.curvature import CriticalPointProbe
from lightning_recipes.callbacks.curves import LearningCurves
from lightning_recipes.callbacks.early_stopping import EarlyStopping
from lightning_recipes.callbacks.initial_loss import InitialLossCheck
from lightning_recipes.callbacks.instability import InstabilityDetector
from lightning_recipes.callbacks.noise_scale import GradientNoiseScale
from lightning_recipes.callbacks.overfit import OverfitCheck
from lightning_recipes.callbacks.report import TrainingReport
from lightning_recipes.callbacks.schedules import LearningRateSchedule
from lightning_recipes.callbacks.snapshots import SnapshotEnsemble
from lightning_recipes.callbacks.updates import UpdateRatioMonitor
from lightning_recipes.callbacks.warmup import WarmupSweep
from lightning_recipes.checkpointing import AtomicCheckpointIO

__all__ = [
    "AtomicCheckpointIO",
    "CriticalPointProbe",
    "EMAWeights",
    "EarlyStopping",
    "GradientNoiseScale",
    "InitialLossCheck",
    "InstabilityDetector",
    "LearningCurves",
    "LearningRateSchedule",
    "OverfitCheck",
    "PercentileGradientClipping",
    "SnapshotEnsemble",
    "TrainingReport",
    "UpdateRatioMonitor",
    "WarmupSweep",
]
