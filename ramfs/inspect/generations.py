"""The generations of a directory: its snapshots, in the order in which they were made, and what it is now."""

import contextlib
import errno

from ramfs.errors import FileError
from ramfs.namespace import SNAP, Caller, Inode, Namespace, may
from ramfs.units import SNAP_BIT, ImageId, InodeNumber


def generation(space: Namespace, ino: InodeNumber, caller: Caller) -> tuple[int, bytes | None]:
    """Of a snapshot's top, or a directory as it is now: when it was made (ns), and the path of the one before.

    Before the first snapshot stands the directory, or the snapshot, that the directory was cloned from, if it is still
    there and the caller may see it. Raises ENODATA for everything else.
    """
    top = space.get(ino)
    if not top.is_dir or top.is_snap or (top.frozen and not space.is_snapshot(top)):
        raise FileError(errno.ENODATA)
    snaps = InodeNumber(((top.parent or 0) if top.frozen else ino) | SNAP_BIT)
    row = space.catalog.row(  # in the order in which they were made
        "SELECT name FROM names WHERE parent = ?1 AND cookie < coalesce("
        "(SELECT cookie FROM names WHERE parent = ?1 AND ino = ?2), ?3) ORDER BY cookie DESC LIMIT 1",
        snaps, ino, 1 << 62,
    )  # fmt: skip
    before = None if row is None else bytes(row["name"])
    directory = InodeNumber(snaps & ~SNAP_BIT)
    if before is not None:
        return top.btime, b"/".join(part for part in (space.path_of(directory), SNAP, before) if part)
    return top.btime, _origin(space, space.get(directory), caller)


def _origin(space: Namespace, directory: Inode, caller: Caller) -> bytes | None:
    """The directory that one was cloned from: where the contents of its files were copied from, at the same path."""
    for path, image, _ in space.contents_below(directory):
        row = space.catalog.row("SELECT parent FROM images WHERE id = ?", image)
        parent = None if row is None or row["parent"] is None else ImageId(row["parent"])
        found = None if parent is None else space.catalog.row("SELECT ino FROM inodes WHERE image = ?", parent)
        if found is None:
            continue
        with contextlib.suppress(FileError):
            there = space.path_of(found["ino"])
            above, own = there.removesuffix(b"/" + path), space.path_of(directory.ino)
            if above in {there, own} or above.startswith(own + b"/" + SNAP + b"/"):
                continue
            with space.at(above, caller) as origin:
                if may(origin, caller, 4):
                    return above
    return None
