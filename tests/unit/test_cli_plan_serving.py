"""``unmask plan serve``: what it prints, and what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.cli.main import main
from unmask.experts.planning.forward import PARTS
from unmask.training.sizing.devices import DEVICES, MEMORY_BYTES_PER_SECOND

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "expert-shards.md"
MODEL_M = ROOT / "benchmarks" / "model_m.json"


def run(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["plan", *map(str, args)])
    return end.value.code, *capsys.readouterr()


def test_it_says_what_a_forward_takes_what_comes_of_it_and_where_constants_come_from(capsys):
    code, out, err = run(capsys, "serve", "--config", MODEL_M, "--shards", "1,2,64")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(
        "model    735,015,616 parameters, 553,648,128 of them in 11 x 64 routed experts"
    )
    assert (
        lines[1]
        == "work     8 requests x 32 positions, 1,024 of each in the cache, 2.5 tokens of each per forward"
    )
    assert "8 a token, from 4 of 8 groups; 64.0 of 64 hit in a layer; rows are bfloat16 over grpc" in lines[2]
    times, outcome = (
        lines.index("Milliseconds of a forward, and their share of it"),
        lines.index("What comes of it"),
    )
    assert lines[times + 1].split() == ["shards", "forward", *PARTS, "hidden"]
    for table in (times, outcome):
        assert [line.split()[0] for line in lines[table + 2 : table + 6]] == ["none", "1", "2", "64"]
    constants = lines[lines.index("Constants") + 1 :]
    assert all(re.fullmatch(r"[a-z_.]+ +[\w.+-]+  assumed.*", line) for line in constants)
    assert len({line.split()[0] for line in constants}) == len(constants) > 15


def test_json_holds_what_is_printed_and_more(capsys):
    given = ["--shards", "4", "--replication", "2", "--batch", "4", "--tpf", "3", "--micro-batches", "2"]
    code, out, _ = run(
        capsys, "serve", "--config", MODEL_M, *given, "--network", "25", "--round-trip", "60", "--json"
    )
    data = json.loads(out)
    assert code == 0 and data["work"]["tokens"] == 128 and data["micro_batches"] == 2
    whole, four = data["forwards"]
    assert (whole["shards"], four["shards"], four["replication"]) == (0, 4, 2)
    for forward in (whole, four):
        parts = sum(part["seconds"] for part in forward["parts"])
        assert forward["seconds"] == pytest.approx(parts - forward["hidden_seconds"])
        assert forward["batch_tokens_per_second"] == pytest.approx(4 * 3 / forward["seconds"])
    assert four["times_unsharded"] == pytest.approx(four["seconds"] / whole["seconds"])
    constants = {each["name"]: each for each in data["constants"]}
    assert constants["network.bytes_per_second"]["value"] == pytest.approx(25e9 / 8 * 0.88)
    assert constants["network.round_trip_seconds"] == {
        "name": "network.round_trip_seconds",
        "value": pytest.approx(60e-6),
        "source": "given",
    }


def test_measured_constants_go_before_assumed_ones(capsys, tmp_path):
    path = tmp_path / "constants.json"
    path.write_text(json.dumps({"measured": "here, today", "network": None, "shards_at_once": 2}))
    code, out, _ = run(capsys, "serve", "--config", MODEL_M, "--shards", "2", "--constants", path)
    assert code == 0
    assert re.search(r"^shards_at_once +2  measured: here, today$", out, re.MULTILINE)
    assert re.search(r"^network +-  measured: here, today$", out, re.MULTILINE)
    assert re.search(r"^imbalance +-  assumed", out, re.MULTILINE)


def test_by_default_shards_are_as_many_as_there_are_experts_and_replicas_for(capsys):
    _, out, _ = run(capsys, "serve", "--config", MODEL_M, "--replication", "4", "--json")
    assert [forward["shards"] for forward in json.loads(out)["forwards"]] == [0, 4, 8, 16, 32, 64]
    _, out, _ = run(capsys, "serve", "--config", ROOT / "benchmarks" / "model_s.json", "--json")
    assert [forward["shards"] for forward in json.loads(out)["forwards"]] == [0, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 64, "Missing option '--config'. (see 'unmask plan serve --help')"),
        (["--config", "gpt"], 64, "--config: got 'gpt'; known are llada2-mini"),
        (["--config", "none.json"], 66, "none.json: no such file"),
        (["--config", "qwen3-0.6b"], 64, "the model has no layer with experts"),
        (["--config", MODEL_M, "--shards", "65"], 64, "shards: got 65, must be 1 to 64"),
        (
            ["--config", ROOT / "benchmarks/model_s.json", "--shards", "33"],
            64,
            "shards: got 33, must be 1 to 32",
        ),
        (["--config", MODEL_M, "--shards", "two"], 64, "--shards: got 'two', expected whole numbers"),
        (
            ["--config", MODEL_M, "--shards", "1", "--replication", "2"],
            64,
            "replication: got 2, must be 1 to 1",
        ),
        (
            ["--config", MODEL_M, "--batch", "1", "--micro-batches", "2"],
            64,
            "micro-batches: got 2 of a batch of 1",
        ),
        (
            ["--config", MODEL_M, "--transport", "tin"],
            64,
            "transport: got 'tin', there are constants of grpc",
        ),
        (["--config", MODEL_M, "--transport", "shm", "--network", "10"], 64, "shm is for one machine"),
        (["--config", MODEL_M, "--network", "0", "--round-trip", "9"], 64, "there is no network"),
        (["--config", MODEL_M, "--gpu", "tpu"], 64, "--gpu: got 'tpu', known are"),
        (["--config", MODEL_M, "--constants", "none.json"], 64, "none.json: cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, args, code, says):
    got, _, err = run(capsys, "serve", *args)
    assert (got, err.count("\n")) == (code, 1) and says in err


def test_options_of_a_job_do_not_stand_before_it(capsys):
    code, _, err = run(capsys, "--gpu", "h200-141g", "serve", "--config", MODEL_M)
    assert code == 64 and "--gpu is of a job here" in err


def test_a_plan_of_a_job_still_wants_its_manifest(capsys):
    code, _, err = run(capsys)
    assert code == 64 and "Missing option '-f' / '--file'. (see 'unmask plan --help')" in err


def test_the_memory_of_every_gpu_is_known():
    assert MEMORY_BYTES_PER_SECOND.keys() == DEVICES.keys()


def test_it_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import unmask.cli.main as m\n"
        "assert m._exit_code(['plan', 'serve', '--config', sys.argv[1], '--shards', '2']) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program, str(MODEL_M)], check=True, stdout=subprocess.DEVNULL)


def shown() -> list[tuple[str, list[str]]]:
    """Each command of the page whose output stands below it, and the lines of that."""
    pairs = re.findall(
        r"```sh\n(unmask plan serve [^`]*)```\s*```text\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    return [(command.replace("\\\n", " "), output.splitlines()) for command, output in pairs]


@pytest.mark.parametrize(
    ("command", "output"), shown(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_page_shows_what_is_printed(capsys, command, output):
    code, out, _ = run(capsys, *shlex.split(command)[2:])
    printed = out.splitlines()
    assert code == 0 and len(output) > 5
    assert [line for line in output if line not in printed] == []


def test_the_page_shows_mini_and_flash():
    assert {re.search(r"--config (\S+)", command)[1] for command, _ in shown()} >= {
        "llada2-mini",
        "llada2-flash",
    }


def test_the_page_shows_what_each_change_makes_of_flash(capsys):
    rows = re.findall(
        r"^\| (?:`(--[^`]+)`)? ?\| ([\d.]+) \| ([\d.]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    for options, milliseconds, ratio, bound in rows:
        given = [
            "--config",
            "llada2-flash",
            "--gpu",
            "h200-141g",
            "--shards",
            "8",
            *options.split(),
            "--json",
        ]
        _, out, _ = run(capsys, "serve", *given)
        forward = json.loads(out)["forwards"][1]
        found = (f"{forward['seconds'] * 1e3:.1f}", f"{forward['times_unsharded']:.2f}", forward["bound"])
        assert found == (milliseconds, ratio, bound), options


def test_constants_as_the_page_has_them_are_read(capsys, tmp_path):
    (block,) = re.findall(r"```json\n(.*?)```\s*```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "constants.json"
    path.write_text(block[0])
    line = block[1].replace("constants.json", str(path)).replace("benchmarks/", f"{ROOT}/benchmarks/")
    code, out, err = run(capsys, *shlex.split(line)[2:])
    assert (code, err) == (0, "")
    assert "measured: what measured them, on which machine, when" in out
