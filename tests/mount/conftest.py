"""One mount for each module, a directory of its own for each test; other users where a test needs them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mount

_numbers = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount for all tests of a module."""
    base = tmp_path_factory.mktemp("shared")
    with Mount(base / "store", base / "mnt") as mount:
        yield mount


@pytest.fixture
def here(shared: Mount) -> Path:
    """A fresh directory on the module's mount."""
    assert shared.running, f"the daemon has died: {shared.log}"
    path = shared.path / f"test{next(_numbers)}"
    path.mkdir()
    return path


@pytest.fixture
def public(tmp_path: Path, make_mount: Callable[..., Mount]) -> Mount:
    """A mount with allow_other that other users can reach by its path."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    mount = make_mount(options=("allow_other",))
    mount.path.chmod(0o755)
    return mount
