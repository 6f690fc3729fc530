"""Everything a person can get wrong ends in one line that names it, and the exit code that says whose it is.

Real processes: ``unmask run`` through its launcher and workers, ``unmask serve``, ``unmask generate``.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parent_death import bound
from support.folders import served_folder
from support.manifests import changed
from support.training import training_job
from unmask_operator import yaml_dialect

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "unmask.cli.main")


def refused(code: int, message: str, *args: object) -> None:
    """Run a command that must end with ``code`` and one line on stderr that matches ``message``."""
    ended = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=240)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: "), ended.stderr
    assert re.search(message, ended.stderr), ended.stderr


Manifest = Callable[[dict[str, Any]], Path]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Writes the tiny job with some fields changed, and its data."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(yaml_dialect.dump(changed(training_job(tmp_path).to_json_dict(), values)))
        return path

    return write


# The manifest: 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spec.stages[0].stepz": 3}, r"spec\.stages\[0\]\.stepz.*steps"),
        ({"spec.stages[1].blockSizes": [3]}, r"spec\.stages\[1\]\.blockSizes.*must divide length"),
        ({"spec.model.init.config.n_group": 3}, r"config.*num_experts 8 is not a multiple of n_group 3"),
        ({"spec.stages[1].convertTo": None}, r"spec\.stages\[1\]\.objective: got bdlm.*set convertTo"),
    ],
    ids=["unknown field", "block size that does not divide the length", "model config", "missing conversion"],
)
def test_a_wrong_manifest(manifest: Manifest, values: dict[str, Any], message: str) -> None:
    refused(64, message, "run", "-f", manifest(values))


def test_a_missing_manifest_and_an_unknown_option(tmp_path: Path) -> None:
    refused(64, r"none\.yaml", "run", "-f", tmp_path / "none.yaml")
    refused(64, r"--forse", "run", "--forse")


# The data: 65


def test_a_missing_data_file(manifest: Manifest, tmp_path: Path) -> None:
    path = manifest({})
    (tmp_path / "train.jsonl").unlink()
    refused(65, r"train\.jsonl: no such file; correct the uri", "run", "-f", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "w8", "completion": "w9"}\n{"prompt": \n', r"train\.jsonl:2: not valid JSON"),
        ("\n", r"train\.jsonl: holds no documents"),
        ('{"prompt": "w8"}\n', r'train\.jsonl:1: "completion" must be a string, got nothing'),
        (
            json.dumps({"prompt": "w8 " * 40, "completion": "w9"}),
            r"train\.jsonl:1: .*42 tokens.* rows hold 32",
        ),
    ],
    ids=["invalid JSON on line 2", "empty dataset", "missing field", "document longer than a row"],
)
def test_wrong_data(manifest: Manifest, tmp_path: Path, content: str, message: str) -> None:
    path = manifest({})
    (tmp_path / "train.jsonl").write_text(content)
    refused(65, message, "run", "-f", path)


# The model: 66


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def reshape_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 2)}))


def drop_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))


BROKEN_MODELS = {
    remove_weights: r"holds neither model\.safetensors nor",
    truncate_weights: r"model\.safetensors: truncated, or not a safetensors file",
    corrupt_header: r"model\.safetensors: truncated, or not a safetensors file",
    reshape_a_tensor: r"lm_head\.weight: got shape \[3, 2\], config\.json asks for \[512, 64\]",
    drop_a_tensor: r"tensors are missing, first lm_head\.weight",
}


@pytest.mark.parametrize("damage", BROKEN_MODELS)
def test_a_broken_model_is_not_served(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = served_folder(tmp_path / "model")
    damage(folder)
    refused(66, BROKEN_MODELS[damage], "serve", folder, "--port=0", "--metrics-port=0")


@pytest.mark.parametrize("damage", [remove_weights, truncate_weights, reshape_a_tensor])
def test_a_broken_model_is_not_trained(
    manifest: Manifest, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = served_folder(tmp_path / "model")
    damage(folder)
    values = {
        "spec.model": {"init": {"uri": str(folder)}},
        "spec.stages": [
            {
                "name": "answers",
                "objective": "sft",
                "blockSizes": [4],
                "steps": 2,
                "length": 32,
                "rowsPerStep": 4,
                "learningRate": {"peak": "1e-3"},
            }
        ],
    }
    refused(66, BROKEN_MODELS[damage], "run", "-f", manifest(values))


def test_a_flipped_bit_in_a_model_of_ours(manifest: Manifest, tmp_path: Path) -> None:
    ended = subprocess.run([*COMMAND, "run", "-f", manifest({})], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    refused(
        66, r"model\.safetensors: corrupted: its SHA-256", "serve", tmp_path / "run" / "model", "--port=0"
    )


# Requests: 64


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = served_folder(tmp_path_factory.mktemp("served") / "tiny")
    command = [*COMMAND, "serve", str(folder), "--port=0", "--metrics-port=0", "--context=64"]
    with subprocess.Popen(bound(command), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        match = re.search(r" on (\S+:\d+),", server.stdout.readline())
        assert match
        yield match[1]
        server.terminate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["w7 " * 100], r"prompt.*tokens; the context holds 64"),
        (["w7", "--max-tokens=100"], r"max_tokens.*must be 1 to"),
        (["w7", "--decoder=astrology"], r"decoder: got 'astrology', allowed are"),
        (["w7", "--threshold=1.5"], r"threshold: got 1\.5, must be above 0 and at most 1"),
        (["w7", "--threshold=0"], r"threshold: got 0\.0, must be above 0 and at most 1"),
        ([""], r"holds no tokens"),
    ],
    ids=[
        "prompt too long",
        "too many tokens",
        "unknown decoder",
        "threshold above 1",
        "threshold 0",
        "empty",
    ],
)
def test_a_wrong_request(address: str, args: list[str], message: str) -> None:
    refused(64, message, "generate", "--raw", "--server", address, *args)


def test_the_mask_tokens_text_in_a_prompt_is_text(address: str) -> None:
    command = [*COMMAND, "generate", "--raw", "--json", "--max-tokens=8", "--server", address, "w7 <mask> w9"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert len(answer["token_ids"]) == 8
    assert 511 not in answer["token_ids"]
