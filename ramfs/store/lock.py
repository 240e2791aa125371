"""One daemon for each store: an flock on ``STORE/lock``, which says who holds it."""

import fcntl
import os

from ramfs.errors import StoreBusy, StoreError


class StoreLock:
    """The lock of a store, held until :meth:`release` or the end of the process."""

    def __init__(self, directory: str, purpose: str, kept: int | None = None) -> None:
        """Take the lock. ``purpose`` is told to whoever comes second. Raises StoreBusy or StoreError.

        ``kept`` is a descriptor that holds it already, of a daemon whose place this one takes.
        """
        path = os.path.join(directory, "lock")
        if kept is not None:
            self.fd = kept
            self._sign(purpose)
            return
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StoreError(f"store {directory} cannot be written ({exc.strerror}): give one of your own") from exc
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self.fd, 4096).decode("utf-8", "replace").strip() or "an unknown process"
            os.close(self.fd)
            raise StoreBusy(f"store {directory} is in use by {holder}: unmount it there first") from None
        self._sign(purpose)

    def _sign(self, purpose: str) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, os.fsencode(f"process {os.getpid()} ({purpose})\n"), 0)

    def release(self) -> None:
        """Give the lock back."""
        os.ftruncate(self.fd, 0)
        os.close(self.fd)
