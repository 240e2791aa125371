"""What was measured, what it is compared with, and how it is printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SUBJECT = "ramfs"


@dataclass(frozen=True)
class Goal:
    """The subject's median against a peer's (as a ratio), or against a fixed value."""

    limit: float
    at_least: bool = False
    against: str | None = None
    subject: str = SUBJECT
    worst_round: bool = False

    def value(self, samples: Mapping[str, Sequence[float]]) -> float | None:
        """The figure that the goal is about, or None where one side was not measured."""
        mine = samples.get(self.subject)
        if not mine:
            return None
        figure = max(mine) if self.worst_round else statistics.median(mine)
        if self.against is None:
            return figure
        theirs = samples.get(self.against)
        return figure / statistics.median(theirs) if theirs else None

    def met(self, samples: Mapping[str, Sequence[float]]) -> bool | None:
        value = self.value(samples)
        if value is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit

    def sentence(self, samples: Mapping[str, Sequence[float]], unit: str) -> str:
        what = f"{self.subject} / {self.against}" if self.against else self.subject
        if self.worst_round:
            what += ", worst round"
        sign = "at least" if self.at_least else "at most"
        suffix = "" if self.against else f" {unit}"
        value = self.value(samples)
        if value is None:
            return f"{what}: not measured (goal: {sign} {self.limit:g}{suffix})"
        verdict = "met" if self.met(samples) else "MISSED"
        return f"{what} = {number(value)}{suffix} (goal: {sign} {self.limit:g}): {verdict}"

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Goal:
        at_least = "at_least" in told
        limit = told["at_least" if at_least else "at_most"]
        return cls(limit, at_least, told["against"], told["subject"], told["worst_round"])


@dataclass
class Measure:
    """One quantity, measured once a round for each contender."""

    title: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    goals: Sequence[Goal] = ()
    less_is_better: bool = True

    def add(self, contender: str, value: float) -> None:
        self.samples.setdefault(contender, []).append(value)

    def ratio(self, who: str) -> float | None:
        """The subject's median over that contender's; of "CONTENDER, PART" with the subject's of the same part."""
        words = who.split(", ")
        parts = [SUBJECT, *(", ".join([SUBJECT, *words[at:]]) for at in range(1, len(words)))]
        mine = next((self.samples[part] for part in parts if part in self.samples), None)
        median = statistics.median(self.samples[who])
        return statistics.median(mine) / median if mine and median and not who.startswith(SUBJECT) else None

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Measure:
        goals = [Goal.from_json(each) for each in told["goals"]]
        return cls(told["title"], told["unit"], told["samples"], goals, told["less_is_better"])

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "less_is_better": self.less_is_better,
            "samples": self.samples,
            "medians": {who: statistics.median(values) for who, values in self.samples.items()},
            "goals": [
                {
                    "subject": goal.subject,
                    "against": goal.against,
                    "worst_round": goal.worst_round,
                    "at_least" if goal.at_least else "at_most": goal.limit,
                    "value": goal.value(self.samples),
                    "met": goal.met(self.samples),
                }
                for goal in self.goals
            ],
        }

    def show(self) -> str:
        better = "less is better" if self.less_is_better else "more is better"
        lines = [f"  {self.title} ({self.unit}, {better})"]
        for who, values in self.samples.items():
            median = statistics.median(values)
            spread = f"[{number(min(values))} .. {number(max(values))}]"
            times = self.ratio(who)
            ratio = "" if times is None else f"   ramfs is {number(times)}x this"
            lines.append(f"    {who:<50}{number(median):>10}   {spread:<24}{ratio}".rstrip())
        lines += [f"    -> {goal.sentence(self.samples, self.unit)}" for goal in self.goals]
        return "\n".join(lines)


@dataclass
class Curve:
    """One quantity over another one, such as a time over a size, measured once a round for each contender and point."""

    title: str
    unit: str
    x: str
    """what it is measured over, with its unit"""
    samples: dict[str, dict[float, list[float]]] = field(default_factory=dict)
    less_is_better: bool = True
    logarithmic: bool = True
    """are both axes of its plot?"""
    goals: Sequence[Goal] = ()
    """none: what has a goal is a Measure"""

    def add(self, contender: str, x: float, value: float) -> None:
        self.samples.setdefault(contender, {}).setdefault(x, []).append(value)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Curve:
        samples = {who: dict(points) for who, points in told["samples"].items()}
        return cls(told["title"], told["unit"], told["x"], samples, told["less_is_better"], told["logarithmic"])

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "x": self.x,
            "less_is_better": self.less_is_better,
            "logarithmic": self.logarithmic,
            "samples": {who: [[x, values] for x, values in points.items()] for who, points in self.samples.items()},
        }

    def show(self) -> str:
        better = "less is better" if self.less_is_better else "more is better"
        lines = [f"  {self.title} ({self.unit}, {better})"]
        xs = sorted({x for points in self.samples.values() for x in points})
        lines.append(f"    {self.x:<38}" + "".join(f"{number(x):>10}" for x in xs))
        for who, points in self.samples.items():
            medians = (number(statistics.median(points[x])) if x in points else "" for x in xs)
            lines.append(f"    {who:<38}" + "".join(f"{each:>10}" for each in medians))
        return "\n".join(lines)


def from_json(told: Mapping[str, Any]) -> Measure | Curve:
    return Curve.from_json(told) if "x" in told else Measure.from_json(told)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def summary(measures: Sequence[Measure | Curve]) -> str:
    """One line for each goal, the missed ones first, then how many were met."""
    verdicts = [(goal.met(m.samples), m, goal) for m in measures for goal in m.goals]
    open_ones = [f"  {m.title}: {goal.sentence(m.samples, m.unit)}" for met, m, goal in verdicts if not met]
    met = sum(1 for verdict, _, _ in verdicts if verdict)
    missed = sum(1 for verdict, _, _ in verdicts if verdict is False)
    closing = f"{met} goals met, {missed} missed, {len(verdicts) - met - missed} not measured"
    return "\n".join([*open_ones, closing])
