"""A store: the directory with its lock, catalog, layers and images; opening it after any kind of end.

Three ways a store can have ended, told apart by two rows of ``meta``:

    clean                  unmounted: every ``.map`` equals its ``.durable`` and all is on disk
    not clean, same boot   the daemon was killed: page cache and so every ``.map`` is as it was
    not clean, other boot  the machine went down: ``.durable`` and what the catalog's log kept
"""

import contextlib
import ctypes
import logging
import os
import time
import uuid
from collections.abc import Container, Iterable
from typing import Final

import numpy as np

from ramfs.errors import StoreDamaged, StoreError
from ramfs.image.digest import DIGEST
from ramfs.image.table import ENTRY, Mask, runs_of
from ramfs.store.catalog import Catalog, settle_version
from ramfs.store.direct import leave_all
from ramfs.store.files import copy_range, data_extents, read_exactly, stored_pages, sync_data, sync_directory, write_all
from ramfs.store.images import (
    HEADER,
    Header,
    Image,
    Images,
    SyncJob,
    load_table,
    pack_header,
    table_length,
    unpack_header,
)
from ramfs.store.layers import Layers
from ramfs.store.lock import StoreLock
from ramfs.store.outcomes import Outcomes
from ramfs.store.presence import forget_unsynced
from ramfs.store.reserve import Reserve
from ramfs.units import ZERO, LayerId, pages

log = logging.getLogger(__name__)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_PARTS: Final = ("layers", "tables")


def boot_id() -> str:
    """The kernel's name for this boot of the machine."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


class Store:
    """An open store. Used from one thread, but for jobs that say otherwise."""

    def __init__(
        self, directory: str, *, create: bool = False, purpose: str = "ramfs", lock: int | None = None
    ) -> None:
        """Open the store; make it if ``create`` and there is none. Raises StoreError and its kinds.

        With ``lock``, the descriptor of a daemon that was killed or gave up, go on where that one ended: without
        a sync, for guests wait. :meth:`Pager.settle` makes up for it.
        """
        self.directory = os.path.abspath(directory)
        self._prepare(create)
        self.lock = StoreLock(self.directory, purpose, lock)
        self.reserve = Reserve(self.directory)
        self.reserve.make_room()
        try:
            path = os.path.join(self.directory, "catalog.sqlite")
            fresh = create and not (os.path.exists(path) and os.path.getsize(path))
            self._prepare_parts(fresh)
            self.catalog = Catalog(path, create=fresh)
        except BaseException:
            self.lock.release()
            raise
        try:
            if lock is None:
                self._forget_unsynced()
            self.layers = Layers(os.path.join(self.directory, "layers"), self.catalog)
            self.images = Images(os.path.join(self.directory, "tables"), self.catalog, self.layers)
            self.outcomes = Outcomes(self.catalog)
            self.catalog.make_room = self.reserve.make_room
            if lock is None:
                self._recover(fresh)
            else:
                self._go_on()
        except BaseException:
            self.catalog.close()
            self.lock.release()
            raise
        self.reserve.keep()

    def _prepare(self, create: bool) -> None:
        try:
            if create:
                os.makedirs(self.directory, mode=0o700, exist_ok=True)
            names = os.listdir(self.directory)
        except FileNotFoundError:
            raise StoreError(f"store {self.directory} does not exist: give a directory, or mount to make one") from None
        except (NotADirectoryError, FileExistsError):
            raise StoreError(f"store {self.directory} is not a directory: give a directory") from None
        except OSError as exc:
            raise StoreError(f"store {self.directory} cannot be opened: {exc.strerror}") from exc
        if "catalog.sqlite" in names and os.path.getsize(os.path.join(self.directory, "catalog.sqlite")):
            return
        if any(part in names and os.listdir(os.path.join(self.directory, part)) for part in _PARTS):
            raise StoreDamaged(f"store {self.directory} has lost its catalog.sqlite; restore it from a copy")
        ours = {"lock", "lost+found", "reserve", "supervisor", *_PARTS}
        if not create or not all(name in ours or name.startswith("catalog.sqlite") for name in names):
            raise StoreError(f"{self.directory} is not a ramfs store and not empty: give an empty or new directory")

    def _prepare_parts(self, fresh: bool) -> None:
        for part in _PARTS:
            path = os.path.join(self.directory, part)
            if fresh:
                os.makedirs(path, mode=0o700, exist_ok=True)
            elif not os.path.isdir(path):
                raise StoreDamaged(f"{path} is missing; run `ramfs fsck` on the store")

    # -- opening and closing

    def _recover(self, fresh: bool) -> None:
        catalog, now = self.catalog, boot_id()
        if not fresh and catalog.meta("boot_id") == now:
            self.layers.find_held()
        if fresh:
            with catalog.transaction():
                catalog.set_meta("uuid", str(uuid.uuid4()))
                catalog.set_meta("created", time.time_ns())
        elif not catalog.meta("clean"):
            if catalog.meta("boot_id") == now:
                self._sync_files()
                self._replace_tables("map", "durable")
            else:
                self._settle_durable()
                self._replace_tables("durable", "map")
            self._sweep()
            self.images.unsynced |= {n for n in self.layers.arriving if not self.layers[n].is_alias}
        elif catalog.meta("garbage"):
            self._sweep()
        leave_all(self.images, log.warning)
        with catalog.transaction():
            catalog.set_meta("boot_id", now)
            catalog.set_meta("clean", 0)
            settle_version(catalog)
            self.outcomes.forget_all()
        sync_directory(self.directory)
        catalog.sync()

    def _forget_unsynced(self) -> None:
        """After power loss: of arriving layers only what was synced counts. Before anybody reads what is here."""
        catalog = self.catalog
        if catalog.meta("clean") or catalog.meta("boot_id") in (None, boot_id()):
            return
        directory = os.path.join(self.directory, "layers")
        for row in catalog.execute("SELECT layer, size FROM arriving"):
            here, kept = (os.path.join(directory, f"{row['layer']:08x}.{suffix}") for suffix in ("here", "kept"))
            forget_unsynced(here, kept, pages(row["size"]))

    def _go_on(self) -> None:
        """Take over from a daemon of this boot: what it knew of things not synced yet is lost, so all may be so."""
        if self.catalog.meta("clean") or self.catalog.meta("boot_id") != boot_id():
            raise StoreError(
                f"{self.directory} is not as a daemon left it that ended a moment ago: unmount, and mount again"
            )
        self._doom_unnamed()
        rows = self.catalog.execute("SELECT id FROM images WHERE NOT frozen").fetchall()
        self.images.doubtful = {row["id"] for row in rows} - self.images.direct
        files = {layer.id for layer in self.layers.by_id.values() if not layer.is_alias} - self.images.direct_layers()
        self.images.unsynced |= files
        self.layers.unsynced_names |= files
        self.outcomes.take_over()

    def _doom_unnamed(self) -> None:
        """Delete images that no inode has; look at all layers for garbage."""
        with self.catalog.transaction():
            doomed = self.catalog.execute(
                "SELECT id FROM images WHERE id NOT IN (SELECT image FROM inodes WHERE image IS NOT NULL)"
            ).fetchall()
            for row in doomed:
                self.images.delete(row["id"])
            self.images.replaced |= set(self.layers.by_id)

    def _sync_files(self) -> None:
        """Flush the page cache of the store's file system, the ``.map`` of every image in it."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd):
                code = ctypes.get_errno()
                raise StoreError(f"store {self.directory} cannot be synced: {os.strerror(code)}")
        finally:
            os.close(fd)

    def list_files(self) -> list[tuple[str, str]]:
        """The files of layers and tables (any thread), for :meth:`remove_strays`."""
        directories = (self.images.directory, self.layers.directory)
        return [(directory, name) for directory in directories for name in os.listdir(directory)]

    def remove_strays(self, files: Iterable[tuple[str, str]]) -> None:
        """Remove those of ``files`` that belong to nothing. Sync the catalog between the listing and this."""
        known: dict[str, Container[int]] = {
            self.images.directory: {row["id"] for row in self.catalog.execute("SELECT id FROM images")}
            | self.images.doomed,
            self.layers.directory: self.layers.by_id,
        }
        for directory, name in files:
            stem, _, suffix = name.partition(".")
            if os.path.join(directory, name) in self.layers.making:
                continue
            ours = _is_hex(stem) and int(stem, 16) in known[directory]
            if suffix in ("here", "kept"):
                ours = ours and int(stem, 16) in self.layers.arriving
            if suffix.endswith("new") or (_is_hex(stem) and not ours):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))

    def _replace_tables(self, source: str, target: str) -> None:
        """Let every writable image's ``target`` table file be a copy of its ``source``."""
        for row in self.catalog.execute("SELECT id FROM images WHERE NOT frozen AND NOT direct"):
            good, bad = self.images.path(row["id"], source), self.images.path(row["id"], target)
            if not os.path.exists(good):
                if source == "map":
                    continue  # fsck's to tell; a stale durable copy must not pass for it
                # Never synced before the power went: an empty file, as on any file system.
                self._write_empty(good)
            if not _fit_table(good) and source == "map":
                continue  # the durable copy is the better one, for fsck
            temporary = bad + ".new"
            _copy_sparse(good, temporary)
            sync_data(temporary)
            os.rename(temporary, bad)
        sync_directory(self.images.directory)

    def _settle_durable(self) -> None:
        """Name pages zero that were zeroed, and so punched, between the last sync and the power loss.

        (They read as zeros anyway; but a page that is named and not there is damage to whoever checks.)
        """
        stored: dict[LayerId, Mask | None] = {}
        for row in self.catalog.execute("SELECT id FROM images WHERE NOT frozen AND NOT direct"):
            path = self.images.path(row["id"], "durable")
            with contextlib.suppress(FileNotFoundError, StoreDamaged):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    self._settle_table(fd, path, stored)
                    os.fdatasync(fd)
                finally:
                    os.close(fd)

    def _settle_table(self, fd: int, path: str, stored: dict[LayerId, Mask | None]) -> None:
        _, table = load_table(fd, path)
        for first, stop in table.regions():
            part = table.entries[first:stop]
            punched = np.zeros(len(part), np.bool_)
            for number in set(np.unique(part).tolist()) - {ZERO}:
                layer = self.layers.by_id.get(number)
                if layer is None or layer.presence is not None:
                    continue  # an absent page is a hole too
                if layer.base not in stored:
                    stored[layer.base] = self._stored_pages(layer.base)
                there = stored[layer.base]
                if there is None:
                    continue
                where = np.flatnonzero(part == number)
                at = where + (first + layer.shift)
                where, at = where[at < len(there)], at[at < len(there)]
                punched[where] = ~there[at]
            for a, b in runs_of(punched):
                write_all(fd, bytes((b - a) * ENTRY), HEADER + (first + a) * ENTRY)

    def _stored_pages(self, layer: LayerId) -> Mask | None:
        """Which pages of a layer are there, or were when its digests were made; None where that is no longer known."""
        try:
            with open(self.layers.path(layer), "rb", buffering=0) as file:
                stored = stored_pages(file.fileno())
            if self.layers[layer].digested:
                with open(self.layers.path(layer, "xxh3"), "rb", buffering=0) as file:
                    digests = np.frombuffer(read_exactly(file.fileno(), len(stored) * DIGEST, 0), np.uint64)
                known: Mask = (digests[::2] | digests[1::2]) != 0
                stored[: len(known)] |= known
        except (OSError, ValueError):
            return None
        return stored

    def _write_empty(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.pwrite(fd, pack_header(Header(0, now := time.time_ns(), now)), 0)
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        """Remove what a killed operation left behind: images that no inode names, files without a row."""
        self._doom_unnamed()
        self.catalog.sync()
        self.remove_strays(self.list_files())
        for directory in (self.images.directory, self.layers.directory):
            sync_directory(directory)  # or a number that is given again finds an old file
        for layer in list(self.layers.by_id.values()):
            # A live layer of which only the row reached the disk: no durable table can name its pages.
            if not layer.sealed and not os.path.exists(self.layers.path(layer.id)):
                with self.catalog.transaction():
                    self.catalog.execute("UPDATE images SET live = NULL WHERE live = ?", layer.id)
                    self.layers.forget(layer)

    def close(self) -> None:
        """Make everything durable and close. Raises OSError if the disk refuses; then the store is not clean."""
        self.reserve.make_room()
        try:
            while self.images.doubtful:
                with self.images.some_doubtful() as images:
                    self._sync(images)
            self._sync(self.images.open_images(), self.arrived())
            leave_all(self.images, log.warning)
            self._sync_files()  # from now on .map counts, which no sync before has written
            with self.catalog.transaction():
                self.catalog.set_meta("clean", 1)
                settle_version(self.catalog)
                garbage = self.images.replaced or self.images.doomed or self.layers.held
                self.catalog.set_meta("garbage", int(bool(garbage)))
            self.catalog.sync()
        finally:
            self.abandon()

    def _sync(self, images: list[Image], layers: Iterable[LayerId] = ()) -> None:
        job = self.images.sync_job(images, layers)
        try:
            job.run()
        except BaseException:
            job.failed()
            raise
        finally:
            job.close()

    def abandon(self) -> None:
        """Close all files as they are, without a sync."""
        self.images.close()
        self.layers.close()
        self.catalog.close()
        self.lock.release()

    # -- facts

    def sync_all(self) -> SyncJob:
        """A job that makes all that was changed durable."""
        stale = [image for image in self.images.open_images() if self.images.is_stale(image)]
        return self.images.sync_job(stale, self.arrived())

    def arrived(self) -> list[LayerId]:
        """The arriving layers that something came for since their last sync."""
        known = self.layers.by_id
        return [number for number in self.images.unsynced if number in known and known[number].presence is not None]

    def statvfs(self) -> os.statvfs_result:
        """The file system of the store. OSError when it is gone."""
        return os.statvfs(self.layers.directory)


def _is_hex(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return len(text) == 8 and int(text, 16) >= 0
    return False


def _fit_table(path: str) -> bool:
    """Give a table file the length that goes with its header, which a crash can have parted.

    Entries behind the end of the file are zero after it: the file would find them when it grows.
    Returns False if there is no valid header.
    """
    with contextlib.suppress(StoreDamaged):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = unpack_header(read_exactly(fd, HEADER, 0), path).size
            end = HEADER + pages(size) * ENTRY
            if os.fstat(fd).st_size > end:
                os.ftruncate(fd, end)
            os.ftruncate(fd, table_length(size))
            return True
        finally:
            os.close(fd)
    return False


def _copy_sparse(source: str, target: str) -> None:
    """Copy a table file; holes stay holes (they are most of a sparse guest's table)."""
    with open(source, "rb", buffering=0) as old:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "r+b", buffering=0) as new:
            for start, stop in data_extents(old.fileno()):
                copy_range(old.fileno(), start, new.fileno(), start, stop - start)
            new.truncate(os.fstat(old.fileno()).st_size)
