"""One step's gradient: rows to noise to layout to loss, over micro-batches and processes.

The loss is the sum of all weighted terms divided by one normaliser, both over all rows of
the step. So it does not depend on how the rows are cut into micro-batches, nor on how
many processes share them (a mean of means would weigh rows with few predictions more).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from unmask.diffusion import layout, noise
from unmask.diffusion.layout import ModelInputs
from unmask.diffusion.losses import loss_terms, summed_loss, token_nll
from unmask.diffusion.preference import answer_bounds, margins, paired, preference_losses
from unmask.diffusion.rows import PackedRows
from unmask.models.base import LanguageModel
from unmask.training.balance import BalanceLosses, Balancing
from unmask.training.distributed import World
from unmask.training.observation import StepWatch
from unmask.training.plan import StagePlan
from unmask.training.weights import Weights

__all__ = [
    "Preference",
    "Totals",
    "gradient_step",
    "micro_batches",
    "model_inputs",
    "objective_sum",
    "preference_measures",
    "preference_sums",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """What a preference stage compares the model with."""

    beta: float
    views: int
    """Noisy copies of each answer."""
    reference: Callable[[], AbstractContextManager[LanguageModel]]
    """In the block, the model that does not learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What all processes computed in one step."""

    loss: float
    """In nats per predicted token, or per bound of one; of preferences, per pair."""
    normaliser: float
    stop: bool
    """Whether a process was asked to stop."""
    expert_tokens: tuple[Tensor, ...]
    """For each router, int64 (experts,): tokens that went to each expert."""
    balance: BalanceLosses | None = None
    """What the balance losses are worth, where there are any; not part of ``loss``."""
    measures: dict[str, float] = field(default_factory=dict)
    """What else is known of the step (:func:`preference_measures`)."""


def model_inputs(
    rows: PackedRows,
    stage: StagePlan,
    model: LanguageModel,
    *,
    block_length: int,
    noise_key: int,
    disturbance: float = 0.0,
) -> ModelInputs:
    """What the objective of ``stage`` runs ``model`` on.

    Args:
        rows: Packed documents.
        stage: What is learnt of them, and how they are masked.
        model: Whose mask token stands at masked positions.
        block_length: Tokens per block.
        noise_key: What masks follow from, with the documents' numbers.
        disturbance: Standard deviation of what is added to the embeddings of masked tokens.
    """
    if stage.noise is not None and stage.shifted:
        # Nothing comes before a document's first token that it could be predicted from.
        rows = replace(rows, supervised=rows.supervised & (rows.position > 0))
    seen = rows if stage.document_mask else rows.joined()
    if stage.noise is None:
        return layout.causal(seen)
    # Noise belongs to the documents, whatever they see.
    corruption = noise.corrupt(
        rows, stage.noise, seed=noise_key, block_length=block_length, disturbance=disturbance
    )
    flat = stage.noise.weight == "flat"
    if stage.objective == "mdlm":
        return layout.full_sequence(
            seen, corruption, mask_token_id=model.mask_token_id, flat=flat, shifted=stage.shifted
        )
    inputs = layout.two_copy(
        seen,
        corruption,
        block_length=block_length,
        mask_token_id=model.mask_token_id,
        flat=flat,
        shifted=stage.shifted,
        eos_token_id=model.config.eos_token_id,
    )
    return paired(inputs, rows) if stage.objective == "dpo" else inputs


def micro_batches(rows: PackedRows, size: int) -> Iterator[PackedRows]:
    """``rows``, at most ``size`` at a time."""
    arrays = {one.name: getattr(rows, one.name) for one in fields(rows)}
    for first in range(0, rows.shape[0], size):
        part = slice(first, first + size)
        yield replace(rows, **{name: array[part] for name, array in arrays.items() if array is not None})


def objective_sum(model: LanguageModel, inputs: ModelInputs, *, confidence_weight: float = 0.0) -> Tensor:
    """The weighted sum of the negative log-likelihoods, and of entropies if asked for: a float32 scalar."""
    return summed_loss(_hidden(model, inputs), model.logits, inputs, confidence_weight=confidence_weight)


def _hidden(model: LanguageModel, inputs: ModelInputs) -> Tensor:
    return model.hidden(inputs.ids, inputs.metadata, disturb=inputs.disturbance)


def preference_sums(model: LanguageModel, inputs: ModelInputs, preference: Preference) -> Tensor:
    """Sums over the pairs of ``inputs``: of the loss, of the margin, and of 1 where it is above 0; (3,).

    Only the first has a gradient. The model comes first, the reference after it, each once.
    """
    policy = _bounds(model, inputs, preference)
    with torch.no_grad(), preference.reference() as frozen:
        reference = _bounds(frozen, inputs, preference)
    found = margins(policy, reference)
    losses = preference_losses(found, beta=preference.beta)
    return torch.stack([losses.sum(), found.detach().sum(), (found.detach() > 0).sum().to(losses.dtype)])


def preference_measures(sums: Tensor, pairs: float) -> dict[str, float]:
    """The mean margin in nats, and the share of pairs whose chosen answer has gained more than the other.

    ``sums`` are as :func:`preference_sums` gives them, over ``pairs`` pairs; gains are those against the
    reference.
    """
    return {"margin": float(sums[1]) / max(1.0, pairs), "preferred": float(sums[2]) / max(1.0, pairs)}


def _bounds(model: LanguageModel, inputs: ModelInputs, preference: Preference) -> Tensor:
    hidden_MD = _hidden(model, inputs).flatten(0, 1).index_select(0, inputs.predict)
    nll = token_nll(hidden_MD, model.logits, inputs.targets)
    return answer_bounds(nll, inputs, views=preference.views)


def gradient_step(
    weights: Weights,
    batches: Iterator[ModelInputs],
    world: World,
    *,
    stop: bool,
    confidence_weight: float = 0.0,
    balancing: Balancing | None = None,
    preference: Preference | None = None,
    watch: StepWatch | None = None,
) -> Totals:
    """Add up the gradient of the step over ``batches`` and over all processes.

    Afterwards ``weights.gradient`` is the gradient of the sum; it is still to be divided
    by the normaliser.

    Args:
        weights: The model, and where its gradient goes.
        batches: This process's share of the step; may be empty.
        world: The processes that share the step.
        stop: Whether this process was asked to stop.
        confidence_weight: Of the entropy of what is predicted rightly.
        balancing: Losses of the routers beside the objective's; None: there are none.
        preference: What the model is compared with, in a preference stage.
        watch: What notes how the step goes; no result depends on it.
    """
    model = weights.computing
    totals = torch.tensor([0.0, 0.0, float(stop)], dtype=torch.float64, device=world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)

    def loss_of(inputs: ModelInputs) -> Tensor:
        inputs = inputs.to(world.device)
        if preference is None:
            terms = loss_terms(
                _hidden(model, inputs), model.logits, inputs, confidence_weight=confidence_weight
            )
            if watch is not None:
                watch.note_losses(terms, inputs)
            return (terms * inputs.weights).sum()
        found = preference_sums(model, inputs, preference)
        sums.add_(found.detach())
        return found[0]

    def learn(loss: Tensor, inputs: ModelInputs) -> None:
        loss.backward()
        weights.collect()
        totals[0] += loss.detach()
        totals[1] += inputs.normaliser

    balance, counts = None, None
    if balancing is not None:
        every = list(batches)
        with balancing.counted(model.routers()):
            with torch.no_grad():
                for inputs in every[:-1]:
                    _hidden(model, inputs.to(world.device))
            last = [(loss_of(inputs), inputs) for inputs in every[-1:]]
            balance = balancing.settle(world, normaliser=sum(inputs.normaliser for inputs in every))
            counts = balancing.tokens
            for loss, inputs in last:
                learn(loss, inputs)
            for inputs in every[:-1]:
                learn(loss_of(inputs), inputs)
    else:
        for inputs in batches:
            learn(loss_of(inputs), inputs)
    with nullcontext() if watch is None else watch.phase("reduce"):
        if counts is None:
            counts = tuple(router.tokens_per_expert.clone() for router in model.routers())
            world.sum(*counts)
        world.sum(totals)
        if preference is not None:
            world.sum(sums)
        weights.sum_gradient(world)
        if watch is not None:
            watch.add_up(world)
    for router in model.routers():
        router.tokens_per_expert.zero_()
    loss_sum, normaliser, stops = totals.tolist()
    normaliser = max(normaliser, 1.0)  # a step whose documents predict nothing changes nothing
    return Totals(
        loss=loss_sum / normaliser,
        normaliser=normaliser,
        stop=stops > 0,
        expert_tokens=counts,
        balance=balance,
        measures=preference_measures(sums, normaliser) if preference is not None else {},
    )
