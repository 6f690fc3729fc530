"""Whether processes can have a network of their own here, at the end of a cable that can be pulled."""

import os
import shutil
import subprocess

__all__ = ["obstacle"]


def obstacle() -> str | None:
    """Return why they cannot, or ``None``."""
    if os.geteuid():
        return "not root"
    for program in ("ip", "nsenter", "unshare"):
        if shutil.which(program) is None:
            return f"no program {program} (Debian: iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network of its own: {tried.stderr.strip()}" if tried.returncode else None
