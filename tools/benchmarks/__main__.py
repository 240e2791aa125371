"""tools/bench: ramfs beside its peers on this machine, in one run, in turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from . import arrival, capture, debugger, generations, host, native, postcopy, workingset  # noqa: F401  (their cases)
from .bench import MIB, ROOT, Bench, interrupt_once, scratch
from .cases import CASES
from .stats import Curve, Measure, summary


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=f"{__doc__} Prints medians, their spread, the ratios and the goals. Needs root"
        " (it mounts, and tunes mounts) and about 10 GiB of free memory; everything lies on tmpfs.",
        epilog="RAMFS in the environment names another ramfs command to measure.",
    )
    parser.add_argument("--only", metavar="CASE", action="append", choices=list(CASES), help="this case; repeatable")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and a smaller file")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (7; 3 with --quick)")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the mapped file (1024; 256 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR", help="a tmpfs (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the cases")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.size is not None and (options.size < 64 or options.size & (options.size - 1)):
        parser.error("--size must be a power of two, at least 64")
    return options


def first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
        return (done.stdout or done.stderr).strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "not installed"


def machine(ramfs: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that names the machine."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    versions = {}
    for package in ("pyfuse3", "trio", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total[1]) / MIB, 1) if total else None,
        "virtual": first_line(["systemd-detect-virt", "--vm"]),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
        "ramfs": first_line([*ramfs, "--version"]),
        "commit": first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "qemu-storage-daemon": first_line(["qemu-storage-daemon", "--version"]),
        "nbdkit": first_line(["nbdkit", "--version"]),
        "nbdfuse": first_line(["nbdfuse", "--version"]),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    options = arguments()
    if options.list:
        for name, each in CASES.items():
            print(f"{name:<12}{each.about}")
        return 0
    if os.geteuid() != 0:
        print("tools/bench: needs root, to mount and to tune what is mounted", file=sys.stderr)
        return 1
    interrupt_once()
    ramfs = shlex.split(os.environ.get("RAMFS", str(ROOT / ".venv" / "bin" / "ramfs")))
    facts = machine(ramfs)
    print("\n".join(f"{key:<22}{value}" for key, value in facts.items()))

    measures: list[Measure | Curve] = []
    results: dict[str, Any] = {}
    failed = False
    begun = time.monotonic()
    try:
        with scratch(options.scratch) as place:
            bench = Bench(
                scratch=place,
                ramfs=ramfs,
                size=(options.size or (256 if options.quick else 1024)) * MIB,
                rounds=options.rounds or (3 if options.quick else 7),
                say=lambda text: print(text, flush=True),
            )
            bench.say("\nwarming up")
            bench.warm_up()
            for name in options.only or CASES:
                bench.say(f"\n{name}: {CASES[name].about}")
                try:
                    found = CASES[name].measure(bench)
                except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                    bench.say(f"  failed: {error}")
                    results[name] = {"failed": str(error)}
                    failed = True
                    continue
                results[name] = [each.as_json() for each in found]
                measures += found
                for measure in found:
                    bench.say(measure.show())
            failed = failed or bool(bench.missing)
    except KeyboardInterrupt:
        print("\ninterrupted; everything started was stopped and unmounted", file=sys.stderr)
        return 130

    print(f"\n{summary(measures)}; {time.monotonic() - begun:.0f} s")
    if options.json:
        document = {"machine": facts, "arguments": sys.argv[1:], "cases": results, "missing": bench.missing}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
