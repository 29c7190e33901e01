"""A study of a language model on Ray and in one process, through the command line."""

import json
import sqlite3

import pytest
import yaml

from tests.tiny import make_models, make_study

pytestmark = pytest.mark.ray
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
