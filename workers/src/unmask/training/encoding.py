"""A record as token ids: what is given, what is learnt, and what an evaluation accepts.

Every document ends with the end of text, unless its text already does, or it came as tokens: those stay
as they are. The prompt of a
completion is a user's turn where the tokenizer has a chat template, so that a model is
asked later in the form it was taught in; otherwise it is the plain text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from unmask.errors import DataError, ModelError
from unmask.models.conversation import Tool, Turn
from unmask.models.tokenizer import Tokenizer
from unmask.training.records import Completion, Document, Messages, Preference, Text, Tokens

__all__ = [
    "ENCODING_VERSION",
    "Encoded",
    "Question",
    "encode",
    "encode_pair",
    "encode_texts",
    "prompt_ids",
    "question",
]

ENCODING_VERSION = 2
"""To be raised when the same record gives other tokens than before: what is cached is then encoded anew."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document."""

    ids: list[int]
    prompt_length: int
    """Tokens before the (first) answer; 0 where the whole document is learnt."""
    turns: tuple[tuple[int, int], ...] = ()
    """First token of each answer, and the one after its last, where every turn is one."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answers, end of text left out, that count as right."""

    prompt: list[int]
    answers: tuple[list[int], ...]


def encode(record: Document, tokenizer: Tokenizer, *, eos_token_id: int, turns: bool = False) -> Encoded:
    """The tokens of ``record``, end of text included.

    With ``turns``, every turn of the assistant is an answer, and not only the last.

    Raises:
        UsageError: The text is not valid Unicode, or the chat template refuses the conversation.
        ModelError: Conversations are to be read, and the tokenizer has no chat template.
        DataError: The record has tokens that the tokenizer lacks, or learns what ``turns`` alone can.
    """
    if turns and isinstance(record, Messages):
        return _encoded_turns(record, tokenizer, eos_token_id)
    match record:
        case Tokens():
            return _encoded_tokens(record, tokenizer, turns=turns)
        case Text(text=text):
            prompt, answer = [], tokenizer.encode(text)
        case Completion(prompt=asked, completion=completion):
            prompt, answer = prompt_ids(asked, tokenizer), tokenizer.encode(completion)
        case Messages(messages=messages, tools=tools):
            before, after = _split(messages, tokenizer, tools)
            prompt, answer = tokenizer.encode(before), tokenizer.encode(after)
    ids = prompt + _ended(answer, eos_token_id)
    return Encoded(ids, len(prompt), ((len(prompt), len(ids)),) if turns else ())


def encode_texts(
    records: Sequence[Text], tokenizer: Tokenizer, *, eos_token_id: int, turns: bool = False
) -> list[Encoded]:
    """:func:`encode` of each, on all processors."""
    found = []
    for ids in tokenizer.encode_many([record.text for record in records]):
        if not ids or ids[-1] != eos_token_id:
            ids.append(eos_token_id)
        found.append(Encoded(ids, 0, ((0, len(ids)),) if turns else ()))
    return found


def _encoded_tokens(record: Tokens, tokenizer: Tokenizer, *, turns: bool) -> Encoded:
    ids, learnt = list(record.ids), record.learnt
    if max(ids) >= tokenizer.vocab_size:
        place = next(place for place, one in enumerate(ids) if one >= tokenizer.vocab_size)
        raise DataError(
            f'"input_ids"[{place}] is {ids[place]}, but the tokenizer has ids up to '
            f"{tokenizer.vocab_size - 1}; tokenise with the model's own tokenizer"
        )
    if learnt is None:
        learnt = (True,) * len(ids)
    changes = [place + 1 for place, (one, other) in enumerate(pairwise(learnt)) if one != other]
    edges = [*([0] if learnt[0] else []), *changes, *([len(ids)] if learnt[-1] else [])]
    answers = tuple(zip(edges[::2], edges[1::2], strict=True))
    if turns:
        return Encoded(ids, answers[0][0], answers)
    if len(answers) > 1 or answers[0][1] != len(ids):
        raise DataError(
            "tokens that are given follow tokens that are learnt, which stages with supervise: AllTurns "
            "alone can learn; set that, or drop loss_mask and labels"
        )
    return Encoded(ids, answers[0][0])


def encode_pair(record: Preference, tokenizer: Tokenizer, *, eos_token_id: int) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected answer behind the same prompt, both ended; raises as :func:`encode`."""
    prompt, chosen, rejected = _answers(record, tokenizer)
    both = (Encoded(prompt + _ended(answer, eos_token_id), len(prompt)) for answer in (chosen, rejected))
    return next(both), next(both)


def _answers(record: Preference, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected answer."""
    if isinstance(record.prompt, str):
        ids = [tokenizer.encode(answer) for answer in (record.chosen, record.rejected)]
        return prompt_ids(record.prompt, tokenizer), ids[0], ids[1]
    halves = [
        _split([*record.prompt, {"role": "assistant", "content": answer}], tokenizer)
        for answer in (record.chosen, record.rejected)
    ]
    return tokenizer.encode(halves[0][0]), tokenizer.encode(halves[0][1]), tokenizer.encode(halves[1][1])


def question(
    record: Completion | Messages | Preference, tokenizer: Tokenizer, *, eos_token_id: int
) -> Question:
    """What to ask, and what to compare the answer with; raises as :func:`encode`."""
    if isinstance(record, Completion):
        answers = [tokenizer.encode(answer) for answer in record.accepted]
        prompt = prompt_ids(record.prompt, tokenizer)
    elif isinstance(record, Preference):
        prompt, chosen, _ = _answers(record, tokenizer)
        answers = [chosen]
    else:
        before, after = _split(record.messages, tokenizer, record.tools)
        prompt, answers = tokenizer.encode(before), [tokenizer.encode(after)]
    return Question(prompt, tuple(_before_end(answer, eos_token_id) for answer in answers))


def prompt_ids(text: str, tokenizer: Tokenizer, *, chat: bool | None = None) -> list[int]:
    """The tokens of a question, as a user's turn if ``chat``; left out, if there is a chat template."""
    if tokenizer.has_chat_template if chat is None else chat:
        text = tokenizer.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)
    return tokenizer.encode(text)


def _encoded_turns(record: Messages, tokenizer: Tokenizer, eos_token_id: int) -> Encoded:
    """A conversation cut before and after each answer, so that no token holds a piece of two turns."""
    ids: list[int] = []
    turns = []
    known = ""
    for number, message in enumerate(record.messages):
        if message["role"] == "assistant":
            before, after = _split(record.messages[: number + 1], tokenizer, record.tools)
            if not before.startswith(known):
                raise ModelError(
                    "the chat template does not write a conversation as its beginning plus what follows; "
                    "use supervise: LastTurn or another template"
                )
            ids += tokenizer.encode(before.removeprefix(known))
            answer = tokenizer.encode(after)
            turns.append((len(ids), len(ids) + len(answer)))
            ids += answer
            known = before + after
    if ids[-1] != eos_token_id:
        ids.append(eos_token_id)
        turns[-1] = (turns[-1][0], len(ids))
    return Encoded(ids, turns[0][0], tuple(turns))


def _split(messages: Sequence[Turn], tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> tuple[str, str]:
    """The conversation up to the last answer, and that answer as the template writes it."""
    whole = tokenizer.render_chat(messages, add_generation_prompt=False, tools=tools)
    before = tokenizer.render_chat(messages[:-1], add_generation_prompt=True, tools=tools)
    if not whole.startswith(before):
        raise ModelError(
            "the chat template does not write a conversation as its beginning plus the answer; "
            "use data of format completion or another template"
        )
    return before, whole.removeprefix(before)


def _ended(answer: list[int], eos_token_id: int) -> list[int]:
    return answer if answer and answer[-1] == eos_token_id else [*answer, eos_token_id]


def _before_end(ids: list[int], eos_token_id: int) -> list[int]:
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
