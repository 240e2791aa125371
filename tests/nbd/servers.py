"""Real NBD servers for tests, on sockets of their own, and certificates for them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def running(command: Sequence[str | Path], ready: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from when its socket is there until the end of the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 20
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise AssertionError(f"{command[0]} does not start: {log.read().decode()}")
                time.sleep(0.005)
            yield process
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A directory with a path short enough for a socket."""
    directory = Path(tempfile.mkdtemp(prefix="ramfs-nbd-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def nbdkit(*arguments: str | Path, port: int | None = None) -> Iterator[str]:
    """nbdkit at a Unix socket, or at a port of the loopback; yields the URI of its default export."""
    with room() as directory:
        pidfile = directory / "pid"  # written when the socket listens
        where = ["--unix", directory / "s"] if port is None else ["--ipaddr", "127.0.0.1", "--port", str(port)]
        command = ["nbdkit", "--foreground", "--readonly", "--pidfile", pidfile, *where, *arguments]
        with running(command, pidfile):
            yield f"nbd+unix:///?socket={directory / 's'}" if port is None else f"nbd://127.0.0.1:{port}/"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_authority(directory: Path, name: str = "ca") -> None:
    """ca-cert.pem and ca-key.pem."""
    subject = ["-subj", f"/CN={name}", "-days", "2", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    openssl("req", "-x509", *subject, "-keyout", directory / "ca-key.pem", "-out", directory / "ca-cert.pem")


def make_certificate(directory: Path, kind: str, names: str, *, expired: bool = False) -> None:
    """KIND-cert.pem and KIND-key.pem, signed by the directory's authority, for names such as DNS:localhost."""
    request, extensions = directory / "request", directory / "extensions"
    extensions.write_text(f"subjectAltName={names}\n")
    key = ["-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", directory / f"{kind}-key.pem"]
    openssl("req", "-new", "-subj", f"/CN={kind}", *key, "-out", request)
    signer = ["-CA", directory / "ca-cert.pem", "-CAkey", directory / "ca-key.pem", "-CAcreateserial"]
    signed = ["-extfile", extensions, "-days", "-1" if expired else "2", "-out", directory / f"{kind}-cert.pem"]
    openssl("x509", "-req", "-in", request, *signer, *signed)
    for leftover in (request, extensions):
        os.unlink(leftover)
