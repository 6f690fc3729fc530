"""How a generation survives its server: what has been committed, and the request for what is left.

Decoding is deterministic, given its seed, and committed blocks are final, so another server of the same
weights goes on exactly where the first one stopped, provided that it is asked with the same parameters.
"""

from unmask.client.errors import ServerFailed, Unavailable
from unmask.client.events import Event, event_of
from unmask.client.usage import total
from unmask.v1 import generation_pb2 as pb

__all__ = ["Continuation", "OtherWeights"]


class OtherWeights(Unavailable):
    """A server that was to go on with an answer has other weights than the one that began it."""


class Continuation:
    """One streamed generation over as many attempts as it takes.

    Attributes:
        revision: Of the weights that the answer is of; None before they are known, or if they have none.
        finished: Whether the answer is complete, whatever becomes of the stream.
    """

    def __init__(self, request: pb.GenerateRequest, *, canvas: bool) -> None:
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        mode = pb.CANVAS_MODE_DIFF if canvas else pb.CANVAS_MODE_NONE
        self._options = pb.StreamOptions(canvas=mode)
        self._taken: list[pb.Usage] = []
        """What each attempt has taken, as far as it was told; the last one's grows."""
        self.finished = False
        self.revision: str | None = None

    @property
    def committed(self) -> int:
        """How many tokens are final, those that the caller came with included."""
        return len(self._request.committed_token_ids)

    def request(self) -> pb.GenerateStreamRequest:
        """What to ask the next server for."""
        return pb.GenerateStreamRequest(request=self._request, options=self._options)

    def take(self, message: pb.GenerateStreamResponse) -> Event | None:
        """Note a message; returns its event, if it is one for the caller.

        Raises:
            OtherWeights, ServerFailed: As :meth:`hear`.
        """
        heard = self.hear(message)
        return None if heard is None else event_of(heard)

    def hear(self, message: pb.GenerateStreamResponse) -> pb.GenerateStreamResponse | None:
        """Note a message; returns it, if it is one for the caller, with the usage of all attempts in it.

        Raises:
            OtherWeights: It is the first of a server that cannot go on with this answer.
            ServerFailed: Tokens are missing before it, or came already.
        """
        match message.WhichOneof("event"):
            case "started":
                first = not self._taken
                self._pin(message.started)
                self._taken.append(pb.Usage(prompt_tokens=message.started.prompt_tokens))
                return message if first else None
            case "block_committed":
                block = message.block_committed
                if block.offset != self.committed:
                    text = f"a block begins at token {block.offset}, {self.committed} came before it"
                    raise ServerFailed(text, code="DATA_LOSS")
                self._request.committed_token_ids.extend(block.token_ids)
                self._add_up(block.usage)
            case "finished":
                self.finished = True
                self._add_up(message.finished.usage)
        return message

    def check_finished(self, address: str) -> None:
        """See to it that a stream which ended well was complete.

        Raises:
            ServerFailed: It was not.
        """
        if not self.finished:
            raise ServerFailed(
                f"{address}: the stream ended before the generation was finished", code="UNKNOWN"
            )

    def _add_up(self, usage: pb.Usage) -> None:
        """Note what this attempt has taken, and make it what all have."""
        self._taken[-1:] = [pb.Usage()]
        self._taken[-1].CopyFrom(usage)
        if len(self._taken) > 1:
            usage.CopyFrom(total(self._taken))

    def _pin(self, started: pb.Started) -> None:
        """Ask later servers for what is in force here, whatever their defaults are."""
        revision = started.revision if started.HasField("revision") else None
        if self._taken and revision != self.revision:
            raise OtherWeights(
                f"the answer was begun with the weights {self.revision or 'of no known revision'}, this "
                f"server has {revision or 'others'}",
                code="UNAVAILABLE",
            )
        self.revision = revision
        self._request.sampling.CopyFrom(started.sampling)
        self._request.diffusion.CopyFrom(started.diffusion)
