"""Assembly: store, pager, namespace and mount; background work, signals, readiness."""

import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from ramfs.errors import RamfsError
from ramfs.fuse import tuning
from ramfs.fuse.flush import Flusher
from ramfs.fuse.operations import Operations
from ramfs.fuse.passthrough import Passthrough
from ramfs.fuse.session import Session
from ramfs.inspect.counters import Counters
from ramfs.inspect.report import Observer
from ramfs.namespace import Namespace
from ramfs.pager import Pager
from ramfs.store.store import Store

log = logging.getLogger(__name__)

#: Seconds after which what was written is on disk, as with other file systems.
CHECKPOINT: Final = 30.0
#: Seconds between looks for layers to digest, and for garbage.
HOUSEKEEPING: Final = 1.0
#: Seconds after which a busy worker thread lets the loop have the interpreter. Python's 5 ms are many faults.
SWITCH_INTERVAL: Final = 0.0005
#: Seconds that a sealed layer waits for its digests: first the guest that was just cloned gets the machine.
DIGEST_DELAY: Final = 5.0

#: Told to end, by a service manager or at the keyboard; SIGHUP is taken and means nothing.
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


def notify_systemd(message: str) -> None:
    """Tell systemd, if it started us with Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        data = message.encode(errors="backslashreplace")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(data, "\0" + address[1:] if address.startswith("@") else address)


class Daemon:
    """One mounted store."""

    def __init__(self, request: MountRequest, ready: Callable[[], None]) -> None:
        self.request = request
        self.ready = ready
        self.stopping = False
        self._early: list[int] = []
        self._serving = trio.CancelScope()

    def run(self) -> None:
        """Mount, serve until unmounted or told to stop, close the store. Raises RamfsError."""
        request = self.request
        _raise_file_limit()
        sys.setswitchinterval(SWITCH_INTERVAL)
        store = Store(request.store, create=True, purpose=f"mounted at {request.mountpoint}")
        try:
            self.pager = Pager(store)
            self.namespace = Namespace(self.pager)
            passthrough = Passthrough(store.layers, _not_native(request))
            self.observer = Observer(
                store, self.namespace, Counters(), request.mountpoint, Session.connection, passthrough, time.monotonic()
            )
            self.flusher = Flusher(request.mountpoint)
            self.operations = Operations(
                self.pager,
                self.namespace,
                self.observer,
                self.flusher,
                passthrough,
                template_rdwr=request.template_rdwr,
            )
            # From the mount on a signal that ended us would leave a dead mount behind. (Blocking would not do:
            # numpy has threads of its own that take signals.)
            for number in _SIGNALS:
                signal.signal(number, lambda number, _: self._early.append(number))
            session = Session(self.operations, request.mountpoint, request.options)
            try:
                trio.run(self._main)
            finally:
                notify_systemd("STOPPING=1")
                session.close()
                self.flusher.close()
        except BaseException:
            store.abandon()
            raise
        store.close()
        log.info("unmounted %s", request.mountpoint)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals)
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
        refused = tuning.tune(device)
        if refused:
            log.warning(
                "cannot set %s of the mount: guests that dirty much memory will be held back",
                ", ".join(refused),
            )
        nursery.start_soon(self._keep_house)
        nursery.start_soon(self._checkpoint)
        log.info("mounted %s at %s", self.request.store, self.request.mountpoint)
        notify_systemd(f"READY=1\nSTATUS=Serving {self.request.mountpoint}")
        self.ready()

    # -- signals

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            for number in self._early:
                signal.raise_signal(number)
            async for number in signals:
                if number == signal.SIGHUP:
                    continue
                if self.stopping:
                    self._end_session()  # the second one: without waiting for what is still being flushed
                    continue
                self.stopping = True
                log.info("%s: flushing and unmounting", signal.Signals(number).name)
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
        while True:
            await trio.sleep(HOUSEKEEPING)
            now = trio.current_time()
            try:
                waiting = self.pager.undigested()
                sealed_since = {layer.id: sealed_since.get(layer.id, now) for layer in waiting}
                for layer in waiting:
                    if now - sealed_since[layer.id] >= DIGEST_DELAY:
                        await self.pager.digest(layer)
                if self.pager.has_garbage():
                    await self.pager.collect()
                    self.observer.counters.garbage_passes += 1
                self.pager.store.reserve.keep()
            except Exception as exc:  # noqa: BLE001  (guests live on the daemon: nothing in the background ends it)
                _tell("housekeeping of the store failed, will try again", exc)
                await trio.sleep(CHECKPOINT)

    async def _checkpoint(self) -> None:
        """Nothing stays in memory only for longer than CHECKPOINT."""
        while True:
            await trio.sleep(CHECKPOINT)
            try:
                await self.pager.sync()
            except Exception as exc:  # noqa: BLE001  (as above)
                _tell("the store could not be synced, will try again", exc)


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
