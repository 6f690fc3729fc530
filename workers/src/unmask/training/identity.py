"""What a run is: the part of a job that its numbers depend on, to be kept with its checkpoints.

Two jobs with the same identity compute the same curve. Where files lie, how many
processes share the work, how often it is measured and saved are not part of it; what the
data files hold is, by digest.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from unmask.errors import UsageError
from unmask.models.config import ModelConfig
from unmask.training.corpus import Library, Source
from unmask.training.plan import StagePlan
from unmask.training.token_cache import TokenFile
from unmask_api.base import ApiModel
from unmask_api.train_job import Stage, TrainSpec

__all__ = ["first_difference", "identity", "refuse_other_job"]

_LATER_FIELDS = (
    "document_mask",
    "merge",
    "embedding_noise",
    "prediction",
    "random_length",
    "rope_theta",
    "context_length",
    "router_bias",
)
"""Fields of stages whose defaults mean what was done before there were such fields."""


def identity(
    spec: TrainSpec,
    config: ModelConfig,
    stages: Sequence[StagePlan],
    library: Library,
    *,
    base: str | None = None,
) -> dict[str, Any]:
    """The identity of a job, as JSON.

    Args:
        spec: The job's spec.
        config: Of the model that the run starts from.
        stages: The same job's stages.
        library: Where its data can be looked up.
        base: Digest of the model beside which adapters learn, which their checkpoints do not hold.
    """
    lora = {} if spec.lora is None else {"lora": spec.lora.to_json_dict(), "base": base}
    return lora | {
        "model": config.to_json_dict(),
        "data": {"seed": spec.data.seed, "overlong": spec.data.overlong},
        "stages": [
            _of_stage(stage)
            | {"train": [_of_source(one, library.tokens(one, turns=plan.turns)) for one in plan.train]}
            for stage, plan in zip(spec.stages, stages, strict=True)
        ],
        "optimizer": spec.optimizer.to_json_dict(),
        "balance": _used(
            spec.balance, spec.balance.to_json_dict(), ("load_balance_weight", "router_z_weight")
        ),
        "precision": spec.precision,
    }


def _of_source(source: Source, tokens: TokenFile) -> dict[str, Any]:
    """What is learnt of a source and how often; ``about`` is for people, and may differ."""
    share = {} if source.share is None else {"share": str(source.share)}
    about = {
        "documents": len(tokens.lengths),
        "tokens": len(tokens.ids),
        "content": tokens.content,
        "tokenizer": tokens.tokenizer,
    }
    return {"sha256": tokens.digest, "weight": source.weight, **share, "about": about}


def _of_stage(stage: Stage) -> dict[str, Any]:
    unused = {"beta"} if stage.beta is None else set()
    fields = stage.model_dump(mode="json", by_alias=True, exclude={"data", "export", *unused})
    return _used(stage, fields, _LATER_FIELDS)


def _used(model: ApiModel, dumped: dict[str, Any], later: Iterable[str]) -> dict[str, Any]:
    """``dumped`` without those of the ``later`` fields that are as if there were no such field."""
    fields = type(model).model_fields
    unused = {fields[name].alias for name in later if getattr(model, name) == fields[name].default}
    return {name: value for name, value in dumped.items() if name not in unused}


def refuse_other_job(saved: Mapping[str, Any], own: Mapping[str, Any], *, where: object) -> None:
    """Refuse to go on from a checkpoint of another job.

    Raises:
        UsageError: Naming the first field that differs.
    """
    for field, theirs, ours in _differences(saved, own, ""):
        if data := _other_data(saved, own, field):
            has, had, back = data
            raise UsageError(
                f"spec.{field}: the job has {has}, but the checkpoint {where} was made with {had}; "
                f"put the {back} of then back, or give the job another checkpoint.uri"
            )
        raise UsageError(
            f"spec.{field}: the job has {ours}, but the checkpoint {where} was made with {theirs}; "
            "change it back, or give the job another checkpoint.uri"
        )


def first_difference(theirs: object, ours: object) -> tuple[str, str, str] | None:
    """(path, theirs, ours) of the first field in which two JSON values differ."""
    return next(_differences(theirs, ours, ""), None)


def _differences(theirs: object, ours: object, path: str) -> Iterator[tuple[str, str, str]]:
    """(path, theirs, ours) of everything that differs."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key == "about":
                continue
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(theirs.get(key), ours.get(key), below)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for place, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from _differences(*pair, f"{path}[{place}]")
    elif theirs != ours:
        yield path, _shown(theirs), _shown(ours)


def _other_data(saved: Mapping[str, Any], own: Mapping[str, Any], field: str) -> tuple[str, str, str] | None:
    """What the job has, what the checkpoint was made with, and what to put back; None for what is no data."""
    found = re.fullmatch(r"stages\[(\d+)\]\.train\[(\d+)\]\.sha256", field)
    if found is None:
        return None
    stage, source = map(int, found.groups())
    old, new = (one["stages"][stage]["train"][source].get("about") for one in (saved, own))
    if old is None or new is None:
        return None
    changed = [name for name in ("content", "tokenizer") if old[name] != new[name]]
    words = {"content": "files of other content", "tokenizer": "another tokenizer or chat template"}
    cause = " and ".join(words[name] for name in changed) or "another way of encoding them"
    back = " and ".join({"content": "files", "tokenizer": "tokenizer"}[name] for name in changed) or "version"
    had = f"{old['documents']} documents of {old['tokens']} tokens"
    return f"{new['documents']} documents of {new['tokens']} tokens, from {cause}", had, back


def _shown(value: object) -> str:
    """A value in an error message: short."""
    if isinstance(value, list):
        return f"{len(value)} entries"
    text = "none" if value is None else repr(value)
    return text if len(text) <= 24 else f"{text[:12]}...{text[-6:]}"
