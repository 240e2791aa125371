"""`ramfs.manifest` of a snapshot: not listed, and true of every page."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import trio
from harness import RAMFS, Mount
from mount.posix import NOBODY, PAGE, errno_of, eventually, fails, in_child, opened, page_of, pattern, read, status
from source.cases import file_of

from ramfs.image.digest import KNOWN_LOST
from ramfs.source.file import FileDirectory
from ramfs.source.manifest import NAME, File, Manifest, fetch_manifest
from ramfs.source.nbd_client import NbdDirectory
from ramfs.source.verify import VerifiedSource
from ramfs.store.repair import check_store

MB = 1 << 20


def snap(directory: Path, name: str = "s") -> Path:
    (directory / ".snap" / name).mkdir()
    return directory / ".snap" / name


def manifest(directory: Path) -> dict[str, File]:
    """What the manifest of a snapshot says."""

    async def load() -> Manifest | None:
        return await fetch_manifest(FileDirectory(str(directory)))

    found = trio.run(load)
    assert found is not None
    return dict(found.files)


def check(directory: Path) -> dict[str, File]:
    """The manifest of a snapshot tells what there is to be read, all of it and nothing else."""
    told = manifest(directory)
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    assert set(told) == {str(path.relative_to(directory)) for path in paths}
    for path in paths:
        file, expected = told[str(path.relative_to(directory))], file_of(read(path))
        assert file.size == expected.size
        assert (file.digests == expected.digests).all(), path
    return told


def kept_texts(mount: Mount) -> list[str]:
    """Texts of manifests in the store."""
    return [path.name for path in (mount.store / "tables").iterdir() if "manifest" in path.name]


def test_it_tells_all_pages_of_all_files(here: Path) -> None:
    (here / "sub" / "deep").mkdir(parents=True)
    (here / "pc.ram@0x0").write_bytes(pattern(MB + 100))
    (here / "empty").touch()
    (here / "small").write_bytes(b"x")
    (here / "zeros").write_bytes(bytes(3 * PAGE + 17))
    (here / "sub" / "deep" / "file").write_bytes(pattern(5 * PAGE))
    (here / "sub-").write_bytes(b"sorted before sub/deep as text, after it as a path")
    (here / "stored zeros").write_bytes(page_of(1) * 3)
    with opened(here / "stored zeros") as fd:
        os.pwrite(fd, bytes(PAGE - 8), PAGE + 8)  # ends as a stored page that holds only zeros
        os.pwrite(fd, bytes(8), PAGE)
    with opened(here / "sparse", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, pattern(2 * PAGE), 40 * MB + 100)
        os.ftruncate(fd, 100 * MB + 1)
    (here / "link").symlink_to("pc.ram@0x0")
    os.mkfifo(here / "pipe")
    os.link(here / "pc.ram@0x0", here / "sub" / "hard")
    told = check(snap(here))
    assert told["zeros"].digests.tolist() == [[0] * 16] * 4
    assert told["stored zeros"].digests.any(axis=1).tolist() == [True, False, True]
    # Names of one file have the same digests, which are there only once.
    assert told["sub/hard"].digests.ctypes.data == told["pc.ram@0x0"].digests.ctypes.data


def test_generations(here: Path) -> None:
    ram, rng = here / "ram", 0
    told = []
    for generation in range(6):
        with opened(ram, os.O_RDWR | os.O_CREAT) as fd:
            for page in range(generation, 300, 7 + generation):
                rng += 1
                os.pwrite(fd, page_of(rng), page * PAGE)
            if generation % 2:
                os.ftruncate(fd, 250 * PAGE + 99 * generation)
        told.append(check(snap(here, str(generation)))["ram"])
    assert (told[-1].digests[:20] == told[-2].digests[:20]).any(axis=1).any()


def test_pages_at_other_places_than_where_they_lie(here: Path) -> None:
    (here / "a").write_bytes(pattern(20 * PAGE + 50))
    with opened(here / "a") as one, opened(here / "b", os.O_RDWR | os.O_CREAT) as other:
        os.copy_file_range(one, other, 20 * PAGE, 0, 7 * PAGE)
        os.copy_file_range(one, other, 9 * PAGE, 5 * PAGE, 0)
    # A page that is the ragged end of one file, and a whole one of the other.
    shutil.copyfile(here / "a", here / "c")
    os.truncate(here / "c", 22 * PAGE)
    subprocess.run(["cp", here / "a", here / "d"], check=True)
    snap(here, "first")
    os.truncate(here / "d", 21 * PAGE)
    os.truncate(here / "a", 20 * PAGE + 10)
    check(snap(here, "s"))
    check(here / ".snap" / "first")


def test_a_snapshot_of_the_root_and_of_nothing(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    assert check(snap(mount.path, "nothing")) == {}
    (mount.path / "d").mkdir()
    (mount.path / "d" / "file").write_bytes(b"file")
    assert list(check(snap(mount.path))) == ["d/file"]


def test_it_is_not_listed(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "file").write_bytes(b"file")
    frozen = snap(here)
    assert sorted(os.listdir(frozen)) == ["file", "sub"]
    subprocess.run(["cp", "-r", frozen, here / "copy"], check=True)
    assert sorted(os.listdir(here / "copy")) == ["file", "sub"]
    for place in (here, here / ".snap", frozen / "sub", here / "copy"):
        with fails(errno.ENOENT):
            (place / NAME).stat()


def test_it_is_a_plain_file_that_cannot_be_changed(here: Path) -> None:
    (here / "file").write_bytes(pattern(PAGE))
    here.chmod(0o750)
    frozen = snap(here)
    path = frozen / NAME
    told, top = path.stat(), frozen.stat()
    assert told.st_size == len(path.read_bytes()) == len(read(path))
    assert (told.st_uid, told.st_gid, told.st_mtime_ns) == (top.st_uid, top.st_gid, top.st_mtime_ns)
    assert told.st_mode == 0o100440
    assert path.is_file()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
        assert errno_of(lambda flags=flags: os.close(os.open(path, flags))) == errno.EROFS
    for change in (
        path.unlink,
        lambda: path.chmod(0o600),
        lambda: os.utime(path),
        lambda: os.truncate(path, 0),
        lambda: path.rename(here / "moved"),
        lambda: os.rename(frozen / "file", path),
        path.mkdir,
    ):
        assert errno_of(change) in (errno.EROFS, errno.EEXIST), change
    assert errno_of(lambda: os.link(path, here / "linked")) == errno.EPERM
    assert os.listxattr(path) == []
    with opened(path, os.O_RDONLY) as fd:
        assert os.lseek(fd, 3, os.SEEK_DATA) == 3
        assert os.lseek(fd, 3, os.SEEK_HOLE) == told.st_size
    check(frozen)


def test_nobody_reads_digests_of_what_he_may_not_read(public: Mount) -> None:
    vm = public.path / "vm"
    vm.mkdir(mode=0o755)
    (vm / "ram").write_bytes(pattern(PAGE))
    (vm / "ram").chmod(0o644)
    (snap(vm, "open") / NAME).read_bytes()
    (vm / "ram").chmod(0o640)
    snap(vm, "closed")

    def outcomes() -> list[int]:
        return [errno_of((vm / ".snap" / name / NAME).read_bytes) for name in ("open", "closed")]

    assert in_child(outcomes, user=NOBODY) == [0, errno.EACCES]


def test_a_file_of_the_users_own_by_that_name_is_the_one_that_is_seen(here: Path) -> None:
    (here / NAME).write_bytes(b"mine" * 100)
    (here / "file").write_bytes(b"file")
    frozen = snap(here)
    assert (frozen / NAME).read_bytes() == b"mine" * 100
    assert sorted(os.listdir(frozen)) == ["file", NAME]
    assert trio.run(fetch_manifest, FileDirectory(str(frozen))) is None
    (here / NAME).unlink()
    check(snap(here, "later"))


def test_the_text_is_in_the_store_while_it_is_open(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "file").write_bytes(pattern(MB))
    frozen = snap(mount.path)
    with opened(frozen / NAME, os.O_RDONLY), opened(frozen / NAME, os.O_RDONLY) as fd:
        assert len(kept_texts(mount)) == 1
        with opened(frozen / NAME, os.O_RDONLY):
            pass
        frozen.rmdir()
        assert len(os.pread(fd, 1 << 20, 0)) == os.fstat(fd).st_size
    eventually(lambda: kept_texts(mount) == [], "the text has gone")


def test_it_outlives_the_daemon(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "file").write_bytes(pattern(3 * MB))
    frozen = snap(mount.path)
    with opened(frozen / NAME, os.O_RDONLY) as one, opened(frozen / NAME, os.O_RDONLY) as other:
        whole = os.pread(one, 1 << 20, 0)
        for _ in range(2):
            mount.expect("going on at")
            pid = mount.kill_daemon()
            eventually(lambda pid=pid: status(mount.path)["pid"] != pid, "another daemon serves")
            stray = mount.store / "tables" / "00000063.map.new"
            stray.touch()
            eventually(lambda stray=stray: not stray.exists(), "what belongs to nothing was removed")
            assert len(kept_texts(mount)) == 1
            assert os.pread(one, 1 << 20, 0) == os.pread(other, 1 << 20, 0) == whole
            check(frozen)
    eventually(lambda: kept_texts(mount) == [], "the text has gone")


def test_flattened_while_it_is_read(here: Path, shared: Mount) -> None:
    for generation in range(4):
        with opened(here / "ram", os.O_RDWR | os.O_CREAT) as fd:
            for page in range(generation, 1000, 5):
                os.pwrite(fd, page_of(1 + generation * 1000 + page), page * PAGE)
        snap(here, str(generation))
    frozen = here / ".snap" / "3"
    before = (frozen / NAME).read_bytes()
    with subprocess.Popen([*RAMFS, "flatten", frozen], stdout=subprocess.PIPE) as flatten:
        while flatten.poll() is None:
            assert (frozen / NAME).read_bytes() == before
    assert flatten.returncode == 0
    assert (frozen / NAME).read_bytes() == before
    check(frozen)


def test_a_lost_page_matches_nothing(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "file").write_bytes(b"".join(map(page_of, range(1, 9))))
    frozen = snap(mount.path)
    manifest(frozen)
    mount.umount()
    [layer] = (path for path in (mount.store / "layers").iterdir() if path.suffix == ".ram")
    with layer.open("r+b") as file:
        file.seek(3 * PAGE)
        file.write(b"flipped")
    assert check_store(str(mount.store), repair=True).findings
    mount.start()
    told = manifest(frozen)["file"]
    assert [page for page in range(8) if told.digests[page].tobytes() == KNOWN_LOST] == [3]
    mount.expect("lost")


def test_nbdkit_serves_it_by_name(here: Path, tmp_path: Path) -> None:
    (here / "ram").write_bytes(pattern(MB))
    (here / "empty").touch()
    frozen = snap(here)
    socket = tmp_path / "socket"

    async def pull() -> None:
        directory = NbdDirectory(f"nbd+unix:///?socket={socket}")
        assert sorted(await directory.names()) == ["empty", "ram"]
        plain = await directory.open(NAME)
        whole = bytearray(plain.size)
        await plain.read_into(0, memoryview(whole))
        await plain.aclose()
        assert whole == (frozen / NAME).read_bytes()
        found = await fetch_manifest(directory)
        assert found is not None
        assert set(found.files) == {"empty", "ram"}
        source = VerifiedSource(await directory.open("ram"), found.files["ram"], "ram")
        ram = bytearray(source.size)
        await source.read_into(0, memoryview(ram))
        await source.aclose()
        assert ram == pattern(MB)

    serve = ["nbdkit", "--foreground", "--readonly", "--exit-with-parent", "-U", socket, "file", f"dir={frozen}"]
    with subprocess.Popen(serve) as nbdkit:
        try:
            eventually(socket.exists, "nbdkit serves")
            trio.run(pull)
        finally:
            nbdkit.terminate()


def test_lsattr_and_the_time_of_birth(here: Path) -> None:
    (here / "file").write_bytes(b"x")
    frozen = snap(here)
    told = subprocess.run(["stat", "--format=%W", frozen, frozen / NAME], check=True, capture_output=True, text=True)
    born = told.stdout.split()
    assert born[0] == born[1] != "0"
    flags = subprocess.run(["lsattr", frozen / NAME], check=True, capture_output=True, text=True).stdout
    assert "i" in flags.split()[0]
