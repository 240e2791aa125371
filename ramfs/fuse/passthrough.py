"""Files that the kernel reads from the store by itself: FUSE passthrough, for frozen images that are one layer.

A read or a fault of such a file goes to the layer's own page cache. No request reaches the daemon, and all inodes
whose image is that layer, in whatever snapshot, share the same memory. What the kernel asks of us for it:

- One inode is open in one way at a time, passthrough with the same backing file, or cached: the mix is EIO to
  whoever opens. So the first open decides, and the others follow it until the last one is closed.
- The kernel opens the layer anew for each open, with the opener's flags. Opened for writing it would let a
  MAP_SHARED mapping store into the layer, and nobody could refuse that. So no file is served this way that can be
  opened for writing: none at all on a mount with ``template_rdwr``.
- A backing id is the kernel connection's and outlives the daemon; :meth:`Passthrough.restore`.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ramfs.errors import StoreDamaged
from ramfs.fuse.extension import native
from ramfs.namespace import Inode
from ramfs.pager import Pager
from ramfs.store.flat import sole_layer
from ramfs.units import HandleId, LayerId

log = logging.getLogger(__name__)

FOPEN_PASSTHROUGH: Final = 1 << 7
_BACKING_OPEN: Final = 0x4010E501
_BACKING_CLOSE: Final = 0x4004E502
_REASONS: Final = {
    errno.EPERM: "the daemon lacks CAP_SYS_ADMIN",
    errno.ELOOP: "the store lies on a stacked file system, such as overlayfs",
    errno.EOPNOTSUPP: "the file system of the store cannot",
}
_BACKING_MAP: Final = struct.Struct("=iIQ")  # descriptor, flags, padding


@dataclass(slots=True)
class _Backing:
    """A layer file that the kernel holds open for us."""

    id: int
    handles: set[HandleId]


class Passthrough:
    """Which layers the kernel holds, and which handles are served from them."""

    def __init__(self, pager: Pager, refused: str = "") -> None:
        self.refused = refused
        """why no more files become native on this mount, if there is a reason"""
        self._pager = pager
        self._backings: dict[LayerId, _Backing] = {}
        pager.layers.native = self._backings.keys()
        self._layer_of: dict[HandleId, LayerId] = {}

    def is_native(self, inode: Inode) -> bool:
        """Is the inode open, and read by the kernel itself?"""
        return any(handle in self._layer_of for handle in inode.opens)

    async def look(self, inode: Inode) -> None:
        """Before an OPEN: find out whether the layer of a frozen inode reads as its image, if nobody knows yet."""
        image = inode.image
        if self.refused or not inode.frozen or inode.opens or image is None:
            return
        if not native.connection()["passthrough"]:
            self.refused = "this kernel cannot (Linux 6.9 can)"
            return
        with contextlib.suppress(OSError, StoreDamaged):  # then it is not served so; whoever reads it is told
            await self._pager.is_flat(image)

    def open(self, inode: Inode, handle: HandleId) -> int:
        """The backing id that the reply to an OPEN is to bear, 0 for an open through the page cache of the mount.

        To be called before the inode has the handle, and in one piece with that.
        """
        layer = self._layer_for(inode)
        if layer is None:
            return 0
        backing = self._backings.get(layer)
        if backing is None:
            number = self._hold(layer)
            if number == 0:
                return 0
            backing = self._backings[layer] = _Backing(number, set())
        backing.handles.add(handle)
        self._layer_of[handle] = layer
        return backing.id

    def _layer_for(self, inode: Inode) -> LayerId | None:
        if inode.opens:
            return self._layer_of.get(next(iter(inode.opens)))
        if self.refused or not inode.frozen or inode.image is None:
            return None
        layer = sole_layer(inode.image, self._pager.layers)
        return layer if layer == inode.image.alike else None

    def _hold(self, layer: LayerId) -> int:
        try:
            fd = os.open(self._pager.layers.path(layer), os.O_RDONLY | os.O_CLOEXEC)
            try:
                number: int = fcntl.ioctl(native.session_fd(), _BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0, 0)))
                return number
            finally:
                os.close(fd)
        except OSError as exc:
            self.refused = _REASONS.get(exc.errno or 0, "")
            log.info("layer %d cannot be served natively: %s", layer, self.refused or exc)
            return 0

    def release(self, handle: HandleId) -> None:
        """A handle is closed; with its last one a layer is let go."""
        layer = self._layer_of.pop(handle, None)
        if layer is not None:
            backing = self._backings[layer]
            backing.handles.discard(handle)
            if not backing.handles:
                self._let_go(layer)

    def _let_go(self, layer: LayerId) -> None:
        with contextlib.suppress(OSError):  # the connection is gone, and took it along
            fcntl.ioctl(native.session_fd(), _BACKING_CLOSE, struct.pack("=I", self._backings.pop(layer).id))

    # -- what outlives the daemon

    def held(self, handle: HandleId) -> tuple[int, int]:
        """The layer that a handle is served from, and its backing id; zeros for one that is not native."""
        layer = self._layer_of.get(handle)
        return (0, 0) if layer is None else (layer, self._backings[layer].id)

    def restore(self, backings: Iterable[tuple[LayerId, int]], handles: Iterable[tuple[HandleId, LayerId]]) -> None:
        """Go on where another daemon of this connection was killed, before any request is answered.

        ``backings`` may name more than is in use: what no handle needs is let go. A backing id that nobody
        knows any more leaks until the mount is gone.
        """
        self._backings = {layer: _Backing(number, set()) for layer, number in backings}
        self._pager.layers.native = self._backings.keys()
        self._layer_of = dict(handles)
        for handle, layer in self._layer_of.items():
            self._backings[layer].handles.add(handle)
        for layer in [layer for layer, backing in self._backings.items() if not backing.handles]:
            self._let_go(layer)
