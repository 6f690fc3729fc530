"""Where shards are, as a person writes it."""

from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.experts.addresses import (
    GroupAddress,
    GrpcAddress,
    SocketAddress,
    check_addresses,
    check_store,
    parse_addresses,
)


def test_addresses_of_all_kinds_may_stand_side_by_side() -> None:
    given = ["shard-0:50061", "[::1]:50061", "unix:/run/x.sock", "group:tcp://head:29500?shards=4"]
    assert parse_addresses(given) == (
        GrpcAddress("shard-0:50061"),
        GrpcAddress("[::1]:50061"),
        SocketAddress(Path("/run/x.sock")),
        GroupAddress("tcp://head:29500", 4),
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "expected each shard once, and one at least"),
        (["a:1", "a:1"], "expected each shard once"),
        (["unix:x", "unix:x"], "expected each shard once"),
        ([""], "expected HOST:PORT, unix:PATH or group:tcp://HOST:PORT"),
        (["nowhere"], "got 'nowhere', expected HOST:PORT"),
        ([":50061"], "got ':50061', expected HOST:PORT"),
        (["unix:"], "expected unix:PATH"),
        (["group:tcp://a:1"], "expected HOST:PORT, unix:PATH or group:tcp://HOST:PORT"),
        (["group:tcp://a:1?shards=0"], "expected one shard at least"),
        (["group:a:1?shards=2"], "got 'a:1', expected tcp://HOST:PORT"),
        (["group:tcp://a:99999?shards=2"], "got 'tcp://a:99999', expected tcp://HOST:PORT"),
        (["group:tcp://a:1?shards=2", "group:tcp://b:1?shards=2"], "in one group at most"),
    ],
)
def test_what_is_no_address_is_refused(given: list[str], complaint: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_addresses(given)
    assert complaint in str(error.value)


def test_where_only_grpc_will_do_others_are_refused() -> None:
    assert check_addresses(["a:1", "b:2"]) == ("a:1", "b:2")
    with pytest.raises(UsageError, match="got 'unix:x', expected HOST:PORT"):
        check_addresses(["a:1", "unix:x"])


def test_a_store_says_where_it_was_given() -> None:
    assert check_store("tcp://[::1]:29500", "--group") == "tcp://[::1]:29500"
    with pytest.raises(UsageError, match="--group: got 'file:///x', expected tcp://HOST:PORT"):
        check_store("file:///x", "--group")
