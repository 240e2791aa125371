"""File systems on loop devices whose files can share blocks."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

from power.disk import MAKE, call, mounted_image

MIB = 1 << 20
REFLINK = {"xfs": MAKE["xfs"], "btrfs": ["mkfs.btrfs", "-q"]}


@contextlib.contextmanager
def reflink_disk(base: Path, fstype: str, size: int = 400 * MIB) -> Iterator[Path]:
    """A fresh file system of that kind, on an image below ``base``."""
    image = base / f"{fstype}.disk"
    with image.open("wb") as file:
        file.truncate(size)
    call(*REFLINK[fstype], image)
    with mounted_image(image, base / f"{fstype}.mnt") as point:
        try:
            yield point
        finally:
            gc.collect()  # stores that a test has dropped have files open
    image.unlink()
