"""Expert shards in the test's own process, and links that fail as they are told."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch

from support.folders import GOLDEN
from unmask.experts.answering import Answering, Seen
from unmask.experts.connecting import connected
from unmask.experts.exchange import Exchange
from unmask.experts.failover import Pace, Timing
from unmask.experts.frames import (
    Frame,
    Status,
    WireDtype,
    decode_reply,
    decode_request,
    encode_refusal,
    encode_reply,
)
from unmask.experts.holding import Holding
from unmask.experts.links import Arrived, Began, Inbox, Lost
from unmask.experts.mixture import shard_experts
from unmask.experts.placement import HeldParts, even_bounds, held_by
from unmask.experts.shard import Shard, ShardOptions
from unmask.models.base import LanguageModel
from unmask.models.checkpoint_files import Checkpoint
from unmask.models.loading import digest_of, load_open
from unmask.models.registry import read_config
from unmask.telemetry import Recorder, metrics
from unmask.transport_security import ClientTls

__all__ = [
    "FAULTS",
    "ScriptedLink",
    "golden_folder",
    "holding_of",
    "in_process",
    "network_without_experts",
    "running_shards",
    "sharded",
]

FAULTS = ("silence", "late", "twice", "drop", "refuse", "flip", "cut", "nan", "other")
"""What a :class:`ScriptedLink` can do instead of answering."""


def golden_folder(folder: Path, golden: str) -> Path:
    """A copy of a golden model's configuration and weights."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / golden / name, folder / name)
    return folder


def holding_of(folder: Path, shard: int, *, shards: int, replication: int = 1, epoch: int = 1) -> Holding:
    """What a shard of this number holds."""
    holding = Holding(folder)
    bounds = even_bounds(holding.shape.num_experts, shards, groups=holding.shape.groups)
    holding.load(epoch, bounds, held_by(shard, shards=shards, replication=replication))
    return holding


def network_without_experts(folder: Path) -> LanguageModel:
    """The model in ``folder``, whose routed experts are elsewhere."""
    with Checkpoint(folder) as checkpoint:
        return load_open(checkpoint, experts="elsewhere")


class ScriptedLink:
    """A shard without a network, which answers at once, or does what its script says.

    Args:
        name: Of the link.
        holding: The shard's experts.
        inbox: Where its news go.
        script: What it does with each frame, one after the other: one of :data:`FAULTS`, ``wrong`` for sums
            that nothing but a comparison finds out, or anything else for a good answer, which it gives when
            the script has ended.
    """

    max_tokens = 64

    def __init__(self, name: str, holding: Holding, inbox: Inbox, script: Sequence[str] = ()) -> None:
        self.name = name
        self.is_ready = True
        self.frames = 0
        self._holding = holding
        self._inbox = inbox
        self._script = iter(script)
        self._answering = Answering(holding, Recorder(metrics.SHARD), max_tokens=self.max_tokens)
        self._seen = Seen()
        self._late: list[bytes] = []

    @property
    def held(self) -> Mapping[int, HeldParts]:
        return self._holding.placements if self.is_ready else {}

    def send(self, frame: Frame | bytes) -> None:
        assert self.is_ready
        self.frames += 1
        frame = bytes(frame)
        for message in self._late:
            self._inbox.put(Arrived(self.name, message))
        self._late.clear()
        answer = self._answering.answer(frame, self._seen)
        for message in self._damaged(next(self._script, "ok"), frame, answer):
            self._inbox.put(Arrived(self.name, message))

    def _damaged(self, fault: str, frame: bytes, answer: bytes) -> list[bytes]:
        """The messages that come back."""
        request = decode_request(frame)
        match fault:
            case "silence":
                return []
            case "late":
                self._late.append(answer)
                return []
            case "twice":
                return [answer, answer]
            case "drop":
                self.break_off()
                return []
            case "refuse":
                return [encode_refusal(request.header, Status.FAILED, "told to")]
            case "flip":
                return [answer[:-20] + bytes([answer[-20] ^ 16]) + answer[-19:]]
            case "cut":
                return [answer[: len(answer) // 2]]
            case "nan":
                return [encode_reply(request.header, torch.full_like(request.rows, torch.nan))]
            case "wrong":
                return [encode_reply(request.header, 1.5 * decode_reply(answer).rows)]
            case "other":
                return [encode_reply(request.header, request.rows[:, :-4].contiguous())]
        return [answer]

    def leave(self) -> None:
        self.break_off()

    def break_off(self) -> None:
        """The session ends, and another one begins."""
        self._seen = Seen()
        self._late.clear()
        self._inbox.put(Lost(self.name, "told to"))
        self._inbox.put(Began(self.name))

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def sharded(
    network: LanguageModel,
    links: Callable[[Inbox], Sequence[ScriptedLink]],
    *,
    hedge_s: float = 0.02,
    patience_s: float = 2.0,
    rows_as: torch.dtype = torch.float32,
) -> Iterator[Exchange]:
    """Have scripted links compute the experts of ``network``."""
    inbox: Inbox = SimpleQueue()
    pace = Pace(Timing(hedge_s, 2 * hedge_s))
    exchange = Exchange(links(inbox), inbox, patience_s=patience_s, pace=pace, rows_as=rows_as)
    shard_experts(network, exchange)
    try:
        yield exchange
    finally:
        exchange.close()


@contextmanager
def running_shards(
    folder: Path,
    shards: int,
    *,
    replication: int = 1,
    sockets: Path | None = None,
    make: Callable[..., Shard] = Shard,
) -> Iterator[list[Shard]]:
    """Shards behind free ports of the loopback; and behind ``0.sock`` and so on in the folder ``sockets``."""
    with ExitStack() as stack:
        running = []
        for number in range(shards):
            holding = holding_of(folder, number, shards=shards, replication=replication)
            socket = None if sockets is None else sockets / f"{number}.sock"
            options = ShardOptions(port=0, metrics_port=0, name=f"shard-{number}", socket=socket)
            shard = make(holding, options)
            shard.start()
            stack.callback(shard.stop, 0)
            running.append(shard)
        yield running


@contextmanager
def in_process(
    folder: Path,
    addresses: Sequence[str],
    *,
    patience_s: float = 5.0,
    rows_as: WireDtype = "float32",
    recorder: Recorder | None = None,
    tls: ClientTls | None = None,
) -> Iterator[tuple[LanguageModel, Exchange]]:
    """The model in ``folder`` with its experts in the shards at ``addresses``."""
    network = network_without_experts(folder)
    with Checkpoint(folder) as checkpoint:
        revision = digest_of(checkpoint)
    with connected(
        addresses,
        read_config(folder),
        revision=revision,
        rows_as=rows_as,
        patience_s=patience_s,
        recorder=recorder,
        tls=tls,
    ) as exchange:
        assert exchange.wait_complete(30), exchange.missing
        shard_experts(network, exchange)
        yield network, exchange
