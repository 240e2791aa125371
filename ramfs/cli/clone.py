"""``ramfs clone``."""

import json
import os

import click

from ramfs.cli._flush import regular_files
from ramfs.cli._mounts import mount_of, relative
from ramfs.errors import UsageError


@click.command("clone")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
def clone(source: str, target: str) -> None:
    """Make TARGET a copy of the directory SOURCE as it is at one moment; no page is copied.

    Does in one call what `cp -r` does file by file. If TARGET is a directory, the copy is made inside it.
    """
    entry = mount_of(source)
    if os.path.isdir(target):
        target = os.path.join(target, os.path.basename(os.path.realpath(source)))
    parent, name = os.path.split(target.rstrip("/"))
    if mount_of(parent or ".") != entry:
        raise UsageError(f"{source} and {target} lie in different mounts: clones share pages, so copy with cp instead")
    for path in regular_files(source):  # what guests stored into mapped pages
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    command = {"source": relative(source, entry), "parent": relative(parent or ".", entry), "name": name}
    fd = os.open(os.path.join(entry.mountpoint, ".ramfs/control"), os.O_WRONLY)
    try:
        os.write(fd, json.dumps({"clone": command}).encode())
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, target) from None
    finally:
        os.close(fd)
