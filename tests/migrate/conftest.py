from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from hosts import NEEDS, hosts
from migrate.tool import Pair, Tool
from vm.conftest import Lab
from vm.guest import Guest, images


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NEEDS))


@pytest.fixture(scope="session", autouse=True)
def guest_images() -> None:
    """Have the guest built before the first test's time runs."""
    images()


@pytest.fixture
def pair(shm: Path) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        labs = []
        a, b = stack.enter_context(hosts())
        for name, host in (("A", a), ("B", b)):  # taken down in the other order: what still arrives on B is given up
            labs.append(Lab(stack.enter_context(Mount(shm / f"{name}.store", shm / name, prefix=host.prefix))))
            stack.callback(labs[-1].close)
        yield Pair(a, b, *labs)


@pytest.fixture
def migrate(pair: Pair, tmp_path: Path) -> Iterator[Callable[..., Tool]]:
    made: list[Tool] = []

    def make(guest: Guest, *options: str, **more: Any) -> Tool:
        room = tmp_path / str(len(made))
        room.mkdir()
        made.append(Tool(pair, guest, room, *options, **more))
        return made[-1]

    yield make
    for tool in made:
        tool.close()
