"""What the status says is so."""

from __future__ import annotations

import json

from harness import Mount


def test_memory_is_that_of_the_daemon_and_not_of_who_started_it(mounted: Mount) -> None:
    mounted.umount()
    large = bytearray(b"x") * (600 << 20)
    mounted.start()
    told = json.loads((mounted.path / ".ramfs" / "status.json").read_bytes())
    assert len(large) == 600 << 20
    assert 10 << 20 < told["memory_bytes"] < 300 << 20
