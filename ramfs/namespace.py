"""The tree: inodes, names, snapshots, and who uses what.

Changes are transactions of the catalog, made on the loop without an await. What is kept in memory of an
inode is changed beside its row and goes back with it (Catalog.on_rollback). An inode lives in memory while
the kernel has a lookup count on it; one without names lives on until that count is zero.

``.snap`` of a directory is no row: its number is the directory's with SNAP_BIT set, and its entries are the
names whose parent is that number.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ramfs.errors import BadName, FileError, NameTooLong
from ramfs.ledger import Held, Kind, Ledger, Record
from ramfs.pager import Pager
from ramfs.ramblock import block_file_name, find_block_file, temporary_name
from ramfs.store.images import Image
from ramfs.store.outcomes import REQUEST
from ramfs.units import MAX_NAME, ROOT, SNAP_BIT, HandleId, ImageId, InodeNumber

SNAP: Final = b".snap"
#: Where every directory has views of the memory of its guest (fuse/views.py), unless something older is called so.
GUEST: Final = b".guest"
#: Names that FUSE or the contract keep for themselves, in every directory.
RESERVED: Final = frozenset((b".", b"..", SNAP, GUEST))
#: Files of a directory that are looked at for what a guest's memory is made of: far more than any guest has.
_MOST_FILES: Final = 4096
MAX_XATTR: Final = 65536
CONTROL_XATTR: Final = b"user.ramfs."
#: The one of these that is stored: a directory that has it takes the snapshots of what it is exchanged with.
HEIR_XATTR: Final = CONTROL_XATTR + b"heir"

_COLUMNS: Final = ("mode", "uid", "gid", "nlink", "rdev", "atime", "mtime", "ctime", "parent", "btime")


@dataclass(slots=True, eq=False)
class Inode:
    """An inode that the kernel knows, or that is being worked on. Times in ns since the epoch."""

    ino: InodeNumber
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    atime: int
    mtime: int
    ctime: int
    parent: InodeNumber | None = None
    frozen: bool = False
    image: Image | None = None
    target: bytes | None = None
    btime: int = 0
    """when it was made; 0: not known"""
    lookups: int = 0
    aliases: int = 0
    """QEMU's temporary names that lead here"""
    views: int = 0
    """open views of a guest's memory that read it"""
    opens: dict[HandleId, "Opener"] = field(default_factory=dict)
    cache_doubtful: bool = False
    """may the kernel keep pages of it that are not right any more, for it was native?"""

    @property
    def is_dir(self) -> bool:
        """Is it a directory?"""
        return stat.S_ISDIR(self.mode)

    @property
    def is_snap(self) -> bool:
        """Is it the ``.snap`` of a directory?"""
        return bool(self.ino & SNAP_BIT)

    @property
    def size(self) -> int:
        """Size in bytes as stat shows it."""
        if self.image is not None:
            return self.image.size
        return len(self.target) if self.target is not None else 0

    @property
    def is_written(self) -> bool:
        """Can it have dirty pages: has somebody it open for writing, or still mapped after that?"""
        return any(opener.writable for opener in self.opens.values())

    @property
    def file(self) -> Image:
        """The image of a regular file. Raises EISDIR or EINVAL for others."""
        if self.image is None:
            raise FileError(errno.EISDIR if self.is_dir else errno.EINVAL)
        return self.image


@dataclass(frozen=True, slots=True)
class Opener:
    """A process that opened a file."""

    pid: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what the kernel says of the process behind a request."""

    uid: int
    gid: int
    pid: int
    groups: Callable[[], set[int]] = set


def may(inode: Inode, caller: Caller, wanted: int) -> bool:
    """Do mode and owner let the caller read (4), write (2), search (1)? For what the kernel does not check."""
    if caller.uid == 0:
        return True
    if caller.uid == inode.uid:
        bits = inode.mode >> 6
    elif caller.gid == inode.gid or inode.gid in caller.groups():
        bits = inode.mode >> 3
    else:
        bits = inode.mode
    return bits & wanted == wanted


def _check_copy(inode: Inode, caller: Caller) -> None:
    """Refuse a copy, which will be the caller's own, of what he may not read, and of devices. Raises EACCES, EPERM."""
    if not may(inode, caller, 5 if inode.is_dir else 4):
        raise FileError(errno.EACCES)
    if caller.uid != 0 and (stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)):
        raise FileError(errno.EPERM)  # as its owner he could let himself write to it


class Namespace:
    """The tree of a store."""

    def __init__(self, pager: Pager, ledger: Ledger | None = None, held: Held | None = None) -> None:
        """``held`` is what the kernel holds already, when another daemon served the mount before."""
        self.pager = pager
        self.catalog = pager.store.catalog
        self.images = pager.images
        self.outcomes = pager.store.outcomes
        self.ledger = ledger or Ledger()
        self.inodes: dict[InodeNumber, Inode] = {}
        self._aliases: dict[tuple[InodeNumber, bytes], InodeNumber] = {}
        self._freezing: set[tuple[InodeNumber, bytes]] = set()
        self._unloaded: dict[InodeNumber, int] = {}
        """lookup counts of inodes that the kernel knows from the daemon before, and this one has not met yet"""
        self._begin(held or Held())

    def _begin(self, held: Held) -> None:
        """Make the root of a new store; remove inodes whose last name went while they were open, and were closed."""
        self._unloaded = {InodeNumber(ino): count for ino, count in held.lookups.items()}
        with self.catalog.transaction():
            if self.catalog.row("SELECT ino FROM inodes WHERE ino = ?", ROOT) is None:
                now = time.time_ns()
                self.catalog.execute(
                    "INSERT INTO inodes (ino, mode, uid, gid, nlink, atime, mtime, ctime, btime, parent)"
                    " VALUES (?, ?, ?, ?, 2, ?, ?, ?, ?, ?)",
                    ROOT, stat.S_IFDIR | 0o700, os.getuid(), os.getgid(), now, now, now, now, ROOT,
                )  # fmt: skip
            for row in self.catalog.execute("SELECT ino FROM inodes WHERE nlink = 0").fetchall():
                # One that was made for a request, and is not known to have reached the kernel, is still asked for.
                if self._known(row["ino"]) is None and row["ino"] not in self.outcomes.made_before:
                    self._destroy_tree(row["ino"])
        for (parent, name), ino in held.aliases.items():
            self._aliases[InodeNumber(parent), name] = InodeNumber(ino)
            self.get(InodeNumber(ino)).aliases += 1

    # -- finding

    def get(self, ino: InodeNumber) -> Inode:
        """The inode of a number. Raises ENOENT."""
        inode = self.inodes.get(ino)
        if inode is None:
            inode = self._load(ino)
            self.inodes[ino] = inode
        elif inode.is_snap:
            self._follow(inode)
        return inode

    def _known(self, ino: InodeNumber) -> Inode | None:
        """The inode, if the kernel holds it or it is in memory for another reason."""
        return self.get(ino) if ino in self._unloaded else self.inodes.get(ino)

    def _load(self, ino: InodeNumber) -> Inode:
        lookups = self._unloaded.get(ino, 0)
        if ino & SNAP_BIT:
            base = InodeNumber(ino & ~SNAP_BIT)
            inode = Inode(ino, 0, 0, 0, 2, 0, 0, 0, 0, base, lookups=lookups)
            self._follow(inode)
            self._unloaded.pop(ino, None)
            return inode
        row = self.catalog.row("SELECT * FROM inodes WHERE ino = ?", ino)
        if row is None:
            raise FileError(errno.ENOENT)
        image = None if row["image"] is None else self.images.acquire(ImageId(row["image"]))
        values = {column: row[column] for column in _COLUMNS}
        inode = Inode(
            ino, **values, frozen=bool(row["frozen"]), image=image, target=row["target"], lookups=lookups,
            cache_doubtful=lookups > 0 and not row["frozen"],
        )  # fmt: skip
        self._unloaded.pop(ino, None)
        return inode

    def _follow(self, snap: Inode) -> None:
        """Give a ``.snap`` the owner, mode and times of its directory."""
        base = self.get(InodeNumber(snap.ino & ~SNAP_BIT))
        snap.mode, snap.uid, snap.gid = base.mode, base.uid, base.gid
        snap.atime, snap.mtime, snap.ctime, snap.btime = base.atime, base.mtime, base.ctime, base.btime

    def get_root(self) -> Inode:
        """The root directory."""
        return self.get(ROOT)

    def lookup(self, parent: InodeNumber, name: bytes) -> Inode:
        """The inode that a name of a directory leads to. Raises ENOENT, ENAMETOOLONG."""
        if len(name) > MAX_NAME:
            raise FileError(errno.ENAMETOOLONG)
        directory = self.get(parent)
        if name == b".":
            return directory
        if name == b"..":
            return self.get(directory.parent or ROOT)
        if name == SNAP and self._has_snap(directory):
            return self.get(InodeNumber(parent | SNAP_BIT))
        ino = self._find(parent, name)
        if ino is None:
            raise FileError(errno.ENOENT)
        return self.get(ino)

    def _find(self, parent: InodeNumber, name: bytes) -> InodeNumber | None:
        row = self.catalog.row("SELECT ino FROM names WHERE parent = ? AND name = ?", parent, name)
        return self._aliases.get((parent, name)) if row is None else InodeNumber(row["ino"])

    def has(self, parent: InodeNumber, name: bytes) -> bool:
        """Has a directory an entry of that name?"""
        return self._find(parent, name) is not None

    @staticmethod
    def _has_snap(directory: Inode) -> bool:
        return not directory.frozen and not directory.is_snap

    def names(self, parent: InodeNumber, after: int = 0) -> Iterator[tuple[int, bytes, InodeNumber]]:
        """The entries ``(cookie, name, inode number)`` of a directory whose cookies lie above ``after``."""
        for row in self.catalog.execute(
            "SELECT cookie, name, ino FROM names WHERE parent = ? AND cookie > ? ORDER BY cookie", parent, after
        ):
            yield row["cookie"], row["name"], row["ino"]

    @contextlib.contextmanager
    def at(self, path: bytes, caller: Caller) -> Iterator[Inode]:
        """The inode at a path below the root, for a block without an await; no symlink is followed.

        Raises ENOENT, ENOTDIR, EACCES.
        """
        inode = self.get(ROOT)
        try:
            for name in path.split(b"/"):
                if name:
                    if not inode.is_dir:
                        raise FileError(errno.ENOTDIR)
                    if not may(inode, caller, 1):
                        raise FileError(errno.EACCES)
                    above, inode = inode, self.lookup(inode.ino, name)
                    self.let_go(above)
            yield inode
        finally:
            self.let_go(inode)

    # -- lookup counts

    def forget(self, ino: InodeNumber, count: int, request: int = 0) -> None:
        """The kernel drops ``count`` lookups; an inode without any leaves memory, without names also the disk.

        Or the lookups are those of an answer to ``request`` that the kernel never got.
        """
        self.ledger.add(Kind.FORGET, request, ino, count)
        inode = self._known(ino)
        if inode is None:
            return
        inode.lookups -= count
        self.let_go(inode)

    def looked_up(self, inode: Inode) -> None:
        """The answer under way gives the kernel an inode: one lookup more."""
        self.ledger.add(Kind.LOOKUP, REQUEST.get(), inode.ino, 1)
        inode.lookups += 1

    def listed(self, inodes: list[Inode]) -> None:
        """The listing under way gives the kernel these inodes: one lookup more of each."""
        self.ledger.add(Kind.LOOKUPS, REQUEST.get(), payload=b"".join(i.ino.to_bytes(8, "little") for i in inodes))
        for inode in inodes:
            inode.lookups += 1

    def held(self) -> Iterator[Record]:
        """What the kernel holds of names and inodes, for a ledger."""
        for ino, count in self._unloaded.items():
            yield Record(Kind.LOOKUP, 0, ino, count)
        for inode in self.inodes.values():
            if inode.lookups > 0:
                yield Record(Kind.LOOKUP, 0, inode.ino, inode.lookups)
        for (parent, name), ino in self._aliases.items():
            yield Record(Kind.ALIAS, 0, parent, ino, payload=name)

    def let_go(self, inode: Inode) -> None:
        """Drop an inode from memory if nothing holds it there."""
        if inode.lookups > 0 or inode.opens or inode.aliases or inode.views or self.inodes.get(inode.ino) is not inode:
            return
        del self.inodes[inode.ino]
        if inode.image is not None:
            self.images.release(inode.image)
        if inode.nlink == 0 and not inode.is_snap:
            with self.catalog.transaction(frees=True):
                self._destroy(inode.ino, None if inode.image is None else inode.image.id)

    def _destroy(self, ino: InodeNumber, image: ImageId | None) -> None:
        self.catalog.execute("DELETE FROM xattrs WHERE ino = ?", ino)
        self.catalog.execute("DELETE FROM inodes WHERE ino = ?", ino)
        if image is not None:
            self.images.delete(image)

    def _destroy_tree(self, ino: InodeNumber) -> None:
        """Remove an inode without a name, and what is named below it. In a transaction."""
        todo = [ino]
        while todo:
            ino = todo.pop()
            todo += [child for _, name, child in list(self.names(ino)) if self._unname(ino, name, child)]
            row = self.catalog.row("SELECT image FROM inodes WHERE ino = ?", ino)
            if row is None:
                continue
            known = self._known(ino)
            if known is None:
                self._destroy(ino, row["image"])
            else:
                self._set(known, nlink=0)  # goes with its last lookup

    def _unname(self, parent: InodeNumber, name: bytes, ino: InodeNumber) -> bool:
        """Remove one name of a tree that goes as a whole. Was it the inode's last?"""
        self.catalog.execute("DELETE FROM names WHERE parent = ? AND name = ?", parent, name)
        row = self.catalog.row("SELECT nlink, mode FROM inodes WHERE ino = ?", ino)
        if row is None or stat.S_ISDIR(row["mode"]) or row["nlink"] <= 1:
            return True
        if (known := self._known(ino)) is not None:
            self._set(known, nlink=known.nlink - 1)
        else:
            self.catalog.execute("UPDATE inodes SET nlink = nlink - 1 WHERE ino = ?", ino)
        return False

    # -- changing

    def _set(self, inode: Inode, **values: Any) -> None:
        """Change columns of an inode's row and the object with it. In a transaction."""
        before = {name: getattr(inode, name) for name in values}
        columns = ", ".join(f"{name} = ?" for name in values)
        self.catalog.execute(f"UPDATE inodes SET {columns} WHERE ino = ?", *values.values(), inode.ino)
        self._assign(inode, values)
        self.catalog.on_rollback(lambda: self._assign(inode, before))

    @staticmethod
    def _assign(inode: Inode, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(inode, name, value)

    def _touch(self, inode: Inode, *, links: int = 0) -> None:
        """A directory's entries changed."""
        now = time.time_ns()
        self._set(inode, mtime=now, ctime=now, nlink=inode.nlink + links)

    def _changed(self, inode: Inode) -> None:
        """Something about an inode changed: ctime. In a transaction."""
        if inode.image is not None:
            inode.image.ctime = time.time_ns()
            inode.image.write_header()
        else:
            self._set(inode, ctime=time.time_ns())

    def writable_dir(self, ino: InodeNumber) -> Inode:
        """A directory whose entries may change. Raises EROFS in snapshots and in ``.snap``."""
        directory = self.get(ino)
        if directory.frozen or directory.is_snap:
            raise FileError(errno.EROFS)
        if directory.nlink == 0:
            raise FileError(errno.ENOENT)
        return directory

    def _free_name(self, parent: InodeNumber, name: bytes) -> None:
        if len(name) > MAX_NAME:
            raise FileError(errno.ENAMETOOLONG)
        if name in RESERVED or self._find(parent, name) is not None:
            raise FileError(errno.EEXIST)

    def _insert(
        self, mode: int, uid: int, gid: int, *, nlink: int, rdev: int = 0, parent: InodeNumber | None = None,
        image: Image | None = None, target: bytes | None = None, frozen: bool = False,
        times: tuple[int, int, int, int] | None = None,
    ) -> Inode:  # fmt: skip
        """A new inode's row and object; not yet in memory's table. In a transaction."""
        atime, mtime, ctime, btime = times or (now := time.time_ns(), now, now, now)
        ino = self.catalog.insert(
            "INSERT INTO inodes"
            " (mode, uid, gid, nlink, rdev, atime, mtime, ctime, parent, frozen, image, target, btime)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            mode, uid, gid, nlink, rdev, atime, mtime, ctime, parent, int(frozen),
            None if image is None else image.id, target, btime,
        )  # fmt: skip
        return Inode(
            InodeNumber(ino), mode, uid, gid, nlink, rdev, atime, mtime, ctime, parent, frozen, image, target, btime
        )

    def _add_name(self, parent: InodeNumber, name: bytes, ino: InodeNumber) -> None:
        self.catalog.execute("INSERT INTO names (parent, name, ino) VALUES (?, ?, ?)", parent, name, ino)

    def make(
        self, parent: InodeNumber, name: bytes, mode: int, caller: Caller, *, rdev: int = 0, target: bytes | None = None
    ) -> Inode:  # fmt: skip
        """A new inode of any kind, by the file type in ``mode``, under a new name."""
        directory = self.writable_dir(parent)
        self._free_name(parent, name)
        gid, is_dir = caller.gid, stat.S_ISDIR(mode)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID if is_dir else 0
        with self.catalog.transaction():
            image = self.images.create() if stat.S_ISREG(mode) else None
            inode = self._insert(
                mode, caller.uid, gid, nlink=2 if is_dir else 1, rdev=rdev,
                parent=parent if is_dir else None, image=image, target=target,
            )  # fmt: skip
            self._add_name(parent, name, inode.ino)
            self._touch(directory, links=1 if is_dir else 0)
            self.outcomes.conclude(inode.ino)
        self.inodes[inode.ino] = inode
        return inode

    def check_plant(self, parent: InodeNumber, name: bytes, caller: Caller) -> Inode:
        """The directory that :meth:`plant` would change, if it may. Raises as that does."""
        directory = self.writable_dir(parent)
        self._free_name(parent, name)
        if not may(directory, caller, 3):
            raise FileError(errno.EACCES)
        return directory

    def plant(
        self, parent: InodeNumber, name: bytes, caller: Caller, paths: Iterable[bytes]
    ) -> tuple[InodeNumber, dict[bytes, Image]]:
        """A new directory with empty files at ``paths`` below it, for the caller alone. In a transaction.

        Returns its number, and the images of the files, each in use once. Raises as mkdir does, EACCES too.
        """
        directory = self.check_plant(parent, name, caller)
        top = self._insert(stat.S_IFDIR | 0o700, caller.uid, caller.gid, nlink=0, parent=parent)
        directories = {b"": top.ino}
        images: dict[bytes, Image] = {}
        for path in paths:
            above, _, last = path.rpartition(b"/")
            self._plant_directories(above, directories, caller)
            image = images[path] = self.images.create()
            inode = self._insert(stat.S_IFREG | 0o600, caller.uid, caller.gid, nlink=1, image=image)
            self._add_name(directories[above], last, inode.ino)
        for ino in directories.values():
            self._set_links(ino)
        self._add_name(parent, name, top.ino)
        self._touch(directory, links=1)
        return top.ino, images

    def _plant_directories(self, path: bytes, known: dict[bytes, InodeNumber], caller: Caller) -> None:
        """Make a directory of those that are planted, and all above it, unless they are ``known``."""
        above = b""
        for part in path.split(b"/") if path else ():
            below = above + b"/" + part if above else part
            if below not in known:
                inode = self._insert(stat.S_IFDIR | 0o700, caller.uid, caller.gid, nlink=0, parent=known[above])
                self._add_name(known[above], part, inode.ino)
                known[below] = inode.ino
            above = below

    def make_unnamed(self, parent: InodeNumber, mode: int, caller: Caller) -> Inode:
        """A new regular file that goes with its last user, unless :meth:`link` gives it a name (O_TMPFILE)."""
        directory = self.writable_dir(parent)
        gid = directory.gid if directory.mode & stat.S_ISGID else caller.gid
        with self.catalog.transaction():
            inode = self._insert(mode, caller.uid, gid, nlink=0, image=self.images.create())
            self.outcomes.conclude(inode.ino)
        self.inodes[inode.ino] = inode
        return inode

    def link(self, ino: InodeNumber, parent: InodeNumber, name: bytes) -> Inode:
        """Another name for an inode; a frozen file may get one outside of its snapshot."""
        directory, inode = self.writable_dir(parent), self.get(ino)
        self._free_name(parent, name)
        if inode.is_dir:
            raise FileError(errno.EPERM)
        # Of files without a name the kernel lets only those made by O_TMPFILE have one. It does not see when a
        # snapshot is deleted.
        if inode.nlink == 0 and inode.frozen:
            raise FileError(errno.ENOENT)
        with self.catalog.transaction():
            self._add_name(parent, name, ino)
            self._set(inode, nlink=inode.nlink + 1)
            if not inode.frozen:
                self._changed(inode)
            self._touch(directory)
            self.outcomes.conclude(ino)
        return inode

    def unlink(self, parent: InodeNumber, name: bytes) -> None:
        """Remove a name of something that is no directory."""
        if (parent, name) in self._aliases:
            self.drop_alias(parent, name)
            return
        directory = self.writable_dir(parent)
        inode = self.lookup(parent, name)
        if inode.is_dir:
            raise FileError(errno.EISDIR)
        with self.catalog.transaction(frees=True):
            self._remove_name(parent, name, inode)
            self._touch(directory)
            self.outcomes.conclude()
        self.let_go(inode)

    def _remove_name(self, parent: InodeNumber, name: bytes, inode: Inode) -> None:
        self.catalog.execute("DELETE FROM names WHERE parent = ? AND name = ?", parent, name)
        self._set(inode, nlink=0 if inode.is_dir else inode.nlink - 1)
        if not inode.frozen:
            self._changed(inode)

    def rmdir(self, parent: InodeNumber, name: bytes) -> None:
        """Remove an empty directory. One that has snapshots is not empty."""
        directory = self.writable_dir(parent)
        if name in (SNAP, GUEST) and not self.has(parent, name):
            raise FileError(errno.EBUSY)
        inode = self.lookup(parent, name)
        self._check_empty(inode)
        with self.catalog.transaction(frees=True):
            self._remove_name(parent, name, inode)
            self._touch(directory, links=-1)
            self.outcomes.conclude()
        self._drop_aliases(inode.ino)
        self.let_go(inode)

    def _check_empty(self, inode: Inode) -> None:
        if not inode.is_dir:
            raise FileError(errno.ENOTDIR)
        snap = InodeNumber(inode.ino | SNAP_BIT)
        row = self.catalog.row("SELECT 1 FROM names WHERE parent IN (?, ?)", inode.ino, snap)
        if row is not None or any(parent == snap for parent, _ in self._freezing):
            raise FileError(errno.ENOTEMPTY)

    def rename(
        self, parent: InodeNumber, name: bytes, new_parent: InodeNumber, new_name: bytes, *,
        exchange: bool = False, no_replace: bool = False,
    ) -> None:  # fmt: skip
        """Move a name as the system call does, with RENAME_EXCHANGE or RENAME_NOREPLACE."""
        old_dir, new_dir = self.writable_dir(parent), self.writable_dir(new_parent)
        if len(new_name) > MAX_NAME:
            raise FileError(errno.ENAMETOOLONG)
        if new_name in RESERVED or (name in RESERVED and not self.has(parent, name)):
            raise FileError(errno.EBUSY)
        inode = self.lookup(parent, name)
        present = self._find(new_parent, new_name)
        other = None if present is None else self.get(present)
        if (parent, name) in self._aliases or (new_parent, new_name) in self._aliases:
            raise FileError(errno.EBUSY)
        if exchange:
            if other is None:
                raise FileError(errno.ENOENT)
            self._exchange(old_dir, name, inode, new_dir, new_name, other)
            return
        if other is not None:
            if no_replace:
                raise FileError(errno.EEXIST)
            if other is inode:
                return
            if inode.is_dir:
                self._check_empty(other)
            elif other.is_dir:
                raise FileError(errno.EISDIR)
        with self.catalog.transaction():
            if other is not None:
                self._remove_name(new_parent, new_name, other)
                if other.is_dir:
                    self._touch(new_dir, links=-1)
            self.catalog.execute("DELETE FROM names WHERE parent = ? AND name = ?", parent, name)
            self._add_name(new_parent, new_name, inode.ino)
            moved = 1 if inode.is_dir and old_dir is not new_dir else 0
            if moved:
                self._set(inode, parent=new_parent)
            if not inode.frozen:
                self._changed(inode)
            self._touch(old_dir, links=-moved)
            self._touch(new_dir, links=moved)
            self.outcomes.conclude()
        if other is not None:
            self._drop_aliases(other.ino)
            self.let_go(other)

    def _exchange(
        self, old_dir: Inode, name: bytes, inode: Inode, new_dir: Inode, new_name: bytes, other: Inode
    ) -> None:
        with self.catalog.transaction():
            for heir, before in ((inode, other), (other, inode)):
                if heir.is_dir and self._has_xattr(heir.ino, HEIR_XATTR):
                    self._inherit(heir, before)
            for directory, entry, ino in ((old_dir, name, other), (new_dir, new_name, inode)):
                self.catalog.execute(
                    "UPDATE names SET ino = ? WHERE parent = ? AND name = ?", ino.ino, directory.ino, entry
                )
                if ino.is_dir:
                    self._set(ino, parent=directory.ino)
                if not ino.frozen:
                    self._changed(ino)
            moved = int(inode.is_dir) - int(other.is_dir) if old_dir is not new_dir else 0
            self._touch(old_dir, links=-moved)
            self._touch(new_dir, links=moved)
            self.outcomes.conclude()

    def _inherit(self, heir: Inode, before: Inode) -> None:
        """Give a directory the snapshots of the one that it takes the place of. In a transaction.

        Raises ENOTDIR; EBUSY while somebody uses files of that one, for he would go on with what nobody finds any more;
        EEXIST where both have a snapshot of the same name.
        """
        if not before.is_dir:
            raise FileError(errno.ENOTDIR)
        old, new = (InodeNumber(each.ino | SNAP_BIT) for each in (before, heir))
        if any(parent in {old, new} for parent, _ in self._freezing):
            raise FileError(errno.EBUSY)
        for path, inode in self.files_below(before):
            if inode.is_written:
                text = f"{os.fsdecode(path)} is open in process {self.holders(inode)}"
                raise FileError(errno.EBUSY, text)
        taken = {name for _, name, _ in self.names(new)}
        for _, name, ino in list(self.names(old)):
            if name in taken:
                raise FileError(errno.EEXIST)
            if (known := self._known(ino)) is not None:
                self._set(known, parent=new)
        self.catalog.execute("UPDATE inodes SET parent = ? WHERE parent = ?", new, old)
        self.catalog.execute("UPDATE names SET parent = ? WHERE parent = ?", new, old)
        self.catalog.execute("DELETE FROM xattrs WHERE ino = ? AND name = ?", heir.ino, HEIR_XATTR)

    def _has_xattr(self, ino: InodeNumber, name: bytes) -> bool:
        return self.catalog.row("SELECT 1 FROM xattrs WHERE ino = ? AND name = ?", ino, name) is not None

    def set_attributes(
        self, ino: InodeNumber, *, size: int | None = None, mtime: int | None = None, **values: int
    ) -> Inode:
        """Change size, times (ns) or columns of an inode. Raises EROFS in snapshots."""
        inode = self.get(ino)
        if inode.frozen or inode.is_snap:
            raise FileError(errno.EROFS)
        if size is not None:
            self.pager.truncate(inode.file, size)
        if mtime is not None:
            if inode.image is not None:
                inode.image.set_mtime(mtime)
            else:
                values["mtime"] = mtime
        if values or mtime is not None:
            with self.catalog.transaction():
                if values:
                    self._set(inode, **values)
                self._changed(inode)
        return inode

    def drop_suid(self, inode: Inode) -> None:
        """Take set-user-ID, and set-group-ID where it means that, from a file that was written or given away."""
        bits = stat.S_ISUID | (stat.S_ISGID if inode.mode & stat.S_IXGRP else 0)
        if inode.image is not None and inode.mode & bits and not inode.frozen:
            with self.catalog.transaction():
                self._set(inode, mode=inode.mode & ~bits)

    # -- extended attributes

    def xattrs(self, ino: InodeNumber) -> list[bytes]:
        """The names of an inode's stored attributes, but for our own."""
        rows = self.catalog.execute("SELECT name FROM xattrs WHERE ino = ?", ino)
        return [row["name"] for row in rows if not row["name"].startswith(CONTROL_XATTR)]

    def xattr(self, ino: InodeNumber, name: bytes) -> bytes:
        """The value of an attribute. Raises ENODATA."""
        row = self.catalog.row("SELECT value FROM xattrs WHERE ino = ? AND name = ?", ino, name)
        if row is None:
            raise FileError(errno.ENODATA)
        return bytes(row["value"])

    def set_xattr(self, ino: InodeNumber, name: bytes, value: bytes | None) -> None:
        """Set an attribute, or remove it (None). Raises EPERM, EROFS, EOPNOTSUPP, E2BIG, ENODATA."""
        inode = self.get(ino)
        if inode.frozen or inode.is_snap:
            raise FileError(errno.EROFS)
        if name.startswith(CONTROL_XATTR) and not (name == HEIR_XATTR and inode.is_dir):
            raise FileError(errno.EPERM)
        # Capabilities would have to be dropped with every write, and memory is not executed.
        if name == b"security.capability" or not name.startswith((b"user.", b"trusted.", b"security.")):
            raise FileError(errno.EOPNOTSUPP)
        if value is not None and len(value) > MAX_XATTR:
            raise FileError(errno.E2BIG)
        with self.catalog.transaction():
            if value is None:
                self.xattr(ino, name)
                self.catalog.execute("DELETE FROM xattrs WHERE ino = ? AND name = ?", ino, name)
            else:
                self._put_xattr(ino, name, value)
            self._changed(inode)
            self.outcomes.conclude()

    # -- what files remember of the guest

    def memory_files(self, directory: InodeNumber, name: bytes) -> dict[bytes, tuple[InodeNumber, bytes | None]]:
        """The regular files of a directory by name: inode number, and what :meth:`remember` has of that name."""
        rows = self.catalog.execute(
            "SELECT names.name AS name, names.ino AS ino, value FROM names JOIN inodes USING (ino)"
            " LEFT JOIN xattrs ON xattrs.ino = names.ino AND xattrs.name = ?"
            " WHERE names.parent = ? AND image IS NOT NULL ORDER BY cookie LIMIT ?",
            name, directory, _MOST_FILES,
        )  # fmt: skip
        return {row["name"]: (InodeNumber(row["ino"]), row["value"]) for row in rows.fetchall()}

    def remember(self, ino: InodeNumber, name: bytes, value: bytes | None) -> None:
        """Note something with a file, which copies of it have too, or forget it (None)."""
        with self.catalog.transaction():
            if value is None:
                self.catalog.execute("DELETE FROM xattrs WHERE ino = ? AND name = ?", ino, name)
            else:
                self._put_xattr(ino, name, value)

    def _put_xattr(self, ino: InodeNumber, name: bytes, value: bytes) -> None:
        self.catalog.execute(
            "INSERT INTO xattrs VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", ino, name, value
        )

    def inherit(self, source: Inode, target: Inode) -> None:
        """An empty file is about to get a copy of another one's bytes: it gets what that remembers too."""
        self.catalog.execute(
            "INSERT OR IGNORE INTO xattrs SELECT ?, name, value FROM xattrs WHERE ino = ? AND name >= ? AND name < ?",
            target.ino, source.ino, CONTROL_XATTR, CONTROL_XATTR[:-1] + b"/",
        )  # fmt: skip

    # -- QEMU's temporary names

    def block_inode(self, parent: InodeNumber, name: bytes, mode: int, caller: Caller) -> Inode | None:
        """The block file that a create of QEMU's temporary ``name`` means; None if it is no such name.

        The file is made where there is none. Raises EBUSY while another process has it open, EACCES where
        its mode does not let the caller in: the kernel checked only the directory.
        """
        block = temporary_name(name)
        if block is None:
            return None
        self.writable_dir(parent)
        self._free_name(parent, name)
        try:
            file = find_block_file((entry for _, entry, _ in self.names(parent)), block) or block_file_name(block)
        except NameTooLong as exc:
            raise FileError(errno.ENAMETOOLONG, str(exc)) from exc
        except BadName as exc:
            raise FileError(errno.EINVAL, str(exc)) from exc
        ino = self._find(parent, file)
        if ino is None:
            inode = self.make(parent, file, mode, caller)
        else:
            inode = self.get(ino)
            if inode.image is None:
                raise FileError(errno.EEXIST)
            if inode.frozen:
                raise FileError(errno.EROFS)
            if not may(inode, caller, 6):
                raise FileError(errno.EACCES)
            if inode.opens:
                raise FileError(errno.EBUSY, f"{os.fsdecode(file)} is open in process {self.holders(inode)}")
        self.add_alias(parent, name, inode)
        return inode

    def add_alias(self, parent: InodeNumber, name: bytes, inode: Inode) -> None:
        """Let a temporary name lead to a block file."""
        self.ledger.add(Kind.ALIAS, REQUEST.get(), parent, inode.ino, payload=name)
        self._aliases[parent, name] = inode.ino
        inode.aliases += 1

    def drop_alias(self, parent: InodeNumber, name: bytes) -> None:
        """Remove a temporary name, if it is there."""
        if (parent, name) not in self._aliases:
            return
        self.ledger.add(Kind.UNALIAS, REQUEST.get(), parent, payload=name)
        inode = self.get(self._aliases.pop((parent, name)))
        inode.aliases -= 1
        self.let_go(inode)

    def block_of(self, parent: InodeNumber, name: bytes) -> Inode | None:
        """The block file that a temporary name of QEMU's would open now, if there is one."""
        block = temporary_name(name)
        file = None if block is None else find_block_file((entry for _, entry, _ in self.names(parent)), block)
        ino = None if file is None else self._find(parent, file)
        return None if ino is None else self.get(ino)

    @staticmethod
    def holders(inode: Inode) -> str:
        """The processes that have an inode open, as text."""
        return ", ".join(map(str, sorted({opener.pid for opener in inode.opens.values()})))

    def _drop_aliases(self, parent: InodeNumber) -> None:
        for key in [key for key in self._aliases if key[0] == parent]:
            self.drop_alias(*key)

    # -- copies of whole trees

    def files_below(self, root: Inode) -> Iterator[tuple[bytes, Inode]]:
        """The regular files of a tree that the kernel knows of, with their paths from ``root``."""
        todo = [(root.ino, b"")]
        while todo:
            directory, path = todo.pop()
            for _, name, ino in list(self.names(directory)):
                child = self.inodes.get(ino)
                if child is None:
                    row = self.catalog.row("SELECT mode FROM inodes WHERE ino = ?", ino)
                    is_dir = row is not None and stat.S_ISDIR(row["mode"])
                else:
                    is_dir = child.is_dir
                if is_dir:
                    todo.append((ino, path + name + b"/"))
                elif child is not None and child.image is not None:
                    yield path + name, child

    def contents_below(self, root: Inode) -> Iterator[tuple[bytes, ImageId, bool]]:
        """The regular files at or below an inode, each once: path from there, image, whether it is frozen."""
        todo, seen = [(root.ino, b"")], set[InodeNumber]()
        while todo:
            ino, path = todo.pop()
            row = self.catalog.row("SELECT mode, frozen, image FROM inodes WHERE ino = ?", ino)
            if row is None or ino in seen:
                continue
            seen.add(ino)
            if row["image"] is not None:
                yield path, ImageId(row["image"]), bool(row["frozen"])
            elif stat.S_ISDIR(row["mode"]):
                below = path + b"/" if path else b""
                todo += [(child, below + name) for _, name, child in reversed(list(self.names(ino)))]

    def frozen_below(self, root: Inode) -> Iterator[tuple[bytes, ImageId]]:
        """The frozen regular files at or below an inode, each once, with their paths from there."""
        return ((path, image) for path, image, frozen in self.contents_below(root) if frozen)

    def images_below(self, root: Inode) -> set[ImageId]:
        """The contents of the regular files at or below an inode."""
        return {image for _, image, _ in self.contents_below(root)}

    def is_snapshot(self, inode: Inode) -> bool:
        """Is it the top of a snapshot?"""
        return inode.frozen and inode.is_dir and bool((inode.parent or 0) & SNAP_BIT)

    def frozen_files(self, top: Inode) -> Iterator[tuple[bytes, ImageId, int]]:
        """The regular files of a snapshot: path from its top, image, mode. Under each of their names."""
        todo = [(top.ino, b"")]
        while todo:
            directory, path = todo.pop()
            rows = self.catalog.execute(
                "SELECT name, ino, mode, image FROM names JOIN inodes USING (ino) WHERE names.parent = ?", directory
            )
            for row in rows.fetchall():
                if row["image"] is not None:
                    yield path + row["name"], ImageId(row["image"]), row["mode"]
                elif stat.S_ISDIR(row["mode"]):
                    todo.append((row["ino"], path + row["name"] + b"/"))

    def direct_below(self, root: Inode) -> list[ImageId]:
        """The direct images of a tree: few, so that looking where each of them lies is soon done."""
        found: list[ImageId] = []
        for number in self.images.direct:
            todo: list[int] = [
                row["ino"] for row in self.catalog.execute("SELECT ino FROM inodes WHERE image = ?", number)
            ]
            seen: set[int] = set()
            while todo:
                ino = todo.pop() & ~SNAP_BIT
                if ino == root.ino:
                    found.append(number)
                    break
                if ino not in seen and ino != ROOT:
                    seen.add(ino)
                    rows = self.catalog.execute("SELECT parent FROM names WHERE ino = ?", ino)
                    todo += [row["parent"] for row in rows]
        return found

    def path_of(self, ino: InodeNumber) -> bytes:
        """The path of a directory, or one of a file, from the root of the tree, without a leading slash.

        Raises ENOENT for what has no name any more.
        """
        parts: list[bytes] = []
        while ino != ROOT:
            if ino & SNAP_BIT:
                parts.append(SNAP)
                ino = InodeNumber(ino & ~SNAP_BIT)
                continue
            row = self.catalog.row("SELECT parent, name FROM names WHERE ino = ?", ino)
            if row is None:
                raise FileError(errno.ENOENT)
            parts.append(row["name"])
            ino = row["parent"]
        return b"/".join(reversed(parts))

    def check_snapshot(self, snap: InodeNumber, name: bytes) -> Inode:
        """The directory that ``mkdir .snap/NAME`` would freeze. Raises EEXIST, ENAMETOOLONG, ENOENT."""
        directory = self.writable_dir(InodeNumber(snap & ~SNAP_BIT))
        self._free_name(snap, name)
        if (snap, name) in self._freezing:
            raise FileError(errno.EEXIST)
        return directory

    def freeze(self, directory: Inode, name: bytes) -> "Frozen":
        """Freeze the tree below a directory as it is now; it gets its name by :meth:`Frozen.commit`."""
        key = (InodeNumber(directory.ino | SNAP_BIT), name)
        images: list[Image] = []
        with self.catalog.transaction():
            top = self._copy_tree(directory, key[0], None, images, frozen=True)
        self._freezing.add(key)
        return Frozen(self, key, top.ino, images)

    def clone(self, source: Inode, parent: InodeNumber, name: bytes, caller: Caller) -> Inode:
        """Copy the tree below a directory as it is now; pages are shared. Raises as mkdir does, EACCES too."""
        directory = self.writable_dir(parent)
        self._free_name(parent, name)
        if not directory.is_dir or not source.is_dir or source.is_snap:
            raise FileError(errno.ENOTDIR)
        if not may(directory, caller, 3):
            raise FileError(errno.EACCES)
        images: list[Image] = []
        with self.catalog.transaction():
            top = self._copy_tree(source, parent, caller, images, frozen=False)
            self._set_links(top.ino)
            self._add_name(parent, name, top.ino)
            self._touch(directory, links=1)
            self.outcomes.conclude()
        for image in images:
            self.images.release(image)
        return self.get(top.ino)

    def _set_links(self, top: InodeNumber) -> None:
        """Give a copied top directory its link count, which was 0 while it had no name."""
        directories = self.catalog.number(
            "SELECT count(*) FROM names JOIN inodes USING (ino) WHERE names.parent = ? AND mode & ? = ?",
            top, 0o170000, stat.S_IFDIR,
        )  # fmt: skip
        self.catalog.execute("UPDATE inodes SET nlink = ? WHERE ino = ?", 2 + directories, top)

    def _copy_tree(
        self, source: Inode, parent: InodeNumber, caller: Caller | None, images: list[Image], *, frozen: bool
    ) -> Inode:
        """Copy rows of a directory and all below it. ``caller`` is asked for permission and owns the copies."""
        copies: dict[InodeNumber, InodeNumber] = {}  # hard links within the tree stay hard links
        now = time.time_ns()
        if caller is not None:
            _check_copy(source, caller)
        top = self._copy_inode(source, parent, caller, now, frozen=frozen, nlink=0)
        todo = [(source.ino, top.ino)]
        while todo:
            old_dir, new_dir = todo.pop()
            for _, name, ino in list(self.names(old_dir)):
                known = ino in self.inodes
                child = self.get(ino)
                try:
                    if caller is not None:
                        _check_copy(child, caller)
                    if ino in copies:
                        self.catalog.execute("UPDATE inodes SET nlink = nlink + 1 WHERE ino = ?", copies[ino])
                    else:
                        links = child.nlink if child.is_dir else 1
                        image = None
                        if child.image is not None:
                            image = self.images.copy(child.image, frozen=frozen)
                            images.append(image)
                        copy = self._copy_inode(child, new_dir, caller, now, frozen=frozen, nlink=links, image=image)
                        copies[ino] = copy.ino
                    self._add_name(new_dir, name, copies[ino])
                    if child.is_dir:
                        todo.append((ino, copies[ino]))
                finally:
                    if not known:
                        self.let_go(child)
        return top

    def _copy_inode(
        self, inode: Inode, parent: InodeNumber, caller: Caller | None, btime: int, *, frozen: bool, nlink: int,
        image: Image | None = None,
    ) -> Inode:  # fmt: skip
        uid, gid, mode = inode.uid, inode.gid, inode.mode
        if caller is not None and caller.uid != 0:
            uid, gid, mode = caller.uid, caller.gid, mode & ~(stat.S_ISUID | stat.S_ISGID)
        copy = self._insert(
            mode, uid, gid, nlink=nlink, rdev=inode.rdev, parent=parent if inode.is_dir else None, image=image,
            target=inode.target, frozen=frozen, times=(inode.atime, inode.mtime, inode.ctime, btime),
        )  # fmt: skip
        self.catalog.execute("INSERT INTO xattrs SELECT ?, name, value FROM xattrs WHERE ino = ?", copy.ino, inode.ino)
        return copy

    def delete_snapshot(self, snap: InodeNumber, name: bytes) -> None:
        """Remove a snapshot; files of it that have other names, or are open, live on."""
        if self._find(snap, name) is None:
            raise FileError(errno.ENOENT)
        inode = self.lookup(snap, name)
        with self.catalog.transaction(frees=True):
            self.catalog.execute("DELETE FROM names WHERE parent = ? AND name = ?", snap, name)
            self._destroy_tree(inode.ino)
            self.outcomes.conclude()
        self.let_go(inode)


class Frozen:
    """A tree that is frozen and has no name yet. Until :meth:`commit` a killed daemon leaves nothing of it."""

    def __init__(
        self, namespace: Namespace, key: tuple[InodeNumber, bytes], top: InodeNumber, images: list[Image]
    ) -> None:
        self.images = images
        self._namespace = namespace
        self._key = key
        self._top = top

    def commit(self) -> Inode:
        """Name it: now the snapshot exists. Its images must be durable; the caller syncs the catalog after."""
        space = self._namespace
        with space.catalog.transaction():
            space._set_links(self._top)
            space._add_name(*self._key, self._top)
            space.outcomes.conclude(self._top)
        self._end()
        return space.get(self._top)

    def abort(self) -> None:
        """Remove it, unless it has its name."""
        if self._key not in self._namespace._freezing:
            return
        self._end()
        with self._namespace.catalog.transaction(frees=True):
            self._namespace._destroy_tree(self._top)

    def _end(self) -> None:
        self._namespace._freezing.discard(self._key)
        for image in self.images:
            self._namespace.images.release(image)
