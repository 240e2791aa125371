"""Compares what has come of an arriving layer with digests that became known later."""

from typing import Final

import numpy as np
import trio

from ramfs.arrival.fetch import Arrival
from ramfs.errors import SourceBroken
from ramfs.image.digest import DIGEST, digest_pages
from ramfs.image.table import Mask, runs_of
from ramfs.pager import Pager
from ramfs.store.files import read_exactly
from ramfs.store.presence import ABSENT, STORED, States
from ramfs.units import PAGE, PAGE_SHIFT

#: Pages that are read at once: a millisecond or so of a thread that holds the interpreter now and then.
_PART: Final = 256


async def vouch(pager: Pager, arrival: Arrival, digests: str, seen: Mask) -> Mask:
    """Compare the pages of a layer that are here with a file of digests, but for those ``seen``, until no more come.

    Returns which pages were seen. Raises SourceBroken if one is not what its digest says, OSError.
    """
    states, path = arrival.presence.states, pager.layers.path(arrival.layer.id)
    while arrival.is_arriving and (fresh := (states != ABSENT) & ~seen).any():
        wrong = await trio.to_thread.run_sync(_wrong, path, digests, states.copy(), fresh)
        if wrong:
            raise SourceBroken(f"{arrival.source.description}: {wrong} pages that came before are not what it promises")
        seen = seen | fresh
    return seen


def _wrong(pages: str, digests: str, states: States, fresh: Mask) -> int:
    """How many of some pages have not the digests in a file (any thread). Raises OSError."""
    wrong = 0
    with open(pages, "rb", buffering=0) as data, open(digests, "rb", buffering=0) as file:
        for first, stop in runs_of(fresh):
            for low in range(first, stop, _PART):
                high = min(low + _PART, stop)
                expected = read_exactly(file.fileno(), (high - low) * DIGEST, low * DIGEST)
                promised = np.frombuffer(expected, np.uint64).reshape(-1, 2)
                stored = states[low:high] == STORED
                found = np.zeros_like(promised)  # as of zeros
                if stored.any():
                    read = read_exactly(data.fileno(), (high - low) * PAGE, low << PAGE_SHIFT)
                    made = digest_pages(read.ljust((high - low) * PAGE, b"\0"))
                    found[stored] = np.frombuffer(made, np.uint64).reshape(-1, 2)[stored]
                wrong += int(np.count_nonzero((found != promised).any(axis=1)))
    return wrong
