from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ramfs.image.table import Entries

Addresses = NDArray[np.uint64]

FS_IOC_GETFLAGS: int
FS_IOC_SETFLAGS: int
FS_IOC_FSGETXATTR: int
FS_IOC_FSSETXATTR: int
FS_IMMUTABLE_FL: int
FS_XFLAG_IMMUTABLE: int

def install(
    *,
    read: Callable[[int, int, int], tuple[Entries, int, int, Addresses, Addresses] | bytes | int],
    map_layer: Callable[[int, int], int],
    write: Callable[[int, int, memoryview, int], int],
    copy_file_range: Callable[[int, int, int, int, int, int], int],
    ioctl: Callable[[int, int, bytes, int], bytes | int],
    raw: dict[int, Callable[[int, bytes], bytes | int]],
    fallocate: Callable[[int, int, int, int, int, object], int | None],
    lseek: Callable[[int, int, int, object], int | None],
    max_background: int,
    max_readahead: int,
    max_write: int,
    spin_ns: int,
    passthrough: bool,
) -> None: ...
def mark_open(fh: int, flags: int, backing: int) -> None: ...
def reply(token: object, value: int) -> None: ...
def unique() -> int: ...
def xattr_flags() -> int: ...
def init_request() -> bytes: ...
def replay_init(request: bytes) -> None: ...
def resends() -> bool: ...
def mirror(memory: memoryview) -> int: ...
def resend() -> int: ...
def edit_init() -> int: ...
def session_fd() -> int: ...
def connection() -> dict[str, int]: ...
