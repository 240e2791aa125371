"""Two QEMUs on one disk image in the mount: QEMU's own locks keep the second out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from vm.conftest import Lab
from vm.guest import GuestFailed

pytestmark = pytest.mark.vm


def refused(lab: Lab, memory: Path, **more: object) -> str:
    """What a QEMU says that must not start."""
    try:
        guest = lab.start(memory, **more)
        guest.process.wait(20)
    except GuestFailed as error:  # it was quicker
        return str(error)
    return guest.errors


def test_two_guests_on_one_image(lab: Lab) -> None:
    image = lab.mount.path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)

    def with_disk(path: Path) -> dict[str, object]:
        return {"kernel": False, "args": ["-S", "-drive", f"file={path},format=qcow2,if=virtio"]}

    first = lab.start(lab.directory("one"), **with_disk(image))
    said = refused(lab, lab.directory("two"), **with_disk(image))
    assert 'Failed to get "write" lock' in said
    assert "Is another process using the image" in said
    info = subprocess.run(["qemu-img", "info", image], capture_output=True, text=True, check=False)
    assert (info.returncode, info.stdout) == (1, "")
    assert 'Failed to get shared "write" lock' in info.stderr
    subprocess.run(["qemu-img", "info", "-U", image], stdout=subprocess.DEVNULL, check=True)
    assert first.status() == "prelaunch"
    # A clone of the image is another file.
    subprocess.run(["cp", image, lab.mount.path / "clone"], check=True)
    third = lab.start(lab.directory("three"), **with_disk(lab.mount.path / "clone"))
    assert third.status() == "prelaunch"
    first.kill()
    fourth = lab.start(lab.directory("four"), **with_disk(image))
    assert fourth.status() == "prelaunch"
