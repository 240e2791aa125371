"""``ramfs mount``."""

import logging
import logging.handlers
import os
import stat
import subprocess
import sys
from typing import Final

import click

from ramfs.cli._mounts import FSTYPE, mounted_at
from ramfs.errors import MountError, UsageError

#: Options that the kernel or libfuse know, passed on as they are.
_PASSED: Final = frozenset(
    ("allow_other", "allow_root", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime",
     "nodiratime", "relatime", "norelatime", "strictatime", "sync", "async", "dirsync", "default_permissions")
)  # fmt: skip
#: Words of fstab that are for others.
_IGNORED: Final = frozenset(
    ("defaults", "auto", "noauto", "user", "users", "nouser", "nofail", "fail", "_netdev", "owner", "group")
)
_OURS: Final = frozenset(("template_rdwr", "debug"))


def split_options(words: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """The options for libfuse, and ours, from the values of ``-o``. Raises UsageError for unknown ones."""
    passed: list[str] = []
    ours: set[str] = set()
    for option in (option for word in words for option in word.split(",")):
        if option in _OURS:
            ours.add(option)
        elif option in _PASSED:
            passed.append(option)
        elif option and option not in _IGNORED and not option.startswith(("x-", "X-", "comment=")):
            raise UsageError(
                f"unknown mount option {option!r}: known are {', '.join(sorted(_OURS | _PASSED))}"
            )
    return passed, ours


def check_places(store: str, mountpoint: str) -> None:
    """Refuse what cannot work: no directory, a store under its own mount. A dead mount is cleared away."""
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):
            raise MountError(f"mountpoint {mountpoint} is not a directory: give an existing directory")
    except FileNotFoundError:
        raise MountError(f"mountpoint {mountpoint} does not exist: make the directory first") from None
    except OSError as exc:
        entry = mounted_at(mountpoint)
        if entry is None or entry.fstype != FSTYPE:
            raise MountError(f"mountpoint {mountpoint} cannot be used: {exc.strerror}") from exc
        click.echo(f"ramfs: {mountpoint} was left behind by a daemon that died: unmounting it", err=True)
        unmount(mountpoint, lazy=True)
        check_places(store, mountpoint)
        return
    entry = mounted_at(mountpoint)
    if entry is not None and entry.fstype == FSTYPE:
        raise MountError(f"{mountpoint} is mounted already, with store {entry.source}: unmount it or choose another place")
    inner, outer = os.path.realpath(store), os.path.realpath(mountpoint)
    if os.path.commonpath((inner, outer)) in (inner, outer):
        raise MountError(f"store {store} and mountpoint {mountpoint} lie within each other: choose separate places")


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take a mount down, as root by umount(8), else by fusermount3. Raises MountError with its words."""
    if os.geteuid() == 0:
        command = ["umount", "-i", *(["-l"] if lazy else []), "--", mountpoint]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MountError(f"{command[0]} is not installed: install Debian's package fuse3 or mount") from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"{command[0]} exited with {done.returncode}"
        raise MountError(f"{words}; stop what uses the mount (fuser -vm {mountpoint} names it)")


@click.command("mount")
@click.argument("store", type=click.Path())
@click.argument("mountpoint", type=click.Path())
@click.option("-o", "--options", multiple=True, metavar="OPTIONS", help="Mount options, separated by commas.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to standard error.")
@click.option("--ready-fd", type=int, hidden=True)
def mount(store: str, mountpoint: str, options: tuple[str, ...], foreground: bool, ready_fd: int | None) -> int:
    """Serve STORE at MOUNTPOINT; returns when the mount is ready.

    STORE is a directory on any local file system, made if it is new; on tmpfs it has the speed of RAM.

    \b
    Options besides those of mount(8):
      allow_other     let other users in, as modes and owners allow
      template_rdwr   let frozen files be opened for writing, which QEMU before
                      8.2 needs for share=off; no write is accepted even then
      debug           log more
    """
    passed, ours = split_options(options)
    store, mountpoint = os.path.abspath(store), os.path.abspath(mountpoint)
    if ready_fd is None:
        check_places(store, mountpoint)
    if not foreground:
        return _in_background(store, mountpoint, options)
    _log_to(store, background=ready_fd is not None, debug="debug" in ours)

    from ramfs.daemon import Daemon, MountRequest

    def ready() -> None:
        if ready_fd is not None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)

    # The store's path is what mount(8) and findmnt show as the source; libfuse takes ASCII without commas.
    source = store if store.isascii() and not set(store) & set(",\\") else "ramfs"
    request = MountRequest(
        store, mountpoint, (*passed, "subtype=ramfs", f"fsname={source}"), template_rdwr="template_rdwr" in ours
    )
    Daemon(request, ready).run()
    return 0


def _in_background(store: str, mountpoint: str, options: tuple[str, ...]) -> int:
    """Start the daemon in a session of its own; wait until it serves or fails. Its errors are its own words."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "ramfs", "mount", "-f", "--ready-fd", str(writer)]
    for option in options:
        command += ["-o", option]
    child = subprocess.Popen(
        [*command, "--", store, mountpoint], stdin=subprocess.DEVNULL, pass_fds=(writer,), start_new_session=True, cwd="/"
    )
    os.close(writer)
    with open(reader, "rb") as pipe:
        if pipe.read() == b"ready\n":
            child.returncode = 0  # it lives on; nobody waits for it
            return 0
    return child.wait()


def _log_to(store: str, *, background: bool, debug: bool) -> None:
    """Log to the journal, to standard error, or where there is neither to the store."""
    form = logging.Formatter("ramfs: %(levelname)s: %(message)s")
    handlers: list[logging.Handler] = []
    if os.environ.get("JOURNAL_STREAM"):
        form = _JournalFormatter("%(message)s")
    if background and os.path.exists("/dev/log"):
        syslog = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        syslog.ident = f"ramfs[{os.getpid()}]: "
        syslog.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(syslog)
    elif background and os.path.isdir(store):
        file = logging.handlers.RotatingFileHandler(
            os.path.join(store, "daemon.log"), maxBytes=1 << 20, backupCount=1, delay=True
        )
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        handlers.append(file)
    console = logging.StreamHandler()
    console.setFormatter(form)
    if background:
        console.setLevel(logging.WARNING)  # until the mount is ready somebody reads standard error
    handlers.append(console)
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=handlers)
    logging.getLogger("pyfuse3").setLevel(logging.INFO)


class _JournalFormatter(logging.Formatter):
    """Puts the priority before each line, as sd-daemon(3) has it."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())
