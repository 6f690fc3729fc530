"""``python -m unmask_operator.launch.agent ARGS...``: torchrun that does not outlive whoever started it.

torchrun and its workers have sessions of their own, so nothing stops them when the launcher is killed.
Two trainers on one run folder would follow. Here the kernel tells a process when its parent dies (Linux;
elsewhere this is plain torchrun).
"""

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Mapping

__all__ = ["end_with_parent", "meeting"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent process ends; to be called first thing in a process."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def meeting(given: Mapping[str, str]) -> dict[str, str]:
    """Return where the nodes meet, if TorchX's scheduler says which is the first and nobody has said more.

    Each scheduler puts the first node's address into a variable of another name.
    """
    variable = given.get("UNMASK_MEETING_HOST_IN")
    if variable is None or "PET_RDZV_ENDPOINT" in given:
        return {}
    host = given.get(variable) or "localhost"
    return {"PET_RDZV_ENDPOINT": f"{host}:{given.get('UNMASK_MEETING_PORT', '29400')}"}


if __name__ == "__main__":
    end_with_parent()
    os.environ.update(meeting(os.environ))
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
