"""Every metric a server or a training job exports, declared once; exporters and the reference are made of it.

A metric is a constant of this module, so recording an undeclared one cannot be written. No label tells
requests apart: the number of time series does not depend on traffic. Which model and pod a series is of,
the scraper adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["GATEWAY", "SERVING", "SHARD", "TLS", "TRAINING", "Metric", "Recorder"]

_PER_FORWARD = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        name: As exported. Seconds end in ``_seconds``, counters in ``_total``.
        kind: Its Prometheus type.
        help: What one observation or count is.
        labels: Label names, each with a small, fixed set of values.
        buckets: Upper bounds of a histogram's buckets; ``+Inf`` is added.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUESTS = Metric(
    name="unmask_requests_total",
    kind="counter",
    help="Calls of Generate and GenerateStream that ended, by gRPC status code and, where OK, by reason.",
    labels=("code", "finish_reason"),
)
REQUESTS_RUNNING = Metric(
    name="unmask_requests_running", kind="gauge", help="Requests that have a row in the batch."
)
REQUESTS_WAITING = Metric(name="unmask_requests_waiting", kind="gauge", help="Requests in the queue.")
ADMISSION_REJECTIONS = Metric(
    name="unmask_admission_rejections_total",
    kind="counter",
    help="Requests turned away at once: too many requests or tokens wait, the wait would outlast the "
    "deadline, or the server drains.",
    labels=("reason",),
)
CANCELLED = Metric(
    name="unmask_cancelled_total",
    kind="counter",
    help="Requests that ended before they were complete, by who ended them: client, deadline, or operator.",
    labels=("by",),
)
QUEUE_SECONDS = Metric(
    name="unmask_request_queue_seconds",
    kind="histogram",
    help="From a request's arrival to its row in the batch.",
    buckets=_LATENCY,
)
TIME_TO_FIRST_BLOCK = Metric(
    name="unmask_time_to_first_block_seconds",
    kind="histogram",
    help="From a request's arrival to its first committed block.",
    buckets=_LATENCY,
)
INTER_BLOCK = Metric(
    name="unmask_inter_block_seconds",
    kind="histogram",
    help="From one committed block of a request to the next.",
    buckets=_LATENCY,
)
E2E = Metric(
    name="unmask_e2e_seconds",
    kind="histogram",
    help="From a request's arrival to its end, complete ones only.",
    buckets=_LATENCY,
)
PROMPT_TOKENS = Metric(
    name="unmask_prompt_tokens_total", kind="counter", help="Prompt tokens of admitted requests."
)
COMMITTED_TOKENS = Metric(
    name="unmask_committed_tokens_total",
    kind="counter",
    help="Generated tokens that were committed, end of text included.",
)
BLOCKS_COMMITTED = Metric(
    name="unmask_blocks_committed_total", kind="counter", help="Blocks that were committed."
)
FORWARDS = Metric(
    name="unmask_forwards_total",
    kind="counter",
    help="Forward passes of the model, by what their rows did: prefill, denoise, persist, or mixed.",
    labels=("kind",),
)
FORWARD_SECONDS = Metric(
    name="unmask_forward_seconds",
    kind="histogram",
    help="Wall time of one forward pass with its decoding decisions.",
    labels=("kind",),
    buckets=(0.001, 0.0025, *_LATENCY),
)
BATCH_ROWS = Metric(
    name="unmask_batch_rows",
    kind="gauge",
    help="Rows in the last forward pass, by what they did: prefill, denoise, persist, or fused, which is "
    "storing a block and denoising the next one at once.",
    labels=("phase",),
)
CACHE_USAGE = Metric(
    name="unmask_kv_usage_ratio",
    kind="gauge",
    help="Share of the memory for keys and values that running requests hold.",
)
PREFIX_HIT_TOKENS = Metric(
    name="unmask_prefix_cache_hit_tokens_total",
    kind="counter",
    help="Tokens of prompts that were not computed because an earlier request had begun with them.",
)
POSITIONS_EVALUATED = Metric(
    name="unmask_positions_evaluated_total",
    kind="counter",
    help="Positions that were computed for complete requests, over all their forwards.",
)
TOKENS_PER_FORWARD = Metric(
    name="unmask_tokens_per_forward",
    kind="histogram",
    help="Per complete request: tokens kept over all forwards it took part in.",
    buckets=_PER_FORWARD,
)
TOKENS_PER_FORWARD_DECODE = Metric(
    name="unmask_tokens_per_forward_decode",
    kind="histogram",
    help="Per complete request: tokens kept over denoise and persist forwards, as papers' tables have it.",
    buckets=_PER_FORWARD,
)
TOKENS_PER_FORWARD_DENOISE = Metric(
    name="unmask_tokens_per_forward_denoise",
    kind="histogram",
    help="Per complete request: tokens kept over denoise forwards.",
    buckets=_PER_FORWARD,
)
FORWARDS_PER_BLOCK = Metric(
    name="unmask_forwards_per_block",
    kind="histogram",
    help="Forwards that a committed block took.",
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 33, 49),
)
TOKENS_ACCEPTED_PER_STEP = Metric(
    name="unmask_tokens_accepted_per_step",
    kind="histogram",
    help="Masked positions that one denoise forward filled in one row.",
    buckets=(0, 1, 2, 4, 8, 16, 32),
)
TOKENS_EDITED = Metric(
    name="unmask_tokens_edited_total",
    kind="counter",
    help="Generated tokens that a later forward replaced before their block was committed.",
)
CANVAS_UPDATES_MERGED = Metric(
    name="unmask_canvas_updates_merged_total",
    kind="counter",
    help="Canvas updates merged into a later one, or dropped, because their client reads more slowly.",
)
EXPERT_FRAME_SECONDS = Metric(
    name="unmask_expert_frame_seconds",
    kind="histogram",
    help="Per frame to an expert shard: queue and compute, as the shard says, and wire, which is the rest of "
    "the time until its answer was there.",
    labels=("phase",),
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_LATENCY),
)
EXPERT_FRAMES = Metric(
    name="unmask_expert_frames_total",
    kind="counter",
    help="Frames sent to expert shards, by why: first, hedge (the first answer is late), failover (a "
    "shard was lost, refused, or gave a damaged answer), or proof (a shard came back and is tried).",
    labels=("why",),
)
EXPERT_BYTES = Metric(
    name="unmask_expert_bytes_total",
    kind="counter",
    help="Bytes of frames to and from expert shards.",
    labels=("direction",),
)
EXPERT_ROWS = Metric(
    name="unmask_expert_rows_total",
    kind="counter",
    help="Token rows of layers with experts (kind: tokens), and copies of them sent to shards (copies).",
    labels=("kind",),
)
EXPERTS_ACTIVATED = Metric(
    name="unmask_experts_activated",
    kind="histogram",
    help="Different experts that the tokens of a forward chose in one layer.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 255, 256),
)
EXPERT_IMBALANCE = Metric(
    name="unmask_expert_imbalance",
    kind="gauge",
    help="Of the last layer that was computed: rows of the busiest part over the mean of all parts.",
)
EXPERT_SHARDS = Metric(
    name="unmask_expert_shards",
    kind="gauge",
    help="Expert shards by state: ready, banned (passed over for a while), or lost (not connected).",
    labels=("state",),
)
EXPERT_EPOCH = Metric(
    name="unmask_expert_placement_epoch", kind="gauge", help="The placement of experts that is in use."
)
TLS_CERTIFICATE_EXPIRY = Metric(
    name="unmask_tls_certificate_expiry_seconds",
    kind="gauge",
    help="When the certificate that new connections get expires, in seconds since 1970, by port: grpc or "
    "control, and shard of an expert shard.",
    labels=("port",),
)
TLS_RELOAD_FAILURES = Metric(
    name="unmask_tls_reload_failures_total",
    kind="counter",
    help="Times that the files of a port's certificate, key and CA held something new that could not be "
    "used; what was read before stays in force.",
    labels=("port",),
)
TLS: tuple[Metric, ...] = (TLS_CERTIFICATE_EXPIRY, TLS_RELOAD_FAILURES)

SERVING: tuple[Metric, ...] = (
    REQUESTS,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    ADMISSION_REJECTIONS,
    CANCELLED,
    QUEUE_SECONDS,
    TIME_TO_FIRST_BLOCK,
    INTER_BLOCK,
    E2E,
    PROMPT_TOKENS,
    COMMITTED_TOKENS,
    BLOCKS_COMMITTED,
    FORWARDS,
    FORWARD_SECONDS,
    BATCH_ROWS,
    CACHE_USAGE,
    PREFIX_HIT_TOKENS,
    POSITIONS_EVALUATED,
    TOKENS_PER_FORWARD,
    TOKENS_PER_FORWARD_DECODE,
    TOKENS_PER_FORWARD_DENOISE,
    FORWARDS_PER_BLOCK,
    TOKENS_ACCEPTED_PER_STEP,
    TOKENS_EDITED,
    CANVAS_UPDATES_MERGED,
    EXPERT_FRAME_SECONDS,
    EXPERT_FRAMES,
    EXPERT_BYTES,
    EXPERT_ROWS,
    EXPERTS_ACTIVATED,
    EXPERT_IMBALANCE,
    EXPERT_SHARDS,
    EXPERT_EPOCH,
    *TLS,
)

SHARD_FRAMES = Metric(
    name="unmask_shard_frames_total",
    kind="counter",
    help="Frames that an expert shard answered, by what became of them: ok, malformed, stale, duplicate, "
    "not_finite, draining or failed.",
    labels=("status",),
)
SHARD_ROWS = Metric(
    name="unmask_shard_rows_total", kind="counter", help="Token rows that an expert shard computed."
)
SHARD_SECONDS = Metric(
    name="unmask_shard_seconds",
    kind="histogram",
    help="Per frame: time that it waited for its turn (queue), and that its experts took (compute).",
    labels=("phase",),
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_LATENCY),
)
SHARD_WEIGHT_BYTES = Metric(
    name="unmask_shard_weight_bytes", kind="gauge", help="Memory of the expert weights that a shard holds."
)

SHARD: tuple[Metric, ...] = (SHARD_FRAMES, SHARD_ROWS, SHARD_SECONDS, SHARD_WEIGHT_BYTES)

GATEWAY_REQUESTS = Metric(
    name="unmask_gateway_requests_total",
    kind="counter",
    help="Calls of Generate and GenerateStream that ended, by gRPC status code and, where OK, by reason.",
    labels=("code", "finish_reason"),
)
GATEWAY_REQUESTS_RUNNING = Metric(
    name="unmask_gateway_requests_running", kind="gauge", help="Calls that the gateway has."
)
GATEWAY_ROUTED = Metric(
    name="unmask_gateway_routed_total",
    kind="counter",
    help="Calls to replicas, by what chose the replica: prefix (it may have the prompt's beginning in its "
    "cache) or load (the least).",
    labels=("by",),
)
GATEWAY_ATTEMPTS = Metric(
    name="unmask_gateway_attempts_total",
    kind="counter",
    help="Calls to replicas, by why: first, again (the one before came to nothing, and had committed "
    "nothing), or resume (from committed blocks).",
    labels=("why",),
)
GATEWAY_STALL_SECONDS = Metric(
    name="unmask_gateway_stall_seconds",
    kind="histogram",
    help="From the failure of a replica that a call was at to the first that is heard of the next one.",
    buckets=_LATENCY,
)
GATEWAY_REPLICAS = Metric(
    name="unmask_gateway_replicas",
    kind="gauge",
    help="Replicas by state: ready, banned (passed over for a while, for calls failed there), or out (not "
    "there, or takes nothing new).",
    labels=("state",),
)
GATEWAY_REPLICA_FAILURES = Metric(
    name="unmask_gateway_replica_failures_total",
    kind="counter",
    help="Calls that failed by a replica's fault, so that it was passed over for a while.",
)

GATEWAY: tuple[Metric, ...] = (
    GATEWAY_REQUESTS,
    GATEWAY_REQUESTS_RUNNING,
    GATEWAY_ROUTED,
    GATEWAY_ATTEMPTS,
    GATEWAY_STALL_SECONDS,
    GATEWAY_REPLICAS,
    GATEWAY_REPLICA_FAILURES,
)


TRAIN_STEP = Metric(name="unmask_train_step", kind="gauge", help="Steps done in the run.")
TRAIN_STEPS = Metric(
    name="unmask_train_steps_total",
    kind="counter",
    help="Steps done by this process, by what became of them: Taken, NotFinite or Spike.",
    labels=("verdict",),
)
TRAIN_ROLLBACKS = Metric(
    name="unmask_train_rollbacks_total", kind="counter", help="Times that the run went back to a checkpoint."
)
TRAIN_LOSS = Metric(
    name="unmask_train_loss",
    kind="gauge",
    help="Of the last step of each stage that was taken, in nats per predicted token or per bound of one.",
    labels=("stage",),
)
TRAIN_LOSS_BY_RATIO = Metric(
    name="unmask_train_loss_by_ratio",
    kind="gauge",
    help="Of the last step, the mean over the predictions whose ratio of masks is in a range, unweighted.",
    labels=("stage", "ratio"),
)
TRAIN_EVAL_LOSS = Metric(
    name="unmask_train_eval_loss", kind="gauge", help="Of the last measurement of a stage.", labels=("stage",)
)
TRAIN_GRAD_NORM = Metric(
    name="unmask_train_grad_norm", kind="gauge", help="Of the last step's gradient, before clipping."
)
TRAIN_LEARNING_RATE = Metric(name="unmask_train_learning_rate", kind="gauge", help="Of the last step.")
TRAIN_TOKENS = Metric(
    name="unmask_train_tokens_total",
    kind="counter",
    help="Tokens that went into steps, over all processes: clean ones of documents, or those to be learnt.",
    labels=("kind",),
)
TRAIN_TOKENS_PER_SECOND = Metric(
    name="unmask_train_tokens_per_second",
    kind="gauge",
    help="Of the last step, over all processes: clean tokens of documents, or those to be learnt.",
    labels=("kind",),
)
TRAIN_MFU = Metric(
    name="unmask_train_mfu",
    kind="gauge",
    help="Useful operations of the last step, as a share of `telemetry.peakFlops` of all devices.",
)
TRAIN_STEP_SECONDS = Metric(
    name="unmask_train_step_seconds",
    kind="histogram",
    help="Wall time of a step.",
    buckets=(*_LATENCY, 120.0, 300.0),
)
TRAIN_PHASE_SECONDS = Metric(
    name="unmask_train_phase_seconds_total",
    kind="counter",
    help="Wall time by phase: data, forward_backward, reduce, optimizer, checkpoint (waiting for one).",
    labels=("phase",),
)
TRAIN_CHECKPOINT_WRITE_SECONDS = Metric(
    name="unmask_train_checkpoint_write_seconds",
    kind="gauge",
    help="From the start to the commit of the last checkpoint that was written beside the training.",
)
TRAIN_EXPERT_IMBALANCE = Metric(
    name="unmask_train_expert_imbalance",
    kind="gauge",
    help="For each router, tokens of the busiest expert over the mean, in the last step; 1 is balanced.",
    labels=("router",),
)
TRAIN_EXPERT_TOKENS = Metric(
    name="unmask_train_expert_tokens",
    kind="gauge",
    help="Tokens of each expert in the last step whose counts were logged: the first one and every 50th.",
    labels=("router", "expert"),
)
TRAIN_EXPERTS_UNUSED = Metric(
    name="unmask_train_experts_unused",
    kind="gauge",
    help="Experts of all routers that had no token in the last step.",
)

TRAINING: tuple[Metric, ...] = (
    TRAIN_STEP,
    TRAIN_STEPS,
    TRAIN_ROLLBACKS,
    TRAIN_LOSS,
    TRAIN_LOSS_BY_RATIO,
    TRAIN_EVAL_LOSS,
    TRAIN_GRAD_NORM,
    TRAIN_LEARNING_RATE,
    TRAIN_TOKENS,
    TRAIN_TOKENS_PER_SECOND,
    TRAIN_MFU,
    TRAIN_STEP_SECONDS,
    TRAIN_PHASE_SECONDS,
    TRAIN_CHECKPOINT_WRITE_SECONDS,
    TRAIN_EXPERT_IMBALANCE,
    TRAIN_EXPERT_TOKENS,
    TRAIN_EXPERTS_UNUSED,
)


class Recorder:
    """Records a table of metrics in a registry of its own; safe to use from several threads."""

    def __init__(self, table: Sequence[Metric] = SERVING) -> None:
        self.registry = CollectorRegistry()
        self._collectors = {metric.name: _collector(metric, self.registry) for metric in table}
        self._found: dict[tuple[str, tuple[tuple[str, str], ...]], Counter | Gauge | Histogram] = {}
        """Those that were asked for, since prometheus_client takes longer to find one than to count."""

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        collector = self._find(metric, labels)
        assert isinstance(collector, Counter), metric.name
        collector.inc(amount)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        collector = self._find(metric, labels)
        assert isinstance(collector, Histogram), metric.name
        collector.observe(value)

    def gauge(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        collector = self._find(metric, labels)
        assert isinstance(collector, Gauge), metric.name
        collector.set(value)

    def value(self, metric: Metric, **labels: str) -> float:
        """What a counter or gauge stands at, or how often a histogram was observed; 0 before first use."""
        sample = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        return self.registry.get_sample_value(sample, labels) or 0.0

    def _find(self, metric: Metric, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        key = (metric.name, tuple(labels.items()))
        found = self._found.get(key)
        if found is None:
            collector = self._collectors[metric.name]
            found = self._found[key] = collector.labels(**labels) if metric.labels else collector
        return found


def _collector(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.help, metric.labels, registry=registry)
        case "gauge":
            return Gauge(metric.name, metric.help, metric.labels, registry=registry)
        case "histogram":
            return Histogram(
                metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
            )
