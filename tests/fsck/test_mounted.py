"""What a repaired store looks like through a mount."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Mount
from storekit import Kit

from ramfs.store.repair import check_store
from ramfs.units import PAGE


def test_lost_pages_are_errors_until_they_are_overwritten(
    store: Path, make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    with Kit(store) as kit:
        layer = kit.layer_of("vm/.snap/one/ram", 9)
        good = kit.read("vm/ram")
    with (store / "layers" / f"{layer:08x}.ram").open("r+b") as file:
        file.seek(9 * PAGE)
        file.write(b"?")
    assert not check_store(str(store), repair=True).damaged
    mount = make_mount(store=store)
    mount.expect("was lost")
    fd = os.open(mount.path / "vm/ram", os.O_RDWR)
    try:
        # The kernel reads ahead and asks again page by page where that failed.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(fd, 9 * PAGE, 0) == good[: 9 * PAGE]
        assert os.pread(fd, PAGE, 10 * PAGE) == good[10 * PAGE : 11 * PAGE]
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, PAGE, 9 * PAGE)
        os.pwrite(fd, good[9 * PAGE : 10 * PAGE], 9 * PAGE)
        os.fsync(fd)
    finally:
        os.close(fd)
    mount.restart()
    assert (mount.path / "vm/ram").read_bytes() == good
