"""Assembly: store, pager, namespace and mount; background work, signals, readiness."""

import errno
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

import ramfs
from ramfs.arrival.fetch import Arrivals
from ramfs.arrival.pulls import Pulls
from ramfs.errors import RamfsError
from ramfs.fuse import tuning
from ramfs.fuse.flush import Flusher
from ramfs.fuse.operations import Operations
from ramfs.fuse.passthrough import Passthrough
from ramfs.fuse.session import Session
from ramfs.inspect.counters import Counters
from ramfs.inspect.report import Observer, Supervision
from ramfs.ledger import Held, Ledger
from ramfs.namespace import Namespace
from ramfs.pager import Pager
from ramfs.source.opening import Opener
from ramfs.store.store import Store
from ramfs.supervisor.link import YIELDED, Go, Link
from ramfs.supervisor.unmounting import unmount_command

log = logging.getLogger(__name__)

#: Seconds after which what was written is on disk, as with other file systems.
CHECKPOINT: Final = 30.0
#: ... and bytes: what was written stays in the page cache of a store on disk until it is synced.
WRITE_BEHIND: Final = 256 << 20
#: Seconds between looks for layers to digest, garbage, and pages that can leave the store's page cache.
HOUSEKEEPING: Final = 1.0
#: Seconds after which a busy worker thread lets the loop have the interpreter. Python's 5 ms are many faults.
SWITCH_INTERVAL: Final = 0.0005
#: Seconds that a sealed layer waits for its digests: first the guest that was just cloned gets the machine.
DIGEST_DELAY: Final = 5.0

#: Seconds after which all that the kernel asked again of the daemon before is answered.
ASKED_AGAIN: Final = 60.0

#: Told to end; SIGHUP is taken and means nothing.
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What ``ramfs mount`` was asked for. ``options`` are those for libfuse and the kernel."""

    store: str
    mountpoint: str
    options: tuple[str, ...] = ()
    template_rdwr: bool = False
    native: str = "auto"
    """which files the kernel may serve from the store by itself: auto, frozen or off"""
    working_sets: bool = True
    """whether what clones ask for first is recorded, and read ahead for others"""


class Daemon:
    """One mounted store, which this daemon mounts, or takes over from one that died or yielded."""

    def __init__(self, request: MountRequest, ready: Callable[[], None], link: Link, go: Go) -> None:
        self.request = request
        self.ready = ready
        self.link = link
        self.go = go
        self.supervised = True
        self.stopping = False
        self._early: list[int] = []
        self._serving = trio.CancelScope()

    def run(self) -> None:
        """Serve until unmounted or told to stop, close the store. Raises RamfsError."""
        request, kept = self.request, self.go.kept
        _raise_file_limit()
        sys.setswitchinterval(SWITCH_INTERVAL)
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: self._early.append(number))
        purpose = f"mounted at {request.mountpoint}"
        store = Store(request.store, create=not kept, purpose=purpose, lock=kept.get("lock"))
        try:
            ledger = Ledger(kept.get("ledger"))
            held = Held.of(ledger.records())
            self.pager = Pager(store)
            self.pulls = Pulls(self.pager, Arrivals(self.pager), Opener(self._device))
            self.pulls.restore()
            self.namespace = Namespace(self.pager, ledger, held)
            live_refused = "the mount option native=frozen" if request.native == "frozen" else ""
            passthrough = Passthrough(self.pager, _not_native(request), live_refused)
            supervision = Supervision(self.go.supervisor, self.go.starts, self.go.crashes, self.go.why)
            self.observer = Observer(
                store,
                self.namespace,
                Counters(),
                request.mountpoint,
                Session.connection,
                passthrough,
                self.pulls,
                time.monotonic(),
                supervision,
            )
            self.flusher = Flusher(request.mountpoint)
            self.operations = Operations(
                self.pager,
                self.namespace,
                self.observer,
                self.flusher,
                passthrough,
                self.pulls,
                template_rdwr=request.template_rdwr,
                working_sets=request.working_sets,
                held=held,
            )
            session = Session(self.operations, request.mountpoint, request.options, kept.get("fuse"))
            if kept:
                session.go_on(held.init, ledger.requests)
                level = logging.INFO if self.go.yielded else logging.WARNING
                log.log(level, "%s; going on at %s", self.go.why, request.mountpoint)
            else:
                for name, fd in (("lock", store.lock.fd), ("ledger", ledger.fd), ("fuse", session.fd)):
                    self.link.keep(name, fd)
            try:
                trio.run(self._main)
            finally:
                self._unmount(session)
                self.operations.manifests.close_all()
                self.flusher.close()
        except BaseException:
            store.abandon()
            raise
        store.close()
        log.info("unmounted %s", request.mountpoint)

    def _device(self) -> int | None:
        """The st_dev of the mount, once that is known."""
        return None if self.flusher.device < 0 else self.flusher.device

    def _unmount(self, session: Session) -> None:
        """End the connection, here and at the supervisor; unmount, if that has not happened yet."""
        mounted = session.disconnect()
        self.link.done()
        if mounted:
            command = unmount_command(self.request.mountpoint, lazy=True)
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(self._take_orders)
            nursery.start_soon(self.pulls.run)
            nursery.start_soon(self._start, nursery)
            with self._serving:
                await Session.serve()
            nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery) -> None:
        """Things for which the mount must answer already."""
        try:
            device = await self.flusher.look()
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                raise
            return  # unmounted as soon as it was there
        refused = [] if self.go.kept else tuning.tune(device)
        if refused:
            log.warning(
                "cannot set %s of the mount: guests that dirty much memory will be held back",
                ", ".join(refused),
            )
        nursery.start_soon(self._keep_house)
        nursery.start_soon(self._checkpoint)
        if self.pager.layers.drops:
            nursery.start_soon(self._drop_behind)
        if not self.go.kept:
            log.info("mounted %s at %s", self.request.store, self.request.mountpoint)
        self.link.ready(ramfs.__version__)
        self.ready()

    # -- signals and orders

    async def _take_orders(self) -> None:
        """What the supervisor wants."""
        async for order in self.link.orders():
            if order == "yield":
                self._yield()
            elif order == "stop":
                self._begin_stop("told to stop")
        self.supervised = False
        if self.go.managed:
            log.warning("the supervisor is gone: the service manager will start another")
        else:
            log.warning("the supervisor is gone: the next time a daemon of %s dies, guests do", self.request.mountpoint)

    @staticmethod
    def _yield() -> None:
        """End here and now: the next daemon goes on as it would if this one had been killed.

        All else of the loop stands at an await, so no change is half made; what threads do to files may end anywhere.
        """
        logging.shutdown()
        os._exit(YIELDED)

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            for number in self._early:
                signal.raise_signal(number)
            async for number in signals:
                if number == signal.SIGHUP:
                    continue
                if self.supervised or self.go.managed:
                    self._yield()  # meant for this process alone, or by a manager that cares for the mount
                self._begin_stop(signal.Signals(number).name)

    def _begin_stop(self, why: str) -> None:
        if self.stopping:
            self._end_session()  # the second time: without waiting for what is still being flushed
            return
        self.stopping = True
        log.info("%s: flushing and unmounting", why)
        trio.lowlevel.spawn_system_task(self._stop)

    async def _stop(self) -> None:
        """Take over what guests have in mapped pages, then end."""
        try:
            await self.operations.flush_below(self.namespace.get_root())
        except Exception as exc:  # noqa: BLE001  (the daemon must end all the same)
            _tell("not all mapped pages could be flushed", exc)
        self._end_session()

    def _end_session(self) -> None:
        """Take no more requests, nor wait for a flush: without answers to its requests it would never end."""
        Session.stop()
        self._serving.cancel()

    # -- background work

    async def _keep_house(self) -> None:
        """Digests and garbage, when there is something to do."""
        sealed_since: dict[int, float] = {}
        began = trio.current_time()
        settled = not self.go.kept
        while True:
            await trio.sleep(HOUSEKEEPING)
            now = trio.current_time()
            try:
                if not settled:
                    await self.pager.settle()
                    settled = True
                self.operations.working_sets.tend()
                await self.operations.passthrough.leave_idle()
                if self.namespace.ledger.has_grown:
                    self.namespace.ledger.renew(self.operations.held())
                if now > began + ASKED_AGAIN:
                    self.pager.store.outcomes.forget_before()
                waiting = self.pager.undigested()
                sealed_since = {layer.id: sealed_since.get(layer.id, now) for layer in waiting}
                for layer in waiting:
                    if now - sealed_since[layer.id] >= DIGEST_DELAY:
                        await self.pager.digest(layer)
                if self.pager.has_garbage():
                    await self.pager.collect()
                    self.observer.counters.garbage_passes += 1
                    self.pulls.tidy()
                self.pager.store.reserve.keep()
            except Exception as exc:  # noqa: BLE001  (guests live on the daemon: nothing in the background ends it)
                _tell("housekeeping of the store failed, will try again", exc)
                await trio.sleep(CHECKPOINT)

    async def _checkpoint(self) -> None:
        """Nothing stays in memory only for longer than CHECKPOINT, nor more than WRITE_BEHIND."""
        counters = self.observer.counters
        most = WRITE_BEHIND if self.pager.layers.drops else sys.maxsize
        while True:
            before = counters.written_bytes
            with trio.move_on_after(CHECKPOINT):
                while counters.written_bytes - before < most:  # noqa: ASYNC110  (an event would cost every WRITE)
                    await trio.sleep(HOUSEKEEPING)
            try:
                await self.pager.sync()
            except Exception as exc:  # noqa: BLE001  (as above)
                _tell("the store could not be synced, will try again", exc)

    async def _drop_behind(self) -> None:
        """A page that the kernel keeps for the mount is not kept for the store too."""
        while True:
            await trio.sleep(HOUSEKEEPING)
            try:
                self.observer.counters.dropped_pages += await self.pager.drop_behind()
            except Exception as exc:  # noqa: BLE001  (as above)
                _tell("pages cannot leave the store's page cache", exc)
                await trio.sleep(CHECKPOINT)


def _not_native(request: MountRequest) -> str:
    """Why nothing may be served natively, if there is a reason from the start."""
    if request.native == "off":
        return "the mount option native=off"
    return "the mount option template_rdwr" if request.template_rdwr else ""


def _tell(what: str, exc: Exception) -> None:
    """Log a failure: in one line when its kind was foreseen, else with the traceback."""
    foreseen = isinstance(exc, OSError | RamfsError | sqlite3.Error)
    log.error("%s: %s", what, exc, exc_info=None if foreseen else exc)


def _raise_file_limit() -> None:
    """Every layer and table in use is an open file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
