"""The deep-learning training playbook as PyTorch Lightning callbacks."""

from lightning_recipes.callbacks.averaging import EMAWeights
from lightning_recipes.callbacks.clipping import PercentileGradientClipping

__all__ = ["EMAWeights", "PercentileGradientClipping"]
