"""A request's story in the words of the wire: what the engine brings about, as stream events.

Joined, the ``text_delta`` of all events are the text of all tokens; neither holds anything of
``committed_token_ids``, which the caller has already.
"""

from collections.abc import Sequence

from unmask.diffusion.batch import Committed, Filled, Finished, FinishReason, ForwardCounts
from unmask.serving.decoders import diffusion_params
from unmask.serving.model import ServedModel
from unmask.serving.outbox import Admitted, Item
from unmask.serving.requests import Order
from unmask.serving.text import TextStream
from unmask.v1 import generation_pb2 as pb

__all__ = ["Narration", "finish_reason"]

_REASONS: dict[FinishReason, pb.FinishReason] = {
    "eos": pb.FINISH_REASON_END_OF_TEXT,
    "length": pb.FINISH_REASON_LENGTH,
}


def finish_reason(reason: FinishReason) -> pb.FinishReason:
    """The wire's name of a reason."""
    return _REASONS[reason]


class Narration:
    """Turns the items of one request's outbox, in order, into its stream's events."""

    def __init__(self, order: Order, model: ServedModel) -> None:
        self._order = order
        self._model = model
        self._text = TextStream(model.tokenizer)
        self._text.push(order.committed)
        self._offset = len(order.committed)

    def tell(self, item: Item) -> pb.GenerateStreamResponse:
        """The event that ``item`` is."""
        match item:
            case Admitted():
                return pb.GenerateStreamResponse(started=self._started(item))
            case Filled():
                return pb.GenerateStreamResponse(canvas_update=self._canvas_update(item))
            case Committed():
                return pb.GenerateStreamResponse(block_committed=self._block_committed(item))
            case Finished():
                return pb.GenerateStreamResponse(finished=self._finished(item))
            case _:
                raise item.error

    def _started(self, item: Admitted) -> pb.Started:
        params = self._order.params
        return pb.Started(
            request_id=self._order.request_id,
            model=self._model.name,
            prompt_tokens=len(self._order.prompt),
            queue_seconds=item.queue_seconds,
            block_length=params.block_length,
            sampling=pb.SamplingParams(max_tokens=params.max_new_tokens, temperature=0.0),
            diffusion=diffusion_params(self._order.decoder, params),
        )

    def _canvas_update(self, item: Filled) -> pb.CanvasUpdate:
        return pb.CanvasUpdate(
            block_index=item.block_index,
            step=item.step + 1,
            positions=item.positions,
            token_ids=item.token_ids,
            confidences=item.confidences,
            texts=[self._model.tokenizer.decode([token]) for token in item.token_ids],
            masks_left=item.masks_left,
            edited=item.edited,
            block_end=self._block_end(item.block_index),
        )

    def _block_end(self, block_index: int) -> int:
        """Position after a block's last that belongs to the answer, from the first generated token."""
        params = self._order.params
        before = len(self._order.prompt) if self._order.decoder.attends == "blocks" else 0
        return min((block_index + 1) * params.block_length - before, params.max_new_tokens)

    def _block_committed(self, item: Committed) -> pb.BlockCommitted:
        offset, self._offset = self._offset, self._offset + len(item.token_ids)
        return pb.BlockCommitted(
            block_index=item.block_index,
            offset=offset,
            token_ids=item.token_ids,
            text_delta=self._text.push(item.token_ids),
            forwards=item.forwards,
        )

    def _finished(self, item: Finished) -> pb.Finished:
        return pb.Finished(
            reason=finish_reason(item.reason),
            text_delta=self._text.finish(),
            usage=_usage(self._order.prompt, item.usage, item.kept_tokens),
        )


def _usage(prompt: Sequence[int], counts: ForwardCounts, kept: int) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=len(prompt),
        completion_tokens=kept,
        forwards_prefill=counts.prefill,
        forwards_denoise=counts.denoise,
        forwards_persist=counts.persist,
        positions_evaluated=counts.positions,
        tpf=counts.tpf(kept),
        tpf_decode=counts.tpf_decode(kept),
        tpf_denoise=counts.tpf_denoise(kept),
    )
