"""Check a store that nobody has mounted, and repair what can be repaired without making anything up.

A check writes nothing: it reads a copy of the catalog, and of a store that was not closed (the daemon was
killed, the power went) it looks at the tables that count when it is opened next. Such a store is not damaged.

Two rules for repairs. What is lost stays lost, visibly: a page whose contents are gone gets the table entry
LOST, which no layer has, so that reading it is an error and never zeros. And of two readings of a damage, the
one that drops data is not taken: where a page and its digest contradict each other for a whole layer, nobody
can tell which is wrong, and both stay.

The order: catalog, tree, layers and their pages, tables. Every finding carries the step that repairs it,
which repair.py takes.
"""

import contextlib
import errno
import os
import shutil
import sqlite3
import stat
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import methodcaller as step
from typing import Any, Final, NamedTuple

import numpy as np

from ramfs.errors import StoreDamaged, StoreVersion
from ramfs.image.digest import DIGEST, digest_pages
from ramfs.image.table import ENTRY, Entries, Mask, runs_of
from ramfs.image.working_set import is_valid
from ramfs.store.catalog import DIRECT_VERSION, KNOWN_VERSIONS
from ramfs.store.files import data_extents, read_exactly, stored_pages
from ramfs.store.images import HEADER, Header, table_length, unpack_header, unpack_layers
from ramfs.store.presence import STORED, States, read_states
from ramfs.store.reflink import entries_of, stored_extents
from ramfs.store.store import boot_id
from ramfs.units import LOST, MAX_NAME, PAGE, PAGE_SHIFT, ROOT, SNAP_BIT, ZERO, LayerId, pages

#: Takes a repair.Fixer; made by operator.methodcaller.
Fix = Callable[[Any], Any]


class Kind(NamedTuple):
    """A kind of finding."""

    damage: bool
    """False for what is harmless"""
    meaning: str
    repair: str
    """what ``--repair`` does, empty where it can do nothing"""


_LOSE: Final = "the page is marked lost: reading it is EIO until it is overwritten as a whole"
_LOSE_FILE: Final = "taken from the durable copy where that is whole; else all of the file is marked lost"
_ATTACH: Final = "it gets a name in /lost+found, a frozen directory in /.snap"

#: Every kind of finding, by the word that reports use.
KINDS: Final[dict[str, Kind]] = {
    "parts-missing": Kind(True, "the directory layers or tables is missing", "it is made anew"),
    "catalog-missing": Kind(True, "catalog.sqlite is missing or empty", ""),
    "catalog-unreadable": Kind(
        True, "catalog.sqlite is damaged", "its readable rows move to a new one, if any are; the old one is kept"
    ),
    "catalog-reference": Kind(True, "a row refers to one that is missing", "the reference is removed"),
    "root-missing": Kind(True, "there is no root directory", "an empty one is made"),
    "name-broken": Kind(True, "a name leads to an inode that is missing", "the name is removed"),
    "name-astray": Kind(True, "a name is in a directory that is missing", "the name is removed"),
    "name-impossible": Kind(True, "a name that no file can have", "the name is removed"),
    "directory-names": Kind(True, "a directory has more than one name", "the first is kept"),
    "directory-parent": Kind(True, "the .. of a directory leads elsewhere", "it is set right"),
    "inode-unreachable": Kind(True, "no path leads from the root to an inode", _ATTACH),
    "inode-links": Kind(True, "a link count is wrong", "it is counted"),
    "inode-image": Kind(
        True, "a regular file has no contents, or something else has", "a file gets one page, which is marked lost"
    ),
    "image-shared": Kind(True, "two files have the same image", "the later one gets a copy"),
    "image-unused": Kind(False, "an image that no file has", "it is removed"),
    "working-set": Kind(
        True, "the working set of an image is damaged", "it is removed; the next resume records another"
    ),
    "frozen-mixed": Kind(
        True, "something in a snapshot is not frozen, or only half", "it is frozen, or thawed outside"
    ),
    "live-shared": Kind(True, "two images write to one layer", "the layer is sealed"),
    "live-sealed": Kind(True, "an image writes to a sealed layer", "it begins a new one"),
    "live-foreign": Kind(True, "a table names a layer that another image writes to", "the layer is sealed"),
    "direct-file": Kind(
        True,
        "a file that is the file of its live layer has no such layer",
        "it gets a table: of the pages in that layer's file, or all of it is marked lost",
    ),
    "layer-file": Kind(True, "the file of a layer is missing", "its pages are marked lost"),
    "layer-empty": Kind(False, "a layer without a file, of which nothing is named", "it is removed"),
    "layer-unused": Kind(False, "a layer that takes writes for no image", "it is sealed, and goes with the next mount"),
    "arriving-states": Kind(
        True,
        "nothing tells which pages of an arriving layer are here",
        "those that were when it was last synced; the others come again",
    ),
    "arriving-file": Kind(
        True, "the file of an arriving layer is missing, or too short", "it is made so long; what it lacks comes again"
    ),
    "arriving-page": Kind(
        True, "a page that has arrived is a hole, cannot be read, or is not what its digest says", "it comes again"
    ),
    "arriving-source": Kind(
        True,
        "nothing tells where the pages of an arriving layer come from",
        "a pull from nowhere gets it, which can be given a source with `ramfs recover`",
    ),
    "table-missing": Kind(True, "a table is missing", _LOSE_FILE),
    "table-header": Kind(True, "a table has no valid header", _LOSE_FILE),
    "table-short": Kind(True, "a table is shorter than its size says", _LOSE_FILE),
    "table-beyond": Kind(True, "a table has entries behind the end of the file", "they are cut off"),
    "table-record": Kind(True, "a table names a layer that its image's record lacks", "the record is completed"),
    "durable-differs": Kind(
        True, "the durable copy of a table is missing or differs, in a store that was closed", "it is written anew"
    ),
    "page-unknown": Kind(True, "an entry names a layer that does not exist", _LOSE),
    "page-beyond": Kind(True, "an entry names a page behind the end of its layer's file", _LOSE),
    "page-hole": Kind(True, "an entry names a page that is a hole in its layer", _LOSE),
    "page-unreadable": Kind(True, "the disk cannot read a page", _LOSE),
    "page-digest": Kind(True, "a page is not what its digest says", _LOSE),
    "page-lost": Kind(False, "a page was lost, and marked so by an earlier repair", ""),
    "digests-missing": Kind(
        True,
        "digests of a sealed layer are missing, so nothing tells whether its pages are what they were",
        "the next mount makes them of the pages as they are now",
    ),
    "digests-foreign": Kind(
        True,
        "no page of a layer is what its digest says: the layer or its digests are another's. "
        "Compare with a backup; to take the pages as they are, remove the digest file and repair",
        "",
    ),
    "file-leftover": Kind(False, "a file that belongs to nothing", "it is removed"),
    "file-foreign": Kind(False, "a file that ramfs did not make", ""),
}

#: Where whole-layer mismatch begins to speak against the digests rather than the pages.
_FOREIGN_FROM: Final = 8
_BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    kind: str
    where: str
    """a path in the tree, or a file of the store"""
    detail: str = ""
    fix: Fix | None = field(default=None, compare=False, repr=False)

    @property
    def damage(self) -> bool:
        """Is it more than a harmless leftover?"""
        return KINDS[self.kind].damage

    def __str__(self) -> str:
        return f"{self.where}: {KINDS[self.kind].meaning}" + (f" ({self.detail})" if self.detail else "")


@dataclass(slots=True)
class Report:
    """What a check found; after a repair ``findings`` is what is left."""

    findings: list[Finding]
    repaired: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """remarks in sentences: how the store ended, repairs that failed"""

    @property
    def damaged(self) -> bool:
        """Is there damage left?"""
        return any(finding.damage for finding in self.findings)


class TableCopy(NamedTuple):
    """A table as it is on disk: header, and the parts of it that are not holes."""

    header: Header
    parts: list[tuple[int, Entries]]
    beyond: int
    """entries behind the end of the file that are not zero"""
    short: bool


def read_table(path: str) -> TableCopy:
    """Read a table file. Raises FileNotFoundError, StoreDamaged, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = unpack_header(read_exactly(fd, HEADER, 0), path)
        count = pages(header.size)
        parts: list[tuple[int, Entries]] = []
        beyond = 0
        for start, stop in data_extents(fd, HEADER):
            low, high = (start - HEADER) // ENTRY, (stop - HEADER) // ENTRY
            entries = np.frombuffer(read_exactly(fd, (high - low) * ENTRY, start), "<u4").astype(np.uint32)
            beyond += int(np.count_nonzero(entries[max(0, count - low) :]))
            entries = entries[: max(0, count - low)]
            if entries.any():
                parts.append((low, entries))
        return TableCopy(header, parts, beyond, os.fstat(fd).st_size < table_length(header.size))
    finally:
        os.close(fd)


def direct_table(path: str, layer: int) -> TableCopy:
    """The table of an image that is the file of its layer. Raises FileNotFoundError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        told = os.fstat(fd)
        header = Header(told.st_size, told.st_mtime_ns, told.st_ctime_ns)
        return TableCopy(header, entries_of(stored_extents(fd), LayerId(layer)), 0, False)
    finally:
        os.close(fd)


class Check:
    """One look at a whole store. Writes nothing."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.suffix = "map"
        self.unclean = False
        self.power_lost = False
        self.db: sqlite3.Connection
        self.inodes: dict[int, sqlite3.Row] = {}
        self.images: dict[int, sqlite3.Row] = {}
        self.layers: dict[int, sqlite3.Row] = {}
        self.direct: set[int] = set()
        """images that are the file of their live layer (store/direct.py)"""
        self.arriving: dict[int, int] = {}
        """layers whose pages are not all here, and their bytes at the source"""
        self.promised: set[int] = set()
        """of these: whose digests a manifest has told"""
        self.states: dict[int, States] = {}
        """of these: which are"""
        self.names: list[sqlite3.Row] = []
        self.name_of: dict[int, tuple[int, bytes]] = {}
        self.image_paths: dict[int, str] = {}
        self.pending: set[int] = set()
        """images of inodes that go with the next mount: their tables may be anything"""

    def note(self, kind: str, where: str, detail: str = "", fix: Fix | None = None) -> None:
        """Record a finding."""
        self.findings.append(Finding(kind, where, detail, fix))

    def path(self, *parts: str) -> str:
        """A path in the store."""
        return os.path.join(self.directory, *parts)

    def run(self) -> Report:
        """Check everything."""
        for part in ("layers", "tables"):
            if not os.path.isdir(self.path(part)):
                self.note("parts-missing", part, fix=step("make_part", part))
        with tempfile.TemporaryDirectory(prefix="ramfs-fsck-") as copy:
            if self._open_catalog(copy):
                try:
                    self._load()
                    self._check_references()
                    self._check_tree()
                    self._check_images()
                    self._check_layers()
                    self._check_arriving()
                    self._check_pages()
                    self._check_files()
                finally:
                    self.db.close()
        return Report(self.findings, notes=self.notes)

    # -- catalog

    def _open_catalog(self, copy: str) -> bool:
        """Open a copy of the catalog, so that not even SQLite's own recovery touches the store."""
        path = self.path("catalog.sqlite")
        if not os.path.exists(path) or os.path.getsize(path) == 0:
            self.note("catalog-missing", "catalog.sqlite", "without it nothing says which file has which pages: "
                      "put back a copy of it; the pages themselves are in layers/, each at its own offset")  # fmt: skip
            return False
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path + suffix, os.path.join(copy, "catalog.sqlite" + suffix))
        self.db = sqlite3.connect(os.path.join(copy, "catalog.sqlite"), isolation_level=None)
        self.db.row_factory = sqlite3.Row
        try:
            version = self.meta("version")
            problems = [row[0] for row in self.db.execute("PRAGMA integrity_check(20)")]
        except sqlite3.DatabaseError as exc:
            version, problems = None, [str(exc)]
        if problems != ["ok"]:
            fix: Fix | None = None
            if salvage(self.db, None):
                fix = step("rebuild_catalog")
            detail = "; ".join(" ".join(problem.split()) for problem in problems[:3])
            self.note("catalog-unreadable", "catalog.sqlite", detail, fix)
            self.db.close()
            return False
        if version not in KNOWN_VERSIONS:
            self.db.close()
            raise StoreVersion(f"{path} has format version {version}, this program knows {DIRECT_VERSION}")
        return True

    def meta(self, key: str) -> Any:
        """A value of the ``meta`` table."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row["value"]

    def _load(self) -> None:
        self.unclean = not self.meta("clean")
        if self.unclean:
            self.power_lost = self.meta("boot_id") != boot_id()
            self.suffix = "durable" if self.power_lost else "map"
            what = "the machine went down" if self.power_lost else "its daemon was killed"
            self.notes.append(f"the store was not closed ({what}): checked as the next mount will find it")
        self.inodes = {row["ino"]: row for row in self.db.execute("SELECT * FROM inodes")}
        self.images = {row["id"]: row for row in self.db.execute("SELECT * FROM images")}
        if any("direct" in row.keys() for row in self.images.values()):  # noqa: SIM118
            self.direct = {number for number, row in self.images.items() if row["direct"]}
        self.layers = {row["id"]: row for row in self.db.execute("SELECT * FROM layers")}
        self.names = self.db.execute("SELECT cookie, parent, name, ino FROM names ORDER BY cookie").fetchall()

    def _check_references(self) -> None:
        """Foreign keys: names are judged with the tree, which tells more about them."""
        for row in self.db.execute("PRAGMA foreign_key_check").fetchall():
            table, rowid, parent = row[0], row[1], row[2]
            if (table, parent) in {("names", "inodes"), ("inodes", "images")}:
                continue
            if table == "xattrs":
                sql = "DELETE FROM xattrs WHERE ino NOT IN (SELECT ino FROM inodes)"
            elif table == "arriving":
                if parent == "pulls":
                    continue
                sql = "DELETE FROM arriving WHERE layer NOT IN (SELECT id FROM layers)"
            elif table == "working_sets":
                sql = "DELETE FROM working_sets WHERE image NOT IN (SELECT id FROM images)"
            elif table == "images":
                sql = "UPDATE images SET live = NULL WHERE live NOT IN (SELECT id FROM layers)"
            else:
                sql = "DELETE FROM layers WHERE base NOT IN (SELECT id FROM layers)"
            where = table if rowid is None else f"{table} {rowid}"
            self.note("catalog-reference", where, f"to {parent}", step("sql", sql))

    # -- tree

    def _check_tree(self) -> None:
        root = self.inodes.get(ROOT)
        if not self.inodes and not self.names:
            return  # new: the first mount makes the root
        if root is None or not stat.S_ISDIR(root["mode"]):
            self.note("root-missing", "/", fix=step("make_root"))
            if root is None:
                return  # judged once there is one
        children: dict[int, list[sqlite3.Row]] = defaultdict(list)
        names_of: dict[int, list[sqlite3.Row]] = defaultdict(list)
        for row in self.names:
            if self._check_name(row):
                children[row["parent"]].append(row)
                names_of[row["ino"]].append(row)
                self.name_of.setdefault(row["ino"], (row["parent"], bytes(row["name"])))
        pending = self._walk(
            [ino for ino, row in self.inodes.items() if row["nlink"] == 0 and ino not in names_of], children
        )
        reached = self._walk([int(ROOT)], children)
        lost = self.inodes.keys() - reached - pending
        # Of what no path leads to, the tops get a name: those without any, and one of each circle.
        tops = sorted(ino for ino in lost if not names_of[ino])
        below = self._walk(tops, children)
        for ino in sorted(lost - below):
            if ino not in below:
                tops.append(ino)
                below |= self._walk([ino], children)
        for ino in tops:
            self.note("inode-unreachable", f"inode {ino}", fix=step("attach", ino))
        for ino in sorted(self.inodes.keys() - pending - lost):
            self._check_inode(self.inodes[ino], names_of[ino], children)
        self.pending = {self.inodes[ino]["image"] for ino in pending - reached} - {None}
        for ino in sorted(self.inodes.keys() - pending):
            image = self.inodes[ino]["image"]
            if image is not None:
                self.image_paths.setdefault(image, self.inode_path(ino))

    def _check_name(self, row: sqlite3.Row) -> bool:
        base = self.inodes.get(row["parent"] & ~SNAP_BIT)
        name = row["name"]
        kind = None
        if base is None or not stat.S_ISDIR(base["mode"]):
            kind = "name-astray"
        elif row["ino"] not in self.inodes:
            kind = "name-broken"
        elif (
            not isinstance(name, bytes) or name in (b"", b".", b"..", b".snap") or len(name) > MAX_NAME
            or b"/" in name or b"\0" in name
        ):  # fmt: skip
            kind = "name-impossible"
        if kind is None:
            return True
        self.note(
            kind, f"name {os.fsdecode(name) if isinstance(name, bytes) else name!r}", f"inode {row['ino']}",
            step("sql", "DELETE FROM names WHERE cookie = ?", row["cookie"]),
        )  # fmt: skip
        return False

    def _walk(self, tops: Iterable[int], children: dict[int, list[sqlite3.Row]]) -> set[int]:
        """The inodes that can be reached from ``tops``, snapshots included."""
        reached = {ino for ino in tops if ino in self.inodes}
        todo = list(reached)
        while todo:
            ino = todo.pop()
            for row in (*children.get(ino, ()), *children.get(ino | SNAP_BIT, ())):
                if row["ino"] not in reached:
                    reached.add(row["ino"])
                    todo.append(row["ino"])
        return reached

    def _check_inode(
        self, inode: sqlite3.Row, names: list[sqlite3.Row], children: dict[int, list[sqlite3.Row]]
    ) -> None:
        ino, where = inode["ino"], self.inode_path(inode["ino"])
        if stat.S_ISDIR(inode["mode"]):
            for row in names[1:]:
                self.note(
                    "directory-names", where, f"also {os.fsdecode(row['name'])}",
                    step("sql", "DELETE FROM names WHERE cookie = ?", row["cookie"]),
                )  # fmt: skip
            parent = int(ROOT) if ino == ROOT else names[0]["parent"]
            if inode["parent"] != parent:
                self.note(
                    "directory-parent", where,
                    fix=step("sql", "UPDATE inodes SET parent = ? WHERE ino = ?", parent, ino),
                )  # fmt: skip
            links = 2 + sum(stat.S_ISDIR(self.inodes[row["ino"]]["mode"]) for row in children.get(ino, ()))
        else:
            links = len(names)
        if inode["nlink"] != links:
            self.note(
                "inode-links", where, f"{inode['nlink']}, should be {links}",
                step("sql", "UPDATE inodes SET nlink = ? WHERE ino = ?", links, ino),
            )  # fmt: skip
        if ino != ROOT:
            self._check_frozen(inode, where)

    def _check_frozen(self, inode: sqlite3.Row, where: str) -> None:
        ino, image = inode["ino"], self.images.get(inode["image"])
        within = "/.snap/" in where
        regular = stat.S_ISREG(inode["mode"])
        if (within and not inode["frozen"]) or (image is not None and inode["frozen"] and not image["frozen"]):
            self.note("frozen-mixed", where, fix=step("freeze", ino))
        elif not within and inode["frozen"] and not self._has_frozen_name(inode) and (stat.S_ISDIR(inode["mode"])):
            self.note("frozen-mixed", where, fix=step("sql", "UPDATE inodes SET frozen = 0 WHERE ino = ?", ino))
        elif image is not None and regular and image["frozen"] and not inode["frozen"]:
            self.note("frozen-mixed", where, fix=step("sql", "UPDATE inodes SET frozen = 1 WHERE ino = ?", ino))

    def _has_frozen_name(self, inode: sqlite3.Row) -> bool:
        return any(row["ino"] == inode["ino"] and row["parent"] & SNAP_BIT for row in self.names)

    def inode_path(self, ino: int) -> str:
        """A path of an inode in the tree, or its number where no path leads to it."""
        parts: list[str] = []
        seen: set[int] = set()
        while ino != ROOT:
            if ino in seen or ino not in self.name_of:
                parts.append(f"(inode {ino})")
                break
            seen.add(ino)
            parent, name = self.name_of[ino]
            parts.append(os.fsdecode(name))
            if parent & SNAP_BIT:
                parts.append(".snap")
            ino = parent & ~SNAP_BIT
        else:
            parts.append("")
        return "/".join(reversed(parts)) or "/"

    def image_path(self, image: int) -> str:
        """A path of a file with that image."""
        return self.image_paths.get(image, f"image {image}")

    # -- images

    def _check_images(self) -> None:
        used: dict[int, int] = {}
        for ino, inode in sorted(self.inodes.items()):
            image, regular = inode["image"], stat.S_ISREG(inode["mode"])
            where = self.inode_path(ino)
            if regular and image not in self.images:
                if self.unclean and inode["nlink"] == 0:
                    continue
                self.note("inode-image", where, fix=step("give_lost_image", ino))
            elif not regular and image is not None:
                self.note(
                    "inode-image",
                    where,
                    fix=step("sql", "UPDATE inodes SET image = NULL WHERE ino = ?", ino),
                )
            elif image in used:
                self.note(
                    "image-shared", where, f"with {self.inode_path(used[image])}",
                    step("copy_image", ino, image),
                )  # fmt: skip
            elif image is not None:
                used[image] = ino
        for number in sorted(self.images.keys() - used.keys()):
            self.pending.add(number)
            if not self.unclean:
                self.note("image-unused", f"image {number}", fix=step("drop_image", number))
        if self.db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'working_sets'").fetchone()[0]:
            for number, blob in self.db.execute("SELECT image, records FROM working_sets").fetchall():
                if not isinstance(blob, bytes) or not is_valid(blob):
                    fix = step("sql", "DELETE FROM working_sets WHERE image = ?", number)
                    self.note("working-set", self.image_paths.get(number, f"image {number}"), fix=fix)

    # -- layers

    def _check_layers(self) -> None:
        writers: dict[int, list[int]] = defaultdict(list)
        for number, image in sorted(self.images.items()):
            if image["live"] is not None:
                writers[image["live"]].append(number)
        for layer, images in writers.items():
            row = self.layers.get(layer)
            if row is None:
                continue  # a broken reference
            where = ", ".join(map(self.image_path, images))
            if len(images) > 1:
                self.note("live-shared", where, f"layer {layer}", step("seal", layer))
            elif row["sealed"]:
                self.note("live-sealed", where, f"layer {layer}", step("seal", layer))
        for number, row in sorted(self.layers.items()):
            if not row["sealed"] and number not in writers and not self.unclean:
                self.note("layer-unused", f"layers/{number:08x}.ram", fix=step("seal", number))

    def _check_arriving(self) -> None:
        """Which pages are here; where the others come from."""
        if self.db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'arriving'").fetchone()[0] == 0:
            return
        sources = {row["id"] for row in self.db.execute("SELECT id FROM pulls")}
        for row in self.db.execute("SELECT * FROM arriving ORDER BY layer").fetchall():
            number, count = row["layer"], pages(row["size"])
            if number not in self.layers:
                continue  # a broken reference
            self.arriving[number] = row["size"]
            if row["promised"]:
                self.promised.add(number)
            if row["pull"] not in sources:
                sources.add(row["pull"])
                where = f"layers/{number:08x}.ram"
                self.note("arriving-source", where, os.fsdecode(row["name"]), step("add_pull", row["pull"]))
            # After power loss what counts is made of the other when the store is opened.
            name = f"layers/{number:08x}.{'kept' if self.power_lost else 'here'}"
            states = read_states(self.path(name), count)
            if states is None and self.power_lost and not os.path.exists(self.path(name)):
                states = np.zeros(count, np.uint8)
            if states is None:
                self.note("arriving-states", name, fix=step("reset_states", number, count))
            else:
                self.states[number] = states

    # -- pages

    def _check_pages(self) -> None:
        """Tables first for what they name, then the named pages layer by layer, then tables again for who has them."""
        named: dict[int, Mask] = {}
        whole: list[int] = []
        for number in sorted(self.images.keys() - self.pending):
            table = self._check_table(number)
            if table is not None:
                whole.append(number)
                self._collect_named(table, named)
        bad = {base: self._check_layer(base, mask) for base, mask in sorted(named.items())}
        for number in whole:
            if number in self.direct:
                self._name_unreadable(number, bad)
                continue
            with contextlib.suppress(OSError, StoreDamaged):
                self._name_pages(number, read_table(self.table_path(number)), bad)
        for number, row in sorted(self.layers.items()):
            if row["base"] is None and number not in named:
                if not os.path.exists(self.path("layers", f"{number:08x}.ram")):
                    if not self.unclean:
                        where = f"layers/{number:08x}.ram"
                        self.note("layer-empty", where, fix=step("drop_layer", number))
                elif row["digested"]:
                    self._read_digests(number, 0)

    def table_path(self, image: int, suffix: str | None = None) -> str:
        """The table file that counts for an image."""
        if suffix is None:
            row = self.images.get(image)
            suffix = "map" if row is not None and row["frozen"] else self.suffix
        return self.path("tables", f"{image:08x}.{suffix}")

    def _check_direct(self, number: int) -> TableCopy | None:
        """The table that goes with a direct image: its own does not count."""
        image = self.images[number]
        layer = self.layers.get(image["live"])
        sound = layer is not None and not layer["sealed"] and not image["frozen"]
        path = self.path("layers", f"{image['live'] or 0:08x}.ram")
        try:
            table = direct_table(path, image["live"] or 0)
        except FileNotFoundError:
            sound, table = False, None
        if not sound:
            fix = step("end_direct", number, self, table)
            self.note("direct-file", self.image_path(number), os.path.relpath(path, self.directory), fix)
            return None
        return table

    def _check_table(self, number: int) -> TableCopy | None:
        if number in self.direct:
            return self._check_direct(number)
        image, path, where = self.images[number], self.table_path(number), self.image_path(number)
        table, kind, detail = None, "", os.path.relpath(path, self.directory)
        try:
            table = read_table(path)
        except FileNotFoundError:
            if self.power_lost and not image["frozen"]:
                return None  # never synced: an empty file
            kind = "table-missing"
        except (StoreDamaged, OSError) as exc:
            kind = "table-header"
            detail += f", {exc.strerror}" if isinstance(exc, OSError) else ""
        # After a crash its length and its header may have reached the disk apart; opening sets that right.
        if table is not None and table.short and not (self.unclean and not image["frozen"]):
            kind = "table-short"
        if kind:
            self.note(kind, where, detail, step("restore_table", number, self))
            return None
        assert table is not None
        if table.beyond and not (self.unclean and not image["frozen"]):
            self.note(
                "table-beyond", where, f"{table.beyond} entries",
                step("write_table", number, self, table),
            )  # fmt: skip
        if not self.unclean and not image["frozen"]:
            self._check_durable(number, table, where)
        self._check_record(number, table, where)
        return table

    def _check_durable(self, number: int, table: TableCopy, where: str) -> None:
        try:
            durable = read_table(self.table_path(number, "durable"))
            same = durable.header == table.header and not durable.short and _same_parts(durable, table)
        except (OSError, StoreDamaged):
            same = False
        if not same:
            self.note("durable-differs", where, fix=step("write_table", number, self, table))

    def _check_record(self, number: int, table: TableCopy, where: str) -> None:
        names = _layers_of(table)
        lacking = (names & self.layers.keys()) - set(map(int, unpack_layers(self.images[number]["layers"])))
        if lacking:
            self.note(
                "table-record", where, "layer " + ", ".join(map(str, sorted(lacking))),
                step("complete_record", number, lacking),
            )  # fmt: skip
        for layer in sorted(names & self.layers.keys()):
            row = self.layers[layer]
            if not row["sealed"] and row["base"] is None and self.images[number]["live"] != layer:
                self.note("live-foreign", where, f"layer {layer}", step("seal", layer))

    def place(self, layer: int) -> tuple[int, int] | None:
        """The layer whose file has a layer's pages, and how far on they lie there."""
        row = self.layers.get(layer)
        if row is None:
            return None
        if row["base"] is None:
            return layer, 0
        base = self.layers.get(row["base"])
        return None if base is None or base["base"] is not None else (row["base"], row["shift"])

    def _collect_named(self, table: TableCopy, named: dict[int, Mask]) -> None:
        for low, entries in table.parts:
            for layer in set(np.unique(entries).tolist()) - {ZERO}:
                place = self.place(layer)
                if place is None:
                    continue
                base, shift = place
                where = np.flatnonzero(entries == layer) + (low + shift)
                where = where[where >= 0]
                if not len(where):
                    continue
                mask = named.get(base, np.zeros(0, np.bool_))
                if len(mask) <= where[-1]:
                    mask = np.concatenate([mask, np.zeros(int(where[-1]) + 1 - len(mask), np.bool_)])
                mask[where] = True
                named[base] = mask

    def _check_layer(self, number: int, named: Mask) -> dict[str, Mask]:
        """For each kind of damage, the pages of a layer file that have it."""
        if number in self.arriving:
            return self._check_arrived(number, named)
        bad: dict[str, Mask] = {}
        row = self.layers[number]
        try:
            fd = os.open(self.path("layers", f"{number:08x}.ram"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            where, count = f"layers/{number:08x}.ram", np.count_nonzero(named)
            self.note("layer-file", where, f"{count} pages of files are in it", step("drop_layer", number))
            return {"page-beyond": named}
        try:
            size = os.fstat(fd).st_size >> PAGE_SHIFT
            if not row["sealed"]:  # it gets its last page whole with the next write, if it was a direct image's
                size = pages(os.fstat(fd).st_size)
            there = stored_pages(fd)[: len(named)]
            there = np.concatenate([there, np.zeros(len(named) - len(there), np.bool_)])
            beyond = named.copy()
            beyond[:size] = False
            digests = self._read_digests(number, len(named)) if row["digested"] else None
            hole = named & ~there & ~beyond
            if digests is not None:
                known = digests.any(axis=1)
                zero = np.frombuffer(digest_pages(bytes(PAGE)), np.uint8)
                hole &= ~(digests == zero).all(axis=1)  # it held only zeros: nothing is lost
                missing = named & there & ~known
                if missing.any():
                    self._note_digests(number, f"of {np.count_nonzero(missing)} pages")
                if self.power_lost:
                    hole &= known
            elif self.power_lost:
                hole[:] = False  # zeroed after the last sync: opening the store settles it
            bad = {"page-beyond": beyond, "page-hole": hole}
            self._compare(fd, number, named & there & ~beyond, digests, bad)
        finally:
            os.close(fd)
        return {kind: mask for kind, mask in bad.items() if mask.any()}

    def _check_arrived(self, number: int, named: Mask) -> dict[str, Mask]:
        """The same of an arriving layer, whose pages come again if they are not what they should be."""
        count, where = pages(self.arriving[number]), f"layers/{number:08x}.ram"
        outside = named.copy()
        outside[:count] = False
        named = np.concatenate([named, np.zeros(max(0, count - len(named)), np.bool_)])[:count]
        try:
            fd = os.open(self.path(where), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size >> PAGE_SHIFT
            if size < count:
                self.note("arriving-file", where, fix=step("lengthen_arriving", number, count))
            elif number in self.states:
                here = named & (self.states[number] == STORED)
                there = stored_pages(fd)[:count]
                bad = {"hole": here & ~there}
                self._compare(fd, number, here & there, self._promised(number, count), bad)
                wrong = np.logical_or.reduce(list(bad.values()))
                if wrong.any():
                    runs = list(runs_of(wrong))
                    self.note("arriving-page", where, _pages_text(runs), step("absent_again", number, runs))
        finally:
            os.close(fd)
        return {"page-beyond": outside} if outside.any() else {}

    def _promised(self, number: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """The digests that the pages of an arriving layer are to have, if a manifest told them."""
        if number not in self.promised:
            return None
        name = f"layers/{number:08x}.xxh3"
        with contextlib.suppress(FileNotFoundError), open(self.path(name), "rb") as file:
            data = file.read()
            if len(data) == count * DIGEST:
                return np.frombuffer(data, np.uint8).reshape(-1, DIGEST)
        sql = "UPDATE arriving SET promised = 0 WHERE layer = ?"
        self.note("digests-missing", name, "its pages will arrive unverified", step("sql", sql, number))
        return None

    def _note_digests(self, number: int, detail: str) -> None:
        sql = "UPDATE layers SET digested = 0 WHERE id = ?"
        self.note("digests-missing", f"layers/{number:08x}.xxh3", detail, step("sql", sql, number))

    def _read_digests(self, number: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """The digests of a layer's first ``count`` pages, zeros where there is none; None without a usable file."""
        path = self.path("layers", f"{number:08x}.xxh3")
        try:
            size = os.path.getsize(self.path("layers", f"{number:08x}.ram"))
            with open(path, "rb", buffering=0) as file:
                length = os.fstat(file.fileno()).st_size
                data = read_exactly(file.fileno(), count * DIGEST, 0)
        except FileNotFoundError:
            if os.path.exists(self.path("layers", f"{number:08x}.ram")):
                self._note_digests(number, "the file is missing")
            return None
        except OSError as exc:
            self._note_digests(number, f"the file cannot be read: {exc.strerror}")
            return None
        if length < pages(size) * DIGEST:
            self._note_digests(number, "the file is cut off")
        data = data[: len(data) // DIGEST * DIGEST].ljust(count * DIGEST, b"\0")
        return np.frombuffer(data, np.uint8).reshape(-1, DIGEST)

    def _compare(
        self,
        fd: int,
        number: int,
        named: Mask,
        digests: np.ndarray[Any, np.dtype[np.uint8]] | None,
        bad: dict[str, Mask],
    ) -> None:
        """Read the named pages; compare them with their digests where there are any."""
        unreadable, mismatch = np.zeros(len(named), np.bool_), np.zeros(len(named), np.bool_)
        compared = 0
        for first, stop in runs_of(named):
            for low in range(first, stop, _BATCH):
                high = min(low + _BATCH, stop)
                for a, data in self._read(fd, low, high, unreadable):
                    if digests is None:
                        continue
                    count = len(data) >> PAGE_SHIFT
                    expected = digests[a : a + count]
                    found = np.frombuffer(digest_pages(data), np.uint8).reshape(-1, DIGEST)
                    known = expected.any(axis=1)
                    compared += int(np.count_nonzero(known))
                    mismatch[a : a + count] = known & (found != expected).any(axis=1)
        bad["page-unreadable"] = unreadable
        if compared >= _FOREIGN_FROM and np.count_nonzero(mismatch) == compared:
            self.note("digests-foreign", f"layers/{number:08x}.xxh3", f"{compared} pages")
        else:
            bad["page-digest"] = mismatch

    @staticmethod
    def _read(fd: int, low: int, high: int, unreadable: Mask) -> Iterator[tuple[int, bytes]]:
        """The pages ``[low, high)``, in pieces where the disk cannot read some of them."""
        try:
            yield low, read_exactly(fd, (high - low) << PAGE_SHIFT, low << PAGE_SHIFT)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            for page in range(low, high):
                try:
                    data = read_exactly(fd, PAGE, page << PAGE_SHIFT)
                except OSError:
                    unreadable[page] = True
                else:
                    yield page, data

    def _name_unreadable(self, number: int, bad: dict[int, dict[str, Mask]]) -> None:
        """Say which pages of a direct image the disk cannot read. No table can tell that they are lost; reads do."""
        mask = bad.get(self.images[number]["live"], {}).get("page-unreadable")
        if mask is not None:
            self.note("page-unreadable", self.image_path(number), _pages_text(list(runs_of(mask))))

    def _name_pages(self, number: int, table: TableCopy, bad: dict[int, dict[str, Mask]]) -> None:
        """Say which pages of a file are damaged."""
        damaged: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for low, entries in table.parts:
            for layer in sorted(set(np.unique(entries).tolist()) - {ZERO}):
                mine: Mask = entries == layer
                place = self.place(layer)
                if place is None:
                    kind = "page-lost" if layer == LOST else "page-unknown"
                    damaged[kind, layer] += [(low + a, low + b) for a, b in runs_of(mine)]
                    continue
                base, shift = place
                at = np.arange(len(entries)) + (low + shift)
                for kind, mask in bad.get(base, {}).items():
                    inside = (at >= 0) & (at < len(mask))
                    hit = mine & inside
                    hit[inside] &= mask[at[inside]]
                    damaged[kind, layer] += [(low + a, low + b) for a, b in runs_of(hit)]
                if (mine & (at < 0)).any():
                    damaged["page-beyond", layer] += [(low + a, low + b) for a, b in runs_of(mine & (at < 0))]
        for (kind, layer), ranges in damaged.items():
            if not ranges:
                continue
            merged = _merge(ranges)
            detail = f"{_pages_text(merged)} in layer {layer}" if kind != "page-lost" else _pages_text(merged)
            fix = None
            if kind != "page-lost":
                fix = step("lose", number, self, merged)
            self.note(kind, self.image_path(number), detail, fix)

    # -- files

    def _check_files(self) -> None:
        expected = {
            "layers": {f"{n:08x}.{s}" for n, row in self.layers.items() if row["base"] is None for s in ("ram", "xxh3")}
            | {f"{n:08x}.{s}" for n in self.arriving for s in ("here", "kept")},
            "tables": {f"{n:08x}.{s}" for n in self.images for s in ("map", "durable")},
        }
        for part, names in expected.items():
            try:
                found = sorted(os.listdir(self.path(part)))
            except FileNotFoundError:
                continue
            for name in found:
                if name in names:
                    continue
                stem, _, suffix = name.partition(".")
                ours = len(stem) == 8 and set(stem) <= set("0123456789abcdef")
                ours &= suffix.removesuffix(".new") in {"ram", "xxh3", "here", "kept", "map", "durable", "manifest"}
                where = f"{part}/{name}"
                if not ours:
                    self.note("file-foreign", where)
                elif not self.unclean and not (
                    self.meta("garbage") and (part == "tables" or suffix in ("here", "kept"))
                ):
                    self.note("file-leftover", where, fix=step("unlink", where))


def _same_parts(one: TableCopy, other: TableCopy) -> bool:
    """Do two tables name the same? (Their holes may differ.)"""
    return all(np.array_equal(a, b) for a, b in zip(_dense(one), _dense(other), strict=True))


def _dense(table: TableCopy) -> tuple[Entries, Entries]:
    """Page numbers and entries of all pages that are not zero."""
    where = [np.flatnonzero(entries) + low for low, entries in table.parts]
    values = [entries[entries != ZERO] for _, entries in table.parts]
    empty = np.zeros(0, np.uint32)
    return np.concatenate([empty, *where]).astype(np.uint32), np.concatenate([empty, *values])


def _layers_of(table: TableCopy) -> set[int]:
    found: set[int] = set()
    for _, entries in table.parts:
        found.update(np.unique(entries).tolist())
    return found - {ZERO}


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((first, stop))
    return merged


def _pages_text(ranges: list[tuple[int, int]]) -> str:
    shown = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges[:8]]
    count = sum(b - a for a, b in ranges)
    more = f" and more, {count} in all" if len(ranges) > 8 else ""
    return f"{'page' if count == 1 else 'pages'} {', '.join(shown)}{more}"


_TABLES: Final = (
    "meta", "layers", "images", "inodes", "names", "xattrs", "pulls", "arriving", "working_sets", "sqlite_sequence",
)  # fmt: skip


def salvage(source: sqlite3.Connection, target: sqlite3.Connection | None) -> int:
    """Copy the rows that can be read, from both ends of each table towards the damage; returns their number.

    Without ``target`` they are only counted. Nothing counts when ``meta`` has no version that we know.
    """
    total = 0
    for table in _TABLES:
        columns = ""  # an older catalog has fewer
        rows: dict[tuple[Any, ...], None] = {}
        key = {"meta": "key", "xattrs": "ino", "sqlite_sequence": "name"}.get(table, "rowid")
        for order in ("ASC", "DESC"):
            try:
                # The + keeps SQLite off the indexes, of which the damaged ones may lie.
                found = source.execute(f"SELECT * FROM {table} NOT INDEXED ORDER BY {key} {order}")
                columns = ", ".join(column[0] for column in found.description)
                for row in found:
                    rows[tuple(row)] = None
            except sqlite3.DatabaseError:
                continue
            break
        if table == "meta" and not any(("version", version) in rows for version in KNOWN_VERSIONS):
            return 0
        total += len(rows)
        if target is not None and rows:
            marks = ", ".join("?" * len(next(iter(rows))))
            if table == "sqlite_sequence":
                target.execute("DELETE FROM sqlite_sequence")
            target.executemany(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", rows)
    return total
