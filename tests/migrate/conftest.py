from __future__ import annotations

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
    with hosts() as (a, b):
        labs = [
            Lab(Mount(shm / f"{name}.store", shm / name, prefix=host.prefix)) for name, host in (("A", a), ("B", b))
        ]
        for lab in labs:
            lab.mount.start()
        yield Pair(a, b, *labs)
        # First B: what still arrives there is given up with its source.
        for lab in reversed(labs):
            lab.close()
            lab.mount.__exit__(None, None, None)
