"""DiffusionTrainJob on a cluster: pure decisions from what is observed to what should be."""

from unmask_operator.training.decide import reconciler
from unmask_operator.training.passes import Settings

__all__ = ["Settings", "reconciler"]
