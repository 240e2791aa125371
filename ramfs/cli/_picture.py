"""Pictures of pages: files as squares of colour, in rows or along a Hilbert curve; as PNG, SVG, or on a terminal.

A square is one page, or several where a file has more than fit; its colour is then the mean of theirs. All files of a
picture have squares of the same number of pages, so that sizes can be compared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.style import Style
from rich.text import Text

from ramfs.cli._text import human, printable
from ramfs.errors import UsageError
from ramfs.units import PAGE

if TYPE_CHECKING:
    from PIL import ImageFont

Runs = NDArray[np.int64]
"""Rows ``(first page, number of a kind)``, each up to the next one's first page."""
Pixels = NDArray[np.uint8]
"""Rows of squares, each with red, green and blue."""


class Kind(NamedTuple):
    """Pages that are drawn alike."""

    label: str
    colour: tuple[int, int, int]
    letter: str
    """where there are no colours"""


#: Told apart by those who see few colours too (Okabe and Ito; the blues by how dark they are).
GREY, RED, GREEN, YELLOW, SKY, BLUE, NAVY = (
    (232, 232, 232), (213, 94, 0), (0, 158, 115), (240, 228, 66), (146, 197, 232), (46, 127, 188), (8, 48, 107),
)  # fmt: skip
_PAPER, _INK, _FRAME = (255, 255, 255), (32, 32, 32), (150, 150, 150)

#: Squares in a picture, at most.
_MOST: Final = {"png": 1 << 18, "svg": 1 << 16}
#: Pixels that the squares of the largest file are wide, about.
_WIDTH: Final = 1024
_LINE: Final = 20
"""pixels from one line of text to the next"""
_FONT: Final = 14


@dataclass
class Panel:
    """A file in a picture."""

    title: str
    pages: int
    runs: Runs

    def amounts(self, kinds: int) -> NDArray[np.int64]:
        """Pages of each kind."""
        lengths = np.diff(np.append(self.runs[:, 0], self.pages))
        return np.bincount(self.runs[:, 1], lengths, minlength=kinds).astype(np.int64)

    def shares(self, kinds: int, scale: int) -> NDArray[np.float64]:
        """What part of each square, of ``scale`` pages, is of which kind."""
        count = -(-self.pages // scale)
        bounds = np.minimum(np.arange(count + 1) * scale, self.pages)
        edges = np.append(self.runs[:, 0], self.pages)
        lengths = np.diff(edges)
        found = np.empty((count, kinds))
        for kind in range(kinds):
            before = np.append(0, np.cumsum(lengths * (self.runs[:, 1] == kind)))
            found[:, kind] = np.diff(np.interp(bounds, edges, before))
        return found / np.diff(bounds)[:, None]


@dataclass
class Picture:
    """What is drawn: files, and what the colours mean."""

    title: str
    panels: list[Panel]
    kinds: list[Kind]
    hilbert: bool = False

    def scale(self, most: int) -> int:
        """Pages in a square, a power of two, so that no file has more than so many squares."""
        largest = max((panel.pages for panel in self.panels), default=1)
        return 1 << max(0, math.ceil(math.log2(max(1, largest / most))))

    def columns(self, scale: int) -> int:
        """Squares in a row, a power of two."""
        largest = max((panel.pages for panel in self.panels), default=1)
        squares = max(1, -(-largest // scale))
        return 1 << math.ceil(math.log2(squares) / 2)

    def grid(self, panel: Panel, scale: int, columns: int) -> tuple[NDArray[np.intp], NDArray[np.intp], int, int]:
        """Column and row of each square of a file, and how many of both there are."""
        count = -(-panel.pages // scale)
        if not self.hilbert:
            at = np.arange(count)
            return at % columns, at // columns, columns, -(-count // columns)
        x, y = hilbert(np.arange(count), _order(count))
        return x, y, int(x.max()) + 1, int(y.max()) + 1

    def squares(self, panel: Panel, scale: int, columns: int) -> Pixels:
        """The squares of a file as pixels; paper where there is nothing."""
        x, y, width, height = self.grid(panel, scale, columns)
        palette = np.array([kind.colour for kind in self.kinds], np.float64)
        # Some steps are enough, and an SVG has fewer colours then.
        shares = panel.shares(len(self.kinds), scale)
        pixels = np.full((height, width, 3), _PAPER, np.uint8)
        pixels[y, x] = np.rint(np.rint(shares @ palette / 4) * 4).clip(0, 255)
        return pixels

    def legend(self) -> Iterator[tuple[Kind, str]]:
        """The kinds that there are, and how much of each."""
        amounts = sum((panel.amounts(len(self.kinds)) for panel in self.panels), np.zeros(len(self.kinds), np.int64))
        total = max(1, int(amounts.sum()))
        for kind, pages in zip(self.kinds, amounts.tolist(), strict=True):
            if pages:
                yield kind, f"{human(pages * PAGE)}, {100 * pages / total:.1f} %"

    def note(self, scale: int, columns: int) -> str:
        """What a square is, and how they follow each other."""
        one = f"one square is {human(scale * PAGE)}"
        mixed = ", its colour the mean of its pages'" if scale > 1 else ""
        if self.hilbert:
            return f"{one}{mixed}; along a Hilbert curve from the upper left to the lower left"
        return f"{one}, one row {human(scale * columns * PAGE)}{mixed}"


def _order(count: int) -> int:
    """Of the smallest Hilbert curve with so many points."""
    return max(0, math.ceil(math.log2(max(1, count)) / 2))


def hilbert(index: NDArray[np.int64], order: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Column and row of points on the Hilbert curve that fills a square of side ``2**order``, its upper half first."""
    x, y, rest = np.zeros_like(index), np.zeros_like(index), index.copy()
    for step in range(order):
        side = 1 << step
        right, odd = rest >> 1 & 1, (rest ^ rest >> 1) & 1
        flip = (odd == 0) & (right == 1)
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(odd == 0, y, x), np.where(odd == 0, x, y)
        x, y = x + side * right, y + side * odd
        rest >>= 2
    return y, x


# -- PNG and SVG: the same canvas


@dataclass
class _Mark:
    """A word in a picture."""

    x: float
    y: float
    text: str
    end: bool = False
    """it ends there, instead of beginning"""
    bold: bool = False
    within: bool = False
    """it stands on squares"""


@dataclass
class _Canvas:
    """A picture as squares, frames and words, in pixels."""

    width: int
    height: int
    blocks: list[tuple[int, int, int, Pixels]]
    """left, top, pixels to a square, squares"""
    boxes: list[tuple[int, int, tuple[int, int, int]]]
    """of the legend"""
    lines: list[tuple[float, float, float, float]]
    marks: list[_Mark]


def _laid_out(picture: Picture, most: int) -> _Canvas:
    scale = picture.scale(most)
    columns = picture.columns(scale)
    size = max(1, min(16, _WIDTH // columns))
    left, canvas = 100, _Canvas(0, 0, [], [], [], [])
    canvas.marks.append(_Mark(left, 26, picture.title, bold=True))
    canvas.marks.append(_Mark(left, 26 + _LINE, picture.note(scale, columns)))
    at = 26 + 2 * _LINE
    for kind, amount in picture.legend():
        canvas.boxes.append((left, at - 12, kind.colour))
        canvas.marks.append(_Mark(left + 24, at, f"{kind.label}: {amount}"))
        at += _LINE
    right = left + max(columns * size, 700)
    for panel in picture.panels:
        at += _LINE + 8
        canvas.marks.append(_Mark(left, at, f"{panel.title}, {human(panel.pages * PAGE)}", bold=True))
        pixels = picture.squares(panel, scale, columns)
        height, width = pixels.shape[:2]
        top = at + (10 if picture.hilbert else 12 + _LINE)
        canvas.blocks.append((left, top, size, pixels))
        _frame(canvas, left, top, width * size, height * size)
        if picture.hilbert:
            _parts(canvas, (left, top, width * size, height * size), panel.pages, scale, size)
        else:
            _ruler(canvas, (left, top, width, height), size, scale)
        at = top + height * size + 4
    canvas.width, canvas.height = right + 40, int(at + 24)
    return canvas


def _frame(canvas: _Canvas, left: float, top: float, width: float, height: float) -> None:
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
    canvas.lines += [(*a, *b) for a, b in zip(corners, [*corners[1:], corners[0]], strict=True)]


def _ruler(canvas: _Canvas, place: tuple[int, int, int, int], size: int, scale: int) -> None:
    """Offsets beside the rows, and above them how far along the row."""
    left, top, width, height = place
    row = width * scale * PAGE
    every = 1
    while every * size < _LINE:
        every *= 2
    for number in range(0, height, every):
        canvas.marks.append(_Mark(left - 8, top + number * size + 11, f"{number * row:#x}", end=True))
        canvas.lines.append((left - 5, top + number * size, left, top + number * size))
    for part in range(4):
        x = left + part * width * size / 4
        if part == 0 or width >= 4:
            canvas.marks.append(_Mark(x, top - 7, f"+{human(part * row / 4)}" if part else "0"))
            canvas.lines.append((x, top - 4, x, top))


def _parts(canvas: _Canvas, place: tuple[int, int, int, int], pages: int, scale: int, size: int) -> None:
    """The whole square in sixteen parts, each with the offset at which the curve enters it."""
    left, top, width, height = place
    order = _order(-(-pages // scale))
    part = (1 << order) * size / 4
    if part < 100:
        return
    for number, (x, y) in enumerate(zip(*hilbert(np.arange(16), 2), strict=True)):
        first = number * scale * 4**order // 16
        if first < pages:
            at = left + float(x) * part, top + float(y) * part
            canvas.marks.append(_Mark(at[0] + 5, at[1] + 16, f"{first * PAGE:#x}", within=True))
    for number in range(1, 4):
        if number * part < width:
            canvas.lines.append((left + number * part, top, left + number * part, top + height))
        if number * part < height:
            canvas.lines.append((left, top + number * part, left + width, top + number * part))


def save_png(picture: Picture, path: str) -> None:
    """Raises UsageError without Pillow, OSError."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UsageError("PNG needs Pillow: pip install 'ramfs[png]', or give a name that ends in .svg") from None
    canvas = _laid_out(picture, _MOST["png"])
    image = Image.new("RGB", (canvas.width, canvas.height), _PAPER)
    draw = ImageDraw.Draw(image)
    for left, top, size, pixels in canvas.blocks:
        image.paste(Image.fromarray(np.repeat(np.repeat(pixels, size, 0), size, 1)), (left, top))
    for line in canvas.lines:
        draw.line(line, _FRAME)
    for x, y, colour in canvas.boxes:
        draw.rectangle((x, y, x + 14, y + 14), colour, _FRAME)
    font = ImageFont.load_default(_FONT)
    for mark in canvas.marks:
        _write(draw, mark, font)
    with open(path, "wb") as file:
        image.save(file, "PNG")


def _write(draw: Any, mark: _Mark, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont") -> None:
    around = {"stroke_width": 2, "stroke_fill": _PAPER} if mark.within else {}
    if mark.bold:
        around = {"stroke_width": 0.4, "stroke_fill": _INK}
    draw.text((mark.x, mark.y), mark.text, _INK, font, anchor="rs" if mark.end else "ls", **around)


def save_svg(picture: Picture, path: str) -> None:
    """Raises OSError."""
    canvas = _laid_out(picture, _MOST["svg"])
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{canvas.width}" height="{canvas.height}" '
            f'viewBox="0 0 {canvas.width} {canvas.height}" font-family="sans-serif" font-size="{_FONT}">'
        ),
        f'<rect width="100%" height="100%" fill="{_hex(_PAPER)}"/>',
    ]
    for left, top, size, pixels in canvas.blocks:
        parts.append(f'<g transform="translate({left} {top}) scale({size})" shape-rendering="crispEdges">')
        parts += [f'<path fill="{_hex(colour)}" d="{way}"/>' for colour, way in _paths(pixels)]
        parts.append("</g>")
    parts.append(f'<g stroke="{_hex(_FRAME)}">')
    parts += [f'<path d="M{a:g} {b:g}L{c:g} {d:g}"/>' for a, b, c, d in canvas.lines]
    parts += [f'<rect x="{x}" y="{y}" width="14" height="14" fill="{_hex(colour)}"/>' for x, y, colour in canvas.boxes]
    parts.append(f'</g><g fill="{_hex(_INK)}">')
    for mark in canvas.marks:
        more = (' text-anchor="end"' if mark.end else "") + (' font-weight="bold"' if mark.bold else "")
        more += f' paint-order="stroke" stroke="{_hex(_PAPER)}" stroke-width="4"' if mark.within else ""
        parts.append(f'<text x="{mark.x:g}" y="{mark.y:g}"{more}>{escape(mark.text)}</text>')
    parts.append("</g></svg>\n")
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(parts))


def _hex(colour: Sequence[int]) -> str:
    return "#" + bytes(colour).hex()


def _paths(pixels: Pixels) -> Iterator[tuple[tuple[int, ...], str]]:
    """The squares of each colour as one path: a rectangle for each run in a row."""
    height, width = pixels.shape[:2]
    flat = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    starts = np.ones((height, width), np.bool_)
    starts[:, 1:] = flat[:, 1:] != flat[:, :-1]
    at = np.flatnonzero(starts)
    lengths = np.diff(np.append(at, height * width))
    colours = flat.ravel()[at]
    paper = int.from_bytes(bytes(_PAPER), "big")
    for colour in np.unique(colours).tolist():
        if colour != paper:
            mine = colours == colour
            runs = zip((at[mine] % width).tolist(), (at[mine] // width).tolist(), lengths[mine].tolist(), strict=True)
            yield tuple(colour.to_bytes(3, "big")), "".join(f"M{x} {y}h{run}v1h-{run}z" for x, y, run in runs)


# -- a terminal


def text(picture: Picture, width: int, height: int, *, coloured: bool) -> Text:
    """For a terminal of so many characters: two squares in each, one above the other; letters where no colours are."""
    columns = 1 << max(3, int(math.log2(max(8, width - 14))))
    rows = max(8, height - 2 * len(picture.panels) - len(picture.kinds) - 4) * (2 if coloured else 1)
    most = min(columns * rows, columns**2) if not picture.hilbert else min(columns, 1 << int(math.log2(rows))) ** 2
    scale = picture.scale(most)
    out = Text(no_wrap=True, overflow="crop")
    for panel in picture.panels:
        out.append(f"{printable(panel.title)}, {human(panel.pages * PAGE)}\n", style="bold")
        if not coloured:
            _letters(out, picture, panel, scale, columns)
            continue
        pixels = picture.squares(panel, scale, columns)
        if len(pixels) % 2:
            pixels = np.concatenate([pixels, np.full((1, pixels.shape[1], 3), _PAPER, np.uint8)])
        for number, (upper, lower) in enumerate(zip(pixels[::2], pixels[1::2], strict=True)):
            _margin(out, picture, 2 * number * scale * columns)
            for a, b in zip(upper.tolist(), lower.tolist(), strict=True):
                out.append("▀", Style(color=Color.from_rgb(*a), bgcolor=Color.from_rgb(*b)))
            out.append("\n")
    for kind, amount in picture.legend():
        box = ("■ ", Style(color=Color.from_rgb(*kind.colour))) if coloured else (f"{kind.letter} ", "")
        out.append(*box)
        out.append(f"{kind.label}: {amount}\n")
    out.append(picture.note(scale, columns))
    return out


def _margin(out: Text, picture: Picture, page: int) -> None:
    if not picture.hilbert:
        out.append(f"{page * PAGE:#12x} ", "dim")


def _letters(out: Text, picture: Picture, panel: Panel, scale: int, columns: int) -> None:
    """Each square as the letter of what most of it is."""
    x, y, width, height = picture.grid(panel, scale, columns)
    letters = np.full((height, width), " ")
    most = panel.shares(len(picture.kinds), scale).argmax(axis=1)
    letters[y, x] = np.array([kind.letter for kind in picture.kinds])[most]
    for number, row in enumerate(letters):
        _margin(out, picture, number * scale * columns)
        out.append("".join(row.tolist()) + "\n")
