"""From the addresses of shards to an exchange of rows with them."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

from unmask.experts.exchange import Exchange
from unmask.experts.frames import WireDtype, wire_dtype
from unmask.experts.holding import shape_of_experts
from unmask.experts.links import GrpcLink, Inbox, check_addresses
from unmask.experts.shard import most_frame_bytes
from unmask.models.config import ModelConfig
from unmask.telemetry import Recorder
from unmask.transport_security import ClientTls, channel_credentials
from unmask.v1 import experts_pb2 as pb

__all__ = ["connected"]

_MOST_TOKENS = 1 << 16
"""In one frame, whatever shards take: more than a forward has."""


@contextmanager
def connected(
    addresses: Sequence[str],
    config: ModelConfig,
    *,
    revision: str,
    rows_as: WireDtype = "float32",
    recorder: Recorder | None = None,
    patience_s: float = 5.0,
    tls: ClientTls | None = None,
) -> Iterator[Exchange]:
    """An exchange with shards, which connects meanwhile.

    Args:
        addresses: ``HOST:PORT`` of each, those to ask first in front.
        config: Of the model.
        revision: SHA-256 over its weight files; shards with others refuse.
        rows_as: What rows are sent as.
        recorder: Takes the metrics.
        patience_s: How long a forward waits for experts that no shard can be asked for.
        tls: Files to connect with, which are read for each connection; plaintext if None.

    Raises:
        UsageError: Addresses that are none, or files that cannot be used.
        ModelError: The model has no experts that could be elsewhere.
    """
    if tls is not None:
        channel_credentials(tls)  # a fault of files at the start is told at once, not in the log
    shape = shape_of_experts(config)
    offer = pb.SessionOffer(engine=socket.gethostname(), revision=revision, shape=shape.message())
    inbox: Inbox = SimpleQueue()
    largest = most_frame_bytes(shape.hidden_size, _MOST_TOKENS)
    links = [
        GrpcLink(address, offer, inbox, max_bytes=largest, tls=tls) for address in check_addresses(addresses)
    ]
    exchange = Exchange(links, inbox, rows_as=wire_dtype(rows_as), recorder=recorder, patience_s=patience_s)
    try:
        yield exchange
    finally:
        exchange.close()
