"""Pulls: which layers arrive from where, across daemons and mounts.

A *pull* is a directory that was made from a source, with a row in the catalog; each of its files began as one
arriving layer. Clones and snapshots of them name the same layers, so a pull goes on for as long as any of these is
lacking something, whatever became of the directory. Its options, JSON in the catalog:

    wait      seconds that a lost source is waited for; null: for ever. Then who touches an absent page gets EIO
    rate      bytes a second that the stream may take; 0: no limit
    paused    whether the stream stands (what is touched is fetched all the same)
"""

import contextlib
import functools
import json
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import trio

from ramfs.arrival import layer as layers
from ramfs.arrival.fetch import Arrival, Arrivals
from ramfs.arrival.known import Known
from ramfs.arrival.stream import Stream, Throttle
from ramfs.arrival.vouch import vouch
from ramfs.errors import RamfsError, SourceError, SourceLost, SourceRefused
from ramfs.image.digest import DIGEST
from ramfs.image.table import Mask
from ramfs.image.working_set import Records, batches, empty, within
from ramfs.pager import Pager
from ramfs.source.base import PageSource, SourceDirectory
from ramfs.source.manifest import File
from ramfs.source.retry import RetrySource, SourceState
from ramfs.source.verify import VerifiedSource
from ramfs.store.files import read_exactly
from ramfs.store.images import Image
from ramfs.store.layers import Layer
from ramfs.store.presence import ABSENT, ZEROS
from ramfs.units import PAGE_SHIFT, ImageId, InodeNumber, LayerId, pages

log = logging.getLogger(__name__)

#: Opens what a URI names, as a directory of sources.
Opener = Callable[[str], Awaitable[SourceDirectory]]

#: Why a pull does not go on that has no source yet.
_NOWHERE: Final = "where it comes from is not told yet: ramfs recover --source"
#: Seconds until a stream that met an error begins again.
_AGAIN: Final = 5.0
#: Pages of what guests ask for first that are streamed in the order of the file.
_FIRST: Final = 1 << 10
#: Seconds over which the rate is told.
_LATELY: Final = 2.0
#: ... and between two looks at what came.
_SAMPLE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """See the module. Stored with the pull."""

    wait: float | None = None
    rate: int = 0
    paused: bool = False


class Incoming(NamedTuple):
    """A file that is to arrive: the image that it becomes, its name at the source, and what is known of it."""

    image: Image
    name: str
    size: int
    known: Known | None
    first: Records | None = None
    """what guests ask for first, if the source tells"""
    source: PageSource | None = None
    """its source, if that is open; if digests are known, as :func:`verified` gives it"""


class Pull:
    """Layers that arrive from one source. Its URI is empty until it has one, and who needs a page waits for that."""

    def __init__(self, pulls: "Pulls", number: int, directory: InodeNumber, uri: str, options: Options) -> None:
        self.id = number
        self.directory = directory
        self.uri = uri
        self.options = options
        self.throttle = Throttle(options.rate)
        if options.paused:
            self.throttle.pause()
        self.arrivals: list[Arrival] = []
        self.trouble = ""
        """why the stream does not go on, if it does not"""
        self.verified = True
        """are all files compared with digests?"""
        self.taken = 0
        """pages that were found here when it was made"""
        self.wanted = 0
        """... and that had to be fetched"""
        self._taken = 0
        """of the files in ``arrivals``"""
        self._pulls = pulls
        self._sources: list[tuple[str, RetrySource]] = []
        self._changed = trio.Event()
        self._samples: list[tuple[float, int]] = []
        self._streaming = trio.CancelScope()

    # -- its source

    def add(
        self, layer: Layer, name: str, size: int, taken: int, first: Records | None, opened: PageSource | None = None
    ) -> None:
        """One more layer that arrives, each page compared with its digest if these were promised.

        ``taken`` pages of its file were found here, and are named where they are.
        """
        self.verified &= layer.promised
        self._taken += taken
        factory = self._factory(layer, name, size, self.uri)
        source = RetrySource(factory, self.uri, size, deadline=self.options.wait, tell=self._tell, source=opened)
        self._sources.append((name, source))
        runs = [run for batch in batches(empty() if first is None else first, size, _FIRST) for run in batch]
        arrival = Arrival(self._pulls.pager, layer, source, runs)
        self.arrivals.append(arrival)
        self._pulls.arrivals.add(arrival)

    def _factory(self, layer: Layer, name: str, size: int, uri: str) -> Callable[[], Awaitable[PageSource]]:
        async def open_source() -> PageSource:
            if not uri:
                raise SourceLost(_NOWHERE)
            directory = await self._pulls.opener(uri)
            try:
                source = await directory.open(name)
            finally:
                await directory.aclose()
            if not layer.promised:
                return source
            return await verified(source, self._pulls.pager.layers.path(layer.id, "xxh3"), size, name)

        return open_source

    def _tell(self, state: SourceState) -> None:
        if self.uri and not state.ok and state.attempts == 1:
            log.warning("pull from %s: %s; trying again", self.uri, state.error)
        elif self.uri and state.ok:
            log.info("pull from %s goes on", self.uri)

    async def switch(self, uri: str) -> None:
        """Take what is lacking from another source, which must have all files. Raises SourceError, UsageError.

        All that waits is tried again at once. After an error all is as before.
        """
        catalog = self._pulls.pager.store.catalog
        only = await self._only_name(uri) if len(self._sources) == 1 and self.uri else None
        opened: list[tuple[RetrySource, Callable[[], Awaitable[PageSource]], PageSource]] = []
        try:
            for (name, source), arrival in zip(self._sources, self.arrivals, strict=True):
                if arrival.is_arriving:
                    factory = self._factory(arrival.layer, name if only is None else only, source.size, uri)
                    opened.append((source, factory, await source.open_other(factory)))
            with catalog.transaction():
                catalog.execute("UPDATE pulls SET uri = ? WHERE id = ?", uri, self.id)
                if only is not None:
                    catalog.execute("UPDATE arriving SET name = ? WHERE pull = ?", os.fsencode(only), self.id)
            self.uri = uri
            if only is not None:
                self._sources = [(only, source) for _, source in self._sources]
            while opened:
                source, factory, other = opened.pop()
                with contextlib.suppress(SourceLost):  # all of that file came meanwhile
                    await source.use(factory, other)
        finally:
            with trio.CancelScope(shield=True):
                for _, _, other in opened:
                    await other.aclose()
        self._wake()

    async def promise(self, promises: Mapping[str, Known], uri: str) -> None:
        """Take what is lacking from another source, as :meth:`switch`, and have it compared from now on.

        ``promises`` are of its files, by their names. What is held here is named where it lies, and does not have to
        arrive. Raises SourceBroken if a page that came before is another: then all is as before, unless that was just
        coming. Or SourceError, UsageError, OSError.
        """
        pager = self._pulls.pager
        found = [
            (arrival, source, promises[name])
            for (name, source), arrival in zip(self._sources, self.arrivals, strict=True)
            if name in promises and not arrival.layer.promised
        ]
        seen = [await vouch(pager, arrival, known.digests, known.lost) for arrival, _, known in found]
        gone = await layers.promise(pager, [(arrival.layer, known) for arrival, _, known in found])
        self.verified = all(each.layer.promised for each in self.arrivals)
        for _, source, _ in found:
            await source.reopen()  # it is compared then
        await self.switch(uri)
        for (arrival, _, known), before in zip(found, seen, strict=True):
            number = arrival.layer.id
            if number in gone:
                self._taken += int(np.count_nonzero(gone[number] & known.held))
                await arrival.settle()
                await vouch(pager, arrival, pager.layers.path(number, "xxh3"), before | gone[number])

    def note_zeros(self, zeros: Mapping[str, list[tuple[int, int]]]) -> None:
        """Somebody says which runs of pages of its files, by their names, are zeros at the source. Raises OSError.

        They are not fetched then, and compared with digests that become known later, as what came before.
        """
        for (name, _), arrival in zip(self._sources, self.arrivals, strict=True):
            if name in zeros and arrival.is_arriving and not arrival.layer.promised:
                for first, stop in zeros[name]:
                    arrival.note_zeros(first, stop)

    def zeros(self) -> dict[str, Mask]:
        """Which pages of its files, by their names, are taken for zeros without a digest."""
        both = zip(self._sources, self.arrivals, strict=True)
        return {name: each.presence.states == ZEROS for (name, _), each in both if not each.layer.promised}

    def _wake(self) -> None:
        """Something has changed: a stream that met an error goes on at once."""
        self._changed.set()
        self._changed = trio.Event()

    async def _only_name(self, uri: str) -> str | None:
        """What the only file is called at another source, which has it alone: the URI tells. None if it has more."""
        directory = await self._pulls.opener(uri)
        try:
            names = await directory.names()
        except SourceRefused:  # it does not list them
            return None
        finally:
            await directory.aclose()
        return names[0] if len(names) == 1 else None

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of its files, by their names at the source."""
        return {name: source.size for name, source in self._sources}

    # -- its stream

    async def run(self) -> None:
        """Stream until nothing is lacking. Errors are told in ``trouble``, and it is tried again."""
        while not self.uri and any(each.is_arriving for each in self.arrivals):
            await self._changed.wait()
        left = sorted(self.arrivals, key=lambda each: each.source.size)
        before: set[str] = set()
        while True:
            troubles: set[str] = set()
            changed = self._changed
            for arrival in list(left):
                try:
                    await self._run(arrival)
                    left.remove(arrival)
                except Exception as exc:  # noqa: BLE001  (guests live on the daemon: nothing here ends it)
                    self._report(exc, before)
                    troubles.add(str(exc))
            if not left:
                try:
                    self._pulls.finished(self)
                    return
                except sqlite3.Error as exc:
                    self._report(exc, before)
                    troubles.add(str(exc))
            before = troubles
            with trio.move_on_after(_AGAIN):
                await changed.wait()
            self.trouble = ""  # until it is met again

    async def _run(self, arrival: Arrival) -> None:
        """Stream one file until nothing of it is lacking. Raises RamfsError, OSError, sqlite3.Error."""
        pager = self._pulls.pager
        while arrival.is_arriving:
            with trio.CancelScope() as self._streaming:
                await Stream(pager, arrival, self.throttle).run()
            await layers.complete(pager, arrival.layer)
        self._pulls.arrivals.discard(arrival.layer.id)
        with trio.CancelScope(shield=True):
            await arrival.source.aclose()

    def _report(self, exc: Exception, before: set[str]) -> None:
        """Tell why it does not go on; in the log, if it was not so ``before``."""
        self.trouble = str(exc)
        if self.trouble not in before:
            foreseen = isinstance(exc, RamfsError | OSError | sqlite3.Error)
            log.error("pull from %s: %s; trying again", self.uri, exc, exc_info=None if foreseen else exc)

    def tidy(self) -> None:
        """Stop to stream what was deleted."""
        if not any(each.is_arriving for each in self.arrivals):
            self._streaming.cancel()
            self._wake()

    # -- what people see

    def set_options(self, options: Options) -> None:
        """Change them, for later daemons too."""
        self.options = options
        self.throttle.rate = options.rate
        if options.paused:
            self.throttle.pause()
        else:
            self.throttle.resume()
        self._pulls.pager.store.catalog.execute(
            "UPDATE pulls SET options = ? WHERE id = ?", json.dumps(_as_json(options)), self.id
        )
        self._wake()

    def status(self) -> dict[str, Any]:
        """For status.json; docs/format.md names the fields."""
        total = here = zero = 0
        for arrival in self.arrivals:
            states = arrival.presence.states
            total += len(states)
            here += int(np.count_nonzero(states != ABSENT))
            zero += int(np.count_nonzero(states == ZEROS))
        counts = [arrival.counts for arrival in self.arrivals]
        fetched = sum(each.fetched_bytes for each in counts)
        bad = [source.state for _, source in self._sources if not source.state.ok]
        full = next((arrival.trouble for arrival in self.arrivals if arrival.trouble), "")
        state = "arriving"
        error = full or self.trouble
        if not self.uri:
            state, error = "waiting", _NOWHERE
        elif bad:
            state, error = "waiting", str(bad[0].error)
        elif error:
            state = "waiting"
        elif self.options.paused:
            state = "paused"
        faults = sum(each.demand_faults for each in counts)
        return {
            "id": self.id,
            "source": self.uri,
            "state": state,
            "error": error,
            "since": min((each.since for each in bad), default=None),
            "attempts": sum(each.attempts for each in bad),
            "verified": self.verified,
            "wait": self.options.wait,
            "rate": self.options.rate,
            "total_bytes": total << PAGE_SHIFT,
            "here_bytes": here << PAGE_SHIFT,
            "zero_bytes": (zero - self._taken) << PAGE_SHIFT,
            "taken_bytes": self._taken << PAGE_SHIFT,
            "first_bytes": self.first_bytes,
            "fetched_bytes": fetched,
            "bytes_per_second": self._rate(),
            "demand_faults": faults,
            "demand_seconds": round(sum(each.demand_seconds for each in counts), 6),
            "demand_slowest_seconds": round(max((each.slowest for each in counts), default=0.0), 6),
        }

    @property
    def first_bytes(self) -> int:
        """What is lacking of what guests ask for first."""
        return sum(arrival.first_lacking() for arrival in self.arrivals) << PAGE_SHIFT

    def sample(self) -> None:
        """Have a look at how much was fetched by now, for the rate."""
        now = time.monotonic()
        fetched = sum(arrival.counts.fetched_bytes for arrival in self.arrivals)
        self._samples = [each for each in self._samples if each[0] > now - _LATELY] + [(now, fetched)]

    def _rate(self) -> int:
        self.sample()
        (began, before), (end, after) = self._samples[0], self._samples[-1]
        return int((after - before) / (end - began)) if end > began else 0


class Pulls:
    """All pulls of a store that still lack something."""

    def __init__(self, pager: Pager, arrivals: Arrivals, opener: Opener) -> None:
        self.pager = pager
        self.arrivals = arrivals
        self.opener = opener
        self.running: list[Pull] = []
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Go on with those of before, and with new ones, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for pull in self.running:
                nursery.start_soon(pull.run)
            while True:
                await trio.sleep(_SAMPLE)
                for pull in self.running:
                    pull.sample()

    def restore(self) -> None:
        """Take up what another daemon, or mount, has left. Before any request is answered."""
        catalog = self.pager.store.catalog
        for row in catalog.execute("SELECT * FROM pulls").fetchall():
            options = Options(**json.loads(row["options"]))
            pull = Pull(self, row["id"], InodeNumber(row["directory"]), row["uri"], options)
            for layer in catalog.execute("SELECT * FROM arriving WHERE pull = ?", row["id"]).fetchall():
                number = LayerId(layer["layer"])
                sets = map(self.pager.images.working_set, sorted(self.pager.images.naming({number})))
                first = next((each for each in sets if each is not None), None)
                pull.add(self.pager.layers[number], os.fsdecode(layer["name"]), layer["size"], layer["taken"], first)
            self.running.append(pull)

    def begin(self, directory: InodeNumber, uri: str, options: Options, files: list[Incoming]) -> Pull:
        """Let images, empty until now, have all that the source has. Call in a transaction; then :meth:`start`."""
        catalog = self.pager.store.catalog
        number = catalog.insert(
            "INSERT INTO pulls (directory, uri, options, created) VALUES (?, ?, ?, ?)",
            directory, uri, json.dumps(_as_json(options)), time.time_ns(),
        )  # fmt: skip
        pull = Pull(self, number, directory, uri, options)
        for each in files:
            layer, taken = layers.begin(self.pager, each.image, each.size, each.known) if each.size else (None, 0)
            pull.taken += taken
            if layer is None:
                continue
            catalog.execute(
                "INSERT INTO arriving VALUES (?, ?, ?, ?, ?, ?)",
                layer.id, number, os.fsencode(each.name), each.size, layer.promised, taken,
            )  # fmt: skip
            catalog.on_rollback(functools.partial(self.arrivals.discard, layer.id))
            assert layer.presence is not None
            pull.wanted += int(np.count_nonzero(layer.presence.states == ABSENT))
            pull.add(layer, each.name, each.size, taken, each.first, each.source)
            if each.first is not None:
                self.pager.images.keep_working_set(each.image.id, within(each.first, each.size))
        return pull

    def start(self, pull: Pull) -> None:
        """Let a new pull stream."""
        self.running.append(pull)
        if self._nursery is not None:
            self._nursery.start_soon(pull.run)

    def finished(self, pull: Pull) -> None:
        """Nothing is lacking any more."""
        self.pager.store.catalog.execute("DELETE FROM pulls WHERE id = ?", pull.id)
        self.running.remove(pull)
        log.info("all of %s is here", pull.uri)

    def tidy(self) -> None:
        """After garbage was collected: let go of what is not wanted any more."""
        for pull in self.running:
            pull.tidy()

    def of_images(self, numbers: Collection[ImageId]) -> list[Pull]:
        """The pulls that something of these images is still to arrive from."""
        images, left = self.pager.images, list(self.running)
        found: list[Pull] = []
        for number in numbers:
            if not left:
                break
            image = images.acquire(number)
            try:
                lacking = layers.lacking(self.pager, image)
            finally:
                images.release(image)
            found += [pull for pull in left if any(each.layer.id in lacking for each in pull.arrivals)]
            left = [pull for pull in left if pull not in found]
        return sorted(found, key=lambda pull: pull.id)

    def status(self) -> list[dict[str, Any]]:
        """For status.json."""
        return [pull.status() for pull in self.running]


async def verified(source: PageSource, path: str, size: int, name: str) -> PageSource:
    """The same, each page compared with its digest in the file ``path``. Raises SourceError; then it is closed."""
    try:
        return VerifiedSource(source, await trio.to_thread.run_sync(_read_digests, path, size), name)
    except BaseException:
        with trio.CancelScope(shield=True):
            await source.aclose()
        raise


def _read_digests(path: str, size: int) -> File:
    """The digests that the pages of a layer were promised to have (any thread). Raises SourceError."""
    length = pages(size) * DIGEST
    try:
        with open(path, "rb", buffering=0) as file:
            data = read_exactly(file.fileno(), length, 0)
    except OSError as exc:
        raise SourceError(f"the digests that were promised cannot be read: {exc}") from exc
    if len(data) != length:
        raise SourceError(f"{path} has lost digests that were promised")
    return File(size, np.frombuffer(data, np.uint8).reshape(-1, DIGEST))


def _as_json(options: Options) -> dict[str, Any]:
    return {"wait": options.wait, "rate": options.rate, "paused": options.paused}
