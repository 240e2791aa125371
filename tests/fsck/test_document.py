"""docs/format.md says what the code does."""

import re
import sqlite3
from pathlib import Path

import pytest

from ramfs.store.catalog import ADDITIONS, DIRECT_VERSION, FORMAT_VERSION, SCHEMA
from ramfs.store.check import KINDS
from ramfs.store.images import HEADER, MAGIC, VERSION, Header, pack_header
from ramfs.units import LOST

DOCUMENT = (Path(__file__).parents[2] / "docs/format.md").read_text()


def rows(first: str) -> list[list[str]]:
    """The rows of the table whose first cell of the head is `first`."""
    lines = iter(DOCUMENT.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            break
    found = []
    for line in lines:
        if not line.startswith("|"):
            return found
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_kind_of_finding_is_listed() -> None:
    documented = {cells[0].strip("`"): cells[1:] for cells in rows("kind")}
    assert documented == {
        kind: ["damage" if it.damage else "note", it.meaning, it.repair or "—"] for kind, it in KINDS.items()
    }


def test_the_table_header() -> None:
    data = pack_header(Header(0x1122, -2, 3)).ljust(HEADER, b"\0")
    (section,) = re.findall(r"## `tables/ID.map`.*?(?=\n## )", DOCUMENT, re.DOTALL)
    fields = re.findall(r"\| (\d+) \| (\d+) \| (\w+) \| (.*) \|", section)
    values = {int(offset): data[int(offset) : int(offset) + int(length)] for offset, length, _, _ in fields}
    assert values[0] == MAGIC
    assert values[8] == VERSION.to_bytes(4, "little")
    assert values[12] == bytes(4)
    assert values[16] == (0x1122).to_bytes(8, "little")
    assert values[24] == (-2).to_bytes(8, "little", signed=True)
    assert values[32] == (3).to_bytes(8, "little")
    assert any(values[40])
    assert f"| {HEADER} + i * 4 | 4 | uint32 |" in section
    assert f"0x{LOST:x}" in DOCUMENT


def test_the_version() -> None:
    assert f"format version is **{FORMAT_VERSION}**" in DOCUMENT
    assert f"or {DIRECT_VERSION} while" in DOCUMENT


@pytest.mark.parametrize(
    "table", ["layers", "images", "inodes", "names", "xattrs", "meta", "pulls", "arriving", "outcomes"]
)
def test_every_column_is_listed(table: str) -> None:
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA + ADDITIONS)
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    db.close()
    (section,) = re.findall(rf"\n`{table}`:?.*?(?=\n`\w+`|\n## )", DOCUMENT, re.DOTALL)
    assert [column for column in columns if f"`{column}`" not in section] == []
