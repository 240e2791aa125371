"""Repair a store: take the steps that the check's findings carry, open and close it once, and check again.

What the last check still finds was not repaired.
"""

import contextlib
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator

import numpy as np

from ramfs.errors import StoreDamaged, StoreError
from ramfs.image.table import ENTRY
from ramfs.store.catalog import Catalog, make_catalog
from ramfs.store.check import Check, Finding, Report, TableCopy, read_table, salvage
from ramfs.store.files import sync_directory, write_all
from ramfs.store.images import HEADER, Header, pack_header, pack_layers, table_length, unpack_layers
from ramfs.store.lock import StoreLock
from ramfs.store.presence import States, read_states
from ramfs.store.store import Store
from ramfs.units import LOST, PAGE, PAGE_SHIFT, ROOT, SNAP_BIT, LayerId, pages


def check_store(directory: str, *, repair: bool = False) -> Report:
    """Check a store, with ``repair`` also mend it. Raises StoreBusy, StoreVersion, StoreError, OSError."""
    directory = os.path.abspath(directory)
    if not os.path.isdir(directory):
        raise StoreError(f"{directory} is not a directory: give the directory of a store")
    parts = [os.path.join(directory, part) for part in ("layers", "tables")]
    catalog = os.path.join(directory, "catalog.sqlite")
    if not os.path.exists(catalog) and not any(os.path.isdir(part) and os.listdir(part) for part in parts):
        raise StoreError(f"{directory} is not a ramfs store: it has neither a catalog nor layers")
    lock = StoreLock(directory, "ramfs fsck")
    try:
        report = Check(directory).run()
        found: dict[Finding, None] = {}
        # A repair can bring to light what it hid: a table that is back names pages that can be missing.
        for _ in range(4):
            mendable = [finding for finding in report.findings if finding.fix is not None]
            if not repair or not mendable:
                break
            found.update(dict.fromkeys(mendable))
            failed = _mend(directory, mendable)
            lock.release()
            try:
                failed += _reopen(directory)
            finally:
                lock = StoreLock(directory, "ramfs fsck")
            report = Check(directory).run()
            report.notes += failed
            if failed:
                break
        report.repaired = [finding for finding in found if finding not in report.findings]
        return report
    finally:
        lock.release()


def _mend(directory: str, findings: list[Finding]) -> list[str]:
    """Repair; returns a sentence for each repair that failed."""
    failed: list[str] = []
    without_catalog = [f for f in findings if f.kind.startswith(("parts-", "catalog-unreadable"))]
    if without_catalog:
        findings = without_catalog  # the others are judged again afterwards
    fixer = Fixer(directory, with_catalog=not without_catalog)
    try:
        for finding in findings:
            assert finding.fix is not None
            try:
                with fixer.transaction():
                    finding.fix(fixer)
            except (OSError, sqlite3.Error, StoreError) as exc:
                failed.append(f"{finding.where} could not be repaired: {exc}")
    finally:
        fixer.close()
    return failed


def _reopen(directory: str) -> list[str]:
    """Open and close the store, as a mount does: it settles what an unclean end left."""
    try:
        Store(directory, purpose="ramfs fsck").close()
    except (OSError, StoreError) as exc:
        return [f"the store still cannot be opened: {exc}"]
    return []


class Fixer:
    """The repairs. Each happens within a transaction of the catalog, where there is one."""

    def __init__(self, directory: str, *, with_catalog: bool) -> None:
        self.directory = directory
        self.catalog = Catalog(os.path.join(directory, "catalog.sqlite"), create=False) if with_catalog else None
        if self.catalog is not None:
            # The damage itself may break references; the check that follows tells what is left of them.
            self.catalog.execute("PRAGMA foreign_keys=OFF")
            self.catalog.set_meta("garbage", 1)

    def close(self) -> None:
        """Make everything durable."""
        if self.catalog is not None:
            self.catalog.sync()
            self.catalog.close()
        for part in ("layers", "tables"):
            with contextlib.suppress(FileNotFoundError):
                sync_directory(os.path.join(self.directory, part))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One repair happens as a whole or not at all, as far as the catalog goes."""
        if self.catalog is None:
            yield
        else:
            with self.catalog.transaction():
                yield

    def sql(self, statement: str, *values: object) -> None:
        """Change the catalog."""
        assert self.catalog is not None
        self.catalog.execute(statement, *values)

    def insert(self, statement: str, *values: object) -> int:
        """Add a row to the catalog; returns its number."""
        assert self.catalog is not None
        return self.catalog.insert(statement, *values)

    def row(self, statement: str, *values: object) -> sqlite3.Row | None:
        """Ask the catalog for a row."""
        assert self.catalog is not None
        return self.catalog.row(statement, *values)

    def make_part(self, part: str) -> None:
        """Make a missing directory of the store."""
        os.makedirs(os.path.join(self.directory, part), mode=0o700, exist_ok=True)

    def unlink(self, where: str) -> None:
        """Remove a file of the store."""
        os.unlink(os.path.join(self.directory, where))

    def rebuild_catalog(self) -> None:
        """Put a new catalog of the readable rows in the place of the damaged one, which is kept beside it."""
        path = os.path.join(self.directory, "catalog.sqlite")
        kept = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path + suffix, kept + suffix)
        source = sqlite3.connect(kept)
        try:
            make_catalog(path, lambda target: salvage(source, target))
        finally:
            source.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + "-wal")  # of the old one

    # -- tree

    def make_root(self) -> None:
        """Make the root directory; whatever has its number gets another one."""
        now = time.time_ns()
        old = self.row("SELECT * FROM inodes WHERE ino = ?", ROOT)
        if old is not None:
            new = self.insert(
                "INSERT INTO inodes (mode, uid, gid, nlink, atime, mtime, ctime) VALUES (0, 0, 0, 0, 0, 0, 0)"
            )
            columns = [name for name in old.keys() if name != "ino"]  # noqa: SIM118
            for column in columns:
                self.sql(f"UPDATE inodes SET {column} = ? WHERE ino = ?", old[column], new)
            self.sql("UPDATE names SET ino = ? WHERE ino = ?", new, ROOT)
            self.sql("UPDATE xattrs SET ino = ? WHERE ino = ?", new, ROOT)
            self.sql("DELETE FROM inodes WHERE ino = ?", ROOT)
        self.sql(
            "INSERT INTO inodes (ino, mode, uid, gid, nlink, atime, mtime, ctime, parent)"
            " VALUES (?, ?, ?, ?, 2, ?, ?, ?, ?)",
            ROOT, stat.S_IFDIR | 0o700, os.getuid(), os.getgid(), now, now, now, ROOT,
        )  # fmt: skip

    def attach(self, ino: int) -> None:
        """Give an inode that no path leads to a name that says its number. Links are counted by the next check."""
        inode = self.row("SELECT * FROM inodes WHERE ino = ?", ino)
        if inode is None:
            return
        self.sql("DELETE FROM names WHERE ino = ? AND parent NOT IN (SELECT ino FROM inodes)", ino)
        directory = stat.S_ISDIR(inode["mode"])
        if directory:
            self.sql("DELETE FROM names WHERE ino = ?", ino)
        parent = ROOT | SNAP_BIT if directory and inode["frozen"] else self._lost_and_found()
        self.sql("INSERT OR REPLACE INTO names (parent, name, ino) VALUES (?, ?, ?)", parent, b"#%d" % ino, ino)
        if directory:
            self.sql("UPDATE inodes SET parent = ? WHERE ino = ?", parent, ino)

    def _lost_and_found(self) -> int:
        row = self.row("SELECT ino FROM names WHERE parent = ? AND name = ?", ROOT, b"lost+found")
        if row is not None:
            return int(row["ino"])
        now = time.time_ns()
        ino = self.insert(
            "INSERT INTO inodes (mode, uid, gid, nlink, atime, mtime, ctime, parent) VALUES (?, ?, ?, 2, ?, ?, ?, ?)",
            stat.S_IFDIR | 0o700, os.getuid(), os.getgid(), now, now, now, ROOT,
        )  # fmt: skip
        self.sql("INSERT INTO names (parent, name, ino) VALUES (?, ?, ?)", ROOT, b"lost+found", ino)
        self.sql("UPDATE inodes SET nlink = nlink + 1 WHERE ino = ?", ROOT)
        return ino

    def freeze(self, ino: int) -> None:
        """Freeze an inode, and its image with it."""
        self.sql("UPDATE inodes SET frozen = 1 WHERE ino = ?", ino)
        row = self.row("SELECT images.* FROM inodes JOIN images ON images.id = image WHERE ino = ?", ino)
        if row is not None and not row["frozen"]:
            if row["live"] is not None:
                self.seal(row["live"])
            self.sql("UPDATE images SET frozen = 1 WHERE id = ?", row["id"])

    # -- images and layers

    def seal(self, layer: int) -> None:
        """Let nobody write to a layer any more; whoever did begins a new one."""
        self.sql("UPDATE layers SET sealed = 1 WHERE id = ?", layer)
        self.sql("UPDATE images SET live = NULL WHERE live = ?", layer)

    def drop_layer(self, layer: int) -> None:
        """Remove a layer without a file, and what names its pages elsewhere."""
        self.seal(layer)
        self.sql("DELETE FROM arriving WHERE layer = ?", layer)
        self.sql("DELETE FROM layers WHERE base = ?", layer)
        self.sql("DELETE FROM layers WHERE id = ?", layer)

    def complete_record(self, image: int, layers: set[int]) -> None:
        """Add layers to the record of those that a table names."""
        row = self.row("SELECT layers FROM images WHERE id = ?", image)
        if row is not None:
            known = unpack_layers(row["layers"]) | {LayerId(n) for n in layers}
            self.sql("UPDATE images SET layers = ? WHERE id = ?", pack_layers(known), image)

    def end_direct(self, image: int, check: Check, table: TableCopy | None) -> None:
        """Let an image have a table that was the file of a layer which cannot be its own any more."""
        self.sql("UPDATE images SET direct = 0, live = NULL WHERE id = ?", image)
        if table is not None and check.images[image]["live"] in check.layers:
            self.seal(check.images[image]["live"])
            self._replace(image, table)
            return
        size = PAGE
        with contextlib.suppress(OSError, StoreDamaged):
            size = max(size, read_table(check.table_path(image)).header.size)
        self._write_lost(image, size)

    # -- arriving layers

    def add_pull(self, number: int) -> None:
        """A pull whose source nobody knows, for layers that arrive."""
        self.sql(
            "INSERT INTO pulls (id, directory, uri, options, created) VALUES (?, 0, 'file:/unknown', '{}', ?)",
            number, time.time_ns(),
        )  # fmt: skip

    def reset_states(self, layer: int, count: int) -> None:
        """Let of an arriving layer be here what was when it was last synced; nothing, where that is not known."""
        states = read_states(self._layer_path(layer, "kept"), count)
        self._write_states(layer, np.zeros(count, np.uint8) if states is None else states)

    def absent_again(self, layer: int, runs: list[tuple[int, int]]) -> None:
        """Let pages of an arriving layer come again."""
        for suffix in ("here", "kept"):
            with contextlib.suppress(FileNotFoundError), open(self._layer_path(layer, suffix), "r+b", 0) as file:
                for first, stop in runs:
                    if first < (end := min(stop, os.fstat(file.fileno()).st_size)):
                        write_all(file.fileno(), bytes(end - first), first)
                os.fdatasync(file.fileno())

    def lengthen_arriving(self, layer: int, count: int) -> None:
        """Make the file of an arriving layer as long as it should be; what it lacked comes again."""
        with open(self._layer_path(layer, "ram"), "ab", 0) as file:
            there = os.fstat(file.fileno()).st_size >> PAGE_SHIFT
            self.absent_again(layer, [(there, count)])
            os.ftruncate(file.fileno(), count << PAGE_SHIFT)
            os.fdatasync(file.fileno())

    def _write_states(self, layer: int, states: States) -> None:
        for suffix in ("kept", "here"):
            path = self._layer_path(layer, suffix)
            with open(path + ".new", "wb", 0) as file:
                write_all(file.fileno(), states.tobytes(), 0)
                os.fdatasync(file.fileno())
            os.rename(path + ".new", path)

    def _layer_path(self, layer: int, suffix: str) -> str:
        return os.path.join(self.directory, "layers", f"{layer:08x}.{suffix}")

    def drop_image(self, image: int) -> None:
        """Remove an image that no file has."""
        row = self.row("SELECT live FROM images WHERE id = ?", image)
        if row is not None and row["live"] is not None:
            self.seal(row["live"])
        self.sql("DELETE FROM working_sets WHERE image = ?", image)
        self.sql("DELETE FROM images WHERE id = ?", image)

    def give_lost_image(self, ino: int) -> None:
        """Give a regular file without contents an image of one lost page, so that it cannot pass for an empty one."""
        row = self.row("SELECT frozen FROM inodes WHERE ino = ?", ino)
        frozen = 0 if row is None else row["frozen"]
        number = self.insert("INSERT INTO images (frozen, created) VALUES (?, ?)", frozen, time.time_ns())
        self._write_lost(number, PAGE)
        self.sql("UPDATE inodes SET image = ? WHERE ino = ?", number, ino)

    def copy_image(self, ino: int, image: int) -> None:
        """Give a file that has another one's image a copy of it."""
        row = self.row("SELECT * FROM images WHERE id = ?", image)
        assert row is not None
        if row["live"] is not None:
            self.seal(row["live"])
        number = self.insert(
            "INSERT INTO images (frozen, layers, parent, created) VALUES (?, ?, ?, ?)",
            row["frozen"], row["layers"], image, time.time_ns(),
        )  # fmt: skip
        for suffix in ("map", "durable"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(self.table_path(image, suffix), self.table_path(number, suffix))
        self.sql("UPDATE inodes SET image = ? WHERE ino = ?", number, ino)

    # -- tables

    def table_path(self, image: int, suffix: str) -> str:
        """The path of a table file."""
        return os.path.join(self.directory, "tables", f"{image:08x}.{suffix}")

    def restore_table(self, image: int, check: Check) -> None:
        """Take the other copy of a table that is damaged; without one, let all of the file be lost."""
        frozen = check.images[image]["frozen"]
        if not frozen and check.suffix == "map":
            with contextlib.suppress(OSError, StoreDamaged):
                durable = read_table(self.table_path(image, "durable"))
                if not durable.short:
                    self.write_table(image, check, durable)
                    return
        size = PAGE
        with contextlib.suppress(OSError, StoreDamaged):
            size = max(size, read_table(check.table_path(image)).header.size)
        with contextlib.suppress(OSError):
            found = os.path.getsize(check.table_path(image))
            size = max(size, (found - HEADER) // ENTRY * PAGE)
        for layer in unpack_layers(check.images[image]["layers"]):
            if (place := check.place(layer)) is not None:
                with contextlib.suppress(OSError):
                    path = os.path.join(self.directory, "layers", f"{place[0]:08x}.ram")
                    size = max(size, os.path.getsize(path) - (place[1] << PAGE_SHIFT))
        self._write_lost(image, size)

    def _write_lost(self, image: int, size: int) -> None:
        """A table of which every page is lost."""
        now = time.time_ns()
        entries = np.full(pages(size), LOST, np.uint32)
        self._replace(image, TableCopy(Header(size, now, now), [(0, entries)], 0, False))

    def write_table(self, image: int, check: Check, table: TableCopy) -> None:  # noqa: ARG002
        """Write a table anew, both copies of it."""
        self._replace(image, table)

    def lose(self, image: int, check: Check, ranges: list[tuple[int, int]]) -> None:
        """Mark pages of an image lost."""
        table = read_table(check.table_path(image))
        for low, entries in table.parts:
            for first, stop in ranges:
                entries[max(0, first - low) : max(0, stop - low)] = LOST
        self._replace(image, table)

    def _replace(self, image: int, table: TableCopy) -> None:
        """Write a table file whole, under a new name first.

        Both copies: after an unclean end, too, the other one is made from this one when the store is opened.
        """
        row = self.row("SELECT frozen FROM images WHERE id = ?", image)
        suffixes = ("map",) if row is not None and row["frozen"] else ("map", "durable")
        for suffix in suffixes:
            path = self.table_path(image, suffix)
            with open(path + ".new", "wb", buffering=0) as file:
                file.write(pack_header(table.header))
                for low, entries in table.parts:
                    file.seek(HEADER + low * ENTRY)
                    file.write(entries.astype("<u4").tobytes())
                os.ftruncate(file.fileno(), table_length(table.header.size))
                os.fdatasync(file.fileno())
            os.rename(path + ".new", path)
