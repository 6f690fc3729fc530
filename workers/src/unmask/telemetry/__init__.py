"""What a server measures: the metrics as a table, what records them, and their reference as text."""

from unmask.telemetry.metrics import SERVING, Metric, Recorder

__all__ = ["SERVING", "Metric", "Recorder"]
