"""The demonstration itself; started by tools/demo, which has set everything up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from ramfs import qmp

MIB = 1 << 20
RAM = 256
FILLED = 96
TICK = 0.25
MIGRATE = Path(__file__).parents[1] / "migrate"
RAMFS = Path(sys.executable).with_name("ramfs")

BOLD, DIM, PLAIN = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")


class DemoFailed(Exception):
    """The demonstration cannot go on, or did not show what it promised."""


class Interrupts:
    """Ctrl-C and its relatives as an orderly end, never in the middle of a command."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._held = False
        self._seen: int | None = None

    def watch(self) -> None:
        for number in self.NUMBERS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        self._seen = number
        if not self._held:
            self._end(number)

    def _end(self, number: int) -> NoReturn:
        print("\ninterrupted; cleaning up", flush=True)
        raise SystemExit(128 + number)

    def ignore(self) -> None:
        """From here on all is clearing up, which is not to be cut short."""
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Commands are short, and one that is killed leaves more to clear up than one that ends."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._seen is not None:
            self._end(self._seen)


interrupts = Interrupts()


# --- what is shown ---


class Steps:
    """Numbers the steps, and keeps how long each took for the table at the end."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"\n{BOLD}{len(self.times) + 1}. {title}{PLAIN}", flush=True)
        begin = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - begin))


def show(text: str) -> None:
    print(f"   {text}", flush=True)


def run(command: list[str], short: str, mount: Path) -> None:
    """Run a command; show it as a person would type it, what it says, and how long it took."""
    show(f"$ {short}")
    begin = time.monotonic()
    with interrupts.held():
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
            env={**os.environ, "COLUMNS": "140"},  # long paths, shortened here, need not be broken
        )
    seconds = time.monotonic() - begin
    for line in done.stdout.splitlines():
        show(f"  {line.replace(str(mount), 'MNT')}")
    if done.returncode:
        raise DemoFailed(f"{short} failed with exit status {done.returncode}")
    show(f"{DIM}  ({seconds * 1000:.0f} ms){PLAIN}")


def wait_until(ready: Callable[[], bool], check: Callable[[], None], what: str, timeout: float) -> None:
    """Wait for something of a process that ``check`` finds well. Raises DemoFailed."""
    deadline = time.monotonic() + timeout
    while not ready():
        check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what} within {timeout:.0f} s")
        time.sleep(0.01)


# --- a guest ---


def machine(memory: Path) -> list[str]:
    """The part of QEMU's command line that is of interest."""
    backend = f"memory-backend-file,id=pc.ram,size={RAM}M,mem-path={memory},share=on"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", str(RAM), "-object", backend]
    return [*command, "-machine", "pc,memory-backend=pc.ram"]


def devices(images: list[str]) -> list[str]:
    """The rest of it, but for serial line and QMP."""
    line = f"console=ttyS0 quiet panic=-1 tick={TICK} fill=1:{FILLED}"
    quiet = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    return [*quiet, "-kernel", images[0], "-initrd", images[1], "-append", line]


class Vm:
    """A QEMU whose serial line is listened to."""

    def __init__(self, name: str, memory: Path, qmp_socket: Path, images: list[str], *, incoming: bool) -> None:
        self.name = name
        self.socket = qmp_socket
        self.lines: list[str] = []
        command = [*machine(memory), *(["-incoming", "defer"] if incoming else [])]
        show("$ " + " ".join(command).replace(str(memory), f"MNT/{memory.name}") + " ...")
        command += [*devices(images), "-serial", "stdio", "-qmp", f"unix:{qmp_socket},server=on,wait=off"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            self.lines.append(raw.decode(errors="replace").strip())

    @property
    def ticks(self) -> list[int]:
        return ticks_of(self.lines)

    def wait(self, ready: Callable[[], bool], what: str, timeout: float = 30) -> None:
        wait_until(ready, self._check, f"the {self.name} {what}", timeout)

    def _check(self) -> None:
        if self.process.poll() is not None:
            assert self.process.stderr is not None
            said = self.process.stderr.read().decode(errors="replace").strip()
            raise DemoFailed(f"QEMU of the {self.name} ended: {said}")

    def ask(self, command: str) -> str:
        asked = len(self.lines)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

        def answers() -> list[str]:
            return [line[2:] for line in self.lines[asked:] if line.startswith("= ")]

        self.wait(lambda: bool(answers()), f"did not answer {command!r}")
        return answers()[0]

    async def resume(self, state: Path) -> None:
        async with qmp.connect(self.socket) as guest:
            await guest.load_state(state)
            await guest.cont()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def ticks_of(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in list(lines) if (found := re.fullmatch(r"tick (\d+)", line))]


# --- another host ---


class Host:
    """A network of its own, with an end of the cable; without root it is this host's, and there is no cable."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address if os.geteuid() == 0 else "127.0.0.1"
        self.prefix: list[str] = []
        self._holder: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            with interrupts.held():
                self._holder = subprocess.Popen(
                    ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            assert self._holder.stdin is not None
            assert self._holder.stdout is not None
            self._holder.stdin.write(b"?\n")
            self._holder.stdin.flush()
            self._holder.stdout.readline()  # cat answers: the namespace is there
            self.prefix = ["nsenter", f"--target={self._holder.pid}", "--net", "--"]

    def connect(self, other: Host) -> None:
        """Put a cable of 100 Mbit/s between the two."""
        if self._holder is None or other._holder is None:
            return
        self.ip(f"link add cable type veth peer name cable netns {other._holder.pid}")
        for host in (self, other):
            for command in (f"address add {host.address}/24 dev cable", "link set cable up", "link set lo up"):
                host.ip(command)
            words = ["tc", *"qdisc add dev cable root tbf rate 100mbit burst 64kb latency 100ms".split()]
            # Not every kernel can be slow. It is the quicker then.
            subprocess.run([*host.prefix, *words], capture_output=True, check=False)

    def ip(self, command: str) -> None:
        done = subprocess.run(
            [*self.prefix, "ip", *command.split()],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise DemoFailed(f"ip {command}: {done.stderr.strip()}")

    def close(self) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()


class Move:
    """tools/migrate at work, and the guest that it starts on the other host."""

    def __init__(self, room: Path, a: Host, b: Host, guest: Vm, memory: Path, target: Path, images: list[str]) -> None:
        self.room = room
        command = ["--rounds", "0", str(memory), str(target), "--", *machine(target)]
        shown = " ".join(command).replace(str(memory), "MNT/parent").replace(str(target), "MNT-B/parent")
        show(f"$ tools/migrate --qmp SOCKET --on B --listen {a.address} {shown} ...")
        options = ["--qmp", str(guest.socket), "--target-qmp", f"{room}/moved"]
        options += ["--on", " ".join(b.prefix), "--listen", a.address]
        command += [*devices(images), "-serial", "chardev:line", "-pidfile", f"{room}/pid"]
        command += ["-chardev", f"socket,id=line,path={room}/line,server=on,wait=off,logfile={room}/said"]
        with interrupts.held():
            self.process = subprocess.Popen(
                [*a.prefix, str(MIGRATE), *options, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            show(f"  {line.rstrip()}")
            self.said.append(line)

    @property
    def lines(self) -> list[str]:
        """What the guest has said there."""
        with contextlib.suppress(FileNotFoundError):
            return [line.rstrip("\r") for line in (self.room / "said").read_text(errors="replace").split("\n")[:-1]]
        return []

    @property
    def ticks(self) -> list[int]:
        return ticks_of(self.lines)

    def wait(self, ready: Callable[[], bool], what: str, timeout: float = 60) -> None:
        wait_until(ready, self._check, what, timeout)

    def _check(self) -> None:
        if self.process.poll():
            raise DemoFailed(f"tools/migrate failed: {self.said[-1].strip() if self.said else 'it said nothing'}")

    def close(self) -> None:
        """End the tool, its server and the guest, wherever they are."""
        keepers = []
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            keepers = [int(pid) for pid in children.split()]
        for _ in range(2):  # at the second it no longer waits until all is there
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1 if keepers else 5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()
        for keeper in keepers:
            with contextlib.suppress(OSError):
                os.killpg(keeper, signal.SIGTERM)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.room / "pid").read_text()), signal.SIGKILL)


# --- the demonstration ---


class Demo:
    def __init__(self, images: list[str]) -> None:
        self.images = images
        prefix = f"ramfs-demo-{os.getpid()}-"
        memory = Path("/dev/shm")
        self.base = Path(tempfile.mkdtemp(prefix=prefix, dir=memory if os.access(memory, os.W_OK) else None))
        self.sockets = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))  # a socket's path is short
        self.store = self.base / "store"
        self.mount = self.base / "mnt"
        self.other = self.base / "mnt-b"
        self.mounted: list[Path] = []
        self.guests: list[Vm] = []
        self.hosts: list[Host] = []
        self.move: Move | None = None

    def close(self) -> None:
        if self.move is not None:
            self.move.close()
        for guest in self.guests:
            guest.end()
        for mount in reversed(self.mounted):  # what still arrives there is given up before its source
            command: list[object] = [RAMFS, "umount", mount]
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode:
                lazy = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
                subprocess.run([*lazy, str(mount)], capture_output=True, check=False)
        for host in self.hosts:
            host.close()
        if not any(os.path.ismount(mount) for mount in (self.mount, self.other)):
            shutil.rmtree(self.base, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)

    def start(self, name: str, *, incoming: bool) -> Vm:
        with interrupts.held():  # until it is known to close()
            guest = Vm(name, self.mount / name, self.sockets / name, self.images, incoming=incoming)
            self.guests.append(guest)
        guest.wait(guest.socket.exists, "had no QMP socket")
        return guest

    def stored(self) -> int:
        """Bytes that the store takes."""
        out = subprocess.run(["du", "-s", "-B1", self.store], stdout=subprocess.PIPE, text=True, check=True)
        return int(out.stdout.split()[0])

    def run(self) -> None:
        steps = Steps()
        with steps.step("Mount an empty store"):
            self.mounted.append(self.mount)
            self.mount.mkdir()
            run([str(RAMFS), "mount", str(self.store), str(self.mount)], "ramfs mount STORE MNT", self.mount)
            (self.mount / "parent").mkdir()
        with steps.step(f"Boot a Linux guest whose {RAM} MiB of RAM are a file in MNT/parent"):
            parent = self.start("parent", incoming=False)
            parent.wait(lambda: len(parent.ticks) >= 3, "did not tick")
            show(f"it has filled {FILLED} MiB with known data, and ticks: {row(parent.ticks, range(3))}")
            run(["ls", "-l", str(self.mount / "parent")], "ls -l MNT/parent", self.mount)
        with steps.step("Snapshot it while it runs"):
            earliest = parent.ticks[-1]
            command = [str(RAMFS), "snapshot", str(self.mount / "parent"), "warm", "--qmp", str(parent.socket)]
            run(command, "ramfs snapshot MNT/parent warm --qmp SOCKET", self.mount)
            latest = parent.ticks[-1]
            before = self.stored()
        with steps.step("Clone it by copying the directory"):
            source, clone_at = self.mount / "parent" / ".snap" / "warm", self.mount / "clone"
            run(["cp", "-r", str(source), str(clone_at)], "cp -r MNT/parent/.snap/warm MNT/clone", self.mount)
            after = self.stored()
        with steps.step("Resume the clone beside its parent"):
            clone = self.start("clone", incoming=True)
            asyncio.run(clone.resume(clone_at / "state"))
            clone.wait(lambda: len(clone.ticks) >= 1, "did not tick")
        with steps.step("Watch both tick on from the same tick"):
            first = clone.ticks[0]
            clone.wait(lambda: clone.ticks[-1] >= first + 6, "stopped ticking")
            parent.wait(lambda: parent.ticks[-1] >= first + 9, "stopped ticking")
            shown = range(max(first - 3, 0), parent.ticks[-1] + 1)
            show(f"parent  {row(parent.ticks, shown)}")
            show(f"clone   {row(clone.ticks, shown)}")
            show(f"The snapshot was taken at tick {first - 1}; each tick is {TICK} s of the guest's time.")
        with steps.step("Let both write, and check all of their memory"):
            for guest, seed in ((parent, 2), (clone, 3)):
                guest.ask(f"overwrite {seed} 0")
            for guest, seed in ((parent, 2), (clone, 3)):
                answer = guest.ask("verify")
                show(f"{guest.name + ':':8}{answer}")
                if not answer.startswith(f"verified ok seeds={seed},1,1,1,1,1,1,1 "):
                    raise DemoFailed(f"the {guest.name} finds its memory damaged")
        with steps.step("What it took"):
            files = [str(path) for path in sorted(self.mount.glob("*/pc.ram*"))]
            run(["sync", *files], "sync MNT/*/pc.ram*", self.mount)
            run([str(RAMFS), "du", str(self.mount)], "ramfs du MNT", self.mount)
            show(f"the store before cp -r: {before / MIB:8.1f} MiB")
            show(f"the store after cp -r:  {after / MIB:8.1f} MiB   ({(after - before) / 1024:.0f} KiB more)")
        with steps.step("Make another host, at the end of a cable"):
            self.hosts += [Host("A", "10.76.0.1"), Host("B", "10.76.0.2")]
            here, there = self.hosts
            here.connect(there)
            self.mounted.append(self.other)
            self.other.mkdir()
            command = [*there.prefix, str(RAMFS), "mount", str(self.base / "store-b"), str(self.other)]
            run(command, "ramfs mount STORE-B MNT-B          (on B)", self.mount)
        with steps.step("Move the parent there while it runs, and let its memory come behind"):
            self.move = move = Move(
                self.sockets, here, there, parent, self.mount / "parent", self.other / "parent", self.images
            )
            move.wait(lambda: len(move.ticks) >= 3, "the moved guest did not tick")
            last, begun = parent.ticks[-1], move.ticks[0]
            show(f"on A   {row(parent.ticks[-3:], range(last - 2, last + 4))}")
            show(f"on B   {row(move.ticks, range(last - 2, last + 4))}")
        with steps.step("Pull the cable while it checks its memory"):

            def verified() -> list[str]:
                return [each[2:] for each in move.lines if each.startswith("= verified")]

            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(self.sockets / "line"))
                line.sendall(b"verify\n")
                if here.prefix:
                    here.ip("link set cable down")
                    show("$ ip link set cable down")
                    time.sleep(3)
                    waits = (
                        "the guest waits for one" if not verified() else "all that the guest touches was here before"
                    )
                    show(f"3 s: no page comes, and {waits}")
                    here.ip("link set cable up")
                    show("$ ip link set cable up")
                else:
                    show("(without root there is no cable to pull)")

                move.wait(lambda: bool(verified()), "the moved guest did not check its memory")
            show(f"moved:  {verified()[0]}")
            move.wait(lambda: move.process.poll() == 0, "the memory did not arrive")
            run(["ls", str(self.other)], "ls MNT-B", self.mount)
        print()
        for title, seconds in steps.times:
            show(f"{title:72} {seconds:6.2f} s")

        if not verified()[0].startswith("verified ok seeds=2,1,1,1,1,1,1,1 "):
            raise DemoFailed("the moved guest finds its memory damaged")
        if not last + 1 <= begun <= last + 2 or move.ticks != list(range(begun, begun + len(move.ticks))):
            raise DemoFailed(f"the moved guest went on at tick {begun}, and was stopped at {last}")
        if not earliest + 1 <= first <= latest + 2:
            raise DemoFailed(f"the clone began at tick {first}, its parent was between {earliest} and {latest}")
        for guest in (parent, clone):
            if guest.ticks != list(range(guest.ticks[0], guest.ticks[-1] + 1)):
                raise DemoFailed(f"the {guest.name} missed a tick")
        print(
            f"\n{BOLD}One guest became two, and both run, one of them on another host. Cleaning up.{PLAIN}", flush=True
        )


def row(ticks: list[int], shown: range) -> str:
    """The ticks, each in the column that it has in every row."""
    return " ".join(f"{tick:3}" if tick in ticks else "   " for tick in shown)


def main() -> int:
    demo = Demo(sys.argv[1:])
    interrupts.watch()
    try:
        demo.run()
    except (DemoFailed, qmp.QmpError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    finally:
        interrupts.ignore()
        demo.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
