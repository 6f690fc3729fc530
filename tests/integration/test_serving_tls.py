"""TLS on the gRPC and the control port: who gets in, what changes while a server runs, and what does not."""

import asyncio
import json
import logging
import re
import shlex
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from parent_death import bound
from support import counts
from support.certificates import Authority, Pair, client_tls, publish, server_tls
from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.cli.main import main
from unmask.client import (
    AsyncClient,
    Client,
    ClientTls,
    Control,
    Finished,
    NotAllowed,
    RequestError,
    Unavailable,
)
from unmask.diffusion.generation import generate
from unmask.errors import UsageError
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.telemetry import metrics
from unmask.transport_security import channel_credentials, channel_options
from unmask.v1.generation_pb2 import DiffusionParams

pytestmark = pytest.mark.serving

PAGE = (Path(__file__).parents[2] / "docs/how-to/secure-connections.md").read_text(encoding="utf-8")
NAME = "engine.example"
STARTS_S = 120.0
"""Until a process answers, on a machine that does much else."""
CHANGES = counts.of(sample=6, full=100)
"""Of certificates, while requests run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=4, chat=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)


@pytest.fixture(scope="module")
def ca() -> Authority:
    """Of servers."""
    return Authority("servers")


@pytest.fixture(scope="module")
def clients() -> Authority:
    """Of clients."""
    return Authority("clients")


class Files:
    """Folders of a server and its clients, and the CAs behind them."""

    def __init__(self, path: Path, ca: Authority, clients: Authority) -> None:
        self.path, self.ca, self.clients = path, ca, clients
        self.pair = ca.issue(NAME, "127.0.0.1")

    def client(self, pair: Pair | None = None, *, ca: Authority | None = None) -> ClientTls:
        """Of a new folder."""
        folder = self.path / f"client-{len(list(self.path.iterdir()))}"
        return client_tls(folder, (ca or self.ca).pem, pair)

    def named(self, *names: str) -> ClientTls:
        """A client with a certificate for ``names``."""
        return self.client(self.clients.issue(*names))


@pytest.fixture
def files(tmp_path: Path, ca: Authority, clients: Authority) -> Files:
    return Files(tmp_path, ca, clients)


@contextmanager
def serving(
    files: Files, model: ServedModel, batch: CountingBatch | GatedBatch, *allow: str, **options: object
) -> Iterator[RunningServer]:
    tls = server_tls(files.path / "server", files.pair, files.clients.pem, allow=allow)
    with running_server(batch, model, tls=tls, **options) as running:
        yield running


@pytest.fixture
def batch() -> CountingBatch:
    return CountingBatch()


@pytest.fixture
def server(files: Files, model: ServedModel, batch: CountingBatch) -> Iterator[RunningServer]:
    """One that lets in ``gateway.example``, what is one label below ``jobs.example``, and a SPIFFE id."""
    allow = ("gateway.example", "*.jobs.example", "spiffe://example/ns/a/sa/b")
    with serving(files, model, batch, *allow) as running:
        yield running


@contextmanager
def channel(server: RunningServer, tls: ClientTls) -> Iterator[grpc.Channel]:
    credentials = channel_credentials(tls)
    with grpc.secure_channel(server.address, credentials, options=channel_options(tls)) as made:
        yield made


def answers(server: RunningServer, tls: ClientTls) -> bool:
    with Client(server.address, tls=tls, timeout_s=60) as client:
        return client.generate("w5", max_tokens=3).token_ids == (6, 7, 8)


def not_connected(server: RunningServer, tls: ClientTls | None) -> RequestError:
    """The error of a client that gets no connection."""
    with Client(server.address, tls=tls, timeout_s=60) as client:
        with pytest.raises(Unavailable) as refused:
            client.generate("w5", max_tokens=3)
    return refused.value


def presented(
    server: RunningServer, files: Files, tls: ClientTls, signed_by: Authority | None = None
) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=(signed_by or files.ca).pem.decode())
    assert tls.certificate is not None and tls.key is not None
    context.load_cert_chain(tls.certificate, tls.key)
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=30) as plain:
        with context.wrap_socket(plain, server_hostname=NAME) as secure:
            der = secure.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


# Who gets in


@pytest.mark.parametrize(
    "name", ["gateway.example", "GATEWAY.example", "one.jobs.example", "spiffe://example/ns/a/sa/b"]
)
def test_a_client_that_is_allowed_is_answered(server: RunningServer, files: Files, name: str) -> None:
    assert answers(server, files.named("unknown.example", name))


def test_the_client_for_asyncio_gets_in_the_same_way(server: RunningServer, files: Files) -> None:
    async def ask(tls: ClientTls) -> tuple[int, ...]:
        async with AsyncClient(server.address, tls=tls, timeout_s=60) as client:
            return (await client.generate("w5", max_tokens=3)).token_ids

    assert asyncio.run(ask(files.named("gateway.example"))) == (6, 7, 8)
    with pytest.raises(NotAllowed):
        asyncio.run(ask(files.named("other.example")))


def test_a_client_that_is_not_allowed_is_told_so_by_every_method(
    server: RunningServer, files: Files, batch: CountingBatch
) -> None:
    other = files.client(files.clients.issue("a.b.jobs.example", common_name="gateway.example"))
    with Client(server.address, tls=other, timeout_s=60) as client:
        for ask in (
            lambda: client.generate("w5", max_tokens=3),
            lambda: list(client.stream("w5", max_tokens=3)),
            client.model_info,
        ):
            with pytest.raises(
                NotAllowed, match="'a.b.jobs.example'; have one added to --tls-allow"
            ) as refused:
                ask()
            assert (refused.value.code, refused.value.exit_code) == ("PERMISSION_DENIED", 64)
            assert not refused.value.retryable
    with channel(server, other) as made:
        health = health_pb2_grpc.HealthStub(made)
        request = health_pb2.HealthCheckRequest()
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reflected = reflection_pb2_grpc.ServerReflectionStub(made).ServerReflectionInfo
        for call in (
            lambda: health.Check(request, timeout=30),
            lambda: list(health.Watch(request, timeout=30)),
            lambda: list(reflected(iter([asked]), timeout=30)),
        ):
            with pytest.raises(grpc.RpcError) as denied:
                call()
            assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
    recorder = server.server.recorder
    assert recorder.value(metrics.REQUESTS, code="PERMISSION_DENIED", finish_reason="") == 2
    assert batch.forwards == []


def test_garbage_of_a_client_that_is_not_allowed_is_not_even_read(
    server: RunningServer, files: Files
) -> None:
    with channel(server, files.named("other.example")) as made:
        call = made.unary_unary("/unmask.v1.Generation/Generate")
        with pytest.raises(grpc.RpcError) as denied:
            call(b"\xff" * 100_000, timeout=30)
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with channel(server, files.named("gateway.example")) as made:
        call = made.unary_unary("/unmask.v1.Generation/Generate")
        with pytest.raises(grpc.RpcError) as unreadable:
            call(b"\xff" * 100_000, timeout=30)
        assert unreadable.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_whoever_has_no_certificate_of_the_ca_gets_no_connection(server: RunningServer, files: Files) -> None:
    stranger = Authority("clients").issue("gateway.example")  # a CA of the same name, with another key
    for tls in (files.client(), files.client(stranger), None):
        assert "it hung up: does it speak TLS (--tls-ca), and has its CA" in str(not_connected(server, tls))
    elsewhere = files.client(files.clients.issue("gateway.example"), ca=Authority("servers"))
    assert "has a CA in --tls-ca signed the server's certificate" in str(not_connected(server, elsewhere))
    assert answers(server, files.named("gateway.example"))


def test_a_client_with_an_expired_certificate_gets_no_connection(server: RunningServer, files: Files) -> None:
    expired = files.clients.issue("gateway.example", begins=-timedelta(days=2))
    credentials = grpc.ssl_channel_credentials(files.ca.pem, expired.key, expired.certificate)
    with grpc.secure_channel(server.address, credentials) as made:
        with pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_without_a_ca_for_clients_nobody_is_asked_and_health_answers(
    files: Files, model: ServedModel
) -> None:
    tls = server_tls(files.path / "server", files.pair)
    with running_server(CountingBatch(), model, tls=tls) as server:
        assert answers(server, files.client())
        assert answers(server, files.named("anybody.example"))
        with channel(server, files.client()) as made:
            status = (
                health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest(), timeout=30).status
            )
        assert status == health_pb2.HealthCheckResponse.SERVING
        not_connected(server, None)


def test_the_server_has_to_be_the_one_that_the_client_means(files: Files, model: ServedModel) -> None:
    pair = files.ca.issue(NAME)  # not for 127.0.0.1
    with running_server(CountingBatch(), model, tls=server_tls(files.path / "server", pair)) as server:
        not_connected(server, files.client())
        right = client_tls(files.path / "right", files.ca.pem, server_name=NAME)
        wrong = client_tls(files.path / "wrong", files.ca.pem, server_name="other.example")
        assert answers(server, right)
        assert "give that one with --tls-server-name" in str(not_connected(server, wrong))
    with running_server(CountingBatch(), model) as plain:
        assert "it does not speak TLS: leave --tls-ca out" in str(not_connected(plain, right))


def test_the_control_port_has_a_ca_and_names_of_its_own(files: Files, model: ServedModel) -> None:
    admins = Authority("admins")
    control_tls = server_tls(
        files.path / "control",
        files.pair,
        admins.pem,
        allow=["spiffe://example/admin"],
        options="--control-tls",
    )
    options = {"control_port": 0, "control_tls": control_tls}
    with serving(files, model, CountingBatch(), "gateway.example", **options) as server:
        address = f"127.0.0.1:{server.server.control_port}"
        admin = files.client(admins.issue("spiffe://example/admin"))
        with Control(address, tls=admin, timeout_s=60) as control:
            assert control.abort_all() == ()
        with Control(address, tls=files.client(admins.issue("gateway.example")), timeout_s=60) as control:
            with pytest.raises(NotAllowed, match="--control-tls-allow"):
                control.abort_all()
        for tls in (files.named("spiffe://example/admin"), files.client(), None):
            with Control(address, tls=tls, timeout_s=60) as control, pytest.raises(Unavailable):
                control.abort_all()
        assert answers(server, files.named("gateway.example"))
        not_connected(server, admin)


def test_probes_and_metrics_need_no_certificate(server: RunningServer) -> None:
    with urllib.request.urlopen(server.health_url, timeout=30) as told:
        assert json.loads(told.read()) == {"status": "serving"}
    with urllib.request.urlopen(server.metrics_url, timeout=30) as told:
        assert 'unmask_tls_certificate_expiry_seconds{port="grpc"}' in told.read().decode()


def asked(running: RunningServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(running.health_url.replace("healthz", path), timeout=60) as told:
            return told.status, json.loads(told.read())["status"]
    except urllib.error.HTTPError as unwell:
        return unwell.code, json.loads(unwell.read())["status"]


def test_a_server_whose_loop_no_longer_turns_is_neither_well_nor_alive(
    files: Files, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(files, model, CountingBatch()) as running:
        go_on = threading.Event()
        monkeypatch.setattr("unmask.fronts.process._TURN_S", 0.5)
        running.server._loop.call_soon_threadsafe(go_on.wait, 60)
        try:
            assert asked(running, "healthz") == asked(running, "livez") == (503, "stuck")
        finally:
            go_on.set()
        monkeypatch.setattr("unmask.fronts.process._TURN_S", 30)
        assert (asked(running, "healthz"), asked(running, "livez")) == ((200, "serving"), (200, "alive"))


def test_a_server_that_drains_is_not_well_but_alive(files: Files, model: ServedModel) -> None:
    with serving(files, model, CountingBatch(), control_port=0) as running:
        with Control(f"127.0.0.1:{running.server.control_port}", timeout_s=60) as control:
            list(control.drain())
            assert (asked(running, "healthz"), asked(running, "livez")) == ((503, "draining"), (200, "alive"))


# What changes while it runs


def test_a_stream_goes_on_while_new_connections_get_the_new_certificate(
    files: Files, model: ServedModel
) -> None:
    batch = GatedBatch(CountingBatch())
    with serving(files, model, batch, "gateway.example") as server:
        recorder, mine = server.server.recorder, files.named("gateway.example")
        first_expiry = recorder.value(metrics.TLS_CERTIFICATE_EXPIRY, port="grpc")
        assert presented(server, files, mine) == files.pair.certificate
        with Client(server.address, tls=mine, timeout_s=60) as client:
            stream = client.stream("w5", max_tokens=8)
            next(stream)
            later = files.ca.issue(NAME, "127.0.0.1", lasts=timedelta(days=9))
            other_ca = Authority("new clients")
            server_tls(files.path / "server", later, other_ca.pem)
            new = files.client(other_ca.issue("gateway.example"))
            assert presented(server, files, new) == later.certificate != files.pair.certificate
            # The CA that signed the old one is gone; its certificate was good a moment ago.
            not_connected(server, mine)
            batch.open()
            *_, last = stream
            assert isinstance(last, Finished) and last.usage.completion_tokens == 8
            assert client.generate("w5", max_tokens=3).token_ids == (6, 7, 8)  # on its old connection
        assert answers(server, new)
        not_connected(server, mine)
        now = recorder.value(metrics.TLS_CERTIFICATE_EXPIRY, port="grpc")
        assert now - first_expiry == pytest.approx(8 * 86400, abs=600)
        assert recorder.value(metrics.TLS_RELOAD_FAILURES, port="grpc") == 0


def test_what_cannot_be_used_leaves_the_old_in_force(
    files: Files, model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(files, model, CountingBatch(), "gateway.example") as server, caplog.at_level(logging.INFO):
        mine, other = files.named("gateway.example"), files.ca.issue(NAME)
        recorder = server.server.recorder
        for failures, broken in enumerate(
            (
                {"tls.crt": files.pair.certificate, "tls.key": other.key, "ca.crt": files.clients.pem},
                {"tls.crt": other.certificate[:99], "tls.key": other.key, "ca.crt": files.clients.pem},
                {"tls.crt": other.certificate, "tls.key": other.key, "ca.crt": b"garbage"},
            ),
            start=1,
        ):
            publish(files.path / "server", broken)
            for _ in range(3):
                assert presented(server, files, mine) == files.pair.certificate
            assert answers(server, mine)
            assert recorder.value(metrics.TLS_RELOAD_FAILURES, port="grpc") == failures
            told = [
                record.getMessage() for record in caplog.records if "stays in force" in record.getMessage()
            ]
            assert len(told) == failures
        server_tls(files.path / "server", other, files.clients.pem)
        assert presented(server, files, mine) == other.certificate


def test_files_are_looked_at_though_nobody_connects(
    files: Files, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.fronts.grpc_port._READ_S", 0.05)
    with serving(files, model, CountingBatch()) as server:
        recorder = server.server.recorder
        first = recorder.value(metrics.TLS_CERTIFICATE_EXPIRY, port="grpc")
        later = files.ca.issue(NAME, "127.0.0.1", lasts=timedelta(days=9))
        server_tls(files.path / "server", later, files.clients.pem)
        wait_until(lambda: recorder.value(metrics.TLS_CERTIFICATE_EXPIRY, port="grpc") > first)
        publish(files.path / "server", {"tls.crt": b"", "tls.key": b"", "ca.crt": b""})
        wait_until(lambda: recorder.value(metrics.TLS_RELOAD_FAILURES, port="grpc") == 1)
        # What the loop found, the next connection gets.
        assert presented(server, files, files.named("any.example")) == later.certificate


def test_no_request_fails_while_everybody_s_certificates_change(files: Files, model: ServedModel) -> None:
    """New pairs each time, and every third time of new CAs, which both sides trust before they are used.

    One client keeps its connection, and the others connect for each request, with the files of that moment.
    """
    ca, clients = files.ca, files.clients
    mine = client_tls(files.path / "client", ca.pem, clients.issue("gateway.example"))
    done, failures, answered = threading.Event(), list[str](), [0, 0, 0]

    def ask(number: int, server: RunningServer) -> None:
        client = Client(server.address, tls=mine, timeout_s=60)
        while not done.is_set():
            try:
                if number > 0:
                    client.close()
                    client = Client(server.address, tls=mine, timeout_s=60)
                if client.generate("w5", max_tokens=3).token_ids != (6, 7, 8):
                    failures.append("other tokens")
            except (RequestError, UsageError) as error:
                failures.append(str(error))
            answered[number] += 1
        client.close()

    def all_ask() -> None:
        """Wait until everyone has begun a request and ended it."""
        before = list(answered)
        wait_until(lambda: all(now >= then + 2 for now, then in zip(answered, before, strict=True)))

    with serving(files, model, CountingBatch(), "gateway.example") as server:

        def change(pair: Pair, my_pair: Pair, cas: bytes, clients_cas: bytes) -> None:
            server_tls(files.path / "server", pair, clients_cas)
            client_tls(files.path / "client", cas, my_pair)
            all_ask()

        threads = [threading.Thread(target=ask, args=(number, server)) for number in range(len(answered))]
        for thread in threads:
            thread.start()
        try:
            pair, my_pair = files.pair, clients.issue("gateway.example")
            for number in range(1, CHANGES + 1):
                trusted = ca.pem, clients.pem
                if number % 3 == 0:
                    ca, clients = Authority("servers"), Authority("clients")
                    trusted = trusted[0] + ca.pem, trusted[1] + clients.pem
                    change(pair, my_pair, *trusted)
                pair, my_pair = ca.issue(NAME, "127.0.0.1"), clients.issue("gateway.example")
                change(pair, my_pair, *trusted)
                change(pair, my_pair, ca.pem, clients.pem)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert failures == [], f"of {sum(answered)} requests"
        assert presented(server, files, mine, ca) == pair.certificate
        assert server.server.recorder.value(metrics.TLS_RELOAD_FAILURES, port="grpc") == 0
        not_connected(server, files.named("gateway.example"))  # whom CAs signed that are gone


# Whoever means harm


def test_what_is_not_tls_takes_no_harm_and_does_none(server: RunningServer, files: Files) -> None:
    hostile = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        bytes(range(256)) * 64,
        b"\x16\x03\x01\x40\x00" + b"\x01" * 64,  # a handshake that never ends
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"",
    ]
    open_sockets = []
    for content in hostile * 10:
        connection = socket.create_connection(("127.0.0.1", server.server.port), timeout=30)
        open_sockets.append(connection)
        try:
            connection.sendall(content)
        except OSError:
            pass  # the server has closed it already
    assert answers(server, files.named("gateway.example"))
    for connection in open_sockets:
        connection.close()
    assert answers(server, files.named("gateway.example"))
    assert server.server.recorder.value(metrics.TLS_RELOAD_FAILURES, port="grpc") == 0


# On the command line


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, told.out, told.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tls-cert a", "--tls-cert and --tls-key: give both or none"),
        ("--tls-key a", "--tls-cert and --tls-key: give both or none"),
        (
            "--tls-client-ca a",
            "--tls-client-ca: without TLS nobody can be asked; give --tls-cert and --tls-key",
        ),
        ("--tls-allow a", "--tls-allow: without TLS nobody can be asked"),
        ("--control-port 0 --control-tls-allow a", "--control-tls-allow: without TLS nobody can be asked"),
        ("--experts-tls-key a", "--experts-tls-key: give --experts-tls-ca, too, with the CAs that sign cert"),
        ("{pair} --control-tls-client-ca a", "--control-tls-client-ca: there is no control port; give --con"),
        ("{pair} --tls-allow a", "--tls-allow: clients that show no certificate have no names"),
        ("{pair} --control-port 0 --control-tls-allow a", "--control-tls-allow: clients that show no cert"),
        (
            "{pair} --tls-client-ca {folder}/ca.crt --tls-allow *a",
            "--tls-allow: got '*a', expected a DNS name",
        ),
        (
            "{pair} --tls-client-ca nowhere",
            "--tls-client-ca nowhere: cannot be read: No such file or directory",
        ),
        ("--tls-cert {folder}/tls.crt --tls-key {folder}/ca.crt", "ca.crt: holds no private key"),
    ],
)
def test_a_server_says_what_is_wrong_before_it_reads_the_model(
    capsys: pytest.CaptureFixture[str], files: Files, options: str, message: str
) -> None:
    folder = files.path / "server"
    server_tls(folder, files.pair, files.clients.pem)
    pair = f"--tls-cert {folder}/tls.crt --tls-key {folder}/tls.key"
    words = shlex.split(options.format(pair=pair, folder=folder).replace("*", r"\*"))
    code, out, told = ended(capsys, "serve", "no-model", *words)
    assert (
        (code, out) == (64, "") and told.startswith("error: ") and message in told and told.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tls-cert a --tls-key b", "--tls-cert: give --tls-ca, too, with the CAs"),
        ("--tls-server-name a", "--tls-server-name: give --tls-ca, too, with the CAs"),
        (
            "--tls-ca {folder}/ca.crt --tls-cert {folder}/tls.crt",
            "--tls-cert and --tls-key: give both or none",
        ),
        ("--tls-ca nowhere", "--tls-ca nowhere: cannot be read: No such file or directory"),
        ("--tls-ca {folder}/tls.key", "tls.key: holds no certificate that can be read"),
    ],
)
@pytest.mark.parametrize(
    "command", ["generate hello", "control resume", "bench serve --prompts {folder}/prompts --rate 1"]
)
def test_a_client_s_commands_say_what_is_wrong(
    capsys: pytest.CaptureFixture[str], files: Files, command: str, options: str, message: str
) -> None:
    folder = files.path / "client"
    client_tls(folder, files.ca.pem, files.clients.issue("a"))
    (folder / "prompts").write_text("w5\n", encoding="utf-8")
    words = shlex.split(f"{command} --server 127.0.0.1:1 {options}".format(folder=folder))
    code, out, told = ended(capsys, *words)
    assert (
        (code, out) == (64, "") and told.startswith("error: ") and message in told and told.count("\n") == 1
    )


def page_folder(path: Path, folder: Path, files: Files) -> None:
    """What the page begins with."""
    (path / "out/run").mkdir(parents=True)
    (path / "out/run/model").symlink_to(folder)
    certificates = path / "certificates"
    certificates.mkdir()
    (certificates / "ca.crt").write_bytes(files.ca.pem)
    (certificates / "clients-ca.crt").write_bytes(files.clients.pem)
    for name, pair in {
        "tls": files.ca.issue(NAME),
        "gateway": files.clients.issue("gateway.example"),
        "admin": files.clients.issue("spiffe://example/ns/serving/sa/admin"),
    }.items():
        (certificates / f"{name}.crt").write_bytes(pair.certificate)
        (certificates / f"{name}.key").write_bytes(pair.key)


@contextmanager
def page_server(line: str) -> Iterator[Callable[[str], str]]:
    """A server that a line of the page starts, on free ports; what puts those into other lines."""
    words = [*shlex.split(line)[1:], "--port=0", "--metrics-port=0", "--threads=1"]
    words += ["--control-port=0"] if "--control-port" in words else []
    command = bound([sys.executable, "-m", "unmask.cli.main", *words])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        late = threading.Timer(STARTS_S, process.kill)  # then its output ends
        late.start()
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            late.cancel()
            ports = re.findall(r" on 127\.0\.0\.1:(\d+)", told)
            assert ports, told or f"it did not start within {STARTS_S} s"
            places = {":50051": ports[0], ":50061": ports[0], ":50052": ports[-1]}
            yield lambda text: re.sub(r":500[56][12]\b", lambda match: f":{places[match[0]]}", text)
        finally:
            late.cancel()
            process.kill()


def page_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("unmask ")]


@pytest.fixture
def in_page_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, files: Files) -> None:
    page_folder(tmp_path / "page", folder, files)
    monkeypatch.chdir(tmp_path / "page")


@pytest.mark.slow
@pytest.mark.usefixtures("in_page_folder")
def test_the_page_s_commands_do_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    plain, ask_plain, mutual, ask_mutual, control, *_ = page_commands()
    with page_server(plain) as placed:
        code, text, _ = ended(capsys, *shlex.split(placed(ask_plain))[1:])
        assert code == 0 and text.strip()
    with page_server(mutual) as placed:
        code, again, _ = ended(capsys, *shlex.split(placed(ask_mutual))[1:])
        assert (code, again) == (0, text)
        assert ended(capsys, *shlex.split(placed(control))[1:]) == (0, "taking calls\n", "")
        code, _, told = ended(capsys, *shlex.split(placed(ask_mutual).replace("gateway", "admin"))[1:])
        assert code == 64 and "'spiffe://example/ns/serving/sa/admin'" in told
        (prompts := Path("prompts.txt")).write_text("w5\n", encoding="utf-8")
        loaded = placed(ask_mutual).replace("generate hello", f"bench serve --prompts {prompts} --rate 50")
        code, out, _ = ended(capsys, *shlex.split(loaded)[1:], "--requests=3", "--alone=1", "--json")
        assert code == 0 and json.loads(out)["loaded"]["answered"] == 3
        (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
        exec(compile(placed(snippet), "page", "exec"), {})
        assert capsys.readouterr().out == text


@pytest.mark.slow
@pytest.mark.usefixtures("in_page_folder")
def test_the_page_s_commands_with_expert_shards_do_what_it_says(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    *_, shard, describe, serve = page_commands()
    with page_server(shard) as placed:
        code, out, _ = ended(capsys, *shlex.split(placed(describe))[1:])
        assert code == 0 and "epoch 1: of 1 parts, holds 0" in out
        with page_server(placed(serve)) as server:
            ask = server("generate hello --max-tokens 8 --json --server 127.0.0.1:50051")
            code, out, _ = ended(capsys, *shlex.split(ask))
            assert code == 0 and json.loads(out)["token_ids"] == alone(folder)


def alone(folder: Path) -> list[int]:
    """What one process that holds the experts writes."""
    model = ServedModel.describe(folder, read_config(folder), name=None, rows=1, context_length=128)
    params = model.params(model.default_decoder, DiffusionParams(), max_new_tokens=8)
    return generate(load(folder), [model.tokenizer.encode("hello")], params, rows=1)[0].token_ids
