"""What the repository may hold. Style, types and the order of the rooms are checked by tools/test itself."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOP = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "docs",
    "pyproject.toml",
    "ramfs",
    "systemd",
    "tests",
    "tools",
}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths of all files in the repository, and of those that would be added to it."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listing.split("\0") if path and (ROOT / path).is_file()]


def test_the_top_holds_only_what_belongs_there(tracked: list[str]) -> None:
    assert {path.split("/")[0] for path in tracked} <= TOP


def test_no_paths_of_one_machine(tracked: list[str]) -> None:
    machine = re.compile(rb"(?<![\w.}/-])(?<!\w\")/(work|root|farm|home/\w+)/")
    found = [path for path in tracked if machine.search((ROOT / path).read_bytes())]
    # This file has to spell them.
    assert set(found) <= {"tests/lint/test_tree.py"}


def test_nothing_generated_is_kept(tracked: list[str]) -> None:
    generated = re.compile(r"\.(pyc|so|o|img|ram|xxh3|map|sqlite|ko|deb|gz|xz|zst)$|(^|/)(build|dist|\.venv)/")
    assert [path for path in tracked if generated.search(path)] == []
    assert [path for path in tracked if (ROOT / path).stat().st_size > 200_000] == []


def test_scripts_run(tracked: list[str]) -> None:
    """Whatever begins with #! in tools and .ci can be executed, and bash can parse its own."""
    scripts = [path for path in tracked if (ROOT / path).read_bytes().startswith(b"#!")]
    assert {".ci/run", "tools/setup", "tools/test"} <= set(scripts)
    for path in scripts:
        if "bash" in (ROOT / path).read_text().splitlines()[0]:
            subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)
        if path.startswith(("tools/", ".ci/")) and path.count("/") == 1:
            assert (ROOT / path).stat().st_mode & 0o111 == 0o111, path
