"""A server's certificate, key and clients' CA, read again when their files change.

Kubernetes swaps a symlink, cert-manager renews before the old certificate expires, and people copy one file
after the other. So the files are read for each new connection: what can be used is used from then on, what
cannot changes nothing and is told once. Connections that stand go on with what they began with.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc

from unmask.errors import UsageError
from unmask.transport_security.names import AllowedNames
from unmask.transport_security.pem import PemFile, check_authorities, check_pair, read

__all__ = [
    "ServerCertificates",
    "ServerContent",
    "ServerTls",
    "check_server_files",
    "content_for",
    "server_credentials",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """Files of a server's port."""

    certificate: Path
    """The server's own first, then those that signed it."""
    key: Path
    client_ca: Path | None = None
    """Who may have signed the certificates that clients must show; None asks them for none."""
    allow: tuple[str, ...] = ()
    """Names of clients that may call, as :class:`~unmask.transport_security.names.AllowedNames` has them; all
    that ``client_ca`` lets in if empty."""
    options: str = "--tls"
    """How the options of ``client_ca`` and ``allow`` begin, in errors."""

    def allowed_names(self) -> AllowedNames:
        """``allow``, checked.

        Raises:
            UsageError: A name is none, or there are names but no ``client_ca``.
        """
        if self.allow and self.client_ca is None:
            raise UsageError(
                f"{self.options}-allow: clients that show no certificate have no names; give "
                f"{self.options}-client-ca, too"
            )
        return AllowedNames(self.allow, option=f"{self.options}-allow")


@dataclass(frozen=True, slots=True)
class ServerContent:
    """What a server's files held."""

    certificate: PemFile
    key: PemFile
    client_ca: PemFile | None

    def check(self, now: datetime) -> datetime:
        """Check it; returns when the certificate expires.

        Raises:
            UsageError: It cannot be used.
        """
        expiry = check_pair(self.certificate, self.key, now)
        if self.client_ca is not None:
            check_authorities(self.client_ca)
        return expiry

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """The same for gRPC."""
        roots = None if self.client_ca is None else self.client_ca.content
        pairs = [(self.key.content, self.certificate.content)]
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=roots)


def check_server_files(tls: ServerTls) -> None:
    """Check a server's files as they are now, and the names that it allows.

    Raises:
        UsageError: They cannot be used.
    """
    tls.allowed_names()
    _usable(tls)


def content_for(in_force: ServerContent, found: ServerContent, now: datetime) -> ServerContent | None:
    """Decide what new connections get: ``found``, or None where that is what they get already.

    Raises:
        UsageError: ``found`` cannot be used; they go on getting what they got.
    """
    if found == in_force:
        return None
    found.check(now)
    return found


class ServerCertificates:
    """What the connections of one port are made with. Thread-safe.

    Args:
        tls: The files.
        in_force: Called with the time at which the certificate in force expires, in seconds since 1970, each
            time that another comes into force.
        failed: Called with a message each time that something else was found that cannot be used.

    Raises:
        UsageError: The files cannot be used.
    """

    def __init__(
        self,
        tls: ServerTls,
        *,
        in_force: Callable[[float], object] = lambda expires_s: None,
        failed: Callable[[str], object] = lambda message: None,
    ) -> None:
        tls.allowed_names()
        self._tls = tls
        self._tell_in_force, self._tell_failed = in_force, failed
        self._lock = threading.Lock()
        self._complaint: tuple[str, ServerContent | None] | None = None
        self._content, expiry = _usable(tls)
        self._tell_in_force(expiry.timestamp())

    def look(self) -> None:
        """Read the files; new connections get what is new and can be used."""
        with self._lock:
            self._look()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For one port, since gRPC asks for what is new on each connection, and others would not be told."""
        with self._lock:
            handed = self._content

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal handed
            with self._lock:
                self._look()
                if self._content is handed:
                    return None
                handed = self._content
                return handed.configuration()

        return grpc.dynamic_ssl_server_credentials(
            handed.configuration(),
            newer,  # type: ignore[arg-type]  # None stands for "no other"
            require_client_authentication=self._tls.client_ca is not None,
        )

    def _look(self) -> None:
        complaint = self._try()
        if complaint is not None:
            complaint = self._try()  # the files may have been swapped while they were read
        if complaint is not None and complaint != self._complaint:
            logger.warning("what was read before stays in force: %s", complaint[0])
            self._tell_failed(complaint[0])
        self._complaint = complaint

    def _try(self) -> tuple[str, ServerContent | None] | None:
        """Read once; returns what is wrong, and with what."""
        found = None
        try:
            found = _read(self._tls)
            now = datetime.now(UTC)
            content = content_for(self._content, found, now)
        except UsageError as error:
            return str(error), found
        if content is not None:
            self._content = content
            logger.info("new connections get the certificate that is now in %s", self._tls.certificate)
            self._tell_in_force(content.check(now).timestamp())
        return None


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials of one port, which follow their files; :class:`ServerCertificates` also tells of it.

    Raises:
        UsageError: The files cannot be used.
    """
    return ServerCertificates(tls).server_credentials()


def _usable(tls: ServerTls) -> tuple[ServerContent, datetime]:
    """What the files hold, and when the certificate expires.

    Raises:
        UsageError: They cannot be used.
    """

    def once() -> tuple[ServerContent, datetime]:
        found = _read(tls)
        return found, found.check(datetime.now(UTC))

    try:
        return once()
    except UsageError:
        return once()  # the files may have been swapped while they were read


def _read(tls: ServerTls) -> ServerContent:
    client_ca = None if tls.client_ca is None else read(f"{tls.options}-client-ca", tls.client_ca)
    return ServerContent(read("--tls-cert", tls.certificate), read("--tls-key", tls.key), client_ca)
