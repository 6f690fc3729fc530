"""The text of a growing token sequence, without ever splitting a character.

A character may span tokens, and its tokens may lie in different blocks. Until its last byte is there a
tokenizer decodes it as U+FFFD, so trailing ones are held back until a later token completes the character,
shows that the model really wrote something undecodable, or the text ends.
"""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decodes", "TextStream"]

_INCOMPLETE = "\ufffd"


class Decodes(Protocol):
    """The one thing needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""


class TextStream:
    """Turns tokens into text as they come: the pieces joined are the whole text.

    The last tokens whose text was sent in full are decoded again in front of new ones, since many tokenizers
    write the first token of a text differently (without its leading space). The cost of a piece does not
    grow with the length of the text.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were sent

    def push(self, ids: Sequence[int]) -> str:
        """What ``ids`` add to the text."""
        self._window.extend(ids)
        text = self._tokenizer.decode(self._window)
        complete = text.rstrip(_INCOMPLETE)
        piece = complete[self._sent :]
        self._sent = max(self._sent, len(complete))
        if complete == text:
            self._slide(ids)
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._tokenizer.decode(self._window)[self._sent :]
        self._sent += len(piece)
        return piece

    def _slide(self, ids: Sequence[int]) -> None:
        """Keep the last tokens only, if they have a text of their own to stand in front of the next."""
        length = len(self._tokenizer.decode(ids))
        if length:
            self._window = list(ids)
            self._sent = length
