"""The session with the kernel: made, served, taken down."""

import contextlib
import errno
import logging
import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Final

import trio

from ramfs.errors import MountError
from ramfs.fuse import statx
from ramfs.fuse.extension import kernel_resends, native, pyfuse3
from ramfs.fuse.operations import Operations

log = logging.getLogger(__name__)

#: Requests that the kernel may have under way for reading ahead, which every fault does, and writing back. As many as
#: there can be: those that wait for a source that is lost must not use them up, or all of the mount would wait.
MAX_BACKGROUND: Final = 65535
#: Bytes in the largest READ and WRITE: what the kernel allows (256 pages).
MAX_REQUEST: Final = 1 << 20
#: Requests that may wait at a time (for a sync, say). With all of them taken nothing is answered any more, not
#: even the requests of our own that they wait for; so it is a number that no machine comes to.
MAX_WAITING: Final = 1 << 20
#: Mount options that libfuse itself looks at.
_LIBFUSE_OPTIONS: Final = {"allow_root"}
#: ns that the extension looks for the next request before it goes back to the loop. Handing the thread's CPU
#: back and being woken costs more than most gaps between the faults of one vCPU last.
SPIN_NS: Final = 50_000
#: ms for which the extension then waits for it in the loop's stead. To set a timer that goes off before the kernel's
#: next tick (every 4 ms or sooner) costs a virtual machine as much as a fault.
_PAUSE: Final = 5


class _Loop(trio.abc.Instrument):
    """Tells for how long the loop can be left waiting, while requests come one after the other."""

    def __init__(self) -> None:
        self._slept = False

    def before_io_wait(self, timeout: float) -> None:
        """The loop has run all tasks that could run, if it has time."""
        self._slept = timeout > 0

    def pause(self) -> int:
        """For how many ms, at most?"""
        now = trio.lowlevel.current_statistics()
        # One task can always run: pyfuse3's next reader, who was just handed the lock.
        if not self._slept or now.tasks_runnable > 1 or now.run_sync_soon_queue_size:
            return 0
        return int(min(now.seconds_to_next_deadline * 1000, _PAUSE))

    @staticmethod
    def fd() -> int:
        """The descriptor that the loop waits with, which trio tells nobody; -1 if there is not just one of its kind."""
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the directory itself
                if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                    found.append(int(name))
        return found[0] if len(found) == 1 else -1


@contextlib.contextmanager
def _heard(words: list[str]) -> Iterator[None]:
    """Collect the lines that libfuse and fusermount3 write to standard error: errors of ours are one line."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.memfd_create("libfuse"), "r+", errors="backslashreplace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            words.extend(filter(None, map(str.strip, file)))


class Session:
    """A mount. One for each process: libfuse and pyfuse3 keep theirs in globals."""

    def __init__(
        self, operations: Operations, mountpoint: str, options: Iterable[str], connection: int | None = None
    ) -> None:
        """Mount. Or take ``connection`` over, the descriptor of a mount that another daemon made. Raises MountError."""
        native.install(
            read=operations.read_now,
            map_layer=operations.map_now,
            absent=operations.absent_now,
            write=operations.write_now,
            copy_file_range=operations.copy_now,
            ioctl=operations.ioctl_now,
            # With allow_root libfuse looks who asks, and what is answered past it would be answered to anybody.
            raw={} if "allow_root" in options else {statx.OPCODE: operations.statx_now},
            fallocate=operations.fallocate_now,
            lseek=operations.lseek_now,
            max_background=MAX_BACKGROUND,
            max_readahead=MAX_REQUEST,
            max_write=MAX_REQUEST,
            spin_ns=SPIN_NS if (os.cpu_count() or 1) > 1 else 0,
            passthrough=not operations.passthrough.refused,
            # What refuses shared mappings of frozen files that are open for writing, and only there.
            direct_mmap=not operations.template_rdwr,
        )
        words: list[str] = []
        try:
            with _heard(words):
                if connection is None:
                    pyfuse3.init(operations, mountpoint, {"default_permissions", *options})
                else:  # allow_root is libfuse's own, the others the kernel has heard
                    pyfuse3.init(operations, f"/dev/fd/{connection}", _LIBFUSE_OPTIONS & set(options))
        except RuntimeError as exc:
            raise MountError(f"{mountpoint} cannot be mounted: {'; '.join(words) or exc}") from exc
        for line in words:  # of a mount that was made all the same, and of our own log
            print(line, file=sys.stderr)
        fd = native.session_fd()
        if fd < 0:
            pyfuse3.close()
            raise MountError(
                "pyfuse3 did not come to ramfs for its session, so copy_file_range would be missing: "
                "install a pyfuse3 that is linked to libfuse 3.13 to 3.16 dynamically"
            )
        if native.edit_init():
            pyfuse3.close(unmount=True)
            raise MountError("libfuse refused to let ramfs complete the INIT reply: install libfuse 3.13 to 3.16")
        os.set_blocking(fd, False)  # the extension reads until there is nothing more
        self.fd = fd

    def go_on(self, init: bytes, kept: memoryview) -> int:
        """Settle what the daemon before settled by the INIT request ``init``, get what it left unanswered.

        From the kernel; from the memory ``kept`` where the kernel cannot do that. Returns how many were there.
        """
        if init:
            native.replay_init(init)
            if not kernel_resends():
                left: int = native.mirror(kept)
                return left
        refused = native.resend()
        if refused:
            log.warning("requests under way are lost: %s", os.strerror(-refused))
        return 0

    @staticmethod
    async def serve() -> None:
        """Answer requests until the mount is gone or :meth:`stop` is called."""
        loop = _Loop()
        trio.lowlevel.add_instrument(loop)
        native.watch_loop(loop.fd(), loop.pause)
        try:
            await pyfuse3.main(max_tasks=MAX_WAITING)
        except* OSError as group:
            # ENODEV: unmounted between two reads; ENOTCONN, ECONNABORTED: the connection was aborted.
            gone = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)
            if group.subgroup(lambda exc: isinstance(exc, OSError) and exc.errno not in gone):
                raise
        finally:
            native.watch_loop(-1, loop.pause)
            trio.lowlevel.remove_instrument(loop)

    @staticmethod
    def stop() -> None:
        """Let :meth:`serve` return."""
        pyfuse3.terminate()

    @staticmethod
    def connection() -> dict[str, int]:
        """What INIT settled with the kernel."""
        settled: dict[str, int] = native.connection()
        return settled

    def disconnect(self) -> bool:
        """Answer nothing any more: once nobody else holds the connection either, all that waits gets an error.

        Returns whether the mount was still there.
        """
        poll = select.poll()
        poll.register(self.fd, 0)
        mounted = not poll.poll(0)
        os.close(self.fd)
        return mounted
