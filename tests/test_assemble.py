"""Wiring: from a study and a config to live objects."""

import pytest

from searchmerge import assemble
from searchmerge.evaluators.evaluator import TaskInfo
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
