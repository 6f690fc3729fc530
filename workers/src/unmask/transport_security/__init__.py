"""TLS for gRPC: who a server is, who a client is, and which of them may talk.

Certificates, keys and CAs are PEM files, as cert-manager and Kubernetes write them into a Secret's folder. A
server reads them again when they change, and goes on with those it has while what it finds cannot be used; a
client reads them when it connects. Peers are known by the names in their certificates.

It serves servers of asyncio and of threads, and needs neither torch nor anything of unmask but its errors.

>>> from pathlib import Path
>>> tls = ServerTls(certificate=Path("tls.crt"), key=Path("tls.key"), client_ca=Path("ca.crt"))
>>> server.add_secure_port("0.0.0.0:50051", server_credentials(tls))  # doctest: +SKIP
>>> tls = ClientTls(ca="ca.crt", certificate="tls.crt", key="tls.key")
>>> grpc.secure_channel("engine:50051", channel_credentials(tls))  # doctest: +SKIP
"""

from unmask.transport_security.certificates import (
    ServerCertificates,
    ServerTls,
    check_server_files,
    server_credentials,
)
from unmask.transport_security.channels import ClientTls, channel_credentials, channel_options
from unmask.transport_security.interceptors import AsyncPeersAllowed, PeersAllowed
from unmask.transport_security.names import AllowedNames, PeerNames, names_of

__all__ = [
    "AllowedNames",
    "AsyncPeersAllowed",
    "ClientTls",
    "PeerNames",
    "PeersAllowed",
    "ServerCertificates",
    "ServerTls",
    "channel_credentials",
    "channel_options",
    "check_server_files",
    "names_of",
    "server_credentials",
]
