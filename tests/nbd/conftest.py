"""Certificates, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbd.servers import make_authority, make_certificate


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories as nbdkit's and libnbd's --tls-certificates have them.

    ``good`` (names localhost, 127.0.0.1 and inner.example), ``expired``, both of one authority; ``other``, of another
    one. ``authority`` has the first authority's certificate and no client's.
    """
    base = tmp_path_factory.mktemp("pki")
    for name in ("good", "expired", "other", "authority"):
        (base / name).mkdir()
    make_authority(base / "good")
    for name in ("expired", "authority"):
        for part in ("ca-cert.pem", "ca-key.pem"):
            (base / name / part).write_bytes((base / "good" / part).read_bytes())
    make_authority(base / "other", "another one")
    names = "DNS:localhost,DNS:inner.example,IP:127.0.0.1"
    make_certificate(base / "good", "server", names)
    make_certificate(base / "good", "client", "DNS:client")
    make_certificate(base / "expired", "server", names, expired=True)
    make_certificate(base / "other", "server", names)
    make_certificate(base / "other", "client", "DNS:client")
    return base
