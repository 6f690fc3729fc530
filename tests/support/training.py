"""A tiny training job on disk: a tokenizer, copying exercises as data, and a run folder."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.folders import CHAT_TEMPLATE, word_tokenizer
from support.manifests import TINY_CONFIG, changed, train_job
from unmask_api.train_job import DiffusionTrainJob

Json = dict[str, Any]

EOS, MASK = TINY_CONFIG["eos_token_id"], TINY_CONFIG["mask_token_id"]

STAGES: list[Json] = [
    {"name": "pretrain", "objective": "ar", "steps": 6},
    {
        "name": "blocks",
        "objective": "bdlm",
        "convertTo": "LLaDA2MoeModelLM",
        "blockSizes": [1, 4],
        "steps": 6,
        "export": True,
    },
    {"name": "full", "objective": "mdlm", "steps": 4},
    {"name": "answers", "objective": "sft", "blockSizes": [4], "steps": 6},
]
"""Every objective, a conversion, and 22 steps in all."""


def exercise(number: int) -> Json:
    """Copy two to five words backwards."""
    words = [f"w{word}" for word in np.random.default_rng(number).integers(8, 60, 2 + number % 4)]
    return {"prompt": " ".join(words), "completion": " ".join(reversed(words))}


def preferences(numbers: Iterable[int]) -> list[Json]:
    """Exercises as preferences: the words backwards are better than the words as they stand."""
    found = []
    for number in numbers:
        done = exercise(number)
        if done["completion"] != done["prompt"]:
            found.append({"prompt": done["prompt"], "chosen": done["completion"], "rejected": done["prompt"]})
    return found


CHATS = "chats.jsonl"


def write_chats(folder: Path) -> None:
    """Write the data of a job whose tokenizer has a chat template, and conversations with 1 to 4 answers."""
    write_data(folder, chat=True)
    conversations = []
    for number in range(40):
        turns = [exercise(100 * number + turn) for turn in range(1 + number % 4)]
        roles = [
            {"role": role, "content": turn[key]}
            for turn in turns
            for role, key in (("user", "prompt"), ("assistant", "completion"))
        ]
        conversations.append({"messages": roles})
    write_lines(folder / CHATS, conversations)


def write_data(folder: Path, *, chat: bool = False) -> None:
    """Write ``train.jsonl``, ``held-out.jsonl`` and ``tokenizer/`` into ``folder``."""
    write_lines(folder / "train.jsonl", [exercise(number) for number in range(50)])
    write_lines(folder / "held-out.jsonl", [exercise(number) for number in range(1000, 1010)])
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(TINY_CONFIG["vocab_size"], eos=EOS, mask=MASK)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    names: Json = {"eos_token": "<eos>", "mask_token": "<mask>"}
    if chat:
        names["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def write_lines(path: Path, entries: Sequence[Any]) -> None:
    """Write one JSON value per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def training_job(folder: Path, values: Json | None = None) -> DiffusionTrainJob:
    """A job on data in ``folder``, written there if need be, whose run folder is ``folder/run``.

    ``values`` sets fields of the manifest by path, as in ``{"spec.stages[0].steps": 3}``.
    """
    if not (folder / "tokenizer").exists():
        write_data(folder)
    shared = {"length": 32, "rowsPerStep": 4, "learningRate": {"peak": "1e-2", "warmupSteps": 2}}
    manifest = train_job(
        model={"init": {"config": TINY_CONFIG}, "tokenizer": {"uri": str(folder / "tokenizer")}},
        data={
            "seed": 7,
            "train": [{"uri": str(folder / "train.jsonl"), "format": "completion"}],
            "validation": [{"uri": str(folder / "held-out.jsonl"), "format": "completion"}],
        },
        stages=[stage | shared for stage in STAGES],
        evaluation={"everySteps": 5, "batches": 2, "generation": {"samples": 4, "maxNewTokens": 8}},
        parallelism={"microBatchRows": 2},
        checkpoint={"uri": str(folder / "run"), "everySteps": 3, "keepLast": 2},
    )
    return DiffusionTrainJob.from_json(json.dumps(changed(manifest, values or {})))


def write_job(job: DiffusionTrainJob, path: Path) -> Path:
    """Write the file that ``unmask train --job`` reads."""
    path.write_text(json.dumps(job.to_json_dict()), encoding="utf-8")
    return path


def start_training(job_file: Path, *, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start ``unmask train``, under torchrun if there is more than one process; it ends with this process."""
    from parent_death import bound  # on pytest's path, which not all have who import this module

    launcher = [sys.executable]
    if processes > 1:
        options = [f"--nproc-per-node={processes}", "--max-restarts=0", "--rdzv-backend=c10d"]
        launcher += ["-m", "torch.distributed.run", *options, "--rdzv-endpoint=localhost:0"]
    command = [*launcher, "-m", "unmask.cli.main", "train", "--job", str(job_file)]
    return subprocess.Popen(
        bound(command, signal.SIGTERM),  # torchrun passes that on
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def metrics(run: Path) -> list[Json]:
    """The log without wall times, which alone may differ between two runs."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in {"seconds", "telemetry"}}
        for line in lines
    ]
