"""Ranks of a training job as forked processes: they start in a fraction of a second, and can be killed.

A fork server imports the trainer once; every rank is a fork of it. What a rank does is what ``unmask train``
does under torchrun: the environment names the ranks, and the process ends with the exit code.
"""

import hashlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError
from unmask_api.train_job import DiffusionTrainJob

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["unmask.training.attempt", "torch._dynamo", "s3fs", "support.ranks"])


def start_ranks(
    job: DiffusionTrainJob, *, ranks: int = 1, pause_after: int | None = None, note_inputs: bool = False
) -> list[BaseProcess]:
    """Start the processes of an attempt; their stderr goes to ``<run>.rank-N.log`` beside the run folder.

    With ``pause_after`` the run stands still after that step until the file ``<run>.go`` exists. With
    ``note_inputs`` each rank adds what it learns from to ``<run>.inputs-N``, for :func:`inputs_noted`.
    """
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    return start(_attempt, text, pause_after, note_inputs, ranks=ranks)


def inputs_noted(run: Path, *, ranks: int) -> list[str]:
    """What all attempts of a run learnt from, sorted: for each row of each step its documents, and a digest.

    The digest is of its documents' numbers, its tokens with their masks, what is predicted, and weights.
    """
    notes = [Path(f"{run}.inputs-{rank}") for rank in range(ranks)]
    return sorted(line for note in notes if note.exists() for line in note.read_text().splitlines())


def start_commands(arguments: list[str], folder: Path, *, ranks: int) -> list[BaseProcess]:
    """Start ``unmask`` with ``arguments`` in each rank; output goes to ``folder/rank-N.{out,err}``."""
    return start(_command, arguments, folder, ranks=ranks)


def start(what: Callable[..., Any], *arguments: Any, ranks: int) -> list[BaseProcess]:
    """Start ``what(*arguments)`` in ``ranks`` processes that torchrun might have started."""
    port = _free_port()
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        process = _CONTEXT.Process(target=_with_environment, args=(environment, what, arguments))
        process.start()
        processes.append(process)
    return processes


def join(processes: list[BaseProcess], *, timeout_s: float = 100) -> list[int | None]:
    """Wait for all; their exit codes."""
    for process in processes:
        process.join(timeout_s)
    return [process.exitcode for process in processes]


def train_to_the_end(job: DiffusionTrainJob, *, ranks: int = 1, note_inputs: bool = False) -> None:
    """Run an attempt that must complete."""
    assert join(start_ranks(job, ranks=ranks, note_inputs=note_inputs)) == [0] * ranks


def _attempt(text: str, pause_after: int | None, note_inputs: bool) -> None:
    from unmask.training.attempt import attempt

    job = DiffusionTrainJob.from_json(text)
    run = job.spec.checkpoint.uri
    redirect(2, Path(f"{run}.rank-{os.environ['RANK']}.log"))
    if note_inputs:
        _note_inputs(Path(f"{run}.inputs-{os.environ['RANK']}"))

    def pause(line: Mapping[str, Any]) -> None:
        while line["step"] == pause_after and not Path(f"{run}.go").exists():
            time.sleep(0.01)

    try:
        sys.exit(attempt(job, observe=pause).exit_code)
    except UnmaskError as error:
        sys.exit(error.exit_code)


def _note_inputs(note: Path) -> None:
    """From now on add a line to ``note`` for each micro-batch, which is to be of one row."""
    from unmask.training import trainer

    usual = trainer.model_inputs

    def noting(rows: Any, *given: Any, **options: Any) -> Any:
        inputs = usual(rows, *given, **options)
        digest = hashlib.sha256(rows.ordinal.tobytes())
        for tensor in (inputs.ids, inputs.predict, inputs.targets, inputs.weights):
            digest.update(tensor.numpy().tobytes())
        documents = sorted({int(one) for one in rows.ordinal[rows.document >= 0]})
        with note.open("a", encoding="utf-8") as file:
            file.write(f"{documents} {digest.hexdigest()}\n")
        return inputs

    trainer.model_inputs = noting


def _command(arguments: list[str], folder: Path) -> None:
    from unmask.cli.main import main

    for descriptor, kind in ((1, "out"), (2, "err")):
        redirect(descriptor, folder / f"rank-{os.environ['RANK']}.{kind}")
    main(arguments)


def redirect(descriptor: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), descriptor)


def _with_environment(
    environment: dict[str, str], what: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    what(*arguments)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
