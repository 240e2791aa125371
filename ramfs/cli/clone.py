"""``ramfs clone``."""

import errno
import os

import click

from ramfs.cli._control import asked
from ramfs.cli._flush import regular_files
from ramfs.cli._mounts import locate, locate_new
from ramfs.errors import FileError, UsageError


@click.command("clone")
@click.argument("source")
@click.argument("target")
def clone(source: str, target: str) -> None:
    """Make TARGET a copy of the directory SOURCE as it is at one moment; no page is copied.

    Does in one call what `cp -r` does file by file. If TARGET is a directory, the copy is made inside it.
    """
    for name, value in (("SOURCE", source), ("TARGET", target)):
        if not value:
            raise UsageError(f"{name} is empty: give a path on a ramfs mount")
    mount, source_path = locate(source)
    if not os.path.isdir(source):
        raise FileError(errno.ENOTDIR, f"{source} is not a directory: copy single files with cp")
    if os.path.isdir(target):
        target = os.path.join(target, os.path.basename(os.path.realpath(source)))
    other, parent_path, name = locate_new(target)
    if other.device != mount.device:
        raise UsageError(f"{source} and {target} lie in different mounts: clones share pages, so copy with cp instead")
    for path in regular_files(source):  # what guests stored into mapped pages
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # removed since, and so no part of the copy
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    command = {"source": source_path, "parent": parent_path, "name": name}
    try:
        with asked(mount, {"clone": command}, "use cp -r"):
            pass
    except OSError as exc:
        raise FileError(exc.errno or errno.EIO, f"cannot clone {source} to {target}: {exc.strerror}") from None
