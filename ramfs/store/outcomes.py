"""What requests of the kernel came to that must not be carried out twice.

The kernel asks again what a daemon has not answered before it died. A mkdir that was carried out would then fail
because of itself. So whoever changes names records the outcome in the same transaction: the request's number, and
the inode that the answer speaks of. The records of requests that were answered go with later ones.

Numbers are those of one connection (FUSE's ``unique``), so the records of another mount mean nothing.
"""

from contextvars import ContextVar
from typing import Final

from ramfs.store.catalog import Catalog
from ramfs.units import InodeNumber

#: The number of the request that is being carried out in this task; 0 if it is none whose outcome is kept.
REQUEST: Final[ContextVar[int]] = ContextVar("request", default=0)
#: Records of answered requests that may stand before they are removed, which costs less for many at a time.
_ANSWERED: Final = 64


class Outcomes:
    """The records of a store."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._before: dict[int, InodeNumber] = {}
        self._concluded: set[int] = set()
        self._answered: list[int] = []

    def take_over(self) -> None:
        """Remember what a daemon of the same connection has recorded."""
        rows = self._catalog.execute("SELECT request, ino FROM outcomes").fetchall()
        self._before = {row["request"]: InodeNumber(row["ino"]) for row in rows}

    def forget_all(self) -> None:
        """A new connection begins."""
        with self._catalog.transaction():
            self._catalog.execute("DELETE FROM outcomes")

    def conclude(self, ino: int = 0) -> None:
        """The transaction under way does what the request asks for; ``ino`` is what the answer speaks of."""
        request = REQUEST.get()
        if not request:
            return
        if len(self._answered) >= _ANSWERED:
            self._catalog.executemany("DELETE FROM outcomes WHERE request = ?", [(n,) for n in self._answered])
            answered, self._answered = self._answered, []
            self._catalog.on_rollback(lambda: self._answered.extend(answered))
        self._catalog.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?)", request, ino)
        self._concluded.add(request)

    @property
    def made_before(self) -> set[InodeNumber]:
        """The inodes that answers of the daemon before would have spoken of."""
        return set(self._before.values())

    def of_before(self) -> InodeNumber | None:
        """What the request under way came to when the daemon before this one carried it out; None if it did not."""
        return self._before.get(REQUEST.get())

    def answered(self, request: int) -> None:
        """The request is answered before anything else happens: its record may go."""
        if request in self._concluded:
            self._concluded.discard(request)
            self._answered.append(request)

    def forget_before(self) -> None:
        """All that the kernel had to ask again is answered."""
        self._answered.extend(self._before)
        self._before.clear()
