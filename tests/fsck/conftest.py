from collections.abc import Callable
from pathlib import Path

import pytest
from storekit import Kit


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store with a bit of everything; see `contents` for what is in it."""
    directory = tmp_path / "store"
    with Kit(directory) as kit:
        kit.mkdir("vm")
        kit.write("vm/ram", 0, bytes([1]) * 4096 * 20)
        for page in range(20):
            kit.write("vm/ram", page * 4096, bytes([page + 1]) * 100)
        kit.write("vm/state", 0, b"device state")
        kit.snapshot("one", "vm")
        kit.write("vm/ram", 5 * 4096, b"x" * 4096 * 3)
        kit.copy("vm/ram", "clone")
        kit.write("clone", 0, b"c" * 4096)
        kit.digest()
        kit.write("vm/ram", 4096, b"live" * 1024)
    return directory


@pytest.fixture
def opened(store: Path) -> Callable[[], Kit]:
    return lambda: Kit(store)
