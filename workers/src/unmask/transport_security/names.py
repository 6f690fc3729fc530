"""Who a peer is: the names in its certificate, and whether one of them is allowed.

Names are the certificate's subject alternative names: DNS names, and URIs, as SPIFFE ids are. The common name
is not one, as RFC 9525 has it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509

from unmask.errors import UsageError

__all__ = ["AllowedNames", "PeerNames", "names_of"]

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_DNS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[!-)+-~]+")
"""Printable, and no asterisk: there are no wildcards in URIs."""


@dataclass(frozen=True, slots=True)
class PeerNames:
    """Names in a certificate."""

    dns: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For messages: short, whatever a certificate holds."""
        few = [f"{name[:100]!r}" for name in (*self.dns, *self.uris)[:5]]
        return ", ".join(few) or "none"


@lru_cache(maxsize=1024)
def names_of(pem: bytes) -> PeerNames:
    """The names in a certificate; none where they cannot be read.

    They are taken from the certificate itself: what gRPC tells of them ends at a NUL that a name may hold.
    """
    try:
        extensions = x509.load_pem_x509_certificate(pem).extensions
        found = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.DuplicateExtension, x509.ExtensionNotFound, x509.UnsupportedGeneralNameType):
        return PeerNames()
    return PeerNames(
        tuple(found.get_values_for_type(x509.DNSName)),
        tuple(found.get_values_for_type(x509.UniformResourceIdentifier)),
    )


class AllowedNames:
    """Names of peers that may call.

    Args:
        names: DNS names, compared without regard to case, where ``*.`` at the beginning stands for one label;
            and URIs, which must be equal.
        option: What gave them, for errors.

    Raises:
        UsageError: One is neither.
    """

    def __init__(self, names: Sequence[str], *, option: str = "--tls-allow") -> None:
        self.option = option
        self._uris = frozenset(name for name in names if "://" in name)
        dns = {name.lower() for name in names if "://" not in name}
        self._dns = frozenset(name for name in dns if not name.startswith("*."))
        self._parents = frozenset(name.removeprefix("*.") for name in dns if name.startswith("*."))
        for name in names:
            kind, text = (_URI, name) if "://" in name else (_DNS, name.lower().removeprefix("*."))
            if not kind.fullmatch(text):
                raise UsageError(
                    f"{option}: got {name!r}, expected a DNS name, whose first label may be *, or a URI "
                    "such as spiffe://cluster.local/ns/a/sa/b"
                )

    def __bool__(self) -> bool:
        return bool(self._uris or self._dns or self._parents)

    def admit(self, peer: PeerNames) -> bool:
        """Whether one of a peer's names is allowed."""
        return any(uri in self._uris for uri in peer.uris) or any(map(self._admit_dns, peer.dns))

    def _admit_dns(self, name: str) -> bool:
        name = name.lower()
        # A certificate may be for all servers below a name; that is nobody's name.
        return bool(_DNS.fullmatch(name)) and (name in self._dns or name.partition(".")[2] in self._parents)
