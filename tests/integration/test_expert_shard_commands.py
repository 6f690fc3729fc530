"""``unmask shard`` and ``unmask serve --experts``, as a person meets them."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from parent_death import bound
from support.folders import served_folder
from unmask.cli.main import main
from unmask.client import Client
from unmask.diffusion.generation import generate
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.v1 import generation_pb2 as pb

pytestmark = pytest.mark.shards

SHARD_READY = re.compile(
    r"computing experts of tiny, parts (.+) of 2 \(\S+ MiB\), on (\S+:\d+), metrics on (\S+)"
)
SHARD_READY_EVERYWHERE = re.compile(
    r"computing experts of tiny, parts (.+) of 2 \(\S+ MiB\), on (\S+:\d+), (unix:\S+), (group:\S+), "
    r"metrics on (\S+)"
)
SERVER_READY = re.compile(r"serving tiny \(LLaDA2MoeModelLM\) on (\S+:\d+), metrics on (http://\S+/metrics)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", threshold=0.05)


@contextmanager
def running(*arguments: str, ready: re.Pattern[str]) -> Iterator[tuple[re.Match[str], subprocess.Popen[str]]]:
    """A command that has said that it is ready."""
    command = [
        sys.executable,
        "-m",
        "unmask.cli.main",
        *arguments,
        "--port=0",
        "--metrics-port=0",
        "--threads=1",
    ]
    with subprocess.Popen(bound(command), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            match = ready.fullmatch(line)
            assert match, line
            yield match, process
        finally:
            process.kill()


def alone(folder: Path) -> list[int]:
    """What one process generates."""
    model = ServedModel.describe(folder, read_config(folder), name=None, rows=1, context_length=128)
    params = model.params(model.default_decoder, pb.DiffusionParams(), max_new_tokens=24)
    return generate(load(folder), [model.tokenizer.encode("w7 w8 w9")], params, rows=1)[0].token_ids


@pytest.mark.slow
def test_two_shards_and_a_server_answer_as_one_process_does(folder: Path) -> None:
    shard = ["shard", str(folder), "--replication=2"]
    with (
        running(*shard, "--shard=0/2", ready=SHARD_READY) as (first, process),
        running(*shard, "--shard=1/2", ready=SHARD_READY) as (second, _),
        running("serve", str(folder), f"--experts={first[2]},{second[2]}", ready=SERVER_READY) as (server, _),
        Client(server[1], timeout_s=60) as client,
    ):
        assert first[1] == second[1] == "0, 1"
        expected = alone(folder)
        assert list(client.generate("w7 w8 w9", max_tokens=24).token_ids) == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "a shard that is asked to end does so, in good order"
        assert list(client.generate("w7 w8 w9", max_tokens=24).token_ids) == expected
        exported = urllib.request.urlopen(server[2], timeout=10).read().decode()
        assert 'unmask_expert_shards{state="ready"} 1.0' in exported
        frames = urllib.request.urlopen(second[3], timeout=10).read().decode()
        assert re.search(r'unmask_shard_frames_total\{status="ok"\} [1-9]', frames)


@pytest.mark.slow
def test_shards_on_one_machine_and_in_one_job_answer_as_one_process_does(
    folder: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"tcp://127.0.0.1:{probe.getsockname()[1]}"

    def shard(number: int) -> list[str]:
        path = tmp_path / f"{number}.sock"
        return ["shard", str(folder), f"--shard={number}/2", f"--socket={path}", f"--group={store}"]

    with (
        running(*shard(0), ready=SHARD_READY_EVERYWHERE) as (first, one),
        running(*shard(1), ready=SHARD_READY_EVERYWHERE) as (second, other),
    ):
        for experts in (f"{first[3]},{second[3]}", f"group:{store}?shards=2"):
            with (
                running("serve", str(folder), f"--experts={experts}", ready=SERVER_READY) as (
                    server,
                    process,
                ),
                Client(server[1], timeout_s=60) as client,
            ):
                assert list(client.generate("w7 w8 w9", max_tokens=24).token_ids) == alone(folder)
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
        assert [one.wait(30), other.wait(30)] == [0, 0], "the ranks of a job end together"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["shard", "{folder}", "--shard=2/2"], "shard: got number 2 of 2, numbers run from 0 to 1"),
        (["shard", "{folder}", "--shard=two"], "--shard: got 'two', expected I/N, such as 0/2"),
        (["shard", "{folder}", "--shard=0/99"], "shards: got 99, must be 1 to 16"),
        (["shard", "{folder}", "--shard=0/2", "--replication=3"], "replication: got 3, must be 1 to 2"),
        (["serve", "{folder}", "--experts=nowhere"], "--experts: got 'nowhere', expected HOST:PORT"),
        (["serve", "{folder}", "--experts=a:1,a:1"], "expected each shard once"),
        (
            ["shard", "{folder}", "--shard=0/2", "--group=here"],
            "--group: got 'here', expected tcp://HOST:PORT",
        ),
        (
            ["shard", "{folder}", "--shard=0/2", "--port=0", "--socket={folder}/none/x.sock"],
            "--socket: cannot listen on ",
        ),
        (
            ["serve", "{folder}", "--experts=127.0.0.1:1", "--experts-wait-seconds=0.1"],
            "--experts: after 0.1 s no session with 127.0.0.1:1",
        ),
    ],
)
def test_what_cannot_be_ends_with_one_line(
    folder: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            main([argument.format(folder=folder) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    printed = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 64
    assert complaint in printed[-1]
