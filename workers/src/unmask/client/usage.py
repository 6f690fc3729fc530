"""What several calls took together."""

from collections.abc import Sequence

from unmask.v1 import generation_pb2 as pb

__all__ = ["total"]


def total(usages: Sequence[pb.Usage]) -> pb.Usage:
    """Of calls with one prompt, which counts once: the choices of one request, or the parts of one answer."""
    prefill = sum(usage.forwards_prefill for usage in usages)
    denoise = sum(usage.forwards_denoise for usage in usages)
    persist = sum(usage.forwards_persist for usage in usages)
    kept = sum(usage.completion_tokens for usage in usages)
    return pb.Usage(
        prompt_tokens=usages[0].prompt_tokens,
        completion_tokens=kept,
        forwards_prefill=prefill,
        forwards_denoise=denoise,
        forwards_persist=persist,
        positions_evaluated=sum(usage.positions_evaluated for usage in usages),
        tpf=kept / max(1, prefill + denoise + persist),
        tpf_decode=kept / max(1, denoise + persist),
        tpf_denoise=kept / max(1, denoise),
    )
