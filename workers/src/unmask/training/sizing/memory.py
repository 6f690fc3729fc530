"""Bytes of one process at the fullest moment of a step, part by part, as the trainer allocates them.

Weights, gradients and optimiser state are exact: what :mod:`unmask.training.weights` and
:mod:`unmask.training.optimizer` hold. Activations are what autograd keeps for backward, given
attention that keeps no scores (a fused kernel); a test compares them with what it keeps on a CPU.
Tokens are taken to spread evenly over experts.

Where weights are shared out (FSDP2), a process holds its part of them, of the gradient and of the
optimiser state in float32; each parameter is cut along its first dimension into equal pieces, rounded
up. While it computes it also holds, whole and in the forward's format, what lies outside the layers,
two layers (one computes, one is fetched), and the gradients on their way to their owners. What is held
for a moment is counted as if all moments came together; it has not been measured on a GPU.

Shape letters: D hidden, q and k the widths of all query and all key heads, I the inner width, K experts
per token, E experts, V vocabulary; b bytes of a number in the forward.
"""

from dataclasses import dataclass, fields
from typing import Literal

from unmask.models.shape import LayerShape, ModelShape, Stored, adapters_of
from unmask.training.sharding.plan import ShardingPlan
from unmask_api.train_job import LoRA

__all__ = ["CHUNK_BYTES", "Memory", "Precision", "activations_of_layer", "memory_of", "piece", "states_of"]

Precision = Literal["fp32", "bf16"]

CHUNK_BYTES = 1 << 27
"""Logits that the loss holds at a time, in bytes of float32; see :mod:`unmask.diffusion.losses`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process."""

    weights: int
    """Float32 weights, and the bfloat16 copy that computes."""
    gradients: int
    """The flat float32 gradient, and the bfloat16 gradients of one backward pass."""
    optimizer: int
    """Two float32 moments, and a step count per tensor."""
    activations: int
    """What backward needs of one micro-batch."""
    logits: int
    """Scores of the vocabulary for one chunk of predictions, with what the loss makes of them."""
    gathered: int
    """Of weights that are shared out: the layers that compute, and gradients on their way; else 0."""
    buffers: int
    """Router biases and counts, and a gradient before it is added up."""
    reference: int = 0
    """The weights of a model that is compared with, which has neither gradients nor optimiser state."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def states(self) -> int:
        """What stays from step to step, however small a micro-batch is."""
        return self.weights + self.gradients + self.optimizer


def piece(stored: Stored, plan: ShardingPlan) -> int:
    """Weights of the largest piece of a parameter under ``plan``: the first process's."""
    pieces = plan.parts * plan.experts
    if stored.expert and plan.experts > 1:  # experts are dealt out, and each is cut evenly
        return stored.count // pieces
    return -(-stored.rows // pieces) * (stored.count // stored.rows)


def states_of(
    shape: ModelShape, precision: Precision, plan: ShardingPlan | None = None, lora: LoRA | None = None
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimiser state in one process."""
    if lora is not None:
        adapters, tensors = adapters_of(shape, lora)
        return _forward_copy(shape, precision) + 4 * adapters, 4 * adapters, 8 * adapters + 4 * tensors
    count = sum(piece(one, plan) for one in shape.stored) if plan else shape.parameters
    optimizer = 8 * count + 4 * len(shape.stored)
    if precision == "fp32" or plan:
        return 4 * count, 4 * count, optimizer
    copy = _forward_copy(shape, precision)
    return 4 * count + copy, 4 * count + copy, optimizer


def _forward_copy(shape: ModelShape, precision: Precision) -> int:
    """Bytes of a model that only computes, in its number format; routers are float32 in any case."""
    if precision == "fp32":
        return 4 * shape.parameters
    return 2 * (shape.parameters - shape.routers) + 4 * shape.routers


def _gathered(shape: ModelShape, b: int, plan: ShardingPlan) -> int:
    """Bytes of what is whole for a moment."""

    def whole(layer: LayerShape) -> int:
        return layer.shared_by_all + layer.experts // plan.experts

    layer = max(whole(one) for one in shape.layers)
    weights = (shape.ends + 2 * layer) * b
    return weights + (shape.ends + layer) * (b + 4)  # gradients, and as float32 on their way


def activations_of_layer(
    shape: ModelShape,
    layer: LayerShape,
    precision: Precision,
    *,
    spread_experts: bool = False,
) -> int:
    """Bytes per position that autograd keeps of ``layer``; of a norm, its input.

    Args:
        shape: The model.
        layer: One of its layers.
        precision: Number format of the forward.
        spread_experts: Whether experts are dealt out to processes.
    """
    b, q, k = _bytes(precision), shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 4 * shape.hidden * b  # inputs and results of two, the latter as inputs of products
    projected = (q + 2 * k) * b
    attended = (q + k) * b + 2 * q * b + 4 * shape.heads  # turned; result, twice; one sum per head
    return norms + projected + attended + _feed_forward(shape, layer, b, spread=spread_experts)


def _feed_forward(shape: ModelShape, layer: LayerShape, b: int, *, spread: bool) -> int:
    """Gate, its silu, up, and their product: four times the inner width; and the routing."""
    dense = 4 * layer.dense_width * b
    if not layer.experts:
        return dense
    K, E, D = layer.chosen, layer.num_experts, shape.hidden
    in_float32 = 4 * D if b < 4 else 0  # routers compute in float32
    routing = in_float32 + 4 * E + 4 * K + 3 * 8 * K + K * b  # scores, weights, three indices, weights again
    # Gates and ups alone where a process has all experts; the rest is computed again.
    routed = K * 2 * layer.expert_width * b
    if spread:  # sent away and back: input, result, and that weighted; and all that an expert makes
        routed = K * (3 * D + 4 * layer.expert_width) * b
    return dense + routing + routed


def memory_of(
    shape: ModelShape,
    *,
    precision: Precision,
    positions: int,
    predictions: float,
    recompute: bool = False,
    plan: ShardingPlan | None = None,
    reference: bool = False,
    lora: LoRA | None = None,
) -> Memory:
    """Bytes of one process.

    Args:
        shape: The model.
        precision: Number format of forward and backward passes.
        positions: Of one micro-batch.
        predictions: Of one micro-batch.
        recompute: Whether layers keep only their input and compute the rest again in backward.
        plan: How weights are shared out; None: they are not.
        reference: Whether a second model, which does not learn, is there to be compared with.
        lora: Adapters that learn in place of the weights; None: there are none.
    """
    weights, gradients, optimizer = states_of(shape, precision, plan, lora)
    b = _bytes(precision)
    spread = plan is not None and plan.experts > 1
    layers = [activations_of_layer(shape, layer, precision, spread_experts=spread) for layer in shape.layers]
    kept = sum(layers)
    if recompute:  # each layer's input, and which experts were chosen; one layer at a time has everything
        kept = sum(shape.hidden * b + 8 * layer.chosen for layer in shape.layers) + max(layers)
    ends = 2 * shape.hidden * b
    most = min(predictions, max(1, CHUNK_BYTES // 4 // shape.vocabulary))
    per_logit = 3 * 4 + (2 * b if b < 4 else 0)  # scores, log-softmax, gradient; also in bfloat16
    routers = sum(layer.num_experts * (8 + 4 * layer.biased) for layer in shape.layers)
    copies = 1 if precision == "fp32" or plan or lora else 2
    alone = precision == "fp32" and not plan and not lora
    transient = 4 * max(one.count for one in shape.stored) if alone else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=round((kept + ends) * positions + shape.hidden * b * predictions),
        logits=round(most * shape.vocabulary * per_logit),
        gathered=_gathered(shape, b, plan) if plan else 0,
        buffers=copies * routers + transient,
        reference=_reference(shape, precision, plan, lora) if reference else 0,
    )


def _reference(shape: ModelShape, precision: Precision, plan: ShardingPlan | None, lora: LoRA | None) -> int:
    """Bytes of a model to compare with: adapters of another time, a copy, or one that is shared out alike."""
    if lora is not None:
        return 4 * adapters_of(shape, lora)[0]
    if plan:
        return 4 * sum(piece(one, plan) for one in shape.stored)
    return _forward_copy(shape, precision)


def _bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2
