"""``ramfs mount``."""

import errno
import json
import logging
import logging.handlers
import os
import socket
import stat
import subprocess
import sys
import time
from typing import Final

import click

from ramfs import __version__
from ramfs.cli._mounts import FSTYPE, ask, mounted_at, place_of, running, users
from ramfs.errors import MountError, UsageError
from ramfs.supervisor import process
from ramfs.supervisor.unmounting import unmount_command

#: Options that the kernel or libfuse know, passed on as they are.
PASSED: Final = frozenset(
    ("allow_other", "allow_root", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime",
     "sync", "async", "dirsync", "default_permissions")
)  # fmt: skip
#: Words of fstab that are for others, and kinds of access times, of which none is kept.
IGNORED: Final = frozenset(
    ("defaults", "auto", "noauto", "user", "users", "nouser", "nofail", "fail", "_netdev", "owner", "group",
     "nodiratime", "diratime", "relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime")
)  # fmt: skip
NATIVE: Final = frozenset(("native=auto", "native=frozen", "native=off"))
OURS: Final = NATIVE | {"template_rdwr", "noprefetch", "debug"}

#: Where a daemon in the background logs to, when something listens there.
SYSLOG: Final = "/dev/log"
#: Seconds in which a mount may be busy without a visible user: one who is just leaving, such as a daemon's helper.
_LEAVING: Final = 2.0


def split_options(words: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """The options for libfuse, and ours, from the values of ``-o``. Raises UsageError for unknown ones."""
    passed: list[str] = []
    ours: set[str] = set()
    for option in (option for word in words for option in word.split(",")):
        if option in OURS:
            ours -= NATIVE if option in NATIVE else set()  # the last one counts
            ours.add(option)
        elif option in PASSED:
            passed.append(option)
        elif option and option not in IGNORED and not option.startswith(("x-", "X-", "comment=")):
            raise UsageError(f"unknown mount option {option!r}: known are {', '.join(sorted(OURS | PASSED))}")
    return passed, ours


def check_places(store: str, mountpoint: str) -> None:
    """Refuse what cannot work: no directory, a store under its own mount. A dead mount is cleared away."""
    entry = mounted_at(mountpoint)
    if entry is not None and entry.fstype == FSTYPE:
        if _lives(entry.mountpoint):
            raise MountError(
                f"{mountpoint} is mounted already, with store {entry.source}: unmount it or choose another place"
            )
        click.echo(f"ramfs: {mountpoint} was left behind by a daemon that died: unmounting it", err=True)
        unmount(entry.mountpoint, lazy=True)
        check_places(store, mountpoint)  # another may lie below
        return
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError:
        raise MountError(f"mountpoint {mountpoint} does not exist: make the directory first") from None
    except OSError as exc:
        raise MountError(f"mountpoint {mountpoint} cannot be used: {exc.strerror}") from exc
    if not stat.S_ISDIR(mode):
        raise MountError(f"mountpoint {mountpoint} is not a directory: give an existing directory")
    inner, outer = os.path.realpath(store), os.path.realpath(mountpoint)
    common = os.path.commonpath((inner, outer))
    if common == outer:
        raise MountError(f"store {store} lies below mountpoint {mountpoint}, which would hide it: choose another place")
    if common == inner:
        raise MountError(
            f"mountpoint {mountpoint} lies in store {store}, which is for ramfs alone: choose another place"
        )
    if not os.path.exists("/dev/fuse"):
        raise MountError(
            "there is no /dev/fuse: load the kernel's module (modprobe fuse), or let the container have it"
        )


def check_kept(store: str, mountpoint: str, lock: int) -> None:
    """Refuse to go on with another mount than that which the service manager has kept. Raises UsageError."""
    kept = os.path.dirname(os.readlink(f"/proc/self/fd/{lock}"))
    try:
        same = os.path.samestat(os.fstat(lock), os.stat(os.path.join(store, "lock")))
    except OSError:
        same = False
    places = {entry.mountpoint for entry in running() if entry.source == kept}  # none if it was detached
    if not same or (places and place_of(mountpoint) not in places):
        raise UsageError(
            f"the mount of {kept} at {', '.join(sorted(places))} waits for its supervisor, and this is {store} at "
            f"{mountpoint}: name the same ones again, or stop the service, which ends the guests"
        )


def _lives(mountpoint: str) -> bool:
    """Does a daemon answer for the mount? Raises MountError when that cannot be told in time."""
    try:
        ask(mountpoint, lambda: os.statvfs(mountpoint))  # unlike attributes, never from the kernel's memory
    except OSError as exc:
        return exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take a mount down, as root by umount(8), else by fusermount3. Raises MountError with its words."""
    command = unmount_command(mountpoint, lazy=lazy)
    deadline = time.monotonic() + _LEAVING
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
        except FileNotFoundError:
            raise MountError(f"{command[0]} is not installed: install Debian's package fuse3 or mount") from None
        if done.returncode == 0:
            return
        words = " ".join(done.stderr.split()).rstrip(".") or f"{command[0]} exited with {done.returncode}"
        if "busy" not in words:
            raise MountError(words)
        found = users(mountpoint)
        if found or time.monotonic() > deadline:
            who = f"used by {', '.join(found)}" if found else "but /proc does not show by whom"
            raise MountError(f"{mountpoint} is busy, {who}: end that first, or detach it with --lazy")
        time.sleep(0.1)


@click.command("mount")
@click.argument("store")
@click.argument("mountpoint")
@click.option("-o", "--options", multiple=True, metavar="OPTIONS", help="Mount options, separated by commas.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to standard error.")
@click.option("--link", type=int, hidden=True)
@click.option("--quiet", is_flag=True, hidden=True)
def mount(
    store: str, mountpoint: str, options: tuple[str, ...], foreground: bool, link: int | None, quiet: bool
) -> int:
    """Serve STORE at MOUNTPOINT; returns when the mount is ready.

    STORE is a directory on any local file system, made if it is new; on tmpfs it has the speed of RAM.

    \b
    Options besides those of mount(8):
      allow_other     let other users in, as modes and owners allow
      native=auto|frozen|off
                      which files the kernel may serve from the store by
                      itself: frozen ones that are one layer, or none
      template_rdwr   let frozen files be opened for writing, which QEMU before
                      8.2 needs for share=off; no write is accepted even then
      noprefetch      neither record what guests ask for first when they go on
                      from a snapshot, nor read that ahead for the next ones
      debug           log more
    """  # noqa: D301 - click takes the backspace for "do not wrap"
    passed, ours = split_options(options)
    for name, value in (("STORE", store), ("MOUNTPOINT", mountpoint)):
        if not value:
            raise UsageError(f"{name} is empty: give the path of a directory")
    store = os.path.abspath(store)
    if link is None:
        mountpoint = os.path.abspath(mountpoint)
        kept = process.passed_on() if foreground else {}
        if process.alive(kept):  # a mount whose supervisor died is taken over
            check_kept(store, mountpoint, kept["lock"])
        else:
            check_places(store, mountpoint)
        return _supervise(store, place_of(mountpoint), options, foreground=foreground)
    _log_to(store, background=quiet, debug="debug" in ours)

    from ramfs import ledger
    from ramfs.daemon import Daemon, MountRequest
    from ramfs.supervisor.link import Link

    def ready() -> None:
        if quiet:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.close(null)

    request = MountRequest(
        store,
        mountpoint,
        (*passed, "subtype=ramfs", f"fsname={_escape(store)}"),
        template_rdwr="template_rdwr" in ours,
        working_sets="noprefetch" not in ours,
        native=next((word.partition("=")[2] for word in ours if word.startswith("native=")), "auto"),
    )
    to_supervisor = Link(link)
    go = to_supervisor.stand_by(__version__, ledger.VERSION)
    if go is not None:
        Daemon(request, ready, to_supervisor, go).run()
    # Everything is closed. To take an interpreter with numpy and trio apart takes longer than all of unmounting.
    logging.shutdown()
    os._exit(0)


def _escape(source: str) -> str:
    """What mount(8) and findmnt show as the source, as libfuse takes it in an option: octal for all that is special."""
    return "".join(
        chr(byte) if 0x20 < byte < 0x7F and byte not in b",\\" else f"\\{byte:03o}" for byte in os.fsencode(source)
    )


def _supervise(store: str, mountpoint: str, options: tuple[str, ...], *, foreground: bool) -> int:
    """Become the supervisor of the mount, or start it in a session of its own and wait until the mount is ready.

    Errors are the daemon's own words.
    """
    command = [sys.executable, "-P", "-m", "ramfs", "mount", "--link", process.LINK]
    for option in options:
        command += ["-o", option]
    settings = {
        "command": [*command, *([] if foreground else ["--quiet"]), "--", store, mountpoint],
        "store": store,
        "mountpoint": mountpoint,
        "unmount": unmount_command(mountpoint, lazy=True),
        "ready": -1,
        "log": "" if foreground else os.path.join(store, "daemon.log"),
        "syslog": SYSLOG,
    }
    supervisor = [sys.executable, "-I", "-S", process.SCRIPT]
    if foreground:
        sys.stdout.flush()
        os.execv(supervisor[0], [*supervisor, json.dumps(settings)])
    reader, writer = os.pipe()
    settings["ready"] = writer
    child = subprocess.Popen(
        [*supervisor, json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        pass_fds=(writer,),
        start_new_session=True,
        cwd="/",
    )
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            if pipe.read() == b"ready\n":
                child.returncode = 0  # it lives on; nobody waits for it
                return 0
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    return code or MountError.exit_code


def _log_to(store: str, *, background: bool, debug: bool) -> None:
    """Log to the journal, to standard error, or from the background to syslog or else into the store."""
    handlers: list[logging.Handler] = []
    if background:
        handlers.append(_syslog() or _file_log(store))
    console = logging.StreamHandler()
    journal = os.environ.get("JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
    console.setFormatter(
        _JournalFormatter("%(message)s") if journal else logging.Formatter("ramfs: %(levelname)s: %(message)s")
    )
    if background:
        console.setLevel(logging.WARNING)  # until the mount is ready somebody reads standard error
    handlers.append(console)
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=handlers)


def _syslog() -> logging.Handler | None:
    """A handler for what listens at /dev/log, None where nothing does."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.connect(SYSLOG)  # the handler says nothing when it cannot, and loses what it gets
        handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    except OSError:
        return None
    handler.ident = f"ramfs[{os.getpid()}]: "
    handler.setFormatter(_TextFormatter("%(message)s"))
    return handler


def _file_log(store: str) -> logging.Handler:
    """STORE/daemon.log, made with the first line, when there is a store."""
    handler = logging.handlers.RotatingFileHandler(
        os.path.join(store, "daemon.log"), maxBytes=1 << 20, backupCount=1, delay=True, errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    return handler


class _TextFormatter(logging.Formatter):
    """Escapes the bytes of file names that are no text: syslog takes UTF-8 only."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode(errors="backslashreplace").decode()


class _JournalFormatter(logging.Formatter):
    """Puts the priority before each line, as sd-daemon(3) has it."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())
