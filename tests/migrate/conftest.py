from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Mount
from hosts import NEEDS, Host, hosts
from vm.conftest import Lab
from vm.guest import images


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NEEDS))


class Pair(NamedTuple):
    """Two hosts, and on each a mount with its guests."""

    a: Host
    b: Host
    on_a: Lab
    on_b: Lab


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
