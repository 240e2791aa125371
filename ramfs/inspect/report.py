"""``.ramfs/status.json``, ``.ramfs/metrics`` and the page counts of a file."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import numpy as np

import ramfs
from ramfs.arrival.pulls import Pulls
from ramfs.errors import FileError, StoreDamaged
from ramfs.image.lineage import PageState, States, page_states
from ramfs.image.table import Mask
from ramfs.inspect.counters import Counters, Slowest
from ramfs.namespace import Inode, Namespace
from ramfs.store.direct import stored_and_shared
from ramfs.store.images import Image, read_table
from ramfs.store.presence import ABSENT, ZEROS
from ramfs.store.store import Store
from ramfs.units import SNAP_BIT, InodeNumber, LayerId

#: What is told of each pull.
_PULL_METRICS: Final = {
    "total_bytes": "gauge", "here_bytes": "gauge", "fetched_bytes": "counter", "demand_faults": "counter",
    "demand_seconds": "counter", "demand_slowest_seconds": "gauge",
}  # fmt: skip
#: Of the JSON texts; grows with every change that a reader could stumble over.
SCHEMA = 1


class Native(Protocol):
    """What tells which files the kernel serves from the store by itself."""

    refused: str
    """why there are none, if there is a reason that holds for the whole mount"""
    live_refused: str
    """why there are only frozen ones"""

    def is_native(self, inode: Inode) -> bool:
        """Is that one?"""


@dataclass(slots=True)
class Supervision:
    """What a daemon knows of its supervisor and of those before it."""

    pid: int
    starts: int
    """daemons of this mount so far, this one among them"""
    crashes: int
    """of those, how many died"""
    why: str
    """why this one took over; empty for the first"""


@dataclass(slots=True)
class Observer:
    """Looks at a store and its tree for people and programs."""

    store: Store
    namespace: Namespace
    counters: Counters
    mountpoint: str
    connection: Callable[[], dict[str, int]]
    """what was settled with the kernel"""
    native: Native
    pulls: Pulls
    started: float
    supervision: Supervision
    slowest: Slowest = field(default_factory=Slowest)

    def status(self) -> dict[str, Any]:
        """The contents of ``status.json``; docs/format.md names the fields."""
        catalog, layers = self.store.catalog, self.store.layers
        space = self.store.statvfs()
        opened = [(inode, self.native.is_native(inode)) for inode in self.namespace.inodes.values() if inode.opens]
        for inode, _ in opened:
            if inode.image is not None:
                inode.image.refresh()
        return {
            "schema": SCHEMA,
            "version": ramfs.__version__,
            "pid": os.getpid(),
            "mountpoint": self.mountpoint,
            "store": self.store.directory,
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "supervisor": asdict(self.supervision),
            "images": {
                "total": catalog.number("SELECT count(*) FROM images"),
                "frozen": catalog.number("SELECT count(*) FROM images WHERE frozen"),
                "in_use": len(self.store.images.open_images()),
            },
            "snapshots": catalog.number("SELECT count(*) FROM names WHERE parent >= ?", SNAP_BIT),
            "inodes": catalog.number("SELECT count(*) FROM inodes"),
            "layers": {
                "total": len(layers.by_id),
                "live": sum(not layer.sealed for layer in layers.by_id.values()),
                "sealed": sum(layer.sealed and not layer.is_alias for layer in layers.by_id.values()),
                "aliases": sum(layer.is_alias for layer in layers.by_id.values()),
                "undigested": sum(layer.sealed and not layer.digested for layer in layers.by_id.values()),
            },
            "pulls": [{"path": self._path_of(pull.directory), **pull.status()} for pull in self.pulls.running],
            "store_bytes": {
                "total": space.f_frsize * space.f_blocks,
                "free": space.f_frsize * space.f_bavail,
                "layers": self._layer_bytes(),
            },
            "memory_bytes": _largest_resident(),
            "requests": asdict(self.counters),
            "slowest_requests": self.slowest.told(),
            "connection": self.connection(),
            "native": {
                "files": sum(native for _, native in opened),
                "live": len(self.store.images.direct),
                "refused": self.native.refused,
                "live_refused": self.native.live_refused,
            },
            "open_files": [
                {
                    "path": self._name(inode.ino),
                    "pids": sorted({opener.pid for opener in inode.opens.values()}),
                    "bytes": inode.size,
                    "native": native,
                    "live": native and not inode.frozen,
                }
                for inode, native in opened
            ],
        }

    def _path_of(self, directory: InodeNumber) -> str | None:
        try:
            return os.fsdecode(self.namespace.path_of(directory))
        except FileError:  # it was removed, and something of it lives on in clones
            return None

    def _name(self, ino: int) -> str:
        row = self.store.catalog.row("SELECT parent, name FROM names WHERE ino = ?", ino)
        if row is None:
            return "(unlinked)"
        directory = self.namespace.path_of(row["parent"])
        return os.fsdecode(directory + b"/" + row["name"] if directory else row["name"])

    def _layer_bytes(self) -> int:
        total = 0
        with os.scandir(self.store.layers.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # background work renames and removes files
                    total += entry.stat().st_blocks * 512
        return total

    def status_text(self) -> bytes:
        """``status.json`` as text."""
        return json.dumps(self.status(), indent=2).encode() + b"\n"

    def metrics_text(self) -> bytes:
        """``metrics`` in Prometheus' text format."""
        status = self.status()
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, *values: tuple[str, int | float]) -> None:
            lines.append(f"# HELP ramfs_{name} {text}")
            lines.append(f"# TYPE ramfs_{name} {kind}")
            lines.extend(f"ramfs_{name}{labels} {value}" for labels, value in values)

        metric("info", "gauge", "The serving daemon.", (f'{{version="{status["version"]}"}}', 1))
        metric("uptime_seconds", "gauge", "Seconds since the serving daemon began.", ("", status["uptime_seconds"]))
        metric("images", "gauge", "Images of the store.", *(
            (f'{{state="{state}"}}', status["images"][state]) for state in ("total", "frozen", "in_use")
        ))  # fmt: skip
        metric("snapshots", "gauge", "Snapshots of the store.", ("", status["snapshots"]))
        metric("inodes", "gauge", "Inodes of the store.", ("", status["inodes"]))
        metric("layers", "gauge", "Layers of the store.", *(
            (f'{{state="{state}"}}', status["layers"][state]) for state in ("live", "sealed", "aliases", "undigested")
        ))  # fmt: skip
        metric("store_bytes", "gauge", "Space of the file system under the store.", *(
            (f'{{kind="{kind}"}}', status["store_bytes"][kind]) for kind in ("total", "free", "layers")
        ))  # fmt: skip
        metric("memory_bytes", "gauge", "Largest resident size of the daemon.", ("", status["memory_bytes"]))
        pulls = status["pulls"]
        metric("pulls", "gauge", "Pulls that lack something.", *(
            (f'{{state="{state}"}}', sum(pull["state"] == state for pull in pulls))
            for state in ("arriving", "waiting", "paused")
        ))  # fmt: skip
        for name, kind in _PULL_METRICS.items() if pulls else ():
            text = f"{name.replace('_', ' ').capitalize()} of the pulls under way."
            metric(f"pull_{name}", kind, text, *((f'{{pull="{pull["id"]}"}}', pull[name]) for pull in pulls))
        metric("native_files", "gauge", "Open files that the kernel serves by itself.", ("", status["native"]["files"]))
        metric(
            "native_live_files", "gauge", "Live files that are the file of their layer.", ("", status["native"]["live"])
        )
        for name, value in status["requests"].items():
            text = f"{name.replace('_', ' ').capitalize()} since the serving daemon began."
            metric(f"{name}_total", "counter", text, ("", value))
        return "\n".join(lines).encode() + b"\n"

    def page_looker(self, image: Image) -> Callable[[], States]:
        """What tells which pages of an image it owns, shares, has zero, or lacks, in any thread.

        It reads the tables of all images that may share pages with it, from their files. Which blocks a direct image
        shares the file system of the store tells.
        """
        image.refresh()
        if (path := image.direct) is not None:
            whole = image.pages

            def look_at_blocks() -> States:
                found = np.zeros(whole, np.uint8)
                stored, shared = stored_and_shared(path)
                for first, stop in stored:
                    found[first:stop] = PageState.OWNED
                for first, stop in shared:
                    found[first:stop][found[first:stop] == PageState.OWNED] = PageState.SHARED
                return [(0, found)]

            return look_at_blocks
        layers, images = self.store.layers, self.store.images
        bases = {layers[number].base for number in image.layers if number in layers.by_id}
        names = [layer for layer in layers.by_id.values() if layer.base in bases]
        moved = {layer.base for layer in names if layer.is_alias}
        places = {layer.id: (layer.base, layer.shift) for layer in names if layer.base in moved}
        others = [images.path(number) for number in images.naming([layer.id for layer in names]) if number != image.id]
        own, total = image.path, image.pages
        lacking: dict[LayerId, tuple[Mask, Mask]] = {}
        for layer in names:
            if layer.presence is not None:
                states = layer.presence.at(layer.shift, layer.shift + total)
                lacking[layer.id] = states == ABSENT, states == ZEROS

        def look() -> States:
            table = read_table(own)
            if table is None:
                raise StoreDamaged(f"table {own} is missing; run `ramfs fsck` on the store")
            relatives = map(read_table, others)  # one that has gone since shares nothing
            return page_states(table, total, (other for other in relatives if other is not None), places, lacking)

        return look


def _largest_resident() -> int:
    """Bytes. (getrusage would not do: across exec it remembers the process that started this one.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
