from collections.abc import Callable

def install(
    *,
    read: Callable[[int, int, int], list[memoryview] | int],
    write: Callable[[int, int, memoryview, int], int],
    copy_file_range: Callable[[int, int, int, int, int, int], int],
    max_background: int,
    max_readahead: int,
    max_write: int,
    spin_ns: int,
) -> None: ...
def edit_init() -> int: ...
def session_fd() -> int: ...
def connection() -> dict[str, int]: ...
