"""``unmask shard DIR``: compute a model's experts for servers."""

import logging
import re
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unmask.cli.local_path import LocalPath
from unmask.cli.ports import listening
from unmask.cli.tls import server_tls
from unmask.errors import LostPeerError, UsageError

if TYPE_CHECKING:
    from unmask.transport_security import ServerTls

__all__ = ["command"]

_NUMBER = re.compile(r"(\d{1,6})/(\d{1,6})")


@click.command("shard", short_help="Compute experts for servers.")
@click.argument("folder", type=LocalPath(), metavar="DIR")
@click.option(
    "--shard",
    "number",
    required=True,
    metavar="I/N",
    help="Which of N shards this is, from 0/N on: it holds part I of the experts.",
)
@click.option(
    "--replication",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many shards hold each part; 2 lets any one shard be lost.",
)
@click.option(
    "--epoch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of this way of cutting the experts; the same for all shards that cut alike.",
)
@listening(port=50061, metrics_port=9091)
@server_tls
@click.option(
    "--socket",
    type=LocalPath(),
    metavar="PATH",
    help="Unix socket for servers on the same machine, with which memory is shared.  [default: none]",
)
@click.option(
    "--group",
    metavar="tcp://HOST:PORT",
    help="Be rank I + 1 of a torch.distributed job of N shards and a server, which waits there.  "
    "[default: none]",
)
@click.option("--name", help="What logs call it.  [default: shard-I]")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 65536),
    default=4096,
    show_default=True,
    help="Most token rows in one frame; servers send more than that in several.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0),
    default=5,
    show_default=True,
    help="How long servers have, after SIGTERM, to go to other shards.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's own]")
def command(
    folder: Path,
    number: str,
    replication: int,
    epoch: int,
    host: str,
    port: int,
    metrics_port: int,
    tls: "ServerTls | None",
    socket: Path | None,
    group: str | None,
    name: str | None,
    max_tokens: int,
    drain_seconds: float,
    device: str,
    threads: int | None,
) -> None:
    """Compute the routed experts of the mixture-of-experts model in DIR for `unmask serve --experts`.

    Each of N shards loads its part of the experts of every layer, and with --replication R the parts of R - 1
    others, from the same folder that the server reads the rest of the model from. It keeps nothing of any
    request, so it can be stopped, lost and started again at any time: servers go on with another shard that
    holds the part, or wait a little where there is none. When it answers, one line with its address is
    printed. It ends on SIGTERM or Ctrl-C, once servers have gone elsewhere.
    """
    stop = threading.Event()
    for signalled in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signalled, lambda *_: stop.set())
    match = _NUMBER.fullmatch(number)
    if match is None:
        raise UsageError(f"--shard: got {number!r}, expected I/N, such as 0/2")
    import torch

    from unmask.experts.addresses import check_store
    from unmask.experts.group import GroupPort
    from unmask.experts.holding import Holding
    from unmask.experts.placement import even_bounds, held_by
    from unmask.experts.shard import Shard, ShardOptions

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
    if group is not None:
        check_store(group, "--group")
    shard, shards = int(match[1]), int(match[2])
    parts = held_by(shard, shards=shards, replication=replication)
    holding = Holding(folder, device=device)
    shape = holding.shape
    holding.load(epoch, even_bounds(shape.num_experts, shards, groups=shape.groups), parts)
    if stop.is_set():
        return
    server = Shard(
        holding,
        ShardOptions(
            host=host,
            port=port,
            metrics_port=metrics_port,
            name=name or f"shard-{shard}",
            max_tokens=max_tokens,
            drain_s=drain_seconds,
            tls=tls,
            socket=socket,
        ),
    )
    server.start()
    member = None
    if group is not None:
        member = GroupPort(
            group,
            rank=shard + 1,
            world=shards + 1,
            sessions=server.sessions,
            max_bytes=server.largest,
            ended=stop.set,
            device=device,
        )
        member.start()
    held = ", ".join(str(part) for part in sorted(parts))
    places = [f"{host}:{server.port}"]
    if socket is not None:
        places.append(f"unix:{socket}")
    if group is not None:
        places.append(f"group:{group}")
    click.echo(
        f"computing experts of {folder.name}, parts {held} of {shards} ({holding.nbytes / 2**20:.1f} MiB), "
        f"on {', '.join(places)}, metrics on http://{host}:{server.metrics_port}/metrics"
    )
    stop.wait()
    server.stop()
    if member is not None and member.lost:
        raise LostPeerError(f"--group: {member.lost}")
