"""Counts of what the daemon did, cheap enough for the hot path: plain integer attributes; and what took long."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Final


@dataclass(slots=True)
class Counters:
    """Since the mount began. Bytes where the name says so, requests elsewhere."""

    reads: int = 0
    read_bytes: int = 0
    reads_ahead: int = 0
    """of these, those that were for what a guest has not asked for yet (fuse/working_sets.py)"""
    read_ahead_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    shared_ranges: int = 0
    shared_bytes: int = 0
    punched_ranges: int = 0
    punched_bytes: int = 0
    snapshots: int = 0
    clones: int = 0
    syncs: int = 0
    errors: int = 0
    garbage_passes: int = 0
    dropped_pages: int = 0


class Slowest:
    """The requests that took long of late. Those that are answered at once, without an await, never do."""

    #: Seconds from which on one is remembered, for how long it is told, and how many of them.
    WORTH: Final = 0.001
    _RECENT: Final = 60.0
    _TOLD: Final = 8

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, str]] = deque(maxlen=512)

    def note(self, request: str, begun: float) -> None:
        """A request has been answered that began at a time of time.monotonic."""
        now = time.monotonic()
        if now - begun >= self.WORTH:
            self._seen.append((now - begun, now, request))

    def told(self) -> list[dict[str, str | float]]:
        """The slowest of the last minute, the slowest first: ``request``, ``seconds``, and how long ``ago``."""
        now = time.monotonic()
        recent = sorted((each for each in self._seen if now - each[1] < self._RECENT), reverse=True)[: self._TOLD]
        return [
            {"request": request, "seconds": round(seconds, 6), "ago": round(now - at, 3)}
            for seconds, at, request in recent
        ]
