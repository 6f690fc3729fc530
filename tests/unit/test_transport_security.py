"""Certificates in files, names in certificates, and who may call a server of threads."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from support.certificates import Authority, Pair, client_tls, ec_key, publish, server_tls
from unmask.errors import UsageError
from unmask.transport_security import (
    AllowedNames,
    ClientTls,
    PeerNames,
    PeersAllowed,
    ServerCertificates,
    ServerTls,
    channel_credentials,
    channel_options,
    check_server_files,
    names_of,
    server_credentials,
)
from unmask.transport_security.certificates import ServerContent, content_for
from unmask.transport_security.pem import PemFile


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def pair(ca: Authority) -> Pair:
    return ca.issue("engine.example", "127.0.0.1")


# Names


@pytest.mark.parametrize(
    ("allowed", "name"),
    [
        ("client.example", "client.example"),
        ("Client.Example", "cLIENT.eXAMPLE"),
        ("a_b-c.example", "a_b-c.example"),
        ("*.example", "client.example"),
        ("*.ns.svc", "client.NS.svc"),
        ("localhost", "localhost"),
        ("spiffe://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/b"),
        ("https://client.example/Path?q#f", "https://client.example/Path?q#f"),
    ],
)
def test_a_name_is_allowed(ca: Authority, allowed: str, name: str) -> None:
    peer = names_of(ca.issue("other.example.org", name, "10.0.0.1").certificate)
    assert AllowedNames(["unrelated", allowed, "spiffe://unrelated"]).admit(peer)
    assert not AllowedNames(["unrelated", "spiffe://unrelated"]).admit(peer)


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        ("client.example", ["clientXexample", "client.example.org", "a.client.example", "client.example."]),
        ("*.example", ["example", "a.b.example", ".example", "*.example", "a b.example", "-a.example"]),
        ("*.example", ["x.example.org", "axexample"]),
        ("10.0.0.1", ["10.0.0.1"]),  # an address is no name
        ("spiffe://c/ns/a", ["spiffe://c/ns/a/b", "spiffe://C/ns/a", "Spiffe://c/ns/a", "spiffe://c/ns/"]),
    ],
)
def test_a_name_is_not_allowed(ca: Authority, allowed: str, names: list[str]) -> None:
    peer = names_of(ca.issue(*names).certificate)
    assert len(peer.dns) + len(peer.uris) == (0 if names == ["10.0.0.1"] else len(names))
    assert not AllowedNames([allowed]).admit(peer)


def test_a_name_that_goes_on_behind_a_nul_is_another_name(ca: Authority) -> None:
    peer = names_of(ca.issue("client.example\0.evil.org", "a\0.example", "spiffe://c/a\0b").certificate)
    assert peer == PeerNames(("client.example\0.evil.org", "a\0.example"), ("spiffe://c/a\0b",))
    assert not AllowedNames(["client.example", "*.example", "spiffe://c/a"]).admit(peer)
    assert "\0" not in str(peer)


def test_the_common_name_is_no_name(ca: Authority) -> None:
    allowed = AllowedNames(["client.example", "*.example"])
    with_other = ca.issue("other", common_name="client.example").certificate
    assert names_of(with_other) == PeerNames(("other",)) and not allowed.admit(names_of(with_other))
    without_any = ca.issue(common_name="client.example").certificate
    assert names_of(without_any) == PeerNames() and not allowed.admit(names_of(without_any))


@pytest.mark.parametrize(
    "pem", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
def test_what_is_no_certificate_has_no_names(pem: bytes) -> None:
    assert names_of(pem) == PeerNames()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "*",
        "*.",
        "a b",
        "a..b",
        ".a",
        "a.",
        "*a.b",
        "a.*.b",
        "*.*.a",
        "x" * 64,
        "spiffe://",
        "spiffe://a/*",
    ]
    + ["spiffe://a b", "A://b", "client.example\0", "\N{LATIN SMALL LETTER U WITH DIAERESIS}.example"],
)
def test_what_is_no_name_cannot_be_allowed(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        AllowedNames(["good.example", name], option="--some-allow")
    assert str(refused.value).startswith(
        f"--some-allow: got {name!r}, expected a DNS name, whose first label"
    )


LABELS = st.text("ab1-_.*", max_size=6)


@given(LABELS, LABELS)
def test_a_wildcard_is_one_label_however_names_are_made(allowed: str, name: str) -> None:
    """The same, told as rules about characters."""
    try:
        names = AllowedNames([allowed])
    except UsageError:
        return
    labels = name.split(".")
    well_formed = all(label and "*" not in label and label[0] != "-" and label[-1] != "-" for label in labels)
    wanted = allowed.split(".")
    fits = len(labels) == len(wanted) and all(
        (want == "*" and at == 0) or want == label
        for at, (want, label) in enumerate(zip(wanted, labels, strict=True))
    )
    assert names.admit(PeerNames((name,))) == (well_formed and fits)


def test_a_refusal_tells_few_names_and_short_ones() -> None:
    peer = PeerNames(tuple(f"{number}" * 1000 for number in range(10)), ("spiffe://a",))
    assert len(str(peer)) < 600
    assert str(PeerNames()) == "none"


# Files


def broken(tmp_path: Path, ca: Authority, pair: Pair) -> dict[str, tuple[dict[str, bytes | None], str]]:
    """What may be wrong with a server's files, and how it is told."""
    other = ca.issue("engine.example")
    expired = ca.issue("engine.example", begins=-timedelta(days=2))
    future = ca.issue("engine.example", begins=timedelta(days=1))
    edwards = ca.issue("engine.example", key=ed25519.Ed25519PrivateKey.generate())
    koblitz = ca.issue("engine.example", key=ec_key(ec.SECP256K1()))
    large = ca.issue("engine.example", key=ec_key(ec.SECP521R1()))
    locked = ca.issue("engine.example", passphrase=b"open")

    def both(of: Pair) -> dict[str, bytes | None]:
        return {"tls.crt": of.certificate, "tls.key": of.key}

    return {
        "no certificate": ({"tls.crt": None}, "--tls-cert {}/tls.crt: cannot be read: No such file"),
        "no key": ({"tls.key": None}, "--tls-key {}/tls.key: cannot be read: No such file"),
        "no CA": ({"ca.crt": None}, "--tls-client-ca {}/ca.crt: cannot be read: No such file"),
        "another key": ({"tls.key": other.key}, "--tls-key {}/tls.key: does not fit the certificate in {}"),
        "another certificate": ({"tls.crt": other.certificate}, "--tls-key {}/tls.key: does not fit"),
        "CA before its own": ({"tls.crt": ca.pem + pair.certificate}, "--tls-key {}/tls.key: does not fit"),
        "half a certificate": ({"tls.crt": pair.certificate[:200]}, "--tls-cert {}/tls.crt: holds no cert"),
        "half a key": ({"tls.key": pair.key[:100]}, "--tls-key {}/tls.key: holds no private key"),
        "empty": ({"tls.crt": b""}, "--tls-cert {}/tls.crt: holds no certificate that can be read"),
        "no CA in it": ({"ca.crt": b"\n"}, "--tls-client-ca {}/ca.crt: holds no certificate"),
        "garbage": ({"ca.crt": bytes(range(256))}, "--tls-client-ca {}/ca.crt: holds no certificate"),
        "the key as the certificate": ({"tls.crt": pair.key}, "--tls-cert {}/tls.crt: holds no certificate"),
        "expired": (both(expired), "--tls-cert {}/tls.crt: expired at "),
        "not yet": (both(future), "--tls-cert {}/tls.crt: is valid from "),
        "a passphrase": (both(locked), "--tls-key {}/tls.key: the key is encrypted; give one without"),
        "Ed25519": (both(edwards), "--tls-key {}/tls.key: the key is of a kind that gRPC does not take"),
        "secp256k1": (both(koblitz), "--tls-key {}/tls.key: the key is of a kind that gRPC does not take"),
        "P-521": (both(large), "--tls-key {}/tls.key: the key is of a kind that gRPC does not take"),
        "endless": ({"ca.crt": b"\n" * 5_000_000}, "--tls-client-ca {}/ca.crt: holds more than 4194304"),
    }


WRONG = list(broken(Path(), Authority(), Authority().issue("a")))


def write(folder: Path, ca: Authority, pair: Pair, changes: dict[str, bytes | None]) -> None:
    files = {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": ca.pem} | changes
    publish(folder, {name: content for name, content in files.items() if content is not None})


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_cannot_be_used_are_told_with_option_and_name(
    tmp_path: Path, ca: Authority, pair: Pair, wrong: str
) -> None:
    changes, message = broken(tmp_path, ca, pair)[wrong]
    write(tmp_path, ca, pair, changes)
    tls = ServerTls(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key", client_ca=tmp_path / "ca.crt")
    for use in (check_server_files, ServerCertificates, server_credentials):
        with pytest.raises(UsageError) as refused:
            use(tls)
        assert str(refused.value).startswith(message.format(tmp_path, tmp_path)), refused.value
        assert "\n" not in str(refused.value) and refused.value.exit_code == 64


@pytest.mark.parametrize("wrong", [name for name in WRONG if name not in ("no CA",)])
def test_a_client_is_told_the_same(tmp_path: Path, ca: Authority, pair: Pair, wrong: str) -> None:
    changes, message = broken(tmp_path, ca, pair)[wrong]
    write(tmp_path, ca, pair, changes)
    tls = ClientTls(ca=tmp_path / "ca.crt", certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    with pytest.raises(UsageError) as refused:
        channel_credentials(tls)
    expected = message.format(tmp_path, tmp_path).replace("--tls-client-ca", "--tls-ca")
    assert str(refused.value).startswith(expected), refused.value


def test_a_client_gives_certificate_and_key_or_none(tmp_path: Path, ca: Authority, pair: Pair) -> None:
    tls = client_tls(tmp_path, ca.pem, pair, server_name="engine.example")
    assert channel_options(tls) == (("grpc.ssl_target_name_override", "engine.example"),)
    assert channel_options(replace(tls, server_name=None)) == ()
    channel_credentials(tls)
    channel_credentials(replace(tls, certificate=None, key=None))
    for half in (replace(tls, certificate=None), replace(tls, key=None)):
        with pytest.raises(UsageError, match="--tls-cert and --tls-key: give both or none"):
            channel_credentials(half)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        channel_credentials(replace(tls, ca=tmp_path))


def test_names_without_a_ca_would_let_in_anybody_and_are_refused(tmp_path: Path, pair: Pair) -> None:
    tls = server_tls(tmp_path, pair, allow=["a.example"], options="--control-tls")
    with pytest.raises(UsageError, match="--control-tls-allow: .* give --control-tls-client-ca, too"):
        ServerCertificates(tls)


# What comes into force


def content(pair: Pair, client_ca: bytes | None = None) -> ServerContent:
    return ServerContent(
        PemFile("--tls-cert", Path("tls.crt"), pair.certificate),
        PemFile("--tls-key", Path("tls.key"), pair.key),
        None if client_ca is None else PemFile("--tls-client-ca", Path("ca.crt"), client_ca),
    )


def test_the_decision_is_made_of_contents_and_a_time(ca: Authority, pair: Pair) -> None:
    moment = datetime.now(UTC)
    now, later = content(pair, ca.pem), content(ca.issue("engine.example"), ca.pem)
    assert content_for(now, content(pair, ca.pem), moment) is None
    assert content_for(now, later, moment) is later
    other_ca = content(pair, Authority().pem)
    assert content_for(now, other_ca, moment) is other_ca
    mixed = replace(later, certificate=now.certificate)
    with pytest.raises(UsageError, match="does not fit"):
        content_for(now, mixed, moment)
    with pytest.raises(UsageError, match="expired"):
        content_for(now, later, moment + timedelta(days=3))
    # What is in force is not thrown away for its age: there is nothing better.
    assert content_for(now, content(pair, ca.pem), moment + timedelta(days=3)) is None


def test_no_key_is_in_what_is_printed(pair: Pair) -> None:
    assert pair.key.decode().splitlines()[1] not in repr(content(pair))


class Told:
    """What a server's certificates tell."""

    def __init__(self) -> None:
        self.expiries: list[float] = []
        self.failures: list[str] = []

    def certificates(self, tls: ServerTls) -> ServerCertificates:
        return ServerCertificates(tls, in_force=self.expiries.append, failed=self.failures.append)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_used_changes_nothing_and_is_told_once(
    tmp_path: Path, ca: Authority, pair: Pair, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    certificates = told.certificates(server_tls(tmp_path, pair, ca.pem))
    changes, message = broken(tmp_path, ca, pair)[wrong]
    write(tmp_path, ca, pair, changes)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            certificates.look()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].getMessage().startswith("what was read before stays in force: --")
    assert len(told.failures) == 1 and told.failures[0].startswith(message.format(tmp_path, tmp_path))
    assert len(told.expiries) == 1
    # What can be used comes into force then, and the same fault another time is told another time.
    write(tmp_path, ca, ca.issue("engine.example", lasts=timedelta(days=7)), {})
    certificates.look()
    assert told.expiries[1] - told.expiries[0] == pytest.approx(6 * 86400, abs=3600)
    write(tmp_path, ca, pair, changes)
    certificates.look()
    assert len(told.failures) == 2 and len(told.expiries) == 2


def test_a_pair_that_is_copied_file_by_file_comes_into_force_when_it_is_whole(
    tmp_path: Path, ca: Authority, pair: Pair
) -> None:
    told = Told()
    tls = ServerTls(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    tls.certificate.write_bytes(pair.certificate)
    tls.key.write_bytes(pair.key)
    certificates = told.certificates(tls)
    later = ca.issue("engine.example")
    for end in (0, 100, len(later.certificate)):
        tls.certificate.write_bytes(later.certificate[:end])
        certificates.look()
        certificates.look()
    assert len(told.failures) == 3 and len(told.expiries) == 1
    tls.key.write_bytes(later.key)
    certificates.look()
    assert len(told.failures) == 3 and len(told.expiries) == 2


def test_a_swap_between_two_reads_is_no_failure(
    tmp_path: Path, ca: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmask.transport_security import certificates as module

    told = Told()
    tls = server_tls(tmp_path, pair, ca.pem)
    certificates = told.certificates(tls)
    later, plain = ca.issue("engine.example"), module.read
    swaps = iter([later])

    def swapping(option: str, path: Path) -> PemFile:
        found = plain(option, path)
        if option == "--tls-cert" and (new := next(swaps, None)):
            server_tls(tmp_path, new, ca.pem)
        return found

    monkeypatch.setattr(module, "read", swapping)
    certificates.look()
    assert told.failures == [] and len(told.expiries) == 2
    swaps = iter([pair])
    check_server_files(tls)  # nor is one while a server starts
    assert next(swaps, None) is None


def test_a_client_may_connect_while_its_files_are_swapped(
    tmp_path: Path, ca: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmask.transport_security import channels as module

    tls, plain = client_tls(tmp_path, ca.pem, pair), module.read
    swaps = iter([ca.issue("engine.example")])

    def swapping(option: str, path: Path) -> PemFile:
        found = plain(option, path)
        if option == "--tls-cert" and (new := next(swaps, None)):
            client_tls(tmp_path, ca.pem, new)
        return found

    monkeypatch.setattr(module, "read", swapping)
    channel_credentials(tls)
    assert next(swaps, None) is None
    (tmp_path / "tls.key").unlink()
    with pytest.raises(UsageError, match="--tls-key .*: cannot be read"):  # what stays wrong is told
        channel_credentials(tls)


# A server of threads


Counted = dict[str, int]


@contextmanager
def threads_server(tls: ServerTls) -> Iterator[tuple[str, Counted]]:
    """One with a method of each kind, and how often each was reached, read, and refused."""
    counted: Counted = {"reached": 0, "read": 0, "refused": 0}

    def count(name: str) -> None:
        counted[name] += 1

    def read(message: bytes) -> bytes:
        count("read")
        return message

    def one(message: bytes, context: grpc.ServicerContext) -> bytes:
        count("reached")
        return message

    def many(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        count("reached")
        yield message
        yield message

    def gather(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        count("reached")
        return b"".join(messages)

    def echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        count("reached")
        yield from messages

    handlers = {
        "One": grpc.unary_unary_rpc_method_handler(one, request_deserializer=read),
        "Many": grpc.unary_stream_rpc_method_handler(many, request_deserializer=read),
        "Gather": grpc.stream_unary_rpc_method_handler(gather, request_deserializer=read),
        "Echo": grpc.stream_stream_rpc_method_handler(echo, request_deserializer=read),
    }
    interceptor = PeersAllowed(tls.allowed_names(), lambda method: count("refused"))
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[interceptor] if tls.allow else [])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(tls))
    server.start()
    try:
        yield f"127.0.0.1:{port}", counted
    finally:
        server.stop(0).wait(30)


def calls(channel: grpc.Channel) -> dict[str, Callable[[], bytes]]:
    return {
        "One": lambda: channel.unary_unary("/Test/One")(b"ab", timeout=30),
        "Many": lambda: b"".join(channel.unary_stream("/Test/Many")(b"ab", timeout=30)),
        "Gather": lambda: channel.stream_unary("/Test/Gather")(iter([b"a", b"b"]), timeout=30),
        "Echo": lambda: b"".join(channel.stream_stream("/Test/Echo")(iter([b"a", b"b"]), timeout=30)),
    }


@contextmanager
def connected(address: str, tls: ClientTls) -> Iterator[grpc.Channel]:
    with grpc.secure_channel(address, channel_credentials(tls), options=channel_options(tls)) as channel:
        yield channel


@pytest.mark.parametrize("allow", [["client.example", "spiffe://c/a"], ["*.example"], []])
def test_an_allowed_peer_reaches_methods_of_every_kind(
    tmp_path: Path, ca: Authority, pair: Pair, allow: list[str]
) -> None:
    clients = Authority("clients")
    tls = server_tls(tmp_path / "server", pair, clients.pem, allow=allow)
    mine = client_tls(tmp_path / "client", ca.pem, clients.issue("client.example"))
    with threads_server(tls) as (address, counted), connected(address, mine) as channel:
        answers = {name: call() for name, call in calls(channel).items()}
    assert answers == {"One": b"ab", "Many": b"abab", "Gather": b"ab", "Echo": b"ab"}
    assert counted == {"reached": 4, "read": 6, "refused": 0}


def test_another_peer_reaches_none_and_its_messages_are_not_read(
    tmp_path: Path, ca: Authority, pair: Pair
) -> None:
    clients = Authority("clients")
    tls = server_tls(tmp_path / "server", pair, clients.pem, allow=["client.example"])
    other = clients.issue("client.example\0.evil.org", "other.example", common_name="client.example")
    with (
        threads_server(tls) as (address, counted),
        connected(address, client_tls(tmp_path / "client", ca.pem, other)) as channel,
    ):
        for call in calls(channel).values():
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "'other.example'" in refused.value.details() and "--tls-allow" in refused.value.details()
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/Test/Nothing")(b"", timeout=30)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert counted == {"reached": 0, "read": 0, "refused": 4}


KEYS: dict[str, Callable[[], ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]] = {
    "P-256": ec_key,
    "P-384": lambda: ec_key(ec.SECP384R1()),
    "RSA": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_that_are_taken_do_serve(tmp_path: Path, ca: Authority, kind: str) -> None:
    make = KEYS[kind]
    tls = server_tls(tmp_path / "server", ca.issue("127.0.0.1", key=make()), ca.pem, allow=["client.example"])
    mine = client_tls(tmp_path / "client", ca.pem, ca.issue("client.example", key=make()))
    with threads_server(tls) as (address, _), connected(address, mine) as channel:
        assert calls(channel)["One"]() == b"ab"


@pytest.mark.parametrize(
    "key",
    [ec_key(ec.SECP521R1()), ed25519.Ed25519PrivateKey.generate()],
    ids=["P-521", "Ed25519"],
)
def test_keys_that_are_not_taken_could_not_serve(
    ca: Authority, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
) -> None:
    """Should a later gRPC take them, this fails, and so may the check."""
    pair = ca.issue("127.0.0.1", key=key)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pair.key, pair.certificate)]))
    server.start()
    try:
        trusting = grpc.ssl_channel_credentials(ca.pem)
        with grpc.secure_channel(f"127.0.0.1:{port}", trusting) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/Test/Nothing")(b"", timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop(0).wait(30)
