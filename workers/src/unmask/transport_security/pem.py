"""What lies in PEM files, and whether it can be used."""

from dataclasses import dataclass, field
from datetime import datetime
from os import PathLike
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from unmask.errors import UsageError

__all__ = ["PemFile", "check_authorities", "check_pair", "read"]

_MOST_BYTES = 4 << 20
"""All public CAs of a system are a few hundred KiB."""


@dataclass(frozen=True, slots=True)
class PemFile:
    """A file, and what was in it when it was read."""

    option: str
    """The option that named it."""
    path: Path
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"{self.option} {self.path}"


def read(option: str, path: str | PathLike[str]) -> PemFile:
    """Read a file.

    Raises:
        UsageError: It cannot be read, or is far larger than any certificates are.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        message = f"{option} {path}: cannot be read: {why}; name a PEM file that this process may read"
        raise UsageError(message) from None
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{option} {path}: holds more than {_MOST_BYTES} bytes; name a PEM file")
    return PemFile(option, path, content)


def check_pair(certificate: PemFile, key: PemFile, now: datetime) -> datetime:
    """Check a certificate with what signed it behind it, and its private key; returns when it expires.

    Args:
        certificate: Its own certificate is the first.
        key: RSA, or EC on the curve P-256 or P-384, without a passphrase; gRPC's TLS library makes no
            connection with others.
        now: With a time zone.

    Raises:
        UsageError: They cannot be used, or not now.
    """
    own = _certificates(certificate)[0]
    try:
        private = load_pem_private_key(key.content, password=None)
    except TypeError:
        message = f"{key}: the key is encrypted; give one without a passphrase"
        raise UsageError(message) from None
    except (ValueError, UnsupportedAlgorithm):
        message = f"{key}: holds no private key that can be read; expected PEM (BEGIN PRIVATE KEY)"
        raise UsageError(message) from None
    if not isinstance(private, RSAPrivateKey | EllipticCurvePrivateKey) or (
        isinstance(private, EllipticCurvePrivateKey) and not isinstance(private.curve, SECP256R1 | SECP384R1)
    ):
        raise UsageError(
            f"{key}: the key is of a kind that gRPC does not take; make one of RSA, or of EC on the curve "
            "P-256 or P-384"
        )
    try:
        fits = own.public_key() == private.public_key()
    except (ValueError, UnsupportedAlgorithm):
        fits = False
    if not fits:
        raise UsageError(
            f"{key}: does not fit the certificate in {certificate.path}; give the key that it was made with, "
            "and the certificate as the first of its file"
        )
    if own.not_valid_after_utc <= now:
        raise UsageError(f"{certificate}: expired at {_told(own.not_valid_after_utc)}; renew it")
    if own.not_valid_before_utc > now:
        raise UsageError(
            f"{certificate}: is valid from {_told(own.not_valid_before_utc)} on, and now it is {_told(now)}; "
            "set the clock, or wait"
        )
    return own.not_valid_after_utc


def check_authorities(file: PemFile) -> None:
    """Check that there are certificates in a file of CAs.

    Raises:
        UsageError: There are none.
    """
    _certificates(file)


def _certificates(file: PemFile) -> list[x509.Certificate]:
    """All of a file, at least one."""
    try:
        return x509.load_pem_x509_certificates(file.content)
    except ValueError:
        message = f"{file}: holds no certificate that can be read; expected PEM (BEGIN CERTIFICATE)"
        raise UsageError(message) from None


def _told(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
