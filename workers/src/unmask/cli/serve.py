"""``unmask serve DIR``: answer generation requests with the model in a folder."""

import asyncio
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from unmask.cli.local_path import LocalPath
from unmask.cli.ports import http_port, listening, most_seconds
from unmask.cli.tls import experts_tls, server_and_control_tls
from unmask.errors import ModelError, UsageError

if TYPE_CHECKING:
    from unmask.experts.exchange import Exchange
    from unmask.models.config import ModelConfig
    from unmask.serving.server import Server
    from unmask.serving.weights import ServedWeights
    from unmask.telemetry import Recorder
    from unmask.transport_security import ClientTls, ServerTls

__all__ = ["command"]


@click.command("serve", short_help="Answer generation requests over gRPC.")
@click.argument("folder", type=LocalPath(), metavar="DIR")
@listening(port=50051, metrics_port=9090)
@http_port
@click.option(
    "--control-port",
    type=click.IntRange(0, 65535),
    help="What `unmask control` talks to; 0 for any free port.  [default: none]",
)
@click.option(
    "--control-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of the control port. Whoever reaches it, and is let in, may end calls and replace the "
    "weights.",
)
@server_and_control_tls
@click.option(
    "--weights-root",
    type=LocalPath(),
    help="Folder that new weights may come from.  [default: the one that holds DIR]",
)
@click.option("--name", help="What requests call the model.  [default: the folder's name]")
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Requests that are decoded side by side.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Most tokens of a prompt and its generation.  [default: the model's own, at most 4096]",
)
@click.option(
    "--cache-mib",
    type=click.IntRange(1),
    help="Memory for keys and values, in MiB; requests wait that do not fit.  "
    "[default: what --rows requests of --context tokens take]",
)
@click.option(
    "--max-positions",
    type=click.IntRange(1),
    help="Most positions, read or decoded, in one forward pass.  "
    "[default: 512, or two blocks for each row if that is more]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests that may wait for a row.",
)
@click.option(
    "--max-queue-tokens",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="Tokens, read and to be written, of the requests that wait.",
)
@most_seconds(one="request", running="running requests", others="servers")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option(
    "--quantization",
    type=click.Choice(["none", "int8"]),
    default="none",
    show_default=True,
    help="int8: weights of eight bits, and on a CPU activations too; changes what is generated.",
)
@click.option(
    "--eager",
    is_flag=True,
    help="On a GPU, launch each operation of a forward pass; by default passes are recorded at the start "
    "(CUDA graphs) and replayed. With --experts they always are launched so.",
)
@click.option(
    "--experts",
    metavar="ADDRESS,...",
    help="Expert shards of the same model (`unmask shard`), which compute the routed experts; this process "
    "then neither reads nor holds them. Each is HOST:PORT, or unix:PATH on the same machine; all of a group "
    "are group:tcp://HOST:PORT?shards=N.",
)
@experts_tls
@click.option(
    "--experts-rows",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What token rows are sent to shards as; bfloat16 halves the bytes and changes what is generated.",
)
@click.option(
    "--experts-micro-batches",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="Parts of a forward pass that take turns: while shards compute the experts of one, the next goes on "
    "here. Changes no token.",
)
@click.option(
    "--experts-wait-seconds",
    type=click.FloatRange(0),
    default=300,
    show_default=True,
    help="How long to wait for the shards before the server begins.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads for one forward pass.  [default: torch's own]"
)
def command(
    folder: Path,
    host: str,
    port: int,
    metrics_port: int,
    http_port: int | None,
    control_port: int | None,
    control_host: str,
    tls: "ServerTls | None",
    control_tls: "ServerTls | None",
    weights_root: Path | None,
    name: str | None,
    rows: int,
    context: int | None,
    cache_mib: int | None,
    max_positions: int | None,
    max_queue: int,
    max_queue_tokens: int,
    max_request_seconds: float,
    drain_seconds: float,
    max_connection_age_seconds: float | None,
    device: str,
    quantization: Literal["none", "int8"],
    eager: bool,
    experts: str | None,
    experts_tls: "ClientTls | None",
    experts_rows: Literal["float32", "bfloat16"],
    experts_micro_batches: int,
    experts_wait_seconds: float,
    threads: int | None,
) -> None:
    """Answer generation requests with the masked-diffusion model in DIR, over gRPC (unmask.v1.Generation).

    With --experts, expert shards compute the routed experts of a mixture of experts. If one is lost, those
    that hold the same experts take over, and no token changes.

    With --http-port, also over HTTP as OpenAI's clients ask: /v1/completions, /v1/chat/completions and
    /v1/models. With --control-port, `unmask control` may end calls, drain the server and replace its weights.
    With --tls-cert, both gRPC ports speak TLS; HTTP and the metrics do not. With --experts-tls-ca, shards do.

    DIR holds config.json, safetensors weights, tokenizer.json and, optionally, tokenizer_config.json (chat
    template) and generation_config.json: eos_token_id, mask_token_id, and how to decode where a request does
    not say (decoder, block_length, threshold, steps_per_block, edit_threshold, max_post_edit_steps,
    low_threshold, credit_weight, credit_decay, credit_exponent, entropy_bound). When the server answers, one
    line with its address is printed. It ends on SIGTERM or Ctrl-C: it says that it is
    NOT_SERVING, takes nothing new, and gives what runs --drain-seconds to come to its end.
    """
    click.get_current_context().with_resource(_ending_on_sigterm())
    import torch

    from unmask.models.registry import read_config
    from unmask.serving.model import ServedModel
    from unmask.serving.server import ServerOptions, serve
    from unmask.serving.weights import ServedWeights
    from unmask.telemetry import Recorder

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
    config = read_config(folder)
    _refuse_autoregressive(folder, config)
    _check_context(context, config)
    described = ServedModel.describe(folder, config, name=name, rows=rows, context_length=context)
    if experts_tls is not None and experts is None:
        raise UsageError("--experts-tls-ca: there are no shards to connect to; give --experts")
    weights = ServedWeights(
        folder,
        device=device,
        quantization=quantization,
        root=weights_root,
        experts="here" if experts is None else "elsewhere",
    )
    recorder = Recorder()
    exchange: Exchange | None = None
    if experts is not None:
        exchange = click.get_current_context().with_resource(
            _sharded(
                weights,
                experts.split(","),
                experts_tls,
                recorder,
                device,
                rows_as=experts_rows,
                micro_batches=experts_micro_batches,
                wait_s=experts_wait_seconds,
            )
        )
    batch = described.batch(
        weights.network,
        cache_bytes=None if cache_mib is None else cache_mib << 20,
        max_positions=max_positions,
        eager=eager or experts is not None,
    )
    options = ServerOptions(
        host=host,
        port=port,
        metrics_port=metrics_port,
        http_port=http_port,
        control_port=control_port,
        control_host=control_host,
        tls=tls,
        control_tls=control_tls,
        max_queue_requests=max_queue,
        max_queue_tokens=max_queue_tokens,
        max_request_s=max_request_seconds,
        drain_s=drain_seconds,
        max_connection_age_s=max_connection_age_seconds,
    )

    def ready(server: "Server") -> None:
        http = (
            "" if server.http_port is None else f"OpenAI-style HTTP on http://{host}:{server.http_port}/v1, "
        )
        click.echo(
            f"serving {described.name} ({described.architecture}) on {host}:{server.port}, {http}"
            f"metrics on http://{host}:{server.metrics_port}/metrics"
            + ("" if server.control_port is None else f", control on {control_host}:{server.control_port}")
        )

    def complete() -> bool:
        return exchange is None or exchange.placement is not None

    asyncio.run(serve(batch, described, options, ready, weights, recorder, complete))


@contextmanager
def _sharded(
    weights: "ServedWeights",
    addresses: Sequence[str],
    tls: "ClientTls | None",
    recorder: "Recorder",
    device: str,
    *,
    rows_as: Literal["float32", "bfloat16"],
    micro_batches: int,
    wait_s: float,
) -> "Iterator[Exchange]":
    """Have shards compute the experts of the model."""
    from unmask.experts.connecting import connected
    from unmask.experts.mixture import shard_experts

    assert weights.revision is not None
    with connected(
        addresses,
        weights.network.config,
        revision=weights.revision,
        rows_as=rows_as,
        recorder=recorder,
        tls=tls,
        device=device,
    ) as exchange:
        if not exchange.wait_complete(wait_s):
            raise UsageError(
                f"--experts: after {wait_s:g} s {exchange.missing}; start a shard for each part of the "
                "model, `unmask shard --shard 0/2` and so on"
            )
        shard_experts(weights.network, exchange, micro_batches=micro_batches)
        yield exchange


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Make SIGTERM end a process that does not serve yet: the first one of a container would not hear it."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_autoregressive(folder: Path, config: "ModelConfig") -> None:
    """Find out before the weights are read, which may take minutes."""
    from unmask.models.loading import build

    if build(config, device="meta").causal:
        raise ModelError(
            f"{folder / 'config.json'}: {config.architectures[0]} is autoregressive, only masked diffusion "
            "models are served; train it with a stage that has `convertTo: LLaDA2MoeModelLM`"
        )


def _check_context(context: int | None, config: "ModelConfig") -> None:
    if context is not None and context > config.max_position_embeddings:
        raise UsageError(
            f"--context: got {context}, the model's max_position_embeddings allows at most "
            f"{config.max_position_embeddings}"
        )
