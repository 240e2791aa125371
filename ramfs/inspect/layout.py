"""Where the block files of a guest lie in its physical memory: the layout of a directory.

It is told by QEMU (memorymap.py), written by hand, or derived from names and sizes alone. As text it is the
``layout.json`` of docs/format.md. In the store each file has its own part, a *record*, so that a copy of the file, a
link to it or a snapshot has it too, under whatever name (fuse/views.py); the layout is what the files of a
directory say together.

Addresses, sizes and offsets are bytes, and multiples of the page size.
"""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ramfs.errors import BadName, FileError
from ramfs.ramblock import Block, BlockName, FileName, GuestAddress, file_name_of, parse_file_name
from ramfs.units import PAGE

SCHEMA: Final = 1
#: How the text begins.
BEGINS: Final = b'{\n  "schema": '
#: More ranges than any guest has.
MAX_RANGES: Final = 1024
#: Bytes of the longest text.
MAX_TEXT: Final = 1 << 20
#: Where physical addresses end: those of x86-64 have 52 bits.
MAX_ADDRESS: Final = 1 << 52
#: What a snapshot's layout is called for servers that export the files of a directory alone (not listed there).
NAME: Final = "ramfs.layout"
#: The file of a guest's device state, which is no memory.
STATE: Final = b"state"

#: RAM that QEMU's pc machine has below 4 GiB: all of it, or this much when there is _PC_SPLITS or more.
_PC_BELOW: Final = 0xC0000000
_PC_SPLITS: Final = 0xE0000000
_FOUR_GIB: Final = 1 << 32
#: Bytes of the smallest file that is taken for a guest's RAM whatever its name is.
_LEAST_RAM: Final = 1 << 20
_LONGEST_MACHINE: Final = 255
_NOTE_KEYS: Final = {"file", "offset"}


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Physical memory of a guest that lies in a file."""

    gpa: GuestAddress
    size: int
    offset: int
    """in the file"""
    file: bytes
    """the file's name in the directory"""
    block: BlockName

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.gpa + self.size

    @property
    def name(self) -> FileName:
        """What its view is called: IDSTR@GPA."""
        return file_name_of(Block(self.gpa, self.block))


@dataclass(frozen=True, slots=True, order=True)
class Elsewhere:
    """Physical memory of a guest that is in no file of the directory, such as its firmware."""

    gpa: GuestAddress
    size: int
    block: BlockName

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.gpa + self.size


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a directory."""

    ranges: tuple[Range, ...] = ()
    """in the order of addresses; none overlaps another"""
    elsewhere: tuple[Elsewhere, ...] = ()
    machine: str = ""
    """what QEMU calls the machine, if that is known"""
    derived: bool = False
    """from names and sizes alone?"""
    ignored: tuple[Range, ...] = ()
    """what files say of themselves and cannot be, since others lie there"""
    note: tuple[bytes, int] | None = None
    """a file, and where in it the guest's kernel had its note VMCOREINFO when it was last looked for"""

    @property
    def size(self) -> int:
        """The address behind the last range."""
        return max((each.end for each in self.ranges), default=0)

    def gaps(self) -> list[tuple[int, int]]:
        """The addresses ``[start, stop)`` between ranges, and before the first."""
        found, at = [], 0
        for each in self.ranges:
            if each.gpa > at:
                found.append((at, int(each.gpa)))
            at = each.end
        return found


def _bad(what: str) -> FileError:
    return FileError(errno.EINVAL, what)


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _at(gpa: int, size: int) -> str:
    return f"[{gpa:#x}, {gpa + size:#x})"


# -- text


def _number(entry: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = entry.get(key, default)
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad(f'a range lacks "{key}", a number of bytes such as 4096 or "0x1000"')
    if value % PAGE:
        raise _bad(f'"{key}" is {value:#x}, which is no multiple of the page size, {PAGE}')
    return value


def _name(entry: Mapping[str, Any], key: str) -> bytes:
    value = entry.get(key)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _bad(f'a range lacks "{key}", a name')
    try:
        return os.fsencode(value)
    except UnicodeEncodeError:
        raise _bad(f'"{key}" is {value!a}, which is no name') from None


def _entries(told: Mapping[str, Any], key: str, known: set[str]) -> list[dict[str, Any]]:
    entries = told.get(key, [])
    if not isinstance(entries, list) or len(entries) > MAX_RANGES:
        raise _bad(f'"{key}" is no list of at most {MAX_RANGES} ranges')
    for entry in entries:
        if not isinstance(entry, dict):
            raise _bad(f'"{key}" has {json.dumps(entry)[:40]} in it, which is no range')
        if unknown := sorted(set(entry) - known):
            raise _bad(f'a range has "{unknown[0]}", which means nothing here')
    return entries


def parse(text: bytes | str, files: Mapping[bytes, int]) -> Layout:
    """A layout that somebody wrote, for a directory with files of these names and sizes.

    What it says of having been derived is kept; whoever stores it makes that untrue.
    Raises FileError (EINVAL) that says what is wrong with it.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _bad(f"it is no JSON: {exc}") from None
    if not isinstance(told, dict) or "ranges" not in told:
        raise _bad('it is no object with "ranges"')
    if told.get("schema", SCHEMA) != SCHEMA:
        raise _bad(f'"schema" is {json.dumps(told["schema"])[:40]}, this program knows {SCHEMA}')
    machine = told.get("machine", "")
    if not isinstance(machine, str) or len(machine) > _LONGEST_MACHINE:
        raise _bad('"machine" is no short text')
    ranges = [_range(entry) for entry in _entries(told, "ranges", {"gpa", "size", "file", "offset", "block"})]
    elsewhere = []
    for entry in _entries(told, "elsewhere", {"gpa", "size", "block"}):
        gpa, size = _number(entry, "gpa"), _number(entry, "size")
        elsewhere.append(Elsewhere(GuestAddress(gpa), size, BlockName(_name(entry, "block"))))
    note = None
    for entry in _entries(
        {"vmcoreinfo": [told["vmcoreinfo"]]} if "vmcoreinfo" in told else {}, "vmcoreinfo", _NOTE_KEYS
    ):
        note = _name(entry, "file"), _number(entry, "offset")
    derived = told.get("derived") is True
    made = Layout(tuple(sorted(ranges)), tuple(sorted(elsewhere)), machine, derived, note=note)
    check(made, files)
    return made


def _range(entry: Mapping[str, Any]) -> Range:
    gpa, size, offset = _number(entry, "gpa"), _number(entry, "size"), _number(entry, "offset", 0)
    file = _name(entry, "file")
    block = _name(entry, "block") if "block" in entry else block_of(file)
    return Range(GuestAddress(gpa), size, offset, file, BlockName(block))


def block_of(file: bytes) -> BlockName:
    """The block that a file holds by its name; one that is no block file's counts as the block's."""
    try:
        return parse_file_name(file).name
    except BadName:
        return BlockName(file)


def check(layout: Layout, files: Mapping[bytes, int]) -> None:
    """Can it be, in a directory with files of these names and sizes? Raises FileError (EINVAL)."""
    for each in layout.ranges:
        if each.file not in files:
            raise _bad(f"there is no file {_shown(each.file)} for the range {_at(each.gpa, each.size)}")
        if each.offset + each.size > files[each.file]:
            raise _bad(
                f"the range {_at(each.gpa, each.size)} ends at {each.offset + each.size:#x} of {_shown(each.file)}, "
                f"which has {files[each.file]:#x} bytes"
            )
        try:
            _ = each.name
        except BadName as exc:
            raise _bad(f"the range {_at(each.gpa, each.size)} can have no name: {exc}") from None
    if layout.note is not None and layout.note[1] >= files.get(layout.note[0], 0):
        raise _bad(f'"vmcoreinfo" is at {layout.note[1]:#x} of {_shown(layout.note[0])}, which has no such place')
    before: Range | Elsewhere | None = None
    parts: list[Range | Elsewhere] = [*layout.ranges, *layout.elsewhere]
    for part in sorted(parts, key=lambda part: (part.gpa, part.size)):
        if part.size == 0:
            raise _bad(f"the range at {part.gpa:#x} is empty")
        if part.end > MAX_ADDRESS:
            raise _bad(f"the range {_at(part.gpa, part.size)} ends above {MAX_ADDRESS:#x}, where addresses end")
        if before is not None and part.gpa < before.end:
            raise _bad(f"the ranges {_at(before.gpa, before.size)} and {_at(part.gpa, part.size)} overlap")
        before = part


def to_text(layout: Layout) -> bytes:
    """``layout.json``: what :func:`parse` reads, and for the reader where the gaps are."""

    def shown(each: Range) -> dict[str, str]:
        return {
            "gpa": f"{each.gpa:#x}", "size": f"{each.size:#x}", "file": os.fsdecode(each.file),
            "offset": f"{each.offset:#x}", "block": os.fsdecode(each.block),
        }  # fmt: skip

    told: dict[str, Any] = {"schema": SCHEMA, "derived": layout.derived}
    if layout.machine:
        told["machine"] = layout.machine
    told["ranges"] = [shown(each) for each in layout.ranges]
    told["gaps"] = [{"gpa": f"{low:#x}", "size": f"{high - low:#x}"} for low, high in layout.gaps()]
    told["elsewhere"] = [
        {"gpa": f"{each.gpa:#x}", "size": f"{each.size:#x}", "block": os.fsdecode(each.block)}
        for each in layout.elsewhere
    ]
    if layout.note is not None:
        told["vmcoreinfo"] = {"file": os.fsdecode(layout.note[0]), "offset": f"{layout.note[1]:#x}"}
    if layout.ignored:
        told["ignored"] = [shown(each) for each in layout.ignored]
    return json.dumps(told, indent=2).encode() + b"\n"


# -- without being told


def derive(files: Mapping[bytes, int]) -> Layout:
    """What names and sizes alone tell: a block file ``IDSTR@GPA`` lies at GPA.

    One at address 0 that has 3.5 GiB or more is cut at 3 GiB, and goes on at 4 GiB, as QEMU's pc machine does it
    (q35 cuts at 2 GiB from 2.75 GiB on, which no name tells). Where no file is named so, the only one that looks like
    RAM lies at 0.
    """
    found: list[Range] = []
    for file, size in files.items():
        try:
            block = parse_file_name(file)
        except BadName:
            continue
        found += _placed(block, file, size)
    if not found:
        rams = [
            (file, size) for file, size in files.items() if file != STATE and size >= _LEAST_RAM and size % PAGE == 0
        ]
        if len(rams) == 1:
            file, size = rams[0]
            found = _placed(Block(GuestAddress(0), BlockName(file)), file, size)
    kept, ignored = _without_overlaps(found)
    return Layout(kept, derived=True, ignored=ignored)


def _placed(block: Block, file: bytes, size: int) -> list[Range]:
    size = min(size & -PAGE, MAX_ADDRESS - block.gpa)
    if size <= 0 or block.gpa % PAGE:
        return []
    if block.gpa or size < _PC_SPLITS:
        return [Range(block.gpa, size, 0, file, block.name)]
    return [
        Range(block.gpa, _PC_BELOW, 0, file, block.name),
        Range(GuestAddress(_FOUR_GIB), size - _PC_BELOW, _PC_BELOW, file, block.name),
    ]


def _without_overlaps(ranges: Iterable[Range]) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Those that can be together, in the order of addresses, and the others."""
    kept: list[Range] = []
    ignored: list[Range] = []
    for each in sorted(ranges):
        if kept and each.gpa < kept[-1].end:
            ignored.append(each)
        else:
            kept.append(each)
    return tuple(kept), tuple(ignored)


# -- records


@dataclass(slots=True)
class _Record:
    block: str
    ranges: list[list[int]]
    machine: str = ""
    elsewhere: list[list[Any]] = field(default_factory=list)


def records(layout: Layout) -> dict[bytes, bytes]:
    """What each file is to remember of a layout; the first one also what is said of no file."""
    made: dict[bytes, _Record] = {}
    for each in layout.ranges:
        if not made:
            others = [[other.gpa, other.size, os.fsdecode(other.block)] for other in layout.elsewhere]
            made[each.file] = _Record("", [], layout.machine, others)
        record = made.setdefault(each.file, _Record("", []))
        record.block = os.fsdecode(each.block)
        record.ranges.append([each.gpa, each.size, each.offset])
    return {
        file: json.dumps({key: value for key in _Record.__slots__ if (value := getattr(record, key))}).encode()
        for file, record in made.items()
    }


def compose(remembered: Mapping[bytes, bytes]) -> Layout:
    """The layout of a directory whose files of these names remember these records."""
    ranges: list[Range] = []
    elsewhere: set[Elsewhere] = set()
    machine = ""
    for file in sorted(remembered):
        told = json.loads(remembered[file])
        block = BlockName(os.fsencode(told["block"]))
        ranges += [Range(GuestAddress(gpa), size, offset, file, block) for gpa, size, offset in told["ranges"]]
        machine = machine or told.get("machine", "")
        for gpa, size, name in told.get("elsewhere", ()):
            elsewhere.add(Elsewhere(GuestAddress(gpa), size, BlockName(os.fsencode(name))))
    kept, ignored = _without_overlaps(ranges)
    others = [each for each in elsewhere if not any(each.gpa < k.end and k.gpa < each.end for k in kept)]
    return Layout(kept, tuple(sorted(others)), machine, ignored=ignored)
