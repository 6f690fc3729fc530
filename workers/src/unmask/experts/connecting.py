"""From the addresses of shards to an exchange of rows with them."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

from unmask.experts.addresses import GroupAddress, GrpcAddress, SocketAddress, parse_addresses
from unmask.experts.exchange import Exchange
from unmask.experts.frames import WireDtype, wire_dtype
from unmask.experts.group import EngineGroup
from unmask.experts.holding import shape_of_experts
from unmask.experts.links import GrpcLink, Inbox, Link
from unmask.experts.shard import most_frame_bytes
from unmask.experts.socket_link import SocketLink
from unmask.models.config import ModelConfig
from unmask.telemetry import Recorder
from unmask.transport_security import ClientTls, channel_credentials
from unmask.v1 import experts_pb2 as pb

__all__ = ["connected"]

_MOST_TOKENS = 1 << 16
"""In one frame, whatever shards take: more than a forward has."""
_MOST_SHARED_TOKENS = 4096
"""In one frame in shared memory, which has a place of that size for each; larger ones are sent in several."""


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
    device: str = "cpu",
) -> Iterator[Exchange]:
    """An exchange with shards, which connects meanwhile.

    Args:
        addresses: Of each, those to ask first in front; ``HOST:PORT``, ``unix:PATH``, or
            ``group:tcp://HOST:PORT?shards=N`` for all of a group.
        config: Of the model.
        revision: SHA-256 over its weight files; shards with others refuse.
        rows_as: What rows are sent as.
        recorder: Takes the metrics.
        patience_s: How long a forward waits for experts that no shard can be asked for.
        tls: Files to connect with, which are read for each connection; plaintext if None.
        device: From which rows are sent to a group.

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
    links: list[Link] = []
    with ExitStack() as stack:
        for address in parse_addresses(addresses):
            match address:
                case GrpcAddress(target):
                    links.append(GrpcLink(target, offer, inbox, max_bytes=largest, tls=tls))
                case SocketAddress(path):
                    shared = most_frame_bytes(shape.hidden_size, _MOST_SHARED_TOKENS)
                    links.append(
                        SocketLink(path, offer, inbox, max_tokens=_MOST_SHARED_TOKENS, max_bytes=shared)
                    )
                case GroupAddress():
                    group = EngineGroup(address, offer, inbox, max_bytes=largest, device=device)
                    stack.callback(group.close)
                    links += group.links
        exchange = Exchange(
            links, inbox, rows_as=wire_dtype(rows_as), recorder=recorder, patience_s=patience_s
        )
        stack.callback(exchange.close)
        yield exchange
