"""How much a test does: a sample in `make test`, everything in `make test-full`, or what a variable says."""

import os

__all__ = ["FULL", "of"]

FULL = os.environ.get("UNMASK_FULL") == "1"


def of(*, sample: int, full: int, variable: str = "") -> int:
    """Return how often to try: ``full`` times where ``UNMASK_FULL=1`` says so.

    Args:
        sample: how often otherwise.
        full: the count that a target is stated with.
        variable: one of the environment that, where it is set and not empty, is the count.
    """
    given = os.environ.get(variable, "") if variable else ""
    return int(given) if given else full if FULL else sample
