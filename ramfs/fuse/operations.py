"""Requests of the kernel, translated for the namespace and the pager.

READ, WRITE, COPY_FILE_RANGE, FALLOCATE, LSEEK, IOCTL and STATX come straight from the extension (`_native.c`) and
are answered without an await, or by a task: some of FALLOCATE and LSEEK, and what needs absent pages. The others are
pyfuse3's.
docs/concurrency.md says which handlers await, and what may change meanwhile.
"""

import contextlib
import errno
import itertools
import logging
import os
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

import trio

from ramfs.arrival.pulls import Pulls
from ramfs.errors import FileError
from ramfs.fuse import fileattr, statx, virtual
from ramfs.fuse.answers import answered, errno_of, request_of
from ramfs.fuse.extension import kernel_resends, native, pyfuse3
from ramfs.fuse.flattening import Flattening
from ramfs.fuse.flush import Flusher
from ramfs.fuse.handles import FileHandle, VirtualHandle
from ramfs.fuse.jobs import Job
from ramfs.fuse.manifests import Manifests
from ramfs.fuse.passthrough import FOPEN_PASSTHROUGH, Passthrough
from ramfs.fuse.pulling import Pulling, Steering
from ramfs.fuse.questions import Questions
from ramfs.fuse.reading import Reading
from ramfs.fuse.seeking import Seeking
from ramfs.fuse.views import OpenView, Views
from ramfs.fuse.virtual import Kinds, Root, is_virtual
from ramfs.fuse.waiting import Waiting
from ramfs.fuse.working_sets import WorkingSets
from ramfs.image import scatter
from ramfs.inspect.counters import Counters
from ramfs.inspect.layout import MAX_TEXT
from ramfs.inspect.report import Observer
from ramfs.ledger import OPENER, Held, Kind, Ledger, Record, inode_numbers
from ramfs.namespace import Caller, Inode, Namespace, Opener, may
from ramfs.pager import Absent, Pager, Plan
from ramfs.ramblock import temporary_name
from ramfs.source.base import Rest
from ramfs.store.files import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from ramfs.store.images import Image
from ramfs.store.outcomes import REQUEST
from ramfs.units import MAX_NAME, PAGE, ROOT, HandleId, ImageId, InodeNumber, LayerId

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_WRITES: Final = os.O_WRONLY | os.O_RDWR
#: Seconds that the kernel may keep names and attributes: only this mount changes them.
_KEEP: Final = 300.0
#: ... but the times of a file that is mapped for writing change without the kernel's knowing.
_KEEP_OPEN: Final = 0.5
#: How long a create waits for a file whose last user has died but was not yet closed by the kernel.
_GRACE: Final = 2.0
#: Of an OPEN's reply: the close of this descriptor flushes nothing. (linux/fuse.h; pyfuse3 has no word for it.)
_FOPEN_NOFLUSH: Final = 1 << 5
#: What the kernel calls a file that has no name.
NO_NAME: Final = b"/"
#: How often a flush looks for files that were renamed under it.
_ATTEMPTS: Final = 10


class Operations(pyfuse3.Operations):
    """The handlers of pyfuse3, and those of the extension."""

    supports_dot_lookup = True
    enable_writeback_cache = False  # a write(2) that was acknowledged must outlive the daemon
    enable_acl = False

    def __init__(
        self, pager: Pager, namespace: Namespace, observer: Observer, flusher: Flusher, passthrough: Passthrough,
        pulls: Pulls, *, template_rdwr: bool = False, working_sets: bool = True, held: Held | None = None,
    ) -> None:  # fmt: skip
        """``held`` is what the kernel holds already, when another daemon served the mount before."""
        super().__init__()
        self.pager = pager
        self.namespace = namespace
        self.observer = observer
        self._questions = Questions(pager, namespace, observer)
        self.took = observer.slowest.note
        self.flusher = flusher
        self.template_rdwr = template_rdwr
        self.passthrough = passthrough
        self.manifests = Manifests(pager, namespace)
        self.pulls = pulls
        self.arrivals = pulls.arrivals
        self.views = Views(pager, namespace, flusher, pulls.arrivals)
        self._seeking = Seeking(pager, namespace, flusher)
        self._waiting = Waiting()
        self.counters: Counters = observer.counters
        self.ledger: Ledger = namespace.ledger
        self.working_sets = WorkingSets(pager, namespace, flusher, self.counters, working_sets)
        self._kinds = Kinds(Root(namespace, observer), self.manifests, self.working_sets, self.views)
        self._watched = self.working_sets.watched
        self.outcomes = pager.store.outcomes
        # No number is given twice, not by another daemon either: a RELEASE may come again.
        self._numbers = itertools.count(time.monotonic_ns())
        self._images: dict[int, Image] = {}  # of open files, by handle: what the hot path needs
        self._files: dict[int, FileHandle | VirtualHandle] = {}
        held = held or Held()
        self._has_init = bool(held.init)
        self._unanswered = held.by_request
        self._unaliased: set[int] = set()
        """requests to remove a temporary name that was removed for them before"""
        for record in held.files.values():
            self._reopen(record)
        passthrough.restore(*_native_of(held.files.values()))

    # -- what the kernel holds

    def _reopen(self, record: Record) -> None:
        """Know a file again that the kernel has open from the daemon before."""
        handle, ino = HandleId(record.b), InodeNumber(record.c)
        uid, gid, pid, _, _ = OPENER.unpack_from(record.payload)
        kind = self._kinds.of(ino)
        if kind is not None:
            opened = kind.reopen(ino, record.payload[OPENER.size :])
            self._files[handle] = VirtualHandle(handle, ino, uid, gid, pid, opened)
            return
        inode = self.namespace.get(ino)
        inode.opens[handle] = Opener(pid, bool(record.d))
        self._images[handle] = inode.file
        self._files[handle] = FileHandle(handle, inode, inode.file)
        inode.cache_doubtful = inode.image is not None and inode.image.direct is not None

    def held(self) -> Iterator[Record]:
        """What the kernel holds, for the ledger."""
        yield Record(Kind.INIT, payload=native.init_request())
        yield from self.namespace.held()
        for handle, file in self._files.items():
            if isinstance(file, VirtualHandle):
                payload = OPENER.pack(file.uid, file.gid, file.pid, 0, 0) + file.opened.kept
                yield Record(Kind.OPEN, 0, handle, file.ino, payload=payload)
            else:
                opener = file.inode.opens[file.id]
                payload = OPENER.pack(0, 0, opener.pid, *self.passthrough.held(file.id))
                yield Record(Kind.OPEN, 0, handle, file.inode.ino, int(opener.writable), payload)

    def _note_open(self, handle: HandleId, ino: InodeNumber, writable: bool, opener: bytes) -> None:
        self.ledger.add(Kind.OPEN, REQUEST.get(), handle, ino, int(writable), opener)

    def asked_again(self, request: int) -> Callable[[], None]:
        """The kernel has no answer to a request of the daemon before: what that one gave with it is not there.

        Lookups are taken back afterwards: an inode that has no name would else be gone before it is asked for.
        """
        lookups: Counter[InodeNumber] = Counter()
        for record in self._unanswered.pop(request, ()):
            if record.kind is Kind.OPEN and record.b in self._files:
                self._close(record.b)
            elif record.kind is Kind.ALIAS:
                self.namespace.drop_alias(InodeNumber(record.b), record.payload)
            elif record.kind is Kind.LOOKUP:
                lookups[InodeNumber(record.b)] += record.c
            elif record.kind is Kind.LOOKUPS:
                lookups.update(map(InodeNumber, inode_numbers(record.payload)))
            elif record.kind is Kind.FORGET:  # taken back by a daemon that died of the same request
                lookups[InodeNumber(record.b)] -= record.c
            elif record.kind is Kind.UNALIAS:
                self._unaliased.add(request)

        def take_back() -> None:
            for ino, count in lookups.items():
                self.namespace.forget(ino, count, request)

        return take_back

    def concluded(self, request: int) -> None:
        """The answer to a request is on its way."""
        self.outcomes.answered(request)

    def _done_before(self) -> bool:
        """Did the daemon before carry the request under way out, without answering it?"""
        return self.outcomes.of_before() is not None

    def _made_before(self) -> Inode | None:
        """What the daemon before made for the request under way, if it did."""
        ino = self.outcomes.of_before()
        return None if ino is None else self.namespace.get(ino)

    # -- answered at once, called by the extension

    def read_now(self, handle: int, offset: int, size: int) -> Plan | bytes | int | None:
        """READ: where the pages are, or bytes, or -errno; None if it is answered later."""
        try:
            image = self._images.get(handle)
            if image is None:
                file = self._virtual(handle)
                view = file.opened.view
                return file.read(offset, size) if view is None else self._read_view(view, offset, size)
            counters = self.counters
            counters.reads += 1
            counters.read_bytes += size
            watched = self._watched.get(handle)
            if watched is not None:
                watched.note(offset, size)
            if image.direct is not None:  # readahead(2), which asks past the native path
                return self.pager.copy_out(image, offset, size)
            return self.pager.plan(image, offset, size) or b""
        except Exception as exc:
            return self._failed(exc, "read", handle, offset, size)

    def absent_now(self, handle: int, offset: int, size: int) -> int | None:
        """Of a READ that has met absent pages: it is answered later (None), or -errno."""
        try:
            view = self._virtual(handle).opened.view if handle not in self._images else None
            if view is not None:
                trio.lowlevel.spawn_system_task(self._read_view_later, native.later(), view, offset, size)
                return None
            reading = Reading(self.pager, self._images[handle], offset, size)
        except Exception as exc:
            return self._failed(exc, "read", handle, offset, size)
        try:
            rest = self.arrivals.bring_soon(reading.image, reading.absent(), reading.give)
            if rest is not None or not reading.answer():
                trio.lowlevel.spawn_system_task(self._read_on, reading, rest, (handle, offset, size))
        except Exception as exc:
            reading.fail(self._failed(exc, "read", handle, offset, size))
        return None

    async def _read_on(self, reading: Reading, rest: Rest | None, details: tuple[int, ...]) -> None:
        """Answer a READ when its pages are here."""
        begun = time.monotonic()
        try:
            with self._waiting.of(reading.asker):
                if rest is not None:
                    await rest()
                while not reading.answer():
                    await self.arrivals.bring_all(reading.absent())
        except Exception as exc:
            reading.fail(self._failed(exc, "read", *details))
        finally:
            self.took("read", begun)

    def _read_view(self, view: OpenView, offset: int, size: int) -> Plan | bytes | None:
        """READ of a view: at once, or later when pages of it must first be written back by the kernel, or fetched."""
        self.counters.reads += 1
        self.counters.read_bytes += size
        if next(view.dirty(offset, size), None) is None:
            with contextlib.suppress(Absent):
                return self.views.gather(view, offset, size)
        trio.lowlevel.spawn_system_task(self._read_view_later, native.later(), view, offset, size)
        return None

    async def _read_view_later(self, token: object, view: OpenView, offset: int, size: int) -> None:
        answer: bytes | int
        try:
            asker = native.asker(token)
            with self._waiting.of(asker):
                await self.views.have(view, offset, size)
            with contextlib.suppress(Absent):
                if native.reply(token, self.views.gather(view, offset, size)):
                    return
            answer = await self._having(asker, lambda: self.views.copy_out(view, offset, size))
        except Exception as exc:
            answer = self._failed(exc, "read", offset, size)
        native.reply(token, answer)

    async def _having(self, thread: int, work: Callable[[], _T]) -> _T:
        """Do something for a thread, without an await, for which absent pages may have to be brought.

        Raises EINTR when the thread is killed meanwhile, SourceError, OSError.
        """
        while True:
            try:
                return work()
            except Absent as absent:
                with self._waiting.of(thread):
                    await self.arrivals.bring(absent)

    def _later(self, work: Callable[[], int], request: str, *details: int) -> None:
        """Answer the request at hand by what ``work`` returns, when the pages that it needs are here."""
        token = native.later()

        async def go_on() -> None:
            begun = time.monotonic()
            try:
                answer = await self._having(native.asker(token), work)
            except Exception as exc:
                answer = self._failed(exc, request, *details)
            native.reply(token, answer)
            self.took(request, begun)

        trio.lowlevel.spawn_system_task(go_on)

    def map_now(self, layer: int, page: int) -> int:
        """Of a READ, when it meets a layer that is not mapped: the address of a page of it, or -errno."""
        try:
            return self.pager.layers.map(LayerId(layer), page)
        except Exception as exc:
            return self._failed(exc, "read", layer, page)

    def write_now(self, handle: int, offset: int, data: memoryview, drop_suid: int) -> int | None:
        """WRITE: the number of bytes taken, or -errno; None if it is answered later."""
        try:
            image = self._images.get(handle)
            if image is None:
                file = self._virtual(handle)
                if file.opened.written is not None:
                    return self._write_layout(file.ino, file.opened.written, offset, data)
                with request_of(self):
                    return self._command(file, data)
            counters = self.counters
            counters.writes += 1
            counters.written_bytes += len(data)
            if drop_suid:
                self._drop_suid(handle)
            return self.pager.write(image, offset, data)
        except Absent:
            kept = bytes(data)
            target = self._images[handle]
            self._later(lambda: self.pager.write(target, offset, kept), "write", handle, offset, len(kept))
            return None
        except Exception as exc:
            return self._failed(exc, "write", handle, offset, len(data))

    def copy_now(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int, flags: int
    ) -> int | None:
        """COPY_FILE_RANGE: the number of bytes shared or copied, or -errno; None if it is answered later."""
        details = (source, source_offset, target, target_offset, length)
        try:
            if flags:
                return -errno.EINVAL
            if source not in self._images or target not in self._images:
                return -errno.EINVAL
            old, new = self._images[source], self._images[target]
            old.refresh()
            length = min(length, old.size - source_offset)
            if source_offset == target_offset == new.size == 0:
                self._inherit(source, target)
            known = old, source_offset, new, target_offset, length
            cloned = old.direct is not None and new.direct is None
            if cloned and self.pager.is_cloned(source_offset, target_offset, length):
                trio.lowlevel.spawn_system_task(self._copy_clone, native.later(), *known)
                return None
            return self._share(*known)
        except Absent:
            self._later(lambda: self._share(*known), "copy_file_range", *details)
            return None
        except Exception as exc:
            return self._failed(exc, "copy_file_range", *details)

    def _inherit(self, source: int, target: int) -> None:
        """An empty file gets the bytes of another from its start: what is remembered of a guest goes with them."""
        old, new = self._files[source], self._files[target]
        if isinstance(old, FileHandle) and isinstance(new, FileHandle):
            self.namespace.inherit(old.inode, new.inode)

    def _share(self, source: Image, source_offset: int, target: Image, target_offset: int, length: int) -> int:
        done = self.pager.share(source, source_offset, target, target_offset, length)
        self.counters.shared_ranges += 1
        self.counters.shared_bytes += done
        return done

    async def _copy_clone(
        self, token: object, source: Image, source_offset: int, target: Image, target_offset: int, length: int
    ) -> None:
        """COPY_FILE_RANGE from a direct image, whose pages must be cloned first. Both files are open meanwhile."""
        try:
            clones = {source.id: await self.pager.clone_range(source, source_offset, target_offset, length)}

            def work() -> int:
                with self.pager.images.with_clones(clones):
                    return self._share(source, source_offset, target, target_offset, length)

            done = await self._having(native.asker(token), work)
        except Exception as exc:
            done = self._failed(exc, "copy_file_range", source_offset, target_offset, length)
        native.reply(token, done)

    def ioctl_now(self, ino: int, command: int, given: bytes, room: int) -> bytes | int:
        """IOCTL: what it gives back, or -errno. The kernel asks about any file that can be opened."""
        try:
            number = InodeNumber(ino)
            kind = self._kinds.of(number)
            frozen = self.namespace.get(number).frozen if kind is None else kind.is_frozen(number)
            return fileattr.answer(command, given, room, immutable=frozen)
        except Exception as exc:
            return self._failed(exc, "ioctl", ino, command)

    def statx_now(self, ino: int, asked: bytes) -> bytes | int:
        """STATX: as GETATTR, and when the inode was made; or -errno. Whatever is asked, all is told."""
        try:
            kind = self._kinds.of(ino)
            if kind is not None:
                return statx.reply(kind.attributes(InodeNumber(ino)), kind.made(InodeNumber(ino)))
            inode = self.namespace.get(InodeNumber(ino))
            return statx.reply(self._attributes(inode), inode.btime)
        except Exception as exc:
            return self._failed(exc, "statx", ino)

    def fallocate_now(self, handle: int, mode: int, offset: int, length: int, uid: int) -> int | None:
        """FALLOCATE: 0 or -errno, or None if it is answered later."""
        try:
            image = self._images.get(handle)
            if image is None:
                self._virtual(handle)
                return -errno.EOPNOTSUPP
            if mode not in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
                return -errno.EOPNOTSUPP
            if uid:
                self._drop_suid(handle)
            keep_size = bool(mode & KEEP_SIZE)
            if not mode & (PUNCH_HOLE | ZERO_RANGE):
                self.pager.allocate(image, offset, length, keep_size=keep_size)
                return 0
            self.counters.punched_ranges += 1
            self.counters.punched_bytes += length

            def begin() -> Iterator[None] | None:
                """The first part of it; what is left to do, if anything."""
                parts = self.pager.zero(image, offset, length, keep_size=keep_size)
                return parts if next(parts, 0) is None else None

            try:
                parts = begin()
            except Absent:
                trio.lowlevel.spawn_system_task(self._zero_later, begin, native.later())
                return None
            if parts is None:
                return 0
            trio.lowlevel.spawn_system_task(self._zero_on, parts, native.later())
            return None
        except Exception as exc:
            return self._failed(exc, "fallocate", handle, mode, offset, length)

    async def _zero_later(self, begin: Callable[[], Iterator[None] | None], token: object) -> None:
        """Carry a FALLOCATE out when the pages are here of which it changes a part."""
        try:
            parts = await self._having(native.asker(token), begin)
        except Exception as exc:
            native.reply(token, self._failed(exc, "fallocate"))
        else:
            await self._zero_on(parts or iter(()), token)

    async def _zero_on(self, parts: Iterator[None], token: object) -> None:
        """Go on with a large FALLOCATE; other requests are answered in between."""
        try:
            for _ in parts:
                await trio.lowlevel.checkpoint()
            done = 0
        except Exception as exc:
            done = self._failed(exc, "fallocate")
        native.reply(token, done)

    def lseek_now(self, handle: int, offset: int, whence: int) -> int | None:
        """LSEEK with SEEK_DATA or SEEK_HOLE: the offset or -errno, or None if it is answered later."""
        try:
            file = self._files[handle]
            found = self._seeking.at_once(file, offset, whence)
            if found is None:
                trio.lowlevel.spawn_system_task(self._answer_seek, file, offset, whence, native.later())
            return found
        except Exception as exc:
            return -errno_of(exc, "lseek", (handle, offset, whence))

    async def _answer_seek(self, file: FileHandle | VirtualHandle, offset: int, whence: int, token: object) -> None:
        try:
            found = await self._seeking.later(file, offset, whence)
        except Exception as exc:
            found = -errno_of(exc, "lseek", (file.id, offset, whence))
        native.reply(token, found)

    def _drop_suid(self, handle: int) -> None:
        """A writer without the privilege: the file loses set-user-ID and set-group-ID."""
        file = self._files[handle]
        if isinstance(file, FileHandle):
            self.namespace.drop_suid(file.inode)

    def _failed(self, exc: Exception, request: str, *details: int) -> int:
        self.counters.errors += 1
        return -errno_of(exc, request, details)

    def _virtual(self, handle: int) -> VirtualHandle:
        file = self._files.get(handle)
        if not isinstance(file, VirtualHandle):
            raise FileError(errno.EBADF)
        return file

    # -- attributes

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode.ino
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink + inode.aliases
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_blksize = PAGE
        image = inode.image
        entry.st_atime_ns = inode.atime
        if image is not None:
            image.refresh()
        if image is None:
            entry.st_size = inode.size
            entry.st_mtime_ns, entry.st_ctime_ns = inode.mtime, inode.ctime
            entry.st_blocks = 0
        else:
            entry.st_size = image.size
            entry.st_mtime_ns, entry.st_ctime_ns = image.mtime, image.ctime
            # The full size, on purpose: cp takes its slow path for files that look sparse.
            entry.st_blocks = (image.size + 511) // 512
        changes = inode.opens or inode.is_snap or (image is not None and image.direct is not None)
        entry.attr_timeout = _KEEP_OPEN if changes else _KEEP
        entry.entry_timeout = _KEEP
        return entry

    def _entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The reply that gives the kernel an inode: one lookup more."""
        self.namespace.looked_up(inode)
        return self._attributes(inode)

    @staticmethod
    def _caller(ctx: pyfuse3.RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.pid, lambda: set(pyfuse3.get_sup_groups(ctx.pid)))

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        parent = InodeNumber(parent_inode)
        kind = self._kinds.of(parent)
        if kind is not None:
            return kind.attributes(kind.lookup(parent, name))
        behind = self._kinds.behind(parent, name)
        if behind is not None:
            kind, ino = behind
            await kind.prepare(ino)
            return kind.attributes(ino)
        return self._entry(self.namespace.lookup(parent, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """FORGET; must not fail."""
        for ino, count in inode_list:
            if not is_virtual(ino):
                try:
                    self.namespace.forget(InodeNumber(ino), count)
                except Exception:
                    log.exception("forget(%d, %d)", ino, count)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        kind = self._kinds.of(inode)
        if kind is not None:
            return kind.attributes(InodeNumber(inode))
        return self._attributes(self.namespace.get(InodeNumber(inode)))

    @answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """SETATTR."""
        kind = self._kinds.of(inode)
        if kind is not None:
            if kind.is_frozen(InodeNumber(inode)):
                raise FileError(errno.EROFS)
            if fields.update_size and kind.is_writable(InodeNumber(inode)):  # open(O_TRUNC)
                return kind.attributes(InodeNumber(inode))
            raise FileError(errno.EPERM)
        values: dict[str, int] = {}
        node = self.namespace.get(InodeNumber(inode))
        if node.image is not None:
            await self.passthrough.settled(node.image)
            node = self.namespace.get(InodeNumber(inode))
        if fields.update_mode:
            values["mode"] = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        elif fields.update_uid or fields.update_gid or (fields.update_size and ctx.uid != 0):
            self.namespace.drop_suid(node)
        if fields.update_uid:
            values["uid"] = attr.st_uid
        if fields.update_gid:
            values["gid"] = attr.st_gid
        if fields.update_atime:
            values["atime"] = attr.st_atime_ns
        size = attr.st_size if fields.update_size else None
        mtime = attr.st_mtime_ns if fields.update_mtime else None
        node = await self._having(
            ctx.pid, lambda: self.namespace.set_attributes(node.ino, size=size, mtime=mtime, **values)
        )
        return self._attributes(node)

    # -- names

    @answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """READLINK."""
        target = self.namespace.get(InodeNumber(inode)).target
        if target is None:
            raise FileError(errno.EINVAL)
        return target

    def _check_parent(self, parent: int, name: bytes) -> InodeNumber:
        """Let nothing be made or removed in ``.ramfs``, nor under its name."""
        if is_virtual(parent):
            raise FileError(errno.EROFS)
        if parent == ROOT and name in Root.entrances:
            raise FileError(errno.EBUSY)
        return InodeNumber(parent)

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """MKNOD."""
        parent = self._check_parent(parent_inode, name)
        return self._entry(self._made_before() or self.namespace.make(parent, name, mode, self._caller(ctx), rdev=rdev))

    @answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """MKDIR; in ``.snap``: a snapshot."""
        parent = self._check_parent(parent_inode, name)
        if self.namespace.get(parent).is_snap:
            return self._entry(await self._snapshot(parent, name))
        return self._entry(self._made_before() or self.namespace.make(parent, name, mode, self._caller(ctx)))

    async def _snapshot(self, snap: InodeNumber, name: bytes) -> Inode:
        space = self.namespace
        made = self._made_before()
        if made is not None:
            await trio.to_thread.run_sync(self.pager.store.catalog.sync)
            return made
        directory = space.check_snapshot(snap, name)
        await self.flush_below(directory)
        directory = space.check_snapshot(snap, name)  # the tree may have changed
        cloned = await self.pager.clone_direct(space.direct_below(directory))
        with self.pager.images.with_clones(cloned):
            frozen = space.freeze(space.check_snapshot(snap, name), name)
        try:
            await self.pager.sync(frozen.images)
            inode = frozen.commit()
        except BaseException:
            frozen.abort()
            raise
        await trio.to_thread.run_sync(self.pager.store.catalog.sync)
        self.counters.snapshots += 1
        return inode

    async def flush_below(self, directory: Inode) -> None:
        """Sync the files of a tree that are open for writing now. Raises as :meth:`Flusher.flush`, EBUSY, ENOENT."""
        waiting = self._open_for_writing(directory)
        for _ in range(_ATTEMPTS):
            if not waiting:
                return
            synced = await self.flusher.flush(list(waiting.values()))
            # Those that were not found under their names may have been renamed meanwhile.
            waiting = {
                ino: path
                for ino, path in self._open_for_writing(directory).items()
                if ino in waiting and ino not in synced
            }
        if waiting:
            raise FileError(errno.EBUSY, f"{os.fsdecode(min(waiting.values()))} is renamed all the time")

    def _open_for_writing(self, directory: Inode) -> dict[InodeNumber, bytes]:
        """The files of a tree that may have dirty pages, by their paths from the root of the mount."""
        base = self.namespace.path_of(directory.ino)
        return {
            inode.ino: os.path.join(base, path)
            for path, inode in self.namespace.files_below(directory)
            if inode.is_written
        }

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """UNLINK."""
        if self._done_before() or REQUEST.get() in self._unaliased:
            return
        if self._kinds.of(parent_inode) is self.views and self.views.is_layout(parent_inode, name):
            self.views.clear_layout(parent_inode)
            return
        parent = self._check_parent(parent_inode, name)
        behind = self._kinds.behind(parent, name)
        if behind is not None and behind[0] is self.working_sets:
            self.working_sets.remove(behind[1])
        else:
            self.namespace.unlink(parent, name)

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """RMDIR; in ``.snap``: deletes a snapshot."""
        parent = self._check_parent(parent_inode, name)
        if self._done_before():
            return
        if self.namespace.get(parent).is_snap:
            self.namespace.delete_snapshot(parent, name)
        else:
            self.namespace.rmdir(parent, name)

    @answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """SYMLINK."""
        parent = self._check_parent(parent_inode, name)
        return self._entry(
            self._made_before()
            or self.namespace.make(parent, name, stat.S_IFLNK | 0o777, self._caller(ctx), target=target)
        )

    @answered
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        """RENAME, with RENAME_EXCHANGE and RENAME_NOREPLACE."""
        if flags not in (0, pyfuse3.RENAME_EXCHANGE, pyfuse3.RENAME_NOREPLACE):
            raise FileError(errno.EINVAL)
        if self._done_before():
            return
        self.namespace.rename(
            self._check_parent(parent_inode_old, name_old), name_old,
            self._check_parent(parent_inode_new, name_new), name_new,
            exchange=flags == pyfuse3.RENAME_EXCHANGE, no_replace=flags == pyfuse3.RENAME_NOREPLACE,
        )  # fmt: skip

    @answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """LINK."""
        if is_virtual(inode):
            raise FileError(errno.EPERM)
        parent = self._check_parent(new_parent_inode, new_name)
        return self._entry(self._made_before() or self.namespace.link(InodeNumber(inode), parent, new_name))

    # -- open files

    def _open(self, inode: Inode, flags: int, pid: int) -> pyfuse3.FileInfo:
        image = inode.file
        writable = bool(flags & _WRITES)
        if inode.frozen and writable and not self.template_rdwr:
            raise FileError(errno.EROFS)
        if flags & os.O_TRUNC:
            self.pager.truncate(image, 0)
            self.namespace.drop_suid(inode)
        handle = HandleId(next(self._numbers))
        backing = self.passthrough.open(inode, handle)
        live = bool(backing) and not inode.frozen
        opener = OPENER.pack(0, 0, pid, *self.passthrough.held(handle))
        self._note_open(handle, inode.ino, writable and not inode.frozen, opener)
        inode.opens[handle] = Opener(pid, writable and not inode.frozen)
        self._images[handle] = image
        self._files[handle] = FileHandle(handle, inode, image)
        if not backing and not inode.frozen:
            self.working_sets.opened(handle, inode, image, pid, read_write=flags & os.O_ACCMODE == os.O_RDWR)
        if not writable or live:
            # The kernel else writes back all that a guest has dirty whenever a reader of its memory closes it.
            native.mark_open(handle, _FOPEN_NOFLUSH | (FOPEN_PASSTHROUGH if backing else 0), backing)
        # A frozen file that is open for writing must not be mapped shared: stores would stay in the page
        # cache, seen by everybody, though no write is accepted. direct_io makes the kernel refuse that.
        # Of a live file that is native the mount may keep pages from before, or those that readahead(2) got.
        keep = not backing and not inode.cache_doubtful
        inode.cache_doubtful = live
        return pyfuse3.FileInfo(fh=handle, keep_cache=keep, direct_io=inode.frozen and writable)

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """OPEN."""
        kind = self._kinds.of(inode)
        if kind is not None:
            return await self._open_virtual(kind, InodeNumber(inode), flags, ctx)
        await self.passthrough.look(self.namespace.get(InodeNumber(inode)), flags)
        return self._open(self.namespace.get(InodeNumber(inode)), flags, ctx.pid)

    async def _open_virtual(
        self, kind: virtual.Kind, ino: InodeNumber, flags: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if flags & (_WRITES | os.O_TRUNC) and kind.is_frozen(ino):
            raise FileError(errno.EROFS)
        if flags & _WRITES and not kind.is_writable(ino):
            raise FileError(errno.EACCES)  # which the mode alone does not tell root
        with self._waiting.of(ctx.pid):
            opened = await kind.open(ino)
        handle = HandleId(next(self._numbers))
        self._note_open(handle, ino, False, OPENER.pack(ctx.uid, ctx.gid, ctx.pid, 0, 0) + opened.kept)
        self._files[handle] = VirtualHandle(handle, ino, ctx.uid, ctx.gid, ctx.pid, opened)
        head = opened.view is not None and opened.view.view.head
        return pyfuse3.FileInfo(fh=handle, direct_io=not opened.keeps, keep_cache=opened.keeps and not head)

    def _write_layout(self, ino: InodeNumber, written: bytearray, offset: int, data: memoryview) -> int:
        """WRITE of a layout, from its beginning on: it counts as soon as all of it is there."""
        if offset == 0:
            written.clear()
        if offset != len(written):
            raise FileError(errno.EINVAL)
        if offset + len(data) > MAX_TEXT:
            raise FileError(errno.EFBIG)
        written += data
        self.views.write_layout(ino, written)
        return len(data)

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """CREATE; of a temporary name of QEMU's: opens the block file that it means; of NO_NAME: O_TMPFILE."""
        parent = self._check_parent(parent_inode, name)
        caller = self._caller(ctx)
        inode = self._made_before()
        if inode is not None and temporary_name(name) is not None:
            self.namespace.add_alias(parent, name, inode)
        if inode is None and name == NO_NAME:
            inode = self.namespace.make_unnamed(parent, mode, caller)
        if inode is None:
            inode = await self._block_inode(parent, name, mode, caller)
        if inode is None:
            inode = self.namespace.make(parent, name, mode, caller)
        await self.passthrough.look(inode, flags)
        info = self._open(inode, flags & ~os.O_TRUNC, ctx.pid)
        return info, self._entry(inode)

    async def _block_inode(self, parent: InodeNumber, name: bytes, mode: int, caller: Caller) -> Inode | None:
        deadline = trio.current_time() + _GRACE
        while True:
            try:
                return self.namespace.block_inode(parent, name, mode, caller)
            except FileError as exc:
                # The kernel closes the files of a process that was killed a moment after it is gone.
                if exc.errno != errno.EBUSY or trio.current_time() > deadline or self._in_use(parent, name):
                    if exc.errno == errno.EBUSY:
                        log.info("create %s refused: %s", os.fsdecode(name), exc)
                    raise
            await trio.sleep(0.02)

    def _in_use(self, parent: InodeNumber, name: bytes) -> bool:
        inode = self.namespace.block_of(parent, name)
        pids = set[int]() if inode is None else {opener.pid for opener in inode.opens.values()}
        return any(map(_lives, pids - self.flusher.pids))

    @answered
    async def flush(self, fh: int) -> None:
        """FLUSH: nothing to do, every write was carried out when it was answered; but for half a layout."""
        file = self._files.get(HandleId(fh))
        if not isinstance(file, VirtualHandle) or not (written := file.opened.written):
            return
        if not self.views.write_layout(file.ino, written):
            raise FileError(errno.EINVAL)

    @answered
    async def release(self, fh: int) -> None:
        """RELEASE; asked again it may be of a file that is closed already."""
        if fh in self._files:
            self._close(fh)

    def _close(self, fh: int) -> None:
        self.ledger.add(Kind.CLOSE, REQUEST.get(), fh)
        self._images.pop(fh, None)
        file = self._files.pop(fh)
        if isinstance(file, FileHandle):
            self.working_sets.closed(file.id)
            del file.inode.opens[file.id]
            self.passthrough.release(file.id)
            self.namespace.let_go(file.inode)
        elif file.opened.manifest is not None:
            self.manifests.close(file.ino)
        elif file.opened.view is not None:
            self.views.close(file.opened.view)
        elif file.job is not None:
            file.job.cancel()

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        """FSYNC: the file is durable, and the names of everything."""
        file = self._files[fh]
        if isinstance(file, FileHandle):
            self.counters.syncs += 1
            await self.pager.sync([file.image])

    # -- directories

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """OPENDIR: the handle is the directory's number."""
        if not is_virtual(inode):
            node = self.namespace.get(InodeNumber(inode))
            if not node.is_dir:
                raise FileError(errno.ENOTDIR)
        return inode

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS. Cookies never change and are never used again, so changes meanwhile cost no entry."""
        kind = self._kinds.of(fh)
        if kind is not None:
            entries = [(b".", InodeNumber(fh)), *kind.names(InodeNumber(fh))]
            for number, (name, ino) in enumerate(entries[start_id:], start_id + 1):
                if not pyfuse3.readdir_reply(token, name, kind.attributes(ino), number):
                    return
            return
        space = self.namespace
        directory = space.get(InodeNumber(fh))
        dots = ((b".", directory), (b"..", space.get(directory.parent or ROOT)))
        for number, (name, inode) in enumerate(dots[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), number):
                return
        told: list[Inode] = []
        for cookie, name, ino in space.names(directory.ino, max(0, start_id - len(dots))):
            inode = space.get(ino)
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), cookie + len(dots)):
                space.let_go(inode)
                break
            told.append(inode)
        space.listed(told)

    @answered
    async def releasedir(self, fh: int) -> None:
        """RELEASEDIR: nothing was kept."""

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """FSYNCDIR: all names are durable."""
        await trio.to_thread.run_sync(self.pager.store.catalog.sync)

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """STATFS: the file system of the store."""
        store = self.pager.store.statvfs()
        data = pyfuse3.StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, field, getattr(store, field))
        data.f_namemax = MAX_NAME
        return data

    # -- extended attributes

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """GETXATTR; some are made for the asking (questions.py)."""
        if is_virtual(inode):
            raise FileError(errno.ENODATA)
        if self._done_before():  # pyfuse3 looks whether the attribute is there before it is set
            if native.xattr_flags() == os.XATTR_CREATE:
                raise FileError(errno.ENODATA)
            return b""
        answer = await self._questions.answer(InodeNumber(inode), name, self._caller(ctx))
        return self.namespace.xattr(InodeNumber(inode), name) if answer is None else answer

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        """SETXATTR."""
        self._set_xattr(inode, name, value)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """REMOVEXATTR."""
        self._set_xattr(inode, name, None)

    def _set_xattr(self, inode: int, name: bytes, value: bytes | None) -> None:
        if is_virtual(inode):
            raise FileError(errno.EPERM)
        if self._done_before():
            return
        self.namespace.set_xattr(InodeNumber(inode), name, value)

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """LISTXATTR; the computed ones are not listed, so that cp -a does not try to copy them."""
        return [] if is_virtual(inode) else self.namespace.xattrs(InodeNumber(inode))

    # -- control

    def _command(self, file: VirtualHandle, command: memoryview) -> int | None:
        caller = Caller(file.uid, file.gid, file.pid, lambda: set(pyfuse3.get_sup_groups(file.pid)))
        try:
            scattered = scatter.parse(command) if file.ino == virtual.CONTROL else None
        except ValueError:
            raise FileError(errno.EINVAL) from None
        if scattered is not None:
            self._write_runs(*scattered, caller)
            return len(command)
        if len(command) > virtual.MAX_COMMAND:
            raise FileError(errno.E2BIG)
        parsed = virtual.parse(bytes(command))
        for name, make in (("flatten", self._flatten), ("pull", self._pull), ("arrival", self._steer)):
            if name in parsed:
                if file.job is not None:
                    raise FileError(errno.EBUSY)
                file.job = make(parsed, caller)
                trio.lowlevel.spawn_system_task(file.job.run)
                return len(command)
        clone = virtual.parse_clone(parsed)
        with self.namespace.at(clone[0], caller) as top:
            direct = [] if self._done_before() else self.namespace.direct_below(top)
        if direct:
            details = REQUEST.get(), direct, clone, caller, len(command)
            trio.lowlevel.spawn_system_task(self._clone_later, native.later(), *details)
            return None
        self._clone(*clone, caller)
        return len(command)

    def _write_runs(self, path: bytes, runs: list[tuple[int, int]], pages: memoryview, caller: Caller) -> None:
        """Runs of pages of a file, none of which the kernel has in its cache."""
        with self.namespace.at(path, caller) as inode:
            if not may(inode, caller, 2):
                raise FileError(errno.EACCES)
            if inode.image is None:
                raise FileError(errno.EISDIR if inode.is_dir else errno.EINVAL)
            self.counters.writes += 1
            self.counters.written_bytes += len(pages)
            self.pager.write_runs(inode.image, runs, pages)

    async def _clone_later(
        self, token: object, request: int, direct: list[ImageId], clone: tuple[bytes, bytes, bytes], caller: Caller,
        done: int,
    ) -> None:  # fmt: skip
        """A clone of a tree with direct images, whose pages must be cloned first."""
        REQUEST.set(request)  # of this task alone
        try:
            with self.pager.images.with_clones(await self.pager.clone_direct(direct)):
                self._clone(*clone, caller)
        except Exception as exc:
            done = self._failed(exc, "clone")
        native.reply(token, done)
        self.concluded(request)

    def _clone(self, source: bytes, parent: bytes, name: bytes, caller: Caller) -> None:
        space = self.namespace
        with space.at(parent, caller) as directory:
            if not self._done_before():
                self._check_parent(directory.ino, name)
                with space.at(source, caller) as top:
                    space.let_go(space.clone(top, directory.ino, name, caller))
        # The kernel did not see that: it would show the old link count and mtime for minutes.
        with contextlib.suppress(OSError):  # it may have forgotten the directory
            pyfuse3.invalidate_inode(directory.ino, attr_only=True)
        self.counters.clones += 1

    def _flatten(self, command: dict[str, Any], caller: Caller) -> Job:
        """Flattens the frozen files at a path."""
        with self.namespace.at(virtual.path_to_flatten(command), caller) as top:
            files = list(self.namespace.frozen_below(top))
        if not files:
            raise FileError(errno.EINVAL)
        return Flattening(self.pager, files)

    def _pull(self, command: dict[str, Any], caller: Caller) -> Job:
        """Makes a directory whose pages come from elsewhere."""
        request = virtual.parse_pull(command)
        with self.namespace.at(request.parent, caller) as directory:  # before anybody is asked for anything
            self.namespace.check_plant(self._check_parent(directory.ino, request.name), request.name, caller)
        return Pulling(self.pulls, self.namespace, request, caller)

    def _steer(self, command: dict[str, Any], caller: Caller) -> Job:
        """Changes what arrives below a path: its source, whether and how fast it streams."""
        change = virtual.parse_arrival(command)
        with self.namespace.at(change.path, caller) as top:
            which = self.pulls.of_images(self.namespace.images_below(top))
        return Steering(self.pulls, which, self.namespace, change, caller)

    def stacktrace(self) -> None:
        """Not offered: pyfuse3 would dump stacks on an xattr of the root."""

    def init(self) -> None:
        """INIT; the extension has set the limits."""
        if not self._has_init:
            self.ledger.add(Kind.INIT, payload=native.init_request())
            if not kernel_resends():
                native.mirror(self.ledger.requests)


def _native_of(files: Iterable[Record]) -> tuple[list[tuple[LayerId, int]], list[tuple[HandleId, LayerId]]]:
    """Of OPEN records: the layers and backing ids that the kernel holds, and the handles that are served from them."""
    backings: dict[LayerId, int] = {}
    handles: list[tuple[HandleId, LayerId]] = []
    for record in files:
        *_, layer, backing = OPENER.unpack_from(record.payload)
        if backing:
            backings[LayerId(layer)] = backing
            handles.append((HandleId(record.b), LayerId(layer)))
    return list(backings.items()), handles


def _lives(pid: int) -> bool:
    """Is there such a process, and is it not on its way out? (One that is killed has its files for a moment.)"""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *numbers = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/status", "rb") as file:
            pending = [int(line.split()[1], 16) for line in file if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except OSError:
        return False
    exiting = int(numbers[5]) & 0x4  # PF_EXITING
    return state not in (b"Z", b"X") and not exiting and not any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)
