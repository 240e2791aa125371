"""The catalog: names, inodes, images and layers, in SQLite.

Every change is one transaction. A commit puts its frames into the write-ahead log in the page cache, so it
outlives a killed daemon; :meth:`Catalog.sync` flushes the log, so that everything committed before outlives
power loss too. The loop thread alone uses the connection; ``sync`` may be called from any thread.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ramfs.errors import StoreBusy, StoreDamaged, StoreError, StoreVersion
from ramfs.store.files import is_memory, sync_directory

#: Changes with every change of the format that an older program could misread.
FORMAT_VERSION: Final = 1
#: ... and that of a store that has arriving layers, of which an older program would take absent pages for zeros.
ARRIVING_VERSION: Final = 2
#: ... or direct images (store/direct.py), of which it would believe the table.
DIRECT_VERSION: Final = ARRIVING_VERSION
KNOWN_VERSIONS: Final = (FORMAT_VERSION, ARRIVING_VERSION)

#: The tables of an empty catalog.
SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE layers (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    sealed   INTEGER NOT NULL DEFAULT 0,
    digested INTEGER NOT NULL DEFAULT 0,
    base     INTEGER REFERENCES layers,     -- an alias: names pages of this layer's file ...
    shift    INTEGER NOT NULL DEFAULT 0,    -- ... at page index + shift
    copied   INTEGER NOT NULL DEFAULT 0,    -- 1: made of another layer's pages, at the same place of their files
    CHECK (base IS NULL OR sealed)
);
CREATE UNIQUE INDEX aliases ON layers (base, shift) WHERE base IS NOT NULL;
CREATE TABLE images (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    frozen  INTEGER NOT NULL DEFAULT 0,
    live    INTEGER REFERENCES layers,      -- the layer that takes its writes, if it has one
    layers  BLOB NOT NULL DEFAULT x'',      -- uint32 each: a superset of the layers that its table names
    parent  INTEGER,                        -- the image it was copied from, for the record
    created INTEGER NOT NULL,               -- ns since the epoch
    direct  INTEGER NOT NULL DEFAULT 0      -- its contents are what the file of its live layer reads as
);
CREATE TABLE inodes (
    ino    INTEGER PRIMARY KEY AUTOINCREMENT,
    mode   INTEGER NOT NULL,
    uid    INTEGER NOT NULL,
    gid    INTEGER NOT NULL,
    nlink  INTEGER NOT NULL,
    rdev   INTEGER NOT NULL DEFAULT 0,
    atime  INTEGER NOT NULL,
    mtime  INTEGER NOT NULL,                -- of a regular file: in the header of its table
    ctime  INTEGER NOT NULL,
    parent INTEGER,                         -- of a directory: where its .. leads
    frozen INTEGER NOT NULL DEFAULT 0,
    image  INTEGER REFERENCES images,       -- of a regular file
    target BLOB,                            -- of a symlink
    btime  INTEGER NOT NULL DEFAULT 0       -- when it was made, 0: not known
);
CREATE INDEX inode_images ON inodes (image) WHERE image IS NOT NULL;
CREATE INDEX inodes_unlinked ON inodes (ino) WHERE nlink = 0;
CREATE TABLE names (
    cookie INTEGER PRIMARY KEY AUTOINCREMENT,   -- the readdir offset: grows, is never used again
    parent INTEGER NOT NULL,                    -- a directory, or a directory with SNAP_BIT set: its .snap
    name   BLOB NOT NULL,
    ino    INTEGER NOT NULL REFERENCES inodes
);
CREATE UNIQUE INDEX names_by_name ON names (parent, name);
CREATE INDEX names_by_ino ON names (ino);
CREATE INDEX names_in_order ON names (parent, cookie);
CREATE TABLE xattrs (
    ino   INTEGER NOT NULL REFERENCES inodes,
    name  BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (ino, name)
) WITHOUT ROWID;
"""

#: What was added to the schema since, made where it is missing. An older program does not look at it.
ADDITIONS: Final = """
CREATE TABLE IF NOT EXISTS outcomes (
    request INTEGER PRIMARY KEY,            -- FUSE's number of it, on the connection of the last mount
    ino     INTEGER NOT NULL                -- the inode that the answer speaks of, 0 if it speaks of none
);
CREATE TABLE IF NOT EXISTS pulls (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    directory INTEGER NOT NULL,             -- the inode that it was made for
    uri       TEXT NOT NULL,                -- where its pages come from, now
    options   TEXT NOT NULL,                -- a JSON object (arrival/pulls.py)
    created   INTEGER NOT NULL              -- ns since the epoch
);
CREATE TABLE IF NOT EXISTS arriving (
    layer INTEGER PRIMARY KEY REFERENCES layers,
    pull  INTEGER NOT NULL REFERENCES pulls,
    name  BLOB NOT NULL,                    -- what the source calls the file
    size  INTEGER NOT NULL,                 -- bytes that it has there
    promised INTEGER NOT NULL,              -- 1: ID.xxh3 has what a manifest says, and each page is compared with it
    taken INTEGER NOT NULL                  -- pages of the file that were found in other layers
);
CREATE TABLE IF NOT EXISTS working_sets (
    image   INTEGER PRIMARY KEY REFERENCES images ON DELETE CASCADE,
    records BLOB NOT NULL                   -- what guests that begin with it ask for first (image/working_set.py)
);
"""

Row = sqlite3.Row


def settle_version(catalog: "Catalog") -> None:
    """A store may be opened by older programs when it has nothing left that they would misread. In a transaction."""
    if not catalog.number("SELECT (SELECT count(*) FROM arriving) + (SELECT count(*) FROM images WHERE direct)"):
        catalog.set_meta("version", FORMAT_VERSION)


def make_catalog(path: str, fill: Callable[[sqlite3.Connection], object] | None = None) -> None:
    """Put a new catalog at ``path``, durably; it appears there complete. ``fill`` may add rows to it.

    Raises OSError, StoreError on a full disk.
    """
    new = path + ".new"
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new + suffix)  # of one whose making was cut short
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    db = sqlite3.connect(new, isolation_level=None)
    try:
        db.executescript(f"BEGIN;{SCHEMA}{ADDITIONS}")
        if fill is not None:
            fill(db)
        db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (FORMAT_VERSION,))
        db.execute("COMMIT")
    except sqlite3.OperationalError as exc:
        raise StoreError(f"{path} cannot be made: {exc}") from exc
    finally:
        db.close()
    fd = os.open(new, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)
    sync_directory(os.path.dirname(path))


class Catalog:
    """The SQLite database ``catalog.sqlite`` of a store."""

    def __init__(self, path: str, *, create: bool, timeout: float = 2.0) -> None:
        """Open the catalog; make it when ``create``. Raises StoreDamaged, StoreVersion or StoreBusy."""
        self.path = path
        if not create and not os.path.exists(path):
            raise StoreDamaged(f"{path} is missing: this is not a ramfs store, or its catalog was lost")
        fresh = not os.path.exists(path) or os.path.getsize(path) == 0
        if fresh and not create:
            raise StoreDamaged(f"{path} is empty: the catalog was lost")
        if fresh:
            make_catalog(path)
        self._db = sqlite3.connect(path, isolation_level=None, timeout=timeout, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._depth = 0
        self._undo: list[Callable[[], object]] = []
        self._wal = -1
        self.make_room: Callable[[], None] = lambda: None
        try:
            # One daemon for each store, so the lock is taken once and the shared-memory index is not needed.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA foreign_keys=ON")
            if is_memory(path):
                # 256 KiB instead of 4 MiB: there is no disk that a checkpoint would have to wait for.
                self._db.execute("PRAGMA wal_autocheckpoint=64")
            self._check_version()
        except sqlite3.OperationalError as exc:
            self._db.close()
            if "locked" in str(exc):
                raise StoreBusy(f"{path} is locked by another process: stop it and try again") from exc
            raise StoreDamaged(f"{path}: {exc}; run `ramfs fsck` on the store") from exc
        except sqlite3.DatabaseError as exc:
            self._db.close()
            raise StoreDamaged(f"{path} is not readable ({exc}); run `ramfs fsck` on the store") from exc
        except BaseException:
            self._db.close()
            raise

    def _check_version(self) -> None:
        version = self.meta("version")
        if version not in KNOWN_VERSIONS:
            raise StoreVersion(
                f"{self.path} has format version {version}, this program knows none above {ARRIVING_VERSION}: "
                "use the ramfs that made it, or a newer one"
            )
        # Takes the exclusive lock now, not at the first write.
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("UPDATE meta SET value = value WHERE key = 'version'")
        for table, column in (("inodes", "btime"), ("images", "direct"), ("layers", "copied")):
            if not self.number("SELECT count(*) FROM pragma_table_info(?) WHERE name = ?", table, column):
                self._db.execute(f"ALTER TABLE {table} ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0")
        self._db.execute("COMMIT")
        self._db.executescript(ADDITIONS)
        self._wal = os.open(self.path + "-wal", os.O_RDONLY)

    def close(self) -> None:
        """Close the database; the write-ahead log is folded in."""
        if self._wal >= 0:
            os.close(self._wal)
            self._wal = -1
        self._db.close()

    @contextmanager
    def transaction(self, *, frees: bool = False) -> Iterator[None]:
        """All changes inside happen or none; nests (the outermost commits).

        What is kept in memory of the rows must go back with them: see :meth:`on_rollback`. One that ``frees``
        space may take it from the store's reserve.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        if frees:
            self.make_room()
        self._db.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            for step in reversed(self._undo):
                step()
            raise
        finally:
            self._depth = 0
            self._undo.clear()

    def on_rollback(self, step: Callable[[], object]) -> None:
        """Call ``step`` if the transaction under way fails; later steps are called before earlier ones."""
        if self._depth == 0:
            raise AssertionError("not in a transaction")
        self._undo.append(step)

    def sync(self) -> None:
        """Make everything committed so far durable (any thread).

        Frames that left the log went to the database file by a checkpoint, which syncs before it reuses the log.
        """
        os.fdatasync(self._wal)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Run one statement; outside a transaction it is one of its own."""
        return self._db.execute(sql, values)

    def executemany(self, sql: str, rows: Any) -> None:
        """Run one statement for many rows of values."""
        self._db.executemany(sql, rows)

    def row(self, sql: str, *values: Any) -> Row | None:
        """The first row of a query, or None."""
        row: Row | None = self._db.execute(sql, values).fetchone()
        return row

    def number(self, sql: str, *values: Any) -> int:
        """The one number that a query such as SELECT count(*) gives."""
        (number,) = self._db.execute(sql, values).fetchone()
        return int(number)

    def insert(self, sql: str, *values: Any) -> int:
        """Run an INSERT and return the new row's number."""
        number = self._db.execute(sql, values).lastrowid
        assert number is not None
        return number

    def meta(self, key: str) -> Any:
        """A value of the ``meta`` table, None where there is none."""
        row = self.row("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else row["value"]

    def set_meta(self, key: str, value: Any) -> None:
        """Set a value of the ``meta`` table."""
        self.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", key, value)
