"""Files that arrive, against plain bytearrays: random operations in any order, and any kind of end between them.

What is checked: that absent pages never read as anything but what the source has, however they were copied, cut,
frozen or cut off; that the checker finds nothing; that all space comes back. RAMFS_MODEL_EXAMPLES=1000 makes it a
long run.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import hypothesis.strategies as st
import pytest
import trio
from arrival.inside import ArrivingKit, Shelf
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule
from mount.posix import page_of
from store.test_model import Model, contents, data_of
from storekit import steps_of

from ramfs.store.garbage import Pass
from ramfs.store.repair import check_store
from ramfs.units import PAGE

EXAMPLES = int(os.environ.get("RAMFS_MODEL_EXAMPLES", "40"))
COUNT = 30
ZEROS = {3, 4, 11, 12, 13, 29}
SHELF = {
    "ram": b"".join(bytes(PAGE) if n in ZEROS else page_of(n + 1) for n in range(COUNT)) + b"ragged",
    "other": b"".join(page_of(100 + n) for n in range(7)),
}

offsets = st.builds(
    lambda page, within: page * PAGE + within, st.integers(0, 34), st.sampled_from((0, 0, 1, 100, 4095))
)
lengths = st.builds(
    lambda count, within: max(1, count * PAGE + within), st.integers(0, 12), st.sampled_from((0, 0, 0, 1, 100, -1))
)


def made(data: bytes) -> Model:
    """A file that was just made, and is not synced."""
    model = Model(data)
    model.since = [b"", bytes(data)]
    return model


class ArrivingMachine(RuleBasedStateMachine):
    files = Bundle("files")
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="ramfs-model-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.shelf = Shelf(SHELF)
        self.kit = ArrivingKit(os.path.join(self.directory, "store"), self.shelf)
        self.model: dict[str, Model] = {}
        self.frozen: dict[str, dict[str, bytes]] = {}
        self.count = 0

    def teardown(self) -> None:
        try:
            self.kit.arrive()
            self.check_all()
            assert not self.kit.store.layers.arriving
            assert self.kit.store.catalog.meta("version") == 1
            self.reopen()
            self.check_all()
            for name in self.frozen:
                self.kit.delete_snapshot(name, "vm")
            for name in self.model:
                self.kit.unlink(name)
            self.kit.collect(3)
            assert os.listdir(self.kit.store.layers.directory) == []
            self.kit.close()
            self.check_store()
        finally:
            shutil.rmtree(self.directory)

    # -- helpers

    def new(self) -> str:
        self.count += 1
        return f"vm/f{self.count}"

    def check_store(self) -> None:
        report = check_store(str(self.kit.directory))
        assert not [finding for finding in report.findings if finding.damage], report

    def read(self, path: str, offset: int = 0, length: int = 1 << 30) -> bytes:
        found = []
        image = self.kit.image(path)
        self.shelf.allowed = None
        self.kit.run(
            lambda: self.kit.having(lambda: found.append(self.kit.pager.copy_out(image, offset, length))),
            streaming=False,
        )
        return found[0]

    def check_all(self) -> None:
        for name, model in self.model.items():
            assert self.read(name) == model.data, name
        for snapshot, files in self.frozen.items():
            for name, data in files.items():
                assert self.read(f"vm/.snap/{snapshot}/{name.removeprefix('vm/')}") == data, (snapshot, name)

    def do(self, name: str, work: object, *, meanwhile: int = -1) -> None:
        """Carry something out; with ``meanwhile`` while all arrives, after so many turns of the loop."""
        self.shelf.allowed = None

        async def act() -> None:
            for _ in range(meanwhile):
                await trio.lowlevel.checkpoint()
            await self.kit.having(work)  # type: ignore[arg-type]

        self.kit.run(act, streaming=meanwhile >= 0, patient=False)
        if name in self.model:
            self.model[name].remember()

    def all_synced(self) -> None:
        for model in self.model.values():
            model.synced()

    # -- rules

    @initialize(target=files, verified=st.booleans(), known=st.booleans(), synced=st.booleans())
    def pull(self, verified: bool, known: bool, synced: bool) -> object:
        self.shelf.allowed = 0
        self.shelf.zeros_known = known
        self.kit.pull("vm", verified=verified)
        self.model = {f"vm/{name}": made(data) for name, data in SHELF.items()}
        if synced:
            self.sync()
        return multiple(*self.model)

    @rule(reads=st.integers(0, 6))
    def arrive(self, reads: int) -> None:
        self.shelf.allowed = reads
        self.kit.run()

    @rule(name=files, offset=offsets, length=lengths, kinds=contents, meanwhile=st.integers(-60, 60))
    def write(self, name: str, offset: int, length: int, kinds: list[int], meanwhile: int) -> None:
        image, data = self.kit.image(name), data_of(kinds, length)
        self.model[name].put(offset, data)
        self.do(name, lambda: self.kit.pager.write(image, offset, data), meanwhile=meanwhile)

    @rule(name=files, size=offsets)
    def truncate(self, name: str, size: int) -> None:
        image, data = self.kit.image(name), self.model[name].data
        del data[size:]
        data += bytes(size - len(data))
        self.do(name, lambda: self.kit.pager.truncate(image, size))

    @rule(name=files, offset=offsets, length=lengths)
    def punch(self, name: str, offset: int, length: int) -> None:
        image = self.kit.image(name)
        until = min(length, len(self.model[name].data) - offset)
        if until > 0:
            self.model[name].put(offset, bytes(until))
        self.do(name, lambda: list(self.kit.pager.zero(image, offset, length, keep_size=True)))

    @rule(
        source=files, onto=files, at=offsets, shift=st.integers(-20, 20), skew=st.sampled_from((0, 0, 0, 0, 5)),
        length=lengths, meanwhile=st.integers(-60, 60),
    )  # fmt: skip
    def share(self, source: str, onto: str, at: int, shift: int, skew: int, length: int, meanwhile: int) -> None:
        to = max(0, at + shift * PAGE + skew)
        # The kernel forbids that the ranges overlap.
        if source == onto and at // PAGE <= (to + length) // PAGE and to // PAGE <= (at + length) // PAGE:
            return
        images = self.kit.image(source), self.kit.image(onto)
        data = bytes(self.model[source].data[at : at + length])
        if data:
            self.model[onto].put(to, data)
        self.do(onto, lambda: self.kit.pager.share(images[0], at, images[1], to, length), meanwhile=meanwhile)

    @rule(target=files, source=files, meanwhile=st.integers(-60, 60))
    def clone(self, source: str, meanwhile: int) -> str:
        name = self.new()
        self.model[name] = made(self.model[source].data)
        self.do("", lambda: self.kit.copy(source, name), meanwhile=meanwhile)
        return name

    @rule(name=consumes(files), meanwhile=st.integers(-60, 60))
    def unlink(self, name: str, meanwhile: int) -> None:
        self.do("", lambda: self.kit.unlink(name), meanwhile=meanwhile)
        del self.model[name]

    @rule(target=snapshots)
    def snapshot(self) -> str:
        self.count += 1
        name = f"s{self.count}"
        self.kit.snapshot(name, "vm")
        self.frozen[name] = {file: bytes(model.data) for file, model in self.model.items()}
        return name

    @rule(target=files, snapshot=snapshots)
    def copy_from_snapshot(self, snapshot: str) -> object:
        if not self.frozen[snapshot]:
            return multiple()
        file, data = min(self.frozen[snapshot].items())
        name = self.new()
        self.kit.copy(f"vm/.snap/{snapshot}/{file.removeprefix('vm/')}", name)
        self.model[name] = made(data)
        return name

    @rule(name=consumes(snapshots))
    def delete_snapshot(self, name: str) -> None:
        self.kit.delete_snapshot(name, "vm")
        del self.frozen[name]

    @rule(name=files, offset=offsets, length=lengths)
    def check(self, name: str, offset: int, length: int) -> None:
        assert self.read(name, offset, length) == self.model[name].data[offset : offset + length]

    @rule()
    def sync(self) -> None:
        self.kit.sync()
        self.all_synced()

    @rule(step=st.integers(0, 5), reads=st.integers(0, 6))
    def collect(self, step: int, reads: int) -> None:
        """A garbage pass, and between two of its steps something arrives."""
        self.kit.forget()
        work = Pass(self.kit.store, collapse_above=1)
        self.all_synced()
        for number, part in enumerate(steps_of(work)):
            part()
            if number == step:
                self.shelf.allowed = reads
                self.kit.run(streaming=number != 0)
        work.close()
        self.kit.pulls.tidy()

    @rule()
    def digest(self) -> None:
        self.kit.digest()

    @rule(takeover=st.booleans())
    def kill(self, takeover: bool) -> None:
        if takeover:
            self.kit.take_over()
            self.kit.settle()
        else:
            self.kit.kill()
            self.check_store()
            self.kit.reopen()
        self.all_synced()

    @rule()
    def power_loss(self) -> None:
        self.kit.power_loss()
        self.check_store()
        self.kit.reopen()
        for name, model in self.model.items():
            found = self.read(name)
            # All was synced at any time since: an arriving layer that is complete takes its tables along.
            versions = model.since or [b""]
            assert len(found) in map(len, versions)
            for start in range(0, len(found), PAGE):
                there = found[start : start + PAGE]
                allowed = {then[start : start + PAGE].ljust(len(there), b"\0")[: len(there)] for then in versions}
                assert there in allowed, (name, start // PAGE)
            model.data[:] = found
            model.synced()

    @rule()
    def reopen(self) -> None:
        self.kit.close()
        self.check_store()
        self.kit.reopen()
        self.all_synced()


ArrivingMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
test_model = pytest.mark.timeout(600)(ArrivingMachine.TestCase)  # half a minute when the machine has nothing else to do
