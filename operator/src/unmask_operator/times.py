"""Times as Kubernetes writes them, and as seconds since 1970."""

from datetime import UTC, datetime

__all__ = ["seconds", "stamp"]


def stamp(now: float) -> str:
    """Return ``now``, in seconds since 1970 UTC, as RFC 3339 with whole seconds."""
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: object) -> float | None:
    """Return the seconds since 1970 of an RFC 3339 time; ``None`` for anything else."""
    try:
        return datetime.fromisoformat(str(text)).timestamp() if text else None
    except ValueError:
        return None
