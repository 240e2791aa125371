"""Who waits for absent pages, and is killed meanwhile: his request is given up, so that he can die.

The kernel lets a process that was killed wait for the answer to most requests, however long that takes. It tells of
a signal (FUSE_INTERRUPT), but only of the first, and not which: to a fault of a process that lives on, EINTR would be
SIGBUS. So we look ourselves at those who wait: SIGKILL stays pending in each thread of a process until it is gone.
"""

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

import trio

from ramfs.errors import FileError

#: Seconds between looks; longer when they take more than a part of that.
_PERIOD: Final = 0.2
_PART: Final = 20
_KILLED: Final = 1 << 8  # SIGKILL, of a mask of pending signals


class Waiting:
    """The requests that wait at the moment."""

    def __init__(self) -> None:
        self._scopes: dict[trio.CancelScope, int] = {}
        self._watching = False

    @contextlib.contextmanager
    def of(self, thread: int) -> Iterator[None]:
        """Wait in this block for the sake of a thread, by its id; raises EINTR when that is killed. 0: not known."""
        with trio.CancelScope() as scope:
            self._scopes[scope] = thread
            if not self._watching:
                self._watching = True
                trio.lowlevel.spawn_system_task(self._watch)
            try:
                yield
            finally:
                del self._scopes[scope]
        if scope.cancelled_caught:
            raise FileError(errno.EINTR)

    async def _watch(self) -> None:
        """Look at all of them until there are none."""
        pause = _PERIOD
        while True:
            await trio.sleep(pause)
            if not self._scopes:
                self._watching = False
                return
            began = trio.current_time()
            for scope, thread in list(self._scopes.items()):
                if thread and _is_killed(thread):
                    scope.cancel()
            pause = max(_PERIOD, _PART * (trio.current_time() - began))


def _is_killed(thread: int) -> bool:
    """Is a thread about to end, or gone?"""
    try:
        with open(f"/proc/{thread}/status", "rb", buffering=0) as file:
            text = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return True
    _, _, rest = text.partition(b"\nSigPnd:")
    return bool(int(rest.split(None, 1)[0] or b"0", 16) & _KILLED) if rest else False
