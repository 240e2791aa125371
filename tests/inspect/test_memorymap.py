"""The RAM map as QEMU's monitor shows it."""

from __future__ import annotations

import pytest

from ramfs.errors import FileError, QmpError
from ramfs.inspect.memorymap import blocks, flat_view, layout_of

# As QEMU 7.2 says it of a pc with 5 GiB and a VGA whose firmware has run, shortened.
MTREE = """\
FlatView #0
 AS "VGA", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000
  00000000000cb000-00000000000cdfff (prio 0, ram): pc.ram @00000000000cb000 KVM
  00000000000ce000-00000000000fffff (prio 0, rom): pc.ram @00000000000ce000
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000

FlatView #2
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
"""
RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000100000000 0x0000000100000000
   0000:00:02.0/vga.vram    4 KiB  0x0000000140080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x00000001410c0000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000140000000 0x0000000000040000 0x0000000000040000
"""
VGA = b"0000:00:02.0%2Fvga.vram@0xfd000000"


def test_a_guest_of_four_gib_with_a_vga() -> None:
    layout = layout_of(MTREE, RAMBLOCK, {b"pc.ram": b"ram"}, {b"ram": 4 << 30, VGA: 16 << 20}, "pc")
    assert [(each.gpa, each.size, each.offset, each.file, each.block) for each in layout.ranges] == [
        (0, 0xA0000, 0, b"ram", b"pc.ram"),
        (0xC0000, 0xC0000000 - 0xC0000, 0xC0000, b"ram", b"pc.ram"),
        (0xFD000000, 16 << 20, 0, VGA, b"0000:00:02.0/vga.vram"),
        (0x100000000, 1 << 30, 0xC0000000, b"ram", b"pc.ram"),
    ]
    assert [(each.gpa, each.size, each.block) for each in layout.elsewhere] == [(0xFFFC0000, 0x40000, b"pc.bios")]
    assert (layout.machine, layout.derived) == ("pc", False)


def test_a_block_without_a_file_is_told() -> None:
    layout = layout_of(MTREE, RAMBLOCK, {}, {b"pc.ram@0x0": 4 << 30})
    assert {each.file for each in layout.ranges} == {b"pc.ram@0x0"}
    assert [each.block for each in layout.elsewhere] == [b"0000:00:02.0/vga.vram", b"pc.bios"]


def test_a_file_that_is_too_small_is_no_home_of_a_block() -> None:
    with pytest.raises(FileError, match=r"pc.ram@0x0, which has 0x1000 bytes"):
        layout_of(MTREE, RAMBLOCK, {}, {b"pc.ram@0x0": 4096})


def test_what_is_not_understood_is_no_layout() -> None:
    with pytest.raises(QmpError, match="does not understand"):
        flat_view("unknown command: 'info mtree -f'\r\n")
    assert blocks("unknown command") == {}
    assert layout_of(MTREE, "", {}, {b"pc.ram@0x0": 4 << 30}).ranges == ()
