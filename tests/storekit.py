"""A store without a mount, for tests that look at it from inside."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import trio

from ramfs.image.table import PageTable
from ramfs.namespace import Caller, Namespace
from ramfs.pager import Pager
from ramfs.store.garbage import Pass
from ramfs.store.images import Image
from ramfs.store.store import Store
from ramfs.units import ROOT, SNAP_BIT, InodeNumber, LayerId

ME = Caller(0, 0, os.getpid())


def steps_of(work: Pass) -> tuple[Callable[[], None], ...]:
    """The steps of a garbage pass after its making, in their order."""
    return work.settle, work.scan, work.rescan, work.decide, work.reclaim, work.finish


class Kit:
    """An open store with its pager and tree; `with Kit(directory) as kit` closes it cleanly."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.store = Store(str(directory), create=True)
        self.pager = Pager(self.store)
        self.space = Namespace(self.pager)

    # --- life ---

    def close(self) -> None:
        self.store.close()

    def kill(self) -> None:
        """What a SIGKILL leaves: nothing more is written."""
        self.store.abandon()

    def take_over(self) -> None:
        """What a daemon does whose predecessor was killed a moment ago; :meth:`settle` comes later."""
        lock = os.dup(self.store.lock.fd)
        self.store.abandon()
        self.store = Store(str(self.directory), lock=lock)
        self.pager = Pager(self.store)
        self.space = Namespace(self.pager)

    def settle(self) -> None:
        trio.run(self.pager.settle)

    def power_loss(self) -> None:
        """Leave the store as after a power loss that spared the page cache: the tables that count are others."""
        self.store.catalog.set_meta("boot_id", "another")
        self.store.abandon()

    def __enter__(self) -> Kit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.kill()

    # --- files ---

    def image(self, path: str) -> Image:
        directory, _, name = os.fsencode(path).rpartition(b"/")
        return self.space.lookup(self._directory(directory), name).file

    def _directory(self, path: bytes) -> InodeNumber:
        ino = InodeNumber(ROOT)
        for name in path.split(b"/"):
            if name == b".snap":
                ino = InodeNumber(ino | SNAP_BIT)
            elif name:
                ino = self.space.lookup(ino, name).ino
        return ino

    def create(self, path: str) -> Image:
        directory, _, name = os.fsencode(path).rpartition(b"/")
        return self.space.make(self._directory(directory), name, stat.S_IFREG | 0o600, ME).file

    def mkdir(self, path: str) -> None:
        directory, _, name = os.fsencode(path).rpartition(b"/")
        self.space.make(self._directory(directory), name, stat.S_IFDIR | 0o700, ME)

    def unlink(self, path: str) -> None:
        directory, _, name = os.fsencode(path).rpartition(b"/")
        self.space.unlink(self._directory(directory), name)

    def write(self, path: str, offset: int, data: bytes) -> None:
        try:
            image = self.image(path)
        except OSError:
            raise
        except Exception:  # noqa: BLE001 - there is none yet
            image = self.create(path)
        assert self.pager.write(image, offset, data) == len(data)

    def read(self, path: str) -> bytes:
        image = self.image(path)
        return self.pager.copy_out(image, 0, image.size)

    def table(self, path: str) -> PageTable:
        return self.image(path).table

    def layer_of(self, path: str, page: int = 0) -> LayerId:
        return LayerId(int(self.table(path).entries[page]))

    def layer_file(self, layer: int, suffix: str = "ram") -> Path:
        return self.directory / "layers" / f"{layer:08x}.{suffix}"

    def table_file(self, image: int, suffix: str = "map") -> Path:
        return self.directory / "tables" / f"{image:08x}.{suffix}"

    # --- the rest ---

    def copy(self, source: str, target: str) -> None:
        """What cp does: all of a file in one copy_file_range."""
        image = self.image(source)
        image.refresh()
        assert self.pager.share(image, 0, self.create(target), 0, image.size) == image.size

    def snapshot(self, name: str, directory: str = "") -> None:
        frozen = self.space.freeze(self.space.get(self._directory(os.fsencode(directory))), os.fsencode(name))
        trio.run(self.pager.sync, frozen.images)
        frozen.commit()
        self.store.catalog.sync()
        self.forget()

    def delete_snapshot(self, name: str, directory: str = "") -> None:
        ino = self._directory(os.fsencode(directory))
        self.forget()
        self.space.delete_snapshot(InodeNumber(ino | SNAP_BIT), os.fsencode(name))

    def sync(self, *paths: str) -> None:
        trio.run(self.pager.sync, [self.image(path) for path in paths] if paths else None)

    def digest(self) -> None:
        for layer in self.pager.undigested():
            trio.run(self.pager.digest, layer)

    def collect(self, passes: int = 1) -> None:
        """Forget what nobody uses, then collect garbage."""
        self.forget()
        for _ in range(passes):
            trio.run(self.pager.collect)

    def merge(self, above: int = 1) -> None:
        """A garbage pass that merges layers of any image that has more than `above` of its own."""
        self.forget()
        work = Pass(self.store, collapse_above=above)
        for step in steps_of(work):
            step()
        work.close()

    def forget(self) -> None:
        """The kernel lets go of all inodes."""
        for inode in list(self.space.inodes.values()):
            self.space.let_go(inode)
