"""The fuzz target of tools/fuzz: the first byte says what is wanted and how much is received at once, the rest is
what the server says."""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ramfs.source.nbd"]):
    from nbd.talk import HONEST, listen

    from ramfs.source.nbd import uri
    from ramfs.source.nbd.states import Goal

from ramfs.errors import UsageError

GOALS = list(Goal)
STEPS = [1, 5, 1 << 30]


def one(data: bytes) -> None:
    """One stream, and the same bytes as a URI."""
    first, rest = data[:1], data[1:]
    number = first[0] if first else 0
    listen(rest, GOALS[number % len(GOALS)], STEPS[number // len(GOALS) % len(STEPS)])
    try:
        parsed = uri.parse("nbd" + rest[:200].decode(errors="replace"))
    except UsageError:
        return
    assert uri.parse(str(parsed)) == parsed


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, ((_, goal), says) in enumerate(HONEST.items()):
            Path(corpus, str(number)).write_bytes(bytes([GOALS.index(goal) + 2 * len(GOALS)]) + says)
        atheris.Setup([*sys.argv, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
