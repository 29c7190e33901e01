"""How many processors a process may use, how its threads wait, and whether others use them too."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from searchmerge.machine import (
    SOON_ASLEEP,
    available_cores,
    cpu_quota,
    crowding,
    others_running,
    wait_asleep,
)


@pytest.fixture
def machine(tmp_path):
    """Write control groups and what the kernel says of this process; return both folders."""

    def machine(own, files):
        proc, groups = tmp_path / "proc", tmp_path / "groups"
        proc.mkdir()
        (proc / "cgroup").write_text(own)
        for name, text in files.items():
            file = groups / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return groups, proc

    return machine


QUOTAS = {
    "none": ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
    "no files": ("0::/\n", {}, float("inf")),
    "of the container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "of a group around": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000", "cpu.max": "max 100000"},
        0.5,
    ),
    "seen from within": ("0::/outer/path\n", {"cpu.max": "300000 100000"}, 3.0),
    "first version": (
        "4:memory:/x\n2:cpu,cpuacct:/x\n",
        {
            "cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n",
            "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            "memory/x/cpu.cfs_quota_us": "1\n",
        },
        2.0,
    ),
    "first version without": (
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        float("inf"),
    ),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_the_tightest_quota_of_all_control_groups_counts(machine, name):
    own, files, expected = QUOTAS[name]
    assert cpu_quota(*machine(own, files)) == expected


def test_a_quota_below_one_processor_leaves_one(machine):
    assert available_cores(*machine("0::/\n", {"cpu.max": "50000 100000"})) == 1


def test_without_a_quota_the_affinity_mask_counts():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from searchmerge.machine import available_cores; print(available_cores())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "1"


ENTRIES = {
    "the command line": (
        "import sys; sys.argv = ['searchmerge', 'status', 'nowhere']\n"
        "from searchmerge.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
    ),
    "a Ray worker": "import searchmerge.execution.ray\n",
}


def openmp(entry, **more):
    """Return what torch's OpenMP was told, and how many threads torch has."""
    code = f"{ENTRIES[entry]}import torch; print('threads', torch.get_num_threads())"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **more},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("entry", ENTRIES)
def test_threads_that_wait_are_asleep(entry):
    told = openmp(entry)
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("torch is built with another OpenMP than GNU's")
    ways = ["GOMP_SPINCOUNT = '3000'", "GOMP_SPINCOUNT = '0'"]  # by what else runs here
    assert any(way in told for way in ways)
    assert not any(way in openmp(entry, OMP_WAIT_POLICY="active") for way in ways)


@pytest.mark.parametrize(("n_others", "spins"), [(0, "3000"), (1, "3000"), (2, "0"), (9, "0")])
def test_where_others_are_at_work_threads_sleep_at_once(n_others, spins, monkeypatch):
    for name in ("OMP_WAIT_POLICY", *SOON_ASLEEP):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("searchmerge.machine.others_running", lambda: n_others)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    wait_asleep()
    assert os.environ["GOMP_SPINCOUNT"] == spins
    for name in SOON_ASLEEP:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("told", "n_others"),
    [
        (["0.5 0.4 0.3 1/200 77"] * 3, 0),
        (["0.5 0.4 0.3 4/200 77", "0 0 0 1/200 77", "0 0 0 3/200 77"], 2),  # most of the time
        (["nothing"], 0),
        ([""], 0),
    ],
)
def test_other_threads_that_run_are_counted_as_linux_tells_them(told, n_others, monkeypatch):
    texts = iter(told)
    load = SimpleNamespace(read_text=lambda encoding: next(texts))
    monkeypatch.setattr("searchmerge.machine._LOAD", load)
    monkeypatch.setattr("searchmerge.machine._LOOKS", len(told))
    assert others_running() == n_others


def test_where_nothing_tells_of_others_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("searchmerge.machine._LOAD", tmp_path / "missing")
    assert others_running() == 0


def test_there_are_as_many_threads_as_the_processors_allow_unless_the_environment_says():
    assert f"threads {available_cores()}" in openmp("the command line")
    assert "threads 1" in openmp("the command line", OMP_NUM_THREADS="1")


def test_a_crowded_machine_is_named():
    assert crowding(8.06, 2) == "load 8.1 on 2 processors"
    assert crowding(2.4, 2) == ""
    assert crowding(1e9).startswith("load 1000000000.0 on ")
