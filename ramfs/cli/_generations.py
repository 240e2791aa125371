"""What ``diff`` and ``log`` share: the files of two generations, and which of their pages have changed."""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ramfs.cli.du import files, hand_over, page_counts
from ramfs.errors import FileError
from ramfs.units import PAGE, pages


class Place(NamedTuple):
    """Where a part of a file lies in its guest's physical memory, by ``layout.json``. Bytes."""

    gpa: int
    size: int
    offset: int
    """in the file"""

    def of(self, run: Sequence[int]) -> tuple[int, int]:
        """The addresses ``[start, stop)`` of those of some pages that lie in it; empty if none do."""
        low, high = max(run[0] * PAGE, self.offset), min(run[1] * PAGE, self.offset + self.size)
        return (self.gpa + low - self.offset, self.gpa + high - self.offset) if low < high else (self.gpa, self.gpa)


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
    places: list[tuple[Place, int]] = field(default_factory=list)
    """where it lies in the guest's memory, with the pages that have changed there, if they were asked for"""

    def told(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"path": self.path, "state": self.state, "changed": self.pages}
        found |= {"bytes_before": self.sizes[0], "bytes": self.sizes[1]}
        if self.places:
            found["guest_physical"] = [{**place._asdict(), "changed": count} for place, count in self.places]
        return found if self.runs is None else {**found, "runs": self.runs}


class _Layouts:
    """The layouts of directories, each asked for once."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, list[Place]]] = {}

    def of(self, path: str) -> list[Place]:
        """Where a file lies, in the order of its bytes; nothing of one that is no guest's memory."""
        directory, name = os.path.split(path)
        if directory not in self._known:
            places = self._known[directory] = {}
            # Who may not read all the files may not read it.
            with contextlib.suppress(OSError, ValueError), open(os.path.join(directory, ".guest/layout.json")) as file:
                for each in json.load(file)["ranges"]:
                    place = Place(*(int(each[key], 0) for key in ("gpa", "size", "offset")))
                    places.setdefault(each["file"], []).append(place)
        return sorted(self._known[directory].get(name, []), key=lambda place: place.offset)


def compare(
    old: str, new: str, *, content: bool = False, with_runs: bool = False, with_places: bool = False
) -> Iterator[Change]:
    """What became of the files of one directory in another, or of one file, by their paths.

    Raises FileError (ENOENT) if something is removed meanwhile by which it could not be told, OSError.
    """
    layouts = _Layouts() if with_places else None
    if not os.path.isdir(new):
        path = os.path.abspath(new)
        yield _compare_file(os.path.basename(path), old, path, content, with_runs, layouts)
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
            yield _compare_file(name, before[name], after[name], content, with_runs, layouts)
        else:
            path = after.get(name) or before[name]
            counts, size = page_counts(path), os.stat(path, follow_symlinks=False).st_size
            stored = counts["total"] - counts["zero"]
            state, sizes = ("added", (0, size)) if name in after else ("removed", (size, 0))
            yield Change(name, state, stored, sizes)


def _compare_file(name: str, old: str, new: str, content: bool, with_runs: bool, layouts: _Layouts | None) -> Change:
    before, after = (os.stat(path, follow_symlinks=False) for path in (old, new))
    sizes = before.st_size, after.st_size
    places = [] if layouts is None else layouts.of(new)
    if before.st_ino == after.st_ino:  # another name of the same frozen file
        return Change(name, "same", 0, sizes, [] if with_runs else None, [(place, 0) for place in places])
    for path in (old, new):
        hand_over(path)
    question = f"user.ramfs.changed.{before.st_ino}{'.content' if content else ''}"
    if with_runs:
        runs = list(_runs(new, question))
        changed = sum(stop - first for first, stop in runs)
        spans = [[place.of(run) for run in runs] for place in places]
        parts = [sum(stop - start for start, stop in span) // PAGE for span in spans]
    else:
        runs = None
        changed, parts = _count(new, question, pages(max(sizes)), places)
    state = "changed" if changed or sizes[0] != sizes[1] else "same"
    return Change(name, state, changed, sizes, runs, list(zip(places, parts, strict=True)))


def _count(path: str, question: str, total: int, places: list[Place]) -> tuple[int, list[int]]:
    """The pages that have changed in all, and in each place: each page is looked at once."""
    if len(places) < 2 and all((place.offset, place.size) == (0, total * PAGE) for place in places):
        changed = _asked(path, question)["changed"]
        return changed, [changed for _ in places]
    ends = {edge // PAGE for place in places for edge in (place.offset, place.offset + place.size)}
    cuts = sorted({0, total} | {end for end in ends if end < total})
    counts = {(a, b): _asked(path, f"{question}.{a}-{b}")["changed"] for a, b in itertools.pairwise(cuts)}
    parts = [
        sum(count for (a, b), count in counts.items() if place.of((a, b))[0] < place.of((a, b))[1]) for place in places
    ]
    return sum(counts.values()), parts


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
