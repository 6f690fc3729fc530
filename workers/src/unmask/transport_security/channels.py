"""How a client connects: whom it trusts, and what it shows of itself."""

from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike

import grpc

from unmask.errors import UsageError
from unmask.transport_security.pem import check_authorities, check_pair, read

__all__ = ["ClientTls", "channel_credentials", "channel_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """Files of a client."""

    ca: str | PathLike[str]
    """Who must have signed the server's certificate."""
    certificate: str | PathLike[str] | None = None
    """The client's own, for servers that ask for one, with those behind it that signed it."""
    key: str | PathLike[str] | None = None
    """Of ``certificate``."""
    server_name: str | None = None
    """What the server's certificate has to name; the host of the address if None."""
    options: str = "--tls"
    """How the options begin that give these, in errors."""


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Read the files as they are now, for channels that are made now.

    Raises:
        UsageError: They cannot be used.
    """
    try:
        return _read(tls)
    except UsageError:
        return _read(tls)  # the files may have been swapped while they were read


def channel_options(tls: ClientTls) -> tuple[tuple[str, str], ...]:
    """What a channel with these credentials needs besides."""
    return (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()


def _read(tls: ClientTls) -> grpc.ChannelCredentials:
    authorities = read(f"{tls.options}-ca", tls.ca)
    check_authorities(authorities)
    if tls.certificate is None and tls.key is None:
        return grpc.ssl_channel_credentials(authorities.content)
    if tls.certificate is None or tls.key is None:
        raise UsageError(f"{tls.options}-cert and {tls.options}-key: give both or none")
    certificate = read(f"{tls.options}-cert", tls.certificate)
    key = read(f"{tls.options}-key", tls.key)
    check_pair(certificate, key, datetime.now(UTC))
    return grpc.ssl_channel_credentials(authorities.content, key.content, certificate.content)
