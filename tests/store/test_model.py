"""The store against plain bytearrays: random operations in any order, and any kind of end between them.

What is checked: reads; that snapshots and copies never change with their origin; that a killed daemon loses
nothing; that power loss leaves of each page what was last synced or something written since; that the checker
finds nothing to complain about in a store that has only been used, killed and cut off; that all space comes
back. RAMFS_MODEL_EXAMPLES=5000 makes it a long run.
"""

import ctypes
import os
import shutil
import stat
import tempfile
from unittest import mock

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from storekit import ME

from ramfs.image.table import equal_runs
from ramfs.namespace import Inode, Namespace
from ramfs.pager import Pager
from ramfs.store.garbage import Pass
from ramfs.store.images import Image
from ramfs.store.layers import BASE, LIMIT
from ramfs.store.repair import check_store
from ramfs.store.store import Store
from ramfs.units import PAGE, ROOT, SNAP_BIT, InodeNumber

EXAMPLES = int(os.environ.get("RAMFS_MODEL_EXAMPLES", "120"))
#: A table chunk is 1024 pages: files reach a little beyond one, and the pages around its end are busiest.
LARGEST = 1027 * PAGE

pages = st.one_of(st.integers(0, 6), st.integers(1021, 1026))
offsets = st.builds(lambda page, within: page * PAGE + within, pages, st.sampled_from((0, 0, 1, 100, 4095)))
lengths = st.builds(
    lambda count, within: max(1, count * PAGE + within), st.integers(0, 4), st.sampled_from((0, 0, 1, 100, -1))
)
#: A page's worth of contents each: zeros, and things that differ from them at one end only.
contents = st.lists(st.sampled_from((0, 0, 1, 2, 3)), min_size=1, max_size=5)


def data_of(kinds: list[int], length: int) -> bytes:
    made = bytearray()
    for number in range(length // PAGE + 1):
        kind = kinds[number % len(kinds)]
        made += (bytes(PAGE), os.urandom(PAGE), b"\1" + bytes(PAGE - 1), bytes(PAGE - 1) + b"\1")[kind]
    return bytes(made[:length])


def mapped_bytes(pager: Pager, image: Image, offset: int, length: int) -> bytes:
    """What the extension gives to the kernel: first gather all addresses, then read."""
    plan = pager.plan(image, offset, length)
    if plan is None:
        return b""
    entries, start, end, places = plan
    pieces: list[tuple[int, int]] = []
    for a, b, layer in equal_runs(entries):
        first, last = start // PAGE + a, start // PAGE + b - 1
        low, high = max(start, first * PAGE), min(end, (last + 1) * PAGE)
        address = 0
        if layer:
            known = layer < len(places) and places[layer, BASE] and last < places[layer, LIMIT]
            address = int(places[layer, BASE]) + last * PAGE if known else pager.layers.map(layer, last)
            address += low - last * PAGE
        pieces.append((address, high - low))
    return b"".join(ctypes.string_at(at, size) if at else bytes(size) for at, size in pieces)


class Model:
    """A file as it should be, and what it was at each moment since it was last synced (None: never was)."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.since: list[bytes] | None = None

    def remember(self) -> None:
        if self.since is not None:
            self.since.append(bytes(self.data))

    def synced(self) -> None:
        self.since = [bytes(self.data)]

    def put(self, offset: int, data: bytes) -> None:
        if offset > len(self.data):
            self.data += bytes(offset - len(self.data))
        self.data[offset : offset + len(data)] = data


class StoreMachine(RuleBasedStateMachine):
    files = Bundle("files")
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.directory = tempfile.mkdtemp(prefix="ramfs-model-", dir=base)
        self.model: dict[bytes, Model] = {}
        self.frozen: dict[bytes, dict[bytes, bytes]] = {}
        self.count = 0
        self.open()

    def open(self) -> None:
        self.store = Store(self.directory, create=True)
        self.pager = Pager(self.store)
        self.space = Namespace(self.pager)

    def teardown(self) -> None:
        try:
            self.check_all()
            self.reopen()
            self.check_all()
            for name in list(self.frozen):
                self.space.delete_snapshot(InodeNumber(ROOT | SNAP_BIT), name)
            for name in list(self.model):
                self.space.unlink(ROOT, name)
            self.forget()
            for _ in range(3):
                trio.run(self.pager.collect)
            assert os.listdir(self.store.layers.directory) == []
            assert os.listdir(self.store.images.directory) == []
            assert not self.store.layers.by_id
            self.store.close()
            self.check_store()
        finally:
            shutil.rmtree(self.directory)

    # -- helpers

    def inode(self, name: bytes) -> Inode:
        inode = self.space.lookup(ROOT, name)
        assert inode.image is not None
        return inode

    def image(self, name: bytes) -> Image:
        return self.inode(name).file

    def name(self) -> bytes:
        self.count += 1
        return b"f%d" % self.count

    def bytes_of(self, image: Image) -> bytes:
        data = self.pager.copy_out(image, 0, image.size)
        for start in range(0, image.size, 1 << 20):
            assert mapped_bytes(self.pager, image, start, 1 << 20) == data[start : start + (1 << 20)]
        return data

    def check_all(self) -> None:
        for name, model in self.model.items():
            assert self.bytes_of(self.image(name)) == model.data, name
        for snapshot, files in self.frozen.items():
            for name, data in files.items():
                top = self.space.lookup(InodeNumber(ROOT | SNAP_BIT), snapshot)
                assert self.bytes_of(self.space.lookup(top.ino, name).file) == data, (snapshot, name)

    def check_store(self) -> None:
        report = check_store(self.directory)
        assert not [finding for finding in report.findings if finding.damage], report

    # -- rules

    @initialize(target=files)
    def first(self) -> bytes:
        return self.create()

    @rule(target=files)
    def create(self) -> bytes:
        name = self.name()
        self.space.make(ROOT, name, stat.S_IFREG | 0o600, ME)
        self.model[name] = Model()
        return name

    @rule(name=files, offset=offsets, length=lengths, kinds=contents)
    def write(self, name: bytes, offset: int, length: int, kinds: list[int]) -> None:
        data = data_of(kinds, length)
        assert self.pager.write(self.image(name), offset, data) == length
        self.model[name].put(offset, data)
        self.model[name].remember()

    @rule(name=files, size=offsets)
    def truncate(self, name: bytes, size: int) -> None:
        self.pager.truncate(self.image(name), size)
        data = self.model[name].data
        if size <= len(data):
            del data[size:]
        else:
            data += bytes(size - len(data))
        self.model[name].remember()

    @rule(name=files, offset=offsets, length=lengths, keep_size=st.booleans(), snapshot=st.booleans())
    def zero(self, name: bytes, offset: int, length: int, keep_size: bool, snapshot: bool) -> None:
        """In parts of two pages, and perhaps with a freeze in between."""
        with mock.patch("ramfs.pager._ZERO_AT_ONCE", 2):
            for _ in self.pager.zero(self.image(name), offset, length, keep_size=keep_size):
                if snapshot:
                    self.snapshot_given_up()
        if keep_size:
            length = min(length, len(self.model[name].data) - offset)
        if length > 0:
            self.model[name].put(offset, bytes(length))
        self.model[name].remember()

    @rule(name=files, offset=offsets, length=lengths, keep_size=st.booleans())
    def allocate(self, name: bytes, offset: int, length: int, keep_size: bool) -> None:
        self.pager.allocate(self.image(name), offset, length, keep_size=keep_size)
        data = self.model[name].data
        if not keep_size:
            data += bytes(max(0, offset + length - len(data)))
        self.model[name].remember()

    @rule(name=files)
    def holes_are_zeros(self, name: bytes) -> None:
        """And what is no hole has an entry in the table."""
        image, data = self.image(name), self.model[name].data
        at, stored = 0, 0
        while at < image.size:
            start, _ = self.pager.seek(image, at, os.SEEK_DATA)
            assert not any(data[at:start])
            if start == image.size:
                break
            at, end = self.pager.seek(image, start, os.SEEK_HOLE)
            assert start < at <= end <= image.size
            assert at == image.size or self.pager.seek(image, at, os.SEEK_HOLE) == (at, end)
            stored += -(-at // PAGE) - start // PAGE
        assert stored == image.table.resident()

    @rule(source=files, onto=files, at=offsets, to=offsets, length=lengths)
    def share(self, source: bytes, onto: bytes, at: int, to: int, length: int) -> None:
        # The kernel forbids that the ranges overlap, and the pager relies on it for whole pages.
        if source == onto and at // PAGE <= (to + length) // PAGE and to // PAGE <= (at + length) // PAGE:
            return
        data = bytes(self.model[source].data[at : at + length])
        assert self.pager.share(self.image(source), at, self.image(onto), to, length) == len(data)
        if data:
            self.model[onto].put(to, data)
            self.model[onto].remember()

    @rule(source=files, onto=files)
    def copy_whole(self, source: bytes, onto: bytes) -> None:
        if source != onto:
            self.pager.truncate(self.image(onto), 0)
            size = len(self.model[source].data)
            assert self.pager.share(self.image(source), 0, self.image(onto), 0, size) == size
            self.model[onto].data[:] = b""
            self.model[onto].remember()
            self.model[onto].data[:] = self.model[source].data
            self.model[onto].remember()

    @rule(target=files)
    def clone(self) -> object:
        """Clone the root into a directory below it, then take the files out of there."""
        names = list(self.model)
        top = self.space.clone(self.space.get_root(), ROOT, b"clone", ME)
        made = []
        for name in names:
            new = self.name()
            self.space.rename(top.ino, name, ROOT, new)
            self.model[new] = Model(self.model[name].data)
            made.append(new)
        self.space.rmdir(ROOT, b"clone")
        while len(self.model) > 6 and made:
            doomed = made.pop()
            self.space.unlink(ROOT, doomed)
            del self.model[doomed]
        return multiple(*made)

    @rule(name=consumes(files))
    def unlink(self, name: bytes) -> None:
        self.space.unlink(ROOT, name)
        del self.model[name]

    @rule(target=snapshots)
    def snapshot(self) -> bytes:
        name = self.name()
        frozen = self.space.freeze(self.space.get_root(), name)
        trio.run(self.pager.sync, frozen.images)
        frozen.commit()
        self.store.catalog.sync()
        self.frozen[name] = {file: bytes(model.data) for file, model in self.model.items()}
        return name

    @rule()
    def forget(self) -> None:
        """The kernel lets go of all inodes."""
        for inode in list(self.space.inodes.values()):
            self.space.let_go(inode)

    @rule()
    def snapshot_given_up(self) -> None:
        self.space.freeze(self.space.get_root(), b"given-up").abort()

    @rule(target=files, snapshot=snapshots)
    def copy_from_snapshot(self, snapshot: bytes) -> object:
        made = []
        top = self.space.lookup(InodeNumber(ROOT | SNAP_BIT), snapshot)
        for name, data in sorted(self.frozen[snapshot].items())[:1]:
            new = self.name()
            inode = self.space.make(ROOT, new, stat.S_IFREG | 0o600, ME)
            source = self.space.lookup(top.ino, name).file
            assert self.pager.share(source, 0, inode.file, 0, len(data)) == len(data)
            self.model[new] = Model(data)
            made.append(new)
        return multiple(*made)

    @rule(name=consumes(snapshots))
    def delete_snapshot(self, name: bytes) -> None:
        self.space.delete_snapshot(InodeNumber(ROOT | SNAP_BIT), name)
        del self.frozen[name]

    @rule(name=files)
    def sync(self, name: bytes) -> None:
        trio.run(self.pager.sync, [self.image(name)])
        self.model[name].synced()

    @rule()
    def collect(self) -> None:
        trio.run(self.pager.collect)
        for model in self.model.values():
            model.synced()

    @rule(name=files, offset=offsets, length=lengths, kinds=contents, freeze=st.booleans(), step=st.integers(0, 4))
    def collect_meanwhile(
        self, name: bytes, offset: int, length: int, kinds: list[int], freeze: bool, step: int
    ) -> None:
        """A garbage pass, and between two of its steps somebody writes and copies."""
        work = Pass(self.store, collapse_above=1)
        for model in self.model.values():
            model.synced()
        for number, part in enumerate((work.settle, work.scan, work.rescan, work.decide, work.reclaim, work.finish)):
            part()
            if number == step:
                self.write(name, offset, length, kinds)
                if freeze:
                    self.snapshot_meanwhile()
        work.close()

    def snapshot_meanwhile(self) -> None:
        """Not synced and not named before the pass is over: a sync waits for it."""
        self.space.freeze(self.space.get_root(), b"given-up").abort()

    @rule()
    def digest(self) -> None:
        for layer in self.pager.undigested():
            trio.run(self.pager.digest, layer)

    @rule()
    def merge(self) -> None:
        self.digest()
        work = Pass(self.store, collapse_above=1)
        for part in (work.settle, work.scan, work.rescan, work.decide, work.reclaim, work.finish):
            part()
        work.close()
        for model in self.model.values():
            model.synced()

    @rule()
    def kill(self) -> None:
        self.store.abandon()
        self.check_store()
        self.open()
        self.check_all()
        for model in self.model.values():
            model.synced()

    @rule()
    def power_loss(self) -> None:
        """The catalog is whole here; tests/power loses parts of it too."""
        self.store.catalog.set_meta("boot_id", "another")
        self.store.abandon()
        self.check_store()
        self.open()
        for name, model in self.model.items():
            found = self.bytes_of(self.image(name))
            if model.since is None:
                assert found == b""
            else:
                assert len(found) == len(model.since[0])
                for start in range(0, len(found), PAGE):
                    there = found[start : start + PAGE]
                    allowed = {then[start : start + PAGE].ljust(len(there), b"\0") for then in model.since}
                    assert there in allowed, (name, start // PAGE)
            model.data[:] = found
            model.synced()
        self.check_all()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.check_store()
        self.open()
        for model in self.model.values():
            model.synced()

    @invariant()
    def one_live_layer_for_each_image(self) -> None:
        live = [row["live"] for row in self.store.catalog.execute("SELECT live FROM images WHERE live IS NOT NULL")]
        unsealed = [layer.id for layer in self.store.layers.by_id.values() if not layer.sealed]
        assert sorted(live) == sorted(unsealed)


StoreMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None)
test_store = pytest.mark.timeout(600)(StoreMachine.TestCase)  # half a minute when the machine has nothing else to do
