"""kill -9 and upgrades under loads that check every byte (tools/benchmarks/takeover.py): no error, nothing lost.

RAMFS_KILLS=100 kills so often; `tools/bench --only takeover` does that and tells the stalls.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from disk import reflink_disk
from harness import RAMFS, UNMEASURED, Mount
from mount.posix import status
from takeover.conftest import freed, fsck
from vm.guest import Guest

from tools.benchmarks import takeover

KILLS = int(os.environ.get("RAMFS_KILLS", "6"))
UPGRADES = 3
#: Seconds between two deaths at one mount; the supervisor begins to hold daemons back then.
GAP = 2.0


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(takeover.__file__).with_name("steady.c")
    program = tmp_path_factory.mktemp("steady") / "steady"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", program], check=True)
    return program


@pytest.fixture(params=["cached", "native"])
def mounts(request: pytest.FixtureRequest, shm: Path) -> Iterator[list[Mount]]:
    """On tmpfs the daemon serves what is live, on XFS the kernel does."""
    with ExitStack() as stack:
        native = request.param == "native"
        if native and os.geteuid() != 0:
            pytest.skip("the kernel serves files itself for root only")
        stores = stack.enter_context(reflink_disk(shm, "xfs", 2 << 30)) if native else shm
        mounts = []
        for number in range(3):
            mounts.append(Mount(stores / f"store{number}", shm / f"mnt{number}", env=UNMEASURED).start())
            stack.callback(mounts[-1].abandon)
            mounts[-1].expect(r"\(process \d+\) was ended by signal 9; going on")
        yield mounts


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_upgraded_under_load(mounts: list[Mount], steady: Path) -> None:
    with ExitStack() as stack:
        for mount in mounts:
            stack.enter_context(freed(mount, 240 + 3 * KILLS))
        directory = mounts[2].path / "guest"
        directory.mkdir()
        guest = stack.enter_context(Guest(directory / "ram", boot="fill=1:4"))
        guest.wait_for_line("guest is up", 60)
        guest.wait_for_line("= filled", 60)
        storm = takeover.Storm([(m.path, m.store) for m in mounts], steady, RAMFS)
        stack.callback(storm.abandon)
        storm.add_guest(guest, directory)
        native = mounts[2].store.parent != mounts[2].path.parent
        assert bool(status(mounts[2].path)["native"]["live"]) == native
        storm.kill(KILLS, GAP)
        storm.upgrade(UPGRADES)
        storm.end()
        for how in ("kill", "upgrade"):
            print(how, takeover.distribution(storm.stalls(how)))
        # What is native waits for no daemon. Names do.
        waited = [load.told["stalls"] for load in storm.places[1].loads if isinstance(load, takeover.Program)]
        assert any(waited), "no access has waited for a daemon"
        assert native or max(storm.stalls("kill")) > 0.001
        guest.check()
        assert guest.process.poll() is None
        guest.kill()
        storm.check()
        for mount in mounts:
            mount.umount()
            fsck(mount.store)
            mount.start()
        storm.check()
        for mount in mounts:
            mount.umount()
