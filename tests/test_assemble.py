"""Wiring: from a study and a config to live objects."""

import re
from types import SimpleNamespace

import pytest

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.evaluators.evaluator import Origin, TaskInfo
from searchmerge.merging.native.compiler import has_compiler
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.merging.compiling import needs_compiler
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
    ("config", "way"),
    [
        ({"engine": "auto"}, "torch, uncompiled"),
        ({"engine": "compiled"}, "torch's compiler"),
        ({"engine": "eager"}, "torch, uncompiled"),
        ({"executor": "ray", "engine": "auto"}, "torch, uncompiled"),
        ({"executor": "ray", "ray": {"address": "auto"}}, "C++ on workers that have a compiler"),
        (
            {"executor": "ray", "ray": {"address": "auto"}, "engine": "eager"},
            "torch, uncompiled",
        ),
    ],
)
def test_how_merges_are_computed_is_said_where_there_is_no_compiler(monkeypatch, config, way):
    monkeypatch.setenv("CXX", "/no/compiler")
    has_compiler.cache_clear()
    try:
        assert assemble.way_of_merging(RunConfig(device="cpu", **config)) == way
    finally:
        has_compiler.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("engine", "way"),
    [("auto", "C++"), ("compiled", "C++"), ("eager", "torch, uncompiled")],
)
def test_how_merges_are_computed_is_said_where_there_is_a_compiler(engine, way):
    assert assemble.way_of_merging(RunConfig(device="cpu", engine=engine)) == way


def shared(**second):
    """Return tasks of which two have the same definition."""
    task = {"task": "tiny_first", "split": "validation"}
    return {"first": task, "second": {**task, **second}}


def parts_of(study, origins):
    infos = {name: TaskInfo(40, origins=its) for name, its in origins.items()}
    schedule = assemble.make_schedule(study, infos)
    return {
        (name, part): {example for block in blocks for example in block.examples}
        for part, by_task in schedule.blocks.items()
        for name, blocks in by_task.items()
    }


def test_tasks_with_the_same_examples_are_divided_alike(tmp_path):
    study = read_study(make_study(tmp_path, tasks=shared()))
    same = (Origin("a file", range(40)),)
    parts = parts_of(study, {"first": same, "second": same})
    assert parts["first", "pilot"] == parts["second", "pilot"]
    assert parts["first", "hold_out"] == parts["second", "hold_out"]
    other = (Origin("another file", range(40)),)
    apart = parts_of(study, {"first": same, "second": other})
    assert apart["first", "pilot"] == parts["first", "pilot"]
    assert apart["first", "pilot"] != apart["second", "pilot"]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [({"select": 30}, range(40)), ({}, range(39, -1, -1))],
    ids=["counts", "rows"],
)
def test_it_is_said_that_a_task_holds_out_rows_which_another_selects_on(
    tmp_path, caplog, keys, rows
):
    study = read_study(make_study(tmp_path, tasks=shared(**keys)))
    message = (
        r"tasks\.(first|second): trials see \d+ of the \d+ examples that it holds out in "
        r"task '\w+', as both have rows of a file"
    )
    origins = {"first": (Origin("a file", range(40)),), "second": (Origin("a file", rows),)}
    parts_of(study, origins)
    assert re.search(message, caplog.text)


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
    assert list(assemble.left_out(study, models)) == slow
    assert ("taking every matrix of models of this size apart" in caplog.text) == bool(slow)
