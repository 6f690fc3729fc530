"""The picture of a generation in progress: what is final, what is provisional, what is still masked."""

from dataclasses import dataclass

from unmask.client.events import BlockCommitted, CanvasUpdate, Event, Finished

__all__ = ["Canvas", "Cell"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One position of the block in the making."""

    text: str | None
    """None while it is masked."""
    confidence: float


MASKED = Cell(None, 0.0)


class Canvas:
    """Follows a stream's events.

    Attributes:
        text: The final text so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self._cells: dict[int, Cell] = {}
        self._end = 0  # position after the current block's last
        self._committed = 0

    @property
    def cells(self) -> list[Cell]:
        """The current block's positions that are not final, in order."""
        return [self._cells.get(place, MASKED) for place in range(self._committed, self._end)]

    def take(self, event: Event) -> None:
        """Bring the picture up to date."""
        match event:
            case CanvasUpdate():
                for fill in event.fills:
                    self._cells[fill.position] = Cell(fill.text, fill.confidence)
                self._end = event.block_end
            case BlockCommitted():
                self.text += event.text
                self._committed = self._end = event.offset + len(event.token_ids)
                self._cells.clear()
            case Finished():
                self.text += event.text
