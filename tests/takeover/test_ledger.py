"""The ledger, the outcomes of requests, and what a store does that is taken over: from inside, without a mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from storekit import ME, Kit

from ramfs import ledger as ledgers
from ramfs.errors import StoreError, StoreVersion
from ramfs.ledger import Held, Kind, Ledger, Record
from ramfs.store.outcomes import REQUEST
from ramfs.store.repair import check_store
from ramfs.units import PAGE, ROOT

ONE, TWO, THREE = (bytes([number]) * PAGE for number in (1, 2, 3))


def memory(ledger: Ledger) -> int:
    """Bytes of memory that a ledger takes."""
    return os.fstat(ledger.fd).st_blocks * 512


def reopened(ledger: Ledger) -> Ledger:
    """The ledger as the next daemon gets it."""
    return Ledger(os.dup(ledger.fd))


def some(count: int) -> list[Record]:
    return [Record(Kind.ALIAS, n, n + 1, n + 2, n + 3, b"name %d" % n) for n in range(count)]


# --- the ledger ---


def test_records_come_back_in_their_order() -> None:
    ledger = Ledger()
    assert list(ledger.records()) == []
    for record in some(100):
        ledger.add(*record)
    assert list(ledger.records()) == some(100)
    assert list(reopened(ledger).records()) == some(100)


def test_a_record_that_is_half_written_is_none() -> None:
    ledger = Ledger()
    for record in some(3):
        ledger.add(*record)
    # What a daemon has written that was killed before it moved the end.
    ledger._put(ledger._end, Kind.OPEN, 7, 8, 9, 10, b"torn")
    after = reopened(ledger)
    assert list(after.records()) == some(3)
    after.add(*some(4)[3])
    assert list(reopened(after).records()) == some(4)


def test_it_is_made_anew_in_the_other_area_and_gives_its_memory_back() -> None:
    ledger = Ledger()
    before = memory(ledger)
    expected = some(2)
    for turn in range(5):  # to and fro
        for record in some(30_000):
            ledger.add(*record)
        assert ledger.has_grown
        assert memory(ledger) > before + (1 << 20)
        expected = [record._replace(request=0) for record in some(turn + 1)]
        ledger.renew(expected)
        assert list(ledger.records()) == list(reopened(ledger).records()) == expected
        assert not ledger.has_grown
        assert memory(ledger) < before + (1 << 20)


def test_one_that_is_being_made_anew_still_counts() -> None:
    """A daemon that is killed on the way leaves the records of before."""
    ledger = Ledger()
    for record in some(10):
        ledger.add(*record)

    def records() -> Iterator[Record]:
        yield from some(3)
        assert list(reopened(ledger).records()) == some(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.renew(records())
    assert list(reopened(ledger).records()) == some(10)
    ledger.renew(some(1))
    assert list(reopened(ledger).records()) == some(1)


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    monkeypatch.setattr(ledgers, "VERSION", ledgers.VERSION + 1)
    with pytest.raises(StoreVersion, match="another format"):
        reopened(ledger)


def test_what_the_kernel_holds() -> None:
    listed = b"".join(ino.to_bytes(8, "little") for ino in (5, 6, 6))
    held = Held.of(
        [
            Record(Kind.INIT, payload=b"init"),
            Record(Kind.LOOKUP, 1, 5, 3),
            Record(Kind.LOOKUPS, 2, payload=listed),
            Record(Kind.FORGET, 0, 5, 4),
            Record(Kind.FORGET, 0, 6, 1),
            Record(Kind.OPEN, 3, 77, 6, 1, b"who"),
            Record(Kind.OPEN, 4, 78, 6, 0, b"who"),
            Record(Kind.CLOSE, 0, 78),
            Record(Kind.ALIAS, 5, 1, 6, payload=b"a"),
            Record(Kind.ALIAS, 6, 1, 6, payload=b"b"),
            Record(Kind.UNALIAS, 7, 1, payload=b"a"),
        ]
    )
    assert held.init == b"init"
    assert held.lookups == {6: 1}
    assert list(held.files) == [77]
    assert held.aliases == {(1, b"b"): 6}
    assert {number: [record.kind for record in records] for number, records in held.by_request.items()} == {
        1: [Kind.LOOKUP], 2: [Kind.LOOKUPS], 3: [Kind.OPEN], 4: [Kind.OPEN], 5: [Kind.ALIAS], 6: [Kind.ALIAS],
        7: [Kind.UNALIAS],
    }  # fmt: skip


# --- outcomes ---


@pytest.fixture
def kit(shm: Path) -> Iterator[Kit]:
    with Kit(shm / "store") as kit:
        yield kit


def rows(kit: Kit) -> dict[int, int]:
    return {row["request"]: row["ino"] for row in kit.store.catalog.execute("SELECT * FROM outcomes")}


def request(kit: Kit, number: int, name: str) -> int:
    """A CREATE with a number, as far as the tree goes; its inode."""
    token = REQUEST.set(number)
    try:
        return kit.space.make(ROOT, name.encode(), 0o100600, ME).ino
    finally:
        REQUEST.reset(token)


def test_an_outcome_is_kept_with_what_it_tells_of(kit: Kit) -> None:
    ino = request(kit, 11, "f")
    kit.create("g")  # for no request
    assert rows(kit) == {11: ino}
    kit.take_over()
    assert kit.store.outcomes.made_before == {ino}
    token = REQUEST.set(11)
    assert kit.store.outcomes.of_before() == ino
    REQUEST.reset(token)
    assert kit.store.outcomes.of_before() is None


def test_an_outcome_goes_with_its_transaction(kit: Kit) -> None:
    with pytest.raises(ZeroDivisionError), kit.store.catalog.transaction():
        assert request(kit, 11, "f") / 0
    assert rows(kit) == {}
    kit.take_over()
    token = REQUEST.set(11)
    assert kit.store.outcomes.of_before() is None
    REQUEST.reset(token)


def test_outcomes_of_answered_requests_go_some_at_a_time(kit: Kit) -> None:
    most = 0
    for number in range(1, 500):
        request(kit, number, f"f{number}")
        kit.store.outcomes.answered(number)
        most = max(most, len(rows(kit)))
    assert 499 in rows(kit), "the last one may not have reached the kernel"
    assert most < 100
    request(kit, 1000, "unanswered")
    for number in range(1001, 1200):
        request(kit, number, f"f{number}")
        kit.store.outcomes.answered(number)
    assert 1000 in rows(kit)


def test_rolling_back_keeps_the_outcomes_that_were_to_go(kit: Kit) -> None:
    for number in range(1, 65):
        request(kit, number, f"f{number}")
        kit.store.outcomes.answered(number)
    before = rows(kit)
    assert len(before) == 64
    with pytest.raises(ZeroDivisionError), kit.store.catalog.transaction():
        assert request(kit, 65, "f") / 0
    assert rows(kit) == before
    request(kit, 66, "f")
    assert set(rows(kit)) == {66}


def test_outcomes_of_the_daemon_before_go_when_all_is_asked_again(kit: Kit) -> None:
    for number in range(1, 70):
        request(kit, number, f"f{number}")
    kit.take_over()
    kit.store.outcomes.forget_before()
    assert kit.store.outcomes.made_before == set()
    request(kit, 100, "f")
    assert set(rows(kit)) == {100}


def test_outcomes_are_those_of_one_connection(shm: Path) -> None:
    with Kit(shm / "store") as kit:
        request(kit, 11, "f")
    with Kit(shm / "store") as kit:
        assert rows(kit) == {}
    kit = Kit(shm / "store")
    request(kit, 11, "g")
    kit.kill()
    with Kit(shm / "store") as kit:
        assert rows(kit) == {}


# --- a store that is taken over ---


def test_a_store_that_was_closed_is_not_taken_over(shm: Path) -> None:
    kit = Kit(shm / "store")
    kit.store.catalog.set_meta("clean", 1)
    with pytest.raises(StoreError, match="unmount, and mount again"):
        kit.take_over()
    kit = Kit(shm / "store")
    kit.store.catalog.set_meta("boot_id", "another")
    with pytest.raises(StoreError, match="unmount, and mount again"):
        kit.take_over()


def test_settling_makes_durable_what_nobody_knows_to_be(shm: Path) -> None:
    """The daemon before had synced ONE, written TWO, and died; then the power goes."""
    for settled in (False, True):
        directory = shm / f"store{settled}"
        kit = Kit(directory)
        kit.write("f", 0, ONE * 4)
        kit.write("g", 0, ONE)
        kit.sync("f")
        kit.write("f", PAGE, TWO)
        kit.write("f", 2 * PAGE, bytes(PAGE))
        kit.write("f", 4 * PAGE, TWO)
        kit.take_over()
        assert kit.store.images.doubtful
        assert kit.read("f") == ONE + TWO + bytes(PAGE) + ONE + TWO
        if settled:
            kit.settle()
            assert not kit.store.images.doubtful
        kit.power_loss()
        with Kit(directory) as kit:
            if settled:
                assert kit.read("f") == ONE + TWO + bytes(PAGE) + ONE + TWO
                assert kit.read("g") == ONE
            else:  # overwritten in place, as on any file system; no page that was not synced is named
                assert kit.read("f") in {ONE + page + zero + ONE for page in (ONE, TWO) for zero in (ONE, bytes(PAGE))}
                assert kit.read("g") == b""
        assert check_store(str(directory)).findings == []


def test_closed_before_it_is_settled(shm: Path) -> None:
    """A store that was closed has all in its durable tables, also of files that nobody has used since."""
    kit = Kit(shm / "store")
    for number in range(40):
        kit.write(f"f{number}", 0, ONE)
    kit.sync()
    for number in range(40):
        kit.write(f"f{number}", PAGE, TWO)
    kit.table_file(kit.image("f7").id).unlink()  # what is lost is lost, and not in the way of the others
    kit.take_over()
    kit.close()
    damage = check_store(str(shm / "store")).findings
    assert {finding.where for finding in damage} == {"/f7"}, damage
    kit = Kit(shm / "store")
    kit.power_loss()
    with Kit(shm / "store") as kit:
        assert all(kit.read(f"f{number}") == ONE + TWO for number in range(40) if number != 7)


def test_nothing_is_garbage_before_all_is_settled(shm: Path) -> None:
    """A durable table may name pages that no current one does: they must outlive a power loss."""
    kit = Kit(shm / "store")
    kit.write("f", 0, ONE * 8)
    kit.snapshot("s")
    kit.sync()
    kit.write("f", 0, TWO * 8)
    kit.delete_snapshot("s")
    kit.take_over()
    assert not kit.pager.has_garbage()
    kit.power_loss()
    with Kit(shm / "store") as kit:
        assert kit.read("f") == ONE * 8
    assert check_store(str(shm / "store")).findings == []


def test_settling_removes_what_lies_about(shm: Path) -> None:
    kit = Kit(shm / "store")
    kit.write("f", 0, ONE)
    kit.sync()
    strays = [kit.table_file(99), kit.table_file(99, "durable"), kit.layer_file(99), kit.table_file(1, "durable.new")]
    for stray in strays:
        stray.write_bytes(b"half")
    kit.take_over()
    kit.write("g", 0, TWO)
    kit.settle()
    assert not [stray for stray in strays if stray.exists()]
    assert (kit.read("f"), kit.read("g")) == (ONE, TWO)
    kit.close()
    assert check_store(str(shm / "store")).findings == []


def test_deleted_before_it_is_settled(shm: Path) -> None:
    kit = Kit(shm / "store")
    for name in "fgh":
        kit.write(name, 0, ONE)
    kit.sync()
    kit.take_over()
    kit.unlink("g")
    kit.forget()
    kit.settle()
    kit.collect(2)
    assert len(list((kit.directory / "layers").glob("*.ram"))) == 2
    kit.close()
    assert check_store(str(shm / "store")).findings == []


def test_a_snapshot_right_after_a_takeover_is_durable(shm: Path) -> None:
    kit = Kit(shm / "store")
    kit.write("f", 0, ONE * 3)
    kit.sync()
    kit.write("f", PAGE, TWO)
    kit.take_over()
    kit.write("f", 2 * PAGE, THREE)
    kit.snapshot("s")
    kit.write("f", 0, THREE)
    kit.power_loss()
    with Kit(shm / "store") as kit:
        assert kit.read(".snap/s/f") == ONE + TWO + THREE
    assert check_store(str(shm / "store")).findings == []


def test_settling_that_fails_is_done_again(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit(shm / "store")
    for number in range(40):  # more than are settled at a time
        kit.write(f"f{number}", 0, ONE)
    kit.take_over()
    with monkeypatch.context() as patch:

        async def refused(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(kit.pager, "sync", refused)
        with pytest.raises(OSError, match="No space"):
            kit.settle()
    assert len(kit.store.images.doubtful) == 40
    kit.settle()
    assert not kit.store.images.doubtful
    kit.power_loss()
    with Kit(shm / "store") as kit:
        assert all(kit.read(f"f{number}") == ONE for number in range(40))


def test_lookups_of_the_daemon_before_are_known_without_being_read(shm: Path) -> None:
    """An inode comes into memory when it is asked for; one without a name lives until its last lookup is gone."""
    kit = Kit(shm / "store")
    for name in ("f", "g"):
        kit.write(name, 0, ONE)
        kit.space.looked_up(kit.space.lookup(ROOT, name.encode()))
    f, g = (kit.space.lookup(ROOT, name).ino for name in (b"f", b"g"))
    kit.unlink("g")
    ledger = kit.space.ledger
    lock = os.dup(kit.store.lock.fd)
    kit.store.abandon()
    kit.store = type(kit.store)(str(kit.directory), lock=lock)
    kit.pager = type(kit.pager)(kit.store)
    kit.space = type(kit.space)(kit.pager, reopened(ledger), Held.of(ledger.records()))
    assert f not in kit.space.inodes
    assert kit.space.get(g).nlink == 0
    kit.space.forget(g, 1)
    assert kit.store.catalog.row("SELECT 1 FROM inodes WHERE ino = ?", g) is None
    kit.space.forget(f, 1)
    assert f not in kit.space.inodes
    assert Held.of(kit.space.ledger.records()).lookups == {}
    assert kit.read("f") == ONE
    kit.close()
