"""Experts that stay where they are while tokens travel to them.

Neighbouring processes share out the experts of a layer: process r of R holds experts
r E/R to (r+1) E/R - 1. Every process routes its own tokens, sends a copy to each chosen
expert's process, and gets the answers back in the order in which it sent. Sending is an
all-to-all, whose gradient is the all-to-all in the other direction. So an expert's
gradient is the sum over all tokens of the group, just as if they had been in one process,
and nothing is to be rescaled. Shape letters as in :mod:`unmask.models.moe`; M copies
received.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from unmask.models.moe import Experts, Routing, grouped_linear

__all__ = ["SpreadExperts"]


class SpreadExperts(Experts):
    """The experts of one layer, shared out over the processes of a mesh.

    Parameters are those of :class:`Experts`, as DTensors cut along the experts.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        """Take the shapes of ``experts``; values are to be filled in.

        Args:
            experts: All experts, on any device.
            mesh: The processes, in one dimension; their number divides that of the experts.
        """
        nn.Module.__init__(self)
        self._group = mesh.get_group()
        for name, parameter in experts.named_parameters():
            mine = parameter.new_empty(len(parameter) // mesh.size(), *parameter.shape[1:])
            spread = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
            self.register_parameter(name, nn.Parameter(spread))

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (T, D), wherever they are."""
        chosen_N = routing.experts.flatten()
        order_N = torch.argsort(chosen_N, stable=True)
        token_N = order_N.div(routing.experts.shape[1], rounding_mode="floor")
        journey = _Journey.of(torch.bincount(chosen_N, minlength=len(self.gate_up_proj)), self._group)

        arrived_MD = journey.there(hidden_TD.index_select(0, token_N))
        gate_MI, up_MI = grouped_linear(arrived_MD, _own(self.gate_up_proj), journey.ends).chunk(2, dim=-1)
        out_MD = grouped_linear(F.silu(gate_MI) * up_MI, _own(self.down_proj), journey.ends)
        out_ND = journey.back(out_MD)

        out_ND = out_ND * routing.weights.flatten()[order_N].unsqueeze(1).to(out_ND.dtype)
        return torch.zeros_like(hidden_TD).index_add(0, token_N, out_ND)


def _own(parameter: Tensor) -> Tensor:
    """This process's experts, with a gradient that finds its way back."""
    assert isinstance(parameter, DTensor)
    own: Tensor = parameter.to_local()
    return own


@dataclass(frozen=True, slots=True)
class _Journey:
    """How many copies go where, and in which order they are dealt with there."""

    sent: list[int]
    """Copies to each process."""
    received: list[int]
    """Copies from each process."""
    by_expert: Tensor
    """int64 (M,): places of the received copies, sorted by expert."""
    ends: Tensor
    """int64 (own experts,): where each expert's copies end in that order."""
    group: Any

    @classmethod
    def of(cls, copies_E: Tensor, group: Any) -> "_Journey":
        """The journey of copies that are sorted by expert, ``copies_E`` to each; everyone tells everyone."""
        going_RE = copies_E.view(dist.get_world_size(group), -1)
        coming_RE = torch.empty_like(going_RE)
        dist.all_to_all_single(coming_RE, going_RE.contiguous(), group=group)
        number = torch.arange(coming_RE.shape[1], device=copies_E.device)
        expert_M = number.repeat(len(coming_RE)).repeat_interleave(coming_RE.flatten())
        return cls(
            sent=going_RE.sum(1).tolist(),
            received=coming_RE.sum(1).tolist(),
            by_expert=torch.argsort(expert_M, stable=True),
            ends=coming_RE.sum(0).cumsum(0),
            group=group,
        )

    def there(self, copies_ND: Tensor) -> Tensor:
        """The copies that come here, sorted by expert: (M, D)."""
        arrived: Tensor = _AllToAll.apply(copies_ND, self.sent, self.received, self.group)
        return arrived.index_select(0, self.by_expert)

    def back(self, answers_MD: Tensor) -> Tensor:
        """The answers to this process's own copies, in the order in which they were sent: (N, D)."""
        unsorted_MD = answers_MD.index_select(0, torch.argsort(self.by_expert))
        returned: Tensor = _AllToAll.apply(unsorted_MD, self.received, self.sent, self.group)
        return returned


class _AllToAll(torch.autograd.Function):
    """Rows to each process of a group, in order; the gradient travels back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
