"""Digests of pages: xxh3_128 of the 4096 bytes, 16 bytes each, in the order of XXH128_canonical (big-endian)."""

from typing import Final

import xxhash

from ramfs.image.pages import ZERO_PAGE, Buffer
from ramfs.units import PAGE

#: Bytes of a page's digest.
DIGEST: Final = 16
#: The digest of a page of zeros.
ZERO_DIGEST: Final = xxhash.xxh3_128_digest(ZERO_PAGE)
#: What stands in a manifest for a page of zeros, however it is stored, ...
KNOWN_ZERO: Final = bytes(DIGEST)
#: ... and for one that is lost where it should be (``ramfs fsck``): no page matches it.
KNOWN_LOST: Final = b"\xff" * DIGEST


def digest_pages(data: Buffer) -> bytes:
    """Digests of the whole pages of ``data``, one after the other."""
    view = memoryview(data)
    digest = xxhash.xxh3_128_digest
    return b"".join([digest(view[i : i + PAGE]) for i in range(0, len(view), PAGE)])


def digest_padded(data: Buffer) -> bytes:
    """Digests of the pages of ``data``, the last of which is filled up with zeros if it is not whole."""
    whole = len(data) & -PAGE
    if whole == len(data):
        return digest_pages(data)
    view = memoryview(data)
    return digest_pages(view[:whole]) + xxhash.xxh3_128_digest(bytes(view[whole:]).ljust(PAGE, b"\0"))
