"""Removes what a model that was asked to go on says twice: the longest end of the text sent that it begins with."""

from __future__ import annotations

WINDOW_CHARS = 4096
"""So much of the end of what was sent is compared, and at most so much is held back."""
LEAST_CHARS = 8
"""A shorter match is chance: "hel" and "lo" share an l, and nothing was said twice."""


class Overlap:
    """Feed it the text that comes; it gives back what is new. Nothing is held once no longer match is possible.

    `sent` is what the client has. A match counts from `least` characters on, or when it is all that was sent. Text is
    compared by characters, so none is ever cut in two.
    """

    def __init__(self, sent: str, least: int = LEAST_CHARS) -> None:
        self._tail = sent[-WINDOW_CHARS:]
        self._least = max(1, min(least, len(self._tail)))
        self._held: str | None = ""
        """What may yet be part of a repetition; None once that is settled."""

    def feed(self, text: str) -> str:
        if self._held is None:
            return text
        self._held += text
        if self._held in self._tail[:-1]:  # more of the tail follows there: a longer match is possible
            return ""
        return self.end()

    def end(self) -> str:
        """What is still held, less what was said twice: nothing more is to come, or nothing longer can match."""
        held, self._held = self._held or "", None
        for size in range(min(len(self._tail), len(held)), self._least - 1, -1):
            if self._tail.endswith(held[:size]):
                return held[size:]
        return held
