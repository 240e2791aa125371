import os
from pathlib import Path

import pytest
from storekit import Kit

import ramfs.store.layers
from ramfs.errors import StoreDamaged
from ramfs.image.digest import DIGEST, digest_pages
from ramfs.store.files import data_extents, punch_hole, read_exactly, stored_pages, write_all
from ramfs.store.layers import LayerFile
from ramfs.units import LOST, PAGE, LayerId


def test_page_i_lies_at_its_own_offset(tmp_path: Path) -> None:
    """Any tool can read a layer."""
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 7 * PAGE, b"seven".ljust(PAGE, b"."))
        data = kit.layer_file(kit.layer_of("f", 7)).read_bytes()
        assert data[7 * PAGE : 8 * PAGE] == b"seven".ljust(PAGE, b".")
        assert not any(data[: 7 * PAGE])


def test_aliases_name_pages_further_on(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"".join(bytes([65 + i]) * PAGE for i in range(6)))
        source, target = kit.image("f"), kit.create("g")
        kit.pager.share(source, 2 * PAGE, target, 0, 3 * PAGE)
        assert kit.read("g") == b"".join(bytes([65 + i]) * PAGE for i in (2, 3, 4))
        layers = kit.store.layers
        base, alias = layers[kit.layer_of("f")], layers[kit.layer_of("g")]
        assert alias.is_alias
        assert (alias.base, alias.shift) == (base.id, 2)
        assert not os.path.exists(layers.path(alias.id))
        with kit.store.catalog.transaction():
            assert layers.alias(base, 2) is alias  # one for each shift
            assert layers.alias(alias, -2) is base  # there and back again
            again = layers.alias(alias, 1)
        assert (again.base, again.shift) == (base.id, 3)  # never an alias of an alias


def test_a_rolled_back_layer_leaves_nothing(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
        layers = kit.store.layers
        before = set(layers.by_id), sorted(os.listdir(layers.directory))
        with pytest.raises(RuntimeError), kit.store.catalog.transaction():  # noqa: PT012 - what it holds is the point
            made = layers.create(PAGE)
            layers.seal(layers[kit.layer_of("f")])
            layers.alias(made, 3)
            raise RuntimeError
        assert (set(layers.by_id), sorted(os.listdir(layers.directory))) == before
        assert not layers[kit.layer_of("f")].sealed
        kit.write("f", 0, b"y" * PAGE)
        assert kit.read("f") == b"y" * PAGE


def test_open_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ramfs.store.layers, "OPEN_LAYERS", 3)
    with Kit(tmp_path / "s") as kit:
        for number in range(10):
            kit.write(f"f{number}", 0, bytes([number + 1]) * PAGE)
        for number in (0, 9, 5, 0):
            assert kit.read(f"f{number}") == bytes([number + 1]) * PAGE
        open_layers = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        assert sum(name.endswith(".ram") for name in open_layers) <= 3
        kit.write("f1", 0, b"w" * PAGE)  # one that was closed is opened for writing again
        kit.sync()
        assert kit.read("f1") == b"w" * PAGE


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_unknown_and_lost_layers_are_damage(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        with pytest.raises(StoreDamaged, match="names layer 99"):
            kit.store.layers[LayerId(99)]
        with pytest.raises(StoreDamaged, match="was lost"):
            kit.store.layers[LOST]


def test_a_missing_file_and_one_that_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="is missing"):
        LayerFile(str(tmp_path / "no"), writable=False)
    file = LayerFile(str(tmp_path / "short"), writable=True, create=True)
    file.write(0, b"x" * PAGE)
    with pytest.raises(StoreDamaged, match="shorter"):
        file.read(PAGE, PAGE)
    with pytest.raises(StoreDamaged, match="shorter"):
        file.map(file.size + 1)
    file.close()


def test_punching_gives_space_back(tmp_path: Path) -> None:
    file = LayerFile(str(tmp_path / "layer"), writable=True, create=True)
    file.write(0, os.urandom(64 * PAGE))
    os.fsync(file.fd)
    before = os.fstat(file.fd).st_blocks
    file.punch(8, 24)
    assert os.fstat(file.fd).st_blocks <= before - 16 * PAGE // 512
    assert file.read(8 * PAGE, 16 * PAGE) == bytes(16 * PAGE)
    stored = stored_pages(file.fd)
    assert stored[:64].tolist() == [True] * 8 + [False] * 16 + [True] * 40
    file.close()


def test_digests_of_what_is_stored(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 2 * PAGE, b"two".ljust(PAGE))
        kit.write("f", 900 * PAGE, b"nine hundred".ljust(PAGE))
        layer = kit.layer_of("f", 2)
        kit.copy("f", "g")  # seals
        kit.digest()
        digests = kit.layer_file(layer, "xxh3").read_bytes()
        assert digests[2 * DIGEST : 3 * DIGEST] == digest_pages(b"two".ljust(PAGE))
        assert digests[900 * DIGEST : 901 * DIGEST] == digest_pages(b"nine hundred".ljust(PAGE))
        assert not any(digests[: 2 * DIGEST])
        assert not any(digests[3 * DIGEST : 900 * DIGEST])
        assert kit.pager.undigested() == []
        assert kit.layer_file(layer, "xxh3").stat().st_blocks * 512 <= 4 * PAGE


# --- the system calls underneath ---


def test_extents_and_holes(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    assert list(data_extents(fd)) == []
    os.ftruncate(fd, 100 * PAGE)
    assert list(data_extents(fd)) == []
    write_all(fd, b"x" * PAGE, 10 * PAGE)
    write_all(fd, memoryview(b"y" * 2 * PAGE), 50 * PAGE)
    assert list(data_extents(fd)) == [(10 * PAGE, 11 * PAGE), (50 * PAGE, 52 * PAGE)]
    assert list(data_extents(fd, 11 * PAGE)) == [(50 * PAGE, 52 * PAGE)]
    assert punch_hole(fd, 50 * PAGE, PAGE)
    assert list(data_extents(fd, 11 * PAGE)) == [(51 * PAGE, 52 * PAGE)]
    assert read_exactly(fd, 200 * PAGE, 99 * PAGE) == bytes(PAGE)
    os.close(fd)


def test_a_file_system_that_cannot_punch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes
    import errno

    import ramfs.store.files

    def refuse(code: int) -> None:
        def fallocate(*args: object) -> int:
            ctypes.set_errno(code)
            return -1

        monkeypatch.setattr(ramfs.store.files, "_fallocate", fallocate)

    refuse(errno.EOPNOTSUPP)
    assert not punch_hole(0, 0, PAGE)
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        punch_hole(0, 0, PAGE)
