"""`ramfs map`: of which kind each page is, and that the pictures show it."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.conftest import run
from harness import Mount
from PIL import Image

from ramfs.cli._picture import GREEN, GREY, RED, Kind, Panel, Picture, hilbert, text

PAGE = 4096


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    base = tmp_path_factory.mktemp("map")
    with Mount(base / "store", base / "mnt") as mount:
        yield mount


def write(path: Path, first: int, count: int) -> None:
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.seek(first * PAGE)
        file.write(os.urandom(count * PAGE))


@pytest.fixture(scope="module")
def family(mount: Mount) -> Path:
    """A directory with two snapshots, and a clone of the second that has written too."""
    vm = mount.path / "vm"
    vm.mkdir()
    write(vm / "ram", 0, 100)
    write(vm / "small", 0, 1)
    os.truncate(vm / "ram", 1000 * PAGE)
    (vm / ".snap" / "one").mkdir()
    write(vm / "ram", 50, 100)
    (vm / ".snap" / "two").mkdir()
    run("clone", vm / ".snap" / "two", mount.path / "clone").ok()
    write(mount.path / "clone" / "ram", 140, 20)
    return vm


def kinds(*words: object) -> dict[str, list[tuple[int, int, str]]]:
    """The runs of each file, with the words of their kinds up to a comma or colon."""
    told: dict[str, Any] = json.loads(run("map", *words, "--json").ok())
    names = [re.split("[,:]", label)[0] if "shared" not in label else label for label in told["kinds"]]
    return {file["path"]: [(a, b, names[kind]) for a, b, kind in file["runs"]] for file in told["files"]}


def test_each_page_by_its_state_and_generation(family: Path) -> None:
    clone = family.parent / "clone"
    one, two = "shared, as in one or before", "shared, new in two"
    whole = [(0, 50, one), (50, 140, two), (140, 160, "its own"), (160, 1000, "zeros")]
    assert kinds(clone) == {"ram": whole, "small": [(0, 1, one)]}
    assert kinds(clone / "ram") == {"ram": whole}
    assert kinds(family)["ram"] == [(0, 50, one), (50, 150, two), (150, 1000, "zeros")]
    assert kinds(family / ".snap" / "one")["ram"] == [
        (0, 50, "shared with others"),
        (50, 100, "frozen"),
        (100, 1000, "zeros"),
    ]


def test_what_has_changed(family: Path) -> None:
    snap = family / ".snap"
    found = kinds(snap / "two", "--diff", snap / "one")
    assert found["ram"] == [(0, 50, "as before"), (50, 150, "changed"), (150, 1000, "zeros")]
    assert found["small"] == [(0, 1, "as before")]
    found = kinds(family.parent / "clone" / "ram", "--diff", snap / "two" / "ram")
    assert found["ram"][1:3] == [(140, 160, "changed"), (160, 1000, "zeros")]


def test_pages_that_arrive_and_very_many_runs(mount: Mount, tmp_path: Path) -> None:
    raw = tmp_path / "raw.img"
    with open(raw, "wb") as file:
        for page in range(0, 20_000, 2):
            os.pwrite(file.fileno(), b"x" * PAGE, page * PAGE)
    run("pull", f"file:{raw}", mount.path / "pulled", "--paused").ok()
    [found] = kinds(mount.path / "pulled").values()
    assert {kind for _, _, kind in found} <= {"arriving", "zeros"}
    with open(next((mount.path / "pulled").iterdir()), "r+b") as file:
        for page in range(0, 20_000, 2):
            file.seek(page * PAGE)
            file.write(b"y" * PAGE)
    [found] = kinds(mount.path / "pulled").values()
    assert [(a, b) for a, b, kind in found if kind == "its own"] == [(page, page + 1) for page in range(0, 20_000, 2)]


@pytest.mark.parametrize("layout", ["rows", "hilbert"])
def test_a_png_shows_them(family: Path, tmp_path: Path, layout: str) -> None:
    clone, out = family.parent / "clone", tmp_path / "map.png"
    assert run("map", clone / "ram", "-o", out, "--layout", layout).ok() == ""
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert 700 < pixels.shape[1] < 1400
    colours = Counter(map(tuple, pixels.reshape(-1, 3).tolist()))
    # 1000 squares in rows of 32: each has 16 x 16 pixels, and some words stand on them.
    for colour, pages in ((RED, 20), (GREY, 840)):
        drawn = max(count for each, count in colours.items() if np.abs(np.subtract(each, colour)).max() <= 2)
        assert abs(drawn - pages * 256) < 0.1 * pages * 256 + 800, (colour, drawn)


def test_an_svg_shows_them(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.svg"
    run("map", family.parent / "clone", "-o", out).ok()
    root = ET.parse(out).getroot()
    areas: Counter[int] = Counter()
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        lengths = re.findall(r"h(\d+)v1", path.get("d") or "")
        if lengths:
            areas[sum(map(int, lengths))] += 1
    assert areas == Counter({840: 1, 90: 1, 50: 1, 20: 1, 1: 1})
    said = "".join(root.itertext())
    for words in ("ram, 3.9 MiB", "its own, in no other file: 80.0 KiB, 2.0 %", "0x40000", "one square is 4.0 KiB"):
        assert words in said


def test_on_a_terminal(family: Path) -> None:
    out = run("map", family.parent / "clone", env={"COLUMNS": "80", "LINES": "60"}).ok()
    letters = "".join(line.split(" ", 1)[1] for line in (each.strip() for each in out.splitlines()) if line[:2] == "0x")
    assert Counter(letters.replace(" ", ""))["O"] == 20
    kinds = [Kind("first", RED, "1"), Kind("second", GREEN, "2")]
    panel = Panel("file", 100_000, np.array([[0, 0], [50_000, 1]]))
    drawn = text(Picture("file", [panel], kinds, hilbert=True), 80, 40, coloured=True)
    assert drawn.plain.count("▀") == 64 * 32
    assert "first: 195.3 MiB, 50.0 %" in drawn.plain
    assert Picture("", [panel], kinds).scale(1 << 16) == 2


def test_squares_of_several_pages_have_the_mean_of_their_colours() -> None:
    panel = Panel("file", 10, np.array([[0, 0], [6, 1], [9, 0]]))
    assert panel.shares(2, 4).tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5]]
    assert panel.amounts(2).tolist() == [7, 3]


def test_the_curve_visits_each_square_once_and_next_to_the_last() -> None:
    for order in range(7):
        x, y = hilbert(np.arange(4**order), order)
        assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == 4**order
        assert (np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1).all()
        assert x.max(initial=0) == y.max(initial=0) == (1 << order) - 1


def test_what_cannot_be_drawn(family: Path, tmp_path: Path) -> None:
    run("map", family, "-o", tmp_path / "map.gif").failed(2, "map.gif", ".png or .svg")
    run("map", family, "-o", tmp_path / "no" / "map.svg").failed(1, "map.svg")
    run("map", tmp_path).failed(8, "does not lie in a ramfs mount")
    run("map", family / "none").failed(1, "none")
    run("map", family, "--diff", family / "ram").failed(1, "is a directory")
    run("map", family, "--diff", family, "--working-set").failed(2, "two pictures")
    run("map", family / ".snap" / "one", "--working-set").failed(1, "no working set")
    (family.parent / "empty").mkdir()
    run("map", family.parent / "empty").failed(1, "no pages")
