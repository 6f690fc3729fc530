"""``unmask gateway REPLICA...``: a front for several servers of one model."""

import asyncio
import logging
from typing import TYPE_CHECKING

import click

from unmask.cli.ports import http_port, listening, most_seconds
from unmask.cli.tls import replica_tls, server_tls

if TYPE_CHECKING:
    from unmask.gateway.server import Gateway
    from unmask.transport_security import ClientTls, ServerTls

__all__ = ["command"]


@click.command("gateway", short_help="Spread calls over several servers.")
@click.argument("replicas", nargs=-1, required=True, metavar="REPLICA...")
@listening(port=50050, metrics_port=9092)
@http_port
@server_tls
@replica_tls
@click.option(
    "--resolve-seconds",
    type=click.FloatRange(0, min_open=True),
    default=5,
    show_default=True,
    help="How often names of dns:HOST:PORT are looked up.",
)
@click.option(
    "--prefix-blocks",
    type=click.IntRange(0, 1024),
    default=4,
    show_default=True,
    help="Whole blocks at a prompt's beginning that decide which replica it goes to; 0 for none.",
)
@click.option(
    "--load-bound",
    type=click.FloatRange(1),
    default=1.25,
    show_default=True,
    help="How many times the mean load a replica may have and still get calls for their beginning.",
)
@click.option(
    "--attempts",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Replicas that a call is given to in turn, as they are lost, without one more block being "
    "committed.",
)
@click.option(
    "--wait-seconds",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="How long a call waits where no replica takes calls.",
)
@click.option(
    "--max-calls",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Calls at a time; more are refused.",
)
@most_seconds(one="call", running="running calls", others="gateways")
def command(
    replicas: tuple[str, ...],
    host: str,
    port: int,
    metrics_port: int,
    http_port: int | None,
    tls: "ServerTls | None",
    replica_tls: "ClientTls | None",
    resolve_seconds: float,
    prefix_blocks: int,
    load_bound: float,
    attempts: int,
    wait_seconds: float,
    max_calls: int,
    max_request_seconds: float,
    drain_seconds: float,
    max_connection_age_seconds: float | None,
) -> None:
    """Spread calls over servers of one model (`unmask serve`), and go on elsewhere when one is lost.

    A REPLICA is HOST:PORT, or dns:HOST:PORT for all addresses that a name has, such as a headless Service's;
    these are looked up again and again. Clients ask the gateway as they would ask a server: over gRPC
    (unmask.v1.Generation and Models) and, with --http-port, over OpenAI-style HTTP.

    A call goes to the replica that may have its prompt's beginning in its cache, unless that one has more to
    do than the others; then it goes where least is to be done. If its replica is lost, another one of the
    same weights goes on after the blocks that are committed, and no token is lost or comes twice.

    With --tls-cert the gRPC port speaks TLS; HTTP and the metrics do not. With --replica-tls-ca, replicas do.
    When the gateway answers, one line with its address is printed. It ends on SIGTERM or Ctrl-C: it says that
    it is NOT_SERVING, takes nothing new, and gives what runs --drain-seconds to come to its end.
    """
    from unmask.gateway.addresses import Target
    from unmask.gateway.pool import PoolOptions
    from unmask.gateway.relay import RelayOptions
    from unmask.gateway.server import GatewayOptions, run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    targets = [Target.reading(replica) for replica in dict.fromkeys(replicas)]
    options = GatewayOptions(
        host=host,
        port=port,
        metrics_port=metrics_port,
        http_port=http_port,
        tls=tls,
        drain_s=drain_seconds,
        max_connection_age_s=max_connection_age_seconds,
        relay=RelayOptions(
            max_calls=max_calls,
            max_request_s=max_request_seconds,
            wait_s=wait_seconds,
            attempts=attempts,
            prefix_blocks=prefix_blocks,
        ),
        pool=PoolOptions(
            tls=replica_tls,
            resolve_s=resolve_seconds,
            load_bound=load_bound,
            leave_s=max_request_seconds,
        ),
    )

    def ready(gateway: "Gateway") -> None:
        http = (
            ""
            if gateway.http_port is None
            else f"OpenAI-style HTTP on http://{host}:{gateway.http_port}/v1, "
        )
        click.echo(
            f"a gateway to {', '.join(map(str, targets))} on {host}:{gateway.port}, {http}"
            f"metrics on http://{host}:{gateway.metrics_port}/metrics"
        )

    asyncio.run(run(targets, options, ready))
