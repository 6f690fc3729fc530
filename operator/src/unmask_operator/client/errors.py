"""What can go wrong between a person and a cluster, each with what to do about it.

::

    ClusterError              1  the cluster cannot be asked, or did not do what it was asked
    +-- NoCluster                no kubeconfig, or nobody answers at its address
    +-- NotAllowed               the cluster does not know the caller, or does not allow this
    +-- NotFound                 no such job, service or namespace
    |   +-- NotDefined           the cluster does not know the kind
    +-- NameTaken                the name belongs to a job with another spec
    +-- Conflicting              others have set fields of a service otherwise
    +-- Refused                  the cluster finds the manifest invalid
    +-- WaitedTooLong            a job or service did not get there in time
"""

import re

from unmask.errors import UnmaskError
from unmask_operator.transport import ApiError, Unreachable

__all__ = [
    "ClusterError",
    "Conflicting",
    "NameTaken",
    "NoCluster",
    "NotAllowed",
    "NotDefined",
    "NotFound",
    "Refused",
    "WaitedTooLong",
    "conflicting",
    "explained",
]


class ClusterError(UnmaskError):
    """The cluster cannot be asked, or did not do what it was asked."""


class NoCluster(ClusterError):
    """There is no kubeconfig, or nobody answers at its address."""


class NotAllowed(ClusterError):
    """The cluster does not know the caller, or does not allow this."""


class NotFound(ClusterError):
    """There is no such job, service or namespace."""


class NotDefined(NotFound):
    """The cluster does not know the kind."""


class NameTaken(ClusterError):
    """The name belongs to a job with another spec."""


class Conflicting(ClusterError):
    """Others have set fields of a service to something else."""


class Refused(ClusterError):
    """The cluster finds the manifest invalid."""


class WaitedTooLong(ClusterError):
    """A job or service did not get there in time."""


_NO_NAMESPACE = re.compile(r'namespaces "([^"]*)" not found')


def explained(
    error: ApiError | Unreachable, *, what: str, namespace: str, server: str, kind: str
) -> ClusterError:
    """Return ``error`` in words, with what to do.

    Args:
        error: of a request.
        what: the request's purpose, as in "get job tiny".
        namespace: of the request.
        server: address of the API server.
        kind: that it asks for.
    """
    if isinstance(error, Unreachable):
        return NoCluster(
            f"cannot {what}: no answer from the cluster at {server}; check that it is up and reachable from"
            " here, and that --context names the right one (kubectl config get-contexts)"
        )
    match error.status:
        case 401:
            return NotAllowed(
                f"cannot {what}: the cluster at {server} does not know you; log in again"
                " (kubectl auth whoami says who you are to it)"
            )
        case 403:
            return NotAllowed(
                f"cannot {what} in namespace {namespace}: {error.message}; ask for the role edit or"
                " unmask-user there, or choose another namespace with --namespace"
            )
        case 404 if gone := _NO_NAMESPACE.search(error.message):
            return NotFound(
                f"cannot {what}: the cluster has no namespace {gone[1]}; make it"
                f" (kubectl create namespace {gone[1]}), or choose another with --namespace"
            )
        case 404 if not error.reason or "could not find the requested resource" in error.message:
            return NotDefined(
                f"cannot {what}: the cluster does not know {kind}s; install the operator, or at"
                " least its definitions (kubectl apply -f deploy/crds)"
            )
        case 404:
            return NotFound(
                f"cannot {what}: namespace {namespace} has none of that name; unmask ps --all-namespaces"
                " lists all"
            )
        case 400 | 422:
            return Refused(f"cannot {what}: the cluster refuses it: {error.message}")
    return ClusterError(f"cannot {what}: the cluster at {server} answered: {error}")


def conflicting(error: ApiError, *, what: str) -> Conflicting:
    """Return in words that fields which are applied are others'."""
    return Conflicting(
        f"cannot {what}: others have set fields that the manifest sets to something else: {error.message};"
        " drop those fields from the manifest, or take them over (unmask submit --force-conflicts)"
    )
