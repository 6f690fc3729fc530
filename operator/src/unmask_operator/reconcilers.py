"""The custom resources that the operator acts upon, each with the function that decides about it."""

from unmask_operator import serving, training
from unmask_operator.decision import Reconciler

__all__ = ["RECONCILERS", "reconcilers"]


def reconcilers(image: str | None) -> tuple[Reconciler, ...]:
    """Return one for each kind; ``image`` is run for resources that name none."""
    return (
        training.reconciler(training.Settings(image=image)),
        serving.reconciler(serving.Settings(image=image)),
    )


RECONCILERS = reconcilers(None)
"""What the operator's permissions are made from, too."""
