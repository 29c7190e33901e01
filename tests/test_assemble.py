"""Wiring: from a study and a config to live objects."""

from types import SimpleNamespace

import pytest

from searchmerge import assemble
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.tiny import make_study


@pytest.mark.parametrize(
    ("select", "hold_out", "counts"),
    [(0.25, 0.5, (10, 20)), (0.25, None, (10, 30)), (3, 0.001, (3, 1)), (None, None, (20, 20))],
)
def test_parts_are_counted_or_fractions_of_all_examples(tmp_path, select, hold_out, counts):
    keys = {"task": "tiny_first", "split": "validation", "select": select, "hold_out": hold_out}
    tasks = {"first": {key: value for key, value in keys.items() if value is not None}}
    study = read_study(make_study(tmp_path, tasks=tasks))
    schedule = assemble.make_schedule(study, {"first": TaskInfo(40)})
    parts = ("pilot", "hold_out")
    assert counts == tuple(
        sum(len(block.examples) for block in schedule.blocks[part]["first"]) for part in parts
    )


@pytest.mark.parametrize(
    ("width", "method", "slow"),
    [
        (1000, "ties", []),
        (20000, "ties", ["TSV-M"]),
        (20000, "tsv", []),
    ],
)
def test_slow_references_are_left_out_unless_the_space_has_them(
    tmp_path, caplog, width, method, slow
):
    space = {"method": method, "coefficient": {"low": 0.0, "high": 2.0}}
    study = read_study(make_study(tmp_path, space=space))
    base = SimpleNamespace(headers={"w": SimpleNamespace(shape=(width, width))})
    models = SimpleNamespace(base=base, experts=dict.fromkeys(study.experts))
    references = assemble.references(study, models)
    every = reference_plans(study.experts)
    assert references == {name: plan for name, plan in every.items() if name not in slow}
    assert ("taking every matrix of models of this size apart" in caplog.text) == bool(slow)
