"""A study in a real PostgreSQL server, where one is installed."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from searchmerge.errors import StudyError
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.runner import Budget
from searchmerge.search.status import read_status
from searchmerge.search.storage import close_storage, open_storage
from tests.search.conftest import SPACE, Recorder, Toy

PASSWORD = "s3cr3t/@:"
BINARIES = [
    Path(shutil.which("initdb") or "nowhere").parent,
    *Path("/usr/lib").glob("postgresql/*/bin"),
]
SERVER = next((folder for folder in BINARIES if (folder / "pg_ctl").exists()), None)
USERS = {entry.pw_name for entry in pwd.getpwall()}
USER = "postgres" if os.geteuid() == 0 and "postgres" in USERS else None

pytestmark = [
    pytest.mark.skipif(SERVER is None, reason="no PostgreSQL server is installed"),
    pytest.mark.skipif(find_spec("psycopg") is None, reason="psycopg is not installed"),
    pytest.mark.skipif(os.geteuid() == 0 and USER is None, reason="root may not run a server"),
]


@pytest.fixture(scope="module")
def server():
    """Start a server that listens on a socket only, and return the folder of the socket."""
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # sockets need short paths
    if USER is not None:
        shutil.chown(folder, USER)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)

    def call(program, *words):
        subprocess.run(
            [SERVER / program, *words],
            check=True,
            user=USER,
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )

    data = folder / "data"
    call("initdb", "-D", data, "-U", "me", "-A", "scram-sha-256", "--pwfile", folder / "password")
    options = f"-c listen_addresses='' -c fsync=off -k {folder}"
    call("pg_ctl", "start", "-w", "-D", data, "-o", options, "-l", folder / "log")
    try:
        yield folder
    finally:
        call("pg_ctl", "stop", "-m", "immediate", "-D", data)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def url(server):
    return f"postgresql://me:s3cr3t%2F%40%3A@/postgres?host={server}"


def begin(run_dir, url, name):
    run_dir.mkdir(exist_ok=True)
    return StudyDirectory(run_dir, name=name, spec={"space": SPACE.describe()}, storage=url)


def test_a_study_is_interrupted_resumed_and_read(tmp_path, url):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for stop_at in (3, None):
        toy = Toy(run_dir, storage=url)
        toy.observer = Recorder(interrupt_at=stop_at)
        with contextlib.closing(toy.directory):
            with contextlib.suppress(KeyboardInterrupt):
                toy.runner().run(toy.objective, Budget(8), None)
            trials = toy.directory.trials()
    assert [trial.number for trial in trials] == list(range(8))
    assert read_status(run_dir, url)["trials"] == {"complete": 8, "running": 0, "fail": 0}
    with pytest.raises(StudyError, match="needs a password; give --config"):
        read_status(run_dir)
    kept = b"".join(file.read_bytes() for file in run_dir.rglob("*") if file.is_file())
    assert b"postgresql+psycopg" in kept
    assert b"s3cr3t" not in kept


def test_a_wrong_password_is_refused_and_not_shown(tmp_path, url):
    with pytest.raises(StudyError, match="password authentication failed") as refused:
        begin(tmp_path / "run", url.replace("s3cr3t", "0ther"), "refused")
    assert "0ther" not in str(refused.value)


def test_of_two_directories_that_begin_at_once_never_both_go_on(tmp_path, url):
    close_storage(open_storage(tmp_path, url))  # two cannot make its tables at once
    names = [f"run{i}" for i in range(6)]

    def start(name):
        try:
            begin(tmp_path / name, url, "shared").close()
        except StudyError as error:
            assert "belongs to the run directory" in str(error)
            return None
        return name

    with ThreadPoolExecutor(len(names)) as threads:
        winners = [name for name in threads.map(start, names) if name]
    assert len(winners) <= 1
    later = [name for name in map(start, names) if name]
    assert len(later) == 1
    assert winners in ([], later)
