"""The unit in a systemd that runs: start, reload, a supervisor that dies, stop."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time

import pytest
from nbd.servers import make_authority, make_certificate
from service.conftest import Load, Service, eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def is_clean(service: Service) -> bool:
    """Was the store closed in order?"""
    with contextlib.closing(sqlite3.connect(f"file:{service.store}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        return bool(catalog.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone() == (1,))


def mounted(service: Service) -> bool:
    return f" {service.path} " in service.systemd("cat", "/proc/self/mountinfo")


def facts(service: Service, *names: str) -> list[str]:
    shown = service.show()
    return [shown[name] for name in names]


def test_the_load_outlives_everything_but_the_stop(service: Service) -> None:
    service.ctl("start")
    assert facts(service, "SubState", "NFileDescriptorStore") == ["running", "3"]
    load = Load(service.path / "ram", service.systemd.inside)
    supervisor, daemon = service.show()["MainPID"], service.status()["pid"]

    service.ctl("reload")
    upgraded = service.status()
    assert upgraded["pid"] != daemon
    assert "yielded" in upgraded["supervisor"]["why"]
    assert facts(service, "MainPID", "SubState") == [supervisor, "running"]

    for count in ("1", "2"):
        service.kill(service.show()["MainPID"])
        eventually(lambda count=count: facts(service, "NRestarts", "SubState") == [count, "running"], service.unit)
        assert service.status()["supervisor"]["why"] == "the supervisor before this one is gone"
        assert facts(service, "NFileDescriptorStore") == ["3"]
        time.sleep(0.2)

    service.kill(service.status()["pid"])  # the supervisor replaces that one, not systemd
    time.sleep(0.5)
    assert service.status()["supervisor"]["crashes"] == 1
    assert facts(service, "NRestarts") == ["2"]
    print(f"longest access: {load.end():.3f} s")

    service.ctl("stop")
    assert facts(service, "SubState", "Result", "NFileDescriptorStore") == ["dead", "success", "0"]
    assert not mounted(service)
    assert is_clean(service)


def test_a_stop_keeps_what_users_had_in_mapped_pages(service: Service) -> None:
    service.ctl("start")
    file = service.path / "ram"
    user = service.systemd.run_beside("import mmap, sys, time; f = open(sys.argv[1], 'w+b'); f.truncate(8192);"
                                      "m = mmap.mmap(f.fileno(), 8192); m[4096] = 7; print('stored', flush=True);"
                                      "time.sleep(60)", file)  # fmt: skip
    service.ctl("stop")
    assert not mounted(service)
    assert is_clean(service)
    user.kill()
    user.wait()
    service.ctl("start")
    assert service.systemd("cat", file) == "\0" * 4096 + "\x07" + "\0" * 4095
    service.ctl("stop")


def test_what_ends_the_mount_ends_the_service(service: Service) -> None:
    for option, result in (("--lazy", "success"), ("--abort", "exit-code")):
        service.ctl("start")
        service.systemd("/usr/local/bin/ramfs", "umount", option, service.path)
        eventually(lambda: facts(service, "ActiveState") != ["active"], service.unit)
        time.sleep(0.3)  # more than it would take to be started again
        assert facts(service, "MainPID", "Result", "NFileDescriptorStore") == ["0", result, "0"]
        assert not mounted(service)
    service.ctl("reset-failed")


def test_a_store_that_cannot_be_used_is_tried_once(service: Service) -> None:
    service.store.mkdir()
    (service.store / "foreign").touch()
    service.systemd("systemctl", "start", service.unit, check=False)
    assert facts(service, "ActiveState", "ExecMainStatus", "NRestarts") == ["failed", "4", "0"]
    assert "not a ramfs store" in service.systemd.log()


def test_an_export_is_pulled_over_tls(service: Service) -> None:
    """By who has a certificate; the mount that it exports goes first at the end."""
    systemd, base = service.systemd, service.systemd.base
    make_authority(base)
    for name in ("server", "client"):
        (base / name).mkdir()
        make_certificate(base, name, "DNS:localhost")
        (base / name / "ca-cert.pem").write_bytes((base / "ca-cert.pem").read_bytes())
        for kind in ("cert", "key"):
            (base / f"{name}-{kind}.pem").rename(base / name / f"{name}-{kind}.pem")
    (base / f"{service.name}.export").write_text(
        f"DIRECTORY={service.path}/vm/.snap/s\nCERTIFICATES={base}/server\nPORT=10810\nOPTIONS=--ipaddr 127.0.0.1\n"
    )
    systemd("ip", "link", "set", "lo", "up")
    service.ctl("start")
    systemd("sh", "-euc", "mkdir $0/vm; seq 100000 > $0/vm/ram; mkdir $0/vm/.snap/s", service.path)
    export = f"ramfs-export@{service.name}"
    systemd("systemctl", "start", export)

    def pull(certificates: str, name: str) -> str:
        uri = f"nbds://localhost:10810/?tls-certificates={base}/{certificates}"
        return systemd("/usr/local/bin/ramfs", "pull", "--wait", uri, service.path / name, check=False)

    eventually(lambda: "each page is verified" in pull("client", "copy"), "it is pulled")
    systemd("cmp", service.path / "vm/ram", service.path / "copy/ram")
    assert pull("ca-cert.pem", "stranger") == ""
    assert systemd("ls", service.path).split() == ["copy", "vm"]
    service.ctl("stop")
    assert not mounted(service)
    shown = systemd.show(export)
    assert (shown["SubState"], shown["NRestarts"]) == ("running", "0")
    systemd("systemctl", "stop", export)
    assert systemd.show(export)["Result"] == "success"
