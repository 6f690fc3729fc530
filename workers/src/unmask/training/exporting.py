"""From lines of the log to what Prometheus reads: the log is the only source, so both say the same."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unmask.ports import taking
from unmask.telemetry import metrics
from unmask.telemetry.listener import Listener
from unmask.telemetry.metrics import Recorder
from unmask.training.observation import BUCKETS

__all__ = ["Exporter", "ratio_ranges"]


def ratio_ranges() -> list[str]:
    """Names of the ranges of mask ratios, such as ``0.2-0.4``."""
    return [f"{bucket / BUCKETS:g}-{(bucket + 1) / BUCKETS:g}" for bucket in range(BUCKETS)]


class Exporter:
    """Keeps metrics up to date with the log."""

    def __init__(self, *, hang_timeout_s: float | None = None) -> None:
        """Without progress for ``hang_timeout_s`` the run is reported as unwell; None: never."""
        self.recorder = Recorder(metrics.TRAINING)
        self._limit_s = hang_timeout_s
        self._last, self._step = time.monotonic(), 0

    @contextmanager
    def listening(self, port: int | None, *, host: str = "") -> Iterator[Listener | None]:
        """Answer at ``port`` inside the block; None: do not.

        Raises:
            UsageError: The port is taken.
        """
        if port is None:
            yield None
            return
        with taking("spec.telemetry.port", host, port):
            listener = Listener(host, port, self.recorder.registry, self._health)
        with listener:
            yield listener

    def progress(self) -> None:
        """Note that something was done."""
        self._last = time.monotonic()

    def observe(self, line: Mapping[str, Any]) -> None:
        """Take over one line of the log."""
        self._step = line["step"]
        self.recorder.gauge(metrics.TRAIN_STEP, line["step"])
        match line["kind"]:
            case "step":
                self._observe_step(line)
            case "eval":
                self.recorder.gauge(metrics.TRAIN_EVAL_LOSS, line["loss"], stage=line["stage"])
            case "rollback":
                self.recorder.count(metrics.TRAIN_ROLLBACKS)

    def _observe_step(self, line: Mapping[str, Any]) -> None:
        recorder, stage = self.recorder, line["stage"]
        recorder.count(metrics.TRAIN_STEPS, verdict=line.get("skipped", "Taken"))
        recorder.observe(metrics.TRAIN_STEP_SECONDS, line["seconds"])
        recorder.gauge(metrics.TRAIN_LEARNING_RATE, line["lr"])
        if "skipped" not in line:
            recorder.gauge(metrics.TRAIN_LOSS, line["loss"], stage=stage)
            recorder.gauge(metrics.TRAIN_GRAD_NORM, line["grad_norm"])
        notes = line["telemetry"]
        for kind, tokens, speed in (
            ("clean", line["tokens"], notes["tokens_per_second"]),
            ("supervised", notes["supervised_tokens"], notes["supervised_tokens_per_second"]),
        ):
            recorder.count(metrics.TRAIN_TOKENS, tokens, kind=kind)
            recorder.gauge(metrics.TRAIN_TOKENS_PER_SECOND, speed, kind=kind)
        for phase, seconds in notes["seconds"].items():
            recorder.count(metrics.TRAIN_PHASE_SECONDS, max(0.0, seconds), phase=phase)
        for ratio, loss in zip(ratio_ranges(), notes.get("loss_by_ratio", ()), strict=False):
            if loss is not None:
                recorder.gauge(metrics.TRAIN_LOSS_BY_RATIO, loss, stage=stage, ratio=ratio)
        for router, imbalance in enumerate(notes.get("expert_imbalance", ())):
            recorder.gauge(metrics.TRAIN_EXPERT_IMBALANCE, imbalance, router=str(router))
        for router, counts in enumerate(notes.get("expert_tokens", ())):
            for expert, tokens in enumerate(counts):
                recorder.gauge(metrics.TRAIN_EXPERT_TOKENS, tokens, router=str(router), expert=str(expert))
        for metric, name in (
            (metrics.TRAIN_MFU, "mfu"),
            (metrics.TRAIN_EXPERTS_UNUSED, "experts_unused"),
            (metrics.TRAIN_CHECKPOINT_WRITE_SECONDS, "checkpoint_write_seconds"),
        ):
            if name in notes:
                recorder.gauge(metric, notes[name])

    def _health(self) -> tuple[bool, dict[str, Any]]:
        still = time.monotonic() - self._last
        well = self._limit_s is None or still <= self._limit_s
        return well, {"step": self._step, "seconds_since_progress": round(still, 3)}
