"""Where a pull looks for pages that this store holds already: files of another generation of the same directory.

That is the newest snapshot of a directory, or failing that the directory itself, of which frozen copies are made that
nobody sees and that go when the pull is made. A page is taken from the file at the same path, at the same offset.
"""

import contextlib
import errno

import trio

from ramfs.arrival.known import Known, look
from ramfs.errors import FileError, StoreDamaged
from ramfs.namespace import SNAP, Caller, Inode, Namespace, may
from ramfs.source.manifest import Digests
from ramfs.store.gather import Gathering
from ramfs.store.images import Image
from ramfs.units import SNAP_BIT, InodeNumber


class Likeness:
    """A directory that a pull takes pages from. Close it."""

    def __init__(self, namespace: Namespace, caller: Caller, path: bytes | None) -> None:
        """``path`` leads to the frozen or live directory itself; None: there is none."""
        self.path = path
        self._space = namespace
        self._caller = caller
        self._images: list[Image] = []
        self._copies: list[Image] = []

    async def look(self, path: bytes, size: int, digests: Digests, target: str) -> Known:
        """What is known of a file of ``size`` bytes that will be at ``path`` below the directory (arrival/known.py)."""
        image = self._image(path)
        if image is not None and image.size:

            def compare(gathering: Gathering) -> Known:
                return look(digests, size, target, image, gathering.digests(image.path, image.size))

            # It may be deleted meanwhile, or still arrive, and nobody knows what.
            with contextlib.suppress(FileError, StoreDamaged):
                return await self._space.pager.gather([image.id], compare)
        return await trio.to_thread.run_sync(look, digests, size, target)

    def _image(self, path: bytes) -> Image | None:
        """The contents of a local file, frozen; None if there is none that may be taken from."""
        if self.path is None:
            return None
        with contextlib.suppress(FileError), self._space.at(self.path + b"/" + path, self._caller) as inode:
            image = inode.image
            if image is None or not may(inode, self._caller, 4):
                return None
            if image.frozen:
                image = self._space.images.acquire(image.id)
            elif image.direct is not None:
                return None  # its pages are in a file that the kernel writes to: a snapshot has them
            else:
                with self._space.catalog.transaction():
                    image = self._space.images.copy(image, frozen=True)
                self._copies.append(image)
            self._images.append(image)
            return image
        return None

    def close(self) -> None:
        """Let go of all; the frozen copies go."""
        images = self._space.images
        if self._copies:
            with self._space.catalog.transaction(frees=True):
                for image in self._copies:
                    images.delete(image.id)
        for image in self._images:
            images.release(image)
        self._copies, self._images = [], []


def like_path(space: Namespace, path: bytes, caller: Caller) -> bytes:
    """The generation that a path names: a directory in a snapshot, the newest snapshot of a directory, or itself.

    Raises FileError.
    """
    with space.at(path, caller) as inode:
        if not inode.is_dir or inode.is_snap:
            raise FileError(errno.ENOTDIR)
        newest = None if inode.frozen else _newest_snapshot(space, inode)
        return path if newest is None else b"/".join((path, SNAP, newest[1]))


def newest_like(space: Namespace, parent: bytes, name: bytes, caller: Caller) -> bytes | None:
    """The newest generation of what ``name`` in a directory is another generation of; None if there is none.

    These are the directories beside it whose names are the same up to the first dot: of ``vm1`` and ``vm1.2`` that are
    ``vm1``, ``vm1.old``, ``vm1.1``.
    """
    stem = name.partition(b".")[0]
    above = [part for part in parent.split(b"/") if part not in (b"", b".")]
    best: tuple[int, bytes] | None = None
    with space.at(parent, caller) as directory:
        entries = [each for _, each, _ in space.names(directory.ino)] if stem and may(directory, caller, 5) else []
    for each in entries:
        if each.partition(b".")[0] != stem or each == name:
            continue
        path = b"/".join((*above, each))
        with contextlib.suppress(FileError), space.at(path, caller) as inode:
            if inode.is_dir:
                newest = _newest_snapshot(space, inode)
                found = (inode.btime, path) if newest is None else (newest[0], b"/".join((path, SNAP, newest[1])))
                best = found if best is None else max(best, found)
    return None if best is None else best[1]


def _newest_snapshot(space: Namespace, directory: Inode) -> tuple[int, bytes] | None:
    """When the newest snapshot was made, and its name."""
    found = [
        (space.catalog.number("SELECT btime FROM inodes WHERE ino = ?", ino), cookie, name)
        for cookie, name, ino in space.names(InodeNumber(directory.ino | SNAP_BIT))
    ]
    if not found:
        return None
    made, _, name = max(found)
    return made, name
