"""The custom resources that the operator acts upon, each with the function that decides about it."""

from unmask_operator.decision import Reconciler

__all__ = ["RECONCILERS"]

RECONCILERS: tuple[Reconciler, ...] = ()
"""One for each kind; the operator's permissions are made from it, too."""
