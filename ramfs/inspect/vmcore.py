"""The head of an ELF core of a guest's physical memory, as QEMU's dump-guest-memory writes it.

    ELF header, type ET_CORE, machine x86-64
    program headers: PT_NOTE, then PT_LOAD for each range, p_paddr and p_vaddr its address
    the note VMCOREINFO, if the guest's kernel has one
    zeros up to a page boundary; then the ranges, one after the other

Its length depends on the number of ranges alone, so that the size of the whole is known before the note is found.

Without a note, the first header is of an empty PT_LOAD instead, behind the last range: a core of one range at 0 would
otherwise have no address but 0, and drgn take it for one that knows no physical addresses (when VMCOREINFO comes from
elsewhere, drgn --vmcoreinfo).

QEMU's own cores also have a note for each CPU, of its registers: these are in no file, so there is none here.
"""

import struct
from collections.abc import Sequence
from typing import Final

from ramfs.inspect.vmcoreinfo import MAX_NOTE
from ramfs.units import PAGE

_HEADER: Final = struct.Struct("<4s5B7xHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_ET_CORE, _EM_X86_64, _EV_CURRENT = 4, 62, 1
_PT_NULL, _PT_LOAD, _PT_NOTE = 0, 1, 4
#: Readable, writable, executable: memory.
_RWX: Final = 7


def _notes(ranges: int) -> int:
    """Where the notes are."""
    return _HEADER.size + (ranges + 1) * _SEGMENT.size


def data_offset(ranges: int) -> int:
    """Where the first of that many ranges begins."""
    return (_notes(ranges) + MAX_NOTE + PAGE - 1) & -PAGE


def header(ranges: Sequence[tuple[int, int]], note: bytes = b"") -> bytes:
    """All before the first of the ranges ``(address, size)``."""
    notes, at = _notes(len(ranges)), data_offset(len(ranges))
    parts = [
        _HEADER.pack(
            b"\x7fELF", 2, 1, _EV_CURRENT, 0, 0, _ET_CORE, _EM_X86_64, _EV_CURRENT, 0, _HEADER.size, 0, 0,
            _HEADER.size, _SEGMENT.size, len(ranges) + 1, 0, 0, 0,
        )
    ]  # fmt: skip
    if note or not ranges:
        parts.append(_SEGMENT.pack(_PT_NOTE if note else _PT_NULL, 0, notes, 0, 0, len(note), len(note), 4))
    else:
        end = sum(ranges[-1])
        parts.append(_SEGMENT.pack(_PT_LOAD, _RWX, at, end, end, 0, 0, 0))
    length = at
    for gpa, size in ranges:
        parts.append(_SEGMENT.pack(_PT_LOAD, _RWX, at, gpa, gpa, size, size, 0))
        at += size
    return b"".join([*parts, note]).ljust(length, b"\0")
