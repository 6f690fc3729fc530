"""The options that make connections secure, for servers and for clients."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from unmask.cli.local_path import LocalPath
from unmask.errors import UsageError

__all__ = ["client_tls", "server_tls"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def server_tls(act: _Command) -> Callable[..., Any]:
    """Give a command a server's options; it gets ``tls`` and ``control_tls``, each a ServerTls or None."""

    @click.option(
        "--tls-cert",
        type=LocalPath(),
        metavar="FILE",
        help="TLS on the gRPC and the control port, with this certificate and those behind it that signed it "
        "(PEM). It, the key and the CAs are read again when they change.",
    )
    @click.option("--tls-key", type=LocalPath(), metavar="FILE", help="Its private key.")
    @click.option(
        "--tls-client-ca",
        type=LocalPath(),
        metavar="FILE",
        help="Ask clients for a certificate that one of these CAs has signed.  [default: ask nobody]",
    )
    @click.option(
        "--tls-allow",
        multiple=True,
        metavar="NAME",
        help="Of those, let in clients whose certificate has this DNS name (*. stands for one label) or URI; "
        "may be given several times.  [default: all]",
    )
    @click.option(
        "--control-tls-client-ca",
        type=LocalPath(),
        metavar="FILE",
        help="The same as --tls-client-ca for the control port.  [default: ask nobody]",
    )
    @click.option(
        "--control-tls-allow",
        multiple=True,
        metavar="NAME",
        help="The same as --tls-allow for the control port.  [default: all]",
    )
    @wraps(act)
    def with_tls(
        tls_cert: Path | None,
        tls_key: Path | None,
        tls_client_ca: Path | None,
        tls_allow: tuple[str, ...],
        control_tls_client_ca: Path | None,
        control_tls_allow: tuple[str, ...],
        **given: Any,
    ) -> Any:
        # Else a line on stderr for every connection that comes to nothing, of which anyone can make many.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from unmask.transport_security import ServerTls, check_server_files

        asked = {
            "--tls-client-ca": tls_client_ca,
            "--tls-allow": tls_allow,
            "--control-tls-client-ca": control_tls_client_ca,
            "--control-tls-allow": control_tls_allow,
        }
        if (tls_cert is None) != (tls_key is None):
            raise UsageError("--tls-cert and --tls-key: give both or none")
        if tls_cert is None or tls_key is None:
            for option, value in asked.items():
                if value:
                    raise UsageError(
                        f"{option}: without TLS nobody can be asked; give --tls-cert and --tls-key"
                    )
            return act(tls=None, control_tls=None, **given)
        if given["control_port"] is None:
            for option in ("--control-tls-client-ca", "--control-tls-allow"):
                if asked[option]:
                    raise UsageError(f"{option}: there is no control port; give --control-port")
        tls = ServerTls(certificate=tls_cert, key=tls_key, client_ca=tls_client_ca, allow=tls_allow)
        control_tls = ServerTls(
            certificate=tls_cert,
            key=tls_key,
            client_ca=control_tls_client_ca,
            allow=control_tls_allow,
            options="--control-tls",
        )
        for each in (tls, control_tls):  # now, since to load a model may take minutes
            check_server_files(each)
        return act(tls=tls, control_tls=control_tls, **given)

    return with_tls


def client_tls(act: _Command) -> Callable[..., Any]:
    """Give a command a client's options; it gets ``tls``, a ClientTls or None."""

    @click.option(
        "--tls-ca",
        type=LocalPath(),
        metavar="FILE",
        help="Connect with TLS, to a server whose certificate one of these CAs has signed (PEM).",
    )
    @click.option(
        "--tls-cert",
        type=LocalPath(),
        metavar="FILE",
        help="Certificate to show to a server that asks for one.",
    )
    @click.option("--tls-key", type=LocalPath(), metavar="FILE", help="Its private key.")
    @click.option(
        "--tls-server-name",
        metavar="NAME",
        help="What the server's certificate has to name.  [default: the host in --server]",
    )
    @wraps(act)
    def with_tls(
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        tls_server_name: str | None,
        **given: Any,
    ) -> Any:
        from unmask.transport_security import ClientTls

        if tls_ca is not None:
            tls = ClientTls(ca=tls_ca, certificate=tls_cert, key=tls_key, server_name=tls_server_name)
            return act(tls=tls, **given)
        others = {"--tls-cert": tls_cert, "--tls-key": tls_key, "--tls-server-name": tls_server_name}
        for option, value in others.items():
            if value is not None:
                raise UsageError(
                    f"{option}: give --tls-ca, too, with the CAs that sign certificates of servers"
                )
        return act(tls=None, **given)

    return with_tls
