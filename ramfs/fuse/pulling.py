"""``ramfs pull`` in the daemon: connects, makes the directory, and leaves the rest to arrival/.

As with flattening, the work belongs to the open file ``.ramfs/control`` that asked for it, and reading there tells how
it went. Closing it before the directory is there ends it, and nothing is left; after that the pull goes on.
"""

import errno
import json
import logging
import os
from dataclasses import replace
from typing import Any, Final, NamedTuple

import trio

from ramfs.arrival.pulls import Incoming, Options, Pull, Pulls
from ramfs.errors import RamfsError, SourceBroken, SourceLost, SourceRefused
from ramfs.namespace import Caller, Namespace
from ramfs.source.base import SourceDirectory
from ramfs.source.manifest import NAME, File, fetch_manifest
from ramfs.units import MAX_FILE_SIZE, MAX_NAME

log = logging.getLogger(__name__)

#: Seconds that a source has to tell what it has.
_PATIENCE: Final = 30.0
#: Files of one pull, at most.
_MOST_FILES: Final = 10_000


class Request(NamedTuple):
    """What is to be pulled, to where. ``parent`` is a path from the root of the mount."""

    uri: str
    parent: bytes
    name: bytes
    options: Options


class Pulling:
    """One directory on its way into being. ``text`` tells how far it is; docs/format.md names the fields."""

    def __init__(self, pulls: Pulls, namespace: Namespace, request: Request, caller: Caller) -> None:
        self._pulls = pulls
        self._namespace = namespace
        self._request = request
        self._caller = caller
        self._scope = trio.CancelScope()
        self._told: dict[str, Any] = {"finished": False, "error": None}

    async def run(self) -> None:
        """Do it; errors are told, not raised."""
        with self._scope:
            try:
                with trio.fail_after(_PATIENCE):
                    directory = await self._pulls.opener(self._request.uri)
                    try:
                        files = await self._look(directory)
                    finally:
                        await directory.aclose()
                self._plant(files)
            except trio.TooSlowError:
                self._fail(errno.ETIMEDOUT, f"{self._request.uri} does not say what it has", SourceRefused.exit_code)
            except RamfsError as exc:
                self._fail(exc.errno, str(exc), exc.exit_code)
            except OSError as exc:
                self._fail(exc.errno or errno.EIO, exc.strerror or str(exc), 1)
            except Exception:
                log.exception("pull failed")
                self._fail(errno.EIO, os.strerror(errno.EIO), 1)
            self._told["finished"] = True

    def _fail(self, number: int, text: str, exit_code: int) -> None:
        self._told["error"] = _error(number, text, exit_code)

    async def _look(self, directory: SourceDirectory) -> dict[str, tuple[int, File | None]]:
        """What there is: for each path its size and, where they are known, its digests."""
        manifest = await fetch_manifest(directory)
        known = {} if manifest is None else dict(manifest.files)
        names = set(await directory.names()) - {NAME}
        lacking = sorted(known.keys() - names)
        names |= known.keys()
        if not names:
            raise SourceRefused(f"{directory.description} has no files: nothing to pull")
        if len(names) > _MOST_FILES:
            raise SourceRefused(f"{directory.description} has {len(names)} files, more than {_MOST_FILES}")
        found: dict[str, tuple[int, File | None]] = {}
        for name in sorted(names):
            _check_name(name, directory.description)
            file = known.get(name)
            if file is not None and file.size == 0 and name in lacking:
                found[name] = (0, None)  # servers may not export what is empty
                continue
            source = await directory.open(name)
            try:
                if not 0 <= source.size <= MAX_FILE_SIZE:
                    raise SourceBroken(f"{source.description} has {source.size} bytes, which no file can have")
                if file is not None and file.size != source.size:
                    raise SourceBroken(f"{source.description} has {source.size} bytes, and {file.size} by its manifest")
                found[name] = (source.size, file)
            finally:
                await source.aclose()
        return found

    def _plant(self, files: dict[str, tuple[int, File | None]]) -> None:
        """Make directory and files, in one piece."""
        space, request = self._namespace, self._request
        directory = space.walk(request.parent, self._caller)
        try:
            with space.catalog.transaction():
                top, images = space.plant(directory.ino, request.name, self._caller, map(os.fsencode, files))
                incoming = [
                    Incoming(images[os.fsencode(name)], name, size, None if file is None else file.digests)
                    for name, (size, file) in files.items()
                ]
                pull = self._pulls.begin(top, request.uri, request.options, incoming)
        finally:
            space.let_go(directory)
        for image in images.values():
            space.images.release(image)
        self._pulls.start(pull)
        sizes = [size for size, _ in files.values()]
        self._told |= {"id": pull.id, "files": len(files), "bytes": sum(sizes), "verified": pull.verified}

    @property
    def text(self) -> bytes:
        """How far it is, as JSON."""
        return json.dumps(self._told).encode() + b"\n"

    def cancel(self) -> None:
        """End it, unless the directory is there already."""
        self._scope.cancel()


def _check_name(name: str, where: str) -> None:
    """Raise SourceBroken for what cannot be a file below the directory."""
    for part in name.split("/"):
        encoded = os.fsencode(part)
        if part in ("", ".", "..", ".snap", ".guest", ".ramfs") or b"\0" in encoded or len(encoded) > MAX_NAME:
            shown = ascii(name[:100])
            raise SourceBroken(
                f"{where} has an export that cannot be a file, {shown}; name one in the URI, and pull that"
            )


class Change(NamedTuple):
    """What is to be changed of pulls; None: that stays as it is."""

    uri: str | None = None
    rate: int | None = None
    paused: bool | None = None


class Steering:
    """A change to the pulls that some files arrive from."""

    def __init__(self, pulls: list[Pull], change: Change) -> None:
        self._pulls = pulls
        self._change = change
        self._scope = trio.CancelScope()
        self._told: dict[str, Any] = {"finished": False, "error": None, "pulls": len(pulls)}

    async def run(self) -> None:
        """Do it; errors are told, not raised."""
        change = self._change
        with self._scope:
            try:
                for pull in self._pulls:
                    if change.uri is not None:
                        with trio.fail_after(_PATIENCE):
                            await pull.switch(change.uri)
                    options = pull.options
                    rate = options.rate if change.rate is None else change.rate
                    paused = options.paused if change.paused is None else change.paused
                    pull.set_options(replace(options, rate=rate, paused=paused))
            except trio.TooSlowError:
                self._told["error"] = _error(errno.ETIMEDOUT, f"{change.uri} does not answer", SourceLost.exit_code)
            except RamfsError as exc:
                self._told["error"] = _error(exc.errno, str(exc), exc.exit_code)
            except Exception:
                log.exception("changing a pull failed")
                self._told["error"] = _error(errno.EIO, os.strerror(errno.EIO), 1)
            self._told["finished"] = True

    @property
    def text(self) -> bytes:
        """How far it is, as JSON."""
        return json.dumps(self._told).encode() + b"\n"

    def cancel(self) -> None:
        """End it."""
        self._scope.cancel()


def _error(number: int, text: str, exit_code: int) -> dict[str, Any]:
    return {"errno": number, "message": text, "exit": exit_code}
