"""The units: systemd takes them, and they are as closed as a service that mounts, or exports, can be."""

import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "ramfs@.service"
EXPORT = UNIT.with_name("ramfs-export@.service")

# Ten times what `systemd-analyze security` calls the exposure level (0 to 10). What is left of the one comes from
# the rights to mount, to reach the network, and to be seen in the host's mount namespace; of the other from being root
# on the network.
EXPOSURE = {UNIT: 45, EXPORT: 22}


@pytest.fixture(params=EXPOSURE, ids=lambda unit: unit.stem)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit with a program in it that exists here, for ramfs is not installed system-wide."""
    path: Path = request.param
    text = path.read_text()
    if path == UNIT:
        assert "ExecStart=ramfs mount -f " in text
        assert "ExecReload=ramfs upgrade " in text
    copy = tmp_path / path.name
    copy.write_text(text.replace("=ramfs ", "=/bin/true "))
    return copy


def test_systemd_takes_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    # It looks at units of the host too, and complains of those as well.
    assert [line for line in done.stderr.splitlines() if "ramfs" in line] == []
    assert done.returncode == 0, done.stderr


def test_the_unit_is_closed(unit: Path) -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--no-pager",
            "--offline=true",
            f"--threshold={EXPOSURE[UNIT.with_name(unit.name)]}",
            unit,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1] + done.stderr


def test_nothing_hides_the_mount_from_the_host() -> None:
    """A mount namespace of the service's own would; systemd makes one for each of these."""
    hiding = set(
        """
        BindPaths BindReadOnlyPaths DynamicUser ExecPaths InaccessiblePaths MountFlags MountImages NoExecPaths
        PrivateDevices PrivateIPC PrivateMounts PrivateTmp PrivateUsers ProcSubset ProtectControlGroups
        ProtectHome ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem
        ReadOnlyPaths ReadWritePaths RootDirectory RootImage TemporaryFileSystem User
        """.split()
    )
    used = {line.split("=")[0] for line in UNIT.read_text().splitlines() if "=" in line and line[0] not in "#["}
    assert used & hiding == set()
