"""Asking the supervisor of a mount: by the socket that it has in the store, so also while no daemon serves."""

import contextlib
import json
import os
import socket
from typing import Any, Final

from ramfs.errors import MountError
from ramfs.supervisor.process import SOCKET

#: Seconds that an answer may take: a new daemon imports everything first, and the machine may be busy.
PATIENCE: Final = 120.0


def ask(store: str, do: str, *, patience: float = PATIENCE, **more: Any) -> dict[str, Any]:
    """Ask the supervisor of the mount of ``store``: ``status``, ``upgrade`` (``python``, ``script``) or ``abort``.

    Returns its facts. Raises MountError when there is none, when it refuses or when it fails.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience)
        try:
            directory = os.open(store, os.O_PATH | os.O_DIRECTORY)
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, directory)
                sock.connect(f"/proc/self/fd/{directory}/{SOCKET}")
            sock.sendall(json.dumps({"do": do, **more}).encode() + b"\n")
            answer = sock.makefile("rb").readline()
        except TimeoutError:
            raise MountError(f"the supervisor of {store} has not answered within {patience:.0f} s") from None
        except OSError as exc:
            raise MountError(
                f"there is no supervisor of {store} to talk to ({exc.strerror}): is it mounted, and are you its owner?"
            ) from exc
    if not answer:
        raise MountError(f"the supervisor of {store} hung up: ask as the owner of the mount, or as root")
    facts: dict[str, Any] = json.loads(answer)
    if "failed" in facts:
        raise MountError(str(facts["failed"]))
    done: dict[str, Any] = facts["done"]
    return done
