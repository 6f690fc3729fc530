"""A real Prometheus reads a real server and a gateway: dashboards have data, alerts fire when they should."""

import time
from pathlib import Path

import pytest
import yaml
from observability.alerts import ALERTS, Alert, rules
from observability.dashboards import queries

from support.folders import served_folder
from support.gateways import running_gateway
from support.monitoring import GATEWAY, OF, monitoring, promtool
from support.serving import CountingBatch, running_server, wait_until
from support.shards import in_process, running_shards
from unmask.client import Client
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import Recorder, metrics

pytestmark = pytest.mark.prometheus

SERVING = [alert for alert in ALERTS if alert.whose in ("of", "gateway")]

# What lets an alert fire, and what is much like it and does not: series with their values a minute apart
# (`a+bxn`: from a on, b more each time, n times), and the minute at which is looked.
CASES: dict[str, tuple[dict[str, str], dict[str, str], int]] = {
    "UnmaskServerDown": ({"up": "1x5 0x20"}, {"up": "1x5 0x3 1x20"}, 20),
    "UnmaskServerStalled": (
        {'unmask_forwards_total|kind="denoise"': "0+9x10 99x20", "unmask_requests_running": "1x30"},
        {'unmask_forwards_total|kind="denoise"': "0+9x10 99x20", "unmask_requests_running": "1x10 0x20"},
        25,
    ),
    "UnmaskTokensPerForwardDropped": (
        {
            "unmask_tokens_per_forward_decode_sum": "0+120x1560 187260+60x240",
            "unmask_tokens_per_forward_decode_count": "0+60x1800",
        },
        {
            "unmask_tokens_per_forward_decode_sum": "0+120x1560 187290+90x240",
            "unmask_tokens_per_forward_decode_count": "0+60x1800",
        },
        1790,
    ),
    "UnmaskRequestsTurnedAway": (
        {
            'unmask_admission_rejections_total|reason="requests"': "0+1x60",
            'unmask_requests_total|code="OK",finish_reason="stop"': "0+10x60",
        },
        {
            'unmask_admission_rejections_total|reason="stopped"': "0+1x60",
            'unmask_requests_total|code="OK",finish_reason="stop"': "0+10x60",
        },
        40,
    ),
    "UnmaskQueueIsSlow": (
        {
            'unmask_request_queue_seconds_bucket|le="10"': "0+50x60",
            'unmask_request_queue_seconds_bucket|le="30"': "0+60x60",
            'unmask_request_queue_seconds_bucket|le="+Inf"': "0+60x60",
        },
        {
            'unmask_request_queue_seconds_bucket|le="10"': "0+59x60",
            'unmask_request_queue_seconds_bucket|le="30"': "0+60x60",
            'unmask_request_queue_seconds_bucket|le="+Inf"': "0+60x60",
        },
        40,
    ),
    "UnmaskRequestsFail": (
        {
            'unmask_requests_total|code="INTERNAL",finish_reason=""': "0+1x60",
            'unmask_requests_total|code="OK",finish_reason="stop"': "0+10x60",
        },
        {
            'unmask_requests_total|code="CANCELLED",finish_reason=""': "0+1x60",
            'unmask_requests_total|code="OK",finish_reason="stop"': "0+10x60",
        },
        40,
    ),
    "UnmaskCacheFull": (
        {"unmask_kv_usage_ratio": "0.97x60"},
        {"unmask_kv_usage_ratio": "0.97x10 0.5 0.97x10 0.5 0.97x10 0.5 0.97x20"},
        40,
    ),
    "UnmaskExpertShardsMissing": (
        {'unmask_expert_shards|state="lost"': "0x5 1x20"},
        {'unmask_expert_shards|state="lost"': "0x5 1x1 0x20"},
        15,
    ),
    "UnmaskExpertFramesAgain": (
        {
            'unmask_expert_frames_total|why="first"': "0+100x60",
            'unmask_expert_frames_total|why="failover"': "0+6x60",
        },
        {
            'unmask_expert_frames_total|why="first"': "0+100x60",
            'unmask_expert_frames_total|why="proof"': "0+6x60",
        },
        40,
    ),
    "UnmaskCertificateExpires": (
        {'unmask_tls_certificate_expiry_seconds|port="grpc"': "80000x200"},
        {'unmask_tls_certificate_expiry_seconds|port="grpc"': "800000x200"},
        150,
    ),
    "UnmaskCertificateNotTaken": (
        {'unmask_tls_reload_failures_total|port="grpc"': "0x5 1x30"},
        {'unmask_tls_reload_failures_total|port="grpc"': "0x40"},
        10,
    ),
    "UnmaskGatewayDown": ({"up": "1x5 0x20"}, {"up": "1x5 0x3 1x20"}, 20),
    "UnmaskGatewayWithoutReplicas": (
        {
            'unmask_gateway_replicas|state="ready"': "2x5 0x20",
            'unmask_gateway_replicas|state="out"': "0x5 2x20",
        },
        {'unmask_gateway_replicas|state="ready"': "2x5 1x20", 'unmask_gateway_replicas|state="out"': "0x25"},
        15,
    ),
    "UnmaskGatewayCallsFail": (
        {
            'unmask_gateway_requests_total|code="UNAVAILABLE",finish_reason=""': "0+1x60",
            'unmask_gateway_requests_total|code="OK",finish_reason="stop"': "0+10x60",
        },
        {
            'unmask_gateway_requests_total|code="CANCELLED",finish_reason=""': "0+1x60",
            'unmask_gateway_requests_total|code="OK",finish_reason="stop"': "0+10x60",
        },
        40,
    ),
    "UnmaskGatewayCallsGoOnElsewhere": (
        {
            'unmask_gateway_attempts_total|why="first"': "0+100x60",
            'unmask_gateway_attempts_total|why="again"': "0+3x60",
            'unmask_gateway_attempts_total|why="resume"': "0+3x60",
        },
        {
            'unmask_gateway_attempts_total|why="first"': "0+100x60",
            'unmask_gateway_attempts_total|why="resume"': "0+4x60",
        },
        40,
    ),
}


def series(values: dict[str, str], whose: str) -> list[dict[str, str]]:
    """As promtool takes them: ``name|labels`` -> values."""
    found = []
    for name, steps in values.items():
        metric, _, labels = name.partition("|")
        more = f",{labels}" if labels else ""
        found.append({"series": f'{metric}{{{whose},pod="words-0"{more}}}', "values": steps})
    return found


def firing(alert: Alert, minute: int, values: dict[str, str], *, expected: int) -> dict[str, object]:
    """A test of promtool's: how many series of the alert fire."""
    samples = [{"labels": "{}", "value": expected}] if expected else []
    return {
        "interval": "1m",
        "input_series": series(values, GATEWAY if alert.whose == "gateway" else OF),
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert.name}",alertstate="firing"}})',
                "eval_time": f"{minute}m",
                "exp_samples": samples,
            }
        ],
    }


@pytest.mark.parametrize("alert", SERVING, ids=lambda alert: alert.name)
def test_an_alert_fires_when_it_should_and_not_when_it_nearly_should(alert: Alert, tmp_path: Path) -> None:
    fires, quiet, minute = CASES[alert.name]
    own = [rule for rule in rules(of=OF, gateway=GATEWAY) if rule["alert"] == alert.name]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "unmask", "rules": own}]}))
    tests = [
        firing(alert, minute, fires, expected=1),
        firing(alert, minute, quiet, expected=0),
    ]
    settings = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(settings))
    assert "SUCCESS" in promtool("check", "rules", "rules.yml", where=tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "tests.yml", where=tmp_path)


def test_without_any_server_one_is_down(tmp_path: Path) -> None:
    (alert,) = (one for one in ALERTS if one.name == "UnmaskServerDown")
    own = [rule for rule in rules(of=OF, gateway=GATEWAY) if rule["alert"] == alert.name]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "unmask", "rules": own}]}))
    tests = [firing(alert, 10, {}, expected=1)]
    settings = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(settings))
    assert "SUCCESS" in promtool("test", "rules", "tests.yml", where=tmp_path)


@pytest.mark.slow
def test_every_graph_of_the_dashboard_has_data_of_a_server_with_shards_behind_a_gateway(
    tmp_path: Path,
) -> None:
    """The gateway has another replica, which fails at its first call."""
    folder = served_folder(tmp_path / "tiny", block_length=8, threshold=0.05)
    model = ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)
    recorder = Recorder()
    with (
        running_shards(folder, 2) as shards,
        in_process(folder, [f"127.0.0.1:{one.port}" for one in shards], recorder=recorder) as (network, _),
        running_server(
            RaggedBatch(network, rows=2, capacity=128, block_length=8), model, recorder=recorder
        ) as server,
        running_server(CountingBatch(fails_at=1), model) as failing,
        running_gateway(server, failing) as gateway,
        Client(gateway.address, timeout_s=60) as client,
        monitoring(
            tmp_path,
            [f"127.0.0.1:{server.server.metrics_port}"],
            rules(of=OF, gateway=GATEWAY),
            gateways=[f"127.0.0.1:{gateway.gateway.metrics_port}"],
        ) as monitor,
    ):
        for whose in (OF, GATEWAY):
            wait_until(lambda of=whose: monitor.values(f"up{{{of}}}") == [1], timeout_s=60, every_s=0.1)
        empty, told = queries(), []
        end = time.monotonic() + 90
        while empty:
            assert time.monotonic() < end, f"no data for {empty}"
            told.append(client.generate("w7 w8", max_tokens=24).usage.tpf)
            empty = [query for query in empty if not monitor.values(asked(query))]
        mean = sum(told) / len(told)
        per_forward = f"{metrics.TOKENS_PER_FORWARD.name}_sum / {metrics.TOKENS_PER_FORWARD.name}_count"
        wait_until(
            lambda: monitor.values(per_forward) == [pytest.approx(mean)],
            timeout_s=60,
            every_s=0.1,
        )
        health = {
            rule["name"]: rule["health"]
            for group in monitor.get("/api/v1/rules")["groups"]
            for rule in group["rules"]
        }
        wait_until(lambda: not monitor.values('ALERTS{alertstate="firing"}'), timeout_s=30, every_s=0.2)
    assert health == {alert.name: "ok" for alert in SERVING}
    assert recorder.value(metrics.EXPERT_FRAMES, why="first") > 0


def asked(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$of", OF).replace("$gateway", GATEWAY).replace("$__rate_interval", "10s")
