"""The names of RAM blocks, as files and as QEMU's temporary files.

A block of guest RAM is known by its IDSTR (QEMU's word for a block's name) and by the guest-physical
address of its first byte. Three names stand for it:

    where                     form                          example
    the file in a directory   IDSTR@GPA                     0000:00:02.0%2Fvga.vram@0xfd000000
    QEMU, ``-mem-path DIR``     qemu_back_mem.NAME.XXXXXX     qemu_back_mem.0000:00:02.0_vga.vram.k3Jd0Q
    the IDSTR in the guest                                  0000:00:02.0/vga.vram

In a file name ``/`` is written ``%2F`` and ``%`` is written ``%25``; every other byte stands for itself.
The form is canonical: one block has one file name, and a name that spells it otherwise (``%2f``, ``0x01``,
``0X1``) is not that of a block but an ordinary file's. QEMU, for its part, writes ``_`` for each ``/``, which
cannot be undone: NAME tells the block only among those that a directory has, see ``find_block_file``.

All names are bytes, as Linux has them: neither UTF-8 nor printable. Nothing here does I/O.
The forms of QEMU are those of ``file_ram_open`` in its softmmu/physmem.c (7.2; system/physmem.c today).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NewType

from ramfs.errors import BadName, NameTooLong
from ramfs.units import MAX_NAME

#: An IDSTR, such as ``pc.ram``, with its ``/`` and ``%`` as they are.
BlockName = NewType("BlockName", bytes)
#: A block's name as QEMU writes it into its temporary file's name: an IDSTR with ``_`` for each ``/``.
QemuName = NewType("QemuName", bytes)
#: The name of a file in a directory: 1 to 255 bytes, without ``/`` and NUL.
FileName = NewType("FileName", bytes)
#: A guest-physical address in bytes, below 2^64.
GuestAddress = NewType("GuestAddress", int)

#: Where a block begins when nothing else is known: main RAM does, and it alone goes to a file.
NO_OFFSET: Final = GuestAddress(0)

_GPA = re.compile(rb"0x(0|[1-9a-f][0-9a-f]{0,15})")
_TEMPORARY = re.compile(rb"qemu_back_mem\.(.+)\.[A-Za-z0-9]{6}", re.DOTALL)
# A percent sign that does not begin one of the two sequences that the encoding makes.
_STRAY_PERCENT = re.compile(rb"%(?!2F|25)")


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """A RAM block as its file name tells it: an IDSTR and the guest-physical address of its first byte."""

    gpa: GuestAddress
    name: BlockName


def parse_file_name(file_name: bytes) -> Block:
    """Tell which block the file called ``file_name`` holds: ``pc.ram@0x0`` is ``pc.ram`` at address 0.

    The split is at the last ``@``, so that an IDSTR may contain others. Raises ``NameTooLong`` above 255
    bytes and ``BadName`` for any other name that ``file_name_of`` would not have made.
    """
    _check_file_name(file_name)
    encoded, at, address = file_name.rpartition(b"@")
    if not at:
        raise BadName(f"{_shown(file_name)} is not a block file: it lacks @ and a guest-physical address")
    if not encoded:
        raise BadName(f"{_shown(file_name)} is not a block file: there is no block name before the @")
    digits = _GPA.fullmatch(address)
    if digits is None:
        raise BadName(
            f"{_shown(file_name)} is not a block file: {_shown(address)} is not an address such as 0x0 "
            "(lower-case hex, no leading zeros, below 2^64)"
        )
    if _STRAY_PERCENT.search(encoded):
        raise BadName(
            f"{_shown(file_name)} is not a block file: only %2F (for /) and %25 (for %) may stand in its name"
        )
    name = encoded.replace(b"%2F", b"/").replace(b"%25", b"%")
    return Block(gpa=GuestAddress(int(digits[1], 16)), name=BlockName(name))


def file_name_of(block: Block) -> FileName:
    """Name the file of ``block``: ``pc.ram`` at address 0 is ``pc.ram@0x0``.

    Raises ``BadName`` when the IDSTR is empty or has a NUL, or the address is not below 2^64, and
    ``NameTooLong`` when the name would exceed 255 bytes (an IDSTR has up to 255, and encoding adds to them).
    """
    name = bytes(block.name)
    if not name:
        raise BadName("a block with an empty name has no file name")
    if b"\0" in name:
        raise BadName(f"block {_shown(name)} has no file name: a file name cannot hold a NUL")
    if not 0 <= block.gpa < 1 << 64:
        raise BadName(f"block {_shown(name)} has no file name: its address {block.gpa} is not below 2^64")
    encoded = name.replace(b"%", b"%25").replace(b"/", b"%2F")
    file_name = encoded + b"@%#x" % block.gpa
    if len(file_name) > MAX_NAME:
        raise NameTooLong(
            f"block {_shown(name)} has no file name: it would have {len(file_name)} bytes, Linux allows {MAX_NAME}"
        )
    return FileName(file_name)


def block_file_name(name: bytes) -> FileName:
    """Name the file that is made for the block ``name`` where there is none: ``NAME@0x0``.

    Raises as ``file_name_of`` does.
    """
    return file_name_of(Block(gpa=NO_OFFSET, name=BlockName(name)))


def temporary_name(file_name: bytes) -> QemuName | None:
    """Tell the NAME of QEMU's temporary ``qemu_back_mem.NAME.XXXXXX``; None when it is not of that form.

    XXXXXX are the six letters and digits that mkstemp chose. NAME has at least one byte and may itself
    contain dots, ``@`` and ``:``. No block file's name is of this form: after its last dot comes an ``@``.
    """
    if len(file_name) > MAX_NAME or b"/" in file_name or b"\0" in file_name:
        return None
    match = _TEMPORARY.fullmatch(file_name)
    return None if match is None else QemuName(match[1])


def qemu_name(name: BlockName) -> QemuName:
    """Write an IDSTR as QEMU does in its temporary file's name: each ``/`` becomes ``_``."""
    return QemuName(name.replace(b"/", b"_"))


def find_block_file(file_names: Iterable[bytes], name: QemuName) -> FileName | None:
    """Find the block file of QEMU's ``name`` among the names of one directory; None when it has none.

    A block matches at whatever address it lies. When several do (``a/b`` and ``a_b`` look alike to QEMU, and
    a block may have been saved at two addresses), the block spelled exactly like ``name`` goes before
    others, then the lowest address, then byte order, so that every clone of the directory chooses alike.
    """
    best: tuple[bool, Block] | None = None
    for file_name in file_names:
        if b"@" not in file_name:
            continue
        try:
            block = parse_file_name(file_name)
        except BadName:
            continue
        if qemu_name(block.name) == name:
            candidate = (bytes(block.name) != name, block)
            best = candidate if best is None else min(best, candidate)
    return None if best is None else file_name_of(best[1])


def _check_file_name(file_name: bytes) -> None:
    """Raise unless Linux takes ``file_name`` as the name of a directory entry."""
    if len(file_name) > MAX_NAME:
        raise NameTooLong(f"{_shown(file_name)} has {len(file_name)} bytes, Linux allows {MAX_NAME}")
    if b"/" in file_name or b"\0" in file_name:
        raise BadName(f"{_shown(file_name)} is not a file name: it has a slash or a NUL")


def _shown(name: bytes) -> str:
    """``name`` in quotes on one line, whatever bytes it has, and cut when it is very long."""
    cut = name if len(name) <= 64 else name[:61] + b"..."
    try:
        return repr(cut.decode())
    except UnicodeDecodeError:
        return repr(cut)[1:]
