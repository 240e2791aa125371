"""The model: tables, spans, counts and digests."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given

from ramfs.image.digest import DIGEST, digest_pages
from ramfs.image.lineage import PageCounts, count_pages
from ramfs.image.pages import is_zero, nonzero_pages, span
from ramfs.image.table import CHUNK, PageTable, equal_runs, runs_of
from ramfs.units import PAGE, LayerId, pages

ONE, TWO, THREE = LayerId(1), LayerId(2), LayerId(3)


def table_of(*runs: tuple[int, int, LayerId], size: int = 0) -> PageTable:
    table = PageTable(max([size, *(stop for _, stop, _ in runs)]))
    for first, stop, layer in runs:
        table.fill(first, stop, layer)
    return table


# --- runs ---


@given(st.lists(st.booleans(), max_size=50))
def test_runs_of_a_mask(bits: list[bool]) -> None:
    mask = np.array(bits, np.bool_)
    runs = list(runs_of(mask))
    rebuilt = np.zeros(len(bits), np.bool_)
    for a, b in runs:
        assert a < b
        rebuilt[a:b] = True
    assert (rebuilt == mask).all()
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50))
def test_equal_runs(values: list[int]) -> None:
    runs = equal_runs(np.array(values, np.uint32))
    assert [value for a, b, value in runs for _ in range(b - a)] == values
    assert runs[0][0] == 0
    assert runs[-1][1] == len(values)
    assert all(x[1] == y[0] and x[2] != y[2] for x, y in itertools.pairwise(runs))


# --- tables ---


def test_a_new_table_is_zero_and_untouched() -> None:
    table = PageTable(3)
    assert table.capacity == CHUNK
    assert not table.entries.any()
    assert list(table.regions()) == []
    assert table.layers() == set()
    assert table.resident() == 0


def test_an_empty_table_has_no_memory() -> None:
    table = PageTable()
    assert table.capacity == 0
    assert list(table.regions()) == []
    table.resize(1)
    assert table.capacity == CHUNK


def test_growing_keeps_entries_and_marks() -> None:
    table = table_of((5, 8, ONE))
    table.stale[:] = False
    table.resize(CHUNK * 5 + 1)
    assert table.capacity >= CHUNK * 5 + 1
    assert table.entries[5:8].tolist() == [1, 1, 1]
    assert table.touched.tolist()[:2] == [True, False]
    assert not table.stale.any()
    assert len(table.touched) == len(table.stale) == table.capacity // CHUNK


def test_growing_page_by_page_doubles() -> None:
    """A file that is appended to must not copy its table for each page."""
    table, sizes = PageTable(1), set()
    for size in range(1, CHUNK * 20, 100):
        table.resize(size)
        sizes.add(table.capacity)
    assert len(sizes) <= 6


def test_shrinking_is_not_done() -> None:
    table = table_of((0, CHUNK * 2, ONE))
    table.resize(1)
    assert table.capacity == CHUNK * 2


def test_regions_are_the_touched_chunks() -> None:
    table = table_of((CHUNK + 7, CHUNK + 8, ONE), (4 * CHUNK - 1, 4 * CHUNK + 1, TWO))
    assert list(table.regions()) == [(CHUNK, 2 * CHUNK), (3 * CHUNK, 5 * CHUNK)]
    assert list(table.regions(first=CHUNK + 3, stop=4 * CHUNK + 5)) == [
        (CHUNK + 3, 2 * CHUNK),
        (3 * CHUNK, 4 * CHUNK + 5),
    ]
    assert list(table.regions(first=5, stop=9)) == []
    assert list(table.regions(stop=10**9)) == [(CHUNK, 2 * CHUNK), (3 * CHUNK, 5 * CHUNK)]
    table.stale[:] = False
    table.mark(0, 1)
    assert list(table.regions(table.stale)) == [(0, CHUNK)]


def test_layers_and_counts() -> None:
    table = table_of((0, 4, ONE), (2, 6, TWO), (3 * CHUNK, 3 * CHUNK + 10, ONE))
    assert table.layers() == {ONE, TWO}
    assert (table.count(ONE), table.count(TWO), table.count(THREE)) == (12, 4, 0)
    assert table.resident() == 16


# --- spans ---


@given(st.integers(0, 5 * PAGE), st.integers(0, 5 * PAGE))
def test_a_span_is_cut_without_gap_or_overlap(offset: int, length: int) -> None:
    head, first, stop, tail = span(offset, length)
    whole = (first * PAGE, stop * PAGE)
    covered = [byte for low, high in (head, whole, tail) for byte in range(low, high)]
    assert covered == list(range(offset, offset + length))
    for low, high in (head, tail):
        assert low == high or low // PAGE == (high - 1) // PAGE
        assert high - low < PAGE


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (1 << 44, 1 << 32)])
def test_pages(size: int, expected: int) -> None:
    assert pages(size) == expected


def test_zeros() -> None:
    data = bytes(PAGE) + bytes(PAGE - 1) + b"\1" + b"\1" + bytes(PAGE - 1) + bytes(PAGE)
    assert nonzero_pages(data).tolist() == [False, True, True, False]
    assert nonzero_pages(memoryview(data)[PAGE : 2 * PAGE]).tolist() == [True]
    assert is_zero(b"")
    assert is_zero(bytes(7))
    assert is_zero(bytes(PAGE))
    assert not is_zero(b"\0\1\0")
    assert not is_zero(data[PAGE : 2 * PAGE])


# --- counts ---


def test_a_clone_owns_nothing() -> None:
    parent, clone = table_of((0, 10, ONE)), table_of((0, 10, ONE))
    assert count_pages(clone, 16, [parent], {}) == PageCounts(owned=0, shared=10, zero=6, absent=0, total=16)


def test_what_was_written_since_is_owned() -> None:
    parent, clone = table_of((0, 10, ONE)), table_of((0, 10, ONE), (3, 5, TWO))
    assert count_pages(clone, 10, [parent], {}) == PageCounts(2, 8, 0, 0, 10)
    assert count_pages(parent, 10, [clone], {}) == PageCounts(2, 8, 0, 0, 10)
    assert count_pages(parent, 10, [], {}) == PageCounts(10, 0, 0, 0, 10)


def test_an_other_that_is_shorter_or_elsewhere() -> None:
    table = table_of((0, 3 * CHUNK, ONE))
    assert count_pages(table, 3 * CHUNK, [table_of((0, 5, ONE))], {}) == PageCounts(3 * CHUNK - 5, 5, 0, 0, 3 * CHUNK)


def test_shifted_pages_are_shared_where_the_bytes_are_the_same() -> None:
    """Layer 2 is layer 1 seen four pages further on."""
    places = {ONE: (ONE, 0), TWO: (ONE, 4)}
    original, moved = table_of((0, 10, ONE)), table_of((0, 3, TWO))
    assert count_pages(moved, 3, [original], places) == PageCounts(0, 3, 0, 0, 3)
    assert count_pages(original, 10, [moved], places) == PageCounts(7, 3, 0, 0, 10)


# --- digests ---


def test_digests_are_those_of_the_pages() -> None:
    data = bytes(PAGE) + b"x" * PAGE
    digests = digest_pages(data)
    assert len(digests) == 2 * DIGEST
    assert digests[:DIGEST] == xxhash.xxh3_128(bytes(PAGE)).digest()
    assert digests[DIGEST:] == xxhash.xxh3_128(b"x" * PAGE).digest()
    assert digest_pages(b"") == b""


def test_no_page_has_the_digest_that_stands_for_none() -> None:
    assert any(digest_pages(bytes(PAGE)))
