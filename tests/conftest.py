"""What every test gets: room on a real disk and in memory, and a judge of what it leaves behind.

Each run works below a directory of its own, so that several can run at once. The run holds a lock there;
a directory whose lock is free belongs to a run that was killed, and is swept with the mounts in it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
from harness import Mount, MountFailed, mounts_below, unmount
from hypothesis import HealthCheck, settings

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}

# A real disk for most; /var/tmp is one even where /tmp is a tmpfs.
DISK = Path(os.environ.get("RAMFS_TEST_DIR", "/var/tmp")) / f"ramfs-tests-{os.getuid()}"
MEMORY = Path("/dev/shm") / f"ramfs-tests-{os.getuid()}"

_disk_dir = pytest.StashKey[Path]()
_memory_dir = pytest.StashKey[Path]()
_locks = pytest.StashKey[list[int]]()

# No deadlines: a shared machine stalls at times. In CI the same examples each time.
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile(
    "ci", settings.get_profile("dev"), derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if IN_CI else "dev")


# --- the run's directories ---


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_locks] = []
    for key, base in ((_disk_dir, DISK), (_memory_dir, MEMORY)):
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        turn = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(turn, fcntl.LOCK_EX)  # or another run could sweep this one's directory before its lock
        _sweep_stale_runs(base)
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=base))
        config.stash[key] = directory
        config.stash[_locks].append(_lock(directory))
        os.close(turn)
    if config.option.basetemp is None or is_worker(config):  # xdist's would be too long for sockets in it
        config.option.basetemp = str(config.stash[_disk_dir] / "t")


def is_worker(config: pytest.Config) -> bool:
    """Is this one of several processes that share a run (pytest -n)?"""
    return hasattr(config, "workerinput")


@pytest.hookimpl(trylast=True)  # when the workers have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    if is_worker(session.config):
        return
    left = [mount for base in (DISK, MEMORY) for run in base.glob("run-*") for mount in _left_in(run, session.config)]
    if left:
        print(f"\nERROR: mounts were left behind: {', '.join(map(str, left))}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _left_in(run: Path, config: pytest.Config) -> list[Path]:
    """The mounts in the directory of this run, or of another that has ended."""
    if run not in (config.stash[_disk_dir], config.stash[_memory_dir]):
        lock = _lock(run)
        if lock < 0:
            return []
        os.close(lock)
    return mounts_below(run)


def pytest_unconfigure(config: pytest.Config) -> None:
    for key in (_disk_dir, _memory_dir):
        if key in config.stash:
            _remove(config.stash[key])
    for lock in config.stash[_locks]:
        os.close(lock)


def _sweep_stale_runs(base: Path) -> None:
    for directory in base.glob("run-*"):
        lock = _lock(directory)
        if lock >= 0:
            _remove(directory)
            os.close(lock)


def _lock(directory: Path) -> int:
    """Lock a run's directory and return the descriptor that holds it, or -1 when a living run does."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return -1
    return lock


def _remove(directory: Path) -> None:
    """Remove a run's directory, its mounts first: never a file through a mount."""
    for point in mounts_below(directory):
        unmount(point, lazy=True)
    subprocess.run(["rm", "-rf", directory], check=False)  # trees may be deeper than Python can recurse


# --- what takes long comes first ---


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that boot guests or are slow, then the largest: workers get whole files (tools/test), and a
    long one at the end would leave the others idle."""
    long = {item.path for item in items if item.get_closest_marker("vm") or item.get_closest_marker("slow")}
    size = {path: path.stat().st_size for path in {item.path for item in items}}
    items.sort(key=lambda item: (item.path not in long, -size[item.path]))  # stable: each file's stay in order


# --- in CI nothing skips ---


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    return _no_skip((yield))


def _no_skip(report: pytest.TestReport | pytest.CollectReport) -> pytest.TestReport | pytest.CollectReport:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI nothing skips: {report.longrepr}"
    return report


# --- what coverage measures ---

#: Folders of tests whose daemons do what those of the others do as well.
USUAL_DAEMONS = {"migrate", "power", "qmp", "review", "transfer", "vm"}


@pytest.fixture(scope="module", autouse=True)
def _daemons_measured(request: pytest.FixtureRequest) -> None:
    harness.daemons_measured = request.path.parent.name not in USUAL_DAEMONS


# --- what a test may use ---


@pytest.fixture
def shm(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on tmpfs, for stores at RAM speed."""
    directory = Path(tempfile.mkdtemp(dir=request.config.stash[_memory_dir]))
    yield directory
    _remove(directory)


@pytest.fixture(scope="module")
def module_shm(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The same for all tests of a module."""
    directory = Path(tempfile.mkdtemp(dir=request.config.stash[_memory_dir]))
    yield directory
    _remove(directory)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """A fresh store, mounted; unmounted and judged after the test (see harness.Mount)."""
    with Mount(tmp_path / "store", tmp_path / "mnt") as mount:
        yield mount


@pytest.fixture
def make_mount(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Make mounts by `make_mount(name="mnt", options=())`; all are unmounted and judged after the test.

    Each has a store of its own beside it, `NAME.store`, unless `store=` gives another.
    """
    made: list[Mount] = []

    def make(name: str = "mnt", *, store: Path | None = None, **more: object) -> Mount:
        mount = Mount(store or tmp_path / f"{name}.store", tmp_path / name, **more)
        made.append(mount)
        return mount.start()

    yield make
    failures = []
    for mount in reversed(made):
        try:
            mount.__exit__(None, None, None)
        except MountFailed as error:
            failures.append(error)
    if failures:
        raise failures[0]


@pytest.fixture
def expect_log(_judge_log: list[re.Pattern[str]]) -> Callable[[str], None]:
    """Announce warnings or errors in the test's own log: `expect_log("regular expression")`."""
    return lambda pattern: _judge_log.append(re.compile(pattern))


@pytest.fixture(autouse=True)
def _judge_log() -> Iterator[list[re.Pattern[str]]]:
    """Fail a test whose own process logs a warning or an error that was not announced."""
    expected: list[re.Pattern[str]] = []
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield expected
    logging.getLogger().removeHandler(handler)
    for record in records:
        line = f"{record.levelname} {record.name}: {record.getMessage()}"
        if not any(pattern.search(line) for pattern in expected):
            pytest.fail(f"logged without being announced by expect_log: {line}", pytrace=False)


@pytest.fixture(autouse=True)
def _judge_mounts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a mount in its own directories, and take that mount down."""
    yield
    own = [path for name in ("tmp_path", "shm") if (path := request.node.funcargs.get(name)) is not None]
    left = mounts_below(*own)
    for point in left:
        unmount(point, lazy=True)
    if left:
        pytest.fail(f"left mounted: {', '.join(map(str, left))}", pytrace=False)
