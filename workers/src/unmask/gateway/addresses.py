"""Where replicas are: ``HOST:PORT``, or ``dns:HOST:PORT`` for all that a name has, which may change."""

import asyncio
import re
import socket
from dataclasses import dataclass

from unmask.errors import UsageError
from unmask.ports import address_of

__all__ = ["Target", "look_up"]

_FORM = re.compile(r"(?P<dns>dns:)?(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class Target:
    """What was said of where replicas are."""

    host: str
    port: int
    many: bool
    """Whether each address that ``host`` has is a replica; otherwise it is one."""

    @classmethod
    def reading(cls, text: str) -> "Target":
        """Read ``HOST:PORT`` or ``dns:HOST:PORT``.

        Raises:
            UsageError: It is neither.
        """
        found = _FORM.fullmatch(text)
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise UsageError(f"replica: got {text!r}, expected HOST:PORT or dns:HOST:PORT")
        return cls(found["six"] or found["host"], int(found["port"]), bool(found["dns"]))

    def __str__(self) -> str:
        return ("dns:" if self.many else "") + address_of(self.host, self.port)


async def look_up(target: Target) -> frozenset[str]:
    """The addresses that a name has now, each with the port.

    Raises:
        OSError: The name cannot be resolved.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    return frozenset(address_of(str(address[0]), target.port) for *_, address in found)
