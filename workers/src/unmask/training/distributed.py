"""The processes that train together: who is who, sums over all, and errors that all hear of.

torchrun's environment says how many there are; without it there is one, and no process
group. gloo on the CPU, NCCL on GPUs. Nothing that goes over the wire is pickled.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.errors import (
    DataError,
    DivergedError,
    HungError,
    LostPeerError,
    ModelError,
    UnmaskError,
    UsageError,
)

__all__ = ["World", "joined_world", "lost_peer", "rank_from_environment"]

_ERRORS: dict[int, type[UnmaskError]] = {
    int(error.exit_code): error for error in (UsageError, DataError, ModelError, DivergedError)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """What the collectives run in; None: the one that all joined."""

    def beside(self) -> "World":
        """The same processes on the CPU, for a thread whose collectives are not in order with the others.

        Every process must call this.
        """
        group = dist.new_group(backend="gloo") if self.size > 1 else None
        assert not isinstance(group, int), "this process is in the group"
        return replace(self, device=torch.device("cpu"), group=group)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Add up each tensor over all processes, in place and in the same order everywhere."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def from_leader(self, number: int) -> int:
        """The number that the leader gives, which is below 2^63."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0, group=self.group)
        return int(shared)

    def all_bytes(self, own: bytes) -> list[bytes]:
        """What each process gives, by rank."""
        if self.size == 1:
            return [own]
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=self.device), group=self.group)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        if own:
            padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        bodies = [torch.empty_like(padded, device=self.device) for _ in lengths]
        dist.all_gather(bodies, padded.to(self.device), group=self.group)
        return [body[:length].cpu().numpy().tobytes() for body, length in zip(bodies, lengths, strict=True)]

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block with an error in all processes if it fails in one: that of the lowest rank.

        Only errors that a person can mend are passed on. Every process must enter the block.
        """
        own: UnmaskError | None = None
        try:
            yield
        except UnmaskError as error:
            own = error
        if self.size == 1:
            if own:
                raise own
            return
        first = self._first(own is not None)
        if first < self.size:
            raise self._shared_error(own, first) from own

    def _first(self, fails: bool) -> int:
        """The lowest rank that fails, or the number of ranks."""
        rank = torch.tensor([self.rank if fails else self.size], device=self.device)
        dist.all_reduce(rank, op=dist.ReduceOp.MIN, group=self.group)
        return int(rank)

    def _shared_error(self, own: UnmaskError | None, source: int) -> UnmaskError:
        text = str(own).encode() if own else b""
        head = torch.tensor([len(text), own.exit_code if own else 0], device=self.device)
        dist.broadcast(head, src=source, group=self.group)
        length, code = head.tolist()
        body = torch.zeros(length, dtype=torch.uint8, device=self.device)
        if self.rank == source:
            body.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(body, src=source, group=self.group)
        return _ERRORS.get(code, UnmaskError)(bytes(body.tolist()).decode())


def lost_peer(error: Exception) -> UnmaskError | None:
    """What ``error`` means if a collective has failed: that a process is gone, or does not answer."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in text):
        return None
    first = " ".join(text.split("\n")[0].split())[:200]
    if "timed out" in text.lower() or "timeout" in text.lower():
        return HungError(f"another process of the job does not answer ({first}); see the logs of all")
    return LostPeerError(
        f"another process of the job has ended, so this one cannot go on ({first}); see the others' logs"
    )


def rank_from_environment() -> int:
    """The rank that torchrun gave this process; 0 without torchrun. Needs no process group."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the other processes, and leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device()
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
