"""The decoders that requests may name, and the parameters that each of them has.

What a model attends to decides which of them it can be decoded with. A parameter is a field of the wire's
``DiffusionParams``; one that the chosen decoder does not have is refused, never passed over.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unmask.attention import Attends
from unmask.diffusion.decoding import DecodingParams
from unmask.v1 import generation_pb2 as pb

__all__ = ["DECODERS", "QUOTA_ONLY", "Decoder", "DecoderName", "diffusion_params", "listed"]

DecoderName: TypeAlias = Literal[
    "threshold",
    "fixed-steps",
    "joint-edit",
    "hierarchical",
    "credit",
    "entropy-bounded",
    "low-confidence",
]

QUOTA_ONLY = 2.0
"""A threshold that no probability surpasses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """One rule for filling masked positions."""

    name: DecoderName
    """As ``generation_config.json``, clients and the command line call it."""
    wire: pb.Decoder
    attends: Attends
    """What a model must attend to."""
    parameters: tuple[str, ...]
    """Fields of ``DiffusionParams``."""

    def __str__(self) -> str:
        return pb.Decoder.Name(self.wire)


DECODERS = (
    Decoder(
        name="threshold",
        wire=pb.DECODER_THRESHOLD,
        attends="blocks",
        parameters=("threshold", "steps_per_block"),
    ),
    Decoder(
        name="fixed-steps",
        wire=pb.DECODER_FIXED_STEPS,
        attends="blocks",
        parameters=("steps_per_block",),
    ),
    Decoder(
        name="joint-edit",
        wire=pb.DECODER_JOINT_EDIT,
        attends="blocks",
        parameters=("threshold", "edit_threshold", "max_post_edit_steps"),
    ),
    Decoder(
        name="hierarchical",
        wire=pb.DECODER_HIERARCHICAL,
        attends="blocks",
        parameters=("threshold", "low_threshold"),
    ),
    Decoder(
        name="credit",
        wire=pb.DECODER_CREDIT,
        attends="blocks",
        parameters=(
            "threshold",
            "steps_per_block",
            "credit_weight",
            "credit_decay",
            "credit_exponent",
        ),
    ),
    Decoder(
        name="entropy-bounded",
        wire=pb.DECODER_ENTROPY_BOUNDED,
        attends="blocks",
        parameters=("entropy_bound",),
    ),
    Decoder(
        name="low-confidence",
        wire=pb.DECODER_LOW_CONFIDENCE,
        attends="canvas",
        parameters=("block_length", "steps_per_block", "threshold", "vicinity"),
    ),
)
"""The first that a model can be decoded with is its default."""


def listed(names: Iterable[object]) -> str:
    """A list for an error's text."""
    return ", ".join(map(str, names))


def diffusion_params(decoder: Decoder, params: DecodingParams) -> pb.DiffusionParams:
    """What is in force, as the wire says it: all parameters that the decoder has."""
    message = pb.DiffusionParams(decoder=decoder.wire)
    values = {
        "threshold": params.threshold,
        "steps_per_block": params.steps or params.block_length,
        "edit_threshold": params.edit_threshold,
        "max_post_edit_steps": params.max_post_edit_steps,
        "block_length": params.block_length,
        "low_threshold": params.low_threshold,
        "entropy_bound": params.entropy_bound,
    }
    if params.credit is not None:
        values |= {
            "credit_weight": params.credit.weight,
            "credit_decay": params.credit.decay,
            "credit_exponent": params.credit.exponent,
        }
    for name in decoder.parameters:
        if name in values:
            setattr(message, name, values[name])
    if params.vicinity is not None:
        message.vicinity.before, message.vicinity.after = params.vicinity.before, params.vicinity.after
    return message
