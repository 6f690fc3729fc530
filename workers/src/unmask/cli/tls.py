"""The options that make connections secure, for servers and for clients."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unmask.cli.local_path import LocalPath
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask.transport_security import ServerTls

__all__ = ["client_tls", "experts_tls", "replica_tls", "server_and_control_tls", "server_tls"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def server_tls(act: _Command) -> Callable[..., Any]:
    """Give a command a server's options; it gets ``tls``, a ServerTls or None."""

    @_server_options("the gRPC port")
    @wraps(act)
    def with_tls(**given: Any) -> Any:
        return act(tls=_server(given), **given)

    return with_tls


def server_and_control_tls(act: _Command) -> Callable[..., Any]:
    """Give a command that also has a control port the options of both; it gets ``control_tls``, too."""

    @_server_options("the gRPC and the control port")
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
    def with_tls(**given: Any) -> Any:
        if given["control_port"] is None:
            for option in ("--control-tls-client-ca", "--control-tls-allow"):
                if given[_parameter(option)]:
                    raise UsageError(f"{option}: there is no control port; give --control-port")
        control_tls = _server(given, "--control-tls")
        return act(tls=_server(given), control_tls=control_tls, **given)

    return with_tls


def client_tls(act: _Command) -> Callable[..., Any]:
    """Give a command a client's options; it gets ``tls``, a ClientTls or None."""
    return _client(act, "--tls", "server")


def experts_tls(act: _Command) -> Callable[..., Any]:
    """Give a command those of a client of expert shards; it gets ``experts_tls``."""
    return _client(act, "--experts-tls", "shard")


def replica_tls(act: _Command) -> Callable[..., Any]:
    """Give a command those of a client of replicas; it gets ``replica_tls``."""
    return _client(act, "--replica-tls", "replica")


def _server_options(ports: str) -> Callable[[_Command], _Command]:
    def with_options(act: _Command) -> _Command:
        for option in (
            click.option(
                "--tls-allow",
                multiple=True,
                metavar="NAME",
                help="Of those, let in clients whose certificate has this DNS name (*. stands for one label) "
                "or URI; may be given several times.  [default: all]",
            ),
            click.option(
                "--tls-client-ca",
                type=LocalPath(),
                metavar="FILE",
                help="Ask clients for a certificate that one of these CAs has signed.  [default: ask nobody]",
            ),
            click.option("--tls-key", type=LocalPath(), metavar="FILE", help="Its private key."),
            click.option(
                "--tls-cert",
                type=LocalPath(),
                metavar="FILE",
                help=f"TLS on {ports}, with this certificate and those behind it that signed it (PEM). It, "
                "the key and the CAs are read again when they change.",
            ),
        ):
            act = option(act)
        return act

    return with_options


def _server(given: dict[str, Any], options: str = "--tls") -> "ServerTls | None":
    """What options say of a port, checked; they are taken out of ``given``, but for what ports share."""
    take = given.get if options != "--tls" else given.pop
    certificate: Path | None = take("tls_cert", None)
    key: Path | None = take("tls_key", None)
    client_ca: Path | None = given.pop(_parameter(f"{options}-client-ca"))
    allow: tuple[str, ...] = given.pop(_parameter(f"{options}-allow"))
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key: give both or none")
    if certificate is None or key is None:
        for option, value in ((f"{options}-client-ca", client_ca), (f"{options}-allow", allow)):
            if value:
                raise UsageError(f"{option}: without TLS nobody can be asked; give --tls-cert and --tls-key")
        return None
    # Else a line on stderr for every connection that comes to nothing, of which anyone can make many.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from unmask.transport_security import ServerTls, check_server_files

    tls = ServerTls(certificate=certificate, key=key, client_ca=client_ca, allow=allow, options=options)
    check_server_files(tls)  # now, since to load a model may take minutes
    return tls


def _client(act: _Command, options: str, server: str) -> Callable[..., Any]:
    ca, certificate, key, name = (f"{options}-{what}" for what in ("ca", "cert", "key", "server-name"))

    @click.option(
        ca,
        type=LocalPath(),
        metavar="FILE",
        help=f"Connect with TLS, to a {server} whose certificate one of these CAs has signed (PEM).",
    )
    @click.option(
        certificate,
        type=LocalPath(),
        metavar="FILE",
        help=f"Certificate to show to a {server} that asks for one.",
    )
    @click.option(key, type=LocalPath(), metavar="FILE", help="Its private key.")
    @click.option(
        name,
        metavar="NAME",
        help=f"What the {server}'s certificate has to name.  [default: the host of its address]",
    )
    @wraps(act)
    def with_tls(**given: Any) -> Any:
        from unmask.transport_security import ClientTls

        found = {option: given.pop(_parameter(option)) for option in (ca, certificate, key, name)}
        tls = None
        if found[ca] is not None:
            tls = ClientTls(
                ca=found[ca],
                certificate=found[certificate],
                key=found[key],
                server_name=found[name],
                options=options,
            )
        else:
            for option, value in found.items():
                if value is not None:
                    raise UsageError(
                        f"{option}: give {ca}, too, with the CAs that sign certificates of {server}s"
                    )
        return act(**{_parameter(options): tls}, **given)

    return with_tls


def _parameter(option: str) -> str:
    """What click calls an option's value."""
    return option.removeprefix("--").replace("-", "_")
