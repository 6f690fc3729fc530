"""An S3 server on this machine, whose answers a test can spoil, and ranks that train into it.

Each rank is a machine of its own, unless a test says otherwise: it has its own scratch folder, and is the
first process there.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.ranks import redirect, start
from unmask.errors import UnmaskError
from unmask.training.object_store import ObjectStore
from unmask_api.train_job import DiffusionTrainJob

BUCKET = "bucket"
Spoil = Callable[[str, str], bool]
"""Whether a request, of this method and path, is answered with 503."""


@dataclass
class StoreServer:
    """A server that is up, and what it was asked."""

    port: int
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request that was let through."""
    spoil: Spoil = lambda method, path: False
    refused: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What clients need to know."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # What is tried again is tried again by us, or a test would wait for both.
            "AWS_MAX_ATTEMPTS": "1",
        }

    def store(self, prefix: str) -> ObjectStore:
        """The objects below ``prefix``; the environment must be the server's."""
        return ObjectStore(f"s3://{BUCKET}/{prefix}")

    def contents(self, prefix: str) -> dict[str, bytes]:
        """All objects below ``prefix``."""
        store = self.store(prefix)
        return {name: store.read(name) for name in sorted(store.sizes())}


@contextmanager
def store_server(port: int = 0, *, also: socket.socket | None = None) -> Iterator[StoreServer]:
    """Run a server with one empty bucket, one request at a time as far as anybody can tell.

    It answers on loopback, and to whoever connects to the socket ``also``.
    """
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any, **options: Any) -> None:
            pass

    application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.reset()
    backend.create_bucket(BUCKET, "us-east-1")
    server = StoreServer(0)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with lock:
            if server.spoil(method, path):
                server.refused += 1
                start_response("503 Slow Down", [("Content-Type", "text/plain"), ("Connection", "close")])
                return [b""]
            server.requests.append((method, path))
            return [b"".join(application(environ, start_response))]

    @contextmanager
    def listening(host: str, port: int, file: int | None = None) -> Iterator[int]:
        http = make_server(host, port, answer, threaded=True, request_handler=Quiet, fd=file)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield http.socket.getsockname()[1]  # what is given a socket knows no `server_port`
        finally:
            http.shutdown()
            http.server_close()
            thread.join()

    with ExitStack() as stack:
        server.port = stack.enter_context(listening("127.0.0.1", port))
        if also is not None:
            stack.enter_context(listening(*also.getsockname(), also.fileno()))
        yield server


def start_machines(
    job: DiffusionTrainJob,
    server: StoreServer,
    scratch: Path,
    *,
    ranks: int = 1,
    one_machine: bool = False,
    pause_after: int | None = None,
    patch: Callable[..., None] | None = None,
) -> list[BaseProcess]:
    """Start the processes of an attempt, a machine each or all on one; stderr goes to ``scratch/rank-N.log``.

    With ``pause_after`` the run stands still after that step until the file ``scratch/go`` exists; ``patch``
    is called first in each process.
    """
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    return start(_attempt, text, server.environment, scratch, one_machine, pause_after, patch, ranks=ranks)


def impatient() -> None:
    """Ask a store twice at most, without waiting long."""
    from unmask.training import object_store

    object_store._FIRST_WAIT_S = 0.05
    defaults = object_store.ObjectStore.__init__.__kwdefaults__
    assert defaults is not None
    defaults["tries"] = 2


def log_of(scratch: Path, rank: int = 0) -> str:
    """What rank ``rank`` wrote to stderr."""
    return (scratch / f"rank-{rank}.log").read_text(encoding="utf-8")


def wait_for(condition: Callable[[], object], *processes: BaseProcess, timeout_s: float = 90.0) -> None:
    """Until ``condition()``, or one of ``processes`` has ended."""
    deadline = time.monotonic() + timeout_s
    while not condition() and all(process.is_alive() for process in processes):
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.01)


def _attempt(
    text: str,
    environment: Mapping[str, str],
    scratch: Path,
    one_machine: bool,
    pause_after: int | None,
    patch: Callable[..., None] | None,
) -> None:
    rank = os.environ["RANK"]
    os.environ.update(environment)
    if one_machine:
        os.environ["UNMASK_SCRATCH"] = str(scratch / "machine")
    else:
        os.environ.update({"UNMASK_SCRATCH": str(scratch / f"machine-{rank}"), "LOCAL_RANK": "0"})
    redirect(2, scratch / f"rank-{rank}.log")
    from unmask.training.attempt import attempt

    if patch is not None:
        patch()

    def pause(line: Mapping[str, Any]) -> None:
        while line["step"] == pause_after and not (scratch / "go").exists():
            time.sleep(0.01)

    import logging

    logging.basicConfig(level=logging.INFO)
    try:
        sys.exit(attempt(DiffusionTrainJob.from_json(text), observe=pause).exit_code)
    except UnmaskError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
