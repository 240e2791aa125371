"""load.py FILE SOURCE SEED: a guest, as far as its memory goes.

Maps FILE shared, and reads and writes pages of it at random until standard input ends: each must have what SOURCE has
at its place, or what was written there. Then it compares all of them. Prints how many it looked at.
"""

import mmap
import os
import random
import select
import sys

PAGE = mmap.PAGESIZE


def main(path: str, source: str, seed: int) -> None:
    rng = random.Random(seed)
    with open(source, "rb") as file:
        expected = bytearray(file.read())
    count = len(expected) // PAGE
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, count * PAGE)
    looked = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        first = rng.randrange(count)
        for page in range(first, min(first + rng.choice((1, 1, 1, 8)), count)):
            at = page * PAGE
            found = memory[at : at + PAGE]
            assert found == expected[at : at + PAGE], f"page {page} has {found[:16]!r}"
            looked += 1
            kind = rng.randrange(8)
            if kind == 0:
                expected[at : at + PAGE] = memory[at : at + PAGE] = rng.randbytes(PAGE)
            elif kind == 1:
                expected[at + 100 : at + 108] = memory[at + 100 : at + 108] = rng.randbytes(8)
        if rng.randrange(50) == 0:  # what was written goes to the daemon, and is faulted in again
            memory.flush()
            memory.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for page in range(count):
        at = page * PAGE
        assert memory[at : at + PAGE] == expected[at : at + PAGE], f"page {page} in the end"
    print(looked)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
