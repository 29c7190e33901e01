"""The report of a study that was stopped."""

from dataclasses import replace

import pytest

from searchmerge.plan import Groups
from searchmerge.report.interim import InterimReport, InterimRow
from tests.search.test_trials import plan


@pytest.fixture
def make_report():
    """Make the report of a study of two tasks, one reference and one trial."""

    def make(**changes):
        fields = {
            "study": "<toy>",
            "stage": "during the search",
            "tasks": {"math": "acc", "code": "macro_f1"},
            "objectives": ("normalised",),
            "rows": [
                InterimRow("TIES", {"math": 0.5, "code": 0.25}, (0.9,)),
                InterimRow("trial 3", {"math": 0.75, "code": 0.5}, (1.1,)),
            ],
            "best": "trial 3",
            "plan": plan(0.5),
            "counts": {"trials in full": 3, "search seconds": 12},
        }
        return InterimReport(**{**fields, **changes})

    return make


def test_it_says_what_there_is_that_it_is_not_confirmed_and_how_it_goes_on(make_report, tmp_path):
    run_dir = tmp_path / "a b"
    run_dir.mkdir()
    make_report().save(run_dir)
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# &lt;toy&gt;: stopped, not confirmed\n")
    assert "The best plan so far is that of trial 3; it is not confirmed." in text
    assert "With\n`scores: graded` how clearly examples were answered counts" in text
    assert "|  | math | code | normalised, select |" in text
    assert "| TIES | 50.0 | 25.0 | 90.0 |" in text
    assert "| **trial 3** | **75.0** | **50.0** | **110.0** |" in text
    assert f"`searchmerge finish '{run_dir}'`" in text
    assert plan(0.5).to_yaml().rstrip() in text
    assert "Counts: trials in full 3, search seconds 12." in text


def test_of_a_plan_of_many_numbers_it_names_the_file(make_report, tmp_path):
    groups = Groups.of_tensors([f"layers.{i}.weight" for i in range(400)])
    rows = tuple((i / 1000, 1.0, 0.5) for i in range(400))
    fine = replace(plan(0.5), values={"coefficient": rows}, groups=groups)
    text = make_report(plan=fine).markdown(tmp_path)
    assert "all of them are in `plans/best-so-far.yaml`" in text
    assert len(text.splitlines()) < 40


def test_constraints_that_the_best_breaks_are_named(make_report, tmp_path):
    text = make_report(broken=["math at least 0.9", "code at least 1 of base"]).markdown(tmp_path)
    assert (
        "The best plan so far is that of trial 3, though it breaks math at least 0.9, code at "
        "least 1 of base: none keeps every constraint; it is not confirmed."
    ) in text


def test_trials_that_failed_are_told(make_report, tmp_path):
    text = make_report(failed="2 of 5 trials failed, as: <nan>.").markdown(tmp_path)
    assert "search seconds 12.\n\n2 of 5 trials failed, as: &lt;nan&gt;.\n\n## The best" in text


def test_without_a_merge_there_is_no_best(make_report, tmp_path):
    text = make_report(rows=[], best="", plan=None, stage="among the references").markdown(
        tmp_path
    )
    assert "stopped among the references. No merge has been scored in full yet." in text
    assert "there is nothing to confirm and to save" in text
    assert "searchmerge finish" not in text
    assert "The best plan so far" not in text


def test_before_the_experts_are_scored_there_are_scores_and_no_objective(make_report, tmp_path):
    rows = [InterimRow("base", {"math": 0.75, "code": 0.5}, ())]
    text = make_report(rows=rows, objectives=(), best="", plan=None).markdown(tmp_path)
    assert "|  | math | code |\n|---|---|---|\n| base | 75.0 | 50.0 |" in text


def test_each_objective_has_its_column(make_report, tmp_path):
    rows = [InterimRow("trial 3", {"math": 0.75, "code": 0.5}, (1.1, 0.8))]
    text = make_report(rows=rows, objectives=("math", "code")).markdown(tmp_path)
    assert "|  | math | code | math, normalised | code, normalised |" in text
    text = make_report(rows=rows, objectives=("math", "code"), raw=("code",)).markdown(tmp_path)
    assert "| math, normalised | code, raw |" in text
    assert "| **trial 3** | **75.0** | **50.0** | **110.0** | **80.0** |" in text


def test_the_report_of_a_confirmed_end_stays(make_report, make_results, tmp_path):
    make_results().save(tmp_path)
    before = (tmp_path / "report.md").read_text()
    make_report().save(tmp_path)
    assert (tmp_path / "report.md").read_text() == before
