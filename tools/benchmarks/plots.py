"""Pictures of what was measured, one for each case: readable on light and dark pages, the same for the same figures."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .stats import SUBJECT, Curve, Goal, Measure, number

#: Inches.
WIDTH, ROW, HEAD, FOOT, GAP, EDGE = 9.5, 0.4, 0.42, 0.28, 0.25, 0.1
PLOT, AXIS, LEGEND = 2.2, 0.5, 0.17  # of curves
#: Text and lines that have the same contrast on white and on a dark page.
INK = "#757d87"
OURS, THEIRS = "#e8590c", "#6b8fb5"
MET, MISSED = "#2f9e44", "#e03131"
LINES = ("#3b82c4", "#2f9e66", "#a05bc0", "#b8860b", "#c2577a", "#4aa3a2", "#808790")
#: Where the largest figure is so many times the smallest, bars would not show the small ones.
LOGARITHMIC = 40.0

mpl.rcParams.update(
    {
        "svg.hashsalt": "ramfs",
        "svg.fonttype": "none",  # text that can be found and read aloud
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        # Each text in an SVG names all of them.
        "font.sans-serif": ["DejaVu Sans", "sans-serif"],
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }
)


def draw(case: str, measures: Sequence[Measure | Curve], directory: Path, suffix: str = "svg") -> Path | None:
    """Write DIRECTORY/CASE.SUFFIX, a panel for each measure; None where nothing was measured."""
    shown = [each for each in measures if each.samples]
    if not shown:
        return None
    boxes, total = arranged(shown)
    goals = any(each.goals for each in shown)
    total += EDGE + (0.3 if goals else 0)
    figure = Figure(figsize=(WIDTH, total))
    for each, (left, below, wide) in zip(shown, boxes, strict=True):
        top, tall = total - EDGE - below, height(each)
        alone = wide == WIDTH
        if isinstance(each, Curve):
            box = left + 0.6, top - HEAD - PLOT, wide - (3.2 if alone else 0.7), PLOT
        else:
            box = left + EDGE, top - tall + FOOT, wide - 2 * EDGE, tall - FOOT - HEAD
        axes = figure.add_axes((box[0] / WIDTH, box[1] / total, box[2] / WIDTH, box[3] / total))
        axes.patch.set_alpha(0)
        figure.text((left + EDGE) / WIDTH, top / total, title(each), va="top", fontsize=9.5, fontweight="bold")
        if isinstance(each, Curve):
            lines(axes, each, beside=alone)
        else:
            bars(axes, each)
    if goals:
        at = EDGE / WIDTH, 0.06 / total
        figure.text(*at, "dashed: the goal; green where it was met, red where it was missed", fontsize=8)
    path = directory / f"{case}.{suffix}"
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else None
    figure.savefig(path, format=suffix, transparent=True, dpi=144, metadata=metadata)
    return path


def arranged(shown: Sequence[Measure | Curve]) -> tuple[list[tuple[float, float, float]], float]:
    """For each its left edge, top and width, and the height of all: in two columns, unless there is one alone."""
    half = (WIDTH - GAP) / 2
    ends = [0.0, 0.0]  # of the two columns
    boxes = []
    for each in shown:
        column = ends.index(min(ends))
        boxes.append((column * (half + GAP), ends[column], half if len(shown) > 1 else WIDTH))
        ends[column] += height(each) + GAP
    return boxes, max(ends) - GAP


def title(each: Measure | Curve) -> str:
    better = "less" if each.less_is_better else "more"
    unit = f"{each.unit}, " if each.unit else ""
    return "\n".join(textwrap.wrap(f"{each.title} ({unit}{better} is better)", 58))


def tick(value: float, _position: int | None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def height(each: Measure | Curve) -> float:
    if isinstance(each, Curve):
        return HEAD + PLOT + AXIS + LEGEND * len(each.samples)
    return HEAD + ROW * len(each.samples) + FOOT


def bars(axes: Axes, measure: Measure) -> None:
    """A bar of the median for each contender with its name and figures above, a whisker from smallest to largest."""
    names = list(measure.samples)
    every = [value for values in measure.samples.values() for value in values]
    marks = [(goal, limit) for goal in measure.goals if (limit := shown_at(goal, measure)) is not None]
    most = max(every)
    logarithmic = min(every) > 0 and most / min(map(statistics.median, measure.samples.values())) > LOGARITHMIC
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(every) / 1.5, most * 1.3)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, max(most, *(limit for _, limit in marks if limit < 3 * most), 0) * 1.04 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.set_ylim(len(names) - 0.25, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=8, length=3)
    for at, name in enumerate(names):
        values = measure.samples[name]
        median = statistics.median(values)
        ours = name.startswith(SUBJECT)
        ink, alpha = (OURS, 1.0 if name == SUBJECT else 0.6) if ours else (THEIRS, 1.0)
        if logarithmic:  # a bar would have no beginning
            axes.plot([median], [at], "o", color=ink, alpha=alpha, markersize=6)
        else:
            axes.barh(at, median, height=0.3, color=ink, alpha=alpha)
        axes.plot([min(values), max(values)], [at, at], color=INK, linewidth=1.2, solid_capstyle="butt")
        for end in (min(values), max(values)):
            axes.plot([end, end], [at - 0.1, at + 0.1], color=INK, linewidth=1.2)
        line = axes.get_yaxis_transform()
        weight = "bold" if name == SUBJECT else "normal"
        axes.text(0, at - 0.24, name, transform=line, va="bottom", fontsize=8.5, fontweight=weight)
        spread = f"  ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
        axes.text(1, at - 0.24, number(median) + spread, transform=line, va="bottom", ha="right", fontsize=8.5)
    for goal, limit in marks:
        if axes.get_xlim()[0] <= limit <= axes.get_xlim()[1]:
            at, ink = names.index(goal.subject), MET if goal.met(measure.samples) else MISSED
            axes.plot([limit, limit], [at - 0.27, at + 0.27], color=ink, linewidth=2, linestyle=(0, (2, 1)))


def shown_at(goal: Goal, measure: Measure) -> float | None:
    """The value of a goal's subject at which it is just met."""
    against = measure.samples.get(goal.against) if goal.against else [1.0]
    return goal.limit * statistics.median(against) if against and goal.subject in measure.samples else None


def lines(axes: Axes, curve: Curve, beside: bool) -> None:
    """A line through the medians of each contender, a band from smallest to largest."""
    inks, dashes = itertools.cycle(LINES), itertools.cycle(("--", ":", "-."))
    for name, points in curve.samples.items():
        xs = sorted(points)
        ink = OURS if name.startswith(SUBJECT) else next(inks)
        dash = next(dashes) if ink == OURS and name != SUBJECT else "-"
        width = 2.4 if name == SUBJECT else 1.5
        medians = [statistics.median(points[x]) for x in xs]
        axes.plot(xs, medians, "o", linestyle=dash, color=ink, linewidth=width, markersize=4, label=name)
        low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
        if low != high:
            axes.fill_between(xs, low, high, color=ink, alpha=0.15, linewidth=0)
    every = sorted({x for points in curve.samples.values() for x in points})
    if curve.logarithmic:
        axes.set_xscale("log" if every[0] > 0 else "symlog")
        ys = [value for points in curve.samples.values() for values in points.values() for value in values]
        if 0 < min(ys) < max(ys) / LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:  # what hardly changes is to look like it
            axes.set_ylim(0, max(ys) * 1.1 or 1)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(every if len(every) <= 10 else every[:: len(every) // 8])
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(tick))
    axes.set_xlabel(curve.x)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    handles = axes.get_legend_handles_labels()[0]
    wrapped = ["\n".join(textwrap.wrap(name, 36)) if beside else name for name in curve.samples]
    place = (1.01, 1.02) if beside else (-0.1, -(AXIS - 0.05) / PLOT)
    axes.legend(
        handles, wrapped, loc="upper left", bbox_to_anchor=place, frameon=False, fontsize=8.5, labelspacing=0.25
    )
