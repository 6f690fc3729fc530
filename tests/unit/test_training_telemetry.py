"""The log as metrics, over a listener that is not in the way, and as curves."""

import http.client
import json
import socket
import threading
import time

import pytest

from unmask.cli.main import main
from unmask.errors import UsageError
from unmask.telemetry import listener as listening
from unmask.telemetry import metrics
from unmask.training.curves import curves_of, draw
from unmask.training.exporting import Exporter, ratio_ranges
from unmask.training.run_folder import RunFolder


def step(number, **values):
    notes = {
        "seconds": {"data": 0.25, "reduce": 0.5},
        "tokens_per_second": 64.0,
        "supervised_tokens": 48,
        "supervised_tokens_per_second": 24.0,
        "mfu": 0.25,
        "loss_by_ratio": [1.0, None, 3.0, 4.0, 5.0],
        "expert_imbalance": [1.5, 2.5],
        "expert_tokens": [[3, 1], [0, 4]],
        "experts_unused": 3,
        "checkpoint_write_seconds": 7.0,
    }
    line = {
        "kind": "step",
        "step": number,
        "stage": "blocks",
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 0.01,
        "tokens": 128,
        "seconds": 2.0,
        "telemetry": notes,
    }
    return line | values


def get(port, path, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def exporter():
    return Exporter(hang_timeout_s=100)


def test_every_figure_of_a_line_is_exported(exporter):
    exporter.observe(step(4))
    exporter.observe(step(5, skipped="Spike", loss=None, grad_norm=None))
    exporter.observe({"kind": "eval", "step": 5, "stage": "blocks", "loss": 2.5})
    exporter.observe({"kind": "rollback", "step": 3, "stage": "blocks"})
    value = exporter.recorder.value
    assert value(metrics.TRAIN_STEP) == 3
    assert value(metrics.TRAIN_STEPS, verdict="Taken") == value(metrics.TRAIN_STEPS, verdict="Spike") == 1
    assert value(metrics.TRAIN_ROLLBACKS) == 1
    assert value(metrics.TRAIN_LOSS, stage="blocks") == 2.0
    assert value(metrics.TRAIN_EVAL_LOSS, stage="blocks") == 2.5
    assert value(metrics.TRAIN_LOSS_BY_RATIO, stage="blocks", ratio="0.4-0.6") == 3.0
    assert value(metrics.TRAIN_GRAD_NORM) == 1.0
    assert value(metrics.TRAIN_LEARNING_RATE) == 0.01
    assert value(metrics.TRAIN_TOKENS, kind="clean") == 256
    assert value(metrics.TRAIN_TOKENS, kind="supervised") == 96
    assert value(metrics.TRAIN_TOKENS_PER_SECOND, kind="supervised") == 24.0
    assert value(metrics.TRAIN_MFU) == 0.25
    assert value(metrics.TRAIN_STEP_SECONDS) == 2
    assert value(metrics.TRAIN_PHASE_SECONDS, phase="reduce") == 1.0
    assert value(metrics.TRAIN_CHECKPOINT_WRITE_SECONDS) == 7.0
    assert value(metrics.TRAIN_EXPERT_IMBALANCE, router="1") == 2.5
    assert value(metrics.TRAIN_EXPERT_TOKENS, router="1", expert="1") == 4
    assert value(metrics.TRAIN_EXPERTS_UNUSED) == 3


def test_prometheus_and_probes_are_answered_and_nothing_else(exporter):
    exporter.observe(step(4))
    with exporter.listening(0, host="127.0.0.1") as listener:
        status, text = get(listener.port, "/metrics")
        assert status == 200
        assert 'unmask_train_loss{stage="blocks"} 2.0' in text.split("\n")
        status, text = get(listener.port, "/healthz")
        assert (status, json.loads(text)["step"]) == (200, 4)
        assert get(listener.port, "/metrics", "HEAD") == (200, "")
        assert get(listener.port, "/else")[0] == 404
        assert get(listener.port, "/metrics", "POST")[0] == 501
    with pytest.raises(ConnectionRefusedError):
        get(listener.port, "/metrics")


def test_a_host_with_a_colon_is_an_ipv6_address(exporter):
    with exporter.listening(0, host="::1") as listener:
        with socket.create_connection(("::1", listener.port), timeout=10) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert connection.recv(8) == b"HTTP/1.0"


def test_nobody_is_asked_for_this_hosts_name(exporter, monkeypatch):
    def asked(*names):
        raise AssertionError(f"asked for {names}")

    monkeypatch.setattr(socket, "getfqdn", asked)
    with exporter.listening(0, host="") as listener:
        assert listener.port


def test_a_run_without_progress_is_unwell():
    exporter = Exporter(hang_timeout_s=0.05)
    with exporter.listening(0, host="127.0.0.1") as listener:
        time.sleep(0.1)
        assert get(listener.port, "/healthz")[0] == 503
        exporter.progress()
        exporter._limit_s = 100
        assert get(listener.port, "/healthz")[0] == 200


def test_clients_that_say_nothing_hold_a_few_connections_for_a_short_time(exporter, monkeypatch):
    monkeypatch.setattr(listening._Handler, "timeout", 0.5)
    with exporter.listening(0, host="127.0.0.1") as listener:
        silent = [
            socket.create_connection(("127.0.0.1", listener.port)) for _ in range(listening._CONNECTIONS)
        ]
        deadline = time.monotonic() + 5
        while threading.active_count() < listening._CONNECTIONS and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            get(listener.port, "/metrics")
        time.sleep(0.8)
        assert get(listener.port, "/metrics")[0] == 200
        for one in silent:
            one.close()


def test_a_taken_port_is_said_in_one_line(exporter):
    with exporter.listening(0, host="127.0.0.1") as listener:
        with pytest.raises(UsageError, match=rf"spec.telemetry.port: cannot listen on .*:{listener.port}: "):
            with Exporter().listening(listener.port, host="127.0.0.1"):
                raise AssertionError("two listen at one port")


def test_without_a_port_there_is_no_listener(exporter):
    with exporter.listening(None) as listener:
        assert listener is None


def test_curves_leave_out_what_is_missing():
    lines = [
        step(1),
        step(2, skipped="NotFinite", loss=None, grad_norm=None),
        step(3, skipped="Spike", grad_norm=90.0),
        {"kind": "eval", "step": 3, "stage": "blocks", "loss": 2.5},
        step(4, telemetry={}),
    ]
    panels = curves_of(lines)
    assert panels["loss"] == {"blocks": ([1, 4], [2.0, 2.0]), "blocks, held out": ([3], [2.5])}
    assert panels["gradient norm"] == {"taken": ([1, 4], [1.0, 1.0]), "skipped": ([3], [90.0])}
    assert set(panels["loss by ratio of masks"]) == set(ratio_ranges()) - {"0.2-0.4"}
    assert panels["seconds of a step"]["reduce"] == ([1, 2, 3], [0.5] * 3)


def test_a_picture_is_drawn(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(step(number)) + "\n" for number in range(1, 9)))
    draw(folder, tmp_path / "curves.png")
    head = (tmp_path / "curves.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") == 1080


def test_the_command_draws_beside_the_log_and_says_where(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(step(n))}\n" for n in (1, 2)))
    for options, path in (([], tmp_path / "curves.png"), (["--output", str(tmp_path / "other.png")], None)):
        with pytest.raises(SystemExit) as ended:
            main(["plot", str(tmp_path), *options])
        target = path or tmp_path / "other.png"
        assert ended.value.code in (0, None)
        assert capsys.readouterr().out == f"wrote {target}\n"
        assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        main(["plot", str(tmp_path / "nowhere")])
    assert ended.value.code == 64
    assert "metrics.jsonl: cannot be read" in capsys.readouterr().err


def test_a_run_without_a_step_has_no_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="has no step yet"):
        draw(RunFolder(tmp_path), tmp_path / "curves.png")
