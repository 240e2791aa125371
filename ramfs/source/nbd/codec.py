"""Messages of the NBD protocol: numbers into bytes, and bytes that nobody vouches for into numbers.

Whatever a server sends is checked here as far as it can be without knowing what was asked. What cannot be right
raises SourceBroken.
"""

import enum
import errno
import struct
from typing import Final, NamedTuple

import numpy as np

from ramfs.errors import SourceBroken, SourceError, SourceLost, SourceRefused
from ramfs.image.table import runs_of
from ramfs.source.base import Extent

GREETING: Final = struct.Struct(">QQH")
OPTION_REPLY: Final = struct.Struct(">QIII")
SIMPLE: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
CHUNK_EXTENDED: Final = struct.Struct(">IHHQQQ")
OFFSET: Final = struct.Struct(">Q")
_OPTION = struct.Struct(">QII")
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_EXTENDED = struct.Struct(">IHHQQQ")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")
_U32 = struct.Struct(">I")
_EXPORT = struct.Struct(">QH")
_BLOCK_SIZE = struct.Struct(">III")

_NBDMAGIC: Final = 0x4E42444D41474943
_IHAVEOPT: Final = 0x49484156454F5054
_OLDSTYLE: Final = 0x00420281861253
_OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_REQUEST_EXTENDED_MAGIC: Final = 0x21E41C71
SIMPLE_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
CHUNK_EXTENDED_MAGIC: Final = 0x6E8A278C

#: Bytes of the longest string that the protocol allows: names of exports, descriptions, messages.
MAX_STRING: Final = 4096
#: Bytes of the longest reply to an option that is believed. The longest that makes sense is a name and a description.
MAX_OPTION_REPLY: Final = 4 * MAX_STRING
#: Bytes of the largest read, as the protocol has it where a server says nothing else.
MAX_READ: Final = 32 << 20
#: Ranges in one answer about extents that are believed.
MAX_RANGES: Final = 1 << 18
#: The largest minimum block size that a server may ask for.
_MAX_ALIGNMENT: Final = 1 << 16

#: The one metadata context that is asked for.
ALLOCATION: Final = b"base:allocation"


class HandshakeFlag(enum.IntFlag):
    """What a server can do in the handshake, and what the client makes use of: the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """What the client can ask for in the handshake."""

    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(enum.IntEnum):
    """How the server answers an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4


_FAILED: Final = 1 << 31


class Refusal(enum.IntEnum):
    """How the server declines an option."""

    UNSUP = _FAILED + 1
    POLICY = _FAILED + 2
    INVALID = _FAILED + 3
    PLATFORM = _FAILED + 4
    TLS_REQD = _FAILED + 5
    UNKNOWN = _FAILED + 6
    SHUTDOWN = _FAILED + 7
    BLOCK_SIZE_REQD = _FAILED + 8
    TOO_BIG = _FAILED + 9
    EXT_HEADER_REQD = _FAILED + 10


class Info(enum.IntEnum):
    """What an INFO reply tells."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Flag(enum.IntFlag):
    """What the server says of an export; the bits that matter to a reader."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    MULTI_CONN = 1 << 8


class Request(enum.IntEnum):
    """Commands of the transmission phase; a reader needs no others."""

    READ = 0
    DISCONNECT = 2
    BLOCK_STATUS = 7


class Chunk(enum.IntEnum):
    """Types of the chunks of a structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


#: The flag of the last chunk of a reply.
DONE: Final = 1
#: The bit of all chunk types that tell of an error, also of those unknown to us.
CHUNK_FAILED: Final = 1 << 15
_STATE_ZERO = 2

#: The protocol's own numbers of errors, which are not this machine's.
_ERRNO: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}
_FINAL = {errno.EPERM, errno.EINVAL, errno.EOVERFLOW, errno.EOPNOTSUPP}


class BlockSize(NamedTuple):
    """What reads a server takes, in bytes: multiples of ``minimum``, best of ``preferred``, none above ``maximum``."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_READ


def text(data: bytes | memoryview) -> str:
    """What a server says to people, as one printable line of bounded length."""
    line = bytes(data[:MAX_STRING]).decode(errors="replace")
    line = " ".join("".join(char if char.isprintable() else " " for char in line).split())
    return line if len(line) <= 200 else f"{line[:200]}..."


# --- the handshake ---


def greeting(data: bytes | memoryview) -> HandshakeFlag:
    """The flags of a server's greeting."""
    magic, option, flags = GREETING.unpack(data)
    if magic != _NBDMAGIC:
        raise SourceBroken(f"does not greet as an NBD server does: {text(data)!r}")
    if option == _OLDSTYLE:
        raise SourceRefused("speaks the oldstyle handshake alone, which knows neither names nor TLS")
    if option != _IHAVEOPT:
        raise SourceBroken("greets with a handshake that does not exist")
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise SourceRefused("is too old: it does not know the fixed newstyle handshake")
    return HandshakeFlag(flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))


def client_flags(flags: HandshakeFlag) -> bytes:
    """The client's answer to the greeting."""
    return _U32.pack(flags)


def option(number: Option, data: bytes = b"") -> bytes:
    """A request of the handshake."""
    return _OPTION.pack(_IHAVEOPT, number, len(data)) + data


def option_reply(data: bytes | memoryview, asked: Option) -> tuple[int, int]:
    """The type and the length of an answer to the option that was asked last."""
    magic, number, kind, length = OPTION_REPLY.unpack(data)
    if magic != _OPTION_REPLY_MAGIC:
        raise SourceBroken(f"answers {asked.name} with a wrong magic number")
    if number != asked:
        raise SourceBroken(f"answers option {number}, but {asked.name} was asked")
    if length > MAX_OPTION_REPLY:
        raise SourceBroken(f"answers {asked.name} with {length} bytes, where {MAX_OPTION_REPLY} are the most")
    return kind, length


def declined(kind: int) -> bool:
    """Whether an answer to an option is a no."""
    return bool(kind & _FAILED)


def refusal(asked: Option, kind: int, message: bytes | memoryview) -> SourceError:
    """The error for an option that the server declined, for good or for now."""
    said = f": {text(message)}" if len(message) else ""
    if kind == Refusal.TLS_REQD:
        return SourceRefused(f"requires TLS{said}; use nbds:// or nbds+unix://")
    if kind == Refusal.SHUTDOWN:
        return SourceLost(f"is shutting down{said}")
    if asked == Option.STARTTLS:
        return SourceRefused(f"does not offer TLS{said}; nothing is sent to it in plain text")
    if kind == Refusal.UNKNOWN:
        return SourceRefused(f"has no such export{said}")
    if kind == Refusal.UNSUP and asked in (Option.GO, Option.INFO):
        return SourceRefused(f"is too old: it does not know NBD_OPT_{asked.name}{said}")
    known = {each.value: each.name for each in Refusal}
    return SourceRefused(f"declines {asked.name} ({known.get(kind, hex(kind))}){said}")


def go(name: bytes) -> bytes:
    """The data of GO and INFO: the export, and that its block sizes are wanted."""
    return _U32.pack(len(name)) + name + struct.pack(">HH", 1, Info.BLOCK_SIZE)


def meta_context(name: bytes) -> bytes:
    """The data of SET_META_CONTEXT for the one context that we know."""
    return _U32.pack(len(name)) + name + struct.pack(">II", 1, len(ALLOCATION)) + ALLOCATION


def export_name(data: memoryview) -> str:
    """The name in an answer to LIST. Its description is passed over."""
    length = _U32.unpack_from(data)[0] if len(data) >= 4 else len(data)
    if length > min(MAX_STRING, len(data) - 4):
        raise SourceBroken("lists an export whose name is longer than its message, or than any name may be")
    return decode_name(bytes(data[4 : 4 + length]))


def decode_name(name: bytes) -> str:
    """The name of an export, which is UTF-8 without NUL."""
    try:
        decoded = name.decode()
    except UnicodeDecodeError:
        raise SourceBroken(f"has an export whose name is not UTF-8: {name[:200]!r}") from None
    if "\0" in decoded:
        raise SourceBroken(f"has an export whose name holds a NUL: {name[:200]!r}")
    return decoded


def context(data: memoryview) -> int | None:
    """The number of the metadata context in an answer to SET_META_CONTEXT; None for one that was not asked for."""
    if len(data) < 4:
        raise SourceBroken("answers SET_META_CONTEXT with a message that is too short")
    return int(_U32.unpack_from(data)[0]) if bytes(data[4:]) == ALLOCATION else None


def info(data: memoryview) -> tuple[int, Flag] | BlockSize | None:
    """What an INFO reply tells: size and flags of the export, or its block sizes, or what does not matter to us."""
    if len(data) < 2:
        raise SourceBroken("tells of an export in a message that is too short")
    kind = int.from_bytes(data[:2])
    body = data[2:]
    if kind == Info.EXPORT:
        if len(body) != _EXPORT.size:
            raise SourceBroken("tells the size of an export in a message of wrong length")
        size, flags = _EXPORT.unpack(body)
        if size >= 1 << 63:
            raise SourceBroken(f"has an export of {size} bytes, which is more than any file has")
        return size, Flag(flags & (Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.MULTI_CONN))
    if kind == Info.BLOCK_SIZE:
        if len(body) != _BLOCK_SIZE.size:
            raise SourceBroken("tells its block sizes in a message of wrong length")
        return _block_size(*_BLOCK_SIZE.unpack(body))
    return None


def _block_size(minimum: int, preferred: int, maximum: int) -> BlockSize:
    said = f"({minimum}, {preferred}, {maximum})"
    if minimum == 0 or minimum & (minimum - 1) or minimum > _MAX_ALIGNMENT:
        raise SourceBroken(f"tells block sizes {said} whose smallest is no power of two up to {_MAX_ALIGNMENT}")
    if preferred < minimum or preferred & (preferred - 1):
        raise SourceBroken(f"tells block sizes {said} whose preferred one is no power of two, or below the smallest")
    if maximum < minimum:
        raise SourceBroken(f"tells block sizes {said} of which the largest is below the smallest")
    return BlockSize(minimum, preferred, min(maximum, MAX_READ) // minimum * minimum)


# --- transmission ---


def request(number: Request, cookie: int, offset: int, length: int, *, extended: bool) -> bytes:
    """A command."""
    if extended:
        return _REQUEST_EXTENDED.pack(_REQUEST_EXTENDED_MAGIC, 0, number, cookie, offset, length)
    return _REQUEST.pack(_REQUEST_MAGIC, 0, number, cookie, offset, length)


def failure(number: int, message: bytes | memoryview = b"") -> SourceError:
    """The error for a command that the server could not carry out."""
    code = _ERRNO.get(number, errno.EIO)
    said = text(message) or errno.errorcode[code]
    if code == errno.ESHUTDOWN:
        return SourceLost(f"is shutting down: {said}")
    if code in _FINAL:
        return SourceRefused(f"refuses to read: {said}")
    return SourceError(f"fails to read: {said}")


def error_chunk(kind: int, data: memoryview) -> SourceError:
    """The error that an error chunk tells of."""
    if len(data) < _ERROR.size:
        raise SourceBroken("sends an error chunk that is too short")
    number, length = _ERROR.unpack_from(data)
    if length > len(data) - _ERROR.size:
        raise SourceBroken("sends an error chunk whose message is longer than the chunk")
    if kind == Chunk.ERROR and length != len(data) - _ERROR.size:
        raise SourceBroken("sends an error chunk with more than a message")
    if kind == Chunk.ERROR_OFFSET and length != len(data) - _ERROR.size - OFFSET.size:
        raise SourceBroken("sends an error chunk with more than a message and an offset")
    if number == 0:
        raise SourceBroken("sends an error chunk without an error")
    return failure(number, data[_ERROR.size : _ERROR.size + length])


def hole(data: memoryview) -> tuple[int, int]:
    """Offset and length of a hole in a read."""
    if len(data) != _HOLE.size:
        raise SourceBroken("sends a hole of wrong length")
    return _HOLE.unpack(data)


def extents(data: memoryview, context: int, offset: int, length: int, size: int, *, extended: bool) -> list[Extent]:
    """What a BLOCK_STATUS chunk tells of a range of at least one byte of an export of ``size``, neighbours joined.

    The last one may go on behind the range: the server knows that already.
    """
    number = ">u8" if extended else ">u4"
    head = 8 if extended else 4  # the context's number; and how many there are
    each = 2 * np.dtype(number).itemsize
    if len(data) < head + each or (len(data) - head) % each:
        raise SourceBroken("tells of extents in a message of wrong length")
    if int(_U32.unpack_from(data)[0]) != context:
        raise SourceBroken("tells of extents in a metadata context that was not agreed upon")
    pairs = np.frombuffer(data, number, offset=head).reshape(-1, 2)
    if extended and int(_U32.unpack_from(data, 4)[0]) != len(pairs):
        raise SourceBroken("tells of more or fewer extents than it says")
    if not pairs[:, 0].all():
        raise SourceBroken("tells of an extent of no bytes")
    ends = np.minimum(pairs[:, 0], length).astype(np.int64).cumsum()
    if len(ends) > 1 and ends[-2] >= length:
        raise SourceBroken("tells of extents behind the range that was asked for")
    ends[-1] = min((int(ends[-2]) if len(ends) > 1 else 0) + int(pairs[-1, 0]), size - offset)
    zero = (pairs[:, 1] & _STATE_ZERO) != 0
    found = []
    start = 0
    stops = dict.fromkeys((0, len(zero)))
    for run in runs_of(zero):
        stops.update(dict.fromkeys(run))
    for stop in sorted(stops)[1:]:
        end = int(ends[stop - 1])
        found.append(Extent(offset + start, end - start, bool(zero[stop - 1])))
        start = end
    return found
