"""Where a text ends because the request says so: at one of its stop strings, or one of its stop tokens.

Strings are looked for in the text, not in tokens, wherever tokens and blocks meet. What might yet become a
stop string is held back until it does or cannot any more, so nothing of one is ever sent.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from unmask.serving.text import Decodes, TextStream

__all__ = ["Piece", "StoppableText"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What some tokens add to a text."""

    text: str
    tokens: int
    """How many of them belong to it, the one that ends it included."""
    stop: str | int | None = None
    """The string or token that ends it."""


class StoppableText:
    """Turns tokens into text as they come, up to a stop."""

    def __init__(
        self, tokenizer: Decodes, *, strings: Collection[str] = (), token_ids: Collection[int] = ()
    ) -> None:
        """Stop at any of ``strings``, none of which is empty, and any of ``token_ids``."""
        self._stream = TextStream(tokenizer)
        self._strings, self._token_ids = tuple(strings), frozenset(token_ids)
        self._held = ""

    def push(self, ids: Sequence[int]) -> Piece:
        """What ``ids`` add to the text; nothing may be pushed after a stop."""
        for place, token in enumerate(ids):
            if token in self._token_ids:
                before = self._pushed(ids[:place])
                if before.stop is not None:
                    return before
                return Piece(text=before.text + self.finish(), tokens=place + 1, stop=token)
        return self._pushed(ids)

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held + self._stream.finish(), ""
        found = self._found(held)
        return held if found is None else held[: found[0]]

    def _pushed(self, ids: Sequence[int]) -> Piece:
        if not self._strings:
            return Piece(text=self._stream.push(ids), tokens=len(ids))
        sent = ""
        for place, token in enumerate(ids):
            self._held += self._stream.push([token])
            if (found := self._found(self._held)) is not None:
                start, stop = found
                sent, self._held = sent + self._held[:start], ""
                return Piece(text=sent, tokens=place + 1, stop=stop)
            ready = len(self._held) - self._pending()
            sent, self._held = sent + self._held[:ready], self._held[ready:]
        return Piece(text=sent, tokens=len(ids))

    def _found(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string begins, and which it is: of those that begin there, the longest."""
        places = [(text.find(string), -len(string), string) for string in self._strings if string in text]
        return (min(places)[0], min(places)[2]) if places else None

    def _pending(self) -> int:
        """Characters at the end of what is held that may be the beginning of a stop string."""
        longest = max(map(len, self._strings)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._strings):
                return length
        return 0
