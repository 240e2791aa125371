"""Reads and writes a file through a shared mapping until SIGTERM, and checks every byte it reads.

    python load.py FILE     prints "begun", and at its end the seconds of the longest access

Page i is 512 times the number (i, times written). After some pages the mapping and the page cache are emptied, so
that the next access is a fault that the daemon must answer. A wrong byte is exit status 1, a SIGBUS ends it.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time

PAGE = 4096
PAGES = 2048


def contents(page: int, times: int) -> bytes:
    return (page << 32 | times).to_bytes(8, "little") * (PAGE // 8)


def main(path: str) -> None:
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, PAGES * PAGE)
    written = [0] * PAGES
    for page in range(PAGES):
        os.pwrite(fd, contents(page, 0), page * PAGE)
    memory = mmap.mmap(fd, PAGES * PAGE)
    print("begun", flush=True)
    longest = 0.0
    while not ending:
        for page in random.sample(range(PAGES), 64):
            began = time.monotonic()
            place = slice(page * PAGE, (page + 1) * PAGE)
            if memory[place] != contents(page, written[page]):
                sys.exit(f"page {page} is not as it was written the {written[page]}th time")
            written[page] += 1
            memory[place] = contents(page, written[page])
            longest = max(longest, time.monotonic() - began)
        memory.flush()
        memory.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    memory.close()
    os.close(fd)
    with open(path, "rb") as file:
        for page in range(PAGES):
            if file.read(PAGE) != contents(page, written[page]):
                sys.exit(f"page {page} was lost at the end")
    if sum(written) == 0:
        sys.exit("nothing was written")
    print(f"{longest:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
