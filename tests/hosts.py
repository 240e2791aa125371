"""Two hosts for a test: network namespaces joined by a cable, which can be cut and can lose packets.

    with hosts() as (a, b):
        with Mount(store, mnt, prefix=b.prefix) as mount:    # its daemon reaches the other host at a.address
            a.cut()

Only the network is of each host's own; files and processes are seen by all.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

NEEDS = "two network namespaces need root"


class Host:
    """A network of its own, with one interface, `cable`. It ends with the test's process, whatever ends that."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.peer: Host | None = None
        # cat ends when its standard input does; that it answers tells that the namespace is there.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"?\n")
        self._holder.stdin.flush()
        assert self._holder.stdout.readline() == b"?\n", "cannot make a network namespace"
        self.pid = self._holder.pid
        self.prefix = ("nsenter", f"--target={self.pid}", "--net", "--")
        """before a command that is to run on this host"""
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *words: str) -> None:
        """Run a command on this host; fail if it does."""
        done = subprocess.run(
            [*self.prefix, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"

    def cut(self) -> None:
        """Pull the cable: nothing gets through either way, and nobody is told."""
        self.run("ip", "link", "set", "cable", "down")

    def mend(self) -> None:
        """Put the cable in again."""
        self.run("ip", "link", "set", "cable", "up")
        for host in filter(None, (self, self.peer)):
            # A host that was asked for in vain while it was out of reach counts as unreachable for seconds.
            host.run("ip", "neighbour", "flush", "dev", "cable")

    def lose(self, percent: float) -> None:
        """Lose this part of the packets that arrive, at random. (Many kernels come without netem.)"""
        self.run("nft", "add table inet loss; add chain inet loss input { type filter hook input priority 0; };"
                 f"flush chain inet loss input; add rule inet loss input iifname cable numgen random mod 1000 < "
                 f"{round(percent * 10)} drop")  # fmt: skip

    def slow(self, mbit: int) -> None:
        """Send no more than this, Mbit/s."""
        self.run(*f"tc qdisc replace dev cable root tbf rate {mbit}mbit burst 64kb latency 100ms".split())

    def listens(self, port: int) -> bool:
        """Does somebody listen at a TCP port?"""
        lines = (line.split() for line in self._read("/proc/net/tcp").splitlines()[1:])
        return any(int(words[1].split(":")[1], 16) == port and words[3] == "0A" for words in lines)

    def received(self) -> int:
        """Bytes that have come through the cable."""
        lines = (line.split() for line in self._read("/proc/net/dev").splitlines())
        return next(int(words[1]) for words in lines if words[0] == "cable:")

    def _read(self, path: str) -> str:
        """A file of /proc/net is of the namespace of who reads it."""
        return subprocess.run([*self.prefix, "cat", path], stdout=subprocess.PIPE, text=True, check=True).stdout

    def close(self) -> None:
        """End it."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()


@contextlib.contextmanager
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts and a cable between them."""
    with contextlib.ExitStack() as stack:
        pair = []
        for address in ("10.77.0.1", "10.77.0.2"):
            host = Host(address)
            stack.callback(host.close)
            pair.append(host)
        a, b = pair
        a.peer, b.peer = b, a
        a.run(*f"ip link add cable type veth peer name cable netns {b.pid}".split())
        for host in pair:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
        for host in pair:
            host.mend()
        yield a, b
