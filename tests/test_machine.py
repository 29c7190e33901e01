"""How many processors a process may use, how its threads wait, and whether others use them too."""

import os
import subprocess
import sys

import pytest

from searchmerge.machine import available_cores, cpu_quota, crowding


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
    assert "GOMP_SPINCOUNT = '3000'" in told
    assert "GOMP_SPINCOUNT = '3000'" not in openmp(entry, OMP_WAIT_POLICY="active")


def test_there_are_as_many_threads_as_the_processors_allow_unless_the_environment_says():
    assert f"threads {available_cores()}" in openmp("the command line")
    assert "threads 1" in openmp("the command line", OMP_NUM_THREADS="1")


def test_a_crowded_machine_is_named():
    assert crowding(8.06, 2) == "load 8.1 on 2 processors"
    assert crowding(2.4, 2) == ""
    assert crowding(1e9).startswith("load 1000000000.0 on ")
