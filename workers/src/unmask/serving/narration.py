"""A request's story in the words of the wire: what the engine brings about, as stream events.

Where the text comes to one of the request's stops, the story ends, whatever the engine goes on to do.

Joined, the ``text_delta`` of all events are the text of all tokens; neither holds anything of
``committed_token_ids``, which the caller has already.
"""

import math
from collections.abc import Callable, Sequence

from unmask.diffusion.batch import Committed, Filled, Finished, FinishReason, ForwardCounts
from unmask.serving.decoders import diffusion_params
from unmask.serving.model import ServedModel
from unmask.serving.outbox import Admitted, Item, TracedBlock
from unmask.serving.requests import Order
from unmask.serving.stopping import Piece, StoppableText
from unmask.serving.tracing import Story
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

    def __init__(
        self, order: Order, model: ServedModel, *, revision: Callable[[], str | None] = lambda: None
    ) -> None:
        self._order = order
        self._model = model
        self._revision = revision
        self._text = StoppableText(model.tokenizer, strings=order.stop, token_ids=order.stop_token_ids)
        self._offset = len(order.committed)
        # The caller has what these tokens say, but for what the former server held back.
        self._stop = self._text.push(order.committed).stop
        self._usage = ForwardCounts()
        self._story = Story(self._text_of) if order.trace else None

    @property
    def stopped(self) -> bool:
        """Whether the text has come to a stop: what follows is not to be told."""
        return self._stop is not None

    @property
    def usage(self) -> ForwardCounts:
        """What the request had taken at its last block."""
        return self._usage

    @property
    def kept(self) -> int:
        """Tokens this call has told, a stop token not counted."""
        told = self._offset - len(self._order.committed)
        return max(0, told - isinstance(self._stop, int))

    def stop(self) -> pb.GenerateStreamResponse:
        """The event that ends a story at a stop."""
        finished = pb.Finished(
            reason=pb.FINISH_REASON_STOP,
            text_delta="",
            usage=_usage(self._order.prompt, self._usage, self.kept),
            trace=self._trace(self._usage),
        )
        if isinstance(self._stop, int):
            finished.stop_token_id = self._stop
        else:
            finished.stop = self._stop or ""
        return pb.GenerateStreamResponse(finished=finished)

    def tell(self, item: Item) -> pb.GenerateStreamResponse | None:
        """The event that ``item`` is; None for one that is told at the end."""
        match item:
            case Admitted():
                started = self._started(item)
                if self._story is not None:
                    self._story.begin(started)
                return pb.GenerateStreamResponse(started=started)
            case TracedBlock():
                if self._story is not None:
                    for forward in item.forwards:
                        self._story.add(forward)
                return None
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
            sampling=self._sampling(),
            diffusion=diffusion_params(self._order.decoder, params),
            revision=self._revision(),
        )

    def _sampling(self) -> pb.SamplingParams:
        order, sampling = self._order, self._order.params.sampling
        said = pb.SamplingParams(
            max_tokens=order.params.max_new_tokens,
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            stop=order.stop,
            stop_token_ids=order.stop_token_ids,
            logprobs=order.logprobs,
        )
        if sampling.temperature:
            said.seed, said.top_p = sampling.seed, sampling.top_p
            if sampling.top_k is not None:
                said.top_k = sampling.top_k
        return said

    def _canvas_update(self, item: Filled) -> pb.CanvasUpdate:
        return pb.CanvasUpdate(
            block_index=item.block_index,
            step=item.step + 1,
            positions=item.positions,
            token_ids=item.token_ids,
            confidences=item.confidences,
            texts=[self._text_of(token) for token in item.token_ids],
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
        piece = self._piece(item)
        offset, self._offset = self._offset, self._offset + piece.tokens
        token_ids = item.token_ids[: piece.tokens]
        told = pb.BlockCommitted(
            block_index=item.block_index,
            offset=offset,
            token_ids=token_ids,
            text_delta=piece.text,
            forwards=item.forwards,
            usage=_usage(self._order.prompt, self._usage, self._kept_of_text(token_ids)),
        )
        if self._order.logprobs:
            told.logprobs.extend(_logarithm(confidence) for confidence in item.confidences[: piece.tokens])
            told.token_texts.extend(map(self._text_of, token_ids))
        return told

    def _kept_of_text(self, last: Sequence[int]) -> int:
        """Tokens told so far, an end of text, which comes last, not counted."""
        return self.kept - (self._order.params.eos_token_id in last[-1:])

    def _piece(self, item: Committed) -> Piece:
        piece = self._text.push(item.token_ids)
        self._stop, self._usage = piece.stop, item.usage
        return piece

    def _finished(self, item: Finished) -> pb.Finished:
        return pb.Finished(
            reason=finish_reason(item.reason),
            text_delta=self._text.finish(),
            usage=_usage(self._order.prompt, item.usage, item.kept_tokens),
            trace=self._trace(item.usage),
        )

    def _trace(self, usage: ForwardCounts) -> pb.Trace | None:
        return self._story.end(usage) if self._story is not None else None

    def _text_of(self, token: int) -> str:
        return self._model.tokenizer.decode([token])


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


def _logarithm(probability: float) -> float:
    """Of a probability that may have been rounded to 0."""
    return math.log(max(probability, 1e-30))
