"""The blocking client."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from unmask.client.channels import DEFAULT_TIMEOUT_S, Connecting, Deadline, addresses
from unmask.client.continuation import Continuation, OtherWeights
from unmask.client.errors import RequestError, Unavailable, error_of
from unmask.client.events import Event, Generation, ModelInfo, generation_of, model_info_of
from unmask.client.options import GenerateOptions, request_of
from unmask.transport_security import ClientTls
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationStub, ModelsStub

__all__ = ["Client"]

_Answer = TypeVar("_Answer")


class Client:
    """Talks to one server, or to the first of several that answers.

    Where several addresses are given they must serve the same model: a stream whose server goes away is
    continued on the next one, from its committed blocks. Thread-safe.

    Args:
        address: ``HOST:PORT``, or several of them.
        timeout_s: Time for a call, unless the call says otherwise.
        tls: Files to connect with, which are read now; plaintext if None.

    Raises:
        UsageError: There is no address, or the files cannot be used.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ClientTls | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        connecting = Connecting.reading(tls)
        self._channels = {address: connecting.channel(address) for address in addresses(address)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; running calls are cancelled."""
        for channel in self._channels.values():
            channel.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate, and return the whole.

        Args:
            prompt: Text to continue; or give ``messages`` or ``token_ids``.
            **options: See :class:`~unmask.client.options.GenerateOptions`.

        Raises:
            RequestError: The server gave no result.
            UsageError: The options contradict each other.
        """
        request = request_of(prompt, **options)
        deadline = Deadline(options.get("timeout_s", self._timeout_s))
        answer = self._ask(
            lambda channel: GenerationStub(channel).Generate(request, timeout=deadline.left_s())
        )
        return generation_of(answer)

    def stream(
        self, prompt: str | None = None, *, canvas: bool = False, **options: Unpack[GenerateOptions]
    ) -> Iterator[Event]:
        """Generate, and yield events as they happen; the last one is Finished.

        To stop early, close the iterator. Where the generation was continued on another server, the usage in
        Finished is of both, but for the block that was lost; its trace is of the last one alone.

        Args:
            prompt: Text to continue; or give ``messages`` or ``token_ids``.
            canvas: Yield provisional updates too.
            **options: See :class:`~unmask.client.options.GenerateOptions`.

        Raises:
            RequestError: The server gave no result, or only a part.
            UsageError: The options contradict each other.
        """
        generation = Continuation(request_of(prompt, **options), canvas=canvas)
        return self._stream(generation, Deadline(options.get("timeout_s", self._timeout_s)))

    def model_info(self) -> ModelInfo:
        """What is served.

        Raises:
            RequestError: The server gave no answer.
        """
        request = pb.GetModelInfoRequest()
        return model_info_of(
            self._ask(lambda channel: ModelsStub(channel).GetModelInfo(request, timeout=self._timeout_s))
        )

    def _stream(self, generation: Continuation, deadline: Deadline) -> Iterator[Event]:
        failure: RequestError | None = None
        for address, channel in self._channels.items():
            call = GenerationStub(channel).GenerateStream(generation.request(), timeout=deadline.left_s())
            try:
                for message in call:
                    event = generation.take(message)
                    if event is not None:
                        yield event
                generation.check_finished(address)
                return
            except OtherWeights as other:
                failure = other
            except grpc.RpcError as error:
                if generation.finished:
                    return
                failure = error_of(error, address)
                if not isinstance(failure, Unavailable):
                    break
            finally:
                call.cancel()  # the caller may have left; nothing happens to a call that is over
        assert failure is not None
        raise failure

    def _ask(self, call: Callable[[grpc.Channel], _Answer]) -> _Answer:
        """The first answer that is not "unavailable"."""
        failure: RequestError | None = None
        for address, channel in self._channels.items():
            try:
                return call(channel)
            except grpc.RpcError as error:
                failure = error_of(error, address)
                if not isinstance(failure, Unavailable):
                    break
        assert failure is not None
        raise failure
