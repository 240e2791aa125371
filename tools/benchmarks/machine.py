"""What a reader needs to judge the figures; nothing that names the machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .bench import MIB, ROOT

#: Programs that take part or serve those that do, and how each is asked for its version.
PROGRAMS = {
    "qemu": ["qemu-system-x86_64", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "nbdfuse": ["nbdfuse", "--version"],
    "nbdcopy": ["nbdcopy", "--version"],
    "fusermount3": ["fusermount3", "--version"],
    "mkfs.xfs": ["mkfs.xfs", "-V"],
    "mkfs.btrfs": ["mkfs.btrfs", "--version"],
    "cp": ["cp", "--version"],
    "gcc": ["gcc", "--version"],
}
PACKAGES = ("pyfuse3", "trio", "numpy")


def first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
        return (done.stdout or done.stderr).strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "not installed"


def version(command: Sequence[str]) -> str:
    """The first number with a dot of what it says."""
    said = first_line(command)
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else said


def package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def huge_pages() -> str:
    """What is set for anonymous memory and for the kernel's own tmpfs mount."""
    found = []
    for name in ("enabled", "shmem_enabled"):
        text = Path(f"/sys/kernel/mm/transparent_hugepage/{name}")
        chosen = re.search(r"\[(\w+)\]", text.read_text()) if text.exists() else None
        found.append(f"{name} {chosen[1] if chosen else 'not there'}")
    return ", ".join(found)


def machine(ramfs: Sequence[str]) -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total[1]) / MIB, 1) if total else None,
        "virtual": first_line(["systemd-detect-virt", "--vm"]),
        "kernel": re.split(r"[^\d.]", platform.release())[0],
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        **{name: package(name) for name in PACKAGES},
        **{name: version(command) for name, command in PROGRAMS.items()},
        "ramfs": version([*ramfs, "--version"]),
        "commit": first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "load_before": round(os.getloadavg()[0], 2),
    }


class Watch:
    """What the machine did while a case ran."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._before = self._ticks()

    @staticmethod
    def _ticks() -> list[int]:
        """Of all processors: user, nice, system, idle, iowait, irq, softirq, steal."""
        return [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]

    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def told(self) -> dict[str, float]:
        """Seconds, the load average at the end, and which parts of the processors' time were busy and stolen."""
        spent = [after - before for before, after in zip(self._before, self._ticks(), strict=True)]
        every = sum(spent) or 1
        return {
            "seconds": round(self.seconds(), 1),
            "load": round(os.getloadavg()[0], 2),
            "busy": round(1 - (spent[3] + spent[4]) / every, 3),
            "steal": round(spent[7] / every, 3),
        }
