"""The states of a connection, and the handshake as a table: what is asked, and where the answer leads.

    GREETING ──TLS wanted──> STARTTLS ──yes──> TLS (the adapter shakes hands) ──┐
        └──────────────────────────────────────────────────────────────────────┴─> the first state of the goal

    to open an export                              to look at one        to list them
    EXTENDED_HEADERS ─no─> STRUCTURED_REPLY
         └──yes──┐            │      │no
                 └> META <yes─┘      │
                      └─yes or no─> GO ──> OPEN    INFO ──> IDLE         LIST ──> IDLE

A no that has no place to go ends the connection with SourceRefused, one that says that the server shuts down with
SourceLost, and anything out of turn with SourceBroken.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from ramfs.source.nbd.codec import Option, Reply


class State(enum.Enum):
    """Where a connection stands."""

    GREETING = enum.auto()
    STARTTLS = enum.auto()
    TLS = enum.auto()
    """The adapter wraps the socket and says so; there is nothing to receive."""
    EXTENDED_HEADERS = enum.auto()
    STRUCTURED_REPLY = enum.auto()
    META = enum.auto()
    GO = enum.auto()
    INFO = enum.auto()
    LIST = enum.auto()
    IDLE = enum.auto()
    """The goal is reached and no export is open; there is nothing to receive."""
    OPEN = enum.auto()
    """Transmission: requests and their replies."""
    CLOSED = enum.auto()


class Goal(enum.Enum):
    """What a connection is for; its value is the first state behind greeting and TLS."""

    OPEN = State.EXTENDED_HEADERS
    LOOK = State.INFO
    LIST = State.LIST


class Step(NamedTuple):
    """A state of the handshake in which an option was sent and its answer is awaited."""

    option: Option
    gathers: Reply | None
    """The replies that may come before the last one."""
    most: int
    """How many of these, at most."""
    yes: State
    no: State | None = None
    """Where a refusal leads; None if it ends the connection."""


#: Exports in a list that are believed; a directory with more is pulled file by file.
MAX_EXPORTS: Final = 1 << 16
# A server tells five things of an export, and may come to know some more.
_FEW: Final = 32

STEPS: Final[Mapping[State, Step]] = MappingProxyType(
    {
        State.STARTTLS: Step(Option.STARTTLS, None, 0, State.TLS),
        State.EXTENDED_HEADERS: Step(Option.EXTENDED_HEADERS, None, 0, State.META, State.STRUCTURED_REPLY),
        State.STRUCTURED_REPLY: Step(Option.STRUCTURED_REPLY, None, 0, State.META, State.GO),
        State.META: Step(Option.SET_META_CONTEXT, Reply.META_CONTEXT, _FEW, State.GO, State.GO),
        State.GO: Step(Option.GO, Reply.INFO, _FEW, State.OPEN),
        State.INFO: Step(Option.INFO, Reply.INFO, _FEW, State.IDLE),
        State.LIST: Step(Option.LIST, Reply.SERVER, MAX_EXPORTS, State.IDLE),
    }
)
