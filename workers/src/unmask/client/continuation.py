"""How a generation survives its server: what has been committed, and the request for what is left.

Decoding is deterministic, given its seed, and committed blocks are final, so another server of the same model
goes on exactly where the first one stopped, provided that it is asked with the same parameters.
"""

from unmask.client.errors import ServerFailed
from unmask.client.events import BlockCommitted, Event, Finished, Started, event_of
from unmask.v1 import generation_pb2 as pb

__all__ = ["Continuation"]


class Continuation:
    """One streamed generation over as many attempts as it takes."""

    def __init__(self, request: pb.GenerateRequest, *, canvas: bool) -> None:
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        mode = pb.CANVAS_MODE_DIFF if canvas else pb.CANVAS_MODE_NONE
        self._options = pb.StreamOptions(canvas=mode)
        self._started = False
        self._finished = False

    def request(self) -> pb.GenerateStreamRequest:
        """What to ask the next server for."""
        return pb.GenerateStreamRequest(request=self._request, options=self._options)

    def take(self, message: pb.GenerateStreamResponse) -> Event | None:
        """Note a message; returns its event, if it is one for the caller."""
        event = event_of(message)
        match event:
            case Started():
                self._pin(message.started)
                if self._started:  # a later attempt's: the caller has seen one
                    return None
                self._started = True
            case BlockCommitted():
                self._request.committed_token_ids.extend(event.token_ids)
            case Finished():
                self._finished = True
        return event

    def check_finished(self, address: str) -> None:
        """See to it that a stream which ended well was complete.

        Raises:
            ServerFailed: It was not.
        """
        if not self._finished:
            raise ServerFailed(
                f"{address}: the stream ended before the generation was finished", code="UNKNOWN"
            )

    def _pin(self, started: pb.Started) -> None:
        """Ask later servers for what is in force here, whatever their defaults are."""
        self._request.sampling.CopyFrom(started.sampling)
        self._request.diffusion.CopyFrom(started.diffusion)
