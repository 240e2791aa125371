"""What ``send`` and ``receive`` share: bytes in and out of pipes, compressed or not, and how far it is."""

import contextlib
import errno
import fcntl
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from ramfs.errors import FileError

#: Bytes in a pipe, if we may: fewer turns between its two ends.
_PIPE: Final = 1 << 20
#: Bytes read in one go where they are compressed.
_PIECE: Final = 1 << 20


def zstd() -> Any:
    """The module of the standard library, or its backport."""
    return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def widen(fd: int) -> None:
    """Let more fit into a pipe."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE)


class Output:
    """A descriptor that a stream is written to: never sought in. Raises FileError when nobody reads it any more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._compressed: Any = None
        self._source: tuple[str, int] = "", -1
        self._spliced = True
        widen(fd)

    def compress(self) -> None:
        """Compress all that follows."""
        module = zstd()
        workers = {module.CompressionParameter.nb_workers: min(4, os.cpu_count() or 1)}
        self._compressed = module.ZstdFile(os.fdopen(os.dup(self._fd), "wb"), "w", options=workers)

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it."""
        with _reader_gone():
            if self._compressed is not None:
                self._compressed.write(data)
                return
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]

    def copy(self, path: str, offset: int, length: int) -> None:
        """Write bytes of a file, which has them: without a copy of them where the kernel can. Raises OSError."""
        fd = self._file(path)
        while length:
            done = self._splice(fd, offset, length)
            if not done:
                data = os.pread(fd, min(length, _PIECE), offset)
                self.write(data)
                done = len(data)
            if not done:
                raise FileError(errno.EIO, f"{path} is shorter than its manifest says")
            offset, length = offset + done, length - done

    def _splice(self, fd: int, offset: int, length: int) -> int:
        if self._compressed is not None or not self._spliced:
            return 0
        try:
            with _reader_gone():
                return os.sendfile(self._fd, fd, offset, length)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.ENOSYS):  # what is appended to, for instance
                raise
            self._spliced = False
            return 0

    def _file(self, path: str) -> int:
        if self._source[0] != path:
            self.close_source()
            self._source = path, os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._source[1]

    def close_source(self) -> None:
        """Close the file that was copied from."""
        if self._source[1] >= 0:
            os.close(self._source[1])
        self._source = "", -1

    def finish(self) -> None:
        """Nothing follows."""
        if self._compressed is not None:
            with _reader_gone():
                compressed, self._compressed = self._compressed, None
                compressed.close()


@contextlib.contextmanager
def _reader_gone() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        text = "whoever reads the stream has gone before its end; its own message tells why"
        raise FileError(errno.EPIPE, text) from None


@contextlib.contextmanager
def progress(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """What shows on a terminal's standard error how many bytes are done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
