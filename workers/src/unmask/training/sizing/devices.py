"""What GPUs offer, after their makers' data sheets, and what is assumed beside that."""

from dataclasses import dataclass, replace
from types import MappingProxyType

from unmask.errors import UsageError

__all__ = ["DEVICES", "MEMORY_BYTES_PER_SECOND", "MFU", "RESERVE_GIB", "Device", "device_named"]

MFU = 0.35
"""Share of a GPU's peak that training is assumed to reach. An assumption: measure yours."""

RESERVE_GIB = 4.0
"""Memory left to the driver, to communication and to fragmentation, in GiB. An assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU."""

    name: str
    memory_gib: float
    """As its driver reports it, in GiB."""
    bf16_tflops: float
    """Peak of dense bfloat16 matrix products, in 10^12 operations a second; no sparsity counted."""
    fp32_tflops: float
    """Peak in float32 proper, not TF32, which torch leaves off unless asked."""

    def peak(self, precision: str) -> float:
        """Operations a second."""
        return (self.fp32_tflops if precision == "fp32" else self.bf16_tflops) * 1e12


DEVICES = MappingProxyType(
    {
        device.name: device
        for device in (
            Device(name="a100-40g", memory_gib=40.0, bf16_tflops=312, fp32_tflops=19.5),
            Device(name="a100-80g", memory_gib=80.0, bf16_tflops=312, fp32_tflops=19.5),
            Device(name="l40s-48g", memory_gib=45.0, bf16_tflops=362, fp32_tflops=91.6),
            Device(name="h100-80g", memory_gib=79.6, bf16_tflops=989, fp32_tflops=67),
            Device(name="h200-141g", memory_gib=140.4, bf16_tflops=989, fp32_tflops=67),
        )
    }
)
"""NVIDIA's data sheets of A100, L40S, H100 SXM and H200 SXM: dense figures."""

MEMORY_BYTES_PER_SECOND = MappingProxyType(
    {
        "a100-40g": 1.555e12,
        "a100-80g": 2.039e12,
        "l40s-48g": 0.864e12,
        "h100-80g": 3.35e12,
        "h200-141g": 4.8e12,
    }
)
"""Peak of reading their memory, after the same sheets."""


def device_named(
    name: str | None, *, memory_gib: float | None = None, peak_tflops: float | None = None
) -> Device:
    """The GPU ``name``, or H100, with figures of one's own in place of its.

    Raises:
        UsageError: It is not known.
    """
    own = memory_gib is not None and peak_tflops is not None
    chosen = name or "h100-80g"
    if chosen not in DEVICES:
        raise UsageError(
            f"--gpu: got {chosen!r}, known are {', '.join(DEVICES)}; "
            "for another give --memory and --peak-tflops"
        )
    device = DEVICES[chosen]
    if memory_gib is not None:
        device = replace(device, memory_gib=memory_gib)
    if peak_tflops is not None:
        device = replace(device, bf16_tflops=peak_tflops, fp32_tflops=peak_tflops)
    return replace(device, name="custom") if own and name is None else device
