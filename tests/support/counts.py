"""How much a test does: a sample in `make test`, everything in `make test-full`."""

import os

__all__ = ["FULL", "of"]

FULL = os.environ.get("UNMASK_FULL") == "1"


def of(*, sample: int, full: int) -> int:
    """Return how often to try: ``full`` times where ``UNMASK_FULL=1`` says so."""
    return full if FULL else sample
