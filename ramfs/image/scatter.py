"""Runs of whole pages of one file as one message, for who writes many short ones: a request for each would cost more.

bytes 0 to 7    RAMFSRUN
8, 12           length of the path, number of runs (little-endian uint32)
16              the path, from the root of the mount
then            for each run its offset and its length in bytes (little-endian uint64)
then            the pages, one run behind the other
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from ramfs.image.pages import Buffer

_HEAD: Final = struct.Struct("<8sII")
_MAGIC: Final = b"RAMFSRUN"
_RUN: Final = struct.Struct("<QQ")
#: Runs in a message, at most: the daemon does nothing else meanwhile, some 30 us for each.
MAX_RUNS: Final = 64


def pack(path: bytes, runs: Sequence[tuple[int, int]], pages: Iterable[Buffer]) -> bytes:
    """The message that has runs ``(offset, length)`` written."""
    head = _HEAD.pack(_MAGIC, len(path), len(runs)) + path
    return b"".join([head, *(_RUN.pack(*run) for run in runs), *pages])


def parse(message: memoryview) -> tuple[bytes, list[tuple[int, int]], memoryview] | None:
    """Path, runs and pages; None if it is something else. Raises ValueError."""
    if bytes(message[: len(_MAGIC)]) != _MAGIC:
        return None
    if len(message) < _HEAD.size:
        raise ValueError("it was cut off")
    _, length, count = _HEAD.unpack_from(message)
    begin = _HEAD.size + length
    end = begin + count * _RUN.size
    if count > MAX_RUNS or end > len(message):
        raise ValueError("it has too many runs, or was cut off")
    runs = [(offset, size) for offset, size in _RUN.iter_unpack(message[begin:end])]
    return bytes(message[_HEAD.size : begin]), runs, message[end:]
