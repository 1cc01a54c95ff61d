"""Where generation ends by what it says."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string in text that arrives in pieces.

    The first is the one that is complete first, so it does not matter how the text is cut; of two
    that are complete at once it is the longer.  Text that may yet turn out to be part of a stop
    string is held back.
    """

    def __init__(self, stops: Sequence[str], include_stop_str_in_output: bool = False):
        self._stops = tuple(stops)
        self._include = include_stop_str_in_output
        self._held = ""
        self._stopped = False

    def push(self, text: str, pending: str = "") -> tuple[str, str | None]:
        """Take a piece; returns what may be shown of all pieces, and the stop string found, if any.

        pending: text that is not final only because more tokens may come (see
            `IncrementalDecoder.pending`); if it completes a stop string, none need to.
        After a stop string all text is dropped.
        """
        if self._stopped:
            return "", None
        text = self._held + text
        found = self._first(text) or (self._first(text + pending) if pending else None)
        if found is not None:
            end, start, stop = found
            self._held, self._stopped = "", True
            return (text + pending)[: end if self._include else start], stop
        safe = self._safe(text)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, int, str] | None:
        """End, start and string of the first stop string in `text`."""
        starts = [(text.find(stop), stop) for stop in self._stops]
        return min(
            ((start + len(stop), start, stop) for start, stop in starts if start >= 0), default=None
        )

    def _safe(self, text: str) -> int:
        """How much of a text without stop strings cannot be part of one, whatever follows."""
        safe = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < safe:
                if stop.startswith(text[start:]):
                    safe = start
                start = text.find(stop[0], start + 1)
        return safe
