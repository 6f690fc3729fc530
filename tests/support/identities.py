"""What must hold of the two-copy forward whoever holds the weights: identities, each as a largest difference.

Ranks compute them with their shares of one model, each on documents of its own. An identity runs the same
number of forwards on every rank, as models that are shared out ask for.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.models import TINY, packed_row, random_tokens
from support.ranks import join, start
from unmask.attention import AttentionMetadata, AttentionPlan, attend_plainly
from unmask.attention.tiled import plan_tiled
from unmask.diffusion import layout
from unmask.diffusion.losses import loss_terms, summed_loss
from unmask.diffusion.noise import Corruption, NoiseConfig, corrupt
from unmask.diffusion.rows import PackedRows
from unmask.models import transformer
from unmask.models.base import LanguageModel
from unmask_api.train_job import DiffusionTrainJob

MASK = TINY["mask_token_id"]
LENGTH = 16
BLOCK = 4


def differences(job: DiffusionTrainJob, *, ranks: int) -> dict[str, float]:
    """The largest difference of each identity over all ranks, which share the model as ``job`` says.

    And of :data:`BOUND`.
    """
    run = Path(job.spec.checkpoint.uri)
    run.mkdir(parents=True, exist_ok=True)
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    assert join(start(_measure, text, str(run), ranks=ranks)) == [0] * ranks
    found = [json.loads((run / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: max(one[name] for one in found) for name in found[0]}


def _measure(text: str, run: str) -> None:
    from unmask.training.arrangement import first_weights
    from unmask.training.distributed import joined_world
    from unmask.training.preparation import prepare

    spec = DiffusionTrainJob.from_json(text).spec
    with joined_world() as world:
        weights = first_weights(spec, prepare(spec, world).config, world)
        model = weights.computing.eval()
        tokens = random_tokens(LENGTH, seed=world.rank)
        with torch.no_grad():
            found = {name: check(model, tokens) for name, check in IDENTITIES.items()}
            found[BOUND] = _likelihood(model, tokens)
        Path(run, f"{world.rank}.json").write_text(json.dumps(found))


def _noise(rows: PackedRows, block_length: int, views: int = 1) -> Corruption:
    return corrupt(rows, NoiseConfig(views=views), seed=5, block_length=block_length)


def _two_copy(rows: PackedRows, noise: Corruption, block_length: int, **options: Any) -> layout.ModelInputs:
    return layout.two_copy(rows, noise, block_length=block_length, mask_token_id=MASK, **options)


def _logits(model: LanguageModel, inputs: layout.ModelInputs) -> Tensor:
    return model.logits(model.hidden(inputs.ids, inputs.metadata))[0]


def _plain(model: LanguageModel, ids: Sequence[int], block_length: int) -> Tensor:
    metadata = AttentionMetadata.single_row(len(ids), block_length=block_length)
    return model.logits(model.hidden(torch.tensor([ids]), metadata))[0]


def _predictions(model: LanguageModel, inputs: layout.ModelInputs) -> Tensor:
    hidden = model.hidden(inputs.ids, inputs.metadata).flatten(0, 1)
    return model.logits(hidden[inputs.predict])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def _prefixes(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens, length=LENGTH)
    noise = _noise(rows, BLOCK)
    noisy = _logits(model, _two_copy(rows, noise, BLOCK))[:LENGTH]
    noised = np.where(noise.masked[0, 0], MASK, tokens).tolist()
    worst = 0.0
    for start_at in range(0, LENGTH, BLOCK):
        stop = start_at + BLOCK
        alone = _plain(model, tokens[:start_at] + noised[start_at:stop], BLOCK)[start_at:]
        worst = max(worst, _apart(noisy[start_at:stop], alone))
    return worst


def _causal(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens, length=LENGTH)
    inputs = _two_copy(rows, _noise(rows, 1), 1, leave_out_unread=False)
    return _apart(_logits(model, inputs)[LENGTH:], _plain(model, tokens, 1))


def _whole(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens, length=LENGTH)
    noise = _noise(rows, LENGTH)
    noised = np.where(noise.masked[0, 0], MASK, tokens).tolist()
    inputs = _two_copy(rows, noise, LENGTH)
    return _apart(_logits(model, inputs), _plain(model, noised, LENGTH))


def _leaks(model: LanguageModel, tokens: list[int]) -> float:
    noise = _noise(packed_row(tokens, length=LENGTH), BLOCK)
    before = _logits(model, _two_copy(packed_row(tokens, length=LENGTH), noise, BLOCK))
    worst = 0.0
    for block in range(LENGTH // BLOCK):
        changed = tokens.copy()
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        hidden = noise.masked[0, 0, span]
        changed[span] = np.where(hidden, (np.array(tokens[span]) + 7) % 60, tokens[span]).tolist()
        after = _logits(model, _two_copy(packed_row(changed, length=LENGTH), noise, BLOCK))
        worst = max(worst, _apart(before[: span.stop], after[: span.stop]))
    return worst


def _views(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens, length=LENGTH)
    noise = _noise(rows, BLOCK, views=2)
    together = summed_loss_of(model, _two_copy(rows, noise, BLOCK))
    apart = [
        summed_loss_of(
            model, _two_copy(rows, Corruption(noise.masked[view, None], noise.ratio[view, None]), BLOCK)
        )
        for view in range(2)
    ]
    return abs(together - sum(apart)) / abs(together)


def summed_loss_of(model: LanguageModel, inputs: layout.ModelInputs) -> float:
    """The loss before it is divided."""
    return float(summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs))


def _unread(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens, length=LENGTH, prompt=[6])
    noise = _noise(rows, BLOCK)
    lean, whole = (_two_copy(rows, noise, BLOCK, leave_out_unread=leave_out) for leave_out in (True, False))
    return _apart(_predictions(model, lean), _predictions(model, whole))


def _packed(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens[:8], tokens[8:], length=LENGTH)
    together = _predictions(model, _two_copy(rows, _noise(rows, BLOCK), BLOCK))
    alone = []
    for number in range(2):
        row = packed_row(tokens[8 * number :][:8], length=8, first_ordinal=number)
        alone.append(_predictions(model, _two_copy(row, _noise(row, BLOCK), BLOCK)))
    return _apart(together, torch.cat(alone))


DRAWS = 1024


def _likelihood(model: LanguageModel, tokens: list[int]) -> float:
    """How many standard errors lie between the mean loss over masks and the sum of all tokens' losses."""
    forwards = 16
    row = packed_row(tokens, length=LENGTH)
    drawn = []
    for forward in range(forwards):
        rows = _repeated(row, DRAWS // forwards, first_ordinal=forward * DRAWS)
        inputs = _two_copy(rows, _noise(rows, 1), 1)
        terms = loss_terms(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs) * inputs.weights
        own = torch.zeros(len(rows.ids)).index_add(0, inputs.predict // inputs.ids.shape[1], terms)
        drawn.append(own.double())
    everything = Corruption(np.ones((1, 1, LENGTH), np.bool_), np.ones((1, 1, LENGTH), np.float32))
    exact = summed_loss_of(model, _two_copy(row, everything, 1))
    sums = torch.cat(drawn)
    return float((sums.mean() - exact).abs() / (sums.std() / DRAWS**0.5))


def _repeated(row: PackedRows, times: int, *, first_ordinal: int) -> PackedRows:
    """The same document as many others, each masked in its own way."""
    arrays = {
        name: np.repeat(getattr(row, name), times, axis=0)
        for name in ("ids", "document", "position", "supervised", "ordinal")
    }
    arrays["ordinal"] += first_ordinal + np.arange(times)[:, None]
    return PackedRows(**arrays)


class _Plainly:
    """The reference of attention as a way to compute it."""

    def __init__(self, query: AttentionMetadata, key: AttentionMetadata) -> None:
        self._query, self._key = query, key

    def attend(self, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        return attend_plainly(self._query, self._key, query_BHQD, key_BGKD, value_BGKD)


def _tiles(model: LanguageModel, tokens: list[int]) -> float:
    rows = packed_row(tokens[:8], tokens[8:], length=LENGTH)
    inputs = _two_copy(rows, _noise(rows, BLOCK, views=2), BLOCK)
    ways: tuple[Callable[[AttentionMetadata, AttentionMetadata], AttentionPlan], ...] = (
        _Plainly,
        lambda query, key: plan_tiled(query, key, tile=8),
    )
    found, usual = [], transformer.plan
    for way in ways:
        transformer.plan = way
        try:
            found.append(_predictions(model, inputs))
        finally:
            transformer.plan = usual
    return _apart(*found)


IDENTITIES: dict[str, Callable[[LanguageModel, list[int]], float]] = {
    "1 each noisy block is that of a forward on its clean prefix": _prefixes,
    "2 clean blocks of one token are the causal network": _causal,
    "3 one block of the whole row is the full-sequence forward": _whole,
    "4 no noisy block sees the tokens that it is to predict, nor later ones": _leaks,
    "5 views that share a clean copy are separate passes": _views,
    "6 what is left out changes nothing": _unread,
    "7 packed documents are each alone": _packed,
    "9 attention in tiles is attention": _tiles,
}
"""By number and name: the largest difference of the two sides, given a model and a document's tokens."""

BOUND = "8 the weighted loss in blocks of one is the likelihood on average"
"""In standard errors of the mean over masks."""
