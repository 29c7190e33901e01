"""From scores to the rows, constraints, points and counts of a report."""

from dataclasses import replace
from pathlib import Path

import pytest

from searchmerge.evaluators.evaluator import Answer, Member, PartInfo, TaskInfo
from searchmerge.evaluators.score_kind import Mean
from searchmerge.execution.blocks import BlockScores, make_blocks
from searchmerge.plan import MergePlan
from searchmerge.report.results import Row, Searched
from searchmerge.report.tables import (
    held_out_objective,
    make_bounds,
    make_counts,
    make_details,
    make_points,
    make_rows,
    make_searched,
    told_readings,
    told_sources,
)
from searchmerge.search.confirm import Bootstrap, Contest, confirm
from searchmerge.search.grades import METRIC, Grader, Reading, Step
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.references import reference_plans
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.scores import ScoreStore
from searchmerge.search.trials import TrialRecord
from tests.search.conftest import Toy, toy_schedule
from tests.search.test_trials import plan
from tests.toy import EXPERTS

GOALS = {"math": Goal(expert="math"), "code": Goal()}


def row(name, math, code, held_out=None, is_candidate=False):
    select = {"math": math, "code": code}
    return Row(name, select, held_out or select, (0.0, 0.0, 0.0), is_candidate)


def test_rows_hold_what_was_scored_and_the_confirmed_interval(tmp_path):
    study = Toy(tmp_path)
    plans = {**reference_plans(EXPERTS), "trial 3": plan(0.5)}
    plans = {name: p for name, p in plans.items() if p.method == "task_arithmetic"}
    runner = study.runner(references=plans)
    for part in ("select", "hold_out"):
        runner.score_plans(part, plans, part)
    board = runner.board
    confirmation = confirm(
        {name: board.values(p, "hold_out") for name, p in plans.items()},
        Contest(["trial 3"], ["trial 3"]),
        dict.fromkeys(EXPERTS, Mean()),
        study.objective,
        {},
        Bootstrap(0.9, 100, 0),
    )
    every = dict.fromkeys(plans, tuple(EXPERTS))
    rows = make_rows(board, plans, {"trial 3"}, confirmation, every)
    assert [r.name for r in rows] == list(plans)
    assert [r.name for r in rows if r.is_candidate] == ["trial 3"]
    assert rows[-1].select == board.scores(plan(0.5), "select")
    assert rows[-1].hold_out == board.scores(plan(0.5), "hold_out")
    value, low, high = rows[-1].objective
    assert value == pytest.approx(study.objective.scalar(rows[-1].hold_out))
    assert low < value < high
    *others, winner = rows
    assert winner.lead == ()
    for other in others:
        lead, low, high = other.lead
        assert lead == pytest.approx(winner.objective[0] - other.objective[0])
        assert low <= lead <= high
    without = make_rows(board, plans, {"trial 3"}, replace(confirmation, single=("math",)), every)
    assert [r.lead for r in without] == [*(r.lead[:1] for r in others), ()]
    study.directory.close()


def test_details_are_held_out_means_by_member_and_by_other_metric(tmp_path):
    members = (Member("small", 4, 0.4), Member("large", 6, 0.6))
    info = TaskInfo(10, "acc", members=members, other_metrics=("f1",), keeps_answers=True)
    blocks = make_blocks("math", "hold_out", (9, 0, 4, 2), info, 2)
    schedule = Schedule.interleaved(
        {"math": info}, {"hold_out": {"math": blocks}}, round_blocks=1, seed=0
    )
    plans = {"TIES": plan(0.1), "trial 3": plan(0.2)}
    store = ScoreStore(tmp_path / "scores.db")
    for factor, scored in enumerate(plans.values(), 1):
        for block in blocks:
            values = tuple(factor * example / 100 for example in block.examples)
            answers = tuple(Answer(e, {"f1": factor * e / 10}) for e in block.examples)
            store.put(scored, [BlockScores(block, values, answers)])
    details = make_details(Scoreboard(schedule, store), plans, ["TIES", "trial 3"])
    store.close()
    assert [(d.task, d.name, d.n_examples) for d in details] == [
        ("math", "f1", 4),
        ("math", "small", 2),
        ("math", "large", 2),
    ]
    assert details[0].scores == pytest.approx({"TIES": 0.375, "trial 3": 0.75})
    assert details[1].scores == pytest.approx({"TIES": 0.01, "trial 3": 0.02})
    assert details[2].scores == pytest.approx({"TIES": 0.065, "trial 3": 0.13})


def test_held_out_scores_are_relative_to_what_experts_and_base_score_there():
    objective = Objective("normalised", GOALS).relative_to({"math": 0.9}, {"math": 0.1})
    rows = [
        row("base", 0.1, 0.1, {"math": 0.2, "code": 0.3}),
        row("expert math", 0.9, 0.1, {"math": 0.8, "code": 0.0}),
    ]
    experts = {"math": "expert math", "code": "expert code"}
    held_out, undivided = held_out_objective(objective, rows, experts)
    assert undivided == ()
    assert held_out.expert_scores == {"math": 0.8}
    assert held_out.base_scores == {"math": 0.2, "code": 0.3}


def test_no_bound_is_infinite_where_an_expert_or_the_base_scores_0_held_out():
    constraints = (Constraint("math", "expert", 0.9), Constraint("math", "base", 1.0))
    objective = Objective("normalised", GOALS, constraints=constraints)
    objective = objective.relative_to({"math": 0.8}, {"math": 0.2})
    nothing = {"math": 0.0, "code": 0.0}
    rows = [row("base", 0.2, 0.1, nothing), row("expert math", 0.8, 0.1, nothing)]
    winner = row("trial 3", 0.72, 0.6, {"math": 0.6, "code": 0.4})
    held_out, undivided = held_out_objective(objective, rows, {"math": "expert math"})
    assert undivided == ("its own expert on math", "the base on math")
    bounds = make_bounds(winner, objective, held_out)
    assert [b.hold_out for b in bounds] == pytest.approx([0.6 / 0.8, 0.6 / 0.2])


def test_bounds_show_the_value_that_each_constraint_is_held_against():
    constraints = (Constraint("math", "expert", 0.9), Constraint("code", "score", 0.5))
    objective = Objective("normalised", GOALS, constraints=constraints)
    winner = row("trial 3", 0.72, 0.6, {"math": 0.6, "code": 0.4})
    select, held_out = (
        objective.relative_to({"math": 0.8}, {}),
        objective.relative_to({"math": 0.5}, {}),
    )
    of_expert, of_score = make_bounds(winner, select, held_out)
    assert (of_expert.at_least, of_expert.select, of_expert.hold_out) == pytest.approx(
        (0.9, 0.72 / 0.8, 0.6 / 0.5)
    )
    assert (of_score.at_least, of_score.select, of_score.hold_out) == pytest.approx(
        (0.5, 0.6, 0.4)
    )


def test_points_are_the_full_trials_and_the_references():
    objective = Objective("tasks", GOALS).relative_to({"math": 0.5}, {})
    scores = [(0.5, 0.1), (0.1, 0.5), (0.05, 0.05), (0.9, 0.9)]
    records = [
        TrialRecord(i, plan(i), stopped_after=4 if i == 3 else None).judged(
            objective, {"math": math, "code": code}
        )
        for i, (math, code) in enumerate(scores)
    ]
    rows = [row("TIES", 0.25, 0.2), row("trial 0", 0.5, 0.1, is_candidate=True)]
    points = make_points(records, rows, objective)
    assert [(p.name, p.kind) for p in points] == [
        ("trial 0", "front"), ("trial 1", "front"), ("trial 2", "trial"), ("TIES", "reference"),
    ]  # fmt: skip
    assert points[-1].values == pytest.approx({"math": 0.5, "code": 0.2})
    assert make_points(records, rows, Objective("mean", GOALS)) == []


def test_every_trial_is_counted_once_by_what_became_of_it():
    objective = Objective("mean", GOALS)
    scored = {"math": 0.5, "code": 0.5}
    records = [
        TrialRecord(0, plan(0)).judged(objective, scored),
        TrialRecord(1, plan(1), stopped_after=3).judged(objective, scored),
        TrialRecord(2, plan(2), stopped_after=3, is_completed=True).judged(objective, scored),
        TrialRecord(3, plan(3), failure="NaN"),
    ]
    counts = {
        "trials in full": 1,
        "trials stopped early": 2,
        "of these scored in full since": 1,
        "trials failed": 1,
        "select examples": 60,
        "hold-out examples": 60,
        "search seconds": 13,
    }
    assert make_counts(records, toy_schedule(), 12.6, 0.0) == counts
    refined = TrialRecord(4, plan(4), refines="TIES").judged(objective, scored)
    assert make_counts([*records, refined], toy_schedule(), 12.6, 4.4) == {
        **counts,
        "trials in full": 2,
        "of these refined": 1,
        "refining seconds": 4,
    }
    again = TrialRecord(5, plan(3), repeats=3, failure="NaN")
    assert make_counts([*records[:3], again], toy_schedule(), 12.6, 0.0) == {
        **counts,
        "trials tried again after they failed": 1,
    }


def test_trials_are_told_by_method_and_by_whether_experts_have_their_own_numbers():
    objective = Objective("mean", dict.fromkeys(EXPERTS, Goal()))

    def trial(number, coefficients, score, stopped_after=None):
        record = TrialRecord(
            number,
            MergePlan("ties", ("a", "b"), {"coefficient": (coefficients,)}),
            stopped_after=stopped_after,
        )
        return record.judged(objective, dict.fromkeys(EXPERTS, score))

    told = make_searched(
        [trial(0, (1.0, 1.0), 0.5), trial(1, (0.5, 0.5), 0.7, 4), trial(2, (1.0, 0.5), 0.9)]
    )
    assert told == [
        Searched("ties, a coefficient each", 1, 1, pytest.approx(0.9)),
        Searched("ties, one coefficient", 2, 1, pytest.approx(0.7)),
    ]


def test_how_tasks_are_read_is_told_in_words():
    readings = {
        "read": Reading((Step(0.2, 1.0, 0.1), Step(0.3, 2.0, 0.1)), 0.75),
        "not": Reading((), 0.3),
        "against": Reading((), -0.6),
        "few": METRIC,
    }
    told = told_readings(Grader(readings))
    assert told["read"].startswith("50 % by how clearly")
    assert told["read"].endswith("a correlation of +0.75")
    assert "does not tell better" in told["not"]
    assert "contradicts: over the plans the two have a correlation of -0.60" in told["against"]
    assert "too few plans" in told["few"]


def test_files_that_parts_are_drawn_from_are_named_from_the_studys_folder():
    parts = (PartInfo("split 'train' of /here/a.jsonl", 20), PartInfo("/there/b.jsonl", 30))
    tasks = {"apart": TaskInfo.of_parts(*parts), "math": TaskInfo(20)}
    blocks = {
        part: {name: make_blocks(name, part, examples, info, 4) for name, info in tasks.items()}
        for part, examples in (("pilot", range(4)), ("hold_out", range(20, 24)))
    }
    schedule = Schedule.interleaved(tasks, blocks, round_blocks=1, seed=0)
    assert told_sources(schedule, Path("/here")) == {
        "apart": {"select": "split 'train' of a.jsonl", "hold_out": "/there/b.jsonl"}
    }
