"""The process that keeps a mount alive: it holds what must outlive a daemon, starts daemons, and does nothing else.

Run as a script, by an interpreter without site-packages, so it imports nothing but the standard library and stays
small. Its argument is a JSON object, see Settings. What it holds are descriptors that a daemon gave it: the
connection to the kernel, the ledger, the lock of the store. As long as somebody has the first, faults in the mount's
memory wait instead of failing. So when a daemon dies another one gets all three and goes on.

Between it and a daemon goes a socket for packets, each a JSON object, some with descriptors:

    daemon says   {"warm": VERSION, "ledger": FORMAT}   everything is imported; told by one that stands by
                  {"keep": NAME}         with a descriptor
                  {"ready": VERSION}     it serves
                  {"done": true}         it has unmounted, and closes the store now
    it is told    {"go": FACTS}          with the descriptors named in FACTS["kept"]: serve
                  {"yield": true}        end at once, leave all as it is: another one is ready
                  {"stop": true}         flush, unmount, close the store

Commands come over STORE/supervisor: one line of JSON each, answered by lines of JSON (client.py).
"""

import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

#: What to run.
SCRIPT: Final = __file__
#: Exit status of a daemon that yielded.
YIELDED: Final = 75
#: After the CRASHES-th death within WINDOW seconds no further daemon is started. One that died before it was
#: ready has served nobody meanwhile, so then the window does not move on, however slowly daemons start.
CRASHES, WINDOW = 8, 10.0
#: Deaths within WINDOW after which the next daemon still starts at once; then it waits, longer each time.
PATIENT, FIRST_WAIT = 3, 0.1
#: Seconds that a daemon serves before another is started to stand by: the first of a mount, which may be a short one;
#: later ones. And between attempts when that fails.
STANDBY_AFTER, STANDBY_SOON, STANDBY_AGAIN = 3.0, 0.2, 60.0
#: Seconds that a new daemon may take to import everything, and a yielding one to end.
WARM_TIMEOUT, YIELD_TIMEOUT = 60.0, 3.0
#: Seconds that a killed daemon may take to be gone.
ABORT_TIMEOUT: Final = 5
#: The niceness of whoever guests wait for: this process, and a daemon until it has caught up.
URGENT: Final = -20
#: A notification to the kernel: a fuse_out_header with FUSE_NOTIFY_RESEND.
RESEND: Final = struct.pack("=IiQ", 16, 7, 0)
#: Exit status after an abort: nobody should start another by himself. (That of ramfs.errors.MountError.)
ABORTED: Final = 8
#: The name of the command socket in the store.
SOCKET: Final = "supervisor"
#: Those that are listened for.
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Stands in a daemon's command for the descriptor of its end of the socket.
LINK: Final = "{link}"
#: In what order descriptors are told and sent.
KEPT: Final = ("fuse", "ledger", "lock")
MAX_MESSAGE: Final = 1 << 16


class Settings(NamedTuple):
    """What a mount is kept alive with.

    command      how a daemon is started, with LINK for the number of its end of the socket
    store        the directory of the store
    mountpoint   for messages
    unmount      how to unmount when no daemon is there to do so
    ready        a descriptor to tell that the mount is ready, or -1
    log          a file for what there is to say when there is no terminal, or ""
    syslog       a socket that gets it instead when somebody listens there
    """

    command: list[str]
    store: str
    mountpoint: str
    unmount: list[str]
    ready: int
    log: str
    syslog: str = ""


class Child:
    """A daemon: standing by, serving, or on its way out."""

    def __init__(self, command: list[str], words: int | None = None) -> None:
        """Start it; ``words`` is a file for what it writes to standard error."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            hidden = ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
            environment = {name: value for name, value in os.environ.items() if name not in hidden}
            argv = [str(theirs.fileno()) if word == LINK else word for word in command]
            error = [] if words is None else [(os.POSIX_SPAWN_DUP2, words, 2)]
            self.pid = os.posix_spawn(argv[0], argv, environment, setsid=True, file_actions=error)
        self.socket = ours
        self.socket.setblocking(False)
        self.exit = os.pidfd_open(self.pid)
        self.command = command
        self.words = words
        self.version = ""
        self.ledger = 0
        """the format of its ledger"""
        self.warm = self.ready = self.done = False

    @classmethod
    def known(cls, pid: int, fd: int, command: list[str], version: str, ledger: int) -> "Child":
        """The serving daemon of the supervisor that this process was before."""
        child = cls.__new__(cls)
        child.pid, child.socket, child.exit = pid, socket.socket(fileno=fd), os.pidfd_open(pid)
        child.socket.set_inheritable(False)
        child.command, child.words, child.version, child.ledger = command, None, version, ledger
        child.warm = child.ready = True
        child.done = False
        return child

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message, with descriptors."""
        with suppress(OSError):  # it is dying, which is told by its exit
            socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def kill(self) -> None:
        """SIGKILL."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.exit, signal.SIGKILL)

    def reap(self) -> int:
        """Its exit status, as waitpid(2) has it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.exit)
        self.socket.close()
        return os.waitstatus_to_exitcode(status)

    def last_words(self) -> str:
        """The last line that it wrote to its file, which is closed."""
        if self.words is None:
            return "its log tells why"
        text = os.pread(self.words, MAX_MESSAGE, max(0, os.fstat(self.words).st_size - MAX_MESSAGE))
        self.close_words()
        return (text.decode(errors="backslashreplace").strip() or "without a word").splitlines()[-1]

    def close_words(self) -> None:
        """What it writes to standard error now is not for us."""
        if self.words is not None:
            os.close(self.words)
            self.words = None


class Supervisor:
    """One mount, and the daemons that serve it one after the other."""

    def __init__(self, settings: Settings, before: dict[str, Any] | None = None) -> None:
        """``before`` is what :meth:`renew` left."""
        self.settings = settings
        self.before = before
        self.renewal: list[str] | None = None  # the program to become after an upgrade
        self.command = settings.command
        self.ready = settings.ready
        self.poll = select.poll()
        self.handlers: dict[int, Callable[[int], object]] = {}
        self.kept: dict[str, int] = {}
        self.serving: Child | None = None
        self.standby: Child | None = None
        self.successor: Child | None = None  # while an upgrade waits for it
        self.crashes: list[float] = []
        self.deaths = self.starts = 0
        self.why = ""
        #: Of daemons, but for the moment in which one takes over. This process has URGENT, also after renew().
        self.niceness = (before or {}).get("niceness", os.getpriority(os.PRIO_PROCESS, 0))
        self.ledger = 0  # the format of the ledger that is kept
        self.fallback: list[str] | None = None  # the command before an upgrade, until that has served
        self.established = False  # a mount is there that clients may use
        self.yielded = False  # the last daemon did
        self.stopping = False
        self.halted = ""  # why no further daemon is started
        self.start_at: float | None = None
        self.standby_at: float | None = None
        self.deadline: float | None = None  # of a successor to be warm, or of the serving one to yield
        self.listener: socket.socket | None = None
        self.clients: dict[int, socket.socket] = {}
        self.waiting: list[socket.socket] = []  # those that wait for an upgrade
        self.status: int | None = None

    # -- life

    def run(self) -> int:
        """Keep the mount alive until it is taken down; returns the exit status."""
        if self.ready >= 0:
            os.set_inheritable(self.ready, False)
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        set_niceness(os.getpid(), URGENT)
        self.watch(reader, lambda _: self.signalled(os.read(reader, 64)))
        if self.before is not None:
            self.resume(self.before)
        else:
            self.adopt()
            if self.kept:
                self.established = True
                self.why = "the supervisor before this one is gone"
            self.start()
        while self.status is None:
            for fd, event, handler in [(fd, event, self.handlers[fd]) for fd, event in self.poll.poll(self.until())]:
                if self.handlers.get(fd) is handler:  # else it is closed, and perhaps opened for something else
                    handler(event)
            self.tick()
        self.close()
        return self.status

    def renew(self) -> None:
        """After an upgrade: become the supervisor of the installed version, with all that is held."""
        program, self.renewal = self.renewal, None
        child = self.serving
        if program is None or child is None:
            return
        waiting = [client.fileno() for client in self.waiting]
        state = {
            "kept": self.kept,
            "pid": child.pid,
            "socket": child.socket.fileno(),
            "version": child.version,
            "ledger": child.ledger,
            "waiting": waiting,
            "starts": self.starts,
            "deaths": self.deaths,
            "why": self.why,
            "niceness": self.niceness,
        }
        settings = self.settings._replace(command=self.command, ready=-1)
        held = [*self.kept.values(), child.socket.fileno(), *waiting]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes meanwhile waits
        for fd in held:
            os.set_inheritable(fd, True)
        try:
            os.execv(program[0], [*program, json.dumps(settings._asdict()), json.dumps(state)])
        except OSError as exc:
            self.say(f"the supervisor stays the one of before: {exc}")
        for fd in held:
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`renew` left."""
        self.kept = state["kept"]
        for fd in self.kept.values():
            os.set_inheritable(fd, False)
        self.starts, self.deaths, self.why = state["starts"], state["deaths"], state["why"]
        self.ledger, self.established = state["ledger"], True
        self.serving = Child.known(state["pid"], state["socket"], self.command, state["version"], self.ledger)
        self.attend(self.serving)
        self.listen()
        for fd in state["waiting"]:
            with socket.socket(fileno=fd) as client, suppress(OSError):
                client.sendall(self.served_by(self.serving))
        self.standby_at = time.monotonic() + STANDBY_AFTER

    def watch(self, fd: int, handler: Callable[[int], object], events: int = select.POLLIN) -> None:
        """Call ``handler`` with the events of a descriptor."""
        self.handlers[fd] = handler
        self.poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Call nobody any more."""
        if self.handlers.pop(fd, None):
            self.poll.unregister(fd)

    def until(self) -> int | None:
        """Milliseconds to the next thing that is due."""
        times = [due for due in (self.start_at, self.standby_at, self.deadline) if due is not None]
        return max(0, int((min(times) - time.monotonic()) * 1000) + 1) if times else None

    def tick(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        if self.start_at is not None and now >= self.start_at:
            self.start()
        if self.standby_at is not None and now >= self.standby_at:
            self.standby_at = None
            if self.serving is not None:
                set_niceness(self.serving.pid, self.niceness)
            if self.standby is None and self.successor is None and not self.stopping:
                try:
                    self.standby = self.spawn(self.command)
                except OSError as exc:
                    self.say(f"no daemon stands by: {self.command[0]} does not start: {exc.strerror}; will try again")
                    self.standby_at = now + STANDBY_AGAIN
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            if self.successor is not None and not self.successor.warm:
                self.successor.kill()
            elif self.serving is not None:
                self.serving.kill()  # it was told to yield

    def close(self) -> None:
        """Let go of everything."""
        for child in (self.standby, self.successor):
            if child is not None:
                child.kill()
                child.reap()
        for name in list(self.kept):
            self.drop(name)
        for client in list(self.clients):
            self.hang_up(client)
        if self.listener is not None:
            self.listener.close()
            with suppress(OSError):
                os.unlink(os.path.join(self.settings.store, SOCKET))

    # -- daemons

    def spawn(self, command: list[str], words: int | None = None) -> Child:
        """Start a daemon, which imports everything and then waits to be told more. Raises OSError."""
        child = Child(command, words)
        set_niceness(child.pid, self.niceness)
        self.attend(child)
        return child

    def attend(self, child: Child) -> None:
        """Listen to a daemon, and for its end."""
        self.watch(child.exit, lambda _: self.ended(child))
        self.watch(child.socket.fileno(), lambda _: self.heard(child))

    def start(self) -> None:
        """Let a daemon serve: the one that stands by, or a new one, which reads the message when it can."""
        self.start_at = self.deadline = None
        try:
            child = self.successor or self.standby or self.spawn(self.command)
        except OSError as exc:
            self.failed(f"{self.command[0]} does not start: {exc.strerror}")
            return
        if child is self.standby:
            self.standby = None
        self.successor = None
        self.starts += 1
        names = [name for name in KEPT if name in self.kept]
        facts = {
            "kept": names,
            "starts": self.starts,
            "crashes": self.deaths,
            "why": self.why,
            "yielded": self.yielded,
            "pid": os.getpid(),
            "managed": "NOTIFY_SOCKET" in os.environ,
        }
        self.serving = child
        set_niceness(child.pid, URGENT)  # guests wait for it
        child.tell({"go": facts}, [self.kept[name] for name in names])
        if "fuse" in self.kept:
            self.unwatch(self.kept["fuse"])
        if self.stopping:
            child.tell({"stop": True})

    def heard(self, child: Child) -> None:
        """A daemon says something."""
        try:
            data, fds, _, _ = socket.recv_fds(child.socket, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            data, fds = b"", []
        if not data:
            self.unwatch(child.socket.fileno())
            return
        message = json.loads(data)
        if "keep" in message:
            self.keep(message["keep"], fds[0])
        elif "warm" in message:
            child.warm, child.version, child.ledger = True, message["warm"], message["ledger"]
            if child is self.successor:
                self.hand_over(child)
        elif "ready" in message:
            self.became_ready(child, message["ready"])
        elif "done" in message:
            child.done = True
            self.drop("fuse")

    def became_ready(self, child: Child, version: str) -> None:
        """A daemon serves."""
        child.ready, child.version = True, version
        self.established, self.ledger, self.fallback = True, child.ledger, None
        child.close_words()
        if self.listener is None:
            try:
                self.listen()
            except OSError as exc:  # a full disk, say: the mount can do without
                self.say(f"{self.settings.store} cannot have a socket for commands ({exc.strerror}): no ramfs upgrade")
        if self.ready >= 0:
            with suppress(OSError):  # who asked may be gone
                os.write(self.ready, b"ready\n")
            os.close(self.ready)
            self.ready = -1
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.close(null)
        notify("READY=1\nSTATUS=Serving " + self.settings.mountpoint)
        self.standby_at = time.monotonic() + (STANDBY_SOON if self.starts > 1 else STANDBY_AFTER)
        self.renew()  # which answers
        self.answer_waiting(self.served_by(child))

    @staticmethod
    def served_by(child: Child) -> bytes:
        """The answer to those that wait for an upgrade."""
        return line({"done": {"pid": child.pid, "version": child.version}})

    def ended(self, child: Child) -> None:
        """A daemon is gone."""
        self.unwatch(child.exit)
        while child.socket.fileno() in self.handlers:
            self.heard(child)  # its last words
        code = child.reap()
        if child is self.standby:
            self.standby = None
            self.say(f"the daemon that stood by {how(code)}; will try again")
            self.standby_at = time.monotonic() + STANDBY_AGAIN
        elif child is self.successor:
            self.successor = None
            self.deadline = None
            self.renewal = None
            self.refuse(f"the new daemon {how(code)} ({child.last_words()}): {self.who_stays()}")
            self.standby_at = time.monotonic() + STANDBY_AFTER
        elif child is self.serving:
            self.serving = None
            self.deadline = None
            self.lost(child, code)

    def lost(self, child: Child, code: int) -> None:
        """The daemon that served is gone: the end of the mount, or another one's turn."""
        if child.done or code == 0 or not self.established:
            # An orderly end, or one that never served: its status tells.
            if code < 0 and not self.established:
                self.say(f"the daemon {how(code)} before the mount was ready")
            self.end(code if code >= 0 else 128 - code, unmount="fuse" in self.kept)
            self.refuse("the mount is gone")
        elif code == YIELDED and self.successor is not None:
            self.why = f"the daemon before this one (process {child.pid}, version {child.version or 'unknown'}) yielded"
            self.yielded = True
            self.start()
        elif self.stopping:
            self.end(0)
        else:
            self.crashed(child, code)

    def crashed(self, child: Child, code: int) -> None:
        """It died: start another."""
        self.deaths += 1
        self.yielded = False
        self.why = f"the daemon before this one (process {child.pid}) {how(code)}"
        # In its absence nobody else would see that the mount is unmounted.
        self.watch(self.kept["fuse"], self.unmounted, 0)
        if self.fallback is not None and not child.ready:
            self.command, self.fallback, self.renewal = self.fallback, None, None
            self.refuse(f"the new daemon {how(code)} ({child.last_words()}): one as before takes over again")
        self.failed(how(code), served=child.ready)

    def failed(self, cause: str, *, served: bool = False) -> None:
        """A daemon died or did not start: start another, unless that keeps happening."""
        now = time.monotonic()
        if served:
            self.crashes = [when for when in self.crashes if now - when < WINDOW]
        self.crashes.append(now)
        if len(self.crashes) >= CRASHES:
            where = self.settings.mountpoint
            text = (
                f"{len(self.crashes)} daemons died within {now - self.crashes[0]:.0f} s, the last {cause}: "
                "started no other. "
                f"Guests of {where} wait, the store is intact. Go on with `ramfs upgrade {where}`, "
                f"or give them up with `ramfs umount --abort {where}`"
            )
            self.halted = text
            self.let_go()
            self.say(text)
            notify("STATUS=" + text)
            self.refuse(text)
            return
        extra = len(self.crashes) - PATIENT
        if extra <= 0:
            self.start()
        else:
            self.start_at = now + FIRST_WAIT * 2 ** (extra - 1)

    def let_go(self) -> None:
        """Have the kernel ask again what no daemon answers: who waits for a request that was read cannot be killed."""
        if "RAMFS_NO_RESEND" not in os.environ:
            with suppress(OSError):  # a kernel before Linux 6.9
                os.write(self.kept["fuse"], RESEND)

    def unmounted(self, event: int) -> None:
        """The kernel says so of the connection, while no daemon serves it."""
        if event & (select.POLLERR | select.POLLHUP):
            self.status = 0

    # -- what is kept

    def keep(self, name: str, fd: int) -> None:
        """Hold a descriptor, here and at the service manager."""
        self.drop(name)
        self.kept[name] = fd
        notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)

    def drop(self, name: str) -> None:
        """Hold it no longer."""
        fd = self.kept.pop(name, None)
        if fd is not None:
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
            self.unwatch(fd)
            os.close(fd)

    def adopt(self) -> None:
        """Take what a service manager kept of a supervisor that died."""
        passed = passed_on()
        for fd in passed.values():
            os.set_inheritable(fd, False)
        if alive(passed):
            self.kept = passed
            return
        for name, fd in passed.items():  # of a mount that is gone
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
            os.close(fd)

    # -- signals and commands

    def signalled(self, numbers: bytes) -> None:
        """Signals came."""
        for number in numbers:
            if number != signal.SIGHUP:
                self.stop()

    def stop(self) -> None:
        """Take the mount down."""
        self.stopping = True
        notify("STOPPING=1")
        if self.serving is not None:
            self.serving.tell({"stop": True})
        elif self.halted:
            self.end(0)
        else:
            self.start()  # it waits for nothing: what guests have stored is to be flushed

    def end(self, status: int, *, unmount: bool = True) -> None:
        """End the mount where there is no daemon that could."""
        self.status = status
        self.drop("fuse")  # what waits for an answer fails now, the unmounting among it
        if not unmount:
            return
        argv = self.settings.unmount
        pid = os.posix_spawnp(argv[0], argv, os.environ, setsid=True)
        os.waitpid(pid, 0)

    def listen(self) -> None:
        """Take commands."""
        path = os.path.join(self.settings.store, SOCKET)
        directory = os.open(self.settings.store, os.O_PATH | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)
            # By way of /proc: a socket's address has 108 bytes.
            listener.bind(f"/proc/self/fd/{directory}/{SOCKET}")
            listener.listen(8)
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(mask)
            os.close(directory)
        self.listener = listener
        self.watch(listener.fileno(), lambda _: self.accept(listener))

    def accept(self, listener: socket.socket) -> None:
        """Somebody has a command: the owner of the mount, or root."""
        client, _ = listener.accept()
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, user, _ = struct.unpack("iII", credentials)
        if user not in (0, os.geteuid()):
            client.close()
            return
        client.setblocking(False)
        self.clients[client.fileno()] = client
        self.watch(client.fileno(), lambda _: self.asked(client))

    def asked(self, client: socket.socket) -> None:
        """A command."""
        try:
            data = client.recv(MAX_MESSAGE)
        except OSError:
            data = b""
        try:
            request = json.loads(data)
            command = {"status": self.tell_status, "upgrade": self.upgrade, "abort": self.abort}[request["do"]]
        except (ValueError, KeyError, TypeError):
            self.hang_up(client.fileno())
            return
        command(client, request)

    def answer(self, client: socket.socket, answer: bytes) -> None:
        """Send a line; who does not take it at once is hung up on."""
        try:
            client.sendall(answer)
        except OSError:
            self.hang_up(client.fileno())

    def hang_up(self, fd: int) -> None:
        """Be done with a client."""
        client = self.clients.pop(fd, None)
        if client is not None:
            if client in self.waiting:
                self.waiting.remove(client)
            self.unwatch(fd)
            client.close()

    def answer_waiting(self, answer: bytes) -> None:
        """Tell those that wait for an upgrade what came of it."""
        for client in list(self.waiting):
            self.answer(client, answer)
        self.waiting = []

    def refuse(self, why: str) -> None:
        """Tell those that wait for an upgrade why there is none."""
        self.answer_waiting(line({"failed": why}))

    def tell_status(self, client: socket.socket, _: dict[str, Any]) -> None:
        """The state of things."""
        state = "halted" if self.halted else "serving" if self.serving and self.serving.ready else "starting"
        serving = self.serving
        facts = {
            "state": state,
            "pid": os.getpid(),
            "daemon": serving.pid if serving else None,
            "standby": self.standby.pid if self.standby else None,
            "starts": self.starts,
            "crashes": self.deaths,
            "why": self.why,
            "halted": self.halted,
        }
        self.answer(client, line({"done": facts}))

    def upgrade(self, client: socket.socket, request: dict[str, Any]) -> None:
        """Replace the daemon by one that the given command starts; where none serves, start that one."""
        if self.stopping or self.successor is not None:
            self.answer(client, line({"failed": "the mount is being taken down, or upgraded already"}))
            return
        self.waiting.append(client)
        if self.standby is not None:
            standby, self.standby = self.standby, None
            self.unwatch(standby.exit)
            self.unwatch(standby.socket.fileno())
            standby.kill()
            standby.reap()
        python = str(request.get("python", self.command[0]))
        self.renewal = [python, "-I", "-S", str(request["script"])] if "script" in request else None
        # In the background nobody reads its standard error before it serves, and it closes that then.
        words = os.memfd_create("words") if self.settings.log else None
        try:
            self.successor = self.spawn([python, *self.command[1:]], words)
        except OSError as exc:
            self.renewal = None
            self.refuse(f"{python} does not start: {exc.strerror}; {self.who_stays()}")
            self.standby_at = time.monotonic() + STANDBY_AFTER
            return
        self.deadline = time.monotonic() + WARM_TIMEOUT

    def who_stays(self) -> str:
        """What comes of an upgrade that failed."""
        return "the one before goes on serving" if self.serving else "still none serves"

    def hand_over(self, successor: Child) -> None:
        """The successor of an upgrade is there."""
        self.deadline = None
        if self.ledger not in (0, successor.ledger):
            self.refuse(
                f"version {successor.version} keeps its records of what the kernel has in another format, and cannot "
                f"take over: {self.who_stays()}. Unmount and mount again"
            )
            successor.kill()  # which nobody waits for any more
            return
        self.fallback, self.command = self.command, successor.command
        if self.serving is None:
            self.halted = ""
            self.crashes = []
            self.start()
        else:
            self.serving.tell({"yield": True})
            self.deadline = time.monotonic() + YIELD_TIMEOUT

    def abort(self, client: socket.socket, _: dict[str, Any]) -> None:
        """Fail everything that waits, and end."""
        if self.serving is not None:
            child, self.serving = self.serving, None
            self.unwatch(child.exit)
            self.unwatch(child.socket.fileno())
            child.kill()
            gone = select.poll()
            gone.register(child.exit, select.POLLIN)
            if gone.poll(ABORT_TIMEOUT * 1000):  # else it waits for a disk, say, and the kernel must cut the connection
                child.reap()
        self.end(ABORTED)
        self.answer(client, line({"done": {}}))

    # -- words

    def say(self, text: str) -> None:
        """Log a warning."""
        if self.settings.log and self.ready < 0:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(self.settings.syslog)
                sock.send(f"<28>ramfs[{os.getpid()}]: {text}".encode(errors="backslashreplace"))  # daemon.warning
                return
            with suppress(OSError), open(self.settings.log, "a", errors="backslashreplace") as file:
                file.write(time.strftime("%F %T ") + f"WARNING: {text}\n")
                return
        stream = os.fstat(2)
        journal = os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
        sys.stderr.write(f"<4>{text}\n" if journal else f"ramfs: WARNING: {text}\n")
        sys.stderr.flush()


def line(message: dict[str, Any]) -> bytes:
    """An answer to a command."""
    return json.dumps(message).encode() + b"\n"


def set_niceness(pid: int, niceness: int) -> None:
    """Let a process go before others, or after them. Without the privilege, or the process, it is left as it is."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # each has its own, from the one that started it
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
        # Most kernels share the processor out among sessions first (sched(7), autogroup): niceness counts within one.
        if os.getsid(pid) == pid:  # else it is not ours alone
            with open(f"/proc/{pid}/autogroup", "w") as file:
                file.write(f"{niceness}")


def how(code: int) -> str:
    """How a process ended, in words."""
    return f"exited with {code}" if code >= 0 else f"was ended by signal {-code}"


def passed_on() -> dict[str, int]:
    """The descriptors that a service manager kept for this process, by name (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    return {name: number for number, name in enumerate(os.environ["LISTEN_FDNAMES"].split(":"), 3)}


def alive(kept: dict[str, int]) -> bool:
    """Are these all the descriptors of a mount, and is it still mounted?"""
    if set(kept) != set(KEPT):
        return False
    poll = select.poll()
    poll.register(kept["fuse"], 0)
    return not poll.poll(0)


def notify(message: str, fd: int | None = None) -> None:
    """Tell systemd, if it started us with Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    address = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(address)
        socket.send_fds(sock, [message.encode(errors="backslashreplace")], [] if fd is None else [fd])


if __name__ == "__main__":
    os.chdir("/")
    arguments = [json.loads(argument) for argument in sys.argv[1:]]
    sys.exit(Supervisor(Settings(**arguments[0]), *arguments[1:]).run())
