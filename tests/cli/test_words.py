"""What the commands say of themselves, and that the man page and the README say the same."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli.conftest import Outcome, call, run

from ramfs.cli import cli, main
from ramfs.cli.mount import IGNORED, OURS, PASSED
from ramfs.errors import EXIT_CODES, RamfsError

ROOT = Path(__file__).parents[2]
CONTEXT = click.Context(cli)
COMMANDS = cli.list_commands(CONTEXT)


def command(name: str) -> click.Command:
    found = cli.get_command(CONTEXT, name)
    assert found is not None
    return found


def options(name: str) -> set[str]:
    """Every option of a command that its help shows, in all spellings."""
    return {
        spelling
        for parameter in command(name).params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for spelling in parameter.opts
    }


def arguments(name: str) -> list[str]:
    return [param.human_readable_name for param in command(name).params if isinstance(param, click.Argument)]


def required(name: str) -> list[str]:
    """The options that a command cannot do without."""
    options = [param for param in command(name).params if isinstance(param, click.Option) and param.required]
    return [word for option in options for word in (option.opts[0], "1")]


@pytest.fixture(scope="module")
def man() -> dict[str, str]:
    """The text of the man page by its sections, as it is shown."""
    done = subprocess.run(
        ["man", "-l", "-E", "UTF-8", "--warnings=w", ROOT / "docs/ramfs.1"],
        capture_output=True,
        check=True,
        env={"MANWIDTH": "1000", "MAN_KEEP_FORMATTING": "0", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )
    assert done.stderr == b""
    text = re.sub(r".\x08", "", done.stdout.decode()).replace("\u2010", "-").replace("\u2212", "-")
    parts = re.split(r"(?m)^([A-Z][A-Z ]+)$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def man_commands(man: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Each command of the section COMMANDS, with its synopsis and what is told of it."""
    for part in re.split(r"(?m)^   (?=ramfs )", man["COMMANDS"])[1:]:
        yield part.split()[1], part


def readme_table(first: str) -> list[list[str]]:
    """The rows of the table in the README whose head begins with a word."""
    lines = iter((ROOT / "README.md").read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {first} "):
            next(lines)
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    assert rows
    return rows


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(name: str) -> None:
    out = run(name, "-h" if name == "status" else "--help").ok()
    assert out.startswith(f"Usage: ramfs {name} ")
    assert all(spelling in out for spelling in options(name))


def test_the_group_lists_commands_and_exit_codes() -> None:
    out = run("--help").ok()
    for name in COMMANDS:
        assert re.search(rf"(?m)^  {name} +\S", out), out
    for code, meaning in EXIT_CODES:
        assert re.search(rf"(?m)^ +{code}  {re.escape(meaning)}$", out), out


def test_version() -> None:
    assert re.fullmatch(r"ramfs, version \d+\.\d+\.\d+\S*\n", run("--version").ok())


def test_no_arguments_at_all_is_help_and_an_error() -> None:
    done = run()
    assert done.code == 2
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["bogus"], ["bogus", "ramfs --help"]),
        (["--bogus"], ["--bogus"]),
        *(([name, "--bogus"], ["--bogus", f"ramfs {name} --help"]) for name in COMMANDS),
        *(
            ([name], ["Missing argument", arguments(name)[0].upper()])
            for name in COMMANDS
            if name not in {"status", "send"}
        ),
        *(
            ([name, *required(name), *"abcde"[: len(arguments(name)) + 1]], ["unexpected extra argument"])
            for name in COMMANDS
        ),
        (["mount", "-o"], ["-o"]),
        (["mount", "", "m"], ["STORE is empty"]),
        (["mount", "s", ""], ["MOUNTPOINT is empty"]),
        (["umount", ""], ["MOUNTPOINT is empty"]),
        (["clone", "", "x"], ["SOURCE is empty"]),
        (["send"], ["SNAPSHOT"]),
        (["receive", ""], ["DIR is empty"]),
        (["clone", "x", ""], ["TARGET is empty"]),
        (["snapshot", "--rounds", "many", "d", "n"], ["many"]),
        (["snapshot", "--rounds", "-1", "d", "n"], ["-1"]),
        (["pull", "", "d"], ["URI is empty"]),
        (["pull", "nbd://h/", ""], ["DIR is empty"]),
        (["pull", "ram.img", "d"], ["ram.img", "nbd://"]),
        (["pull", "nbd+unix:///x", "d"], ["socket"]),
        (["pull", "file:", "d"], ["file:PATH"]),
        (["pull", "fault:nonsense=1:file:x", "d"], ["nonsense"]),
        (["pull", "--rate", "fast", "nbd://h/", "d"], ["fast", "100M"]),
        (["pull", "--rate", "-1", "nbd://h/", "d"], ["-1", "100M"]),
        (["pull", "--deadline", "-1", "nbd://h/", "d"], ["-1"]),
        (["pull", "--deadline", "1", "--on-error", "wait", "nbd://h/", "d"], ["--on-error"]),
        (["pull", "--wait", "--paused", "nbd://h/", "d"], ["--paused"]),
        (["recover", "d"], ["--source"]),
        (["pause", ""], ["DIR is empty"]),
        (["mount", "-o", "nonsense", "s", "m"], ["nonsense", "allow_other"]),
        (["mount", "-o", "noatime,max_read=4096", "s", "m"], ["max_read=4096"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_command_lines(
    args: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(args)  # as `python -m ramfs` does; a process for each would be a hundred
    Outcome(code, *capfd.readouterr()).failed(16 if args[0] == "fsck" else 2, *words)  # fsck(8) has codes of its own
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["clone", "du", "pause", "snapshot", "status"])
def test_a_path_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    missing = tmp_path / "mis sing"
    run(name, missing, *(["x"] if name in {"clone", "snapshot"} else [])).failed(1, missing, "No such file")


@pytest.mark.parametrize("name", ["clone", "du", "pause", "snapshot", "status"])
def test_a_path_on_another_file_system_is_told(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, *(["x"] if name in {"clone", "snapshot"} else [])).failed(8, tmp_path, "ramfs mount")


def test_errors_have_documented_exit_codes() -> None:
    def kinds(base: type[RamfsError]) -> Iterator[type[RamfsError]]:
        yield base
        for kind in base.__subclasses__():
            yield from kinds(kind)

    for module in COMMANDS:
        importlib.import_module(f"ramfs.cli.{module}")
    own = {kind.exit_code for kind in kinds(RamfsError) if kind.__module__ == "ramfs.errors"}
    assert own <= {code for code, _ in EXIT_CODES}


def test_a_closed_pipe_is_no_error() -> None:
    done = call("sh", "-c", '"$0" -P -m ramfs --help | true; "$0" -P -m ramfs --help | head -n 1', sys.executable)
    assert (done.code, done.err) == (0, "")


# --- man page ---


def test_the_man_page_has_every_command_and_option(man: dict[str, str]) -> None:
    told = dict(man_commands(man))
    assert sorted(told) == sorted(COMMANDS)
    for name, text in told.items():
        words = {word.strip("[],.()|") for word in text.split()}
        given = {word for word in words if re.fullmatch(r"--?[a-zA-Z][a-z-]*", word)}
        own = options(name)
        assert own <= given, f"the man page lacks {own - given} of {name}"
        assert given <= own, f"{name} has no {given - own}"
        head = text.split("\n\n")[0]
        for argument in arguments(name):
            assert argument.upper() in head.upper(), (name, argument)


def test_the_man_page_has_every_exit_code(man: dict[str, str]) -> None:
    found = dict(re.findall(r"(?m)^ +(\d+) +(\S.*)$", man["EXIT STATUS"]))
    for code, meaning in EXIT_CODES:
        assert found[str(code)].rstrip(".") == meaning


def test_the_man_page_has_every_mount_option(man: dict[str, str]) -> None:
    words = set(re.findall(r"[\w=-]+", man["MOUNT OPTIONS"]))
    assert words >= OURS | PASSED | IGNORED


# --- README ---


def test_the_readme_has_every_command_and_option() -> None:
    rows = {row[0].strip("`").split()[1]: row for row in readme_table("command")}
    assert sorted(rows) == sorted(COMMANDS)
    for name, row in rows.items():
        given = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(re.findall(r"`([^`]*)`", " ".join(row)))))
        assert given <= options(name), f"{name} has no {given - options(name)}"
        for parameter in command(name).params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert given & set(parameter.opts), f"the README lacks {parameter.opts} of {name}"


def test_the_readme_has_every_mount_option_and_exit_code() -> None:
    given = {word for row in readme_table("option") for word in re.findall(r"`([\w=]+)`", row[0])}
    assert OURS | {"allow_other"} <= given <= OURS | PASSED
    assert [(int(row[0]), row[1]) for row in readme_table("code")] == list(EXIT_CODES)
