"""Exceptions into errno: the one place where that is decided."""

import contextlib
import errno
import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from ramfs.errors import FileError, RamfsError, SourceError
from ramfs.fuse.extension import native, pyfuse3
from ramfs.store.outcomes import REQUEST

log = logging.getLogger(__name__)

#: Set in the number of a request that the kernel asks again (FUSE_UNIQUE_RESEND).
AGAIN: Final = 1 << 63

P = ParamSpec("P")
T = TypeVar("T")


class Requests(Protocol):
    """What wants to know of requests that must not be carried out twice."""

    def asked_again(self, request: int) -> Callable[[], None]:
        """Take back what was recorded for it; what is returned is called once it was carried out."""
        ...

    def concluded(self, request: int) -> None:
        """The answer is on its way."""
        ...

    def took(self, request: str, begun: float) -> None:
        """A handler of that name has ended, which began at a time of time.monotonic."""
        ...


R = TypeVar("R", bound=Requests)


def errno_of(exc: Exception, request: str, details: tuple[Any, ...]) -> int:
    """The errno that a request fails with. What nobody foresaw is logged with the request, and is EIO."""
    if isinstance(exc, FileError):
        if exc.errno == errno.EBUSY:
            log.info("%s%r: %s", request, details, exc)
        return exc.errno
    if isinstance(exc, pyfuse3.FUSEError):
        return int(exc.errno)
    if isinstance(exc, SourceError):  # told once by the pull, and met by whatever touches an absent page
        log.debug("%s%r: %s", request, details, exc)
        return exc.errno
    if isinstance(exc, RamfsError):
        log.error("%s%r: %s", request, details, exc)
        return exc.errno if exc.errno != errno.EUCLEAN else errno.EIO
    if isinstance(exc, sqlite3.Error):
        full = getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
        log.error("%s%r: the catalog of the store: %s", request, details, exc)
        return errno.ENOSPC if full else errno.EIO
    if isinstance(exc, OSError) and exc.errno:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            log.error("%s%r: the store: %s", request, details, exc)
            # What the store's files say (ENOENT: removed under us) is not what the caller's file is.
            return errno.EIO
        return exc.errno
    if isinstance(exc, OverflowError):
        return errno.EFBIG
    log.exception("%s%r: unexpected error", request, details)
    return errno.EIO


def _nothing() -> None:
    pass


@contextlib.contextmanager
def request_of(requests: Requests) -> Iterator[None]:
    """Around the handling of one request: REQUEST is its number. Enter before anything is awaited."""
    number = native.unique()
    request = number & ~AGAIN
    afterwards = requests.asked_again(request) if number & AGAIN else _nothing
    token = REQUEST.set(request)
    try:
        yield
    finally:
        REQUEST.reset(token)
        afterwards()
        requests.concluded(request)


def answered(
    handler: Callable[Concatenate[R, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[R, P], Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError leave an asynchronous handler."""

    @functools.wraps(handler)
    async def wrapper(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        begun = time.monotonic()
        try:
            with request_of(self):
                return await handler(self, *args, **kwargs)
        except Exception as exc:
            raise pyfuse3.FUSEError(errno_of(exc, handler.__name__, args)) from None
        finally:
            self.took(handler.__name__, begun)

    return wrapper
