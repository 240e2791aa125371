"""Dense clones whose template the kernel serves from the store, without the daemon."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vm.conftest import Lab, cp, snapshot
from vm.guest import MIB, PAGE, PART_PAGES_PER_MIB

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def readonly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("readonly") / "readonly.so"
    source = Path(__file__).with_name("readonly.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def test_dense_clones_fault_in_the_store(lab: Lab, readonly: Path) -> None:
    vm = lab.directory("vm")
    parent = lab.boot(vm / "ram0")
    snapshot(vm, "template", parent.socket)
    parent.close()
    template = vm / ".snap" / "template"
    before = (template / "ram0").read_bytes()

    def status() -> Any:
        return json.loads((lab.mount.path / ".ramfs" / "status.json").read_bytes())

    clones = []
    for number in range(3):
        here = lab.mount.path / f"dense{number}"
        cp("-al", template, here)
        env = {"LD_PRELOAD": str(readonly), "READONLY": str(here / "ram0")}
        clones.append(lab.resume(here / "ram0", template / "state", share=False, env=env))
    told = status()
    assert told["native"] == {"files": 1, "refused": ""}
    for number, clone in enumerate(clones):
        clone.say(f"overwrite {20 + number} 2")
        clone.say(f"overwrite {30 + number} 5")
    for number, clone in enumerate(clones):
        clone.check([1, 1, 20 + number, 1, 1, 30 + number, 1, 1])
        assert 2 * 16 * PART_PAGES_PER_MIB <= clone.usage().anonymous < clone.mib * MIB // PAGE // 8
    # Nobody reads the states any more, and the memory never went through the daemon.
    pages = (status()["requests"]["read_bytes"] - told["requests"]["read_bytes"]) // PAGE
    assert pages < 8, f"{pages} pages were asked of the daemon"
    for clone in clones:
        clone.close()
    assert (template / "ram0").read_bytes() == before
