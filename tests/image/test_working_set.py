"""The model of working sets: no page twice, in order, within bounds; and what is read is what was written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramfs.image import working_set
from ramfs.image.working_set import MOST_PAGES, MOST_RECORDS, Records, batches, complete, empty, is_valid, pack, parse
from ramfs.units import PAGE, pages

SIZE = 300 * PAGE + 5
READS = st.lists(
    st.tuples(st.floats(0, 20), st.integers(0, SIZE - 1), st.integers(1, 40 * PAGE)).map(tuple), max_size=40
)


def pages_of(records: Records) -> list[int]:
    return [page for each in records for page in range(each["first"], each["first"] + each["count"])]


def expected(known: list[int], asked: list[tuple[float, int, int]]) -> list[int]:
    """The pages that are new, each where it was first asked for."""
    new = [page for _, at, length in asked for page in range(at // PAGE, min(pages(at + length), pages(SIZE)))]
    return [page for page in dict.fromkeys(new) if page not in set(known)]


@given(READS, READS)
def test_each_page_is_in_it_once_where_it_was_asked_for_first(
    one: list[tuple[float, int, int]], two: list[tuple[float, int, int]]
) -> None:
    one, two = sorted(one, key=lambda each: each[0]), sorted(two, key=lambda each: each[0])
    first = complete(empty(), one, SIZE)
    assert pages_of(first) == expected([], one)
    assert not len(first) or is_valid(first.tobytes())
    both = complete(first, two, SIZE)
    more = expected(pages_of(first), two)
    assert pages_of(both) == pages_of(first) + (more if 4 * len(more) >= len(pages_of(first)) else [])
    assert not len(both) or is_valid(both.tobytes())
    assert sorted(page for each in batches(both, SIZE, 7) for a, b in each for page in range(a, b)) == sorted(
        pages_of(both)
    )
    for batch in list(batches(both, SIZE, 7))[:-1]:
        assert sum(b - a for a, b in batch) == 7
        assert all(before[1] < after[0] for before, after in itertools.pairwise(batch))
    assert parse(pack({b"a/ram": first, b"ram": both, b"none": empty()})).keys() == {b"a/ram", b"ram", b"none"}
    again = parse(pack({b"a/ram": first, b"ram": both}) + b"\0" * 7)
    assert (again[b"a/ram"] == first).all()
    assert (again[b"ram"] == both).all()


def test_there_is_an_end_to_it() -> None:
    apart = [(0.0, 2 * page * PAGE, 1) for page in range(MOST_RECORDS + 10)]
    assert len(complete(empty(), apart, 1 << 40)) == MOST_RECORDS
    huge = complete(empty(), [(0.0, 0, 100 * MOST_PAGES * PAGE)], 1 << 40)
    assert pages_of(huge) == list(range(MOST_PAGES))
    assert complete(huge, apart, 1 << 40) is huge


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(1, 255))
def test_what_is_no_working_set_is_told(noise: bytes, at: int, flip: int) -> None:
    with pytest.raises(ValueError, match=r"^it"):
        parse(noise)
    good = bytearray(pack({b"ram": complete(empty(), [(0, 0, PAGE), (1, 9 * PAGE, PAGE)], SIZE), b"x": empty()}))
    good[at % len(good)] ^= flip
    with pytest.raises(ValueError, match=r"^it"):
        parse(bytes(good))


def test_what_is_behind_the_end_is_left_out() -> None:
    records = np.array([(0, 5, 10), (1, 100, 1)], working_set.RECORD)
    assert working_set.within(records, 8 * PAGE).tolist() == [(0, 5, 3)]
    assert list(batches(records, 8 * PAGE, 100)) == [[(5, 8)]]
