"""Builders of manifests of both kinds, and the tables of those that must be refused.

The tables are data, so that local admission and a real API server can be held to the same verdicts.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

__all__ = ["REFUSED", "REFUSED_SERVICES", "Refused", "changed", "inference_service", "train_job"]

Json = dict[str, Any]

TINY_CONFIG: Json = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "mask_token_id": 63,
    "eos_token_id": 62,
    "pad_token_id": 62,
}


def train_job(**spec: Any) -> Json:
    """Return a valid job with stages ar, bdlm, mdlm and sft; ``spec`` replaces fields of its spec."""
    source = {"uri": "pvc://data/train.jsonl", "format": "completion"}
    stage = {"steps": 8, "length": 16, "rowsPerStep": 4, "learningRate": {"peak": "1e-3"}}
    kinds: list[Json] = [
        {"name": "pretrain", "objective": "ar"},
        {"name": "blocks", "objective": "bdlm", "blockSizes": [1, 4]},
        {"name": "full", "objective": "mdlm"},
        {"name": "answers", "objective": "sft", "blockSizes": [4]},
    ]
    job = {
        "apiVersion": "unmask.dev/v1alpha1",
        "kind": "DiffusionTrainJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"init": {"config": TINY_CONFIG}, "tokenizer": {"uri": "pvc://data/tokenizer"}},
            "data": {"train": [source], "validation": [source | {"uri": "pvc://data/held-out.jsonl"}]},
            "stages": [kind | stage for kind in kinds],
            "evaluation": {"everySteps": 4, "generation": {"samples": 2, "maxNewTokens": 8}},
            "checkpoint": {"uri": "pvc://run/tiny"},
        }
        | spec,
    }
    return cast(Json, json.loads(json.dumps(job)))  # no part is shared


def inference_service(**spec: Any) -> Json:
    """Return a valid service of two groups, each an engine and two shards; ``spec`` replaces fields of its
    spec."""
    service = {
        "apiVersion": "unmask.dev/v1alpha1",
        "kind": "DiffusionInferenceService",
        "metadata": {"name": "chat"},
        "spec": {"model": {"uri": "pvc://models/mini"}, "replicas": 2, "group": {"shards": 2}} | spec,
    }
    return cast(Json, json.loads(json.dumps(service)))


def changed(manifest: Json, values: Json, drop: tuple[str, ...] = ()) -> Json:
    """Return a copy with the fields of ``values`` (by path: ``spec.stages[1].name``) set, others dropped."""
    manifest = copy.deepcopy(manifest)
    for path, value in values.items():
        parent, last = _parent(manifest, path)
        parent[last] = value
    for path in drop:
        parent, last = _parent(manifest, path)
        del parent[last]
    return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A manifest that is refused: the field blamed, and words of the remedy."""

    why: str
    manifest: Json
    field: str
    says: str


def _parent(manifest: Json, path: str) -> tuple[Any, str | int]:
    """Return the object or list that holds ``path``, making objects on the way, and the last part of it."""
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", path)]
    target: Any = manifest
    for part in parents:
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[part]
    return target, last


def _refused(entry: Json, manifest: Json) -> Refused:
    values, drop = entry.get("set", {}), tuple(entry.get("drop", "").split())
    return Refused(
        why=entry["why"],
        manifest=changed(manifest, values, drop),
        field=entry.get("field") or [*values, *drop][0],
        says=entry["says"],
    )


def _table(name: str, manifest: Json) -> tuple[Refused, ...]:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return tuple(_refused(entry, manifest) for entry in yaml.safe_load(text))


REFUSED = _table("refused_train_jobs.yaml", train_job())
REFUSED_SERVICES = _table("refused_inference_services.yaml", inference_service())
