"""A service manager keeps the descriptors of a mount: then the supervisor may die as well."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from harness import RAMFS, is_mounted, unmount
from service.conftest import Load, Manager

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ABORT = "mount -t fusectl control /sys/fs/fuse/connections; echo 1 > /sys/fs/fuse/connections/$0/abort"


def fsck(manager: Manager) -> None:
    done = subprocess.run([*RAMFS, "fsck", manager.store], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_supervisor_and_daemon_die_under_load(manager: Manager) -> None:
    manager.serve()
    assert set(manager.kept) == {"fuse", "ledger", "lock"}
    load = Load(manager.path / "ram")
    for _ in range(2):
        time.sleep(0.3)
        manager.kill()
        manager.serve()
        assert manager.status()["supervisor"]["why"] == "the supervisor before this one is gone"
    time.sleep(0.3)
    print(f"longest access: {load.end():.3f} s")
    unmount(manager.path)
    assert manager.end() == 0
    assert manager.kept == {}
    fsck(manager)


def test_sigterm_lets_go_of_what_was_kept(manager: Manager) -> None:
    manager.serve()
    (manager.path / "file").write_bytes(b"kept")
    manager.kill()
    manager.serve()
    assert manager.process is not None
    manager.process.terminate()
    assert manager.end() == 0
    assert "STOPPING=1" in manager.told
    assert manager.kept == {}
    assert not is_mounted(manager.path)
    manager.serve()
    assert (manager.path / "file").read_bytes() == b"kept"
    unmount(manager.path)
    assert manager.end() == 0


@needs_root
@pytest.mark.parametrize("how", ["unmounted", "aborted"])
def test_kept_of_a_mount_that_is_gone(manager: Manager, how: str) -> None:
    manager.serve()
    (manager.path / "file").write_bytes(b"kept")
    minor = os.minor(os.stat(manager.path).st_dev)
    manager.kill()
    if how == "unmounted":
        unmount(manager.path, lazy=True)
    else:
        subprocess.run(["unshare", "--mount", "sh", "-euc", ABORT, str(minor)], check=True)
    before = [os.fstat(fd).st_ino for name, fd in manager.kept.items() if name == "ledger"]
    manager.serve()
    assert manager.status()["supervisor"]["why"] == ""
    assert [os.fstat(fd).st_ino for name, fd in manager.kept.items() if name == "ledger"] != before
    assert set(manager.kept) == {"fuse", "ledger", "lock"}
    assert (manager.path / "file").read_bytes() == b"kept"
    unmount(manager.path)
    assert manager.end() == 0


def test_another_store_does_not_go_on_with_the_mount(manager: Manager) -> None:
    """As when somebody edits the configuration of the service meanwhile."""
    manager.serve()
    manager.kill()
    assert manager.start(manager.store.with_name("other")).wait(30) == 2
    assert f"the mount of {manager.store} at {manager.path} waits for its supervisor" in manager.log.read_text()
    path, manager.path = manager.path, manager.path.with_name("elsewhere")
    manager.path.mkdir()
    assert manager.start().wait(30) == 2
    manager.path = path
    manager.serve()
    unmount(manager.path)
    assert manager.end() == 0
