"""Files that the kernel serves from the store by itself: FUSE passthrough, for frozen images that are one layer, and
for live ones that are the file of their layer (direct images: store/direct.py).

A read, a write or a fault of such a file goes to the layer's own page cache. No request reaches the daemon, and all
inodes whose image is that layer, in whatever snapshot, share the same memory. What the kernel asks of us for it:

- One inode is open in one way at a time, passthrough with the same backing file, or cached: the mix is EIO to
  whoever opens. So the first open decides, and the others follow it until the last one is closed.
- The kernel opens the layer anew for each open, with the opener's flags. Opened for writing it lets a MAP_SHARED
  mapping store into the layer, and nobody could refuse that. So a frozen file is served this way only where it
  cannot be opened for writing: none is on a mount with ``template_rdwr``.
- A mapping outlives its handle without our knowing. So a direct image stays direct, and is opened natively, until
  nobody has its layer's file open, which a lease tells (:meth:`Passthrough.leave_idle`).
- A backing id is the kernel connection's and outlives the daemon; :meth:`Passthrough.restore`.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from ramfs.errors import FileError, StoreDamaged
from ramfs.fuse.extension import native
from ramfs.namespace import Inode
from ramfs.pager import Pager
from ramfs.store.flat import sole_layer
from ramfs.store.images import Image
from ramfs.store.reflink import can_reflink
from ramfs.units import HandleId, ImageId, LayerId

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

    def __init__(self, pager: Pager, refused: str = "", live_refused: str = "") -> None:
        self.refused = refused
        """why no more files become native on this mount, if there is a reason"""
        self.live_refused = refused or live_refused
        """why no more live files do"""
        if not self.live_refused and not can_reflink(pager.layers.directory):
            self.live_refused = "the file system of the store cannot share blocks between files (XFS and btrfs can)"
        self._pager = pager
        self._told: set[ImageId] = set()
        self._turning: dict[ImageId, trio.Event] = {}
        """images that are becoming direct, or cease to be; set when that is over"""
        self._backings: dict[LayerId, _Backing] = {}
        pager.layers.native = self._backings.keys()
        self._layer_of: dict[HandleId, LayerId] = {}

    def is_native(self, inode: Inode) -> bool:
        """Is the inode open, and read by the kernel itself?"""
        return any(handle in self._layer_of for handle in inode.opens)

    async def look(self, inode: Inode, flags: int) -> None:
        """Before an OPEN: find out whether the layer of a frozen inode reads as its image, if nobody knows yet.

        Of a live one: let it be direct if it is to be. After it the reply follows without an await.
        """
        image = inode.image
        if image is None:
            return
        await self.settled(image)
        if self.refused or inode.opens or image.direct is not None:
            return
        if not native.connection()["passthrough"]:
            self.refused = self.live_refused = "this kernel cannot (Linux 6.9 can)"
            return
        with contextlib.suppress(OSError, StoreDamaged):  # then it is not served so; whoever reads it is told
            if inode.frozen:
                await self._pager.is_flat(image)
            elif not self.live_refused and _for_mapping(inode, flags):
                with self._turn(image.id):
                    await self._pager.enter(image)

    async def settled(self, image: Image) -> None:
        """Wait until an image is either direct or not."""
        while (turning := self._turning.get(image.id)) is not None:
            await turning.wait()

    @contextlib.contextmanager
    def _turn(self, number: ImageId) -> Iterator[None]:
        event = self._turning[number] = trio.Event()
        try:
            yield
        finally:
            del self._turning[number]
            event.set()

    async def leave_idle(self) -> None:
        """Let direct images that nobody has open or mapped have a table again. What fails is told once, and stays."""
        for number in sorted(self._pager.images.direct):
            if number not in self._pager.images.direct:
                continue  # deleted, or entered by somebody, while another one was being left
            try:
                await self._leave(number)
            except (OSError, StoreDamaged) as exc:
                if number not in self._told:
                    log.error("image %d stays the file of its layer: %s", number, exc)
                self._told.add(number)

    async def _leave(self, number: ImageId) -> None:
        images = self._pager.images
        image = images.acquire(number)
        try:
            if self._is_idle(image):
                await self._pager.write_out(image)  # before anybody who opens it must wait
            if self._is_idle(image):
                with self._turn(number):
                    await self._pager.leave(image)
        finally:
            images.release(image)

    def _is_idle(self, image: Image) -> bool:
        if image.direct is None or image.live is None or image.id in self._turning:
            return False
        return image.live.id not in self._backings

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
                if inode.image is not None and inode.image.direct is not None:
                    raise FileError(errno.EBUSY, "it may still be mapped natively, and cannot be opened so now")
                return 0
            backing = self._backings[layer] = _Backing(number, set())
        backing.handles.add(handle)
        self._layer_of[handle] = layer
        return backing.id

    def _layer_for(self, inode: Inode) -> LayerId | None:
        if inode.opens:
            return self._layer_of.get(next(iter(inode.opens)))
        if inode.image is not None and inode.image.direct is not None and inode.image.live is not None:
            return inode.image.live.id
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
            if reason := _REASONS.get(exc.errno or 0, ""):
                self.refused = self.live_refused = reason
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


def _for_mapping(inode: Inode, flags: int) -> bool:
    """Is a live file opened as a guest's memory is? Reading and writing, which a shared mapping needs.

    The kernel does not drop set-user-ID bits when it writes by itself.
    """
    return flags & os.O_ACCMODE == os.O_RDWR and not inode.mode & (stat.S_ISUID | stat.S_ISGID)
