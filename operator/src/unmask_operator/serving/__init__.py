"""DiffusionInferenceService on a cluster: pure decisions from what is observed to what should be."""

from unmask_operator.serving.decide import reconciler
from unmask_operator.serving.passes import Settings

__all__ = ["Settings", "reconciler"]
