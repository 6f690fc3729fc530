"""DiffusionTrainJob on a cluster: pure decisions from what is observed to what should be."""

from unmask_operator.training.decide import Settings, reconciler

__all__ = ["Settings", "reconciler"]
