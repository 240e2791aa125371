"""What files remember of the layout of a guest's memory, and what a source tells of it."""

import logging
from collections.abc import Mapping
from typing import Final

from ramfs.errors import FileError, SourceRefused
from ramfs.inspect.layout import BEGINS, MAX_TEXT, NAME, Layout, parse, records
from ramfs.namespace import CONTROL_XATTR, Namespace
from ramfs.source.base import SourceDirectory, read_whole
from ramfs.units import PAGE, PAGE_SHIFT, InodeNumber

log = logging.getLogger(__name__)

#: What a file remembers of the layout, and where in it the note of the guest's kernel was found: a page.
LAYOUT_XATTR: Final = CONTROL_XATTR + b"layout"
NOTE_XATTR: Final = CONTROL_XATTR + b"vmcoreinfo"


def plant_layout(namespace: Namespace, directory: InodeNumber, layout: Layout) -> None:
    """Let the files of a new directory, which are those of the layout, remember it. In a transaction."""
    numbers = {name: ino for name, (ino, _) in namespace.memory_files(directory, LAYOUT_XATTR).items()}
    for name, record in records(layout).items():
        namespace.remember(numbers[name], LAYOUT_XATTR, record)
    remember_note(namespace, layout, numbers)


def remember_note(namespace: Namespace, layout: Layout, numbers: Mapping[bytes, InodeNumber]) -> None:
    """Let a file remember where the layout says that the note is, if it does."""
    if layout.note is not None:
        name, offset = layout.note
        namespace.remember(numbers[name], NOTE_XATTR, b"%d" % (offset >> PAGE_SHIFT))


async def fetch_layout(directory: SourceDirectory, sizes: Mapping[bytes, int]) -> Layout:
    """What a source says of where its files, by path with their bytes, lie. Of a layout that is derived the note alone.

    Raises what reading raises.
    """
    try:
        source = await directory.open(NAME)
    except SourceRefused:
        return Layout()
    try:
        data = memoryview(bytearray(min(source.size, MAX_TEXT)))
        await read_whole(source, 0, data[:PAGE])
        if not data[:PAGE].tobytes().startswith(BEGINS):
            return Layout()
        await read_whole(source, PAGE, data[PAGE:])
        files = {path: size for path, size in sizes.items() if b"/" not in path}
        told = parse(data.tobytes().rstrip(b" \0"), files)
    except FileError as exc:
        log.warning("%s is not used: %s", source.description, exc)
        return Layout()
    finally:
        await source.aclose()
    return Layout(note=told.note) if told.derived else told
