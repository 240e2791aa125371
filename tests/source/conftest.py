"""An image on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from source.cases import sample, write_sparse


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse file with the sample, alone in a directory but for an empty file."""
    path = tmp_path_factory.mktemp("source") / "ram"
    write_sparse(path, sample())
    (path.parent / "empty").touch()
    return path
