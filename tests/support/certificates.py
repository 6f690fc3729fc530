"""CAs and certificates that are made when a test wants them, and folders that change as a Secret's does."""

import ipaddress
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from unmask.transport_security import ClientTls, ServerTls

__all__ = ["Authority", "Pair", "client_tls", "ec_key", "publish", "server_tls"]

Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A CA with a key of its own."""

    def __init__(self, name: str = "ca") -> None:
        self._key = ec_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            self._builder(self._name, self._key, timedelta(0), timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_SIGNS, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        )
        self.pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        *names: str,
        common_name: str = "nobody",
        begins: timedelta = timedelta(0),
        lasts: timedelta = timedelta(days=1),
        key: Key | None = None,
        passphrase: bytes | None = None,
    ) -> Pair:
        """A certificate for DNS names, URIs and IP addresses.

        It is valid from an hour before ``begins`` from now, until ``lasts`` later.
        """
        key = key or ec_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = self._builder(subject, key, begins, lasts)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general(name) for name in names]), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        encryption = (
            serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        )
        return Pair(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
        )

    def _builder(
        self, subject: x509.Name, key: Key, begins: timedelta, lasts: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC).replace(microsecond=0) + begins
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + lasts)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )


def ec_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """A key on a curve, P-256 by default."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """Have ``folder`` hold ``files``, all from one moment to the next, as the kubelet does with a Secret."""
    folder.mkdir(parents=True, exist_ok=True)
    current, new = folder / "..data", folder / "..data_tmp"
    before = current.readlink() if current.is_symlink() else None
    number = 0 if before is None else int(before.name.removeprefix("..")) + 1
    (folder / f"..{number}").mkdir()
    for name, content in files.items():
        (folder / f"..{number}" / name).write_bytes(content)
    new.symlink_to(f"..{number}")
    new.replace(current)
    for name in files:
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(f"..data/{name}")
    if before is not None:
        shutil.rmtree(folder / before)


def server_tls(
    folder: Path,
    pair: Pair,
    client_ca: bytes | None = None,
    *,
    allow: Sequence[str] = (),
    options: str = "--tls",
) -> ServerTls:
    """Write a server's files into ``folder``, or write them anew."""
    files = {"tls.crt": pair.certificate, "tls.key": pair.key}
    if client_ca is not None:
        files["ca.crt"] = client_ca
    publish(folder, files)
    return ServerTls(
        certificate=folder / "tls.crt",
        key=folder / "tls.key",
        client_ca=None if client_ca is None else folder / "ca.crt",
        allow=tuple(allow),
        options=options,
    )


def client_tls(
    folder: Path, ca: bytes, pair: Pair | None = None, *, server_name: str | None = None
) -> ClientTls:
    """Write a client's files into ``folder``, or write them anew."""
    files = {"ca.crt": ca}
    if pair is not None:
        files |= {"tls.crt": pair.certificate, "tls.key": pair.key}
    publish(folder, files)
    return ClientTls(
        ca=folder / "ca.crt",
        certificate=None if pair is None else folder / "tls.crt",
        key=None if pair is None else folder / "tls.key",
        server_name=server_name,
    )


def _general(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
