"""tools/bench: what it keeps, what it makes of that, and a run that is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import mounts_below

from tools.benchmarks import __main__ as tool
from tools.benchmarks import report
from tools.benchmarks.bench import Bench
from tools.benchmarks.stats import Curve, Goal, Measure

ROOT = Path(__file__).parents[2]
PEER = "a|peer"


@pytest.fixture
def measure() -> Measure:
    goals = [
        Goal(0.5, against=PEER),
        Goal(4.0, subject="ramfs, half", worst_round=True),
        Goal(1.0, True, against="nobody"),
    ]
    return Measure("a fault", "us", {"ramfs": [3.0, 1.0, 2.0], PEER: [10.0], "ramfs, half": [4.0, 5.0]}, goals)


@pytest.fixture
def curve() -> Curve:
    return Curve("a clone", "ms", "GiB", {"ramfs": {1: [1.0, 2.0], 16: [3.0]}, PEER: {1: [9.0]}})


def written(path: Path, name: str, *found: Measure | Curve, cores: int = 2) -> Path:
    told = {"about": f"about {name}", "command": f"tools/bench {path.name}", "mib": 64, "seconds": 1.0, "load": 0.5}
    told |= {"busy": 0.5, "steal": 0.0, "measures": [each.as_json() for each in found]}
    path.write_text(
        json.dumps({"machine": {"cores": cores, "commit": path.name}, "cases": {name: told}, "missing": {}})
    )
    return path


def run(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    try:
        return tool.main()
    except SystemExit as ended:
        return int(ended.code or 0)


def test_what_was_written_is_read_again(tmp_path: Path, measure: Measure, curve: Curve) -> None:
    document = report.merged([written(tmp_path / "a", "one", measure, curve)], ["one"])
    assert report.found(document) == [measure, curve]


def test_of_each_case_the_last_counts(tmp_path: Path, measure: Measure, curve: Curve) -> None:
    files = [written(tmp_path / "a", "one", measure), written(tmp_path / "b", "two", measure)]
    files.append(written(tmp_path / "c", "one", curve))
    document = report.merged(files, ["two"])
    assert list(document["cases"]) == ["two", "one"]
    assert report.found(document) == [measure, curve]
    assert document["commands"] == ["tools/bench b", "tools/bench c"]
    with pytest.raises(report.Unreadable, match="another machine, or with another version: cores"):
        report.merged([files[0], written(tmp_path / "d", "two", measure, cores=3)], [])


def test_the_table_has_each_figure_and_goal(tmp_path: Path, measure: Measure, curve: Curve) -> None:
    lines = report.table(report.merged([written(tmp_path / "a", "one", measure, curve)], [])).splitlines()
    goals = [r"at most 0.5 of a\|peer: 0.2, met", "ramfs, half at most 4: **5.00, missed**"]
    goals.append("at least 1 of nobody: not measured")
    assert [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in lines[2:]] == [
        [
            "one",
            "a fault, us",
            "2.00 (1.00 to 3.00)<br>half 4.50 (4.00 to 5.00)",
            r"a\|peer 10.0: 0.2",
            "<br>".join(goals),
        ],
        ["one", "a clone, ms, by GiB", "at 1.00 1.50; at 16.0 3.00", r"a\|peer at 1.00 9.00", ""],
    ]


def test_pictures_are_the_same_for_the_same_figures(tmp_path: Path, measure: Measure, curve: Curve) -> None:
    document = report.merged([written(tmp_path / "a", "one", measure, curve)], [])
    document["cases"]["empty"] = {**document["cases"]["one"], "measures": [Measure("none", "s").as_json()]}
    pictures = [report.plots(document, tmp_path / name, "svg") for name in "xy"]
    assert [[path.name for path in each] for each in pictures] == [["one.svg"]] * 2
    first, second = (each[0].read_text() for each in pictures)
    assert first == second
    for words in ("a fault (us, less is better)", PEER, "2.00  (1.00 to 3.00)", "a clone (ms, less is better)"):
        assert words in first


def test_a_page_is_written_between_its_markers(tmp_path: Path, measure: Measure) -> None:
    document = report.merged([written(tmp_path / "a", "one", measure)], [])
    page, pictures = tmp_path / "page.md", tmp_path / "plots"
    markers = [
        f"<!-- {name}, by tools/bench -->\nold\n<!-- end of {name} -->" for name in ("machine", "figures", "plots")
    ]
    page.write_text("Head\n" + "\nBetween\n".join(markers) + "\nTail\n")
    report.write_page(document, page, pictures)
    once = page.read_text()
    report.write_page(document, page, pictures)
    assert page.read_text() == once
    assert "old" not in once
    assert once.count("Between") == 2
    assert "![one](plots/one.svg)" in once
    assert (pictures / "one.svg").exists()
    page.write_text("nothing")
    with pytest.raises(report.Unreadable, match="has no lines <!-- machine"):
        report.write_page(document, page, pictures)


def test_the_pictures_of_the_docs_are_those_that_they_show() -> None:
    shown = re.findall(r"\]\((plots/[^)]+)\)", report.PAGE.read_text())
    assert sorted(set(shown)) == sorted(f"plots/{path.name}" for path in report.PLOTS.glob("*.svg"))


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--only", "nope"], 2, "invalid choice: 'nope'"),
        (["--rounds", "0"], 2, "at least 1"),
        (["--size", "100"], 2, "a power of two"),
        (["--from", "/missing"], 1, "/missing: No such file"),
        (["--from", "pyproject.toml"], 1, "not what --json writes"),
        (["--from", "x", "--quick"], 2, "--from measures nothing"),
        (["--json", "/missing/file"], 1, "/missing/file"),
    ],
)
def test_wrong_arguments(
    words: list[str], code: int, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, monkeypatch=monkeypatch) == code
    out, errors = capsys.readouterr()
    assert out == ""
    assert len(errors.splitlines()) == 1
    assert what in errors


def test_cases_that_take_long_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", monkeypatch=monkeypatch) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(listed) == list(tool.CASES)
    assert listed["tuning"].endswith("(only when asked for)")


def test_a_case_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bench = Bench(tmp_path, [], 0, 9, print)

    def rounds(until: float, more: int = 0) -> int:
        now[0], bench.until = 0.0, until
        for number in bench.each_round(more):
            assert number <= 9
            now[0] += 1
        return int(now[0])

    assert rounds(float("inf")) == 9
    assert rounds(5) == 5
    assert rounds(0) == 2
    assert rounds(10, more=1) == 5


def test_what_was_measured_until_an_interrupt_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "found.json"
    words = ["--rounds", "1", "--size", "64", "--only", "write", "--only", "sequential", "--json", kept, "--table"]
    words += ["--scratch", tmp_path]
    command = [sys.executable, "-m", "tools.benchmarks", *map(str, words)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2 of 2: sequential"):
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, rest + errors
    assert errors == "\ninterrupted; everything started was stopped and unmounted\n"
    document = json.loads(kept.read_text())
    assert list(document["cases"]) == ["write"]
    assert {len(values) for each in document["cases"]["write"]["measures"] for values in each["samples"].values()} == {
        1
    }
    assert "| write | write(2) in calls of 1 MiB, with fsync, GB/s |" in rest
    assert list(tmp_path.iterdir()) == [kept]
    assert mounts_below(tmp_path) == []
