"""Digests of pages: xxh3_128 of the 4096 bytes, 16 bytes each, in the order of XXH128_canonical (big-endian)."""

from typing import Final

import xxhash

from ramfs.image.pages import Buffer
from ramfs.units import PAGE

#: Bytes of a page's digest.
DIGEST: Final = 16


def digest_pages(data: Buffer) -> bytes:
    """Digests of the whole pages of ``data``, one after the other."""
    view = memoryview(data)
    digest = xxhash.xxh3_128_digest
    return b"".join([digest(view[i : i + PAGE]) for i in range(0, len(view), PAGE)])
