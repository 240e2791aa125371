"""The state of a guest's devices without the RAM that is in files, for a guest that maps these privately.

QEMU leaves RAM out of a migration stream only where it is mapped shared (x-ignore-shared). Its command
xen-save-devices-state, which needs no Xen, saves the devices alone. What then lacks for a stream that -incoming takes
is put in here (QEMU's docs/devel/migration, migration/savevm.c and ram.c):

    header                  magic and version
    configuration           the machine type's name, and that x-ignore-shared is on
    section "ram"           blocks that no file holds, such as that of the graphics card
    sections of devices     as saved
    end
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ramfs import qmp
from ramfs.cli._private import Process, Ranges, copy_pages
from ramfs.errors import QmpError
from ramfs.image.pages import nonzero_pages
from ramfs.inspect.memorymap import flat_view
from ramfs.units import PAGE

_HEADER: Final = struct.pack(">4sI", b"QEVM", 3)
_START, _SUBSECTION, _CONFIGURATION, _FOOTER = b"\x01", b"\x05", b"\x07", b"\x7e"
_CAPABILITIES: Final = b"\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0fx-ignore-shared"
#: No section of QEMU's own has this number.
_NUMBER: Final = struct.pack(">I", 0x7FFFFFFF)
#: What stands in the low bits of the address of a record of RAM.
_ZERO, _SIZES, _PAGE, _END, _CONTINUED = 0x02, 0x04, 0x08, 0x10, 0x20
#: How QEMU tells that the guest ran: its length with the zero, and itself.
_RAN, _PAUSED = (struct.pack(">I8s", len(text) + 1, text) for text in (b"running", b"paused"))

#: Of `info ramblock`: name, bytes used, and since QEMU 8.1 the address in its memory.
_BLOCK: Final = re.compile(
    r"^ *(\S.*?) +\d+ \w+  0x[0-9a-f]+ 0x([0-9a-f]+) 0x[0-9a-f]+(?: 0x([0-9a-f]+) +r[ow])?$", re.MULTILINE
)
#: Of `gpa2hva`.
_ADDRESS: Final = re.compile(r"\((.*)\) is 0x([0-9a-f]+)")
#: What another QEMU has by itself.
_FIRMWARE: Final = re.compile(r"^/rom@|\.rom$|^pc\.bios$")


@dataclass
class Block:
    """A RAM block of a guest."""

    name: str
    size: int
    """bytes in use"""
    address: int
    """in QEMU's memory"""


class Devices:
    """The devices of a guest: :meth:`prepare`, then :meth:`save` while it is stopped, then :meth:`state`."""

    def __init__(self, guest: qmp.Qmp, process: Process) -> None:
        self._guest = guest
        self._process = process
        self._machine = b""
        self._blocks: list[Block] = []
        self._ram: list[bytearray] = []
        self._saved = b""

    async def prepare(self) -> None:
        """Raises QmpError when the state of this guest cannot be saved."""
        await self._guest.require_ignore_shared()
        await self._guest.require_movable()
        kind = str(await self._guest.execute("qom-get", {"path": "/machine", "property": "type"}))
        self._machine = kind.removesuffix("-machine").encode()
        mapped = [each for each in self._process.mappings() if each.private]
        self._blocks = [
            block
            for block in await self._locate()
            if not any(each.start <= block.address < each.stop for each in mapped)
        ]

    async def _locate(self) -> list[Block]:
        """The RAM blocks, and where they are in QEMU's memory; without firmware that it does not tell of."""
        listed = _BLOCK.findall(await self._guest.monitor("info ramblock"))
        ranges = flat_view(await self._guest.monitor("info mtree -f"))
        found = []
        for name, size, told in listed:
            address = int(told, 16) if told else None
            if address is None:
                # QEMU adds the device's path to the name of its region.
                tail = name.rpartition("/")[2]
                if [other.rpartition("/")[2] for other, _, _ in listed].count(tail) == 1:
                    address = await self._address_of([each for each in ranges if each[2].decode() in (name, tail)])
            if address is not None:
                found.append(Block(name, int(size, 16), address))
            elif not _FIRMWARE.search(name):
                raise QmpError(f"this QEMU does not tell where its RAM block {name} is in its memory; QEMU 8.1 does")
        return found

    async def _address_of(self, ranges: list[tuple[int, int, bytes, int]]) -> int | None:
        """Where a region begins in QEMU's memory, by any range that it lies at."""
        for at, _, name, offset in ranges:
            told = _ADDRESS.search(await self._guest.monitor(f"gpa2hva {at:#x}"))
            if told is not None and told[1].encode() == name:
                return int(told[2], 16) - offset
        return None

    async def save(self) -> None:
        """Save the devices, and read the blocks that are in no file. Raises QmpError, FileError."""
        fd = os.memfd_create("ramfs-devices", os.MFD_CLOEXEC)
        try:
            await self._guest.save_devices(fd)
            self._saved = os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
        for block in self._blocks:
            ram = bytearray(block.size)

            def put(ranges: Ranges, data: memoryview, ram: bytearray = ram) -> None:
                ram[int(ranges[0, 0]) : int(ranges[-1, 1])] = data  # one range, in pieces

            ranges = np.array([[block.address, block.address + block.size]], np.uint64)
            copy_pages(self._process, [(-block.address, ranges)], put)
            self._ram.append(ram)

    def state(self) -> Iterator[bytes]:
        """The parts of a stream for -incoming. Raises QmpError when QEMU saved something else than was expected."""
        at = len(_HEADER)
        # A section of a device comes first, unless QEMU has begun to write a configuration.
        if self._saved[:at] != _HEADER or self._saved[at : at + 1] != b"\x04":
            raise QmpError("this QEMU saves the state of devices in a form that is not known here")
        yield _HEADER + _CONFIGURATION + struct.pack(">I", len(self._machine)) + self._machine
        yield _SUBSECTION + _CAPABILITIES
        yield _START + _NUMBER + b"\x03ram" + struct.pack(">II", 0, 4)
        yield struct.pack(">Q", sum(block.size for block in self._blocks) | _SIZES)
        for block in self._blocks:
            yield _named(block) + struct.pack(">QQ", block.size, 0)
        for block, ram in zip(self._blocks, self._ram, strict=True):
            yield from _pages(block, ram)
        yield struct.pack(">Q", _END) + _FOOTER + _NUMBER
        # The guest is to wait for `cont`, as after a snapshot.
        before = re.escape(b"\x0bglobalstate") + rb"........"
        yield re.sub(b"(" + before + b")" + re.escape(_RAN), rb"\g<1>" + _PAUSED, self._saved[at:], flags=re.DOTALL)


def _named(block: Block) -> bytes:
    name = block.name.encode()
    return bytes([len(name)]) + name


def _pages(block: Block, ram: bytearray) -> Iterator[bytes]:
    """Records of all pages of a block: address and flags, of the first one the block's name, and the bytes."""
    stored = nonzero_pages(ram)
    records = np.zeros(len(stored), [("address", ">u8"), ("page", np.uint8, PAGE)])
    records["address"] = np.arange(0, len(ram), PAGE) | _CONTINUED | np.where(stored, _PAGE, _ZERO)
    records["page"] = np.frombuffer(ram, np.uint8).reshape(-1, PAGE)
    first = records[:1].copy()
    first["address"] ^= _CONTINUED
    data = first.tobytes()
    yield data[:8] + _named(block) + data[8 : 8 + PAGE if stored[0] else 9]
    stored[0], zeros = False, ~stored
    zeros[0] = False
    yield records[stored].tobytes()
    # Of a page of zeros there is one byte.
    yield records[zeros].view(np.uint8).reshape(-1, 8 + PAGE)[:, :9].tobytes()
