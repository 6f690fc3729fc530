"""DiffusionInferenceService on a cluster: pure decisions from what is observed to what should be."""
