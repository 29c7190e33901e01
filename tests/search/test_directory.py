"""A run directory keeps its study, and what is kept of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.search.directory import (
    PLANS_DIR,
    is_held,
    locked,
    plan_file,
    records_of,
    stored_study,
)


def test_a_directory_is_held_by_one_driver(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(StudyError, match="another searchmerge is running this study"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_those_who_look_at_once_whether_a_directory_is_held_do_not_see_one_another(tmp_path):
    with locked(tmp_path):
        assert is_held(tmp_path)
    with ThreadPoolExecutor(4) as looking:
        assert not any(looking.map(is_held, [tmp_path] * 400))


def test_a_study_whose_scores_are_elsewhere_is_refused(toy, tmp_path):
    toy().run(2)
    (tmp_path / "scores.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(StudyError, match=r"scores\.db, with their scores, is not here"):
        toy()


def test_a_study_of_an_earlier_version_is_refused_before_anything_is_scored(toy):
    study = toy()
    trial = study.directory.study.ask()
    trial.set_user_attr("plan", study.space.suggest(trial).to_dict())
    trial.set_user_attr("result", {"scores": {}, "partial": None})
    study.directory.study.tell(trial, 0.5)
    study.directory.close()
    with pytest.raises(StudyError, match="trial 0 was scored by an earlier version"):
        toy()


def test_the_references_that_decide_are_those_of_the_first_run(toy):
    study = toy()
    assert study.directory.keep_deciding(["TIES", "PCB"]) == ["TIES", "PCB"]
    study.directory.close()
    resumed = toy()
    assert resumed.directory.keep_deciding(["TIES"]) == ["TIES", "PCB"]
    resumed.directory.close()


def test_how_tasks_are_scored_is_measured_once_in_a_study(toy):
    study = toy()
    assert study.directory.keep_tuning(lambda: {"math": {"growth": 2}}) == {"math": {"growth": 2}}
    study.directory.close()
    resumed = toy()
    assert resumed.directory.keep_tuning(lambda: 1 / 0) == {"math": {"growth": 2}}
    resumed.directory.close()


def test_a_study_that_scored_something_before_that_was_measured_goes_on_so(toy):
    toy().run(1)
    study = toy()
    assert study.directory.keep_tuning(lambda: 1 / 0) == {}
    study.directory.close()


def test_a_study_is_begun_with_its_first_trial(toy):
    study = toy()
    study.directory.enqueue("warm start", [{"coefficient.math": 0.5}])
    assert not study.directory.is_begun
    study.directory.study.ask()
    assert study.directory.is_begun
    study.directory.close()


def test_a_run_that_is_killed_leaves_a_mark(toy):
    study = toy()
    study.directory.begin_run()
    study.directory.close()
    killed = toy()
    assert killed.directory.was_cut_off
    killed.directory.begin_run()
    killed.directory.end_run()
    killed.directory.close()
    assert not toy().directory.was_cut_off


def test_records_are_the_same_for_the_driver_and_for_readers(toy):
    study = toy()
    study.run(6)
    records = study.directory.records()
    with stored_study(study.directory.run_dir) as stored:
        assert records == records_of(stored)
    assert [record.number for record in records] == list(range(6))
    assert len(study.directory.trials(TrialState.COMPLETE)) == 6


def test_what_was_completed_since_is_in_the_record(toy):
    study = toy()
    study.run(3)
    [first, *_] = study.directory.records()
    scores = {"math": 0.1, "code": 0.2, "chat": 0.3}
    study.directory.keep_completed(first.judged(study.objective, scores))
    [completed, second, _] = study.directory.records()
    assert completed.scores == scores
    assert completed.is_completed
    assert not second.is_completed


def test_a_study_whose_score_cache_was_emptied_is_refused(toy, tmp_path):
    toy().run(2)
    (tmp_path / "scores.db").write_bytes(b"")
    with pytest.raises(StudyError, match=r"scores\.db: has no scores of trial 0, which is comp"):
        toy()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("trial 3", "trial-3.yaml"),
        ("expert Qwen2.5-math_é", "expert-Qwen2.5-math_é.yaml"),
        ("expert ../org/math", "expert-..%2Forg%2Fmath.yaml"),
        ("expert a:b\\c%2F", "expert-a%3Ab%5Cc%252F.yaml"),
        ("expert a b", "expert-a%20b.yaml"),
        ("expert a-b", "expert-a-b.yaml"),
        ("refined trial 7", "refined-trial-7.yaml"),
    ],
)
def test_a_plan_has_a_file_of_one_folder_whatever_its_experts_are_called(tmp_path, name, file):
    assert plan_file(tmp_path, name) == tmp_path / PLANS_DIR / file


def test_how_merges_are_computed_is_kept_where_it_changes(toy):
    ways = []
    for way in ("C++", "C++", "torch", "C++"):
        directory = toy().directory
        directory.keep_way_of_merging(way)
        ways.append(directory.ways_of_merging)
        directory.close()
    assert ways == [["C++"], ["C++"], ["C++", "torch"], ["C++", "torch", "C++"]]
