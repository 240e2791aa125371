"""The model test: random acts through the real mount, against plain bytearrays.

Bounded for every day; `RAMFS_MODEL_SECONDS=3600 pytest tests/mount/test_model.py` searches for an hour.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from harness import Mount
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from mount.posix import KEEP_SIZE, PAGE, PUNCH, ZERO_RANGE, extents, fallocate, opened, pattern, read

SECONDS = float(os.environ.get("RAMFS_MODEL_SECONDS", "12"))
LARGEST = 40 * PAGE

offsets = st.one_of(
    st.integers(0, 24).map(lambda n: n * PAGE),
    st.integers(0, 24 * PAGE),
    st.sampled_from([1, PAGE - 1, PAGE + 1, 2 * PAGE - 1]),
)
lengths = st.one_of(
    st.integers(1, 12).map(lambda n: n * PAGE), st.integers(1, 5 * PAGE), st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1])
)


class TreeMachine(RuleBasedStateMachine):
    """A tree of directories with one or two files each, snapshots of them, and what the model says of both."""

    base: Path
    deadline: float

    files = Bundle("files")
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        directory = Path(tempfile.mkdtemp(dir=self.base))
        self.mount = Mount(directory / "store", directory / "mnt").start()
        self.contents: dict[str, bytearray] = {}
        self.frozen: dict[str, dict[str, bytes]] = {}
        self.maps: dict[str, mmap.mmap] = {}
        self.numbers = 0

    def teardown(self) -> None:
        try:
            self.drop_maps()
            self.everything_is_as_the_model_says()
            if self.mount.running:
                self.mount.umount()
        finally:
            self.mount.abandon()
            subprocess.run(["rm", "-rf", self.mount.store.parent], check=True)

    def drop_maps(self) -> None:
        for memory in self.maps.values():
            memory.close()
        self.maps.clear()

    def new(self, prefix: str) -> str:
        self.numbers += 1
        return f"{prefix}{self.numbers}"

    def path(self, name: str) -> Path:
        return self.mount.path / name

    # --- acts ---

    @rule(target=files, size=st.one_of(st.just(0), lengths))
    def create(self, size: int) -> str:
        directory = self.new("d")
        self.path(directory).mkdir()
        name = f"{directory}/ram"
        self.path(name).write_bytes(pattern(size, self.numbers))
        self.contents[name] = bytearray(pattern(size, self.numbers))
        return name

    @rule(name=files, offset=offsets, length=lengths, seed=st.integers(1, 200))
    def write(self, name: str, offset: int, length: int, seed: int) -> None:
        self.store(name, offset, pattern(length, seed))

    @rule(name=files, offset=offsets, length=lengths)
    def write_zeros(self, name: str, offset: int, length: int) -> None:
        self.store(name, offset, bytes(length))

    def store(self, name: str, offset: int, data: bytes) -> None:
        if name not in self.contents:
            return
        with opened(self.path(name)) as fd:
            assert os.pwrite(fd, data, offset) == len(data)
        model = self.contents[name]
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data

    @rule(name=files, size=offsets)
    def truncate(self, name: str, size: int) -> None:
        if name not in self.contents:
            return
        memory = self.maps.pop(name, None)
        if memory is not None:
            memory.close()
        os.truncate(self.path(name), size)
        model = self.contents[name]
        del model[size:]
        model.extend(bytes(size - len(model)))

    @rule(name=files, mode=st.sampled_from((PUNCH, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)), offset=offsets, length=lengths)
    def zero(self, name: str, mode: int, offset: int, length: int) -> None:
        if name not in self.contents:
            return
        with opened(self.path(name)) as fd:
            fallocate(fd, mode, offset, length)
        model = self.contents[name]
        if mode == ZERO_RANGE:
            model.extend(bytes(max(0, offset + length - len(model))))
        stop = min(offset + length, len(model))
        model[offset:stop] = bytes(max(0, stop - offset))

    @rule(name=files)
    def holes_are_zeros(self, name: str) -> None:
        """Also where a mapping has changed them, and the daemon was not told yet."""
        if name not in self.contents:
            return
        model = bytearray(self.contents[name])
        with opened(self.path(name), os.O_RDONLY) as fd:
            for start, stop in extents(fd):
                model[start:stop] = bytes(stop - start)
        assert not any(model)

    @rule(source=files, onto=files, source_offset=offsets, target_offset=offsets, length=lengths)
    def copy_range(self, source: str, onto: str, source_offset: int, target_offset: int, length: int) -> None:
        if source not in self.contents or onto not in self.contents:
            return
        self.copy(self.path(source), self.contents[source], onto, source_offset, target_offset, length)

    @rule(snapshot=snapshots, onto=files, source_offset=offsets, target_offset=offsets, length=lengths)
    def copy_range_from_a_snapshot(
        self, snapshot: str, onto: str, source_offset: int, target_offset: int, length: int
    ) -> None:
        if onto not in self.contents or snapshot not in self.frozen:
            return
        source = bytearray(self.frozen[snapshot]["ram"])
        self.copy(self.path(snapshot) / "ram", source, onto, source_offset, target_offset, length)

    def copy(
        self, path: Path, source: bytearray, target: str, source_offset: int, target_offset: int, length: int
    ) -> None:
        model = self.contents[target]
        length = max(0, min(length, len(source) - source_offset, LARGEST - target_offset))
        if source is model and abs(source_offset - target_offset) < length:
            return
        data = bytes(source[source_offset : source_offset + length])
        with opened(path, os.O_RDONLY) as one, opened(self.path(target)) as two:
            done = 0
            while done < length:
                count = os.copy_file_range(one, two, length - done, source_offset + done, target_offset + done)
                assert count > 0
                done += count
        if length:
            model.extend(bytes(max(0, target_offset + length - len(model))))
            model[target_offset : target_offset + length] = data

    @rule(target=snapshots, name=files)
    def snapshot(self, name: str) -> str:
        directory = name.partition("/")[0]
        where = f"{directory}/.snap/{self.new('s')}"
        if name in self.contents:
            self.path(where).mkdir()
            self.frozen[where] = {"ram": bytes(self.contents[name])}
        return where

    @rule(target=files, source=files)
    def clone(self, source: str) -> str:
        directory = self.new("c")
        if source in self.contents:
            subprocess.run(["cp", "-r", self.path(source).parent, self.path(directory)], check=True)
            self.contents[f"{directory}/ram"] = bytearray(self.contents[source])
        return f"{directory}/ram"

    @rule(snapshot=snapshots)
    def roll_back_by_copy(self, snapshot: str) -> None:
        name = f"{snapshot.partition('/')[0]}/ram"
        if snapshot in self.frozen and name in self.contents:
            memory = self.maps.pop(name, None)
            if memory is not None:
                memory.close()
            subprocess.run(["cp", self.path(snapshot) / "ram", self.path(name)], check=True)
            self.contents[name] = bytearray(self.frozen[snapshot]["ram"])

    @rule(name=consumes(files))
    def delete(self, name: str) -> None:
        if name in self.contents:
            memory = self.maps.pop(name, None)
            self.path(name).unlink()
            if memory is not None:
                assert memory[:] == self.contents[name][: len(memory)]
                memory.close()
            del self.contents[name]

    @rule(snapshot=consumes(snapshots))
    def delete_snapshot(self, snapshot: str) -> None:
        if self.frozen.pop(snapshot, None) is not None:
            self.path(snapshot).rmdir()

    @rule(name=files, offset=offsets, length=lengths, seed=st.integers(1, 200), sync=st.booleans())
    def store_through_a_mapping(self, name: str, offset: int, length: int, seed: int, sync: bool) -> None:
        if not self.contents.get(name):
            return
        model = self.contents[name]
        memory = self.maps.get(name)
        if memory is None:
            with opened(self.path(name)) as fd:
                memory = self.maps[name] = mmap.mmap(fd, len(model))
        assert memory[:] == model[: len(memory)]
        stop = min(offset + length, len(memory))
        if offset < stop:
            memory[offset:stop] = model[offset:stop] = pattern(stop - offset, seed)
        if sync:
            memory.flush()

    # --- ends ---

    @precondition(lambda self: self.contents)
    @rule()
    def kill_and_mount(self) -> None:
        for memory in self.maps.values():
            memory.flush()  # what the kernel alone has, a killed daemon cannot keep
        self.mount.kill()
        self.drop_maps()
        self.mount.start()

    @precondition(lambda self: self.contents)
    @rule()
    def unmount_and_mount(self) -> None:
        self.drop_maps()
        self.mount.restart()

    # --- what must hold ---

    @invariant()
    def files_are_as_the_model_says(self) -> None:
        for name, model in self.contents.items():
            assert read(self.path(name)) == model, name

    def everything_is_as_the_model_says(self) -> None:
        self.files_are_as_the_model_says()
        for where, files in self.frozen.items():
            for name, expected in files.items():
                assert read(self.path(where) / name) == expected, (where, name)
        directories = {name.partition("/")[0] for name in self.contents}
        assert directories <= set(os.listdir(self.mount.path))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_the_tree_is_as_the_model_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    TreeMachine.base = tmp_path_factory.mktemp("model")
    deadline, rounds = time.monotonic() + SECONDS, 0
    while rounds == 0 or time.monotonic() < deadline:
        run(
            TreeMachine,
            settings=settings(
                max_examples=5,
                stateful_step_count=30,
                derandomize=rounds == 0 and settings().derandomize,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )
        rounds += 1
