"""A study of a language model on Ray and in one process, through the command line."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
import yaml

from tests.tiny import make_models, make_study

pytestmark = pytest.mark.ray
RUN = [sys.executable, "-W", "ignore", "-c", "from searchmerge.cli import main; main()"]
CONFIGS = {
    "local": {"threads": 1},
    "ray": {"executor": "ray", "threads": 1, "ray": {"workers": 2, "cpus_per_worker": 0.5}},
}


def run(folder, executor):
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIGS[executor]))
    process = subprocess.run(
        [*RUN, "run", "study.yaml", "--config", "config.yaml", "--runs-dir", executor],
        cwd=folder,
        env={**os.environ, "SEARCHMERGE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return process, folder / executor / "tiny"


def contents(run_dir):
    """Return the trials and, by plan and block, all scores."""
    with sqlite3.connect(run_dir / "study.db") as connection:
        trials = connection.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
    with sqlite3.connect(run_dir / "scores.db") as connection:
        rows = connection.execute("SELECT digest, task, part, block, vals FROM scores").fetchall()
    return trials, {tuple(key): values for *key, values in rows}


def test_two_ray_workers_find_what_one_process_does(tmp_path):
    make_models(tmp_path)
    make_study(
        tmp_path,
        name="tiny",
        search={"sampler": "random", "n_trials": 6, "round_blocks": 2, "racing": "off"},
    )
    process, on_ray = run(tmp_path, "ray")
    assert "ray" not in process.stdout.replace("ray/tiny", "").lower(), process.stdout
    assert process.stderr.count("Actor") == 0
    trials, scores = contents(on_ray)
    assert trials == [(number, "COMPLETE") for number in range(6)]
    local_trials, local_scores = contents(run(tmp_path, "local")[1])
    assert trials == local_trials
    assert scores == local_scores
    results = [
        json.loads((tmp_path / executor / "tiny" / "results.json").read_text())
        for executor in CONFIGS
    ]
    assert results[0]["verdict"] == results[1]["verdict"]
    assert results[0]["winner"] == results[1]["winner"]
