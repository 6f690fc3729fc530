"""Expert shards behind TLS: the same tokens for servers that are let in, and files that change meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from support.certificates import Authority, client_tls, server_tls
from support.shards import golden_folder, holding_of, in_process
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import generate
from unmask.errors import UsageError
from unmask.experts.connecting import connected
from unmask.experts.moving import describe
from unmask.experts.shard import Shard, ShardOptions
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.telemetry import metrics
from unmask.transport_security import ClientTls, ServerTls

pytestmark = pytest.mark.shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


@contextmanager
def shard(folder: Path, tls: ServerTls | None, *, port: int = 0) -> Iterator[Shard]:
    """One that holds all experts."""
    holding = holding_of(folder, 0, shards=1)
    running = Shard(holding, ShardOptions(port=port, metrics_port=0, tls=tls))
    running.start()
    try:
        yield running
    finally:
        running.stop(0)


def tokens(network: LanguageModel) -> list[int]:
    params = DecodingParams(
        max_new_tokens=16,
        block_length=8,
        threshold=0.6,
        eos_token_id=network.config.vocab_size,
        mask_token_id=network.mask_token_id,
    )
    return generate(network, [[5, 6, 7]], params, rows=1)[0].token_ids


def never_complete(folder: Path, address: str, tls: ClientTls | None, *, wait_s: float = 2.0) -> str:
    """Why a server that is not let in has no experts."""
    with connected([address], read_config(folder), revision="0" * 64, tls=tls) as exchange:
        assert not exchange.wait_complete(wait_s)
        return exchange.missing


def test_a_server_that_is_let_in_writes_the_same_tokens_and_others_get_nothing(
    folder: Path, tmp_path: Path
) -> None:
    ca, engines = Authority("shards"), Authority("engines")
    pair = ca.issue("127.0.0.1")
    tls = server_tls(tmp_path / "shard", pair, engines.pem, allow=["engine.example"])
    mine = client_tls(tmp_path / "mine", ca.pem, engines.issue("engine.example"))
    other = client_tls(tmp_path / "other", ca.pem, engines.issue("other.example"))
    stranger = client_tls(tmp_path / "stranger", ca.pem, Authority("engines").issue("engine.example"))
    with shard(folder, tls) as running:
        address = f"127.0.0.1:{running.port}"
        with in_process(folder, [address], tls=mine) as (network, _):
            assert tokens(network) == tokens(load(folder))
        assert [held.name for held in describe([address], tls=mine)] == ["shard"]
        with pytest.raises(UsageError, match="PERMISSION_DENIED: .*'other.example'.* --tls-allow"):
            describe([address], tls=other)
        for none in (stranger, client_tls(tmp_path / "none", ca.pem), None):
            with pytest.raises(UsageError, match="UNAVAILABLE"):
                describe([address], tls=none)
        served = running.recorder.value(metrics.SHARD_ROWS)
        for tls_of_others in (other, stranger, None):
            assert "no session with" in never_complete(folder, address, tls_of_others)
        assert running.recorder.value(metrics.SHARD_ROWS) == served > 0
        assert running.recorder.value(metrics.TLS_CERTIFICATE_EXPIRY, port="shard") > 0


def test_a_server_connects_again_with_the_files_of_that_moment(folder: Path, tmp_path: Path) -> None:
    ca, engines = Authority("shards"), Authority("engines")
    tls = server_tls(tmp_path / "shard", ca.issue("127.0.0.1"), engines.pem)
    mine = client_tls(tmp_path / "mine", ca.pem, engines.issue("engine.example"))
    with shard(folder, tls) as first:
        port = first.port
        with in_process(folder, [f"127.0.0.1:{port}"], tls=mine) as (network, exchange):
            expected = tokens(network)
            # Everything is new, on both sides; the session that stands goes on.
            ca, engines = Authority("new shards"), Authority("new engines")
            later = ca.issue("127.0.0.1", lasts=timedelta(days=9))
            server_tls(tmp_path / "shard", later, engines.pem)
            client_tls(tmp_path / "mine", ca.pem, engines.issue("engine.example"))
            assert tokens(network) == expected
            first.stop(0)
            with shard(folder, tls, port=port):
                assert exchange.wait_complete(60), exchange.missing
                assert tokens(network) == expected


def test_files_that_cannot_be_used_are_told_before_anything_is_connected(
    folder: Path, tmp_path: Path
) -> None:
    missing = ClientTls(ca=tmp_path / "nowhere", options="--experts-tls")
    with pytest.raises(UsageError, match="--experts-tls-ca .*nowhere: cannot be read"):
        with connected(["127.0.0.1:1"], read_config(folder), revision="0", tls=missing):
            pass
    with pytest.raises(UsageError, match="--tls-ca .*nowhere: cannot be read"):
        describe(["127.0.0.1:1"], tls=ClientTls(ca=tmp_path / "nowhere"))
    broken = ServerTls(certificate=tmp_path / "nowhere", key=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--tls-cert .*nowhere: cannot be read"):
        Shard(holding_of(folder, 0, shards=1), ShardOptions(tls=broken))
