"""Which pages of a file are what, by the attribute that tells (inspect/states.py)."""

import json
import os
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramfs.image.lineage import PageState
from ramfs.image.pages import nonzero_pages
from ramfs.image.table import runs_of
from ramfs.store.cachestat import dirty_runs
from ramfs.units import PAGE, pages

#: Pages that are read in one go.
_AT_ONCE: Final = 256


def states(path: str) -> NDArray[np.uint32]:
    """Of each page its number in `PageState`, by what the daemon has of the file. Raises OSError."""
    first: int | None = 0
    runs: list[list[int]] = []
    total = 0
    while first is not None:
        told: dict[str, Any] = json.loads(os.getxattr(path, f"user.ramfs.states.{first}", follow_symlinks=False))
        runs += told["runs"]
        first, total = told["next"], told["total"]
    found = np.array(runs, np.int64).reshape(-1, 2)
    return np.repeat(found[:, 1].astype(np.uint32), np.diff(np.append(found[:, 0], total)))


class Zeros(NamedTuple):
    """What is known of the zeros in a file: runs of pages."""

    known: list[tuple[int, int]]
    possible: list[tuple[int, int]]
    """what is only in the kernel's cache, and may be zeros too"""


def zero_runs(path: str, patience: float) -> Zeros:
    """Where a file has zeros, without anything being read or written back. Nobody may change it meanwhile.

    For at most ``patience`` seconds it is looked for what only the kernel has. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # The cache first: a page that is written back in between is not dirty any more, and the daemon has it.
        found = dirty_runs(fd, pages(os.fstat(fd).st_size), patience)
    finally:
        os.close(fd)
    if found is None:
        return Zeros([], [])
    dirty, unknown = found
    zeros = states(path) == PageState.ZERO
    for first, stop in dirty + unknown:
        zeros[first:stop] = False
    return Zeros(list(runs_of(zeros)), dirty)


def read_zeros(path: str, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which of some pages of a file are zeros, by reading them. Raises OSError."""
    found: list[tuple[int, int]] = []
    buffer = memoryview(bytearray(_AT_ONCE * PAGE))
    with open(path, "rb", buffering=0) as file:
        for first, stop in runs:
            for low in range(first, stop, _AT_ONCE):
                data = buffer[: os.preadv(file.fileno(), [buffer[: (stop - low) * PAGE]], low * PAGE) & -PAGE]
                if data:  # it may have become shorter
                    found += [(low + a, low + b) for a, b in runs_of(~nonzero_pages(data))]
    return found
