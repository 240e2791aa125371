"""`ramfs layout --qmp` asks real machines, and the views of a guest show what is in its memory now."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from mount.posix import eventually
from vm.conftest import Lab, cp, ramfs, snapshot
from vm.guest import MIB, listens

pytestmark = pytest.mark.vm

GIB = 1 << 30


@pytest.fixture(scope="module")
def shared(module_shm: Path) -> Iterator[Mount]:
    with Mount(module_shm / "store", module_shm / "mnt") as mount:
        yield mount


@contextlib.contextmanager
def machine(*words: object) -> Iterator[Path]:
    """A QEMU without a guest; its QMP socket."""
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as private:
        socket = Path(private) / "qmp"
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-no-user-config",
             "-qmp", f"unix:{socket},server=on,wait=off", *map(str, words)],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            eventually(lambda: process.poll() is not None or listens(socket), "QEMU listens")
            yield socket
        finally:
            process.kill()
            process.wait()


def backend(name: str, directory: Path, size: str) -> tuple[str, str]:
    return "-object", f"memory-backend-file,id={name},size={size},mem-path={directory}/{name},share=on"


def layout(directory: Path, *words: object) -> dict[str, Any]:
    done = ramfs("layout", "--json", directory, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def places(told: dict[str, Any]) -> list[tuple[int, int, str, int]]:
    return [(int(e["gpa"], 16), int(e["size"], 16), e["file"], int(e["offset"], 16)) for e in told["ranges"]]


LOW = 0xC0000
"""where the ROMs of a machine begin that was just reset"""


@pytest.mark.parametrize(
    ("kind", "size", "split"),
    [("pc", "256M", None), ("q35", "256M", None), ("pc", "5G", 3 * GIB), ("q35", "5G", 2 * GIB)],
)
def test_a_machine_tells_its_map(shared: Mount, kind: str, size: str, split: int | None) -> None:
    directory = shared.path / f"{kind}-{size}"
    directory.mkdir()
    with machine(*backend("ram", directory, size), "-M", f"{kind},memory-backend=ram", "-m", size, "-S") as socket:
        told = layout(directory, "--qmp", socket)
    total = int(size[:-1]) * (GIB if size[-1] == "G" else MIB)
    high = [] if split is None else [(4 * GIB, total - split, "ram", split)]
    # Between the two first ranges the ROMs are, until firmware puts RAM there.
    assert places(told)[1:] == [(MIB, (split or total) - MIB, "ram", MIB), *high]
    assert places(told)[0][0] == places(told)[0][3] == 0
    assert 0xA0000 <= places(told)[0][1] <= LOW
    assert told["machine"].startswith("pc-q35-" if kind == "q35" else "pc-i440fx-")
    assert {"pc.bios", "pc.rom"} <= {each["block"] for each in told["elsewhere"]}
    physmem = (directory / ".guest/physmem").stat()
    assert physmem.st_size == (4 * GIB + total - split if split else total)


def test_numa_nodes(shared: Mount) -> None:
    directory = shared.path / "numa"
    directory.mkdir()
    nodes = ["-numa", "node,memdev=n0", "-numa", "node,memdev=n1"]
    backends = [*backend("n0", directory, "128M"), *backend("n1", directory, "64M")]
    with machine("-M", "pc", "-m", "192M", *backends, *nodes, "-S") as socket:
        told = layout(directory, "--qmp", socket)
    assert places(told)[1:] == [(MIB, 127 * MIB, "n0", MIB), (128 * MIB, 64 * MIB, "n1", 0)]
    assert os.listdir(directory / ".guest/ranges")[1:] == ["n0@0x100000", "n1@0x8000000"]


def test_a_dimm_beside_files_that_qemu_named(shared: Mount) -> None:
    directory = shared.path / "dimm"
    directory.mkdir()
    dimm = [*backend("dimm0", directory, "128M"), "-device", "pc-dimm,id=d0,memdev=dimm0"]
    with machine("-M", "pc", "-m", "256M,slots=2,maxmem=1G", "-mem-path", directory, *dimm, "-S") as socket:
        told = layout(directory, "--qmp", socket)
    assert places(told)[1:] == [(MIB, 255 * MIB, "pc.ram@0x0", MIB), (4 * GIB, 128 * MIB, "dimm0", 0)]


def test_video_memory_is_told_and_shown_where_there_is_a_file_of_it(shared: Mount) -> None:
    """The firmware gives it its address, and puts RAM where ROMs were."""
    directory = shared.path / "vga"
    directory.mkdir()
    words = [*backend("ram", directory, "64M"), "-M", "pc,memory-backend=ram", "-m", "64M", "-device", "VGA"]
    with machine(*words) as socket:

        def told() -> list[dict[str, str]]:
            found = layout(directory, "--qmp", socket)["elsewhere"]
            return [each for each in found if each["block"] == "0000:00:02.0/vga.vram"]

        eventually(told, "the firmware gives the video memory an address")
        (video,) = told()
        assert int(video["size"], 16) == 16 * MIB
        name = f"0000:00:02.0%2Fvga.vram@{video['gpa']}"
        (directory / name).write_bytes(b"pixels" * 100)
        os.truncate(directory / name, 16 * MIB)
        assert (int(video["gpa"], 16), 16 * MIB, name, 0) in places(layout(directory, "--qmp", socket))
    assert (directory / ".guest/ranges" / name).read_bytes().startswith(b"pixels")


def test_a_guest_whose_memory_is_elsewhere(shared: Mount, tmp_path: Path) -> None:
    directory = shared.path / "other"
    directory.mkdir()
    with machine("-M", "pc", "-m", "64M", "-S") as socket:
        done = ramfs("layout", directory, "--qmp", socket)
    assert done.returncode == 1
    assert "no RAM of the guest" in done.stderr
    assert done.stderr.count("\n") == 1


def note_of(vmcore: Path) -> str:
    """What the note VMCOREINFO of a core says."""
    done = subprocess.run(["readelf", "-lW", vmcore], capture_output=True, text=True, check=True)
    (line,) = (line.split() for line in done.stdout.splitlines() if line.startswith("  NOTE"))
    with open(vmcore, "rb", buffering=0) as file:
        text = os.pread(file.fileno(), int(line[4], 16), int(line[1], 16))
    return text[24:].decode(errors="replace")


def test_a_guest_is_seen_as_it_is(lab: Lab) -> None:
    """Live, stopped in the middle of what it does: each page is as the guest has it, though nobody has flushed it."""
    directory = lab.directory("base")
    guest = lab.boot(directory / "ram")
    snapshot(directory, "first", guest.socket)
    first = layout(directory / ".snap/first")
    assert (first["derived"], first["machine"][:3]) == (False, "pc-")
    told = layout(directory, "--qmp", guest.socket)
    assert places(told) == places(first)
    assert sum(size for _, size, _, _ in places(told)) > 127 * MIB
    physmem, vmcore = directory / ".guest/physmem", directory / ".guest/vmcore"
    release = guest_release(physmem)
    assert f"OSRELEASE={release}\n" in note_of(vmcore)
    guest.ask("churn 2048")
    for _ in range(3):
        guest.tick_on()
        guest.qmp("stop")
        ram = guest.ram()
        with open(physmem, "rb", buffering=0) as file:
            for gpa, size, _, offset in places(told):
                for at in range(0, size, MIB):
                    length = min(size - at, MIB)
                    assert os.pread(file.fileno(), length, gpa + at) == ram[offset + at : offset + at + length]
        guest.qmp("cont")
    snapshot(directory, "s", guest.socket)
    cp("-r", directory / ".snap/s", lab.mount.path / "clone")
    for place in (directory / ".snap/s", lab.mount.path / "clone"):
        assert places(layout(place)) == places(told)
        assert f"OSRELEASE={release}\n" in note_of(place / ".guest/vmcore")
    guest.tick_on()


def guest_release(physmem: Path) -> str:
    done = subprocess.run(
        ["grep", "-a", "-o", "-m1", "Linux version [0-9][^ ]*", physmem], capture_output=True, text=True, check=True
    )
    return done.stdout.split()[2]
