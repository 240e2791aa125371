"""A file system on a disk that remembers, and that disk as it would be had the power gone at any moment."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

RECORD = struct.Struct("<BQI")
SECTOR = 512
#: The least that mkfs.xfs takes is 300 MB; the files are sparse.
SIZE = {"ext4": 64 << 20, "xfs": 320 << 20}
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-J", "size=4"],
    "xfs": ["mkfs.xfs", "-q", "-K"],
}


def call(*command: str | Path) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"


class NotMountable(Exception):
    """The file system on an image is more than its own recovery can mend."""


@contextlib.contextmanager
def mounted_image(image: Path, point: Path) -> Iterator[Path]:
    """Mount a disk image; its loop device goes with the mount. Raises NotMountable."""
    point.mkdir(exist_ok=True)
    try:
        call("mount", "-o", "loop,noatime,nodiscard", image, point)
    except AssertionError as error:
        raise NotMountable(str(error)) from None
    try:
        yield point
    finally:
        deadline = time.monotonic() + 5
        while True:
            done = subprocess.run(["umount", point], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            if time.monotonic() > deadline:
                call("umount", "-l", point)  # whoever has a file open takes the loop device along when he ends
                raise AssertionError(done.stderr)
            time.sleep(0.02)  # somebody is just closing a file


class ServedDisk:
    """A disk that an nbdkit serves. `with` has it as the file `.device`."""

    def __init__(self, directory: Path) -> None:
        self.device = directory / "nbd" / "disk"

    def prepare(self) -> list[str | Path]:
        """Make the disk; the arguments of nbdkit."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        server = ["nbdkit", "-s", *self.prepare()]
        self.device.parent.mkdir()
        self.process = subprocess.Popen(
            ["nbdfuse", self.device, "--command", *server], stdin=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while not self.device.exists():
            assert self.process.poll() is None, "nbdfuse did not start"
            assert time.monotonic() < deadline, "nbdfuse is not ready"
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "-l", self.device.parent], capture_output=True, check=False)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes


class RecordedDisk(ServedDisk):
    """A disk whose every write and flush is logged."""

    def __init__(self, directory: Path, fstype: str) -> None:
        super().__init__(directory)
        self.directory = directory
        self.fstype = fstype
        self.size = SIZE[fstype]
        self.log = directory / "log"
        self.pristine = directory / "pristine"

    def prepare(self) -> list[str | Path]:
        # Made before the recording begins: the test is about what happens in the file system, not of its making.
        with self.pristine.open("wb") as file:
            file.truncate(self.size)
        call(*MAKE[self.fstype], self.pristine)
        disk = self.directory / "disk"
        call("cp", "--sparse=always", self.pristine, disk)
        plugin = Path(__file__).with_name("recorder.py")
        return ["python", plugin, f"size={self.size}", f"disk={disk}", f"log={self.log}"]

    @property
    def position(self) -> int:
        """How far the log is: what was acknowledged until now happened before."""
        return self.log.stat().st_size if self.log.exists() else 0


class Replay:
    """The recorded disk, cut off at any position of its log."""

    def __init__(self, disk: RecordedDisk, work: Path) -> None:
        self.work = work
        self.log = disk.log.read_bytes()
        # XFS trusts the LSN at the head of a block, so one that is torn is more than its recovery can mend.
        self.atom = 4096 if disk.fstype == "xfs" else SECTOR
        self.base = work / "base"
        call("cp", "--sparse=always", disk.pristine, self.base)
        self.records: list[tuple[int, Write | None]] = []
        at = 0
        while at < len(self.log):
            kind, offset, length = RECORD.unpack_from(self.log, at)
            at += RECORD.size
            write = None if kind else Write(offset, self.log[at : at + length])
            at += length
            self.records.append((at, write))  # complete once the log has got this far
        self.settled = 0
        self.cuts = 0

    def flushes(self) -> list[int]:
        """The positions at which a flush was complete."""
        return [at for at, write in self.records if write is None]

    def cut(self, position: int, rng: random.Random | None) -> Path:
        """The disk after a power loss at a position; positions must not decrease from call to call.

        All that was written before the last flush is there. Of what was written since: all of it, or with
        `rng` any part of it, in any order, a write perhaps torn between sectors.
        """
        since: list[Write] = []
        last_flush = max(
            (n for n, (at, write) in enumerate(self.records) if write is None and at <= position), default=-1
        )
        with self.base.open("r+b") as file:
            for number in range(self.settled, last_flush + 1):
                write = self.records[number][1]
                if write is not None:
                    file.seek(write.offset)
                    file.write(write.data)
        self.settled = max(self.settled, last_flush + 1)
        for at, write in self.records[last_flush + 1 :]:
            if at > position:
                break
            if write is not None:
                since.append(write)
        # A name of its own: mount takes a loop device that is there already, with what it cached of the last cut.
        self.cuts += 1
        image = self.work / f"cut{self.cuts}"
        call("cp", "--sparse=always", self.base, image)
        if rng is not None:
            share = rng.choice((0.1, 0.5, 0.9))
            since = [write for write in since if rng.random() < share]
        with image.open("r+b") as file:
            for write in since:
                data = write.data
                if rng is not None and rng.random() < 0.1:
                    data = data[: rng.randrange(len(data) // self.atom + 1) * self.atom]
                file.seek(write.offset)
                file.write(data)
        return image
