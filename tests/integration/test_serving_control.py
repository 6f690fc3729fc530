"""The control port: ending calls, draining, and other weights, while a server goes on."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.cli.main import cli
from unmask.client import (
    Aborted,
    BlockCommitted,
    Client,
    Control,
    Finished,
    InvalidRequest,
    Load,
    RequestError,
    Unavailable,
    UnsupportedRequest,
)
from unmask.models.loading import build, load, save, weights_digest
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.weights import ServedWeights
from unmask.telemetry import metrics

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("models") / "tiny", block_length=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)


@pytest.fixture
def gated(model: ServedModel) -> Iterator[tuple[GatedBatch, RunningServer]]:
    batch = GatedBatch(CountingBatch(rows=1))
    with running_server(batch, model, control_port=0, http_port=0) as running:
        yield batch, running


def control_of(server: RunningServer) -> Control:
    return Control(control_address(server), timeout_s=60)


def control_address(server: RunningServer) -> str:
    return f"127.0.0.1:{server.server.control_port}"


def health_of(server: RunningServer) -> int:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service="unmask.v1.Generation")
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status


# Abort


def test_an_aborted_call_ends_with_what_it_has_committed(gated: tuple[GatedBatch, RunningServer]) -> None:
    batch, server = gated
    batch.let(5)  # one block, and a position of the next
    with Client(server.address) as client, control_of(server) as control:
        stream = client.stream("w5", max_tokens=100, request_id="long")
        events = [next(stream), next(stream)]
        assert isinstance(events[1], BlockCommitted) and events[1].token_ids == (6, 7, 8, 9)
        assert control.abort(["long", "never came", "long"]) == ("long",)
        with pytest.raises(Aborted, match="whoever runs the server") as aborted:
            next(stream)
        assert aborted.value.code == "ABORTED" and not aborted.value.retryable
        batch.let(1)  # the forward that may have begun
        wait_until(lambda: batch.active == 0)
        assert batch.done <= 6
        assert server.server.recorder.value(metrics.CANCELLED, by="operator") == 1
        assert control.abort(["long"]) == ()


def test_all_calls_are_aborted_those_that_wait_and_those_over_http_too(
    gated: tuple[GatedBatch, RunningServer],
) -> None:
    import openai

    _, server = gated
    http = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.server.http_port}/v1", api_key="none", max_retries=3
    )
    ask = {"model": "tiny", "prompt": "w5", "max_tokens": 50}
    with (
        Client(server.address) as client,
        control_of(server) as control,
        http,
        ThreadPoolExecutor(3) as threads,
    ):
        calls = [
            threads.submit(client.generate, "w5", max_tokens=50),
            threads.submit(client.generate, "w6", max_tokens=50),
            threads.submit(http.completions.create, **ask),
        ]
        wait_until(lambda: sum(server.server.engine.load) == 3)
        assert len(control.abort_all()) == 3
        for call in calls[:2]:
            with pytest.raises(Aborted):
                call.result(30)
        # A client of OpenAI's asks again after most errors; after this one it does not.
        with pytest.raises(openai.APIStatusError) as refused:
            calls[2].result(30)
        assert refused.value.status_code == 499
        assert server.server.engine.load[1] == 0


@pytest.mark.parametrize("given", [{}, {"request_ids": ["a"], "all": True}], ids=["nothing", "both"])
def test_it_has_to_be_said_which_calls(gated: tuple[GatedBatch, RunningServer], given: dict) -> None:
    from unmask.v1 import control_pb2 as pb
    from unmask.v1.control_pb2_grpc import ControlStub

    with grpc.insecure_channel(control_address(gated[1])) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            ControlStub(channel).Abort(pb.AbortRequest(**given), timeout=30)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "one of the two" in refused.value.details()


# Drain


def test_a_drain_tells_what_is_left_and_a_resumed_server_takes_calls_again(
    gated: tuple[GatedBatch, RunningServer],
) -> None:
    batch, server = gated
    with (
        Client(server.address) as client,
        control_of(server) as control,
        ThreadPoolExecutor(2) as threads,
    ):
        running = threads.submit(client.generate, "w5", max_tokens=2)
        wait_until(lambda: server.server.engine.load == (1, 0))
        waiting = threads.submit(client.generate, "w6", max_tokens=2)
        wait_until(lambda: server.server.engine.load == (1, 1))
        drain = control.drain()
        assert next(drain) == Load(running=1, waiting=1)
        assert health_of(server) == NOT_SERVING
        with pytest.raises(Unavailable):
            client.generate("w7")
        batch.let(2)
        assert next(drain) in (Load(running=0, waiting=1), Load(running=1, waiting=0))
        batch.let(2)
        assert list(drain)[-1] == Load(running=0, waiting=0)
        assert running.result(30).token_ids == (6, 7) and waiting.result(30).token_ids == (7, 8)
        control.resume()
        assert health_of(server) == SERVING
        batch.open()
        assert client.generate("w7", max_tokens=1).token_ids == (8,)


def test_a_drain_that_is_undone_says_so(gated: tuple[GatedBatch, RunningServer]) -> None:
    _, server = gated
    with Client(server.address) as client, control_of(server) as control:
        stream = client.stream("w5", max_tokens=2)
        next(stream)
        drain = control.drain()
        next(drain)
        control.resume()
        with pytest.raises(InvalidRequest, match="resumed meanwhile"):
            list(drain)


def test_a_server_that_shuts_down_is_not_resumed(gated: tuple[GatedBatch, RunningServer]) -> None:
    batch, server = gated
    with Client(server.address) as client, control_of(server) as control:
        stream = client.stream("w5", max_tokens=2)
        next(stream)
        stopping = threading.Thread(target=server.stop, args=(30,))
        stopping.start()
        wait_until(lambda: not server.server._gate.open)
        with pytest.raises(InvalidRequest, match="shutting down"):
            control.resume()
        batch.open()
        assert isinstance(list(stream)[-1], Finished)
        stopping.join(30)


# Weights


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Of the same shape, with other numbers."""
    path = folder.parent / "other"
    save(build(read_config(folder), seed=7), path)
    return path


@pytest.fixture
def replaceable(folder: Path, model: ServedModel) -> Iterator[tuple[GatedBatch, RunningServer]]:
    weights = ServedWeights(folder)
    batch = GatedBatch(model.batch(weights.network))
    with running_server(batch, model, weights=weights, control_port=0) as running:
        yield batch, running


def test_no_answer_is_of_two_weights_and_nothing_stored_of_the_old_ones_is_used(
    replaceable: tuple[GatedBatch, RunningServer], model: ServedModel, folder: Path, other: Path
) -> None:
    """One request runs, one waits when the weights change: the first is of the old, the other of the new."""
    prompt, ask = "w5 w6 w7 w8 w9 w10 w11 w12", {"max_tokens": 12}
    expected = []
    for path in (folder, other):
        with running_server(model.batch(load(path)), model) as alone, Client(alone.address) as client:
            expected.append(client.generate(prompt, **ask).token_ids)  # type: ignore[arg-type]
    assert expected[0] != expected[1]
    batch, server = replaceable
    with (
        Client(server.address) as client,
        control_of(server) as control,
        ThreadPoolExecutor(3) as threads,
    ):
        assert client.model_info().revision is None  # it came without checksums
        first = threads.submit(client.generate, prompt, **ask)  # type: ignore[arg-type]
        wait_until(lambda: server.server.engine.load == (1, 0))
        update = threads.submit(control.update_weights, "other")
        wait_until(lambda: bool(server.server.engine._works))
        second = threads.submit(client.generate, prompt, **ask)  # type: ignore[arg-type]
        wait_until(lambda: server.server.engine.load == (1, 1))  # there is a row, and it waits
        batch.open()
        assert first.result(30).token_ids == expected[0]
        assert second.result(30).token_ids == expected[1]
        assert update.result(30) == weights_digest(other) == client.model_info().revision
        assert server.server.recorder.value(metrics.PREFIX_HIT_TOKENS) == 0
        assert client.generate(prompt, **ask).token_ids == expected[1]  # type: ignore[arg-type]
        assert server.server.recorder.value(metrics.PREFIX_HIT_TOKENS) > 0


def _of_another_shape(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))


def _cut(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])


def _in_a_circle(path: Path) -> None:
    (path.parent / "circle").symlink_to("circle")


def _not_finite(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"
    (path / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (_of_another_shape, "spoilt", r"rope_theta: got 12345\.0, the model has"),
        (_cut, "spoilt", "model.safetensors"),
        (_not_finite, "spoilt", "infinite or not a number"),
        (lambda path: None, "../../etc", "must be inside"),
        (lambda path: None, "/etc", "must be inside"),
        (lambda path: None, "missing", "'missing', and there is no such folder"),
        (lambda path: None, "no such\nfolder", "a text of 14 characters, and there is no such folder"),
        (lambda path: None, "spoilt/config.json", "no such folder"),
        (_in_a_circle, "circle", "cannot be the name of one|no such folder"),
        (lambda path: None, "zero\0byte", "got a text of 9 characters"),
        (lambda path: None, "a" * 5000, "a text of 5000 characters, which cannot be the name of one"),
        (lambda path: None, "", "name a model folder"),
    ],
    ids=[
        "another shape",
        "cut",
        "not finite",
        "above",
        "outside",
        "missing",
        "two lines",
        "a file",
        "a circle",
        "a zero byte",
        "long",
        "empty",
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    replaceable: tuple[GatedBatch, RunningServer], folder: Path, spoil, name: str, says: str
) -> None:
    shutil.copytree(folder, folder.parent / "spoilt", dirs_exist_ok=True)
    spoil(folder.parent / "spoilt")
    batch, server = replaceable
    batch.open()
    with Client(server.address) as client, control_of(server) as control:
        before = client.generate("w5 w6", max_tokens=8)
        with pytest.raises(InvalidRequest, match=says):
            control.update_weights(name)
        assert client.generate("w5 w6", max_tokens=8).token_ids == before.token_ids


def test_a_disk_that_fails_in_the_middle_ends_the_server(
    replaceable: tuple[GatedBatch, RunningServer], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("unmask.models.replacement.fill", fails)
    batch, server = replaceable
    batch.open()
    with Client(server.address) as client, control_of(server) as control:
        with pytest.raises(RequestError, match="its log says why") as failed:
            control.update_weights("other")
        assert failed.value.code == "INTERNAL"
        server.wait_failed()
        with pytest.raises(Unavailable, match="the model has failed"):
            client.generate("w5")


def test_a_server_that_does_not_know_its_weights_says_so(gated: tuple[GatedBatch, RunningServer]) -> None:
    with control_of(gated[1]) as control, pytest.raises(InvalidRequest, match="cannot be replaced"):
        control.update_weights("other")


# Who may


def test_the_public_port_has_no_control(gated: tuple[GatedBatch, RunningServer]) -> None:
    _, server = gated
    with Control(server.address) as control, pytest.raises(UnsupportedRequest):
        control.abort_all()
    with Client(control_address(server)) as client, pytest.raises(UnsupportedRequest):
        client.generate("w5")


def test_without_its_option_there_is_no_control_port(model: ServedModel) -> None:
    with running_server(CountingBatch(), model) as server:
        assert server.server.control_port is None


# The command


def test_the_command_line_does_all_of_it(replaceable: tuple[GatedBatch, RunningServer], other: Path) -> None:
    batch, server = replaceable
    batch.open()

    def ran(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["control", *words, "--server", control_address(server)])
        return result.exit_code, result.output

    assert ran("drain") == (0, "0 running, 0 waiting\n")
    assert ran("resume") == (0, "taking calls\n")
    assert ran("abort", "--all") == (0, "")
    assert ran("abort", "nobody") == (0, "")
    assert ran("update-weights", "other") == (0, weights_digest(other) + "\n")
