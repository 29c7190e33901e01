"""A study of a language model on Ray and in one process, through the command line."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.directory import stored_study
from searchmerge.search.status import read_status
from searchmerge.search.trials import is_refined
from tests.evaluators.classifiers import make_experts, text_tasks, write_study, write_texts
from tests.execution.conftest import STORE_BYTES
from tests.tiny import make_models, make_study
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
RUN = [sys.executable, "-W", "ignore", "-m", "searchmerge", "run"]
CONFIGS = {
    "local": {"threads": 1},
    "ray": {"executor": "ray", "threads": 1, "ray": {"workers": 2, "cpus_per_worker": 0.5}},
}


def contents(run_dir):
    """Return the trials and, by plan and block, all scores."""
    with sqlite3.connect(run_dir / "study.db") as connection:
        trials = connection.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
    with sqlite3.connect(run_dir / "scores.db") as connection:
        rows = connection.execute("SELECT digest, task, part, block, vals FROM scores").fetchall()
    return trials, {tuple(key): values for *key, values in rows}


def test_two_ray_workers_find_what_one_process_does(cluster, searchmerge, tmp_path):
    make_models(tmp_path)
    make_study(
        tmp_path,
        name="tiny",
        search={"sampler": "random", "n_trials": 6, "round_blocks": 2, "racing": "off"},
    )
    for executor, config in CONFIGS.items():
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        code, out, err = searchmerge(
            "run", "study.yaml", "--config", "config.yaml", "--runs-dir", executor
        )
        assert code == 0, err
        assert "ray" not in out.replace("ray/tiny", "").lower(), out
        assert "Actor" not in err
    trials, scores = contents(tmp_path / "ray" / "tiny")
    assert trials == [(number, "COMPLETE") for number in range(6)]
    assert contents(tmp_path / "local" / "tiny") == (trials, scores)
    results = [
        json.loads((tmp_path / executor / "tiny" / "results.json").read_text())
        for executor in CONFIGS
    ]
    assert results[0]["verdict"] == results[1]["verdict"]
    assert results[0]["winner"] == results[1]["winner"]


@pytest.fixture
def start_cluster():
    """Start clusters of one node with two CPUs, which are gone after the test."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    clusters = []

    def start():
        clusters.append(Cluster(initialize_head=True, head_node_args=node))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.shutdown()


class Command:
    """A study on a cluster that is searched until it is told to end."""

    def __init__(self, folder):
        make_models(folder)
        search = {"sampler": "random", "n_trials": 9999, "round_blocks": 1, "racing": "off"}
        make_study(folder, name="tiny", search=search)
        self._folder = folder

    def run(self, cluster, *words):
        ray = {"address": cluster.address, "workers": 1}
        config = {"executor": "ray", "threads": 1, "ray": ray, "storage": "journal:study.journal"}
        (self._folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [*RUN, "study.yaml", "--config", "config.yaml", *words]
        return subprocess.Popen(command, cwd=self._folder, stderr=subprocess.PIPE, text=True)

    def n_complete(self):
        try:
            return read_status(self._folder / "runs" / "tiny")["trials"]["complete"]
        except StudyError:  # it is not begun
            return 0


@pytest.mark.slow
def test_a_head_that_dies_ends_the_run_in_one_message_and_the_study_goes_on(
    start_cluster, tmp_path
):
    command, cluster = Command(tmp_path), start_cluster()
    process, address = command.run(cluster), cluster.address
    wait_for(lambda: command.n_complete() >= 2, seconds=120)
    cluster.head_node.kill_gcs_server()
    _, err = process.communicate(timeout=120)
    last = err.splitlines()[-1]
    place = f"the Ray head of the cluster ({address})"
    assert err.count(f"WARNING searchmerge.execution.ray.cluster: {place} does not answer") == 1
    assert last.startswith(f"error: {place} died: nothing answers at {address} for 30 s")
    assert last.endswith("once Ray runs again the same command goes on")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert process.returncode == 2
    n_before = command.n_complete()

    process = command.run(start_cluster(), "--set", f"search.n_trials={n_before + 3}")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"search ({n_before + 3}, {n_before} done before)" in err
    assert command.n_complete() == n_before + 3


MEASURES = """
import functools, pathlib, sys
from searchmerge.errors import StudyError
from searchmerge.execution.ray.cluster import RaySettings
from searchmerge.execution.ray.pool import RayExecutor
from tests.execution import workers

make = functools.partial(workers.make_tuned, pathlib.Path(sys.argv[2]), workers.HANGS)
executor = RayExecutor(make, RaySettings(sys.argv[1], workers=1))
try:
    executor.tune(workers.ROUNDS[0])
except StudyError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_head_that_dies_while_a_worker_measures_is_an_error_of_ours(start_cluster, notes):
    cluster = start_cluster()
    address, root = cluster.address, Path(__file__).parents[3]
    command = [sys.executable, "-W", "ignore", "-c", MEASURES, address, str(notes)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any(notes.glob("hangs-*")), seconds=120)
    cluster.head_node.kill_gcs_server()
    out, _ = process.communicate(timeout=120)
    assert out.startswith(f"the Ray head of the cluster ({address}) died: nothing answers at ")


REFINE = {"loss": "agreement", "steps": 12, "batch": 24, "rate": 0.1, "starts": 2}


def refinements(run_dir):
    """Return the coefficients that refinements propose, how they were found, and which do not."""
    with stored_study(run_dir) as stored:
        refined = {t.user_attrs["refines"]: t.user_attrs for t in stored.trials if is_refined(t)}
        nothing = {k: v for k, v in stored.user_attrs.items() if k.startswith("unrefined:")}
    plans = {name: MergePlan.from_dict(its["plan"]) for name, its in refined.items()}
    ways = {name: dict(its["refining"]) for name, its in refined.items()}
    how = {n: (p.method, p.groups, ways[n].pop("key"), ways[n]) for n, p in plans.items()}
    return {n: np.array(p.values["coefficient"]) for n, p in plans.items()}, how, nothing


@pytest.mark.slow
def test_two_ray_workers_refine_two_plans_as_one_process_does(cluster, searchmerge, tmp_path):
    make_experts(tmp_path, "bert")
    write_texts(tmp_path, 72)
    search = {"sampler": "random", "n_trials": 5, "round_blocks": 2, "refine": REFINE}
    write_study(tmp_path, text_tasks(select=48, hold_out=24), name="tiny", search=search)
    for executor, config in CONFIGS.items():
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        code, _, err = searchmerge(
            "run", "study.yaml", "--config", "config.yaml", "--runs-dir", executor
        )
        assert code == 0, err
        assert "WARNING" not in err
    (local, how, nothing), ray = (refinements(tmp_path / e / "tiny") for e in CONFIGS)
    assert len(how) + len(nothing) == 2
    assert how
    assert ray[2] == nothing
    assert ray[1].keys() == how.keys()
    for name, (*same, way) in how.items():
        assert list(ray[1][name][:-1]) == same
        assert ray[1][name][-1] == pytest.approx(way, rel=1e-3)
        np.testing.assert_allclose(ray[0][name], local[name], atol=2e-3)
