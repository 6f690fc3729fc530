"""When somebody should look at a server, a gateway or the operator, and what they should do then."""

from dataclasses import dataclass
from typing import Literal

from unmask.telemetry import metrics as m

__all__ = ["ALERTS", "PLACEHOLDERS", "Alert", "rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert.

    Attributes:
        name: In CamelCase.
        expr: PromQL; ``$of`` stands for the label matchers of a release's engines, ``$gateway`` for those of
            its gateways, and ``$operator`` for those of an operator. One query is about one of them.
        lasts: How long the query has to give something until the alert fires.
        severity: ``critical`` for what users notice at once.
        summary: One line; ``{{ $labels.x }}`` stands for a label of what the query gives.
        means: What the query says, and why that matters.
        look: What to look at, most telling first.
        do: What to do then.
    """

    name: str
    expr: str
    lasts: str
    severity: Literal["critical", "warning"]
    summary: str
    means: str
    look: tuple[str, ...]
    do: tuple[str, ...]

    @property
    def whose(self) -> str:
        """The placeholder of its series, without the dollar sign."""
        return next(one for one in PLACEHOLDERS if f"${one}" in self.expr)


PLACEHOLDERS = ("of", "gateway", "operator")
"""What stands for label matchers in queries."""

_TPF = m.TOKENS_PER_FORWARD_DECODE.name
_FRAMES = m.EXPERT_FRAMES.name
_CALLS, _ATTEMPTS = m.GATEWAY_REQUESTS.name, m.GATEWAY_ATTEMPTS.name

ALERTS: tuple[Alert, ...] = (
    Alert(
        name="UnmaskServerDown",
        expr="absent(up{$of}) or (up{$of} == 0)",
        lasts="5m",
        severity="critical",
        summary="No metrics of an engine for five minutes.",
        means=(
            "Prometheus cannot read the metrics of an engine, or knows of none. As a rule its process "
            "does not "
            "run, or has not loaded its model yet."
        ),
        look=(
            "`kubectl get pods` and `kubectl describe pod`: is it pending, starting, or restarted again "
            "and again?",
            "`kubectl logs --previous`: the exit code's line says what was wrong (64: arguments, 66: the "
            "model's files)",
            "the model's volume: is the claim bound, and the folder there?",
            "a NetworkPolicy that keeps Prometheus out (`networkPolicy.metricsFrom` of the chart)",
        ),
        do=(
            "mend what the log names; a model that loads slowly wants a longer startup probe",
            "more replicas, so that one that is down turns nobody away",
        ),
    ),
    Alert(
        name="UnmaskServerStalled",
        expr=(
            f"(sum by (namespace, pod) (increase({m.FORWARDS.name}{{$of}}[5m])) == 0)"
            f" and on (namespace, pod) (min_over_time({m.REQUESTS_RUNNING.name}{{$of}}[5m]) > 0)"
        ),
        lasts="2m",
        severity="critical",
        summary="{{ $labels.pod }} has requests and runs no forward passes.",
        means=(
            "Requests have rows in the batch, and the model has not computed anything for them in five "
            "minutes. "
            "Their users wait in vain."
        ),
        look=(
            "`/livez` of the pod: `stuck` means that its event loop hangs, `failed` that its model has ended",
            "with expert shards: UnmaskExpertShardsMissing, for a forward waits for parts that nobody holds",
            "the log's last lines, and the device (`nvidia-smi`, out of memory, a driver's error in `dmesg`)",
        ),
        do=(
            "delete the pod, if it is not restarted by its liveness probe: clients that know several "
            "servers go on "
            "elsewhere from their committed blocks",
        ),
    ),
    Alert(
        name="UnmaskTokensPerForwardDropped",
        expr=(
            f"(sum(rate({_TPF}_sum{{$of}}[30m])) / sum(rate({_TPF}_count{{$of}}[30m])))"
            f" < 0.7 * (sum(increase({_TPF}_sum{{$of}}[1d] offset 1h)) / "
            f"sum(increase({_TPF}_count{{$of}}[1d] offset 1h)))"
        ),
        lasts="30m",
        severity="warning",
        summary="A forward pass yields a third fewer tokens than the day before.",
        means=(
            "Tokens per forward of the last half hour are below 0.7 of those of the day before. Each "
            "answer takes "
            "so many more forwards, and the machine serves so many fewer users, though each forward is "
            "as fast as ever."
        ),
        look=(
            "was a model changed (`unmask_requests_total` restarts, Control.UpdateWeights in the log)? "
            "One that is "
            "less sure fills fewer positions at the same threshold",
            "do requests ask for a higher threshold, a temperature, or another decoder than before?",
            f"`{m.TOKENS_ACCEPTED_PER_STEP.name}` and `{m.FORWARDS_PER_BLOCK.name}`: fewer positions a "
            f"step, or more steps a block?",
            "what is asked: code and lists yield more tokens a forward than free text",
        ),
        do=(
            "measure the new model's curve of tokens per forward against quality, and choose the "
            "threshold anew",
            "train it with the confidence loss, if it was left out",
        ),
    ),
    Alert(
        name="UnmaskRequestsTurnedAway",
        expr=(
            f'sum(rate({m.ADMISSION_REJECTIONS.name}{{$of,reason!="stopped"}}[10m]))'
            f" > 0.01 * sum(rate({m.REQUESTS.name}{{$of}}[10m]))"
        ),
        lasts="10m",
        severity="warning",
        summary="More than one request in a hundred is turned away.",
        means=(
            "The queue is full, or so long that deadlines would pass in it. Clients get "
            "RESOURCE_EXHAUSTED with a "
            "time after which to try again."
        ),
        look=(
            "the reason: `requests` and `tokens` are the queue's limits, `deadline` that calls wait less "
            "long than the queue is",
            f"`{m.QUEUE_SECONDS.name}` and `{m.BATCH_ROWS.name}`: are all rows taken?",
            "UnmaskTokensPerForwardDropped and UnmaskServerDown: fewer tokens, or fewer servers, than before",
        ),
        do=(
            "more replicas, or more rows (`server.rows`), if the device has memory and time for them",
            "a longer queue only helps against bursts",
        ),
    ),
    Alert(
        name="UnmaskQueueIsSlow",
        expr=f"histogram_quantile(0.95, sum by (le) (rate({m.QUEUE_SECONDS.name}_bucket{{$of}}[10m]))) > 10",
        lasts="15m",
        severity="warning",
        summary="One request in twenty waits for more than ten seconds for its row.",
        means="Requests wait long before anything is computed for them; nobody is turned away yet.",
        look=(
            f"`{m.REQUESTS_WAITING.name}` over the day: a burst, or growth?",
            "long generations that hold rows: `unmask_e2e_seconds`",
            "priorities: batch jobs belong below people who wait",
        ),
        do=("more replicas, or fewer long requests beside short ones; give batch jobs a lower priority",),
    ),
    Alert(
        name="UnmaskRequestsFail",
        expr=(
            f'sum(rate({m.REQUESTS.name}{{$of,code=~"INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"}}[10m]))'
            f" > 0.01 * sum(rate({m.REQUESTS.name}{{$of}}[10m]))"
        ),
        lasts="10m",
        severity="critical",
        summary="More than one request in a hundred ends with an error of the server's.",
        means=(
            "Requests end with a code that is not their fault. UNAVAILABLE can be tried again; INTERNAL "
            "is a defect."
        ),
        look=(
            "the code: `sum by (code) (rate(unmask_requests_total[10m]))`",
            "UNAVAILABLE: a drain, or parts of the experts that cannot be had (UnmaskExpertShardsMissing)",
            "INTERNAL, UNKNOWN: the server's log has the traceback",
        ),
        do=("a defect: keep the log, go back to the image before, and report it",),
    ),
    Alert(
        name="UnmaskCacheFull",
        expr=f"min_over_time({m.CACHE_USAGE.name}{{$of}}[15m]) > 0.95",
        lasts="5m",
        severity="warning",
        summary="{{ $labels.pod }} has no room for keys and values to spare.",
        means=(
            "The memory for keys and values has been taken all the time. Requests wait for others to end "
            "though rows are "
            "free, and prompts that begin alike are computed again, for what is kept of them is let go first."
        ),
        look=(
            f"`{m.PREFIX_HIT_TOKENS.name}` over `unmask_prompt_tokens_total`: does sharing still work?",
            "the lengths that are asked for: each request is reserved what it may grow to",
        ),
        do=("more of `server.cacheMib`, fewer rows, or a shorter `server.context`",),
    ),
    Alert(
        name="UnmaskExpertShardsMissing",
        expr=f'{m.EXPERT_SHARDS.name}{{$of,state="lost"}} > 0',
        lasts="2m",
        severity="critical",
        summary="{{ $labels.pod }} is without {{ $value }} of its expert shards.",
        means=(
            "An engine has no session with shards that it was told of. With replicas of their parts it "
            "goes on, with less "
            "to fall back on; without, its requests end with UNAVAILABLE."
        ),
        look=(
            "the shards' pods, and the last line about each of them in the engine's log: connection, "
            "certificate, or other weights",
            "`unmask experts describe` against the shards that are left: which parts does nobody hold?",
        ),
        do=(
            "start them again: they are taken up within seconds. If the machine is gone, start one of "
            "the same number elsewhere",
        ),
    ),
    Alert(
        name="UnmaskExpertFramesAgain",
        expr=(
            f'sum(rate({_FRAMES}{{$of,why=~"hedge|failover"}}[10m]))'
            f' > 0.05 * sum(rate({_FRAMES}{{$of,why="first"}}[10m]))'
        ),
        lasts="10m",
        severity="warning",
        summary="More than one frame in twenty is sent to a second shard.",
        means="Answers of shards are late, refused or damaged. No token changes by that, but forwards wait.",
        look=(
            "`sum by (why) (rate(unmask_expert_frames_total[10m]))`: hedges are late answers, failovers "
            "are lost shards or refusals",
            '`unmask_shard_seconds{phase="queue"}`: several engines at one shard wait for one another',
            "the engine's log names the shard; its machine may be shared with something that takes its cores",
        ),
        do=(
            "move or replace the slow shard; more shards, or a higher replication, where all of them are "
            "slow",
        ),
    ),
    Alert(
        name="UnmaskCertificateExpires",
        expr=f"{m.TLS_CERTIFICATE_EXPIRY.name}{{$of}} - time() < 86400",
        lasts="1h",
        severity="warning",
        summary="The certificate of {{ $labels.pod }}'s port {{ $labels.port }} expires within a day.",
        means=(
            "New connections will be refused by clients once it has expired. Files that change are read "
            "without a restart."
        ),
        look=(
            "the Certificate of cert-manager, if it makes them: `kubectl describe certificate`",
            "the Secret: does it hold a newer one that the pod has not got?",
        ),
        do=("renew it; the server takes it up by itself when the files have changed",),
    ),
    Alert(
        name="UnmaskCertificateNotTaken",
        expr=f"increase({m.TLS_RELOAD_FAILURES.name}{{$of}}[15m]) > 0",
        lasts="0m",
        severity="warning",
        summary="New certificate files of {{ $labels.pod }} cannot be used.",
        means=(
            "The files changed to something that is no pair of a certificate and its key, or no CA. What "
            "was read before stays in force."
        ),
        look=("the log: it names the file and what is wrong with it",),
        do=("put a certificate, its key and the CA into the Secret that belong together",),
    ),
    Alert(
        name="UnmaskGatewayDown",
        expr="up{$gateway} == 0",
        lasts="5m",
        severity="critical",
        summary="No metrics of the gateway {{ $labels.pod }} for five minutes.",
        means=(
            "Prometheus cannot read the metrics of a gateway. As a rule its process does not run. Others "
            "take its calls, if there are others; clients with a stream there have lost it."
        ),
        look=(
            "`kubectl describe pod`, and `kubectl logs --previous`: exit code 64 says which argument is "
            "wrong, OOMKilled that it has too little memory for its calls",
            "a NetworkPolicy that keeps Prometheus out (`networkPolicy.metricsFrom` of the chart)",
        ),
        do=(
            "mend what the log names; more memory, or fewer calls (`gateway.maxCalls`)",
            "at least two gateways, so that one that is down turns nobody away",
        ),
    ),
    Alert(
        name="UnmaskGatewayWithoutReplicas",
        expr=f'{m.GATEWAY_REPLICAS.name}{{$gateway,state="ready"}} == 0',
        lasts="1m",
        severity="critical",
        summary="The gateway {{ $labels.pod }} knows no replica that takes calls.",
        means=(
            "Each call that comes to this gateway waits for `--wait-seconds` and then ends with "
            "UNAVAILABLE. Its engines are not there, are not found, take nothing new, or fail whatever they "
            "are asked."
        ),
        look=(
            "`sum by (state) (unmask_gateway_replicas)`: `out` are not there or not serving, `banned` have "
            "failed of late; none at all: the name has no addresses",
            "the gateway's log: it names each replica, and a name that cannot be resolved",
            "UnmaskServerDown, and `kubectl get endpointslices` of the engines' headless Service",
            "with TLS: the certificate of the engines has to name the headless Service, and the gateway's "
            "has to be one that engines let in",
        ),
        do=("bring the engines back: the gateway finds them by itself within seconds",),
    ),
    Alert(
        name="UnmaskGatewayCallsFail",
        expr=(
            f'sum(rate({_CALLS}{{$gateway,code=~"INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"}}[10m]))'
            f" > 0.01 * sum(rate({_CALLS}{{$gateway}}[10m]))"
        ),
        lasts="10m",
        severity="critical",
        summary="More than one call in a hundred ends at the gateway with an error that is not its fault.",
        means=(
            "Calls end with a code that is not their fault, though others of their replicas were tried. "
            "This is what users see; what engines count (UnmaskRequestsFail) has been mended by another one "
            "where it could be."
        ),
        look=(
            "UnmaskGatewayWithoutReplicas: UNAVAILABLE, where there is nobody to ask",
            "UNAVAILABLE otherwise: three replicas in turn were lost with the same call, or none is left "
            "with the weights that an answer began with, as when all engines are replaced at once",
            "INTERNAL: two replicas failed with the same call; their logs have the traceback",
        ),
        do=(
            "replace engines one at a time, so that one with the weights of the calls that run is left",
            "a defect: keep the logs, and report it with the call that causes it",
        ),
    ),
    Alert(
        name="UnmaskGatewayCallsGoOnElsewhere",
        expr=(
            f'sum(rate({_ATTEMPTS}{{$gateway,why=~"again|resume"}}[10m]))'
            f' > 0.05 * sum(rate({_ATTEMPTS}{{$gateway,why="first"}}[10m]))'
        ),
        lasts="10m",
        severity="warning",
        summary="More than one call in twenty is given to a second replica.",
        means=(
            "Replicas are lost while calls run there, or turn calls away. No token changes by that, but "
            "users wait, and prompts are read twice."
        ),
        look=(
            f"`sum by (why) (rate({_ATTEMPTS}[10m]))`: `resume` are calls that were lost in the middle, "
            "`again` those that were turned away or lost before their first block",
            f"`{m.GATEWAY_REPLICA_FAILURES.name}`: without failures, replicas are full "
            "(UnmaskRequestsTurnedAway)",
            "the gateway's log names the replica and what became of the call; restarts of its pod",
            f"`{m.GATEWAY_STALL_SECONDS.name}`: how long users wait for the next replica",
        ),
        do=(
            "more engines, where they are full",
            "mend or replace the engine that is lost again and again; a longer `termination.drainSeconds`, "
            "where calls are cut off by upgrades",
        ),
    ),
    Alert(
        name="UnmaskOperatorWithoutLeader",
        expr=(
            "sum(unmask_operator_is_leader{$operator}) < 1 or absent(unmask_operator_is_leader{$operator})"
        ),
        lasts="5m",
        severity="critical",
        summary="No copy of the operator acts; what runs goes on, nothing new is started.",
        means=(
            "No process of the operator holds its Lease, or Prometheus cannot read any of them. Jobs and "
            "services go on as they are; nothing that fails is replaced, and what people apply waits."
        ),
        look=(
            "`kubectl get pods` and `kubectl logs --previous` of the operator: does it start, and what "
            "ends it?",
            "the Lease: `kubectl describe lease`. Who holds it, and when was it last renewed?",
            "the log's lines about the lease: the API server does not answer, or the permissions of "
            "`deploy/rbac` are missing",
            "a NetworkPolicy that keeps the operator from the API server (`networkPolicy.apiServerPorts` of "
            "the chart), or Prometheus from it (`networkPolicy.metricsFrom`)",
        ),
        do=(
            "mend what the log names: a leader takes up all that has changed meanwhile",
            "two copies (`replicas: 2`), so that one takes over at once",
        ),
    ),
    Alert(
        name="UnmaskOperatorWatchIsSilent",
        expr="max by (kind) (unmask_operator_watch_age_seconds{$operator}) > 600",
        lasts="5m",
        severity="warning",
        summary="The operator has heard nothing of {{ $labels.kind }} for ten minutes.",
        means=(
            "The copy of these objects is old: the API server does not let them be listed or watched, or "
            "does not answer. Decisions that need them are made about what was."
        ),
        look=(
            "the operator's log: it names the kind, and what the API server says",
            "`rate(unmask_operator_watch_failures_total[10m])`: does it try, and fail?",
            "for DiffusionTrainJob and DiffusionInferenceService: is the definition there (`deploy/crds`)?",
            "`kubectl auth can-i list` for that kind as the operator's service account",
        ),
        do=(
            "apply the definitions and permissions of the version that runs (`deploy/crds`, `deploy/rbac`, "
            "or the chart)",
        ),
    ),
    Alert(
        name="UnmaskOperatorRetries",
        expr=(
            "sum by (kind) (increase("
            'unmask_operator_reconcile_total{$operator,result=~"failed|broken"}[15m])) > 1.5'
        ),
        lasts="30m",
        severity="warning",
        summary="The operator fails again and again at {{ $labels.kind }}; its log says at what.",
        means=(
            "Passes over a resource end with an error for half an hour, though one that fails is tried "
            "again only every five minutes in the end. Others go on; that one is not acted upon."
        ),
        look=(
            "the operator's log: each failure names the resource and what was wrong",
            "`sum by (result) (increase(unmask_operator_reconcile_total[15m]))`: `failed` is an API server "
            "that does not answer or refuses, `broken` a defect, with a traceback in the log",
        ),
        do=(
            "`failed`: mend what the API server says, as a permission or a webhook that is down",
            "`broken`: keep the log and the resource, go back to the image before, and report it",
        ),
    ),
    Alert(
        name="UnmaskResourcesStalled",
        expr="max by (kind, reason) (unmask_operator_stalled_resources{$operator}) > 0",
        lasts="10m",
        severity="warning",
        summary="For {{ $labels.reason }}, {{ $value }} of {{ $labels.kind }} wait for somebody.",
        means=(
            "The status of jobs or services says that they do not go on before somebody changes something: "
            "their condition `Stalled` is True, or a rollout is over its "
            "`rollout.progressDeadlineSeconds`. What runs goes on running."
        ),
        look=(
            "`kubectl get dtj,dis --all-namespaces`: which of them are Stalled or Stuck?",
            "`kubectl describe` of these: the message of `Stalled`, or of `Progressing`, says what is wrong "
            "and what to change",
            "`ProgressDeadlineExceeded`: `status.groups` names the groups that do not answer, and what keeps "
            "them from starting, if the cluster says so",
        ),
        do=(
            "`InvalidSpec`, `GangUnsupported`: change the manifest as the message says",
            "`NameConflict`: delete the object in the way, or take another name",
            "`Refused`: the API server's words are in the message, mostly a quota or a policy",
            "`ModelJobMissing`, `ModelJobFailed`: make the job, or name another model",
            "`ProgressDeadlineExceeded`: see to what the message names, or apply the manifest of before",
        ),
    ),
    Alert(
        name="UnmaskServiceGroupsUnavailable",
        expr=(
            "max(sum by (pod) (unmask_operator_resources"
            '{$operator,kind="DiffusionInferenceService",state=~"Degraded|Stuck"})) > 0'
        ),
        lasts="15m",
        severity="warning",
        summary="Groups of {{ $value }} services have been unavailable for a quarter of an hour.",
        means=(
            "Services have fewer groups that answer than their manifests ask for, and nobody is replacing "
            "them just now: groups were lost and do not come back, or new ones do not start. The others take "
            "their requests, if there are others."
        ),
        look=(
            "`kubectl get dis --all-namespaces`: which are Degraded (lost groups) or Stuck (a change that "
            "does not come to its end)?",
            "`kubectl describe dis`: `status.groups` says which groups are not Available, how often they "
            "were restarted, and what keeps them from starting; `Available` whether enough are left",
            "the pods of the group: `kubectl describe pod` and `kubectl logs --previous`; an engine is ready "
            "once its shards are",
        ),
        do=(
            "machines that are gone or full: bring others, or ask for fewer groups",
            "a group that ends again and again: mend what its log names, or apply the manifest of before",
        ),
    ),
)


def rules(**matchers: str) -> list[dict[str, object]]:
    """The alerts as rules of Prometheus.

    Args:
        matchers: For a placeholder (without the dollar sign) the label matchers that take its place. Alerts
            about other series are left out. Where there are no gateways, their alerts are silent.
    """
    return [
        {
            "alert": alert.name,
            "expr": alert.expr.replace(f"${alert.whose}", matchers[alert.whose]),
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary},
        }
        for alert in ALERTS
        if alert.whose in matchers
    ]
