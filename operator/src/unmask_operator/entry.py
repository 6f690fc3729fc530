"""The operator's command line: finds the cluster, starts the threads, ends when told to or when it must."""

import argparse
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask_operator.control.api import KubernetesTransport
from unmask_operator.control.clock import SystemClock
from unmask_operator.control.health import HealthServer
from unmask_operator.control.manager import Manager
from unmask_operator.decision import Reconciler
from unmask_operator.reconcilers import reconcilers
from unmask_operator.resources import MANAGER

__all__ = ["main", "parser"]

_log = logging.getLogger(__name__)

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

USAGE = 64
"""Exit code: the command line or the configuration is wrong."""
LOST = 1
"""Exit code: the lease is lost; the kubelet starts the operator anew, as a standby."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    flags = argparse.ArgumentParser(
        prog="unmask-operator",
        description="Runs custom resources of unmask.dev on the cluster that it finds.",
    )
    flags.add_argument(
        "--namespace",
        help="work in this namespace only; without it, in all of them",
    )
    flags.add_argument(
        "--kubeconfig",
        type=Path,
        help="file that says where the cluster is; by default the pod's own account, or $KUBECONFIG",
    )
    flags.add_argument("--image", help="container image of jobs and services that name none")
    flags.add_argument("--workers", type=_count, default=4, help="resources worked on at once (default: 4)")
    flags.add_argument(
        "--qps", type=_positive, default=20.0, help="requests a second in the long run (default: 20)"
    )
    flags.add_argument("--burst", type=_count, default=50, help="requests at once (default: 50)")
    flags.add_argument(
        "--lease-namespace", help="namespace of the lease (default: the pod's own, else --namespace)"
    )
    flags.add_argument("--lease-name", default=MANAGER, help=f"name of the lease (default: {MANAGER})")
    flags.add_argument(
        "--lease-seconds",
        type=_positive,
        default=15.0,
        help="seconds after which a standby takes over from an operator that is silent (default: 15)",
    )
    flags.add_argument(
        "--lease-owner", help="deployment in the lease's namespace that takes the lease with it when deleted"
    )
    flags.add_argument("--host", default="0.0.0.0", help="address of the health port (default: 0.0.0.0)")
    flags.add_argument(
        "--port", type=int, default=8080, help="port of /healthz, /readyz, /metrics (default: 8080; 0: any)"
    )
    flags.add_argument(
        "--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO", help="(default: INFO)"
    )
    return flags


def main(arguments: Sequence[str] | None = None, others: Sequence[Reconciler] | None = None) -> int:
    """Run the operator until it is told to stop; return the exit code.

    Args:
        arguments: the command line, without the program; by default the process's own.
        others: reconcilers to run instead of the built-in ones.
    """
    flags = parser().parse_args(arguments)
    logging.basicConfig(
        level=flags.log_level,
        format="%(asctime)s %(levelname)s %(threadName)s %(message)s",
        stream=sys.stderr,
    )
    lease_namespace = flags.lease_namespace or _own_namespace() or flags.namespace
    if not lease_namespace:
        _log.error("no namespace for the lease outside of a pod; name one with --lease-namespace")
        return USAGE
    try:
        client = _client(flags.kubeconfig)
    except Exception as error:  # of many kinds, all of them about the configuration
        _log.error("cannot tell where the cluster is: %s; name a file with --kubeconfig", error)
        return USAGE
    manager = Manager(
        KubernetesTransport(client),
        SystemClock(),
        reconcilers(flags.image) if others is None else others,
        # Unlike that of any other process; a pod that starts anew keeps its name.
        identity=f"{socket.gethostname()}_{uuid.uuid4().hex[:12]}",
        namespace=flags.namespace,
        lease_namespace=lease_namespace,
        lease_name=flags.lease_name,
        lease_seconds=flags.lease_seconds,
        lease_owner=flags.lease_owner,
        workers=flags.workers,
        rate=flags.qps,
        burst=flags.burst,
    )
    health = HealthServer(
        flags.host,
        flags.port,
        alive=manager.alive,
        ready=manager.ready,
        metrics=manager.metrics.exposition,
    )
    health.start()
    _log.info("listening at %s:%d", *health.server_address[:2])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: manager.stop.set())
    stopped = manager.run()
    health.shutdown()
    if not stopped:
        _log.error("the lease is lost")
        # Threads may still wait for answers to requests; none of them may do anything any more.
        logging.shutdown()
        os._exit(LOST)
    _log.info("stopped")
    return 0


def _client(kubeconfig: Path | None) -> Any:
    """Return the official client, configured."""
    from kubernetes import client, config

    settings = client.Configuration()
    if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(client_configuration=settings)
    else:
        config.load_kube_config(
            config_file=str(kubeconfig) if kubeconfig else None, client_configuration=settings
        )
    settings.connection_pool_maxsize = 64  # watches and workers, each with a connection
    return client.ApiClient(settings)


def _own_namespace() -> str | None:
    """Return the namespace of the pod that this runs in."""
    return _ACCOUNT_NAMESPACE.read_text().strip() if _ACCOUNT_NAMESPACE.is_file() else None


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 1000")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 10000")
    return number
