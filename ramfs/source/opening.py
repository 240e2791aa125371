"""What a URI names, as a directory of sources.

nbd://, nbds://, nbd+unix://, nbds+unix://   the exports of a server, or the one that the URI names
file:PATH                                    a local raw image, or the files of a directory
fault:WORDS:URI                              any of these, failing on purpose (fault.py)
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import trio

from ramfs.errors import UsageError
from ramfs.source.base import PageSource, SourceDirectory
from ramfs.source.fault import PREFIX, FaultDirectory, Faults
from ramfs.source.file import FileDirectory
from ramfs.source.nbd.uri import parse
from ramfs.source.nbd_client import NbdDirectory

_FILE: Final = "file:"


def absolute(uri: str) -> str:
    """The same, with the file names in it absolute: for who has another working directory. Raises UsageError."""
    if uri.startswith(PREFIX):
        _, rest = Faults.parse(uri)
        found = uri[: len(uri) - len(rest)] + absolute(rest)
    elif uri.startswith(_FILE):
        path = uri.removeprefix(_FILE)
        if not path:
            raise UsageError(f"{uri} names no file: file:PATH")
        found = _FILE + os.path.abspath(path)
    else:
        parsed = parse(uri)
        socket, certificates = parsed.socket, parsed.certificates
        if socket and not socket.startswith("\0"):
            socket = os.path.abspath(socket)
        if certificates:
            certificates = os.path.abspath(certificates)
        if (socket, certificates) == (parsed.socket, parsed.certificates):
            return uri
        _check_text(socket + certificates)
        found = str(replace(parsed, socket=socket, certificates=certificates))
    _check_text(found)
    return found


def names_one(uri: str) -> bool:
    """Does it name one export, and not all that there are? Raises UsageError."""
    if uri.startswith(PREFIX):
        return names_one(Faults.parse(uri)[1])
    return not uri.startswith(_FILE) and bool(parse(uri).export)


def _check_text(text: str) -> None:
    """What names a source is text. Raises UsageError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text!a} has bytes that are not UTF-8: use other names of files") from None


class Opener:
    """Opens directories by their URIs; faults go on where they were."""

    def __init__(self, own_device: Callable[[], int | None] = lambda: None) -> None:
        """``own_device`` tells the device number of a file system that no local file may be on (file.py)."""
        self._own_device = own_device
        self._faults: dict[str, Faults] = {}

    async def __call__(self, uri: str) -> SourceDirectory:
        """Raises UsageError, SourceError."""
        if uri.startswith(PREFIX):
            faults, rest = Faults.parse(uri)
            words = uri[: len(uri) - len(rest)]
            return FaultDirectory(await self(rest), self._faults.setdefault(words, faults))
        if uri.startswith(_FILE):
            path = uri.removeprefix(_FILE)
            if not path.startswith("/"):
                raise UsageError(f"{uri} does not name a file by its whole path: file:/PATH")
            device = self._own_device()
            return await trio.to_thread.run_sync(lambda: FileDirectory(path, not_on=device))
        parsed = parse(uri)
        directory = NbdDirectory(parsed)
        return _OneExport(directory, parsed.export) if parsed.export else directory


class _OneExport:
    """The export that a URI names."""

    def __init__(self, directory: NbdDirectory, name: str) -> None:
        self._directory = directory
        self._name = name

    @property
    def description(self) -> str:
        """What it is."""
        return self._directory.description

    async def names(self) -> list[str]:
        """Its name."""
        return [self._name]

    async def size(self, name: str) -> int:
        """Bytes of it, or of another one."""
        return await self._directory.size(name)

    async def open(self, name: str) -> PageSource:
        """Open it, or another one."""
        return await self._directory.open(name)

    async def aclose(self) -> None:
        """Close the directory."""
        await self._directory.aclose()
