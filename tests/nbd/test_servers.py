"""The client against real servers: nbdkit with its filters and TLS, qemu-nbd, qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from nbd.kit import MB, all_extents, on_trio, opened, read, read_all, sample
from nbd.servers import free_port, nbdkit, room, running

from ramfs.errors import SourceError, SourceLost, SourceRefused
from ramfs.source.base import Extent
from ramfs.source.nbd_client import NbdDirectory

SIZE = 4 * MB
DATA = sample(SIZE)
EXTENTS = [Extent(0, MB, False), Extent(MB, MB, True), Extent(2 * MB, 2 * MB, False)]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image, sparse, alone in its directory."""
    path = tmp_path_factory.mktemp("disk") / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for extent in EXTENTS:
            if not extent.zero:
                os.pwrite(file.fileno(), DATA[extent.offset : extent.offset + extent.length], extent.offset)
    return path


@pytest.fixture(scope="module")
def qcow2(disk: Path) -> Path:
    path = disk.parent.with_name("qcow2") / "disk.qcow2"
    path.parent.mkdir()
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


# --- nbdkit ---


@on_trio
async def test_over_tcp(disk: Path) -> None:
    port = free_port()
    with nbdkit("file", f"dir={disk.parent}", port=port) as uri:
        directory = NbdDirectory(uri)
        assert await directory.names() == ["disk"]
        assert await directory.size("disk") == SIZE
        with pytest.raises(SourceRefused, match=r"/nothing has no such export"):
            await directory.size("nothing")
        async with opened(f"nbd://localhost:{port}/", "disk") as source:
            assert source.connections == 2
            assert source.description == f"nbd://localhost:{port}/disk"
            assert await read_all(source) == DATA
            assert await all_extents(source) == EXTENTS
    with pytest.raises(SourceLost, match="cannot be reached: Connection refused"):
        await directory.open("disk")


@on_trio
async def test_names_that_are_not_listed() -> None:
    """nbdkit's memory plugin serves any name, and lists one."""
    with nbdkit("data", "0x01 0x02 @4095 0x03") as uri:
        directory = NbdDirectory(uri)
        assert await directory.names() == [""]
        async with opened(uri, "ö any/thing") as source:
            assert await read(source, 0, 4096) == b"\x01\x02" + bytes(4093) + b"\x03"


@on_trio
async def test_simple_replies(disk: Path) -> None:
    with nbdkit("--no-sr", "file", disk) as uri:
        async with opened(uri) as source:
            assert await read_all(source) == DATA
            assert await source.extents(5, 100) == [Extent(5, 100, False)]


@on_trio
async def test_what_is_known_of_the_rest_is_not_asked_for_again(tmp_path: Path) -> None:
    """Of an extent that goes on behind the 64 MiB of a question, each further question would look for the end again."""
    data, size = 80 * MB, 90 * MB
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.write_bytes(bytes(MB) * (data // MB))
    os.truncate(disk, size)
    with nbdkit("--filter=log", "file", disk, f"logfile={log}") as uri:
        async with opened(uri) as source:
            assert await source.extents(0, MB) == [Extent(0, MB, False)]
            assert await all_extents(source) == [Extent(0, data, False), Extent(data, size - data, True)]
            assert await source.extents(size - 4096, 9) == [Extent(size - 4096, 9, True)]
    asked = [line.partition("offset=")[2].split()[0] for line in log.read_text().splitlines() if " Extents " in line]
    assert asked == ["0x0", hex(data)]


@on_trio
async def test_several_connections(disk: Path) -> None:
    with nbdkit("file", disk) as uri:
        for connections in (1, 2, 4):
            async with opened(uri, connections=connections) as source:
                assert source.connections == connections
                assert await read_all(source) == DATA
    with nbdkit("--filter=multi-conn", "file", disk, "multi-conn-mode=disable") as uri:
        async with opened(uri) as source:
            assert source.connections == 1
            assert await read(source, 0, 4096, urgent=True) == DATA[:4096]


@on_trio
async def test_block_sizes_are_honoured(disk: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=128K"]
    with nbdkit("--filter=blocksize-policy", "file", disk, *policy, "blocksize-error-policy=error") as uri:
        async with opened(uri) as source:
            assert source.maximum == 128 << 10
            assert await read_all(source, source.maximum) == DATA
            for offset, length in ((512, 4096), (0, 512), (SIZE - 1, 1), (4095, 128 << 10)):
                assert await read(source, offset, length) == DATA[offset : offset + length]
            for offset, length in ((0, 256 << 10), (SIZE, 4096), (-4096, 4096)):
                with pytest.raises(ValueError, match="cannot be read at once"):
                    await read(source, offset, length)
            assert await source.extents(MB - 100, 300) == [
                Extent(MB - 100, 100, False),
                Extent(MB, 200, True),
            ]
    # Pages of a server whose blocks are larger than they are, and as large as its reads.
    policy = ["blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-maximum=64K"]
    with nbdkit("--filter=blocksize-policy", "file", disk, *policy, "blocksize-error-policy=error") as uri:
        async with opened(uri) as source:
            for offset, length in ((0, 4096), (4096, 64 << 10), (124 << 10, 8192), (SIZE - 4096, 4096)):
                for urgent in (False, True):
                    assert await read(source, offset, length, urgent=urgent) == DATA[offset : offset + length]
            assert (await source.extents(MB + 4096, 4096)) == [Extent(MB + 4096, 4096, True)]


@on_trio
async def test_errors_of_the_server(disk: Path) -> None:
    for name, kind in (("EIO", SourceError), ("EPERM", SourceRefused), ("ESHUTDOWN", SourceLost)):
        for more in ([], ["--no-sr"]):
            # EIO half of the time: the others go well on the same connection.
            rate = "50%" if name == "EIO" else "100%"
            with nbdkit(
                *more, "--filter=error", "file", disk, f"error-pread={name}", f"error-pread-rate={rate}"
            ) as uri:
                async with opened(uri) as source:
                    errors = []
                    for _ in range(40):
                        try:
                            assert await read(source, 4096, 4096) == DATA[4096:8192]
                        except SourceError as error:
                            errors.append(error)
                    assert {type(error) for error in errors} == {kind}
                    assert len(errors) < 40 if name == "EIO" else len(errors) == 40
                    assert all(str(error).startswith("nbd+unix:///?socket=") for error in errors)


@on_trio
async def test_a_server_that_takes_its_time(disk: Path) -> None:
    """Cancelled reads of a slow server: the ones beside them, and after them, get their own bytes."""
    with nbdkit("--filter=delay", "file", disk, "rdelay=100ms") as uri:
        async with opened(uri, connections=1) as source:
            with trio.move_on_after(0.02) as scope:
                await read(source, 0, MB)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:

                async def kept(at: int) -> None:
                    assert await read(source, at, 4096) == DATA[at : at + 4096]

                for at in range(0, 16 * 4096, 4096):
                    nursery.start_soon(kept, at)
    with nbdkit("--filter=delay", "file", disk, "rdelay=2") as uri:  # longer than a busy machine takes to look again
        async with opened(uri, silence=0.03) as source:
            with pytest.raises(SourceLost, match=r"has said nothing for 0\.03 s"):
                await read(source, 0, 4096)
            with pytest.raises(SourceLost, match="has said nothing"):
                await source.extents(0, 4096)


@on_trio
async def test_urgent_reads_overtake(disk: Path) -> None:
    with nbdkit("--filter=rate", "file", disk, "connection-rate=4M") as uri:
        async with opened(uri) as source:
            order = []

            async def one(at: int, urgent: bool) -> None:
                assert await read(source, at, 64 << 10, urgent=urgent) == DATA[at : at + (64 << 10)]
                order.append(urgent)

            async with trio.open_nursery() as nursery:
                for at in range(0, 20 << 16, 64 << 10):
                    nursery.start_soon(one, at, False)
                await trio.testing.wait_all_tasks_blocked()
                await one(3 * MB, True)
            # The filter lets the first mebibyte pass, and gives the other four half a second.
            assert order.index(True) <= 17


@on_trio
async def test_exitlast_and_coming_back(disk: Path) -> None:
    with room() as directory:
        socket, pidfile = directory / "s", directory / "pid"
        command = ["nbdkit", "-f", "-r", "-P", pidfile, "-U", socket, "--filter=exitlast", "file", disk]
        uri = f"nbd+unix:///?socket={socket}"
        with running(command, pidfile) as process:
            async with opened(uri) as source:
                assert await read(source, 0, 4096) == DATA[:4096]
            # It has understood that nobody is left.
            assert await trio.to_thread.run_sync(process.wait) == 0
            with pytest.raises(SourceLost, match="cannot be reached"):
                await NbdDirectory(uri).open("")


@on_trio
async def test_a_server_that_is_killed(disk: Path) -> None:
    with room() as directory:
        socket, pidfile = directory / "s", directory / "pid"
        command = ["nbdkit", "-f", "-r", "-P", pidfile, "-U", socket, "--filter=delay", "file", disk, "rdelay=10"]
        with running(command, pidfile) as process:
            async with opened(f"nbd+unix:///?socket={socket}") as source:
                lost = []

                async def one(at: int, urgent: bool) -> None:
                    with pytest.raises(SourceLost):
                        await read(source, at, 4096, urgent=urgent)
                    lost.append(at)

                async with trio.open_nursery() as nursery:
                    for number in range(100):  # more than are asked at once
                        nursery.start_soon(one, number * 4096, number % 2 == 0)
                    await trio.testing.wait_all_tasks_blocked()
                    process.send_signal(signal.SIGKILL)
                assert len(lost) == 100


@on_trio
async def test_closing_spares_a_server_that_is_replying(disk: Path) -> None:
    """nbdkit 1.32 ends by an assertion when a client goes away in the middle of replies."""
    with room() as directory:
        pidfile = directory / "pid"
        command = ["nbdkit", "-f", "-r", "-P", pidfile, "-U", directory / "s", "file", disk]
        with running(command, pidfile) as process:
            for _ in range(10):
                async with (
                    opened(f"nbd+unix:///?socket={directory / 's'}") as source,
                    trio.open_nursery() as nursery,
                ):
                    for at in range(0, SIZE, MB):
                        nursery.start_soon(read, source, at, MB)
                    await trio.sleep(0.001)
                    nursery.cancel_scope.cancel()
            assert process.poll() is None


@pytest.mark.parametrize("where", ["plain", "tls", "hole"])
@on_trio
async def test_memory_that_cannot_be_written(disk: Path, pki: Path, tmp_path: Path, where: str) -> None:
    """It fails that read, with no signal, and no other."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(MB))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), MB)
        file.truncate(MB // 2)  # what lies behind is SIGBUS for whoever touches it
    tls = ["--tls=require", f"--tls-certificates={pki / 'good'}"] if where == "tls" else []
    with nbdkit(*tls, "file", disk) as uri:
        secure = uri.replace("nbd+", "nbds+") + f"&tls-certificates={pki / 'good'}"
        async with opened(secure if tls else uri) as source:
            start = MB if where == "hole" else 0
            async with trio.open_nursery() as nursery:

                async def kept(at: int) -> None:
                    assert await read(source, at, MB) == DATA[at : at + MB]

                nursery.start_soon(kept, 0)
                nursery.start_soon(kept, 2 * MB)
                with pytest.raises(SourceError, match="cannot be stored: Bad address"):
                    await source.read_into(start, memoryview(memory))
            await source.read_into(start, memoryview(memory)[: MB // 2])
            assert memory[: MB // 2] == DATA[start : start + MB // 2]
            memory.close()  # BufferError if somebody still held it


# --- TLS ---


@contextlib.contextmanager
def encrypted(pki: Path, disk: Path, certificates: str = "good", *more: str) -> Iterator[str]:
    """nbdkit that requires TLS; yields what follows nbds+unix:///NAME? in a URI."""
    options = ["--tls=require", f"--tls-certificates={pki / certificates}", *more]
    with nbdkit(*options, "file", f"dir={disk.parent}") as uri:
        yield uri.partition("?")[2]


@pytest.mark.parametrize("name", ["", "&tls-hostname=inner.example", "&tls-hostname=127.0.0.1"])
@on_trio
async def test_tls(pki: Path, disk: Path, name: str) -> None:
    with encrypted(pki, disk) as at:
        uri = f"nbds+unix:///?{at}&tls-certificates={pki / 'authority'}{name}"
        assert await NbdDirectory(uri).names() == ["disk"]
        assert await NbdDirectory(uri).size("disk") == SIZE
        async with opened(uri, "disk") as source:
            assert source.connections == 2
            assert await read_all(source) == DATA
            assert await all_extents(source) == EXTENTS
            memory = mmap.mmap(-1, MB)
            await source.read_into(2 * MB, memoryview(memory))
            assert memory[:] == DATA[2 * MB : 3 * MB]


@on_trio
async def test_tls_over_tcp(pki: Path, disk: Path) -> None:
    port = free_port()
    options = ["--tls=require", f"--tls-certificates={pki / 'good'}"]
    with nbdkit(*options, "file", disk, port=port):
        authority = f"tls-certificates={pki / 'authority' / 'ca-cert.pem'}"  # a file will do
        for host in ("localhost", "127.0.0.1"):
            async with opened(f"nbds://{host}:{port}/?{authority}") as source:
                assert await read(source, 0, MB) == DATA[:MB]
        with pytest.raises(SourceRefused, match=r"not valid for 'example\.org'"):
            await NbdDirectory(f"nbds://127.0.0.1:{port}/?{authority}&tls-hostname=example.org").open("")


@pytest.mark.parametrize(
    ("served", "query", "words"),
    [
        ("good", "&tls-certificates={pki}/authority&tls-hostname=example.org", "not valid for 'example.org'"),
        ("good", "&tls-certificates={pki}/other", "cannot be trusted"),
        ("good", "", "cannot be trusted"),
        ("expired", "&tls-certificates={pki}/good", "cannot be trusted: certificate has expired"),
        ("good", "&tls-certificates={pki}/nowhere", "nowhere cannot be used: No such file"),
        ("good", "&tls-certificates={pki}/good/ca-key.pem", "cannot be used"),
    ],
)
@on_trio
async def test_servers_that_are_not_believed(pki: Path, disk: Path, served: str, query: str, words: str) -> None:
    with encrypted(pki, disk, served) as at:
        directory = NbdDirectory(f"nbds+unix:///?{at}{query.format(pki=pki)}")
        for call in (directory.names, lambda: directory.open("disk")):
            with pytest.raises(SourceRefused, match=words) as caught:
                await call()
            assert "\n" not in str(caught.value)


@on_trio
async def test_servers_that_want_a_certificate(pki: Path, disk: Path) -> None:
    with encrypted(pki, disk, "good", "--tls-verify-peer") as at:
        async with opened(f"nbds+unix:///?{at}&tls-certificates={pki / 'good'}", "disk") as source:
            assert await read(source, 0, 4096) == DATA[:4096]
        for client in ("authority", "mixed"):
            certificates = pki / client
            if client == "mixed":  # a client of another authority
                certificates.mkdir()
                for name, origin in (("ca-cert", "good"), ("client-cert", "other"), ("client-key", "other")):
                    (certificates / f"{name}.pem").symlink_to(pki / origin / f"{name}.pem")
            with pytest.raises((SourceRefused, SourceLost)):
                await NbdDirectory(f"nbds+unix:///?{at}&tls-certificates={certificates}").open("disk")


@on_trio
async def test_plain_text_and_tls_do_not_mix(pki: Path, disk: Path) -> None:
    with encrypted(pki, disk) as at:
        directory = NbdDirectory(f"nbd+unix:///?{at}")
        for call in (directory.names, lambda: directory.open("disk"), lambda: directory.size("disk")):
            with pytest.raises(SourceRefused, match=r"requires TLS.*use nbds://"):
                await call()
    with nbdkit("file", disk) as uri:
        directory = NbdDirectory(f"{uri.replace('nbd+', 'nbds+')}&tls-certificates={pki / 'authority'}")
        with pytest.raises(SourceRefused, match="does not offer TLS"):
            await directory.open("")


# --- QEMU ---


@on_trio
async def test_qemu_nbd(disk: Path, pki: Path) -> None:
    with room() as directory:
        socket = directory / "s"
        for clients, connections in ((1, 1), (8, 2)):
            command = ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", socket, "-e", str(clients), "-x", "disk ö", disk]
            with running(command, socket):
                await trio.sleep(0.05)
                uri = f"nbd+unix:///?socket={socket}"
                assert await NbdDirectory(uri).names() == ["disk ö"]
                async with opened(uri, "disk ö") as source:
                    assert source.connections == connections
                    assert await read_all(source) == DATA
                    assert await all_extents(source) == EXTENTS
            with contextlib.suppress(FileNotFoundError):
                socket.unlink()
        credentials = f"tls-creds-x509,id=tls,dir={pki / 'good'},endpoint=server,verify-peer=on"
        command = [
            "qemu-nbd",
            "-r",
            "-t",
            "-f",
            "raw",
            "-k",
            socket,
            "--object",
            credentials,
            "--tls-creds",
            "tls",
            disk,
        ]
        with running(command, socket):
            async with opened(f"nbds+unix:///?socket={socket}&tls-certificates={pki / 'good'}") as source:
                assert await read_all(source) == DATA


@on_trio
async def test_qemu_storage_daemon(disk: Path, qcow2: Path) -> None:
    """Two exports of one server; the qcow2 image knows its holes."""
    with room() as directory:
        socket = directory / "s"
        server = {"addr": {"type": "unix", "path": str(socket)}, "max-connections": 8}
        command: list[str | Path] = ["qemu-storage-daemon"]
        for name, path in (("raw", disk), ("qcow2", qcow2)):
            file = {"driver": "file", "filename": str(path)}
            node = {"driver": name, "node-name": name, "file": file, "read-only": True}
            command += ["--blockdev", json.dumps(node)]
        command += ["--nbd-server", json.dumps(server)]
        for name in ("raw", "qcow2"):
            export = {"type": "nbd", "id": name, "node-name": name, "name": f"export of {name}"}
            command += ["--export", json.dumps(export)]
        pidfile = directory / "pid"
        with running([*command, "--pidfile", pidfile], pidfile):
            uri = f"nbd+unix:///?socket={socket}"
            assert sorted(await NbdDirectory(uri).names()) == ["export of qcow2", "export of raw"]
            for name in ("raw", "qcow2"):
                async with opened(uri, f"export of {name}") as source:
                    assert source.connections == 2
                    assert await read_all(source) == DATA
                    assert await all_extents(source) == EXTENTS
                    assert await read(source, MB - 5, 10) == DATA[MB - 5 : MB + 5]
