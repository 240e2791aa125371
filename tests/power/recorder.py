"""A disk that remembers: a plugin of nbdkit which logs every write and every flush in the order of their arrival.

Parameters: size=BYTES, disk=FILE (what was written, for reads), log=FILE (see replay.py).
"""

import os
import struct

import nbdkit

API_VERSION = 2
RECORD = struct.Struct("<BQI")  # 0 a write, 1 a flush; offset; length of the data that follow

settings: dict[str, str] = {}


def config(key: str, value: str) -> None:
    settings[key] = value


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)  # one log, one order


def open(readonly: bool) -> tuple[int, int]:  # noqa: A001 - nbdkit's name for it
    disk = os.open(settings["disk"], os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(disk, int(settings["size"]))
    return disk, os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def get_size(handle: tuple[int, int]) -> int:
    return int(settings["size"])


def pread(handle: tuple[int, int], buf: bytearray, offset: int, flags: int) -> None:
    done = os.preadv(handle[0], [buf], offset)
    if done != len(buf):
        raise OSError("short read")


def pwrite(handle: tuple[int, int], buf: bytes, offset: int, flags: int) -> None:
    os.writev(handle[1], [RECORD.pack(0, offset, len(buf)), bytes(buf)])
    os.pwrite(handle[0], bytes(buf), offset)


def flush(handle: tuple[int, int], flags: int) -> None:
    os.write(handle[1], RECORD.pack(1, 0, 0))
