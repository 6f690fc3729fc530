"""A typed client of ``unmask.v1``, blocking and for asyncio, without torch.

>>> from unmask.client import Client
>>> with Client("127.0.0.1:50051") as client:  # doctest: +SKIP
...     print(client.generate("Say hello.", max_tokens=32).text)

Errors are :class:`~unmask.client.errors.RequestError` and its kinds; a stream's events are those of
:mod:`unmask.client.events`.
"""

from unmask.client.asynchronous import AsyncClient
from unmask.client.canvas import Canvas, Cell
from unmask.client.control import Control, Load
from unmask.client.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    NotAllowed,
    Overloaded,
    RequestError,
    ServerFailed,
    Unavailable,
    UnsupportedRequest,
)
from unmask.client.events import (
    BlockCommitted,
    CanvasUpdate,
    Decoding,
    Event,
    Fill,
    Finished,
    Generation,
    ModelInfo,
    Started,
    Trace,
    TracedForward,
    Usage,
)
from unmask.client.options import DecoderName, GenerateOptions, Message
from unmask.client.synchronous import Client
from unmask.transport_security import ClientTls

__all__ = [
    "Aborted",
    "AsyncClient",
    "BlockCommitted",
    "Cancelled",
    "Canvas",
    "CanvasUpdate",
    "Cell",
    "Client",
    "ClientTls",
    "Control",
    "DeadlineExceeded",
    "DecoderName",
    "Decoding",
    "Event",
    "FieldViolation",
    "Fill",
    "Finished",
    "GenerateOptions",
    "Generation",
    "InvalidRequest",
    "Load",
    "Message",
    "ModelInfo",
    "NotAllowed",
    "Overloaded",
    "RequestError",
    "ServerFailed",
    "Started",
    "Trace",
    "TracedForward",
    "Unavailable",
    "UnsupportedRequest",
    "Usage",
]
