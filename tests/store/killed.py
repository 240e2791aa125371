"""The worker of test_recovery.py: the same work again and again, each time killed one step later.

    killed.py fork DIRECTORY FIRST STOP STRIDE   a child for each step at which to kill; prints [step, acknowledged]
    killed.py once DIRECTORY                     once, to be killed from outside; prints what is acknowledged

A step is a system call on a file of the store (outside of SQLite) or a statement for the catalog. The process
really gets SIGKILL, before the step or after it in turns.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from storekit import ME, Kit

import ramfs.store.files
from ramfs.store.catalog import Catalog
from ramfs.units import PAGE, ROOT


def page(number: int) -> bytes:
    return (b"%08d" % number) * (PAGE // 8)


def pages(first: int, count: int) -> bytes:
    return b"".join(page(first + number) for number in range(count))


State = dict[str, bytes]
"""What a step leaves: contents by path."""


def put(state: State, path: str, offset: int, data: bytes) -> None:
    old = state.get(path, b"").ljust(offset, b"\0")
    state[path] = old[:offset] + data + old[offset + len(data) :]


def work() -> list[tuple[str, Callable[[Kit], None], Callable[[State], None]]]:
    """Name, deed, and what it does to the state."""
    steps: list[tuple[str, Callable[[Kit], None], Callable[[State], None]]] = []

    def step(name: str, deed: Callable[[Kit], object], effect: Callable[[State], object] = lambda state: None) -> None:
        steps.append((name, deed, effect))  # type: ignore[arg-type]

    def write(path: str, offset: int, data: bytes) -> None:
        step(f"write {path}", lambda kit: kit.write(path, offset, data), lambda state: put(state, path, offset, data))

    def truncate(path: str, size: int) -> None:
        def effect(state: State) -> None:
            state[path] = state[path][:size].ljust(size, b"\0")

        step(f"truncate {path}", lambda kit: kit.pager.truncate(kit.image(path), size), effect)

    def snapshot(name: str) -> None:
        def effect(state: State) -> None:
            for path in [path for path in state if not path.startswith(".snap/")]:
                state[f".snap/{name}/{path}"] = state[path]

        step(f"snapshot {name}", lambda kit: kit.snapshot(name), effect)

    def forget(name: str) -> None:
        def effect(state: State) -> None:
            for path in [path for path in state if path.startswith(f".snap/{name}/")]:
                del state[path]

        step(f"delete {name}", lambda kit: kit.delete_snapshot(name), effect)

    def clone(kit: Kit) -> None:
        kit.space.clone(kit.space.lookup(ROOT, b"d"), ROOT, b"e", ME)

    write("f", 0, pages(100, 10))
    write("f", 5 * PAGE + 100, b"partly" * 20)
    step("sync", lambda kit: kit.sync("f"))
    step("mkdir", lambda kit: kit.mkdir("d"))
    write("d/x", 0, pages(200, 4))
    write("d/x", 4 * PAGE, b"ragged end")
    snapshot("one")
    write("f", 2 * PAGE, pages(300, 4))
    write("d/x", PAGE, pages(320, 1))
    step("clone", clone, lambda state: put(state, "e/x", 0, state["d/x"]))
    step("copy", lambda kit: kit.copy("f", "g"), lambda state: put(state, "g", 0, state["f"]))
    write("g", 0, pages(400, 3))
    truncate("f", 6 * PAGE + 50)
    truncate("f", 9 * PAGE)
    write("f", 12 * PAGE + 5, pages(500, 2))
    write("f", PAGE, bytes(3 * PAGE))
    step(
        "shift",
        lambda kit: kit.pager.share(kit.image("g"), 3 * PAGE, kit.image("d/x"), PAGE, 3 * PAGE),
        lambda state: put(state, "d/x", PAGE, state["g"][3 * PAGE : 6 * PAGE]),
    )
    snapshot("two")
    step("digest", lambda kit: kit.digest())
    write("f", 0, pages(600, 2))
    step("collect", lambda kit: kit.collect())
    forget("one")
    step("unlink", lambda kit: kit.unlink("g"), lambda state: state.pop("g"))
    snapshot("three")
    forget("two")
    step("digest again", lambda kit: kit.digest())
    step("merge", lambda kit: kit.merge())
    step("collect again", lambda kit: kit.collect(2))
    write("f", 0, pages(700, 1))
    step("close", lambda kit: kit.close())
    step("open", lambda kit: kit.__init__(kit.directory))  # type: ignore[misc]
    write("f", 3 * PAGE, pages(710, 1))
    step("close again", lambda kit: kit.close())
    return steps


def states() -> list[State]:
    """The state before the first step and after each."""
    state: State = {}
    found = [dict(state)]
    for _, _, effect in work():
        effect(state)
        found.append(dict(state))
    return found


class Killer:
    """Counts the steps and kills at one of them."""

    def __init__(self, when: int) -> None:
        self.when = when
        self.count = 0

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.count += 1
            if self.count == self.when and self.when % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **more)
            if self.count >= self.when > 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def install(self) -> None:
        names = "pwrite ftruncate fdatasync fsync rename unlink open copy_file_range lseek makedirs"
        for name in names.split():
            setattr(os, name, self.wrap(getattr(os, name)))
        ramfs.store.files._fallocate = self.wrap(ramfs.store.files._fallocate)
        Catalog.execute = self.wrap(Catalog.execute)  # type: ignore[method-assign]


def run(directory: str, told: Callable[[int], object]) -> None:
    kit = Kit(directory)
    for number, (_, deed, _) in enumerate(work(), 1):
        deed(kit)
        told(number)


def fork(base: str, first: int, stop: int, stride: int) -> None:
    for when in range(first, stop, stride):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            Killer(when).install()
            run(os.path.join(base, f"{when:05}"), lambda number, pipe=writer: os.write(pipe, bytes([number])))  # type: ignore[misc]
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            acknowledged = pipe.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps([when, acknowledged[-1] if acknowledged else 0]), flush=True)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return


if __name__ == "__main__":
    if sys.argv[1] == "fork":
        fork(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        run(sys.argv[2], lambda number: print(number, flush=True))
