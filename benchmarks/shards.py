"""Times expert shards beside the bare way and the whole model: ``make bench-shards``.

* ``frame``: there and back of 256 rows of 2,048 bfloat16 numbers to a shard that answers without computing,
  over gRPC and through shared memory, against as many bare bytes over a stream of gRPC's and through shared
  memory (``bare_memory.py``), each way with its bare one by turns;
* ``step``: a denoise step of 8 requests of model M (``model_m.json``) whose experts are in 2 shards of one
  thread each, over gRPC, against the whole model in one process, on the same processors, by turns; and the
  same with the step's rows in two parts that take turns;
* ``parts``: where the time of such a step goes;
* what :mod:`unmask.experts.planning` predicts for the step, from what this machine takes to read, to multiply
  and to send frames (``shard_constants.py``) and from the step of the whole model.

Several processes work here, so the clock is the wall's: run it on a machine that does nothing else. Ratios
are of medians. Prints what it measures; the last line is one JSON object of ratios.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import date
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import shard_constants
import torch
from bare_memory import bare_memory, echo_bare_memory

from unmask.diffusion.batch import Filled
from unmask.diffusion.decoding import DecodingParams
from unmask.experts.answering import Answering
from unmask.experts.connecting import connected
from unmask.experts.exchange import Exchange
from unmask.experts.frames import Message, Request, encode_reply
from unmask.experts.holding import Holding, shape_of_experts
from unmask.experts.mixture import shard_experts
from unmask.experts.placement import even_bounds, held_by
from unmask.experts.planning.constants import Constants, Transport
from unmask.experts.planning.forward import calibrated, predicted_ratio, sharded, unsharded
from unmask.experts.planning.setting import Setting, Work
from unmask.experts.shard import Shard, ShardOptions
from unmask.models.base import LanguageModel
from unmask.models.checkpoint_files import Checkpoint
from unmask.models.config import ModelConfig
from unmask.models.loading import build, digest_of, load, load_open, save
from unmask.models.moe import Routing
from unmask.models.registry import parse_config
from unmask.models.shape import shape_of
from unmask.models.transformer import Transformer
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import Recorder, metrics

HERE = Path(__file__).parent
ROWS, WIDTH, CHOICES, LAYERS = 256, 2048, 8, 16
BLOCK, BATCH, CONTEXT = 32, 8, 128
WARMUP = 5
_CONTEXT = multiprocessing.get_context("spawn")
_BARE = "/bench.Bare/Stream"
_BARE_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
"""On both sides; no pings, which a server without our options takes for an attack and ends the connection."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="Times expert shards beside the bare way and the whole model."
    )
    parser.add_argument("--only", choices=["frame", "step"], help="Part of it.")
    parser.add_argument(
        "--repeats", type=int, default=200, help="Frames of each side; a tenth as many steps."
    )
    parser.add_argument("--constants", type=Path, help="Where to write what `unmask plan serve` takes.")
    options = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {processors} processors, torch {torch.__version__}", flush=True)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "step":
            found |= _frames(Path(folder), options.repeats)
        if options.only != "frame":
            found |= _steps(Path(folder), max(3, options.repeats // 20), processors, options.constants)
    print(json.dumps(found))


# Processes


@contextmanager
def _process(target: Callable[..., None], *given: object) -> Iterator[int]:
    """Another process, and the port that it serves."""
    mine, its = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=target, args=(*given, its), daemon=True)
    process.start()
    try:
        assert mine.poll(300), "it does not start"
        yield mine.recv()
    finally:
        process.terminate()
        process.join()


def _until_terminated() -> None:
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    asked.wait()


class _Echo(Answering):
    """Answers with the rows that it was sent, once it has read the frame as any other."""

    def _computed(self, request: Request, arrived: float, into: memoryview | None) -> Message:
        return encode_reply(request.header, request.rows, into=into)


def _echoing(folder: Path, path: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    holding = Holding(folder)
    holding.load(1, even_bounds(holding.shape.num_experts, 1), [0])
    shard = Shard(holding, ShardOptions(port=0, metrics_port=0, socket=path), answering=_Echo)
    shard.start()
    ready.send(shard.port)
    _until_terminated()


def _bare(ready: Connection) -> None:
    def echo(messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        yield from messages

    handler = grpc.method_handlers_generic_handler(
        "bench.Bare", {"Stream": grpc.stream_stream_rpc_method_handler(echo)}
    )
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler], options=_BARE_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ready.send(port)
    _until_terminated()


def _bare_memory(path: Path, nbytes: int, ready: Connection) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        echo_bare_memory(listener, nbytes)
        ready.send(0)
        _until_terminated()


def _sharding(folder: Path, number: int, shards: int, ready: Connection) -> None:
    torch.set_num_threads(1)
    holding = Holding(folder)
    bounds = even_bounds(holding.shape.num_experts, shards, groups=holding.shape.groups)
    holding.load(1, bounds, held_by(number, shards=shards, replication=1))
    shard = Shard(holding, ShardOptions(port=0, metrics_port=0))
    shard.start()
    ready.send(shard.port)
    _until_terminated()


# A frame there and back


def _wide(folder: Path) -> ModelConfig:
    """A model whose rows are wide and whose experts are next to nothing, in the folder ``wide``."""
    config = parse_config(
        {
            **json.loads((HERE / "model_s.json").read_text()),
            "hidden_size": WIDTH,
            "num_hidden_layers": 1 + LAYERS,
            "num_experts": CHOICES,
            "num_experts_per_tok": CHOICES,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "intermediate_size": 8,
            "vocab_size": 64,
            "mask_token_id": 63,
            "eos_token_id": 62,
            "pad_token_id": 62,
        }
    )
    if not (folder / "wide").exists():
        save(build(config), folder / "wide")
    return config


def _rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Routing]:
    """Rows, each of which goes to all experts."""
    experts = torch.arange(CHOICES).expand(count, CHOICES).contiguous()
    return torch.randn(count, WIDTH, dtype=dtype), Routing(experts, torch.ones(count, CHOICES))


def _transport(folder: Path, repeats: int) -> Transport:
    """What frames of float32 rows take."""
    config = _wide(folder)
    with (
        _process(_echoing, folder / "wide", folder / "other.sock") as port,
        connected([f"127.0.0.1:{port}"], config, revision=_revision(folder / "wide")) as exchange,
    ):
        assert exchange.wait_complete(60), exchange.missing
        given = {count: _rows(count) for count in shard_constants.FRAMES}
        return shard_constants.transport(
            lambda count: exchange.receive(exchange.send(1, *given[count])),
            choices=CHOICES,
            hidden=WIDTH,
            repeats=repeats,
        )


def _frames(folder: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of a frame's way and of bare bytes, and their ratio."""
    config = _wide(folder)
    rows, routing = _rows(ROWS, torch.bfloat16)
    layers = cycle(range(1, 1 + LAYERS))
    payload = os.urandom(ROWS * WIDTH * 2)  # new zeros would all be one page, which is always in cache
    shard_socket, bare_socket = folder / "shard.sock", folder / "bare.sock"

    def exchange(address: str) -> AbstractContextManager[Exchange]:
        return connected([address], config, revision=_revision(folder / "wide"), rows_as="bfloat16")

    def framed(exchange: Exchange) -> None:
        layer = next(layers)
        exchange.receive(exchange.send(layer, rows, routing))

    with _process(_echoing, folder / "wide", shard_socket) as port:
        with (
            _process(_bare) as bare_port,
            _bare_stream(bare_port) as bare,
            exchange(f"127.0.0.1:{port}") as over_grpc,
        ):
            assert over_grpc.wait_complete(60), over_grpc.missing
            sides = {"frame": lambda: framed(over_grpc), "bare": lambda: bare(payload)}
            seconds = _by_turns(sides, repeats)
        # On their own, since threads of gRPC work on for a while when an answer is there.
        with (
            _process(_bare_memory, bare_socket, len(payload)),
            bare_memory(bare_socket, len(payload)) as bare_in_memory,
            exchange(f"unix:{shard_socket}") as in_memory,
        ):
            assert in_memory.wait_complete(60), in_memory.missing
            sides = {"memory": lambda: framed(in_memory), "bare_memory": lambda: bare_in_memory(payload)}
            seconds |= _by_turns(sides, repeats)
    for name, value in seconds.items():
        print(f"  {name}: {1000 * value:.3f} ms there and back, {ROWS} x {WIDTH} bfloat16")
    return {
        "frame_over_bare": round(seconds["frame"] / seconds["bare"], 3),
        "memory_over_bare": round(seconds["memory"] / seconds["bare_memory"], 3),
    }


@contextmanager
def _bare_stream(port: int) -> Iterator[Callable[[bytes], bytes]]:
    """Bytes over a stream, as plainly as gRPC has them."""
    outgoing: SimpleQueue[bytes | None] = SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=_BARE_OPTIONS) as channel:
        answers = channel.stream_stream(_BARE)(iter(outgoing.get, None))

        def ask(payload: bytes) -> bytes:
            outgoing.put(payload)
            answer: bytes = next(answers)
            return answer

        yield ask
        outgoing.put(None)


def _by_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of each side's wall seconds, after a few that do not count; who is first, changes."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARMUP + repeats):
        for name, run in list(sides.items())[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            run()
            if turn >= WARMUP:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def _revision(folder: Path) -> str:
    with Checkpoint(folder) as checkpoint:
        return digest_of(checkpoint)


# A step of a model


def _steps(folder: Path, repeats: int, processors: int, written: Path | None) -> dict[str, float]:
    """A step with shards over one without, and where its time goes."""
    config = parse_config(json.loads((HERE / "model_m.json").read_text()))
    path = folder / "medium"
    save(build(config), path)
    torch.set_num_threads(processors)
    with ExitStack() as stack:
        ports = [stack.enter_context(_process(_sharding, path, number, 2)) for number in range(2)]
        recorder = Recorder()
        exchange = stack.enter_context(
            connected(
                [f"127.0.0.1:{port}" for port in ports],
                config,
                revision=_revision(path),
                recorder=recorder,
                patience_s=60,
            )
        )
        assert exchange.wait_complete(300), exchange.missing
        with Checkpoint(path) as checkpoint:
            sharded = load_open(checkpoint, experts="elsewhere", reordered=True)
        watch = _Watch(exchange)
        shard_experts(sharded, exchange)
        assert isinstance(sharded, Transformer)
        whole, split, turns = _Steps(load(path, reordered=True)), _Steps(sharded), _Steps(sharded)

        def in_turns() -> None:
            sharded.micro_batches = 2
            turns.run()
            sharded.micro_batches = 1

        sides = {"whole": whole.run, "sharded": split.run, "in turns": in_turns}
        seconds = _by_turns(sides, repeats)
        same = whole.filled == split.filled == turns.filled
        watch.forget()
        steps = 5
        before = {phase: _total(recorder, phase) for phase in ("queue", "compute", "wire")}
        began = time.perf_counter()
        for _ in range(steps):
            split.run()
        total = (time.perf_counter() - began) / steps
    frames = 2 * len(shape_of_experts(config).layers) * steps
    print(
        f"  whole model: {1000 * seconds['whole']:.1f} ms a step with {processors} threads; 8 rows of {BLOCK}"
    )
    told = (
        "the same tokens filled"
        if same
        else "other tokens, from where two choices are equal but for rounding"
    )
    print(f"  2 shards:    {1000 * seconds['sharded']:.1f} ms a step; {told}")
    print(f"  the same, its rows in two parts that take turns: {1000 * seconds['in turns']:.1f} ms")
    print(
        f"  of {1000 * total:.1f} ms a step: {1000 * watch.sending / steps:.1f} making and sending frames, "
    )
    print(
        f"    {1000 * watch.waiting / steps:.1f} waiting for shards and adding up; the rest is the engine's"
    )
    for phase, earlier in before.items():
        mean = (_total(recorder, phase) - earlier) / frames
        print(f"    a frame's {phase}: {1000 * mean:.2f} ms in the mean")
    measured = seconds["sharded"] / seconds["whole"]
    setting = _planned(folder, config, seconds["whole"], repeats, processors)
    predicted = predicted_ratio(setting, 2)
    print(f"  2 shards over the whole model: {measured:.2f} measured, {predicted:.2f} predicted, of which")
    _tell_parts(setting)
    if written is not None:
        written.write_text(setting.constants.model_dump_json(exclude_unset=True, indent=2) + "\n")
    return {
        "step_over_whole": round(measured, 3),
        "step_over_whole_predicted": round(predicted, 3),
        "step_in_turns_over_whole": round(seconds["in turns"] / seconds["whole"], 3),
        "share_sending": round(watch.sending / steps / total, 3),
        "share_waiting": round(watch.waiting / steps / total, 3),
    }


def _tell_parts(setting: Setting) -> None:
    """What is predicted, part by part."""
    for name, forward in (("whole model", unsharded(setting)), ("2 shards", sharded(setting, 2))):
        parts = ", ".join(f"{part.name} {1000 * part.seconds:.1f}" for part in forward.parts if part.seconds)
        print(f"    {name}: {1000 * forward.seconds:.1f} ms: {parts}")


def _planned(folder: Path, config: ModelConfig, whole_s: float, repeats: int, processors: int) -> Setting:
    """The steps as they were measured, with constants of this machine and nothing of a step with shards."""
    shape = shape_of(config)
    constants = Constants(
        measured=f"make bench-shards, {processors} processors ({platform.machine()}), {date.today()}",
        engine=shard_constants.machine(shape, threads=processors, tokens=BATCH * BLOCK),
        shard=shard_constants.machine(shape, threads=1, tokens=BATCH * BLOCK, part=0.5),
        transports={"grpc": _transport(folder, 5 * repeats)},
        network=None,
        shards_at_once=processors,
        overlap=False,
    )
    # A step fills one position of each block; one was filled before the first turn.
    masked = statistics.mean((BLOCK - (turn + 1) % BLOCK) / BLOCK for turn in range(WARMUP, WARMUP + repeats))
    setting = Setting(
        shape=shape,
        work=Work(batch=BATCH, block_length=BLOCK, context=CONTEXT, tpf=1.0, masked=masked),
        constants=constants,
        weights_as="float32",
        rows_as="float32",
    )
    return calibrated(setting, whole_s)


def _total(recorder: Recorder, phase: str) -> float:
    """Seconds of all frames so far."""
    name = f"{metrics.EXPERT_FRAME_SECONDS.name}_sum"
    return recorder.registry.get_sample_value(name, {"phase": phase}) or 0.0


class _Watch:
    """How long an exchange takes to send, and to receive."""

    def __init__(self, exchange: Exchange) -> None:
        self.sending = self.waiting = 0.0
        send, receive = exchange.send, exchange.receive

        def sent(*given: Any) -> Any:
            began = time.perf_counter()
            flight = send(*given)
            self.sending += time.perf_counter() - began
            return flight

        def received(flight: Any) -> Any:
            began = time.perf_counter()
            sums = receive(flight)
            self.waiting += time.perf_counter() - began
            return sums

        exchange.send, exchange.receive = sent, received  # type: ignore[method-assign]

    def forget(self) -> None:
        """Begin anew."""
        self.sending = self.waiting = 0.0


class _Steps:
    """Denoise steps of a batch of requests that have read their prompts."""

    def __init__(self, network: LanguageModel) -> None:
        vocab = network.config.vocab_size
        params = DecodingParams(
            max_new_tokens=1 << 10,
            block_length=BLOCK,
            steps=BLOCK,
            threshold=1.1,
            eos_token_id=-1,
            mask_token_id=vocab - 1,
        )
        self._batch = RaggedBatch(network, rows=BATCH, capacity=CONTEXT + (1 << 10), block_length=BLOCK)
        generator = torch.Generator().manual_seed(1)
        for _ in range(BATCH):
            prompt = torch.randint(0, vocab - 2, (CONTEXT,), generator=generator).tolist()
            self._batch.admit(prompt, params)
        self.filled: list[object] = []
        while True:  # until all have read
            events = self._batch.step()
            if len(events) == BATCH and all(isinstance(event, Filled) for event in events):
                break

    def run(self) -> None:
        """One step."""
        self.filled += [event.token_ids for event in self._batch.step() if isinstance(event, Filled)]


if __name__ == "__main__":
    main()
