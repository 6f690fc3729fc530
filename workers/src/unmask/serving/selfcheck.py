"""Compare this machine's results with recorded vectors of a reference implementation.

A new GPU, torch or kernel is trusted when it reproduces what the models' authors' code
computed. A folder holds a small model (``config.json`` and weights) and
``golden.safetensors`` with any of these vectors; B rows, L tokens, V vocabulary:

======================= ==========================================================
``forward.*``           ``input_ids`` (B, L), ``logits`` (B, L, V): one block-causal forward
``causal.*``            the same under a causal mask, as the autoregressive sibling computes it
``bdlm.*``,             ``x0`` (1, L), ``mask`` (1, L) bool, ``document_ids`` (L,), ``logits``
``bdlm_ragged.*``       (1, L, V): the noisy half of the two-copy forward, on a block grid over
                        the row, positions not restarted; optionally ``token_nll`` (1, L) and
                        ``mean_masked_nll`` (1,)
``mdlm.*``              ``x0`` (B, L), ``mask`` (B, L) bool, ``logits`` (B, L, V), ``token_nll``
                        (B, L): one forward on the masked rows, attending to the whole row
``generate.N.*``        ``prompt`` (1, P), ``params`` = (new tokens, block length, steps),
                        ``threshold`` (1,), ``output`` (1, n), ``forwards`` (1,), optionally
                        ``eos_id`` (1,): greedy decoding, run here without a cache, with one, and as
                        a server does it
======================= ==========================================================
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unmask.attention import AttentionMetadata
from unmask.diffusion import layout
from unmask.diffusion.batch import run_to_end
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import Generation, generate, generate_uncached
from unmask.diffusion.losses import summed_loss
from unmask.diffusion.noise import Corruption
from unmask.diffusion.rows import PackedRows
from unmask.errors import ModelError
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.serving.ragged import RaggedBatch

__all__ = ["TOLERANCE", "CheckResult", "run_checks"]

TOLERANCE = 2e-4
"""Largest allowed absolute difference of logits and losses, in float32."""

_BLOCK = 4
"""Block length of the recorded forwards."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One comparison."""

    name: str
    passed: bool
    detail: str
    """The largest difference, or how tokens and forwards compare."""


def run_checks(folder: Path, *, device: str = "cpu") -> Iterator[CheckResult]:
    """Run whatever vectors ``folder`` has, in float32 on ``device``, one result each.

    Raises:
        ModelError: If the model or the vectors cannot be read, or there are none.
    """
    vectors = _read_vectors(folder / "golden.safetensors")
    model = load(folder, device=device, dtype=torch.float32, reordered=True)
    groups = sorted({name.rpartition(".")[0] for name in vectors})
    for group in groups:
        kind = group.partition(".")[0]
        check = _CHECKS.get(kind)
        if check is None:
            raise ModelError(
                f"{folder}: vectors {group!r} are of no kind that can be checked: {', '.join(_CHECKS)}"
            )
        own = {
            name.removeprefix(f"{group}."): v
            for name, v in vectors.items()
            if name.rpartition(".")[0] == group
        }
        with torch.inference_mode():
            yield from check(group, model, own)


def _read_vectors(file: Path) -> dict[str, Tensor]:
    try:
        vectors = load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file; a check needs recorded vectors beside the model") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: truncated, or not a safetensors file ({error})") from None
    if not vectors:
        raise ModelError(f"{file}: holds no vectors")
    return vectors


def _compare(name: str, got: Tensor, expected: Tensor) -> CheckResult:
    if got.shape != expected.shape:
        return CheckResult(name, False, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    difference = float((got.cpu() - expected).abs().max())
    return CheckResult(name, difference <= TOLERANCE, f"largest difference {difference:.1e}")


def _check_forward(name: str, model: LanguageModel, vectors: dict[str, Tensor]) -> Iterator[CheckResult]:
    block_length = 1 if name == "causal" else _BLOCK
    ids = vectors["input_ids"].to(model.device)
    position = torch.arange(ids.shape[1], device=model.device).expand(len(ids), -1)
    metadata = AttentionMetadata.block_causal(position, torch.zeros_like(position), block_length=block_length)
    yield _compare(f"{name}.logits", model.logits(model.hidden(ids, metadata)), vectors["logits"])


def _check_two_copy(name: str, model: LanguageModel, vectors: dict[str, Tensor]) -> Iterator[CheckResult]:
    ids, masked = vectors["x0"].numpy(), vectors["mask"].numpy()
    rows = PackedRows(
        ids=ids,
        document=vectors["document_ids"].numpy().reshape(ids.shape),
        position=np.arange(ids.size).reshape(ids.shape),
        supervised=np.ones_like(masked),
        ordinal=np.zeros_like(ids),
    )
    corruption = Corruption(masked[None], np.ones((1, *ids.shape), np.float32))
    inputs = layout.two_copy(
        rows,
        corruption,
        block_length=_BLOCK,
        mask_token_id=model.mask_token_id,
        flat=True,
        global_grid=True,
    ).to(model.device)
    hidden = model.hidden(inputs.ids, inputs.metadata)
    logits = model.logits(hidden[:, : ids.size])
    yield _compare(f"{name}.logits", logits, vectors["logits"])
    if "token_nll" in vectors:
        nll = _nll(logits, vectors["x0"].to(model.device))
        yield _compare(f"{name}.token_nll", nll, vectors["token_nll"])
    if "mean_masked_nll" in vectors:
        mean = summed_loss(hidden, model.logits, inputs) / inputs.normaliser
        yield _compare(f"{name}.mean_masked_nll", mean.reshape(1), vectors["mean_masked_nll"])


def _check_full_sequence(
    name: str, model: LanguageModel, vectors: dict[str, Tensor]
) -> Iterator[CheckResult]:
    clean, masked = vectors["x0"].to(model.device), vectors["mask"].to(model.device)
    position = torch.arange(clean.shape[1], device=model.device).expand(len(clean), -1)
    metadata = AttentionMetadata.bidirectional(position, torch.zeros_like(position))
    logits = model.logits(model.hidden(clean.masked_fill(masked, model.mask_token_id), metadata))
    yield _compare(f"{name}.logits", logits, vectors["logits"])
    yield _compare(f"{name}.token_nll", _nll(logits, clean), vectors["token_nll"])


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target: (B, L)."""
    return -torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1))[..., 0]


def _check_generate(name: str, model: LanguageModel, vectors: dict[str, Tensor]) -> Iterator[CheckResult]:
    new_tokens, block_length, steps = vectors["params"].tolist()
    eos = int(vectors["eos_id"]) if "eos_id" in vectors else model.config.eos_token_id
    params = DecodingParams(
        max_new_tokens=new_tokens,
        block_length=block_length,
        steps=steps,
        threshold=float(vectors["threshold"]),
        early_exit=False,
        eos_token_id=eos,
        mask_token_id=model.mask_token_id,
    )
    prompt, expected = vectors["prompt"][0].tolist(), vectors["output"][0].tolist()
    plain = generate_uncached(model, prompt, params)
    cached = generate(model, [prompt], params)[0]
    batch = RaggedBatch(model, rows=1, capacity=len(prompt) + new_tokens, block_length=block_length)
    served = run_to_end(batch, [prompt], params)[0]
    for way, generation in (("uncached", plain), ("cached", cached), ("served", served)):
        yield _compare_generation(f"{name} {way}", generation, expected, int(vectors["forwards"]))


def _compare_generation(name: str, got: Generation, tokens: list[int], forwards: int) -> CheckResult:
    usage = got.usage
    same = sum(a == b for a, b in zip(got.token_ids, tokens, strict=False))
    detail = f"{same} of {len(tokens)} tokens, {usage.denoise} denoise forwards of {forwards}"
    if usage.persist or usage.prefill:
        detail += f", besides {usage.prefill} prefill and {usage.persist} persist"
    return CheckResult(name, got.token_ids == tokens and usage.denoise == forwards, detail)


_CHECKS: dict[str, Callable[[str, LanguageModel, dict[str, Tensor]], Iterator[CheckResult]]] = {
    "forward": _check_forward,
    "causal": _check_forward,
    "bdlm": _check_two_copy,
    "bdlm_ragged": _check_two_copy,
    "mdlm": _check_full_sequence,
    "generate": _check_generate,
}
