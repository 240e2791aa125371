"""``ramfs pull`` in the daemon: connects, makes the directory, and leaves the rest to arrival/.

When somebody ends it before the directory is there nothing is left; after that the pull goes on.
"""

import contextlib
import errno
import functools
import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import trio

from ramfs.arrival.fetch import together
from ramfs.arrival.known import Known, new_path
from ramfs.arrival.pulls import Incoming, Options, Pull, Pulls, verified
from ramfs.errors import FileError, SourceBroken, SourceLost, SourceRefused
from ramfs.fuse.extension import pyfuse3
from ramfs.fuse.jobs import Job
from ramfs.fuse.layouts import fetch_layout, plant_layout
from ramfs.fuse.like import Likeness, like_path, newest_like
from ramfs.image import working_set
from ramfs.image.table import Mask
from ramfs.image.working_set import Records
from ramfs.inspect import layout
from ramfs.inspect.layout import Layout
from ramfs.namespace import Caller, Namespace
from ramfs.pager import Pager
from ramfs.source.base import PageSource, SourceDirectory, read_whole, size_of
from ramfs.source.manifest import NAME, File, Manifest, fetch_manifest
from ramfs.source.opening import names_one
from ramfs.store.images import Image
from ramfs.units import MAX_FILE_SIZE, PAGE, PAGE_SHIFT, is_path

log = logging.getLogger(__name__)

#: The file of an export that has no name, the default of many servers.
UNNAMED: Final = "default"
#: Names that lead to something else than a file.
_RESERVED: Final = {b".snap", b".guest", b".ramfs"}
#: Files that a source is asked for at once; where there are no more of them, each stays open for its stream.
_AT_ONCE: Final = 8
#: Files of one pull, at most.
_MOST_FILES: Final = 10_000


class Request(NamedTuple):
    """What is to be pulled, to where. ``parent`` is a path from the root of the mount."""

    uri: str
    parent: bytes
    name: bytes
    options: Options
    like: bytes | bool = True
    """a path to a generation of it that is here; True: the newest one by its name, if any; False: none"""
    sizes: dict[str, int] | None = None
    """bytes of the files that will be told later where they come from; then there is no URI"""


class _Found(NamedTuple):
    """A file at the source: what it is called there, its bytes, and its digests where they are known."""

    name: str
    size: int
    file: File | None


class Pulling(Job):
    """One directory on its way into being."""

    def __init__(self, pulls: Pulls, namespace: Namespace, request: Request, caller: Caller) -> None:
        super().__init__()
        self._pulls = pulls
        self._namespace = namespace
        self._request = request
        self._caller = caller
        self._working_sets: Mapping[bytes, Records] = {}
        self._layout = Layout()
        self._opened: dict[str, PageSource] = {}

    async def work(self) -> None:
        """Make the directory."""
        try:
            await self._work()
        finally:
            with trio.CancelScope(shield=True):
                for source in self._opened.values():
                    await source.aclose()

    async def _work(self) -> None:
        if (sizes := self._request.sizes) is not None:
            paths = {path: path for path in sorted(sizes)}
            _check_paths(paths, len(paths), "what is to arrive")
            await self._make({path: _Found(path, sizes[path], None) for path in paths})
            return
        directory = await self._pulls.opener(self._request.uri)
        try:
            files = await self._look(directory)
        finally:
            await directory.aclose()
        await self._make(files)

    async def _look(self, directory: SourceDirectory) -> dict[str, _Found]:
        """What there is, by the paths that it gets."""
        names = set(await directory.names()) - {NAME, working_set.NAME, layout.NAME}
        paths = {name or UNNAMED: name for name in sorted(names)}  # by the paths that they get
        _check_paths(paths, len(names), directory.description)
        manifest = await self._ask(directory)
        known = {} if manifest is None else dict(manifest.files)
        sizes: dict[str, int] = {}
        if not names_one(self._request.uri):  # servers may not export what is empty
            more = {path: path for path in sorted(known.keys() - names)}
            sizes = {path: 0 for path in more if not known[path].size}
            paths |= more
            _check_paths(paths, len(paths), directory.description)
        # The last that the server is asked for: there are some that let one client in, and these stay.
        sizes |= await self._sizes(directory, {path: name for path, name in paths.items() if path not in sizes})
        if not sizes:
            raise SourceRefused(f"{directory.description} has no files: nothing to pull")
        for path in sizes.keys() & known.keys():
            if not known[path].can_have(sizes[path]):
                where = f"{path} of {directory.description}"
                raise SourceBroken(f"{where} has {sizes[path]} bytes, and {known[path].size} by its manifest")
            sizes[path] = known[path].size
        if manifest is not None:
            self._layout = await fetch_layout(directory, {os.fsencode(path): size for path, size in sizes.items()})
        return {path: _Found(paths[path], size, known.get(path)) for path, size in sizes.items()}

    async def _ask(self, directory: SourceDirectory) -> Manifest | None:
        """The manifest; and what guests ask for first is known then."""
        manifest: Manifest | None = None

        async def ask_manifest() -> None:
            nonlocal manifest
            manifest = await fetch_manifest(directory)

        async def ask_working_sets() -> None:
            self._working_sets = await _fetch_working_sets(directory)

        await together([ask_manifest, ask_working_sets])
        return manifest

    async def _sizes(self, directory: SourceDirectory, names: dict[str, str]) -> dict[str, int]:
        """Bytes of files at the source, by path; several at once, for it may be far. Raises SourceError."""
        sizes = dict.fromkeys(names, 0)
        limit = trio.CapacityLimiter(_AT_ONCE)

        async def ask(path: str, name: str) -> None:
            async with limit:
                if len(names) <= _AT_ONCE:
                    self._opened[name] = source = await directory.open(name)
                    sizes[path] = source.size
                else:
                    sizes[path] = await size_of(directory, name)
            if not 0 <= sizes[path] <= MAX_FILE_SIZE:
                raise SourceBroken(f"{name} of {directory.description} has {sizes[path]} bytes, which no file can have")

        await together(functools.partial(ask, path, name) for path, name in names.items())
        return sizes

    async def _make(self, files: dict[str, _Found]) -> None:
        """Work out what has to arrive of each file, and make them."""
        promised = {path: file for path, (_, size, file) in files.items() if file is not None and size}
        async with _knowing(
            self._pulls.pager, Likeness(self._namespace, self._caller, self._like()), promised
        ) as known:
            for path in known.keys() & files.keys():
                name, size, _ = files[path]
                if name in self._opened:
                    self._opened[name] = await verified(self._opened[name], known[path].digests, size, name)
            images = self._plant(files, known)
        try:
            await self._pulls.pager.sync(images)  # as with a snapshot: who was told of it finds it again
        finally:
            for image in images:
                self._namespace.images.release(image)

    def _like(self) -> bytes | None:
        request = self._request
        found = _like(self._namespace, request.parent, request.name, request.like, self._caller)
        self._told["like"] = None if found is None else os.fsdecode(found)
        return found

    def _plant(self, files: dict[str, _Found], known: dict[str, Known]) -> list[Image]:
        """Make directory and files, in one piece; returns the files' images, each in use once."""
        space, request = self._namespace, self._request
        with space.at(request.parent, self._caller) as directory, space.catalog.transaction():
            top, images = space.plant(directory.ino, request.name, self._caller, map(os.fsencode, files))
            plant_layout(space, top, self._layout)
            incoming = [
                Incoming(
                    images[os.fsencode(path)],
                    name,
                    size,
                    known.get(path),
                    self._working_sets.get(os.fsencode(path)),
                    self._opened.get(name),
                )
                for path, (name, size, _) in files.items()
            ]
            pull = self._pulls.begin(top, request.uri, request.options, incoming)
        for name in pull.sizes:
            self._opened.pop(name, None)  # they are its own now
        # The kernel did not see that: it would show the old link count and mtime for minutes.
        with contextlib.suppress(OSError):  # it may have forgotten the directory
            pyfuse3.invalidate_inode(directory.ino, attr_only=True)
        self._pulls.start(pull)
        lost = sum(int(np.count_nonzero(each.lost)) for each in known.values())
        if lost:
            log.warning("pull from %s: %d pages are lost there; reading them is an error", request.uri, lost)
        self._told |= {
            "id": pull.id,
            "files": len(files),
            "bytes": sum(found.size for found in files.values()),
            "verified": pull.verified,
            "wanted_bytes": pull.wanted << PAGE_SHIFT,
            "taken_bytes": pull.taken << PAGE_SHIFT,
            "lost_bytes": lost << PAGE_SHIFT,
            "first_bytes": pull.first_bytes,
        }
        return list(images.values())


def _like(space: Namespace, parent: bytes, name: bytes, like: bytes | bool, caller: Caller) -> bytes | None:
    """The path of the generation to take pages of a directory from. Raises FileError."""
    if like is True:
        return newest_like(space, parent, name, caller)
    if like is False:
        return None
    try:
        return like_path(space, like, caller)
    except FileError as exc:
        raise FileError(exc.errno, f"cannot take pages from /{os.fsdecode(like)}: {exc}") from exc


@contextlib.asynccontextmanager
async def _knowing(pager: Pager, likeness: Likeness, files: dict[str, File]) -> AsyncIterator[dict[str, Known]]:
    """What is known of files by their digests and by a generation of them that is here, by their paths.

    It holds as long as the block lasts; files with digests that are still there at its end go.
    """
    layers = pager.layers
    known: dict[str, Known] = {}
    new: list[str] = []
    try:
        for path, file in files.items():
            new.append(new_path(layers.directory))
            layers.making.add(new[-1])
            known[path] = await likeness.look(os.fsencode(path), file.size, file.digests, new[-1])
        yield known
    finally:
        likeness.close()
        for left in new:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
            layers.making.discard(left)


async def _fetch_working_sets(directory: SourceDirectory) -> Mapping[bytes, Records]:
    """What guests ask for first, by the names of the files; nothing if the source does not tell. Raises SourceError."""
    try:
        source = await directory.open(working_set.NAME)
    except SourceRefused:
        return {}
    try:
        data = memoryview(bytearray(min(source.size, working_set.MAX_SIZE)))
        await read_whole(source, 0, data[:PAGE])
        if not working_set.is_one(data[:PAGE].tobytes()):  # a server that has one file gives that, by whatever name
            return {}
        await read_whole(source, PAGE, data[PAGE:])
        return working_set.parse(data.tobytes())
    except ValueError as exc:
        log.warning("%s is not used: %s", source.description, exc)
        return {}
    finally:
        await source.aclose()


def _check_paths(paths: dict[str, str], count: int, where: str) -> None:
    """Raise SourceBroken unless there can be that many files with these paths below the directory; or SourceRefused."""
    if count > _MOST_FILES:
        raise SourceRefused(f"{where} has {count} files, more than {_MOST_FILES}")
    wrong = next((path for path in paths if not _fit_path(path)), None)
    if wrong is None and len(paths) < count:
        wrong = UNNAMED  # one is called that, and another nothing
    directories = {path[:at] for path in paths for at, char in enumerate(path) if char == "/"}
    if wrong is None:
        wrong = next((path for path in paths if path in directories), None)
    if wrong is not None:
        raise SourceBroken(
            f"{where} has an export that cannot be a file, {wrong[:100]!a}; name one in the URI, and pull that"
        )


def _fit_path(path: str) -> bool:
    name = os.fsencode(path)
    return is_path(name) and _RESERVED.isdisjoint(name.split(b"/"))


#: Seconds that another source has to answer.
_PATIENCE: Final = 30.0


class Change(NamedTuple):
    """What is to be changed of the pulls of what is at a path; None: that stays as it is."""

    path: bytes
    uri: str | None = None
    rate: int | None = None
    paused: bool | None = None
    zeros: Mapping[str, list[tuple[int, int]]] = MappingProxyType({})
    """runs of pages of files that are zeros at the source, wherever that is"""


class Steering(Job):
    """A change to the pulls that some files arrive from."""

    def __init__(self, pulls: Pulls, which: list[Pull], namespace: Namespace, change: Change, caller: Caller) -> None:
        super().__init__(pulls=len(which), verified=all(pull.verified for pull in which))
        self._pulls = pulls
        self._which = which
        self._namespace = namespace
        self._change = change
        self._caller = caller

    async def work(self) -> None:
        """Change one after the other."""
        change = self._change
        for pull in self._which:
            pull.note_zeros(change.zeros)
            if change.uri is not None:
                manifest = None
                with trio.move_on_after(_PATIENCE) as limit:
                    if not pull.verified:
                        manifest = await self._manifest(change.uri, pull.zeros())
                    if manifest is None:
                        await pull.switch(change.uri)
                if limit.cancelled_caught:
                    self.fail(errno.ETIMEDOUT, f"{change.uri} does not answer", SourceLost.exit_code)
                    return
                if manifest is not None:
                    await self._promise(pull, manifest, change.uri)
            options = pull.options
            rate = options.rate if change.rate is None else change.rate
            paused = options.paused if change.paused is None else change.paused
            pull.set_options(replace(options, rate=rate, paused=paused))
        self._told["verified"] = all(pull.verified for pull in self._which)

    async def _manifest(self, uri: str, zeros: Mapping[str, Mask]) -> Manifest | None:
        directory = await self._pulls.opener(uri)
        try:
            return await fetch_manifest(directory, zeros)
        finally:
            await directory.aclose()

    async def _promise(self, pull: Pull, manifest: Manifest, uri: str) -> None:
        """Take what is left from a source with a manifest, but for what is here of another generation."""
        found, sizes = manifest.files, pull.sizes
        files = {path: found[path] for path, size in sizes.items() if size and path in found}
        wrong = next((path for path, file in files.items() if file.size != sizes[path]), None)
        if wrong is not None:
            raise SourceBroken(f"{uri}: {wrong} has another size by its manifest")
        likeness = Likeness(self._namespace, self._caller, self._like())
        async with _knowing(self._pulls.pager, likeness, files) as known:
            await pull.promise(known, uri)

    def _like(self) -> bytes | None:
        parent, name = os.path.split(os.path.normpath(self._change.path))
        return _like(self._namespace, parent, name, True, self._caller) if name not in {b"", b"."} else None
