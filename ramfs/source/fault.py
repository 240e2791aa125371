"""A source that fails on purpose, for drills and tests: a wrapper, described by a line of text.

    fault:error=0.01,delay=5ms,corrupt=page17:nbd://host/

| word | what happens |
|---|---|
| ``error=P`` | a read fails with SourceError, with probability P (0 to 1) |
| ``lost=P`` | the connection is lost: that read, all others under way and all later ones raise SourceLost |
| ``short=P`` | as lost, when half of the bytes are there |
| ``delay=T`` or ``delay=T-T`` | each read takes so much longer, at random between the two: ``5ms``, ``0.1s`` |
| ``corrupt=P`` | one bit of a read is wrong, with probability P |
| ``corrupt=pageN`` | one bit of page N is wrong, each time |
| ``down=N``, ``down=N-M``, ``down=N-`` | the Nth (to Mth, and all later) opening of a file raises SourceLost |
| ``vanish=...`` | the same with SourceRefused: the export is gone |
| ``resize=...`` | the same, but opened, and 4096 bytes shorter |
| ``seed=N`` | what is random is the same each time, for the same calls in the same order; 0 by default |

A manifest is read without faults, or every drill would end with it. ``corrupt`` touches the bytes, so the buffer
must be ordinary memory.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import trio

from ramfs.errors import SourceError, SourceLost, SourceRefused, UsageError
from ramfs.source.base import Extent, PageSource, SourceDirectory
from ramfs.source.manifest import NAME
from ramfs.units import PAGE

PREFIX: Final = "fault:"
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(slots=True)
class Faults:
    """What goes wrong, and how often so far. One object for all openings of a directory's files."""

    error: float = 0.0
    lost: float = 0.0
    short: float = 0.0
    corrupt: float = 0.0
    delay: tuple[float, float] = (0.0, 0.0)
    """seconds, from and to"""
    corrupt_pages: set[int] = field(default_factory=set)
    down: range = range(0)
    vanish: range = range(0)
    resize: range = range(0)
    seed: int = 0
    rng: random.Random = field(init=False)
    openings: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    """faults so far, by the word"""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    @classmethod
    def parse(cls, text: str) -> tuple["Faults", str]:
        """Take ``fault:WORDS:REST`` apart: the faults, and REST. Raises UsageError."""
        words, colon, rest = text.removeprefix(PREFIX).partition(":")
        if not text.startswith(PREFIX) or not colon or not rest:
            raise UsageError(f"{text!r} is not of the form fault:WORD=VALUE,...:SOURCE")
        faults = cls()
        for word in filter(None, words.split(",")):
            key, _, value = word.partition("=")
            try:
                faults._set(key, value)
            except (ValueError, OverflowError):
                raise UsageError(f"{word!r} is no fault: see `error=0.01`, `delay=5ms`, `corrupt=page17`") from None
        faults.rng = random.Random(faults.seed)
        return faults, rest

    def _set(self, key: str, value: str) -> None:
        if key == "seed":
            self.seed = int(value)
        elif key == "delay":
            low, _, high = value.partition("-")
            self.delay = (_seconds(low), _seconds(high or low))
        elif key == "corrupt" and value.startswith("page"):
            self.corrupt_pages.add(int(value.removeprefix("page")))
        elif key in ("error", "lost", "short", "corrupt"):
            setattr(self, key, _probability(value))
        elif key in ("down", "vanish", "resize"):
            setattr(self, key, _numbers(value))
        else:
            raise ValueError(key)

    def happens(self, word: str) -> bool:
        """Does it happen now? Only what is wanted at all draws a number."""
        wanted: float = getattr(self, word)
        if not wanted or self.rng.random() >= wanted:
            return False
        self.happened[word] += 1
        return True

    def spoil(self, offset: int, buffer: memoryview) -> None:
        """Turn bits of what was read."""
        end = offset + len(buffer)
        places = [max(page * PAGE, offset) for page in self.corrupt_pages if offset < (page + 1) * PAGE]
        wrong = [place - offset for place in places if place < end]
        self.happened["corrupt"] += len(wrong)
        if self.happens("corrupt"):
            wrong.append(self.rng.randrange(len(buffer)))
        for at in wrong:
            buffer[at] ^= 1


class FaultSource:
    """A source of which some reads fail."""

    def __init__(self, source: PageSource, faults: Faults, *, size: int | None = None) -> None:
        """``size`` is what it pretends to have."""
        self._source = source
        self._faults = faults
        self.size = source.size if size is None else size
        self._lost = False
        self._reading: set[trio.CancelScope] = set()

    @property
    def description(self) -> str:
        """What the source is."""
        return self._source.description

    @property
    def maximum(self) -> int:
        """As the source."""
        return self._source.maximum

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill ``buffer``, or do not."""
        faults = self._faults
        with trio.CancelScope() as scope:
            self._check()
            self._reading.add(scope)
            try:
                if faults.delay[1]:
                    await trio.sleep(faults.rng.uniform(*faults.delay))
                if faults.happens("error"):
                    raise SourceError(f"{self.description}: an error on purpose, at byte {offset}")
                if faults.happens("lost"):
                    self._lose()
                half = len(buffer) // 2
                if half and faults.happens("short"):
                    await self._source.read_into(offset, buffer[:half], urgent=urgent)
                    self._lose()
                await self._source.read_into(offset, buffer, urgent=urgent)
                faults.spoil(offset, buffer)
            finally:
                self._reading.discard(scope)
        if scope.cancelled_caught:
            self._check()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As the source."""
        self._check()
        return await self._source.extents(offset, length)

    async def aclose(self) -> None:
        """Close the source."""
        self._end()
        await self._source.aclose()

    def _check(self) -> None:
        if self._lost:
            raise SourceLost(f"{self.description}: the connection is lost")

    def _end(self) -> None:
        self._lost = True
        for scope in self._reading:
            scope.cancel()

    def _lose(self) -> None:
        self._end()
        self._check()


class FaultDirectory:
    """A directory whose sources fail."""

    def __init__(self, directory: SourceDirectory, faults: Faults) -> None:
        self._directory = directory
        self._faults = faults

    @property
    def description(self) -> str:
        """What the directory is."""
        return self._directory.description

    async def names(self) -> list[str]:
        """As the directory."""
        return await self._directory.names()

    async def open(self, name: str) -> PageSource:
        """Open one, if it is not down or gone this time."""
        if name == NAME:
            return await self._directory.open(name)
        faults = self._faults
        faults.openings[name] += 1
        count = faults.openings[name]
        if count in faults.down:
            raise SourceLost(f"{name}: the server is down on purpose")
        if count in faults.vanish:
            raise SourceRefused(f"{name}: the export is gone on purpose")
        source = await self._directory.open(name)
        size = max(source.size - PAGE, 0) if count in faults.resize else None
        return FaultSource(source, faults, size=size)

    async def aclose(self) -> None:
        """Close the directory."""
        await self._directory.aclose()


def _seconds(text: str) -> float:
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * _UNITS[found[2]]


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _numbers(text: str) -> range:
    """``2``, ``2-4`` or ``2-``."""
    first, dash, last = text.partition("-")
    return range(int(first), int(last) + 1 if last else int(first) + 1 if not dash else 1 << 62)
