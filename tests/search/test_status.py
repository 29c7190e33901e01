"""What is shown of a study is what the study would do."""

import os
import socket
from pathlib import Path
from sqlite3 import dbapi2

import numpy as np
import pytest

from searchmerge.plan import MergePlan
from searchmerge.search.candidates import best_candidates, candidates
from searchmerge.search.directory import locked
from searchmerge.search.objective import Constraint, Objective
from searchmerge.search.racing import Racing
from searchmerge.search.status import describe_status, read_status
from tests.search.conftest import OPTIMUM
from tests.toy import ToyEvaluator


def test_a_plan_that_breaks_a_constraint_is_not_shown_as_the_best(toy):
    free = toy(run_dir="free")
    free.run(20, references={})
    highest = max(free.directory.records(), key=lambda record: record.value)
    bound = highest.scores["code"] + 0.001
    study = toy()
    study.objective = Objective(
        "mean", study.objective.goals, constraints=(Constraint("code", "score", bound),)
    )
    study.run(20, references={})
    [picked] = best_candidates(
        candidates(study.directory.records(), study.objective), 1, [], lambda plan: {}
    )
    best = read_status(study.directory.run_dir)["best"]
    assert best[0]["trial"] == picked.number != highest.number
    assert all(shown["scores"]["code"] >= bound for shown in best)
    assert "breaks" not in "".join(describe_status(study.directory.run_dir))


def test_where_no_plan_keeps_the_constraints_that_is_said(toy):
    study = toy()
    study.objective = Objective(
        "mean", study.objective.goals, constraints=(Constraint("math", "score", 2.0),)
    )
    study.run(3, references={})
    lines = describe_status(study.directory.run_dir)[1:4]
    assert all(line.endswith("breaks a constraint") for line in lines)


@pytest.mark.parametrize("pick", ["mean", "worst"])
def test_of_a_front_the_plan_that_is_picked_comes_first(toy, pick):
    study = toy(n_objectives=3)
    study.objective = Objective("tasks", study.objective.goals, pick=pick)
    study.run(20, references={})
    [picked] = best_candidates(
        candidates(study.directory.records(), study.objective), 1, [], lambda plan: {}
    )
    assert read_status(study.directory.run_dir)["best"][0]["trial"] == picked.number


def test_failed_trials_are_told_with_a_reason_and_how_many_wait_to_be_tried_again(toy):
    toy(evaluator=ToyEvaluator(fails=lambda c: c[1] > 0.3)).run(8)
    study = toy()
    n_failed = sum(record.value is None for record in study.directory.records())
    first, told, *_ = describe_status(study.directory.run_dir)
    assert f", 0 running, {n_failed} failed, " in first
    assert told.startswith(f"{n_failed} of 8 trials failed, as: task ")
    status = read_status(study.directory.run_dir)
    [(reason, n_alike)] = status["failures"].items()
    assert reason in told
    assert n_alike == status["trials"]["fail"] == n_failed
    study.directory.enqueue_failed()
    first, *others = describe_status(study.directory.run_dir)
    assert f", 0 failed, {n_failed} to be tried again, " in first
    assert not any("trials failed" in line for line in others)
    study.run(8)
    first, *_ = describe_status(study.directory.run_dir)
    assert first.startswith("toy: 8 trials complete (0 stopped early), 0 running, 0 failed, ")


def test_references_are_named(toy):
    study = toy()
    study.run(6)
    lines = describe_status(study.directory.run_dir)
    assert lines[0].startswith("toy: 6 trials complete (0 stopped early), 0 running, 0 failed")
    assert any(line.endswith("task arithmetic") for line in lines)
    kinds = {b["trial"]: b["kind"] for b in read_status(study.directory.run_dir)["best"]}
    assert kinds[4] == "task arithmetic"
    assert kinds.get(5, "") == ""


class StopsAtTheSecond(ToyEvaluator):
    """Is interrupted as it scores its second plan, and never again."""

    def score(self, model, task, examples):
        is_first = not self.scored or self.scored[0][0] == model.coefficients
        if not is_first and not self.is_stopped:
            self.is_stopped = True
            raise KeyboardInterrupt
        return super().score(model, task, examples)

    is_stopped = False


def test_a_trial_that_a_stopped_run_left_behind_is_not_called_running(toy):
    study = toy(evaluator=StopsAtTheSecond())
    with pytest.raises(KeyboardInterrupt):
        study.run(3, references={})
    first, *_ = describe_status(study.directory.run_dir)
    assert first.startswith("toy: 1 trial complete (0 stopped early), 1 to be taken up again, 0 ")
    status = read_status(study.directory.run_dir)
    assert (status["trials"]["running"], status["at_work"]) == (1, False)
    again = toy()
    with locked(study.directory.run_dir):
        again.directory.begin_run()
        assert ", 1 running, " in describe_status(study.directory.run_dir)[0]
        again.run(3, references={})
    assert ", 0 running, " in describe_status(study.directory.run_dir)[0]


def test_a_run_that_holds_its_directory_no_more_is_not_called_running(toy):
    study = toy(evaluator=StopsAtTheSecond())
    run_dir = study.directory.run_dir
    with pytest.raises(KeyboardInterrupt):
        study.run(3, references={})
    with locked(run_dir):
        study.directory.begin_run()  # and is killed
        assert read_status(run_dir)["at_work"]
    first, second, *_ = describe_status(run_dir)
    assert ", 1 to be taken up again, " in first
    assert second.startswith(
        "its last run ended abruptly, by a kill, say: the same command goes on"
    )
    status = read_status(run_dir)
    assert (status["at_work"], status["ended_abruptly"]) == (False, True)
    study.directory.end_run()
    assert not read_status(run_dir)["ended_abruptly"]


def test_a_run_that_begins_or_ends_while_it_is_looked_at_did_not_end_abruptly(toy, monkeypatch):
    study = toy()
    study.run(2, references={})
    study.directory.begin_run()
    for looks in ([True, False], [False, True]):
        each = iter(looks)
        monkeypatch.setattr(
            "searchmerge.search.status.is_held", lambda run_dir, each=each: next(each)
        )
        status = read_status(study.directory.run_dir)
        assert (status["at_work"], status["ended_abruptly"]) == (True, False)


@pytest.mark.parametrize("was_cut_off", [False, True])
def test_a_directory_that_cannot_be_written_to_is_shown_as_it_is(toy, monkeypatch, was_cut_off):
    """As on a mount that is read only, or of somebody else's: nothing is known of its lock."""
    study = toy()
    study.run(3, references={})
    if was_cut_off:
        study.directory.begin_run()
    run_dir = study.directory.run_dir
    study.directory.close()
    best = read_status(run_dir)["best"]
    access, opened = os.access, []
    monkeypatch.setattr(os, "access", lambda path, mode: path != run_dir and access(path, mode))
    monkeypatch.setattr("searchmerge.search.status.is_held", lambda _: None)
    connect = dbapi2.connect
    monkeypatch.setattr(dbapi2, "connect", lambda *a, **k: opened.append(a[0]) or connect(*a, **k))
    kept = {file.name: file.stat().st_mtime_ns for file in run_dir.iterdir()}
    status = read_status(run_dir)
    assert (status["at_work"], status["ended_abruptly"]) == (was_cut_off, False)
    assert status["best"] == best != []
    assert kept == {file.name: file.stat().st_mtime_ns for file in run_dir.iterdir()}
    assert opened
    assert not [file for file in opened if Path(file).is_relative_to(run_dir)]


def test_values_stand_below_one_another_whatever_plans_are_called(toy):
    study = toy()
    study.run(6)
    again = toy()
    again.directory.enqueue_refined("task arithmetic", OPTIMUM, {"key": "a"})
    again.run(6)
    first, *lines = describe_status(study.directory.run_dir)[:6]
    assert first.startswith("toy: 7 trials complete (0 stopped early, 1 refined), 0 running")
    assert any(line.startswith("  refined task arithmetic  ") for line in lines)
    assert len({line.index("  math") for line in lines}) == 1


def test_a_trial_that_was_completed_after_the_search_is_shown_with_its_scores(toy):
    study = toy()
    study.run(20, racing=Racing())
    run_dir = study.directory.run_dir
    stopped = next(r for r in study.directory.records() if r.stopped_after is not None)
    before = read_status(run_dir)
    assert stopped.number not in {best["trial"] for best in before["best"]}
    full = stopped.judged(study.objective, {"math": 2.0, "code": 2.0, "chat": 2.0})
    study.directory.keep_completed(full)
    after = read_status(run_dir)
    assert after["best"][0]["trial"] == stopped.number
    assert after["best"][0]["values"] == [2.0]
    assert after["stopped_early"] == before["stopped_early"]


def test_each_worker_is_shown_with_its_node_and_what_it_has_done(toy):
    study = toy()
    study.run(6)
    status = read_status(study.directory.run_dir)
    [worker] = status["workers"]
    assert (worker["name"], worker["node"]) == ("worker 1", socket.gethostname())
    assert (worker["device"], worker["doing"], worker["trials"]) == ("cpu", "idle", 6)
    assert worker["examples"] == len(study.evaluator.scored) * 4
    assert worker["examples_per_s"] > 0
    assert 0 <= status["workers_age_s"] < 60
    *_, before, line = describe_status(study.directory.run_dir)
    assert before.startswith("workers, as they were ")
    assert line.startswith("  worker 1    idle     6 trials, ")
    assert line.endswith(f" examples/s  {worker['node']}, cpu")


def test_before_a_worker_has_worked_none_is_shown(toy):
    study = toy()
    study.directory.close()
    status = read_status(study.directory.run_dir)
    assert (status["workers"], status["workers_age_s"]) == ([], None)
    assert len(describe_status(study.directory.run_dir)) == 1


class ClearlyAnswering(ToyEvaluator):
    """Right or wrong by chance, as the plan's quality says; how clearly tells of the quality."""

    def score(self, model, task, examples):
        self._noise = [float(np.random.default_rng([e, 7]).normal()) for e in examples]
        self._quality = next(iter(super().score(model, task, examples)))
        return [float(self._quality + noise > 0.6) for noise in self._noise]

    def grades(self, task, examples):
        return [self._quality + noise - 0.6 for noise in self._noise]


def test_the_best_shown_is_the_plan_that_is_written_as_the_best_so_far(toy):
    study = toy(evaluator=ClearlyAnswering())
    study.run(12, references={}, seed=0)
    run_dir, directory = study.directory.run_dir, study.directory
    read, told = directory.records(), directory.records(as_told=True)
    assert [r.scores for r in read] == [r.scores for r in told]
    assert [r.values for r in read[:8]] != [r.values for r in told[:8]]  # learnt at the eighth
    assert [r.values for r in read[8:]] == [r.values for r in told[8:]]
    status = read_status(run_dir)
    written = MergePlan.from_yaml(run_dir / "plans" / "best-so-far.yaml")
    assert written == next(r.plan for r in read if r.name == status["best_so_far"])
    assert status["best"][0]["values"] == [max(r.value for r in read)]
    assert f"best evidence so far, of references and trials: {status['best_so_far']}" in (
        describe_status(run_dir)
    )


def test_a_study_that_goes_on_reads_what_it_kept_as_it_did_before(toy):
    study = toy(evaluator=ClearlyAnswering())
    study.run(12, references={}, seed=0)
    before = [(r.values, r.estimates) for r in study.directory.records()]
    again = toy(evaluator=ClearlyAnswering())
    again.run(15, references={}, seed=0)
    assert [(r.values, r.estimates) for r in again.directory.records()[:12]] == before
