"""docs/inspect.md: each of its commands is run, on a guest that runs, on a snapshot and on one that still arrives."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import eventually, status
from nbd.servers import nbdkit
from vm.conftest import Lab, ramfs, snapshot
from vm.guest import MIB, PAGE, Guest

pytestmark = pytest.mark.vm

TREE = Path(__file__).parents[2]
RAM = 128 * MIB
#: What can be told apart in the guest's command line, and is nowhere else.
WORD = "cookbook=was-here"


@dataclass
class Told:
    """What the guest itself says."""

    version: str
    cmdline: str
    uptime: float
    tasks: set[tuple[int, str]]

    @classmethod
    def by(cls, guest: Guest) -> Told:
        def show(what: str) -> str:
            return guest.say(f"show {what}").strip()

        stats = re.findall(r"(?:^| )(\d+) \(([^)]*)\) [A-Z] ", show("/proc/[0-9]*/stat"))
        # Of the kernel's own tasks more is told than their name, which has at most 15 letters.
        tasks = {(int(pid), re.sub(r"^(kworker/[^-+]*)[-+].*", r"\1", name)[:15]) for pid, name in stats}
        return cls(show("/proc/version"), show("/proc/cmdline"), float(show("/proc/uptime").split()[0]), tasks)


@dataclass
class Scene:
    """A guest, what it said before and after it was frozen, and its snapshot."""

    mount: Mount
    guest: Guest
    live: Path
    frozen: Path
    before: Told
    after: Told
    symbols: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, command: str, vm: Path, other: Path | None = None, *, fails: int = 0) -> str:
        """Run a command of the cookbook, as it stands."""
        names = {"VM": str(vm), "OTHER": str(other or self.live), "SYMBOLS": str(self.symbols)}
        done = subprocess.run(
            ["sh", "-eu", "-c", command],
            cwd=TREE,
            env={**os.environ, **self.environment, **names},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=100,
            check=False,
        )
        assert done.returncode == fails, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, module_shm: Path) -> Iterator[Scene]:
    private = tmp_path_factory.mktemp("cookbook")
    with Mount(module_shm / "store", module_shm / "mnt") as mount:
        lab = Lab(mount)
        try:
            live = lab.directory("base")
            # It ticks rarely: each tick is a process, and lists are walked while it runs.
            guest = lab.boot(live / "ram", boot=f"tick=2 fill=1:16 {WORD}")
            before = Told.by(guest)
            snapshot(live, "warm", guest.socket)
            after = Told.by(guest)
            scene = Scene(mount, guest, live, live / ".snap" / "warm", before, after, private / "symbols")
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            scene.environment = {"PATH": path, "XDG_CACHE_HOME": str(private), "HOME": str(private)}
            yield scene
        finally:
            lab.close()


def recipes() -> list[str]:
    """All commands of the cookbook."""
    return re.findall(r"^```sh\n(.*?)^```$", (TREE / "docs" / "inspect.md").read_text(), re.MULTILINE | re.DOTALL)


def recipe(words: str) -> str:
    """The one command that has these words."""
    found = [each for each in recipes() if words in each]
    assert len(found) == 1, f"docs/inspect.md has {len(found)} commands with {words!r}"
    return found[0]


# --- what each must say; by words that no other command has ---


def check_layout(said: str, scene: Scene) -> None:
    layout = json.loads(said[: said.rindex("}") + 1])
    listed = [line.split() for line in said.splitlines() if line.startswith("-r")]
    assert [(int(words[4]), words[-1]) for words in listed] == [(RAM, "pc.ram@0x0")]
    assert len(listed) == len(layout["ranges"])


def check_reset_vector(said: str, scene: Scene) -> None:
    # Where a processor begins: a jump into the BIOS.
    assert said.splitlines()[-1].startswith("00000ff0: ea5b e000 f0")


def check_acpi(said: str, scene: Scene) -> None:
    offset = int(re.search(r"^(\d+):RSD PTR$", said, re.MULTILINE)[1])  # type: ignore[index]
    log = scene.run(recipe("print_dmesg()"), scene.frozen)
    assert f"ACPI: RSDP 0x{0xE0000 + offset:016X}" in log
    assert re.search(r"^000ffff0: ea5b e000 f0", said, re.MULTILINE)


def check_version(said: str, scene: Scene) -> None:
    assert said.splitlines()[0] in scene.before.version


def check_differs(said: str, scene: Scene) -> None:
    assert "differ: " in said


def check_digest(said: str, scene: Scene) -> None:
    digests = {Path(path).name: digest for digest, path in (line.split(None, 1) for line in said.splitlines())}
    assert digests["pc.ram@0x0"] == hashlib.sha256((scene.frozen / "ram").read_bytes()).hexdigest()


def check_core(said: str, scene: Scene) -> None:
    assert re.search(rf"LOAD +0x\w+ 0x0+ 0x0+ 0x0*{RAM:x} 0x0*{RAM:x} RWE", said)
    assert re.search(r"VMCOREINFO +0x0", said)


def check_symbols(said: str, scene: Scene) -> None:
    release = scene.before.version.split()[2]
    types, symbols = map(int, re.match(rf"{re.escape(release)}: (\d+) types and (\d+) symbols", said).groups())  # type: ignore[union-attr]
    assert types > 5000
    assert symbols > 50_000


def check_uptime(said: str, scene: Scene) -> None:
    # What a tick of the kernel has not told yet is lacking.
    assert scene.before.uptime - 0.1 <= float(said) <= scene.after.uptime


def check_cmdline(said: str, scene: Scene) -> None:
    assert WORD in said
    assert said.rstrip("\n") == scene.before.cmdline


def check_tasks(said: str, scene: Scene) -> None:
    seen = {(int(pid), name) for pid, name in (line.split(" ", 1) for line in said.splitlines())}
    stay = scene.before.tasks & scene.after.tasks
    assert len(stay) > 20
    assert stay <= seen
    others = {name for _, name in seen - scene.before.tasks - scene.after.tasks}
    assert {name for name in others if not name.startswith("kworker/")} <= {"cat", "tr", "sleep", "init"}


def check_log(said: str, scene: Scene) -> None:
    assert f"Command line: {scene.before.cmdline}" in said


def check_release(said: str, scene: Scene) -> None:
    assert said.strip() == scene.before.version.split()[2]


def check_gdb(said: str, scene: Scene) -> None:
    assert f'= "{scene.before.version.split()[2]}", ' in said
    assert '= "swapper/0\\000' in said
    assert '<linux_banner>:\t"Linux version' in said


def check_banners(said: str, scene: Scene) -> None:
    assert scene.before.version in said


def check_pslist(said: str, scene: Scene) -> None:
    rows = [line.split("\t") for line in said.splitlines() if line.startswith("0x")]
    assert {(int(row[1]), row[4]) for row in rows} >= scene.before.tasks & scene.after.tasks


CHECKS: dict[str, Callable[[str, Scene], None]] = {
    "layout.json": check_layout,
    "skip=$((0xff000": check_reset_vector,
    "RSD PTR": check_acpi,
    "grep -a -o -m1": check_version,
    "cmp ": check_differs,
    "sha256sum": check_digest,
    "readelf": check_core,
    "tools/symbols": check_symbols,
    "print(uptime())": check_uptime,
    "saved_command_line": check_cmdline,
    "for_each_task()": check_tasks,
    "print_dmesg()": check_log,
    "UTS_RELEASE": check_release,
    "gdb --batch": check_gdb,
    "banners": check_banners,
    "linux.pslist": check_pslist,
}

#: These read little of the guest.
FRUGAL = [
    "skip=$((0xff000", "print(uptime())", "saved_command_line", "for_each_task()",
    "print_dmesg()", "gdb --batch",
]  # fmt: skip


def test_every_recipe_is_checked() -> None:
    assert [recipe(words) for words in CHECKS] == recipes()


@pytest.mark.parametrize("words", CHECKS)
def test_of_a_snapshot(scene: Scene, words: str) -> None:
    if not scene.symbols.exists():
        scene.run(recipe("tools/symbols"), scene.frozen)
    said = scene.run(recipe(words), scene.frozen, fails=int(words == "cmp "))
    CHECKS[words](said, scene)


def test_of_a_running_guest(scene: Scene) -> None:
    before = Told.by(scene.guest)
    said = {words: scene.run(recipe(words), scene.live) for words in ("tools/symbols", "UTS_RELEASE", *FRUGAL)}
    now = replace(scene, before=before, after=Told.by(scene.guest))
    for words, each in said.items():
        CHECKS[words](each, now)


def test_of_one_that_arrives(scene: Scene) -> None:
    """What a tool does not read stays where it is."""
    if not scene.symbols.exists():
        scene.run(recipe("tools/symbols"), scene.frozen)
    here = scene.mount.path / "arriving"
    with nbdkit("file", f"dir={scene.frozen}") as uri:
        try:
            done = ramfs("pull", uri, here, "--paused", "--like", "none")
            assert done.returncode == 0, done
            for words in FRUGAL:
                CHECKS[words](scene.run(recipe(words), here), scene)
            (pull,) = status(scene.mount.path)["pulls"]
            assert PAGE < pull["fetched_bytes"] < 2 * MIB, pull
            assert ramfs("resume", here).returncode == 0
            eventually(lambda: not status(scene.mount.path)["pulls"], "all is here")
            # Now it finds VMCOREINFO by itself.
            CHECKS["UTS_RELEASE"](scene.run(recipe("UTS_RELEASE"), here), scene)
        finally:
            subprocess.run(["rm", "-r", here], check=True)
