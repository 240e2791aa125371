"""mount(8), fstab, umount(8), fusermount3, and users who are not root.

Each script has a mount namespace of its own, in which ramfs is in /usr/local/bin and every user may open
/dev/fuse, as udev has it on most machines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cli.conftest import NOBODY, Place, call, in_namespace, make_place, needs_root, run

pytestmark = needs_root

# A device of our own: the machine's may be root's alone.
DEVICE = """
mount -t tmpfs device "$BASE"/dev; mknod -m 666 "$BASE"/dev/fuse c 10 229; mount --bind "$BASE"/dev/fuse /dev/fuse
"""


@pytest.fixture
def open_place(public: Path) -> Place:
    """A place that nobody may use, in both senses."""
    (public / "dev").mkdir()
    home = public / "home"
    home.mkdir()
    call("chown", "nobody", home).ok()
    place = make_place(home)
    call("chown", "nobody", place.path).ok()
    return place


def test_mount_t_fuse_ramfs(shm: Path) -> None:
    base = shm / "ä b,c"
    base.mkdir()
    place = make_place(base)
    out = in_namespace(
        """
        mount -t fuse.ramfs -o noatime,noexec "$STORE" "$MNT"
        echo data >"$MNT"/file
        findmnt --noheadings --raw --output FSTYPE,OPTIONS "$MNT"
        umount "$MNT"
        until ramfs mount "$STORE" "$MNT" 2>/dev/null; do sleep 0.05; done
        cat "$MNT"/file
        ramfs umount "$MNT"
        """,
        STORE=place.store,
        MNT=place.path,
    ).ok()
    first, second = out.splitlines()
    assert first.startswith("fuse.ramfs rw,")
    assert {"noatime", "noexec"} <= set(first.split()[1].split(","))
    assert second == "data"


def test_mount_8_hands_errors_on(place: Place) -> None:
    done = in_namespace('mount -t fuse.ramfs -o nonsense "$STORE" "$MNT"', STORE=place.store, MNT=place.path)
    done.failed(2, "nonsense")
    (place.base / "file").touch()
    done = in_namespace('mount -t fuse.ramfs "$STORE" "$MNT"', STORE=place.base / "file", MNT=place.path)
    done.failed(4, "not a directory")


def test_fstab(place: Place) -> None:
    store, path = (str(where).replace(" ", "\\040") for where in (place.store, place.path))
    options = "defaults,noauto,nofail,user,_netdev,x-systemd.requires=network.target,allow_other,noexec"
    fstab = place.base / "fstab"
    fstab.write_text(f"# a comment\n{store} {path} fuse.ramfs {options} 0 0\n")
    out = in_namespace(
        """
        mount --fstab "$FSTAB" "$MNT"
        findmnt --noheadings --raw --output SOURCE,FSTYPE,OPTIONS "$MNT"
        ramfs umount "$MNT"
        sed -i 's/noauto,//' "$FSTAB"
        mount --fstab "$FSTAB" --all
        findmnt --noheadings --raw --output FSTYPE "$MNT"
        ramfs umount "$MNT"
        """,
        FSTAB=fstab,
        MNT=place.path,
    ).ok()
    first, second = out.splitlines()
    source, fstype, flags = first.split()
    assert (source, fstype) == (str(place.store), "fuse.ramfs")
    assert {"allow_other", "noexec", "nosuid", "nodev"} <= set(flags.split(","))
    assert second == "fuse.ramfs"


def test_a_user_mounts_and_unmounts(open_place: Place) -> None:
    done = in_namespace(
        DEVICE
        + f"""
        as_nobody() {{ {" ".join(NOBODY)} "$@"; }}
        as_nobody ramfs mount "$STORE" "$MNT"
        as_nobody sh -c 'echo mine >"$MNT"/file; cat "$MNT"/file; stat -c %U "$MNT"/file'
        as_nobody ramfs status --json "$MNT" | grep -c '"store"'
        cat "$MNT"/file 2>/dev/null || echo not for root
        as_nobody ramfs umount "$MNT"
        as_nobody ramfs mount -o allow_other "$STORE" "$MNT" && echo allowed || echo "code $?"
        """,
        BASE=open_place.base.parent,
        STORE=open_place.store,
        MNT=open_place.path,
    )
    assert done.code == 0, done
    told = done.out.splitlines()
    assert told == ["mine", "nobody", "1", "not for root", "code 8"]
    warning, refusal = done.err.splitlines()
    assert warning.startswith("ramfs: WARNING: cannot set ")
    assert "needs root" in warning
    assert refusal.startswith(f"ramfs: {open_place.path} cannot be mounted: ")
    assert "user_allow_other" in refusal


@pytest.mark.parametrize(
    "case", ["mountpoint of another", "store of another", "store for reading", "no device", "no fusermount3"]
)
def test_what_a_user_may_not(open_place: Place, case: str) -> None:
    spoil, code, words = {
        "mountpoint of another": ('chown root "$MNT"', 8, "no write access to mountpoint"),
        "store of another": ('mkdir -m 700 "$STORE"', 4, "Permission denied"),
        "store for reading": ('mkdir -m 755 "$STORE"', 4, "Permission denied"),
        "no device": ("chmod 600 /dev/fuse", 8, "/dev/fuse"),
        "no fusermount3": ("mount --bind /dev/null /usr/bin/fusermount3", 8, "fusermount3"),
    }[case]
    done = in_namespace(
        f'{DEVICE}\n{spoil}\nexec {" ".join(NOBODY)} ramfs mount "$STORE" "$MNT"',
        BASE=open_place.base.parent,
        STORE=open_place.store,
        MNT=open_place.path,
    )
    done.failed(code, words)


def test_no_fuse_at_all(place: Place) -> None:
    done = in_namespace(
        """
        mkdir "$BASE"/dev; mount -t tmpfs device "$BASE"/dev
        for each in null urandom zero; do touch "$BASE"/dev/$each; mount --bind /dev/$each "$BASE"/dev/$each; done
        mkdir "$BASE"/dev/shm; mount --rbind /dev/shm "$BASE"/dev/shm
        mount --rbind "$BASE"/dev /dev
        ramfs mount "$STORE" "$MNT"
        """,
        BASE=place.base,
        STORE=place.store,
        MNT=place.path,
    )
    done.failed(8, "/dev/fuse", "modprobe fuse")


@pytest.mark.parametrize("option", ["allow_other", "rw"])
def test_other_users_are_let_in_by_allow_other_alone(public: Path, option: str) -> None:
    place = make_place(public)
    place.mount("-o", option)
    (place.path / "open").write_text("for all")
    (place.path / "closed").write_text("for root")
    (place.path / "closed").chmod(0o600)
    place.path.chmod(0o755)
    done = call(*NOBODY, "cat", place.path / "open")
    if option == "rw":
        assert done.code == 1
    else:
        assert done.ok() == "for all"
        assert "Permission denied" in call(*NOBODY, "cat", place.path / "closed").err
        assert json.loads(call(*NOBODY, "cat", place.path / ".ramfs/status.json").ok())["pid"]
    place.umount()


def test_a_mount_of_another_user(public: Path) -> None:
    place = make_place(public)
    place.mount()
    ramfs = [*NOBODY, sys.executable, "-P", "-m", "ramfs"]
    for command in ("status", "du", "umount"):
        done = call(*ramfs, command, place.path)
        assert done.code in {1, 8}
        assert done.err.startswith("ramfs: ")
        assert done.err.count("\n") == 1
        assert str(place.path) in done.err
    run("umount", place.path).ok()
