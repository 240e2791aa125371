"""Which pages of a file are what: the attributes ``user.ramfs.pages``, their counts, and ``user.ramfs.states``, where.

An attribute has 64 KiB at most, so runs are told in portions, all from what was found when the first one was asked for.
"""

import json
import re
from collections import OrderedDict
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from ramfs.image.lineage import PageState, count_states, state_runs
from ramfs.inspect.census import Census
from ramfs.inspect.report import Observer
from ramfs.store.images import Image
from ramfs.units import ImageId

#: Runs told in one answer: each has at most 15 bytes.
_RUNS: Final = 4000
_QUESTION: Final = re.compile(rb"user\.ramfs\.states\.(\d{1,11})")
#: Files whose runs are kept until the last of them was asked for.
_KEPT: Final = 4
_NAMES: Final = [state.name.lower() for state in PageState]


def parse_question(name: bytes) -> int | None:
    """From which page on the name of an attribute asks for states; None if it does not."""
    match = _QUESTION.fullmatch(name)
    return None if match is None else int(match[1])


class Looker:
    """Answers these questions. All methods raise StoreDamaged, OSError."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._census = Census(observer.store)
        self._kept: OrderedDict[ImageId, tuple[NDArray[np.int64], int]] = OrderedDict()

    async def counts(self, image: Image) -> bytes:
        """The value of ``user.ramfs.pages``: the counts as a JSON object."""
        counts = await self._census.counts(image)
        if counts is None:
            look, total = self._observer.page_looker(image), image.pages
            counts = await trio.to_thread.run_sync(lambda: count_states(look(), total))
        return json.dumps(counts._asdict()).encode()

    async def runs(self, image: Image, first: int) -> bytes:
        """The value of ``user.ramfs.states.FIRST``: runs from that page on, JSON."""
        if first == 0 or image.id not in self._kept:
            look, total = self._observer.page_looker(image), image.pages
            found = await trio.to_thread.run_sync(lambda: state_runs(look(), total))
            self._kept[image.id] = found, total
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        found, total = self._kept[image.id]
        low = int(np.searchsorted(found[:, 0], first))
        told = found[low : low + _RUNS].tolist()
        following = int(found[low + _RUNS, 0]) if low + _RUNS < len(found) else None
        if following is None:
            self._kept.pop(image.id, None)
        answer = {"states": _NAMES, "runs": told, "total": total, "next": following}
        return json.dumps(answer, separators=(",", ":")).encode()
