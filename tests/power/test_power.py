"""What is fsynced or frozen survives power loss.

The store lies in a real ext4 or XFS, on a disk that logs each write and each flush (recorder.py). After a
workload the disk is rebuilt as it would be had the power gone at many moments: at each flush, and anywhere
between two with a random part of the writes since the last one. On each of them the file system recovers its
journal, `ramfs fsck` must find nothing, and the store must have what was acknowledged until then: byte for
byte what was synced or frozen, or for what was changed after its sync, page by page the synced contents or
later ones.

RAMFS_POWER_CUTS=1000 makes it a long run.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from harness import Mount
from mount.posix import PUNCH, fallocate
from power.disk import SECTOR, NotMountable, RecordedDisk, Replay, mounted_image
from storekit import Kit

import ramfs.store.check
import ramfs.store.store
from ramfs.errors import FileError
from ramfs.store.reflink import can_reflink
from ramfs.store.repair import check_store
from ramfs.units import PAGE, ROOT, SNAP_BIT, InodeNumber

#: What the workload does, and how often.
WEIGHTS = {"write": 10, "zero": 3, "punch": 3, "partial": 4, "truncate": 2, "sync": 5, "snapshot": 3, "forget": 1}
WEIGHTS |= {"clone": 3, "unlink": 2, "house": 3, "takeover": 2, "direct": 4}
#: Daemons that may die in a few seconds, for another to come at once.
MOST_TAKEOVERS = 3
CUTS = int(os.environ.get("RAMFS_POWER_CUTS", "36"))


@dataclass
class File:
    """What a file was, from its making on."""

    versions: list[bytes] = field(default_factory=lambda: [b""])
    synced: list[tuple[int, int]] = field(default_factory=list)
    """(position, number of the version that was durable by then)"""
    unlink_begun: bool = False
    unlinked: int | None = None
    """position at which the removal was durable"""


@dataclass
class Frozen:
    """A file in a snapshot."""

    data: bytes
    acknowledged: int | None = None
    removal_begun: bool = False


class Oracle:
    """What may be on the disk after a cut at a position of the log."""

    def __init__(self, position: Callable[[], int], *, live: bool) -> None:
        self.position = position
        self.live = live
        """may files be live native ones?"""
        self.files: dict[str, File] = defaultdict(File)
        self.frozen: dict[str, dict[str, Frozen]] = {}

    def wrote(self, name: str, offset: int, data: bytes) -> None:
        old = self.files[name].versions[-1]
        old = old.ljust(offset, b"\0")
        self.files[name].versions.append(old[:offset] + data + old[offset + len(data) :])

    def truncated(self, name: str, size: int) -> None:
        self.files[name].versions.append(self.files[name].versions[-1][:size].ljust(size, b"\0"))

    def punched(self, name: str, offset: int, length: int) -> None:
        length = min(length, len(self.files[name].versions[-1]) - offset)
        if length > 0:
            self.wrote(name, offset, bytes(length))

    def synced(self, name: str) -> None:
        file = self.files[name]
        file.synced.append((self.position(), len(file.versions) - 1))

    def check(self, kit: Kit, position: int) -> None:
        root = {os.fsdecode(name) for _, name, _ in kit.space.names(kit.space.get_root().ino)}
        assert root <= self.files.keys() | {"vm"}, root
        for name, file in self.files.items():
            self._check_file(kit, name, file, position)
        for snapshot, files in self.frozen.items():
            self._check_snapshot(kit, snapshot, files, position)

    def _check_file(self, kit: Kit, name: str, file: File, position: int) -> None:
        try:
            found = kit.read(name)
        except FileError:
            must = any(at <= position for at, _ in file.synced) and not file.unlink_begun
            assert not must, f"{name} is gone"
            return
        assert file.unlinked is None or file.unlinked > position, f"{name} was removed, and is there"
        since = max((number for at, number in file.synced if at <= position), default=0)
        allowed = file.versions[since:]
        sizes = [len(version) for version in allowed]
        # A write that makes a file of XFS longer may get there in part.
        assert len(found) in sizes or (self.live and min(sizes) <= len(found) <= max(sizes)), (
            f"{name}: {len(found)} bytes; version {since} of {list(map(len, file.versions))}, synced {file.synced}"
        )
        if found in allowed:
            return
        # A disk may tear a page that was being overwritten where it lies, but no sector.
        for start in range(0, len(found), SECTOR):
            part = found[start : start + SECTOR]
            candidates = {version[start : start + SECTOR].ljust(len(part), b"\0")[: len(part)] for version in allowed}
            assert part in candidates, f"{name}: page {start // PAGE} is {part[:16]!r}..."

    @staticmethod
    def _check_snapshot(kit: Kit, snapshot: str, files: dict[str, Frozen], position: int) -> None:
        any_file = next(iter(files.values()))
        try:
            kit._directory(os.fsencode(f"vm/.snap/{snapshot}"))
        except FileError:
            must = any_file.acknowledged is not None and any_file.acknowledged <= position
            assert not must or any_file.removal_begun, f"snapshot {snapshot} is gone"
            return
        for name, frozen in files.items():
            assert kit.read(f"vm/.snap/{snapshot}/{name}") == frozen.data, f"{name} in snapshot {snapshot}"


class Workload:
    """Random work, told to the oracle; how it is done is up to the two below."""

    def __init__(self, oracle: Oracle, seed: int) -> None:
        self.oracle = oracle
        self.rng = random.Random(seed)
        self.serial = 0

    def page(self) -> bytes:
        """A page like no other."""
        self.serial += 1
        return (b"%08d" % self.serial) * (PAGE // 8)

    def run(self, steps: int) -> None:
        rng = self.rng
        self.mkdir("vm")
        self.write("vm/ram", 0, b"".join(self.page() for _ in range(64)))
        self.sync("vm/ram")
        snapshots: list[str] = []
        clones: list[str] = []
        for step in range(steps):
            kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            name = rng.choice(["vm/ram", *clones[-3:]])
            page = rng.randrange(64)
            if kind == "write":
                self.write(name, page * PAGE, b"".join(self.page() for _ in range(rng.randrange(1, 9))))
            elif kind == "zero":
                self.write(name, page * PAGE, bytes(PAGE * rng.randrange(1, 5)))
            elif kind == "punch":
                self.punch(name, page * PAGE + rng.choice((0, 0, 777)), PAGE * rng.randrange(1, 20))
            elif kind == "partial":
                self.write(name, page * PAGE + 777, self.page()[: rng.randrange(1, 3000)])
            elif kind == "truncate":
                self.truncate(name, rng.choice((page * PAGE, page * PAGE + 1000, 64 * PAGE)))
            elif kind == "sync":
                self.sync(name)
            elif kind == "snapshot":
                snapshots.append(f"s{step}")
                self.snapshot(snapshots[-1])
            elif kind == "clone":
                clones.append(f"clone{step}")
                self.clone(name, clones[-1])
                if rng.random() < 0.6:
                    self.sync(clones[-1])
            elif kind == "unlink" and len(clones) > 2:
                self.unlink(clones.pop(0), durable=rng.random() < 0.5)
            elif kind == "forget" and len(snapshots) > 2:
                self.delete_snapshot(snapshots.pop(0))
            elif kind == "house":
                self.keep_house()
            elif kind == "takeover":
                self.take_over()
            elif kind == "direct":
                self.turn_direct(name)

    def told_snapshot(self, name: str) -> dict[str, Frozen]:
        files = {"ram": Frozen(self.oracle.files["vm/ram"].versions[-1])}
        self.oracle.frozen[name] = files
        return files

    def acknowledged(self, files: dict[str, Frozen]) -> None:
        for frozen in files.values():
            frozen.acknowledged = self.oracle.position()

    def told_removal(self, name: str) -> None:
        for frozen in self.oracle.frozen[name].values():
            frozen.removal_begun = True

    def mkdir(self, name: str) -> None: ...
    def write(self, name: str, offset: int, data: bytes) -> None: ...
    def truncate(self, name: str, size: int) -> None: ...
    def punch(self, name: str, offset: int, length: int) -> None: ...
    def sync(self, name: str) -> None: ...
    def snapshot(self, name: str) -> None: ...
    def delete_snapshot(self, name: str) -> None: ...
    def clone(self, source: str, target: str) -> None: ...
    def unlink(self, name: str, durable: bool) -> None: ...
    def keep_house(self) -> None: ...
    def take_over(self) -> None: ...
    def turn_direct(self, name: str) -> None: ...


class ThroughMount(Workload):
    """By system calls on a mount that a daemon serves."""

    def __init__(self, oracle: Oracle, seed: int, mount: Mount) -> None:
        super().__init__(oracle, seed)
        self.mount = mount
        self.path = mount.path
        self.takeovers = MOST_TAKEOVERS

    def take_over(self) -> None:
        """kill -9 of the daemon, as often as its supervisor bears with it. The next one settles a second later."""
        if self.takeovers:
            self.takeovers -= 1
            self.mount.kill_daemon()

    def mkdir(self, name: str) -> None:
        (self.path / name).mkdir()

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.oracle.wrote(name, offset, data)
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(fd, data, offset)
        os.close(fd)

    def truncate(self, name: str, size: int) -> None:
        self.oracle.truncated(name, size)
        os.truncate(self.path / name, size)

    def punch(self, name: str, offset: int, length: int) -> None:
        self.oracle.punched(name, offset, length)
        with open(self.path / name, "r+b") as file:
            fallocate(file.fileno(), PUNCH, offset, length)

    def sync(self, name: str) -> None:
        fd = os.open(self.path / name, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        self.oracle.synced(name)

    def snapshot(self, name: str) -> None:
        files = self.told_snapshot(name)
        (self.path / "vm/.snap" / name).mkdir()
        self.acknowledged(files)

    def delete_snapshot(self, name: str) -> None:
        self.told_removal(name)
        (self.path / "vm/.snap" / name).rmdir()

    def clone(self, source: str, target: str) -> None:
        data = self.oracle.files[source].versions[-1]
        self.oracle.wrote(target, 0, data)
        with open(self.path / source, "rb") as old, open(self.path / target, "xb") as new:
            done = 0
            while done < len(data):
                done += os.copy_file_range(old.fileno(), new.fileno(), len(data) - done)

    def unlink(self, name: str, durable: bool) -> None:
        self.oracle.files[name].unlink_begun = True
        (self.path / name).unlink()
        if durable:
            fd = os.open(self.path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            self.oracle.files[name].unlinked = self.oracle.position()


class Inside(Workload):
    """On the store itself, with all its housekeeping whenever it is its turn."""

    def __init__(self, oracle: Oracle, seed: int, kit: Kit) -> None:
        super().__init__(oracle, seed)
        self.kit = kit
        self.reflinks = can_reflink(kit.pager.layers.directory)

    def mkdir(self, name: str) -> None:
        self.kit.mkdir(name)

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.oracle.wrote(name, offset, data)
        try:
            image = self.kit.image(name)
        except FileError:
            image = self.kit.create(name)
        if image.direct is None:
            self.kit.pager.write(image, offset, data)
            return
        fd = os.open(image.direct, os.O_RDWR)  # as the kernel does, for whoever has it open
        os.pwrite(fd, data, offset)
        os.close(fd)

    def truncate(self, name: str, size: int) -> None:
        self.oracle.truncated(name, size)
        self.kit.pager.truncate(self.kit.image(name), size)

    def punch(self, name: str, offset: int, length: int) -> None:
        self.oracle.punched(name, offset, length)
        for _ in self.kit.pager.zero(self.kit.image(name), offset, length, keep_size=True):
            pass

    def sync(self, name: str) -> None:
        self.kit.sync(name)
        self.oracle.synced(name)

    def snapshot(self, name: str) -> None:
        files = self.told_snapshot(name)
        self.kit.snapshot(name, "vm")
        self.acknowledged(files)

    def delete_snapshot(self, name: str) -> None:
        self.told_removal(name)
        self.kit.delete_snapshot(name, "vm")

    def clone(self, source: str, target: str) -> None:
        self.oracle.wrote(target, 0, self.oracle.files[source].versions[-1])
        self.kit.copy(source, target)

    def unlink(self, name: str, durable: bool) -> None:
        self.oracle.files[name].unlink_begun = True
        self.kit.unlink(name)
        self.kit.forget()
        if durable:
            self.kit.store.catalog.sync()
            self.oracle.files[name].unlinked = self.oracle.position()

    def take_over(self) -> None:
        self.kit.take_over()

    def turn_direct(self, name: str) -> None:
        """Let it be direct, or not any more, where blocks can be shared. (A mount does so by itself.)"""
        image = self.kit.image(name)
        if self.reflinks:
            assert trio.run(self.kit.pager.enter if image.direct is None else self.kit.pager.leave, image)

    def keep_house(self) -> None:
        if self.kit.store.images.doubtful:  # after a takeover nothing is garbage before all is settled
            self.kit.settle()
            return
        if self.rng.random() < 0.5:
            self.kit.digest()
        there = self.kit.space.names(InodeNumber(self.kit.space.lookup(ROOT, b"vm").ino | SNAP_BIT))
        for _, name, _ in list(there)[-1:]:  # the youngest snapshot becomes flat
            trio.run(self.kit.pager.flatten, self.kit.image(f"vm/.snap/{os.fsdecode(name)}/ram"), lambda _: None)
        self.kit.merge(above=2)


@pytest.fixture
def other_boot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on this is another boot of the machine."""

    def begin() -> None:
        for module in (ramfs.store.store, ramfs.store.check):
            monkeypatch.setattr(module, "boot_id", lambda: "the boot after the power loss")

    return begin


def judge_store(store: Path, oracle: Oracle, position: int) -> None:
    """What is there after a power loss at a position is what was acknowledged by then, before and after a clean-up."""
    report = check_store(str(store))
    assert not report.findings, report
    kit = Kit(store)
    try:
        oracle.check(kit, position)
        kit.collect(2)
        oracle.check(kit, position)
    finally:
        kit.kill()
    report = check_store(str(store))
    assert not report.damaged, report


def cut_everywhere(disk: RecordedDisk, oracle: Oracle, work: Path, first: int, seed: int) -> int:
    """Try the cuts; returns how many there were."""
    rng = random.Random(seed)
    replay = Replay(disk, work)
    last = replay.records[-1][0]
    flushes = [at for at in replay.flushes() if at >= first]
    assert len(flushes) > 50, "the workload hardly synced"
    cuts: list[tuple[int, bool]] = [(at, False) for at in rng.sample(flushes, min(CUTS // 3, len(flushes)))]
    cuts += [(rng.randrange(first, last), True) for _ in range(CUTS - len(cuts))]
    refused = 0
    for position, torn in sorted(cuts):
        image = replay.cut(position, rng if torn else None)
        try:
            with mounted_image(image, work / "point") as point:
                judge_store(point / "store", oracle, position)
        except NotMountable:
            # A disk that loses so much as to leave no file system is nothing that a store could help.
            refused += 1
            assert torn, "the file system is not there, though all that was flushed is"
            assert refused <= CUTS // 10, "the cuts say little of the store any more"
        except BaseException as error:
            error.add_note(f"power lost at {position} of {last}, {'partly' if torn else 'at a flush'}; seed {seed}")
            raise
        image.unlink()
    return len(cuts)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts disk images")
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
@pytest.mark.parametrize("how", ["mount", "inside"])
def test_power_loss(shm: Path, tmp_path: Path, fstype: str, how: str, other_boot: Callable[[], None]) -> None:
    seed = int(os.environ.get("RAMFS_POWER_SEED", "1"))
    work = shm / "work"
    work.mkdir()
    with RecordedDisk(shm, fstype) as disk:
        with mounted_image(disk.device, shm / "recorded") as point:
            oracle = Oracle(lambda: disk.position, live=fstype == "xfs")
            if how == "mount":
                with Mount(point / "store", tmp_path / "mnt") as mount:
                    first = disk.position
                    ThroughMount(oracle, seed, mount).run(250)
            else:
                kit = Kit(point / "store")
                first = disk.position
                Inside(oracle, seed, kit).run(250)
                kit.kill()
        other_boot()
        assert cut_everywhere(disk, oracle, work, first, seed) == CUTS
    shutil.rmtree(work)
