"""The replicas: their connections, what they say of themselves, and what they have been given.

Each replica's health is watched, so that one that drains or is lost gets no new call within milliseconds, and
its load and its model are asked for every second. One whose calls fail is passed over for a while. Names are
looked up again and again; a replica that is not listed any more keeps the calls that it has.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from unmask.client.channels import Connecting
from unmask.errors import UsageError
from unmask.gateway.addresses import Target, look_up
from unmask.gateway.routing import Candidate, Choice, choose, eligible, estimated_load
from unmask.standing import Standing
from unmask.telemetry import Recorder, metrics
from unmask.transport_security import ClientTls
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationStub, ModelsStub

__all__ = ["Pool", "PoolOptions", "Replica"]

logger = logging.getLogger(__name__)

_WATCHED = HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["Generation"].full_name)
_ASK_S = 1.0
"""How often a replica is asked how busy it is, and one that takes nothing new whether it does again."""
_ANSWER_S = 3.0
"""How long it may take to say so."""
_RETRY_S = (0.05, 1.0)
"""Shortest and longest pause before a replica that is not there is looked for again."""
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 12_000),  # a machine that froze says nothing; servers allow one in ten seconds
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # what holds where a ping is under way
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # that an attempt may take, too
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # a channel made anew connects anew
)

LookUp = Callable[[Target], Awaitable[frozenset[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How replicas are found and chosen."""

    tls: ClientTls | None = None
    """Files to connect with, which are read anew for each connection; plaintext if None."""
    resolve_s: float = 5.0
    """How often names are looked up."""
    load_bound: float = 1.25
    """Of the mean load: up to there a call goes where its prompt's beginning is."""
    leave_s: float = 600.0
    """How long calls of a replica that is not listed any more may go on."""


class Replica:
    """One server. Made, used and closed in one event loop."""

    def __init__(self, address: str, server_name: str | None, tls: ClientTls | None) -> None:
        self.address = address
        self._tls = tls and replace(tls, server_name=tls.server_name or server_name)
        self.standing = Standing()
        self.serving = False
        self.info: pb.GetModelInfoResponse | None = None
        self.own = 0
        """Calls of this gateway that it has."""
        self.last = 0
        """Which of the gateway's calls it was given last."""
        self.load = pb.GetLoadResponse()
        self.own_then = 0
        """What ``own`` was when it last told its load."""
        self._connect()

    def _connect(self) -> None:
        connecting = Connecting.reading(self._tls)
        options = dict(connecting.options) | dict(_CHANNEL_OPTIONS)
        connecting = connecting._replace(options=tuple(options.items()))
        self.channel = connecting.async_channel(self.address)
        self.generation = GenerationStub(self.channel)
        self.models = ModelsStub(self.channel)
        self.health: Any = HealthStub(self.channel)  # whose types leave its methods out

    def reconnect(self, grace_s: float) -> Awaitable[None] | None:
        """Connect with the files as they are now; returns what closes the former connection.

        Plaintext needs no new channel: gRPC connects again by itself.
        """
        if self._tls is None:
            return None
        former = self.channel
        try:
            self._connect()
        except UsageError as error:  # what is there stays in use: the files may be whole the next time
            logger.warning("%s", error)
            return None
        return former.close(grace_s)

    def candidate(self, now: float) -> Candidate:
        """What routing has to know of it."""
        info = self.info
        return Candidate(
            name=self.address,
            load=estimated_load(
                own=self.own, reported=self.load.running + self.load.waiting, own_then=self.own_then
            ),
            last=self.last,
            serving=self.serving,
            banned=self.standing.is_banned(now),
            revision=info.revision if info is not None and info.HasField("revision") else None,
        )


class Pool:
    """All replicas. Use from one event loop.

    Args:
        targets: Where they are.
        recorder: Takes the metrics.
        options: How they are found and chosen.
        changed: Called when whether there is a replica for new calls may have changed.
        looking: Resolves a name.

    Raises:
        UsageError: The files of ``options.tls`` cannot be used.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        recorder: Recorder,
        options: PoolOptions,
        *,
        changed: Callable[[], object] = lambda: None,
        looking: LookUp = look_up,
    ) -> None:
        Connecting.reading(options.tls)  # a fault of files at the start is told at once, not in the log
        self._targets, self._recorder, self._options = targets, recorder, options
        self._told, self._look_up = changed, looking
        self._found: dict[Target, frozenset[str]] = {}
        self._replicas: dict[str, Replica] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._resolving: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._given = 0
        """Calls, in all."""
        self._name: str | None = None
        """Of the model, by the first replica that said it."""

    async def start(self) -> None:
        """Look for replicas from now on."""
        await self._resolve()
        self._resolving = asyncio.create_task(self._resolve_again())

    async def stop(self) -> None:
        """Let go of all of them; calls that run end."""
        if self._resolving is not None:
            self._resolving.cancel()
        for address in [*self._replicas]:
            self._leave(address, grace_s=0)
        while self._closing:
            await asyncio.wait(self._closing)

    # What calls ask.

    @property
    def replicas(self) -> list[Replica]:
        """Those that are listed now, by their addresses."""
        return [replica for _, replica in sorted(self._replicas.items())]

    @property
    def info(self) -> pb.GetModelInfoResponse | None:
        """What a replica says of the model, one that takes calls if there is one; None before any did."""
        known = [replica for replica in self.replicas if replica.info is not None]
        known.sort(key=lambda replica: not replica.serving)
        return known[0].info if known else None

    @property
    def ready(self) -> bool:
        """Whether some replica takes new calls."""
        return any(replica.serving for replica in self._replicas.values())

    def choose(
        self, *, prefix: bytes | None, tried: Collection[str], revision: str | None
    ) -> tuple[Replica, Choice] | None:
        """The replica for a call; see :mod:`unmask.gateway.routing`."""
        now = time.monotonic()
        candidates = [replica.candidate(now) for replica in self._replicas.values()]
        able = eligible(candidates, tried=tried, revision=revision)
        choice = choose(able, prefix=prefix, bound=self._options.load_bound)
        return None if choice is None else (self._replicas[choice.name], choice)

    @contextmanager
    def given(self, replica: Replica) -> Iterator[None]:
        """Count a call as the replica's while it is there."""
        self._given += 1
        replica.own += 1
        replica.last = self._given
        try:
            yield
        finally:
            replica.own -= 1

    def failed(self, replica: Replica, why: str) -> None:
        """A call failed there, and it was the replica's fault: pass it over for a while."""
        replica.standing.strike(time.monotonic())
        self._recorder.count(metrics.GATEWAY_REPLICA_FAILURES)
        logger.warning("replica %s: %s", replica.address, why)
        self._notify()

    async def wait_changed(self, most_s: float) -> None:
        """Return when something has changed for those who wait for a replica, or after ``most_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._change.wait()

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        self._gauge()
        self._told()

    def _gauge(self) -> None:
        now = time.monotonic()
        counts = dict.fromkeys(("ready", "banned", "out"), 0)
        for replica in self._replicas.values():
            banned = replica.standing.is_banned(now)
            counts[("banned" if banned else "ready") if replica.serving else "out"] += 1
        for state, count in counts.items():
            self._recorder.gauge(metrics.GATEWAY_REPLICAS, count, state=state)

    # Who is there.

    async def _resolve_again(self) -> None:
        while True:
            await asyncio.sleep(self._options.resolve_s)
            await self._resolve()

    async def _resolve(self) -> None:
        """Bring the list up to date; of a name that cannot be resolved, what it had stays."""
        for target in self._targets:
            if not target.many:
                self._found[target] = frozenset([str(target)])
                continue
            try:
                async with asyncio.timeout(_ANSWER_S):
                    self._found[target] = await self._look_up(target)
            except (OSError, TimeoutError) as error:
                logger.warning("%s cannot be resolved: %s", target, error or "no answer")
        listed = {address: target for target, found in self._found.items() for address in found}
        for address in self._replicas.keys() - listed:
            self._leave(address, grace_s=self._options.leave_s)
        for address in sorted(listed.keys() - self._replicas.keys()):
            self._join(address, listed[address])
        self._notify()

    def _join(self, address: str, target: Target) -> None:
        # The certificate of a replica that was found by DNS names what was looked up, not its address.
        try:
            replica = Replica(address, target.host if target.many else None, self._options.tls)
        except UsageError as error:  # files that are being swapped; the next look finds them whole
            logger.warning("%s", error)
            return
        self._replicas[address] = replica
        self._tasks[address] = [
            asyncio.create_task(self._follow(replica)),
            asyncio.create_task(self._ask(replica)),
        ]

    def _leave(self, address: str, *, grace_s: float) -> None:
        replica = self._replicas.pop(address)
        replica.serving = False
        for task in self._tasks.pop(address):
            task.cancel()
        self._close(replica.channel.close(grace_s))

    def _close(self, closing: Awaitable[None] | None) -> None:
        if closing is not None:
            task = asyncio.ensure_future(closing)
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # What it says of itself.

    async def _follow(self, replica: Replica) -> None:
        """Know at any time whether a replica takes new calls."""
        first, most = _RETRY_S
        pause_s = first
        while True:
            try:
                await self._watch(replica)
                pause_s = first
                await self._wait_reopened(replica)
            except grpc.aio.AioRpcError as error:
                logger.debug("replica %s: %s", replica.address, error.details())
                if replica.serving:
                    pause_s = first
            self._set_serving(replica, False)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, most)
            self._close(replica.reconnect(self._options.leave_s))

    async def _watch(self, replica: Replica) -> None:
        """Follow its health until it says that it takes nothing new.

        Then it may be about to end, which a stream that is open would hold up.
        """
        call = replica.health.Watch(_WATCHED)
        try:
            async for answer in call:
                if answer.status != HealthCheckResponse.SERVING:
                    return
                self._set_serving(replica, await self._describe(replica))
        finally:
            call.cancel()

    async def _wait_reopened(self, replica: Replica) -> None:
        """Return when it takes calls again."""
        self._set_serving(replica, False)
        while True:
            await asyncio.sleep(_ASK_S)
            answer = await replica.health.Check(_WATCHED, timeout=_ANSWER_S)
            if answer.status == HealthCheckResponse.SERVING:
                return

    def _set_serving(self, replica: Replica, serving: bool) -> None:
        if replica.serving != serving and self._replicas.get(replica.address) is replica:
            replica.serving = serving
            replica.load, replica.own_then = pb.GetLoadResponse(), 0  # it may be another process
            logger.info("replica %s %s", replica.address, "takes calls" if serving else "takes no calls")
            self._notify()

    async def _ask(self, replica: Replica) -> None:
        """Ask for its load and its weights every now and then."""
        while True:
            await asyncio.sleep(_ASK_S * random.uniform(0.9, 1.1))
            if replica.serving:
                own = replica.own
                try:
                    load = await replica.models.GetLoad(pb.GetLoadRequest(), timeout=_ANSWER_S)
                    own_when_told = replica.own
                    await self._describe(replica)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                        self.failed(replica, f"said nothing for {_ANSWER_S:g} s")
                else:  # of calls that came or went meanwhile it may have counted either
                    replica.load, replica.own_then = load, max(own, own_when_told)
            self._gauge()  # bans end with time

    async def _describe(self, replica: Replica) -> bool:
        """Note its model, and say whether it is the one that the others serve."""
        info = await replica.models.GetModelInfo(pb.GetModelInfoRequest(), timeout=_ANSWER_S)
        self._name = self._name or info.name
        if info.name != self._name:
            logger.error(
                "replica %s serves %r, the others %r: it gets no calls",
                replica.address,
                info.name,
                self._name,
            )
            return False
        replica.info = info
        return True
