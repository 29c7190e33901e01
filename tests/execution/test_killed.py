"""Studies on Ray whose driver or workers are killed while they run."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from searchmerge.search.status import read_status
from tests.execution import workers
from tests.search.conftest import Toy, toy_schedule
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
BLOCKS = sum(len(blocks) for blocks in toy_schedule().blocks["select"].values())


@pytest.fixture
def drive(tmp_path):
    """Start drivers of one study; none outlives the test."""
    processes = []

    def start(n_trials, delay_s, address):
        command = [sys.executable, "-W", "ignore", "-m", "tests.execution.driver"]
        with (tmp_path / "driver.log").open("a") as log:
            processes.append(
                subprocess.Popen(
                    [*command, tmp_path / "run", str(n_trials), str(delay_s), address],
                    cwd=ROOT,
                    stderr=log,
                )
            )
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


def check_all_scores(run_dir, n_trials):
    """Check that every trial was scored once, as a worker in this process scores it."""
    study = Toy(run_dir)
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
    driver = drive(14, 0.02, cluster.address)
    wait_for(lambda: len(finished(run_dir)) >= 5, seconds=120)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = params(run_dir)
    status = read_status(run_dir)
    assert status["trials"]["running"] >= 1
    known = rows(run_dir, "SELECT number FROM trials WHERE state = 'RUNNING'")
    resumed = drive(14, 0.0, cluster.address)
    assert resumed.wait(timeout=120) == 0, (tmp_path / "driver.log").read_text()
    trials = check_all_scores(run_dir, 14)
    after = params(run_dir)
    assert all(after[number].items() >= before[number].items() for number in before)
    assert all(trials[number].values for (number,) in known)
    assert read_status(run_dir)["trials"] == {"complete": 14, "running": 0, "fail": 0}


@pytest.mark.slow
def test_300_trials_with_workers_killed_every_few_seconds_all_finish(drive, tmp_path):
    run_dir = tmp_path / "run"
    driver = drive(300, 0.03, "local")
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
