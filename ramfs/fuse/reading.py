"""A READ that has met absent pages."""

from ramfs.fuse.extension import native
from ramfs.pager import Absent, Pager
from ramfs.store.images import Image
from ramfs.units import PAGE, PAGE_SHIFT, pages


class Reading:
    """One READ of an image, until it is answered."""

    __slots__ = ("_absent", "_image", "_offset", "_pager", "_size", "_token", "answered")

    def __init__(self, pager: Pager, image: Image, offset: int, size: int) -> None:
        """Takes the request that is at hand."""
        self._pager, self._image, self._offset, self._size = pager, image, offset, size
        self._absent: list[Absent] = []
        self._token = native.later()
        self.answered = False

    @property
    def image(self) -> Image:
        """What is read."""
        return self._image

    @property
    def asker(self) -> int:
        """The id of the thread that waits for it."""
        asker: int = native.asker(self._token)
        return asker

    def absent(self) -> list[Absent]:
        """Which pages of it are not here."""
        self._absent = self._pager.absent(self._image, self._offset, self._size)
        return self._absent

    def answer(self) -> bool:
        """Answer it if all is here."""
        if not self.answered:
            self.answered = native.reply(self._token, self._pager.plan(self._image, self._offset, self._size) or b"")
        return self.answered

    def give(self, data: memoryview) -> bool:
        """Answer it by the bytes of what was ``absent``, if that is all of it, and the image names it still."""
        end = min(self._offset + self._size, self._image.size)
        first, stop = self._offset >> PAGE_SHIFT, pages(end)
        if (
            len(data) != (stop - first) << PAGE_SHIFT
            or (self._image.table.entries[first:stop] != self._absent[0].name).any()
        ):
            return False
        begin = self._offset & (PAGE - 1)
        self.answered = native.reply(self._token, data[begin : begin + end - self._offset])
        return self.answered

    def fail(self, error: int) -> None:
        """Answer it by -errno."""
        if not self.answered:
            self.answered = native.reply(self._token, error)
