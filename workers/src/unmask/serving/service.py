"""``unmask.v1.Models``: what is served, and how busy the server is."""

from collections.abc import Callable
from typing import Any

from grpc.aio import ServicerContext

from unmask.serving.decoders import diffusion_params
from unmask.serving.engine import Engine
from unmask.serving.model import DEFAULT_MAX_TOKENS, ServedModel
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import ModelsServicer

__all__ = ["ModelsService"]

Context = ServicerContext[Any, Any]


class ModelsService(ModelsServicer):
    """The service.

    Args:
        model: What is described.
        engine: How busy it is.
        revision: Of its weights.
    """

    def __init__(self, model: ServedModel, engine: Engine, revision: Callable[[], str | None]) -> None:
        self._engine, self._revision = engine, revision
        defaults, decoder = model.defaults, model.default_decoder
        params = model.params(decoder, pb.DiffusionParams(), max_new_tokens=model.context_length)
        self._info = pb.GetModelInfoResponse(
            name=model.name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            block_length=defaults.block_length,
            has_chat_template=model.tokenizer.has_chat_template,
            eos_token_id=defaults.eos_token_id,
            mask_token_id=defaults.mask_token_id,
            max_running_requests=model.rows,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            decoders=[decoder.wire for decoder in model.decoders],
            default_diffusion=diffusion_params(decoder, params),
        )

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        info = pb.GetModelInfoResponse()
        info.CopyFrom(self._info)
        if (revision := self._revision()) is not None:
            info.revision = revision
        return info

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:  # noqa: N802
        """How busy it is."""
        running, waiting = self._engine.load
        return pb.GetLoadResponse(running=running, waiting=waiting)
