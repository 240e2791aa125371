"""What ``diff`` and ``log`` share: the files of two generations, and which of their pages have changed."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ramfs.cli.du import files, hand_over, page_counts
from ramfs.errors import BadName, FileError
from ramfs.ramblock import parse_file_name


@dataclass(slots=True)
class Change:
    """What became of a file. ``pages`` are those that have changed; of one that is one side only, its stored ones."""

    path: str
    state: str
    """``changed``, ``same``, ``added`` or ``removed``"""
    pages: int
    sizes: tuple[int, int]
    """bytes, before and after; 0 where it is not"""
    runs: list[list[int]] | None = None
    """pages ``[first, stop)`` that have changed, if they were asked for"""

    @property
    def address(self) -> int | None:
        """Of the file of a RAM block: the guest-physical address of its first byte."""
        with contextlib.suppress(BadName):
            return int(parse_file_name(os.fsencode(os.path.basename(self.path))).gpa)
        return None

    def told(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"path": self.path, "state": self.state, "changed": self.pages}
        found |= {"bytes_before": self.sizes[0], "bytes": self.sizes[1]}
        if self.address is not None:
            found["guest_physical"] = self.address
        return found if self.runs is None else {**found, "runs": self.runs}


def compare(old: str, new: str, *, content: bool = False, with_runs: bool = False) -> Iterator[Change]:
    """What became of the files of one directory in another, or of one file, by their paths.

    Raises FileError (ENOENT) if something is removed meanwhile by which it could not be told, OSError.
    """
    if not os.path.isdir(new):
        yield _compare_file(os.path.basename(new), old, new, content, with_runs)
        return
    sides = []
    for top in (old, new):
        # A listing is made as it is read, so a directory that goes meanwhile is known by its end.
        found = {os.path.relpath(path, top): path for path in files(top)}
        os.stat(top)
        sides.append(found)
    before, after = sides
    for name in sorted(before.keys() | after.keys(), key=lambda name: name.split("/")):
        if name in before and name in after:
            yield _compare_file(name, before[name], after[name], content, with_runs)
        else:
            path = after.get(name) or before[name]
            counts, size = page_counts(path), os.stat(path, follow_symlinks=False).st_size
            stored = counts["total"] - counts["zero"]
            state, sizes = ("added", (0, size)) if name in after else ("removed", (size, 0))
            yield Change(name, state, stored, sizes)


def _compare_file(name: str, old: str, new: str, content: bool, with_runs: bool) -> Change:
    before, after = (os.stat(path, follow_symlinks=False) for path in (old, new))
    sizes = before.st_size, after.st_size
    if before.st_ino == after.st_ino:  # another name of the same frozen file
        return Change(name, "same", 0, sizes, [] if with_runs else None)
    for path in (old, new):
        hand_over(path)
    question = f"user.ramfs.changed.{before.st_ino}{'.content' if content else ''}"
    if with_runs:
        runs = list(_runs(new, question))
        changed = sum(stop - first for first, stop in runs)
    else:
        runs = None
        changed = _asked(new, question)["changed"]
    return Change(name, "changed" if changed or sizes[0] != sizes[1] else "same", changed, sizes, runs)


def _runs(path: str, question: str) -> Iterator[list[int]]:
    start: int | None = 0
    before: list[int] | None = None
    while start is not None:
        told = _asked(path, f"{question}.{start}")
        for run in told["runs"]:
            if before is not None and before[1] == run[0]:
                before[1] = run[1]
                continue
            if before is not None:
                yield before
            before = run
        start = told["next"]
    if before is not None:
        yield before


def _asked(path: str, question: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(os.getxattr(path, question, follow_symlinks=False))
    return told


@contextlib.contextmanager
def vanishing(what: str) -> Iterator[None]:
    """Let what is gone in the middle be told in one line."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        name = f" ({os.fsdecode(exc.filename)})" if exc.filename is not None else ""
        raise FileError(errno.ENOENT, f"{what} was removed or changed meanwhile{name}: run the command again") from None
