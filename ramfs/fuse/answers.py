"""Exceptions into errno: the one place where that is decided."""

import errno
import functools
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from ramfs.errors import FileError, RamfsError
from ramfs.fuse.extension import pyfuse3

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def errno_of(exc: Exception, request: str, details: tuple[Any, ...]) -> int:
    """The errno that a request fails with. What nobody foresaw is logged with the request, and is EIO."""
    if isinstance(exc, FileError):
        if exc.errno == errno.EBUSY:
            log.info("%s%r: %s", request, details, exc)
        return exc.errno
    if isinstance(exc, pyfuse3.FUSEError):
        return int(exc.errno)
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


def answered(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError leave an asynchronous handler."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except Exception as exc:
            raise pyfuse3.FUSEError(errno_of(exc, handler.__name__, args[1:])) from None

    return wrapper
