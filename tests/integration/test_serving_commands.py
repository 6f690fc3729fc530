"""``unmask serve`` and ``unmask generate``, as a person meets them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from parent_death import bound
from support.folders import GOLDEN, add_tokenizer, served_folder
from unmask.cli.main import main
from unmask.client import BlockCommitted, Client, Finished
from unmask.serving import weights

READY = re.compile(r"serving tiny \(LLaDA\w+\) on (\S+:\d+), metrics on (http://\S+/metrics)")


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process and its address."""
    command = [sys.executable, "-m", "unmask.cli.main", "serve", str(folder), "--port=0", "--metrics-port=0"]
    command = bound([*command, "--threads=1", *options])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = READY.fullmatch(line.strip())
            assert match, line
            yield match[1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder) as (address, _):
        yield address


class Ended(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Run: TypeAlias = Callable[..., Ended]


@pytest.fixture
def unmask(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert isinstance(exit_.value.code, int)
        return Ended(exit_.value.code, *capsys.readouterr())

    return run


# generate


def test_the_text_is_printed_and_what_it_took_is_told_beside_it(unmask: Run, address: str) -> None:
    ended = unmask("generate", "w5 w6", "--raw", "--max-tokens=12", f"--server={address}")
    assert ended.code == 0
    with Client(address) as client:
        assert ended.out == client.generate("w5 w6", max_tokens=12).text + "\n"
    assert re.fullmatch(
        r"12 tokens in [\d.]+ s, [\d.]+ tokens/s; TPF [\d.]+ \(decode [\d.]+, denoise [\d.]+\)\n", ended.err
    )


def test_a_text_is_a_turn_where_the_model_has_a_template(unmask: Run, address: str) -> None:
    by_default = unmask("generate", "w5", "--max-tokens=4", f"--server={address}")
    chat = unmask("generate", "w5", "--chat", "--max-tokens=4", f"--server={address}")
    raw = unmask("generate", "user w5 assistant", "--raw", "--max-tokens=4", f"--server={address}")
    assert by_default.out == chat.out == raw.out


def test_a_conversation_is_read_from_a_file(unmask: Run, address: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    file.write_text(json.dumps(turns), encoding="utf-8")
    asked = unmask("generate", "w7", f"--messages={file}", "--max-tokens=4", f"--server={address}")
    expected = "user w5 assistant w6 user w7 assistant"
    assert asked.code == 0
    assert asked.out == unmask("generate", expected, "--raw", "--max-tokens=4", f"--server={address}").out
    turns.append({"role": "user", "content": "w7"})
    file.write_text(json.dumps({"messages": turns, "tools": [{"name": "f"}]}), encoding="utf-8")
    whole = unmask("generate", f"--messages={file}", "--max-tokens=4", f"--server={address}")
    assert whole.out == asked.out


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[", (), "not valid JSON"),
        ("{}", (), 'expected a list of turns, or an object with "messages"'),
        ("[3]", (), '"messages" must be a list of objects'),
        ("[{}]", (), "the request cannot hold a value"),
        ('[{"role": "user"}]', ("--raw",), "--raw: a conversation is written out by the model's template"),
        (None, (), "nothing to answer; give TEXT, or a conversation with --messages"),
    ],
)
def test_a_conversation_that_is_none_is_one_line_and_code_64(
    unmask: Run, address: str, tmp_path: Path, content: str | None, options: tuple[str, ...], message: str
) -> None:
    if content is not None:
        (tmp_path / "chat.json").write_text(content, encoding="utf-8")
        options += (f"--messages={tmp_path / 'chat.json'}",)
    ended = unmask("generate", f"--server={address}", *options)
    assert (ended.code, ended.err.count("\n")) == (64, 1)
    assert ended.err.startswith("error: ") and message in ended.err


def test_json_holds_tokens_and_all_three_figures(unmask: Run, address: str) -> None:
    ended = unmask("generate", "w5", "--json", "--max-tokens=12", "--threshold=0.01", f"--server={address}")
    answer = json.loads(ended.out)
    assert len(answer["token_ids"]) == 12
    assert answer["usage"]["completion_tokens"] == 12
    # A block is stored by the next one's first forward, so that denoising ones are all there are.
    assert answer["usage"]["tpf"] <= answer["usage"]["tpf_decode"] == answer["usage"]["tpf_denoise"]
    assert answer["tokens_per_second"] == pytest.approx(12 / answer["seconds"])


def test_the_page_s_example_of_a_trace_tells_every_forward(
    unmask: Run,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^unmask (generate .* --trace story.json)$", page, re.MULTILINE)
    (snippet,) = re.findall(r"^```python\n(.*?story.json.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    streamed = unmask(*shlex.split(command), f"--server={address}")
    assert streamed.code == 0
    story = json.loads((tmp_path / "story.json").read_text(encoding="utf-8"))
    assert len(story["forwards"]) == sum(
        story["usage"][f"forwards_{kind}"] for kind in ("prefill", "denoise")
    )
    exec(compile(snippet, "docs/serving.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(story["forwards"])
    assert lines[0].startswith("queued for ") and lines[-1].endswith("committed block 8")
    whole = unmask(*shlex.split(command), "--json", f"--server={address}")
    again = json.loads((tmp_path / "story.json").read_text(encoding="utf-8"))
    assert "trace" not in json.loads(whole.out)
    assert [f["filled"] for f in again["forwards"] if f["filled"]] == [
        f["filled"] for f in story["forwards"] if f["filled"]
    ]


def test_each_decoder_can_be_asked_for_with_its_parameters(unmask: Run, address: str) -> None:
    def forwards(*options: str) -> int:
        ended = unmask("generate", "w5", "--json", "--raw", "--max-tokens=7", *options, f"--server={address}")
        return json.loads(ended.out)["usage"]["forwards_denoise"]  # type: ignore[no-any-return]

    assert forwards() == 7
    assert forwards("--decoder=fixed-steps", "--steps-per-block=1") == 1
    edits = ["--decoder=joint-edit", "--threshold=0.001", "--edit-threshold=0"]
    assert forwards(*edits, "--max-post-edit-steps=0") == 1
    assert forwards(*edits, "--max-post-edit-steps=2") == 3
    assert forwards("--decoder=hierarchical", "--threshold=0.001", "--low-threshold=0.001") == 1
    sure = ["--decoder=credit", "--threshold=0.999", "--credit-decay=1", "--credit-exponent=0"]
    assert forwards(*sure, "--credit-weight=0") == 7 > forwards(*sure, "--credit-weight=10")
    assert forwards("--decoder=entropy-bounded", "--entropy-bound=0") == 7
    assert forwards("--decoder=entropy-bounded", "--entropy-bound=1000") == 1


def test_a_model_that_attends_to_the_whole_canvas_is_served(unmask: Run, tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny", golden="lladamoe_a", threshold=1.0)
    options = ["--json", "--max-tokens=20", "--decoder=low-confidence"]
    with serving(folder) as (address, _):
        whole = unmask("generate", "w5", *options, "--block-length=20", f"--server={address}")
        near = unmask("generate", "w5", *options, "--vicinity", "2", "3", f"--server={address}")
    usages = [json.loads(ended.out)["usage"] for ended in (whole, near)]
    assert [usage["forwards_denoise"] for usage in usages] == [20, 20]
    assert usages[1]["positions_evaluated"] < usages[0]["positions_evaluated"]


def test_a_canvas_without_a_terminal_is_plain_text(unmask: Run, address: str) -> None:
    plain = unmask("generate", "w5", "--max-tokens=8", f"--server={address}")
    assert unmask("generate", "w5", "--max-tokens=8", "--canvas", f"--server={address}").out == plain.out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threshold=1.5", "diffusion.threshold: got 1.5, must be above 0 and at most 1"),
        (
            "--edit-threshold=0.5",
            "diffusion.edit_threshold: DECODER_THRESHOLD has no such parameter; ask for",
        ),
        (
            "--decoder=low-confidence",
            "diffusion.decoder: got DECODER_LOW_CONFIDENCE, allowed are DECODER_THR",
        ),
        ("--max-tokens=9999", "sampling.max_tokens: got 9999, must be 1 to"),
        ("--decoder=magic", "decoder: got 'magic', allowed are threshold"),
        ("--steps-per-block=9", "diffusion.steps_per_block: got 9, must be 1 to 8"),
        ("--max-tokens=-1", "the request cannot hold a value"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_64(
    unmask: Run, address: str, option: str, message: str
) -> None:
    ended = unmask("generate", "w5", option, f"--server={address}")
    assert ended.code == 64
    assert ended.err.startswith("error: ") and message in ended.err
    assert ended.err.count("\n") == 1


def test_where_nobody_serves_it_says_so(unmask: Run) -> None:
    ended = unmask("generate", "w5", "--server=127.0.0.1:1")
    assert ended.code == 1
    assert "127.0.0.1:1" in ended.err and "is `unmask serve` running there?" in ended.err
    assert ended.err.count("\n") == 1


# serve


@pytest.mark.slow
def test_a_killed_server_s_stream_is_finished_by_another_one(folder: Path) -> None:
    slow = {"token_ids": [5, 6, 7], "max_tokens": 600, "threshold": 1.0}
    with serving(folder) as (first, doomed), serving(folder) as (second, other):
        with Client(second) as client:
            undisturbed = client.generate(**slow)  # type: ignore[arg-type]
        tokens: list[int] = []
        with Client([first, second]) as client:
            for event in client.stream(**slow):  # type: ignore[arg-type]
                if isinstance(event, BlockCommitted):
                    assert event.offset == len(tokens)
                    tokens += event.token_ids
                    if event.block_index == 3:
                        doomed.kill()
        assert isinstance(event, Finished)
        assert tuple(tokens) == undisturbed.token_ids
        assert doomed.wait(30) == -signal.SIGKILL
        assert event.usage.completion_tokens == undisturbed.usage.completion_tokens
        other.send_signal(signal.SIGTERM)
        assert other.wait(30) == 0


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def truncate(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1000])


def make_autoregressive(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "config.json: no such file"),
        (lambda folder: without(folder, "config.json"), "config.json: no such file"),
        (lambda folder: without(folder, "model.safetensors"), "the weights are missing"),
        (lambda folder: truncate(folder, "model.safetensors"), "model.safetensors: truncated"),
        (lambda folder: without(folder, "tokenizer.json"), "tokenizer.json: no such file"),
        (make_autoregressive, "is autoregressive, only masked diffusion models are served; train it with"),
    ],
    ids=["no folder", "no config", "no weights", "truncated weights", "no tokenizer", "autoregressive"],
)
def test_a_folder_that_cannot_be_served_is_one_line_and_code_66(
    unmask: Run, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = served_folder(tmp_path / "tiny")
    spoil(folder)
    ended = unmask("serve", str(folder), "--port=0", "--metrics-port=0")
    assert ended.code == 66
    assert ended.err.startswith(f"error: {folder}") and message in ended.err
    assert ended.err.count("\n") == 1


def test_a_server_that_still_reads_its_weights_ends_on_sigterm(
    unmask: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(weights, "load_open", read)
    before = signal.getsignal(signal.SIGTERM)
    assert unmask("serve", str(folder), "--port=0", "--metrics-port=0").code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_options_that_do_not_fit_are_code_64(unmask: Run, folder: Path, address: str) -> None:
    too_long = unmask("serve", str(folder), "--context=5000")
    assert too_long.code == 64 and "--context: got 5000" in too_long.err
    too_narrow = unmask("serve", str(folder), "--max-positions=3")
    assert too_narrow.code == 64 and "max positions: got 3" in too_narrow.err
    in_use = unmask("serve", str(folder), f"--port={address.rpartition(':')[2]}", "--metrics-port=0")
    assert in_use.code == 64 and "--port: cannot listen on" in in_use.err


def test_a_server_with_little_memory_and_short_forwards_says_the_same(folder: Path, address: str) -> None:
    limits = ("--rows=16", "--context=64", "--cache-mib=1", "--max-positions=128")
    with serving(folder, *limits) as (bounded, _), Client(bounded) as small, Client(address) as large:
        for text in ("w5", "w5 w6 w7 w8 w9 w10 w11"):
            assert small.generate(text, max_tokens=30).text == large.generate(text, max_tokens=30).text


def test_the_golden_models_can_be_served_with_blocks_of_32(unmask: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(GOLDEN / "llada2_b", folder)
    add_tokenizer(folder)
    with serving(folder) as (address, _), Client(address) as client:
        assert client.model_info().block_length == 32
        assert len(client.generate("w5", max_tokens=40).token_ids) == 40
