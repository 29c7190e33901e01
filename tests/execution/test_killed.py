"""Studies on Ray whose driver, workers or nodes are killed while they run."""

import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from searchmerge.errors import StudyError
from searchmerge.search.directory import stored_study
from searchmerge.search.status import read_status
from tests.execution import workers
from tests.execution.conftest import STORE_BYTES
from tests.search.conftest import SPACE, Toy, toy_schedule
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
BLOCKS = sum(len(blocks) for blocks in toy_schedule().blocks["select"].values())


@pytest.fixture
def drive(tmp_path):
    """Start drivers of one study; none outlives the test."""
    processes = []

    def start(n_trials, **options):
        command = [sys.executable, "-W", "ignore", "-m", "tests.execution.driver"]
        command += [tmp_path / "run", str(n_trials)]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with (tmp_path / "driver.log").open("a") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, stderr=log))
        return processes[-1]

    (tmp_path / "run").mkdir()
    yield start
    for process in processes:
        process.kill()
        process.wait()


def rows(run_dir, query):
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(run_dir / "study.db", timeout=30)) as connection,
    ):
        return connection.execute(query).fetchall()
    return []


def finished(run_dir):
    return rows(run_dir, "SELECT number FROM trials WHERE state IN ('COMPLETE', 'FAIL')")


def params(run_dir):
    """Return each trial's number to its params."""
    found = {}
    query = (
        "SELECT number, param_name, param_value FROM trials JOIN trial_params USING (trial_id)"
        "ORDER BY number, param_name"
    )
    for number, name, value in rows(run_dir, query):
        found.setdefault(number, {})[name] = value
    return found


def check_all_scores(run_dir, n_trials, storage=None):
    """Check that every trial was scored once, as a worker in this process scores it."""
    study = Toy(run_dir, storage=storage)
    trials = study.directory.study.trials
    assert [trial.number for trial in trials] == list(range(n_trials))
    assert [trial.user_attrs for trial in trials if trial.state.name != "COMPLETE"] == []
    worker = workers.make()
    for trial in trials:
        plan = study.space.plan(trial.params)
        expected = {
            scores.block.key: scores.values
            for result in worker.score(plan, study.board.schedule.rounds["select"])
            for scores in result.scores
        }
        assert study.directory.scores.get(plan) == expected
        scores = study.board.scores(plan, "select")
        assert tuple(trial.values) == study.objective.values(scores)
    study.directory.close()
    return trials


def test_a_driver_that_is_killed_goes_on_with_the_same_trials(drive, cluster, tmp_path):
    run_dir = tmp_path / "run"
    driver = drive(14, delay_s=0.02, address=cluster.address, workers=2)
    wait_for(lambda: len(finished(run_dir)) >= 5, seconds=120)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = params(run_dir)
    status = read_status(run_dir)
    assert status["trials"]["running"] >= 1
    known = rows(run_dir, "SELECT number FROM trials WHERE state = 'RUNNING'")
    resumed = drive(14, address=cluster.address, workers=2)
    assert resumed.wait(timeout=120) == 0, (tmp_path / "driver.log").read_text()
    trials = check_all_scores(run_dir, 14)
    after = params(run_dir)
    assert all(after[number].items() >= before[number].items() for number in before)
    assert all(trials[number].values for (number,) in known)
    assert read_status(run_dir)["trials"] == {"complete": 14, "running": 0, "fail": 0}


@pytest.mark.slow
def test_300_trials_with_workers_killed_every_few_seconds_all_finish(drive, tmp_path):
    run_dir = tmp_path / "run"
    driver = drive(300, delay_s=0.03, workers=2)
    draws = random.Random(0)
    n_killed, next_kill = 0, time.monotonic() + 10
    while driver.poll() is None:
        if time.monotonic() > next_kill:
            next_kill = time.monotonic() + draws.uniform(2, 5)
            if busy := sorted(workers.busy(run_dir / "notes")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draws.choice(busy), signal.SIGKILL)
                    n_killed += 1
        time.sleep(0.05)
    assert driver.returncode == 0, (tmp_path / "driver.log").read_text()
    assert n_killed >= 10
    assert len(finished(run_dir)) == 300
    check_all_scores(run_dir, 300)


@pytest.fixture
def nodes():
    """Start a cluster of several nodes on this machine; its head is for the driver alone."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


class Kept:
    """What was scored of a study at a moment, which nobody is to score again."""

    def __init__(self, run_dir):
        with contextlib.closing(sqlite3.connect(run_dir / "scores.db", timeout=30)) as connection:
            self._rows = set(
                connection.execute("SELECT digest, task, block FROM scores").fetchall()
            )
        self._at = time.time()

    def again(self, run_dir, digests):
        """Return what was scored since, though it was kept by then."""
        blocks = toy_schedule().blocks["select"]
        index = {(task, e): b.index for task in blocks for b in blocks[task] for e in b.examples}
        return [
            (coefficients, task, examples)
            for at, coefficients, task, examples in workers.scored(run_dir / "notes")
            if at > self._at
            and any((digests[coefficients], task, index[task, e]) in self._rows for e in examples)
        ]

    def __len__(self):
        return len(self._rows)


class Watched:
    """A study in a journal that is watched from outside, as its driver goes on with it."""

    def __init__(self, run_dir):
        self.run_dir, self.kept = run_dir, []

    def n_complete(self):
        with contextlib.suppress(StudyError):  # it may not be begun
            return read_status(self.run_dir)["trials"]["complete"]
        return 0

    def wait_for_trials(self, n_more=4):
        n_before = self.n_complete()
        wait_for(lambda: self.n_complete() >= n_before + n_more, seconds=120)

    def wait_for_workers(self, n_workers):
        def n_at_work():
            return sum(worker["trials"] > 0 for worker in read_status(self.run_dir)["workers"])

        wait_for(lambda: n_at_work() == n_workers, seconds=120)

    def wait_for_loading(self, meanwhile):
        def n_loads():
            return len(list((self.run_dir / "notes").glob("loads-*")))

        n_before, done = n_loads(), meanwhile()
        wait_for(lambda: n_loads() > n_before, seconds=120)
        return done

    def keep(self):
        self.kept.append(Kept(self.run_dir))
        assert len(self.kept[-1]) > 0

    def params(self):
        with stored_study(self.run_dir) as study:
            return {trial.number: trial.params for trial in study.trials}

    def scored_again(self, plans):
        digests = {plan.values["coefficient"][0]: plan.digest for plan in plans}
        return [kept.again(self.run_dir, digests) for kept in self.kept]


@pytest.mark.slow
def test_a_study_outlives_its_nodes_its_workers_and_its_driver(drive, nodes, tmp_path):
    study, storage = Watched(tmp_path / "run"), "journal:study.journal"

    def run():
        options = {"address": nodes.address, "storage": storage, "cpus": 1.0}
        return drive(100, delay_s=0.06, load_s=2.0, **options)

    def add_node(num_cpus):
        return nodes.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)

    def leave(node):
        study.keep()
        nodes.remove_node(node, allow_graceful=False)

    _, leaves = add_node(1), add_node(1)
    driver = run()
    study.wait_for_trials()
    study.wait_for_workers(2)
    leave(leaves)
    study.wait_for_trials()
    add_node(2)
    study.wait_for_workers(3)

    driver.kill()
    driver.wait()
    study.keep()
    before, driver = study.params(), run()
    study.wait_for_trials()

    leaves = study.wait_for_loading(meanwhile=lambda: add_node(1))
    os.kill(max(workers.busy(study.run_dir / "notes")), signal.SIGKILL)
    leave(leaves)

    code, log = driver.wait(timeout=300), (tmp_path / "driver.log").read_text()
    assert code == 0, log
    assert read_status(study.run_dir)["trials"] == {"complete": 100, "running": 0, "fail": 0}
    trials = check_all_scores(study.run_dir, 100, storage)
    assert all(trials[number].params.items() >= before[number].items() for number in before)
    assert study.scored_again([SPACE.plan(trial.params) for trial in trials]) == [[], [], []]
    for told in (
        r"worker \d+ on \S+ was lost as it loaded: its node",
        r"trial \d+ lost its worker, and is tried again: .*: its node",
        r"trial \d+ lost its worker, and is tried again: .*: the worker died",
    ):
        assert re.search(told, log), log
