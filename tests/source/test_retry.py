"""Sources that come and go: reads wait, and end with the right bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from nbd.kit import on_trio, read
from source.cases import MB, SIZE, MemoryDirectory, file_of, sample

from ramfs.errors import SourceChanged, SourceCorrupt, SourceError, SourceLost, SourceRefused
from ramfs.source.base import PageSource
from ramfs.source.fault import FaultDirectory, Faults
from ramfs.source.retry import Backoff, Factory, RetrySource, SourceState
from ramfs.source.verify import VerifiedSource
from ramfs.units import PAGE

DATA = sample()
FAST = Backoff(0.002, 0.01)


def openings(words: str) -> tuple[Factory, Faults]:
    faults, _ = Faults.parse(f"fault:{words}:memory")
    directory = FaultDirectory(MemoryDirectory(), faults)
    return lambda: directory.open("ram"), faults


async def plain() -> PageSource:
    return await MemoryDirectory().open("ram")


def silent() -> tuple[Factory, trio.Event]:
    """A server that takes connections and says nothing; the event is set when one is made."""
    asked = trio.Event()

    async def factory() -> PageSource:
        asked.set()
        await trio.sleep_forever()

    return factory, asked


async def read_all(source: PageSource) -> bytes:
    return b"".join([await read(source, at, min(64 * PAGE, SIZE - at)) for at in range(0, SIZE, 64 * PAGE)])


@on_trio
async def test_everything_at_once() -> None:
    """Many readers, all sorts of failures, and every byte right at the end."""
    factory, _ = openings(
        "error=0.05,lost=0.03,short=0.03,corrupt=0.1,delay=1us-1ms,down=2-4,vanish=6-7,resize=9-10,seed=3"
    )

    async def verified() -> PageSource:
        return VerifiedSource(await factory(), file_of(DATA), "ram", again=0)

    told: list[SourceState] = []
    source = await RetrySource.open(verified, backoff=FAST, tell=told.append)
    got: dict[int, bytes] = {}

    async def one(offset: int) -> None:
        length = min(16 * PAGE, SIZE - offset)
        got[offset] = await read(source, offset, length, urgent=offset % (64 * PAGE) == 0)

    wanted = {SourceError, SourceLost, SourceRefused, SourceChanged, SourceCorrupt}
    while not wanted <= {type(state.error) for state in told}:
        got.clear()
        async with trio.open_nursery() as nursery:
            for offset in range(0, SIZE, 16 * PAGE):
                nursery.start_soon(one, offset)
        assert b"".join(got[offset] for offset in sorted(got)) == DATA
    assert source.state == told[-1]
    assert source.state.ok
    await source.aclose()


@on_trio
async def test_the_first_failure_is_told_at_once() -> None:
    with pytest.raises(SourceLost):
        await RetrySource.open(openings("down=1")[0])
    source = await RetrySource.open(plain)
    assert source.size == SIZE
    await source.aclose()


@on_trio
async def test_one_that_was_never_reached() -> None:
    """After a restart of the daemon the size is known and nobody has connected yet."""
    factory, faults = openings("down=1-3")
    source = RetrySource(factory, "ram of old", SIZE, backoff=FAST)
    assert source.description == "ram of old"
    assert faults.openings["ram"] == 0
    assert await read_all(source) == DATA
    assert faults.openings["ram"] == 4
    assert source.description == "memory"
    await source.aclose()


@on_trio
async def test_larger_reads_than_the_source_takes() -> None:
    source = RetrySource(plain, "ram", SIZE, maximum=64 * MB)
    assert await read(source, 0, SIZE) == DATA
    await source.aclose()


@on_trio
async def test_the_state_tells_of_a_loss_and_its_end() -> None:
    factory, _ = openings("down=2-5")
    told: list[SourceState] = []
    source = await RetrySource.open(factory, backoff=FAST, tell=told.append)
    await source._source.aclose()
    assert await read_all(source) == DATA
    assert [state.ok for state in told] == [False] * 5 + [True]
    assert [state.attempts for state in told] == [1, 2, 3, 4, 5, 0]
    assert len({state.since for state in told[:5]}) == 1
    assert "is down on purpose" in str(told[4].error)
    await source.aclose()


def test_backoff_grows_to_a_limit_with_jitter() -> None:
    backoff = Backoff(0.1, 10)
    for attempts, longest in ((1, 0.1), (2, 0.2), (5, 1.6), (8, 10), (10**6, 10)):
        waits = [backoff.seconds(attempts) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert len(set(waits)) > 10


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Sleeping takes no time. Nothing here may use a thread, which such a clock would not wait for."""

    def run() -> None:
        trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_attempts_are_spaced_for_all_readers_together() -> None:
    factory, faults = openings("down=2-")
    source = await RetrySource.open(factory)
    await source._source.aclose()
    with trio.move_on_after(300):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(read_all, source)
    assert 30 <= faults.openings["ram"] <= 80


@in_virtual_time
async def test_after_the_deadline_it_is_given_up() -> None:
    factory, faults = openings("down=2-100")
    source = await RetrySource.open(factory, deadline=60)
    await source._source.aclose()
    began = trio.current_time()
    ended: list[float] = []

    async def one() -> None:
        with pytest.raises(SourceLost, match=r"given up after 60 s: .* down on purpose"):
            await read(source, 0, PAGE)
        ended.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert all(59.9 <= seconds < 61 for seconds in ended)
    # From then on it fails at once, but is not given up for ever: attempts go on with the reads.
    tried = faults.openings["ram"]
    for _ in range(100):
        with pytest.raises(SourceLost):
            await read(source, 0, PAGE)
    assert trio.current_time() - began < 62
    await trio.sleep(30)
    with pytest.raises(SourceLost):
        await read(source, 0, PAGE)
    assert faults.openings["ram"] == tried + 1
    faults.down = range(0)
    await trio.sleep(30)
    assert await read(source, 2 * MB, PAGE) == DATA[2 * MB : 2 * MB + PAGE]
    await source.aclose()


@in_virtual_time
async def test_each_loss_has_the_whole_deadline() -> None:
    factory, faults = openings("seed=1")
    source = await RetrySource.open(factory, deadline=60)
    for _ in range(4):
        faults.down = range(faults.openings["ram"] + 1, faults.openings["ram"] + 8)
        await source._source.aclose()
        began = trio.current_time()
        assert await read(source, 2 * MB, PAGE) == DATA[2 * MB : 2 * MB + PAGE]
        assert 10 < trio.current_time() - began < 59
    await source.aclose()


@in_virtual_time
async def test_the_deadline_counts_from_the_last_success_not_the_last_connection() -> None:
    source = await RetrySource.open(openings("lost=1")[0], deadline=20)
    began = trio.current_time()
    with pytest.raises(SourceLost, match="given up"):
        await read(source, 0, PAGE)
    assert 19.9 <= trio.current_time() - began < 31
    await source.aclose()


@in_virtual_time
async def test_an_error_of_one_read_leaves_the_others_alone() -> None:
    factory, faults = openings("corrupt=page600")

    async def verified() -> PageSource:
        return VerifiedSource(await factory(), file_of(DATA), "ram")

    source = await RetrySource.open(verified, deadline=60)
    async with trio.open_nursery() as nursery:

        async def bad() -> None:
            with pytest.raises(SourceLost, match="page 600 of ram"):
                await read(source, 600 * PAGE, PAGE)

        nursery.start_soon(bad)
        await trio.sleep(5)
        began = trio.current_time()
        assert await read(source, 550 * PAGE, 40 * PAGE) == DATA[550 * PAGE : 590 * PAGE]
        assert trio.current_time() - began < 1
        assert not source.state.ok
        assert isinstance(source.state.error, SourceCorrupt)
    assert faults.openings["ram"] == 1
    await source.aclose()


@in_virtual_time
async def test_switching_wakes_all_that_waits() -> None:
    for words in ("down=2-", "error=1", "delay=1000s"):
        source = await RetrySource.open(openings(words)[0], backoff=Backoff(500, 500))
        if words.startswith("down"):
            await source._source.aclose()
        got: list[bytes] = []

        async def one(source: RetrySource = source, got: list[bytes] = got) -> None:
            got.append(await read_all(source))

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
            await trio.sleep(1)
            await source.switch(plain)
            assert source.state.ok
        assert trio.current_time() - began < 3
        assert got == [DATA] * 3
        await source.aclose()


@in_virtual_time
async def test_switching_does_not_wait_for_an_attempt_that_hangs() -> None:
    factory, asked = silent()
    source = RetrySource(factory, "silent", SIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, source)
        await asked.wait()
        await source.switch(plain)
    assert trio.current_time() < 3
    await source.aclose()


@in_virtual_time
async def test_an_attempt_that_hangs_counts_as_failed() -> None:
    factory, _ = silent()
    source = RetrySource(factory, "silent", SIZE, deadline=100)
    with pytest.raises(SourceLost, match="does not answer"):
        await read(source, 0, PAGE)
    assert source.state.attempts >= 2
    await source.aclose()


@on_trio
async def test_switching_to_what_cannot_be_used_changes_nothing() -> None:
    source = await RetrySource.open(plain)
    for words, kind in (("down=1", SourceLost), ("vanish=1", SourceRefused), ("resize=1", SourceChanged)):
        with pytest.raises(kind):
            await source.switch(openings(words)[0])
        assert await read(source, 2 * MB, PAGE) == DATA[2 * MB : 2 * MB + PAGE]
    assert source.state.ok
    await source.aclose()
    with pytest.raises(SourceLost):
        await source.switch(plain)


@in_virtual_time
async def test_closing_ends_what_waits() -> None:
    for factory in (openings("down=1-")[0], silent()[0], openings("error=1")[0]):
        source = RetrySource(factory, "ram", SIZE, backoff=Backoff(500, 500))

        async def one(source: RetrySource = source) -> None:
            with pytest.raises(SourceLost, match="closed"):
                await read(source, 0, PAGE)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
            await trio.sleep(1)
            await source.aclose()
        assert trio.current_time() - began < 2


@in_virtual_time
async def test_a_waiting_read_is_cancelled_at_any_time() -> None:
    for factory in (openings("down=1-")[0], silent()[0], openings("error=1")[0]):
        source = RetrySource(factory, "ram", SIZE)
        for seconds in (0, 0.05, 3, 47):
            began = trio.current_time()
            with trio.move_on_after(seconds) as scope:
                await read(source, 0, PAGE)
            assert scope.cancelled_caught
            assert trio.current_time() - began <= seconds + 0.1
        # What was cancelled left nothing behind that would hold up the next one.
        await source.switch(plain)
        assert await read_all(source) == DATA
        assert source.state.ok
        await source.aclose()
