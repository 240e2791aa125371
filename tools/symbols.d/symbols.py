"""Debugging symbols of a Linux guest, made from nothing but its memory.

A kernel has two tables of itself in memory: kallsyms with the address of every symbol, and BTF with every type.
VMCOREINFO tells where they are. No debugger reads BTF from a vmcore, but a C compiler turns it into what they do read:

    BTF -> C declarations (bpftool) -> DWARF (gcc), and the variables put at the addresses of kallsyms (ld)
        -> the types in volatility's JSON (by drgn, which has the DWARF then)

The addresses are those at which the kernel runs, so that drgn takes the file as it is (--extra-symbols). It could take
it for the kernel's own, and move it, but then it asks for each section of each module: some ten thousand reads.

BTF has no types of global variables but those of each CPU, so the types of the known ones are told here.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from drgn import Program, Type, TypeKind, sizeof
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

#: C declarations of what debuggers look for. Those whose name or type the kernel does not have are left out.
VARIABLES = """
atomic_long_t _totalram_pages
char *saved_command_line
char linux_banner[256]
int cap_last_cap
struct cpumask __cpu_online_mask
struct cpumask __cpu_possible_mask
struct cpumask __cpu_present_mask
struct dentry_operations sockfs_dentry_operations
struct file_operations socket_file_ops
struct files_struct init_files
struct idr link_idr
struct idr map_idr
struct idr prog_idr
struct ipc_namespace init_ipc_ns
struct list_head cgroup_roots
struct list_head modules
struct list_head net_namespace_list
struct list_head slab_caches
struct list_head super_blocks
struct mem_section **mem_section
struct mm_struct init_mm
struct net init_net
struct pid_namespace init_pid_ns
struct pglist_data *node_data[1024]
struct printk_ringbuffer *prb
struct resource iomem_resource
struct resource ioport_resource
struct rq runqueues
struct taint_flag taint_flags[19]
struct task_group root_task_group
struct task_struct init_task
struct tk_data tk_core
struct user_namespace init_user_ns
struct uts_namespace init_uts_ns
unsigned int nr_cpu_ids
unsigned long __per_cpu_offset[8192]
unsigned long avenrun[3]
unsigned long page_offset_base
unsigned long tainted_mask
unsigned long vmalloc_base
unsigned long vmemmap_base
"""

#: How drgn takes what is made here.
DRGN = """\
#!/bin/sh
exec {drgn} --vmcoreinfo {made}.vmcoreinfo --no-default-symbols --extra-symbols {made} "$@"
"""

#: What Linux before 6.13 has without a name.
TK_DATA = "struct tk_data { seqcount_raw_spinlock_t seq; struct timekeeper timekeeper; };"

_NAMED = re.compile(r"^((?:struct|union|enum) \w+) \{", re.MULTILINE)
_DECLARATION = re.compile(r"(?P<type>(?:struct |unsigned )?\w+) \**(?P<name>\w+)(\[\d+\])?")
_KERNEL_HALF = 1 << 63
_START_KERNEL_MAP = 0xFFFFFFFF80000000
_KERNEL_SIZE = 1 << 30
_WORD = (1 << 64) - 1
#: Bytes that are read at once.
_CHUNK = 1 << 16


def die(message: str) -> NoReturn:
    sys.exit(f"symbols: {message}")


class Kernel:
    """A kernel in a vmcore, and what it tells of itself."""

    def __init__(self, vmcore: Path) -> None:
        self.program = Program()
        try:
            self.program.set_core_dump(vmcore)
            told = self.program["VMCOREINFO"].string_().decode()
            self.told = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
            self._chunks: dict[int, bytes] = {}
            self.program.add_memory_segment(_START_KERNEL_MAP, _KERNEL_SIZE, self._read)
            index = load_vmlinux_kallsyms(self.program)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  (drgn has no class for all that it cannot read)
            die(f"{vmcore}: no Linux 6.0 or newer on x86-64 was found in it ({error})")
        self.program.register_symbol_finder("kallsyms", index, enable_index=0)
        #: By how many bytes the kernel runs above the addresses that it was linked for.
        self.moved = int(self.told["KERNELOFFSET"], 16)
        #: Of all symbols. Those of variables of each CPU are small numbers.
        self.addresses: dict[str, int] = {}
        for symbol in self.program.symbols():
            self.addresses.setdefault(symbol.name, symbol.address)

    def _read(self, address: int, count: int, _offset: int, _physical: bool) -> bytes:
        """Read the kernel's image. drgn reads kallsyms by the byte, and through the page table each time."""
        found = bytearray()
        while len(found) < count:
            number, at = divmod(address + len(found), _CHUNK)
            if number not in self._chunks:
                physical = number * _CHUNK + self.to_physical & _WORD
                self._chunks[number] = self.program.read(physical, _CHUNK, physical=True)
            found += self._chunks[number][at : at + count - len(found)]
        return bytes(found)

    def linked(self, address: int) -> int:
        """Where the kernel's file has what is at this address; variables of each CPU are never moved."""
        return address - self.moved if address >= _KERNEL_HALF else address

    @property
    def to_physical(self) -> int:
        """What leads from an address of the kernel to the physical one, modulo 2**64."""
        return int(self.told["NUMBER(phys_base)"]) - _START_KERNEL_MAP & _WORD

    def btf(self) -> bytes:
        try:
            start, stop = (self.program.symbol(f"__{end}_BTF").address for end in ("start", "stop"))
        except LookupError:
            die(f"the kernel {self.told['OSRELEASE']} was built without BTF (CONFIG_DEBUG_INFO_BTF)")
        return bytes(self.program.read(start, stop - start))


def run(*command: str | Path, output: Path | None = None) -> None:
    """Run a program; its standard output goes to a file."""
    name = str(command[0])
    # Debian has bpftool where only root looks.
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        die(f"needs {name}, which tools/setup installs (Debian 12)")
    with open(output or os.devnull, "wb") as out:
        nothing = subprocess.DEVNULL
        done = subprocess.run([found, *command[1:]], stdin=nothing, stdout=out, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        die(f"{name} exited with {done.returncode}: {last}")


def make_vmlinux(kernel: Kernel, work: Path, target: Path) -> tuple[list[str], list[str]]:
    """Write an ELF file with all types and the known variables; return the names of both."""
    (work / "btf").write_bytes(kernel.btf())
    run("bpftool", "btf", "dump", "file", work / "btf", "format", "c", output=work / "types.h")
    types = set(_NAMED.findall((work / "types.h").read_text()))
    source = ['#include "types.h"']
    if "struct tk_data" not in types and "struct timekeeper" in types:
        source.append(TK_DATA)
        types.add("struct tk_data")
    script = [f"SECTIONS {{ .init.text {kernel.addresses['_text']:#x} : {{}}"]
    variables = []
    for declaration in VARIABLES.splitlines():
        match = _DECLARATION.fullmatch(declaration)
        if match is None or match["name"] not in kernel.addresses:
            continue
        if match["type"].startswith("struct ") and match["type"] not in types:
            continue
        name = match["name"]
        source.append(f"{declaration};")
        script.append(f".{name} {kernel.addresses[name]:#x} (NOLOAD) : {{ *(.bss.{name}) }}")
        variables.append(name)
    (work / "kernel.c").write_text("\n".join(source))
    (work / "kernel.ld").write_text("\n".join([*script, "}"]))
    keep = ("-fdata-sections", "-fno-eliminate-unused-debug-types")
    run("gcc", "-g", "-w", "-c", *keep, "-o", work / "kernel.o", work / "kernel.c")
    # Without the kernel's build ID: a debugger that knew the file for the kernel's would move what is in its place.
    run("ld", "-T", work / "kernel.ld", "-e", "0", "--build-id=none", "-o", target, work / "kernel.o")
    target.chmod(0o600)
    return sorted(types), variables


class Volatility:
    """Types and symbols as volatility3 reads them: its intermediate symbol format, version 6.2.0."""

    def __init__(self) -> None:
        self.user_types: dict[str, Any] = {}
        self.enums: dict[str, Any] = {}
        self.base_types: dict[str, Any] = {
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
        }
        self._aliases: dict[str, Any] = {}

    def describe(self, of: Type) -> dict[str, Any]:
        """The descriptor of a type; it and what it is made of are noted."""
        match of.kind:
            case TypeKind.TYPEDEF:
                if of.name not in self._aliases:
                    self._aliases[of.name] = self.describe(of.type)
                return dict(self._aliases[of.name])
            case TypeKind.POINTER:
                return {"kind": "pointer", "subtype": self.describe(of.type)}
            case TypeKind.ARRAY:
                return {"kind": "array", "count": of.length or 0, "subtype": self.describe(of.type)}
            case TypeKind.FUNCTION:
                return {"kind": "function"}
            case TypeKind.STRUCT | TypeKind.UNION:
                return self._compound(of)
            case TypeKind.ENUM:
                name = of.tag or f"unnamed_enum_{len(self.enums)}"
                if name not in self.enums and of.is_complete():
                    values = {each.name: each.value for each in of.enumerators or ()}
                    self.enums[name] = {"size": sizeof(of), "base": self.describe(of.type)["name"], "constants": values}
                return {"kind": "enum", "name": name}
            case TypeKind.VOID:
                return {"kind": "base", "name": "void"}
        kind = {TypeKind.BOOL: "bool", TypeKind.FLOAT: "float"}.get(of.kind, "int")
        if of.name.endswith("char"):
            kind = "char"
        signed = of.kind is TypeKind.INT and of.is_signed
        self.base_types[of.name] = {"size": of.size, "signed": signed, "kind": kind, "endian": "little"}
        return {"kind": "base", "name": of.name}

    def _compound(self, of: Type) -> dict[str, Any]:
        kind = "struct" if of.kind is TypeKind.STRUCT else "union"
        name = of.tag or f"unnamed_{len(self.user_types)}"
        if name not in self.user_types and of.is_complete():
            fields: dict[str, Any] = {}
            # Noted before its members: they point back to it.
            self.user_types[name] = {"kind": kind, "size": of.size, "fields": fields}
            for number, member in enumerate(of.members):
                described, offset = self.describe(member.type), member.bit_offset // 8
                if (length := member.bit_field_size) is not None:
                    size = sizeof(member.type)
                    offset -= offset % size
                    position = member.bit_offset - 8 * offset
                    described = {"kind": "bitfield", "bit_position": position, "bit_length": length, "type": described}
                field = {"type": described, "offset": offset}
                if member.name is None:
                    field["anonymous"] = True
                fields[member.name or f"unnamed_field_{number}"] = field
        return {"kind": kind, "name": name}


def make_json(kernel: Kernel, types: list[str], variables: list[str], target: Path) -> None:
    """Write volatility3's symbols. The DWARF of the kernel is loaded."""
    made = Volatility()
    for name in types:
        made.describe(kernel.program.type(name))
    symbols: dict[str, Any] = {name: {"address": kernel.linked(address)} for name, address in kernel.addresses.items()}
    for name in variables:
        symbols[name]["type"] = made.describe(kernel.program[name].type_)
    # By this volatility knows the kernel: each byte of it, with the final zero.
    banner = kernel.program["linux_banner"].string_() + b"\0"
    symbols["linux_banner"]["constant_data"] = base64.b64encode(banner).decode()
    whole = {
        "metadata": {"format": "6.2.0", "producer": {"name": "ramfs tools/symbols", "version": "1"}},
        "base_types": made.base_types,
        "user_types": made.user_types,
        "enums": made.enums,
        "symbols": symbols,
    }
    target.write_text(json.dumps(whole))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tools/symbols",
        description="Makes debugging symbols of a Linux guest (6.0 or newer, x86-64, with BTF) from its own memory: "
        "DIR/vmlinux for drgn and gdb, DIR/drgn and DIR/vmlinux.gdb that use it, and DIR/vmlinux.json for volatility3. "
        "They have all types, and the variables that debuggers look for. The last serves every guest with the same "
        "kernel, the others one boot of a guest, with its snapshots and clones.",
    )
    parser.add_argument("vmcore", type=Path, metavar="VMCORE", help="the guest's memory: its .guest/vmcore, or a dump")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to put them; made if it is not there")
    args = parser.parse_args()
    os.umask(0o077)
    try:
        args.directory.mkdir(parents=True, exist_ok=True)
        directory = args.directory.resolve()
        kernel = Kernel(args.vmcore)
        with tempfile.TemporaryDirectory() as work:
            types, variables = make_vmlinux(kernel, Path(work), directory / "vmlinux")
        made = directory / "vmlinux"
        kernel.program.extra_module(made, create=True).try_file(made, force=True)
        make_json(kernel, types, variables, directory / "vmlinux.json")
        (directory / "vmlinux.vmcoreinfo").write_bytes(kernel.program["VMCOREINFO"].string_())
        (directory / "vmlinux.gdb").write_text(
            f'set confirm off\nadd-symbol-file "{made}" -o {kernel.to_physical:#x}\n'
        )
        beside = shlex.quote(str(Path(sys.executable).with_name("drgn")))
        (directory / "drgn").write_text(DRGN.format(drgn=beside, made=shlex.quote(str(made))))
        (directory / "drgn").chmod(0o700)
    except OSError as error:
        die(f"{error.filename}: {error.strerror}")
    print(f"{kernel.told['OSRELEASE']}: {len(types)} types and {len(kernel.addresses)} symbols in {args.directory}")


if __name__ == "__main__":
    main()
