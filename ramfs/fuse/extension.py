"""Loads the compiled extension so that pyfuse3 finds it before libfuse.

The dynamic linker looks for a function first in libraries that were loaded RTLD_GLOBAL, in their order, then
in those that pyfuse3 was linked to. So ``_native`` must come first, and pyfuse3 after it: import pyfuse3 from
this module only.
"""

import errno
import logging
import os
import sys
from types import ModuleType

from ramfs.errors import MountError


def _load() -> ModuleType:
    if "pyfuse3" in sys.modules:
        raise MountError(
            "pyfuse3 was imported before ramfs could complete it: import ramfs.fuse.extension first, "
            "or run ramfs in a process of its own"
        )
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_NOW)
    try:
        from ramfs.fuse import _native  # noqa: PLC0415  (while the flags are set)
    except ImportError as exc:
        raise MountError(
            f"the compiled part of ramfs cannot be loaded: {exc}; run tools/setup, or pip install again"
        ) from exc
    finally:
        sys.setdlopenflags(flags)
    return _native


native = _load()

import pyfuse3  # noqa: E402  (its place here is the point of this module)

#: A request that nobody waits for any more: who asked was killed, or the mount was taken down. libfuse is silent on it.
_NO_REQUEST = os.strerror(errno.ENOENT)


def _is_news(record: logging.LogRecord) -> bool:
    return not (str(record.msg).endswith("fuse_reply_* failed with %s") and record.args == (_NO_REQUEST,))


logging.getLogger(pyfuse3.__name__).addFilter(_is_news)

__all__ = ["kernel_resends", "native", "pyfuse3"]


def kernel_resends() -> bool:
    """Can the kernel be asked for unanswered requests (Linux 6.9)? For tests an environment variable says no."""
    return bool(native.resends()) and not os.environ.get("RAMFS_NO_RESEND")
