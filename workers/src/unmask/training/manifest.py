"""The manifest of a checkpoint: what is in it, where, and the digests that prove it.

docs/checkpoints.md describes the fields for people. The manifest holds its own
digest, over its canonical JSON without the field ``sha256``, so that no field of it can
change unnoticed. It is written last.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

__all__ = [
    "FORMAT",
    "CheckpointFile",
    "CheckpointManifest",
    "Dtype",
    "Part",
    "StepsBefore",
    "StoredTensor",
    "TrainingState",
    "canonical",
]

FORMAT: Literal["unmask.checkpoint/v1"] = "unmask.checkpoint/v1"

Dtype = Literal["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")]
Whole = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Part(_Strict):
    """A box of a tensor, stored as the tensor of that name in one file."""

    file: FileName
    offsets: list[Whole]
    """First index of the box in each dimension of the whole tensor."""
    shape: list[Whole]


class StoredTensor(_Strict):
    """One tensor of the whole job, however many ranks held parts of it."""

    dtype: Dtype
    shape: list[Whole]
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        """Every part lies inside, and together they have as many elements as the whole."""
        for part in self.parts:
            if not len(part.offsets) == len(part.shape) == len(self.shape):
                raise ValueError("a part has another number of dimensions than the tensor")
            ends = [offset + size for offset, size in zip(part.offsets, part.shape, strict=True)]
            if any(end > size for end, size in zip(ends, self.shape, strict=True)):
                raise ValueError("a part reaches beyond the tensor")
        if sum(math.prod(part.shape) for part in self.parts) != math.prod(self.shape):
            raise ValueError("the parts do not make up the tensor")
        return self


class CheckpointFile(_Strict):
    """A file beside the manifest."""

    size: Whole
    sha256: Digest


class StepsBefore(_Strict):
    """What the next step is judged by, see :mod:`unmask.training.stability`."""

    losses: list[float]
    """Of the last steps of the stage that were taken."""
    norms: list[float]
    """Their gradient norms."""
    skipped: Whole
    """Steps skipped in a row."""
    rollbacks: Whole
    """Times that the run has gone back."""


class TrainingState(_Strict):
    """Where the run stood; with the tensors, all that the next step depends on."""

    stage: Whole
    """Number of the stage that the last step belonged to."""
    stage_step: Whole
    """Steps done in that stage."""
    cursor: Whole
    """Documents that the stage has consumed."""
    stage_seconds: Annotated[float, Field(ge=0)]
    """Time spent in the stage; only reported, nothing depends on it."""
    steps_before: StepsBefore | None = None
    """There if the job has ``stability``."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class CheckpointManifest(_Strict):
    """``manifest.json``."""

    format: Literal["unmask.checkpoint/v1"]
    step: Whole
    """Steps done in the run."""
    state: TrainingState
    job: dict[str, Any]
    """What the run is, see :mod:`unmask.training.identity`."""
    config: dict[str, Any]
    """The model's ``config.json`` at this step: its architecture changes when it is converted."""
    tensors: dict[str, StoredTensor]
    files: dict[FileName, CheckpointFile]

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        named = {part.file for tensor in self.tensors.values() for part in tensor.parts}
        if named != set(self.files):
            raise ValueError("tensors and files do not name the same files")
        return self

    def to_bytes(self) -> bytes:
        """The file's content, its own digest included."""
        content = self.model_dump(mode="json")
        return json.dumps(content | {"sha256": _digest(content)}, sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read and check a manifest.

        Raises:
            ValueError: Saying what is wrong with it.
        """
        content = json.loads(data, object_pairs_hook=_without_duplicates)
        if not isinstance(content, dict) or "sha256" not in content:
            raise ValueError("no digest of its own")
        if content.pop("sha256") != _digest(content):
            raise ValueError("its content does not have the digest that it names")
        if content.get("format") != FORMAT:
            raise ValueError(f"format is {content.get('format')!r}, this version reads {FORMAT!r}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def canonical(content: object) -> bytes:
    """JSON in one form: sorted keys, no spaces, ASCII, shortest floats, no NaN."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _digest(content: object) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content
