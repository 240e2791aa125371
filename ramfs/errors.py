"""Every error ramfs raises on purpose.

One class is one kind of failure: it fixes the errno that a caller of the mount gets and the exit code
that a command ends with. The message is one sentence that says what, why and what to do.

    RamfsError                  exit  errno
    ├── UsageError                2   EINVAL        the command line is wrong
    ├── BadName                   3   EINVAL        a name that cannot be a block or file name
    │   └── NameTooLong           3   ENAMETOOLONG
    ├── StoreError                4   EIO           the store cannot be used
    │   ├── StoreBusy             5   EBUSY         another daemon serves it
    │   ├── StoreVersion          6   EPROTO        made by another format version
    │   └── StoreDamaged          7   EUCLEAN       its parts contradict each other
    ├── MountError                8   EIO           the mount cannot be made or reached
    ├── QmpError                  9   EIO           QEMU refused or vanished
    ├── SourceError              10   EIO           where absent pages come from fails
    │   ├── SourceLost           11   EIO           it cannot be reached: worth trying again
    │   ├── SourceRefused        12   EIO           it says no
    │   ├── SourceBroken         13   EIO           it says what cannot be right
    │   ├── SourceChanged        14   EIO           it is another one than before
    │   └── SourceCorrupt        15   EIO           its bytes are not what their digests say
    └── FileError                 1   (given)       a file operation failed with this errno
"""

import errno as _errno
import os


class RamfsError(Exception):
    """Base of all errors that are told in one sentence, without a traceback."""

    errno: int = _errno.EIO
    exit_code: int = 1


class UsageError(RamfsError):
    """The command line asks for something that cannot be."""

    errno = _errno.EINVAL
    exit_code = 2


class BadName(RamfsError):
    """A name that cannot be the name of a RAM block or of a file."""

    errno = _errno.EINVAL
    exit_code = 3


class NameTooLong(BadName):
    """A name above 255 bytes, the limit of Linux file names."""

    errno = _errno.ENAMETOOLONG


class StoreError(RamfsError):
    """The store directory cannot be used."""

    errno = _errno.EIO
    exit_code = 4


class StoreBusy(StoreError):
    """Another daemon (or fsck) holds the store."""

    errno = _errno.EBUSY
    exit_code = 5


class StoreVersion(StoreError):
    """The store has a format version that this program does not know."""

    errno = _errno.EPROTO
    exit_code = 6


class StoreDamaged(StoreError):
    """Parts of the store contradict each other or are missing; ``ramfs fsck`` names them."""

    errno = _errno.EUCLEAN
    exit_code = 7


class MountError(RamfsError):
    """The mount cannot be made, reached or taken down."""

    errno = _errno.EIO
    exit_code = 8


class QmpError(RamfsError):
    """QEMU refused a command, or its QMP socket cannot be reached."""

    errno = _errno.EIO
    exit_code = 9


class SourceError(RamfsError):
    """Where absent pages come from fails. What sort of failure it is decides whether trying again is any use."""

    errno = _errno.EIO
    exit_code = 10


class SourceLost(SourceError):
    """The connection is refused, reset or silent, or the server ends: it may be there again later."""

    exit_code = 11


class SourceRefused(SourceError):
    """The peer says no: it does not know the export, wants or refuses TLS, or does not allow it."""

    exit_code = 12


class SourceBroken(SourceError):
    """The peer breaks the protocol, or answers what cannot be right."""

    exit_code = 13


class SourceChanged(SourceError):
    """The export has another size than before: these are not the bytes that were asked for."""

    exit_code = 14


class SourceCorrupt(SourceError):
    """A page does not match its digest."""

    exit_code = 15


class FileError(RamfsError):
    """A file operation failed; carries the errno that a local file system gives for it."""

    def __init__(self, errno: int, message: str | None = None) -> None:
        super().__init__(message or os.strerror(errno))
        self.errno = errno


#: Exit codes as ``ramfs --help`` lists them: (code, meaning).
EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "a file operation failed"),
    (2, "the command line is wrong"),
    (3, "a name cannot be used"),
    (4, "the store cannot be used"),
    (5, "the store is in use"),
    (6, "the store has another format version"),
    (7, "the store is damaged"),
    (8, "the mount cannot be made or reached"),
    (9, "QEMU refused or vanished"),
    (10, "the source of a pull fails"),
    (11, "the source cannot be reached"),
    (12, "the source refuses"),
    (13, "the source breaks the protocol"),
    (14, "the source has changed"),
    (15, "the source gives wrong bytes"),
)
