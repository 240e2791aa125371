"""``ramfs map``."""

import errno
import json
import os
from collections.abc import Iterator
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

from ramfs.cli._generations import compare, vanishing
from ramfs.cli._mounts import MountEntry, locate
from ramfs.cli._picture import BLUE, GREEN, GREY, NAVY, RED, SKY, YELLOW, Kind, Panel, Picture, save_png, save_svg, text
from ramfs.cli._states import states
from ramfs.cli.du import files, hand_over
from ramfs.errors import FileError, UsageError
from ramfs.image.lineage import PageState
from ramfs.image.working_set import NAME, parse
from ramfs.units import PAGE

Numbers = NDArray[np.uint32]
"""For each page of a file a number: its state, its kind, its age."""

_SAVE: Final = {".png": save_png, ".svg": save_svg}
#: Generations that are told apart; what is older looks like the last of them.
_GENERATIONS: Final = 5

_ZERO: Final = Kind("zeros, stored nowhere", GREY, ".")
_ABSENT: Final = Kind("arriving: not here yet", YELLOW, "A")
_OWN: Final = Kind("its own, in no other file", RED, "O")
_FROZEN: Final = Kind("frozen, in no other file", GREEN, "F")
_DIFFERENCE: Final = [_ZERO, Kind("as before", SKY, "="), Kind("changed", RED, "C")]
#: From dark to bright in the order in which they were touched.
_TOUCHES: Final = [
    _ZERO,
    Kind("not touched", (190, 190, 190), "-"),
    Kind("touched first", (68, 1, 84), "1"),
    Kind("then", (49, 104, 142), "2"),
    Kind("then", (53, 183, 121), "3"),
    Kind("touched last", (253, 231, 37), "4"),
]

Drawn = Iterator[tuple[str, Numbers]]
"""Names of files, and the kinds of their pages."""


def _states_of(path: str) -> Numbers:
    """Of each page its number in `PageState`. Raises OSError."""
    hand_over(path)
    return states(path)


def _named(top: str) -> list[tuple[str, str]]:
    """The files at or below a path: paths, and names in a picture."""
    if not os.path.isdir(top):
        return [(top, os.path.basename(top))]
    return [(path, os.path.relpath(path, top)) for path in files(top)]


# -- what each page is


class _States:
    """Files by the states of their pages, those that are shared by the generation that they are of."""

    def __init__(self, mount: MountEntry, top: str) -> None:
        self._top = top
        self._chain = _chain(mount, top)
        self._frozen = "/.snap/" in os.path.realpath(top) + "/"
        last = len(self._chain) - 1
        self.kinds = [_ZERO, _FROZEN if self._frozen else _OWN, *map(self._shared, range(last + 1)), _ABSENT]

    def _shared(self, age: int) -> Kind:
        last = len(self._chain) - 1
        part = age / last if last else 0.5
        middle = [(1 - abs(2 * part - 1)) * c for c in BLUE]
        ends = [max(0, 1 - 2 * part) * a + max(0, 2 * part - 1) * b for a, b in zip(SKY, NAVY, strict=True)]
        red, green, blue = (round(a + b) for a, b in zip(middle, ends, strict=True))
        if not last:
            label = "shared with others"
        elif age == last:
            label = f"shared, as in {_short(self._chain[age])} or before"
        elif age == 0 and not self._frozen:
            label = f"shared, written since {_short(self._chain[1])}"
        else:
            label = f"shared, new in {_short(self._chain[age])}"
        return Kind(label, (red, green, blue), str(age))

    def draw(self) -> Drawn:
        for path, name in _named(self._top):
            found = _states_of(path)
            kinds = np.zeros(len(found), np.uint32)
            kinds[found == PageState.OWNED] = 1
            kinds[found == PageState.ABSENT] = len(self.kinds) - 1
            shared = found == PageState.SHARED
            if shared.any():
                kinds[shared] = 2 + self._ages(path, len(found))[shared]
            yield name, kinds

    def _ages(self, path: str, count: int) -> Numbers:
        """For each page of a file how many generations ago it was last written."""
        ages = np.full(count, len(self._chain) - 1, np.uint32)
        way = os.path.relpath(path, self._chain[0])
        for age in reversed(range(len(self._chain) - 1)):
            new, old = (os.path.join(each, way) for each in self._chain[age : age + 2])
            if not os.path.lexists(new):
                continue
            if not os.path.lexists(old):
                ages[:] = age
                continue
            for change in compare(old, new, with_runs=True):
                for first, stop in change.runs or ():
                    ages[first:stop] = age
        return ages


def _chain(mount: MountEntry, path: str) -> list[str]:
    """The directory of a path and the generations before it, the newest first: the nearest one that has any."""
    nearest = directory = path if os.path.isdir(path) else os.path.dirname(path)
    while True:
        found = [directory]
        while len(found) <= _GENERATIONS:
            try:
                told = json.loads(os.getxattr(found[-1], "user.ramfs.generation"))
            except OSError as exc:
                if exc.errno != errno.ENODATA:
                    raise
                break
            if told["parent"] is None:
                break
            found.append(os.path.join(mount.mountpoint, told["parent"]))
        if len(found) > 1 or os.path.basename(os.path.dirname(directory)) == ".snap":
            return found
        if os.path.samefile(directory, mount.mountpoint):
            return [nearest]
        directory = os.path.dirname(directory)


def _short(directory: str) -> str:
    """The name of a generation: that of the snapshot, or of the directory."""
    return os.path.basename(directory)


def _differences(old: str, new: str) -> Drawn:
    """Files by what has changed in them."""
    below = {name: path for path, name in _named(new)}
    for change in compare(old, new, with_runs=True):
        path = below.get(change.path)
        if path is None:  # it was removed, or is there since
            continue
        found = _states_of(path)
        kinds = (found != PageState.ZERO).astype(np.uint32)
        if change.state == "added":
            kinds[kinds == 1] = 2
        for first, stop in change.runs or ():
            kinds[first:stop] = 2
        yield change.path, kinds


def _touches(top: str) -> Drawn:
    """Files of a snapshot by when its clones touch their pages first."""
    try:
        with open(os.path.join(top, NAME), "rb") as file:
            sets = parse(file.read())
    except (FileNotFoundError, NotADirectoryError):
        text = f"{top} has no working set: name a snapshot that a guest has gone on from"
        raise FileError(errno.ENOENT, text) from None
    except ValueError as exc:
        raise FileError(errno.EUCLEAN, f"{os.path.join(top, NAME)} cannot be read: {exc}") from None
    total = sum(int(records["count"].sum()) for records in sets.values())
    times = np.concatenate([records["ms"] for records in sets.values()])
    counts = np.concatenate([records["count"] for records in sets.values()]).astype(np.int64)
    order = np.argsort(times, kind="stable")
    quarters = np.empty(len(order), np.uint32)
    quarters[order] = 2 + (np.cumsum(counts[order]) - 1) * 4 // max(1, total)
    begin = 0
    for name, records in sets.items():
        found = _states_of(os.path.join(top, os.fsdecode(name)))
        kinds = (found != PageState.ZERO).astype(np.uint32)
        each = quarters[begin : begin + len(records)]
        begin += len(records)
        for (_, first, count), quarter in zip(records.tolist(), each.tolist(), strict=True):
            kinds[first : first + count] = quarter
        yield os.fsdecode(name), kinds


@click.command("map", short_help="Draw which pages are what.")
@click.argument("path", metavar="PATH")
@click.option("-o", "--output", metavar="FILE", type=click.Path(), help="Write a picture: a name in .png or .svg.")
@click.option(
    "--layout",
    type=click.Choice(["rows", "hilbert"]),
    default="rows",
    show_default=True,
    help="How pages follow each other: in rows, or along a Hilbert curve, where near stays near.",
)
@click.option("--diff", "old", metavar="A", help="Draw which pages of A are others in PATH.")
@click.option("--working-set", is_flag=True, help="Draw in which order clones of the snapshot PATH touch its pages.")
@click.option("--json", "as_json", is_flag=True, help="Print the runs of pages as one JSON object instead.")
def map_(path: str, output: str | None, layout: str, old: str | None, working_set: bool, as_json: bool) -> None:
    """Draw the pages of a file, or of all files of a directory, by what they are.

    Zeros; pages of the file's own; shared ones, by the generation that they were written in (see log); frozen ones that
    no other file has; those that have not arrived. Without -o the picture is drawn on the terminal.
    """
    if not path or old == "":
        raise UsageError("PATH is empty: give a path on a ramfs mount")
    if old is not None and working_set:
        raise UsageError("--diff and --working-set are two pictures: give one of them")
    suffix = os.path.splitext(output)[1].lower() if output is not None else ""
    if output is not None and suffix not in _SAVE:
        raise UsageError(f"{output} is no name of a picture: let it end in .png or .svg")
    mount, _ = locate(path)
    top = os.path.realpath(path)
    with vanishing(path):
        if old is not None:
            if locate(old)[0].device != mount.device:
                raise UsageError(f"{old} and {path} lie in different mounts, so they share no pages")
            if os.path.isdir(old) != os.path.isdir(path):
                raise FileError(errno.ENOTDIR, f"one of {old} and {path} is a directory: give two of a kind")
            title, kinds, drawn = f"{path}, and what changed since {old}", _DIFFERENCE, _differences(old, top)
        elif working_set:
            title, kinds, drawn = f"What clones of {path} touch first", _TOUCHES, _touches(top)
        else:
            found = _States(mount, top)
            title, kinds, drawn = path, found.kinds, found.draw()
        panels = [_panel(name, numbers) for name, numbers in drawn if len(numbers)]
    picture = Picture(title, panels, kinds, hilbert=layout == "hilbert")
    if not panels:
        raise FileError(errno.ENODATA, f"{path} has no pages to draw")
    if output is not None:
        _SAVE[suffix](picture, output)
    if as_json:
        click.echo(json.dumps(_told(path, picture)))
    elif output is None:
        _show(picture)


def _panel(name: str, numbers: Numbers) -> Panel:
    starts = np.append(0, np.flatnonzero(numbers[1:] != numbers[:-1]) + 1)
    return Panel(name, len(numbers), np.stack([starts, numbers[starts].astype(np.int64)], axis=1))


def _told(path: str, picture: Picture) -> dict[str, Any]:
    """For JSON."""
    described = [
        {
            "path": panel.title,
            "pages": panel.pages,
            "runs": np.column_stack([panel.runs, np.append(panel.runs[1:, 0], panel.pages)])[:, [0, 2, 1]].tolist(),
        }
        for panel in picture.panels
    ]
    return {"path": path, "page_bytes": PAGE, "kinds": [kind.label for kind in picture.kinds], "files": described}


def _show(picture: Picture) -> None:
    from rich.console import Console

    console = Console()
    coloured = console.is_terminal and console.color_system is not None
    console.print(text(picture, console.width, console.height, coloured=coloured), crop=False)
