"""What is said of a port that cannot be had."""

import socket

import grpc
import pytest

from unmask.errors import UsageError
from unmask.ports import address_of, taking
from unmask.telemetry import Recorder
from unmask.telemetry.listener import Listener


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_an_address_of_ipv6_has_brackets():
    assert address_of("localhost", 1) == "localhost:1"
    assert address_of("::1", 1) == "[::1]:1"


def test_a_taken_port_of_metrics_says_which_option_and_what_to_do(taken):
    told = rf"--metrics-port: cannot listen on 127\.0\.0\.1:{taken}: .*in use; free it, or name another one"
    with pytest.raises(UsageError, match=told), taking("--metrics-port", "127.0.0.1", taken):
        Listener("127.0.0.1", taken, Recorder(()).registry, lambda: (True, {}))


def test_a_taken_port_of_grpc_does_too(taken):
    server = grpc.server(None, options=[("grpc.so_reuseport", 0)])
    told = rf"--port: cannot listen on 127\.0\.0\.1:{taken}: it may be in use; free it, or name another one"
    with pytest.raises(UsageError, match=told), taking("--port", "127.0.0.1", taken) as address:
        server.add_insecure_port(address)


def test_a_port_that_is_free_is_had():
    with taking("--port", "127.0.0.1", 0) as address:
        assert address == "127.0.0.1:0"


def test_what_is_wrong_otherwise_keeps_its_name():
    with pytest.raises(UsageError, match="certificates"), taking("--port", "127.0.0.1", 1):
        raise UsageError("--tls-cert: no certificates")
