"""Power loss while a directory arrives: each page is afterwards what was acknowledged, or comes again.

As test_power.py, with a file whose pages are still at a source; RAMFS_POWER_CUTS=1000 makes it a long run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from arrival.inside import ArrivingKit, Shelf
from mount.posix import page_of
from power.disk import NotMountable, RecordedDisk, Replay, mounted_image
from power.test_power import Inside, Oracle, other_boot

from ramfs.image.table import runs_of
from ramfs.store.repair import check_store
from ramfs.units import PAGE

__all__ = ["other_boot"]

CUTS = int(os.environ.get("RAMFS_POWER_CUTS", "40"))
COUNT = 96
DATA = b"".join(bytes(PAGE) if n % 16 == 7 else page_of(n + 1) for n in range(COUNT))


class Brought(ArrivingKit):
    """Who reads has absent pages brought."""

    def read(self, path: str) -> bytes:
        found: list[bytes] = []
        image = self.image(path)
        self.run(lambda: self.having(lambda: found.append(self.pager.copy_out(image, 0, image.size))), streaming=False)
        return found[0]


class Arriving(Inside):
    """Work on files that arrive meanwhile."""

    kit: Brought

    def run(self, steps: int) -> None:
        rng, oracle = self.rng, self.oracle
        self.kit.pull("vm")
        oracle.files["vm/ram"].versions.append(DATA)
        self.sync("vm/ram")
        clones, snapshots = ["vm/ram"], 0
        for _ in range(steps):
            name = rng.choice(clones[-3:])
            page = rng.randrange(COUNT)
            kind = rng.choice(["write", "partial", "zero", "arrive", "arrive", "arrive", "sync", "snapshot", "clone"])
            if kind == "write":
                self.write(name, page * PAGE, b"".join(self.page() for _ in range(rng.randrange(1, 5))))
            elif kind == "partial":
                self.write(name, page * PAGE + 777, self.page()[:2000])
            elif kind == "zero":
                self.punch(name, page * PAGE + rng.choice((0, 777)), PAGE * rng.randrange(1, 9))
            elif kind == "arrive":
                layer = self.kit.store.layers.by_id.get(1)
                if layer is not None and layer.presence is not None:
                    absent = list(runs_of(layer.presence.states == 0))
                    first, stop = rng.choice(absent)
                    self.kit.fetch(layer, first, min(stop, first + rng.randrange(1, 6)))
            elif kind == "sync":
                self.sync(name)
            elif kind == "snapshot":
                self.snapshot(f"s{snapshots}")
                snapshots += 1
            elif len(clones) < 6:
                clones.append(f"clone{len(clones)}")
                self.clone(name, clones[-1])
                self.sync(clones[-1])

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.oracle.wrote(name, offset, data)
        image = self.kit.image(name)
        self.kit.run(lambda: self.kit.having(lambda: self.kit.pager.write(image, offset, data)), streaming=False)

    def punch(self, name: str, offset: int, length: int) -> None:
        self.oracle.punched(name, offset, length)
        image = self.kit.image(name)

        def zero() -> None:
            for _ in self.kit.pager.zero(image, offset, length, keep_size=True):
                pass

        self.kit.run(lambda: self.kit.having(zero), streaming=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts disk images")
def test_power_loss_while_it_arrives(shm: Path, other_boot: Callable[[], None]) -> None:
    seed = int(os.environ.get("RAMFS_POWER_SEED", "1"))
    work = shm / "work"
    work.mkdir()
    shelf = Shelf({"ram": DATA})
    with RecordedDisk(shm, "ext4") as disk:
        with mounted_image(disk.device, shm / "recorded") as point:
            oracle = Oracle(lambda: disk.position, live=False)
            kit = Brought(point / "store", shelf)
            load = Arriving(oracle, seed, kit)
            first = disk.position
            load.run(60)
            kit.run()  # ... and it becomes complete
            assert not kit.pulls.running
            load.sync("vm/ram")
            kit.collect()
            kit.kill()
        other_boot()
        replay = Replay(disk, work)
        rng, last = load.rng, replay.records[-1][0]
        cuts = [(rng.choice(replay.flushes()), False) for _ in range(CUTS // 3)]
        cuts += [(rng.randrange(first, last), True) for _ in range(CUTS - len(cuts))]
        absent = refused = 0
        for position, torn in sorted((max(at, first), torn) for at, torn in cuts):
            image = replay.cut(position, rng if torn else None)
            try:
                with mounted_image(image, work / "point") as point:
                    absent += judge(point / "store", oracle, shelf, position)
            except NotMountable:
                refused += 1
                assert torn
                assert refused <= CUTS // 10
            except BaseException as error:
                error.add_note(f"power lost at {position} of {last}, torn: {torn}; seed {seed}")
                raise
            image.unlink()
        assert absent >= CUTS // 4, "the cuts say little: hardly anything was absent"


def judge(store: Path, oracle: Oracle, shelf: Shelf, position: int) -> bool:
    """What is there is what was acknowledged; what is not comes again. Was something absent?"""
    report = check_store(str(store))
    assert not report.findings, report
    kit = Brought(store, shelf)
    try:
        absent = bool(kit.store.layers.arriving)
        oracle.check(kit, position)
        kit.run()
        assert not kit.pulls.running
        oracle.check(kit, position)
    finally:
        kit.kill()
    report = check_store(str(store))
    assert not report.damaged, report
    return absent
