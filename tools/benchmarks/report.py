"""What runs have written with --json: put together, as a table, as pictures, and in docs/benchmarks.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench import ROOT
from .stats import SUBJECT, Curve, Goal, Measure, from_json, number

PAGE, PLOTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "plots"
#: Facts of a machine that may differ between runs which are put together.
PASSING = ("load_before", "commit")

Document = dict[str, Any]


class Unreadable(Exception):
    """A file that no run has written, or runs that cannot be put together; the message is one line."""


def merged(paths: Sequence[Path], order: Sequence[str]) -> Document:
    """What several runs have found, of each case the last; the cases in this order, then others."""
    whole: Document = {"machine": {}, "commands": [], "cases": {}, "missing": {}}
    for path in paths:
        try:
            document = json.loads(path.read_text())
            facts, cases = document["machine"], document["cases"]
            for told in cases.values():
                measures(told)
        except OSError as error:
            raise Unreadable(f"{path}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unreadable(f"{path}: not what --json writes") from error
        before = whole["machine"]
        other = [key for key in facts if before and key not in PASSING and before.get(key) != facts[key]]
        if other:
            raise Unreadable(f"{path}: measured on another machine, or with another version: {', '.join(other)}")
        whole["machine"] = {**before, **facts}
        whole["cases"] |= cases
        whole["missing"] |= document["missing"]
    found = whole["cases"]
    whole["cases"] = {name: found[name] for name in [*order, *found] if name in found}
    whole["commands"] = list(dict.fromkeys(told["command"] for told in whole["cases"].values()))
    return whole


def measures(told: Document) -> list[Measure | Curve]:
    """Of one case."""
    return [from_json(each) for each in told["measures"]]


def found(document: Document) -> list[Measure | Curve]:
    return [each for told in document["cases"].values() for each in measures(told)]


def table(document: Document) -> str:
    """Every figure and every goal, in Markdown: medians, smallest and largest round, ratios to ramfs."""
    lines = ["| case | what | ramfs | others, and ramfs as a ratio to each | goal |", "|---|---|---|---|---|"]
    for name, told in document["cases"].items():
        if "failed" in told:
            lines.append(f"| {name} | failed: {escaped(told['failed'])} | | | |")
        for each in measures(told):
            cells = curve_cells(each) if isinstance(each, Curve) else measure_cells(each)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_cells(measure: Measure) -> list[str]:
    columns: dict[bool, list[str]] = {True: [], False: []}
    for who, values in measure.samples.items():
        times = measure.ratio(who)
        ratio = "" if times is None else f": {number(times)}"
        columns[who.startswith(SUBJECT)].append(f"{label(who)}{figure(values)}{ratio}")
    goals = [verdict(goal, measure) for goal in measure.goals]
    what = escaped(measure.title) + (f", {measure.unit}" if measure.unit else "")
    return [what, *map("<br>".join, (columns[True], columns[False], goals))]


def curve_cells(curve: Curve) -> list[str]:
    """The figures at the ends."""
    columns: dict[bool, list[str]] = {True: [], False: []}
    for who, points in curve.samples.items():
        ends = dict.fromkeys((min(points), max(points)))
        told = "; ".join(f"at {number(x)} {number(statistics.median(points[x]))}" for x in ends)
        columns[who.startswith(SUBJECT)].append(f"{label(who)}{told}")
    what = f"{escaped(curve.title)}, {curve.unit}, by {escaped(curve.x)}"
    return [what, *map("<br>".join, (columns[True], columns[False])), ""]


def label(who: str) -> str:
    return "" if who == SUBJECT else f"{escaped(who.removeprefix(f'{SUBJECT}, '))} "


def figure(values: Sequence[float]) -> str:
    median = number(statistics.median(values))
    return f"{median} ({number(min(values))} to {number(max(values))})" if len(values) > 1 else median


def verdict(goal: Goal, measure: Measure) -> str:
    value = goal.value(measure.samples)
    sign = "at least" if goal.at_least else "at most"
    subject = "" if goal.subject == SUBJECT else f"{escaped(goal.subject)} "
    limit = f"{subject}{sign} {goal.limit:g}" + (f" of {escaped(goal.against)}" if goal.against else "")
    if value is None:
        return f"{limit}: not measured"
    return f"{limit}: {number(value)}, met" if goal.met(measure.samples) else f"{limit}: **{number(value)}, missed**"


def escaped(text: str) -> str:
    return re.sub(r"([|*_<`])", r"\\\1", " ".join(text.split()))


def plots(document: Document, directory: Path, suffix: str) -> list[Path]:
    """A picture for each case."""
    try:
        from .plots import draw  # noqa: PLC0415  (needs matplotlib, and nothing else does)
    except ImportError as error:
        raise Unreadable(f"cannot draw: {error}; tools/setup installs what is needed") from error
    directory.mkdir(parents=True, exist_ok=True)
    drawn = [draw(name, measures(told), directory, suffix) for name, told in document["cases"].items()]
    return [path for path in drawn if path]


def machine(document: Document) -> str:
    """Facts and commands, for a page."""
    facts = {key: value for key, value in document["machine"].items() if key != "load_before"}
    commands = "\n".join(f"    {command}" for command in document["commands"])
    return commands + "\n\n" + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()) + "."


def gallery(document: Document, pictures: Sequence[Path], page: Path) -> str:
    """The pictures, each with what was measured, how long that took and what else the machine did."""
    drawn = {path.stem: path.relative_to(page.parent) for path in pictures}
    blocks = []
    for name, told in document["cases"].items():
        if name in drawn:
            about = told["about"][0].upper() + told["about"][1:]
            busy = f"load {told['load']:g}, {told['steal']:.1%} stolen"
            blocks.append(
                f"**{name}.** {about} ({told['mib']} MiB, {told['seconds']:.0f} s, {busy}).\n\n![{name}]({drawn[name]})"
            )
    return "\n\n".join(blocks)


def write_page(document: Document, page: Path, directory: Path) -> None:
    """Put table, machine and pictures where the page has its markers."""
    text = page.read_text()
    for old in directory.glob("*.svg"):
        old.unlink()
    pictures = plots(document, directory, "svg")
    parts = {"machine": machine(document), "figures": table(document), "plots": gallery(document, pictures, page)}
    for name, part in parts.items():
        begin, end = f"<!-- {name}, by tools/bench -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise Unreadable(f"{page}: has no lines {begin} and {end}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
