"""What the report measures, each on held-out data and with the same noise every time.

Shape letters: B rows, L tokens of a row, M predicted tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unmask.diffusion import layout, noise
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import Generation, generate
from unmask.diffusion.layout import ModelInputs
from unmask.diffusion.losses import token_nll
from unmask.diffusion.noise import NoiseConfig
from unmask.diffusion.rows import PackedRows
from unmask.models.base import LanguageModel
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Corpus, Library, Source
from unmask.training.greedy import generate_greedily
from unmask.training.packing import lay_out, make_rows

__all__ = ["Answers", "answer", "answer_greedily", "cross_entropy", "held_out_text", "judge"]

HALF = NoiseConfig(low=0.4999, high=0.5001, weight="flat")
"""Every token is masked with probability 1/2."""
LENGTH = 256
NOISE_SEED = 2026
NEW_TOKENS = 48


def held_out_text(path: Path, tokenizer: Tokenizer, *, eos_token_id: int) -> Corpus:
    """The texts of ``path`` as documents of at most :data:`LENGTH` tokens."""
    library = Library(tokenizer, eos_token_id=eos_token_id)
    return library.corpus([Source(path, "text")], length=LENGTH, overlong="Split")


@torch.inference_mode()
def cross_entropy(model: LanguageModel, corpus: Corpus, *, rows: int, block_length: int = 1) -> float:
    """Mean negative log-likelihood of a token of the first ``rows`` rows, in nats.

    For a diffusion model: of a masked token, where each is masked with probability 1/2 and sees the
    unmasked ones of its block and all earlier blocks. For an autoregressive one: of the next token. The end
    of text, and what fills a document's last block up, are easy and not counted.
    """
    total, count = 0.0, 0
    every = _rows(model, corpus, rows=rows, multiple=block_length)
    for row in range(every.shape[0]):
        inputs = _inputs(model, _row(every, row), block_length)
        counted = inputs.targets != model.config.eos_token_id
        hidden_MD = model.hidden(inputs.ids, inputs.metadata).flatten(0, 1)[inputs.predict][counted]
        total += float(token_nll(hidden_MD, model.logits, inputs.targets[counted]).sum())
        count += int(counted.sum())
    return total / count


def _rows(model: LanguageModel, corpus: Corpus, *, rows: int, multiple: int) -> PackedRows:
    places = lay_out(
        corpus.once_through, corpus.lengths, first_ordinal=0, rows=rows, length=LENGTH, multiple=multiple
    )
    return make_rows(
        places,
        corpus,
        rank=0,
        world=1,
        responses_only=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )


def _row(rows: PackedRows, number: int) -> PackedRows:
    one = slice(number, number + 1)
    return PackedRows(
        ids=rows.ids[one],
        document=rows.document[one],
        position=rows.position[one],
        supervised=rows.supervised[one],
        ordinal=rows.ordinal[one],
    )


def _inputs(model: LanguageModel, rows: PackedRows, block_length: int) -> ModelInputs:
    if model.causal:
        return layout.causal(rows)
    corruption = noise.corrupt(rows, HALF, seed=NOISE_SEED, block_length=block_length)
    return layout.two_copy(
        rows, corruption, block_length=block_length, mask_token_id=model.mask_token_id, flat=True
    )


def answer(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, block_length: int, threshold: float
) -> list[Generation]:
    """What the diffusion model says to ``prompts``."""
    params = DecodingParams(
        max_new_tokens=NEW_TOKENS,
        block_length=block_length,
        threshold=threshold,
        eos_token_id=model.config.eos_token_id,
        mask_token_id=model.mask_token_id,
    )
    return generate(model, prompts, params, rows=len(prompts))


def answer_greedily(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    """What the autoregressive model says to ``prompts``."""
    return generate_greedily(
        model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=model.config.eos_token_id
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How fast a model answered, and how good its answers are."""

    tpf: float
    """Tokens per forward pass, all passes counted: prefill, denoising, and keeping a finished block."""
    tpf_denoise: float
    """The same over denoising passes alone."""
    nll: float
    """How unlikely the autoregressive original finds the answers: nats per token."""
    known_words: float
    """The share of words that occur in the training data."""
    distinct_pairs: float
    """The share of pairs of neighbouring words that are not repetitions inside the answer."""
    tokens: float
    """Mean length, the end of text not counted."""


def judge(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Generation],
    *,
    original: LanguageModel,
    tokenizer: Tokenizer,
    vocabulary: frozenset[str],
) -> Answers:
    """Score ``answers`` to ``prompts``; ``vocabulary`` has the words of the training data."""
    kept = [one.token_ids[: one.kept_tokens] for one in answers]
    texts = [words(tokenizer.decode(ids)) for ids in kept]
    said = [word for text in texts for word in text]
    pairs = [list(zip(text, text[1:], strict=False)) for text in texts]
    denoise = sum(one.usage.denoise for one in answers)
    others = sum(one.usage.prefill + one.usage.persist for one in answers)
    tokens = sum(map(len, kept))
    return Answers(
        tpf=tokens / (denoise + others),
        tpf_denoise=tokens / max(1, denoise),
        nll=_continuation_nll(original, prompts, kept),
        known_words=sum(word in vocabulary for word in said) / max(1, len(said)),
        distinct_pairs=sum(len(set(some)) for some in pairs) / max(1, sum(map(len, pairs))),
        tokens=tokens / len(answers),
    )


def words(text: str) -> list[str]:
    """The words of ``text`` in lower case."""
    return re.findall(r"[a-z]+", text.lower())


@torch.inference_mode()
def _continuation_nll(
    model: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> float:
    total, count = 0.0, 0
    for prompt, said in zip(prompts, answers, strict=True):
        if not said:
            continue
        ids = torch.tensor([[*prompt, *said]])
        position = torch.arange(ids.shape[1])[None]
        metadata = layout.AttentionMetadata.causal(position, torch.zeros_like(position))
        hidden_MD = model.hidden(ids, metadata)[0, len(prompt) - 1 : -1]
        total += float(token_nll(hidden_MD, model.logits, ids[0, len(prompt) :]).sum())
        count += len(said)
    return total / max(1, count)
