"""The RAM map of a running QEMU, from what its monitor says: ``info mtree -f`` and ``info ramblock``.

Both are text for people, there is nothing else. The first has the guest's physical memory as it is now, range by range,
with names of memory regions; the second the names of RAM blocks and their sizes. A region is called as its block is, or
as the last part of the block's name (``vga.vram`` is ``0000:00:02.0/vga.vram``). Read with QEMU 7.2 to 10.
"""

import re
from collections.abc import Mapping
from typing import Final

from ramfs.errors import QmpError
from ramfs.inspect.layout import Elsewhere, Layout, Range, check
from ramfs.ramblock import BlockName, GuestAddress, find_block_file, qemu_name
from ramfs.units import PAGE

#: The address space of devices and CPUs.
_SPACE: Final = 'AS "memory"'
#: ``0000000000000000-000000000009ffff (prio 0, ram): pc.ram @00000000000c0000 KVM``
_LINE: Final = re.compile(
    r"\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]*)\): (.*?)(?: @([0-9a-f]{16}))?(?: KVM)?"
)
#: ``pc.ram    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000``
_BLOCK: Final = re.compile(r"\s*(.+?)\s+\d+ [KMGT]?i?B\s+0x[0-9a-f]+ +0x([0-9a-f]+) +0x[0-9a-f]+.*")


def blocks(ramblock: str) -> dict[bytes, int]:
    """The RAM blocks of ``info ramblock``: bytes that are used of each, by name."""
    found = (_BLOCK.fullmatch(line) for line in ramblock.splitlines())
    return {match[1].encode(): int(match[2], 16) for match in found if match is not None}


def flat_view(mtree: str) -> list[tuple[int, int, bytes, int]]:
    """The ranges of ``info mtree -f``: address, bytes, name of the region, offset in it. Raises QmpError."""
    for view in re.split(r"(?m)^FlatView ", mtree):
        if any(line.strip().startswith(_SPACE) for line in view.splitlines()):
            found = (_LINE.fullmatch(line) for line in view.splitlines())
            return [
                (int(m[1], 16), int(m[2], 16) + 1 - int(m[1], 16), m[4].encode(), int(m[5] or "0", 16))
                for m in found
                if m is not None and m[3] != "i/o"
            ]
    raise QmpError("QEMU's `info mtree -f` has no address space called memory: this program does not understand it")


def _block_of(region: bytes, known: Mapping[bytes, int], end: int) -> bytes | None:
    """The block of a region that reaches at least to ``end``; None if it is no RAM."""
    if region in known:
        return region
    last = [name for name in known if name.endswith(b"/" + region) and known[name] >= end]
    return last[0] if len(last) == 1 else None


def layout_of(
    mtree: str, ramblock: str, backends: Mapping[bytes, bytes], files: Mapping[bytes, int], machine: str = ""
) -> Layout:
    """The layout of a directory with files of these names and sizes, whose guest QEMU told this of.

    ``backends`` are names of files in the directory by the names of the blocks that QEMU has said to be in them. Of a
    block that it has said nothing of the file is known by its name. Raises QmpError, FileError (EINVAL).
    """
    known = blocks(ramblock)
    ranges: list[Range] = []
    elsewhere: list[Elsewhere] = []
    for gpa, size, region, offset in flat_view(mtree):
        block = _block_of(region, known, offset + size)
        if block is None or (gpa | size | offset) % PAGE:
            continue
        name, address = BlockName(block), GuestAddress(gpa)
        file = backends.get(block) or find_block_file(files, qemu_name(name))
        if file is None:
            last = elsewhere[-1] if elsewhere else None
            if last is not None and last.block == name and last.end == gpa:
                elsewhere[-1] = Elsewhere(last.gpa, last.size + size, name)
            else:
                elsewhere.append(Elsewhere(address, size, name))
            continue
        before = ranges[-1] if ranges else None
        # What firmware made read-only, or is shadowed by it, is cut where its kind changes.
        if before is not None and (before.file, before.end, before.offset + before.size) == (file, gpa, offset):
            ranges[-1] = Range(before.gpa, before.size + size, before.offset, file, name)
        else:
            ranges.append(Range(address, size, offset, file, name))
    made = Layout(tuple(sorted(ranges)), tuple(sorted(elsewhere)), machine)
    check(made, files)
    return made
