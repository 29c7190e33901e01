"""The written report, and the data that it is made of."""

import json
from dataclasses import replace

import pytest

from searchmerge.durable import read_checked, with_checksum
from searchmerge.errors import StudyError
from searchmerge.plan import Groups, MergePlan
from searchmerge.report.results import (
    LEAD,
    REPORT_FILE,
    RESULTS_FILE,
    Results,
    Searched,
    markdown_table,
)
from tests.search.test_trials import plan


def test_results_are_read_as_they_were_saved(
    make_results, bounds, points, details, drawn_from, tmp_path
):
    results = make_results(
        bounds=bounds,
        points=points,
        details=details,
        searched=[Searched("ties, one coefficient", 3, 2, 0.9)],
        readings={"math": "by the metric alone"},
        drawn_from=drawn_from,
    )
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    assert sorted(file.name for file in tmp_path.iterdir()) == [REPORT_FILE, RESULTS_FILE]
    data = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert data["rows"][1] == {
        "name": "trial 3",
        "select": {"math": 0.75, "code": 0.5},
        "hold_out": {"math": 0.7, "code": 0.45},
        "objective": [1.1, 1.0, 1.2],
        "is_candidate": True,
        "lead": [],
    }
    assert data["rows"][0]["lead"] == [0.2, 0.05, 0.35]


def test_it_is_said_of_a_model_that_is_not_saved_yet(make_results):
    told = "The model is not saved yet"
    assert make_results().unsaved == ""
    assert told not in make_results().markdown()
    unsaved = make_results(is_saved=False).markdown()
    assert unsaved.index(told) < unsaved.index("The found merge is better")


def test_a_study_without_results_says_when_they_come(tmp_path):
    with pytest.raises(StudyError, match=r"no results yet; the study writes results\.json once"):
        Results.load(tmp_path)
    (tmp_path / RESULTS_FILE).write_text("{half")
    with pytest.raises(StudyError, match=r"results\.json: it is cut off or overwritten; `searchm"):
        Results.load(tmp_path)


def test_results_that_cannot_be_written_are_an_error_of_the_study(make_results, tmp_path):
    with pytest.raises(StudyError, match="nowhere: cannot be written: No such file"):
        make_results().save(tmp_path / "nowhere")


def test_the_table_shows_select_and_held_out_scores_in_per_cent(make_results):
    header, cells = make_results().table()
    assert header == ["", "math", "code", "normalised, held out", LEAD]
    assert cells == [
        ["TIES", "50.0 / 40.0", "25.0 / 30.0", "90.0 [85.0, 95.0]", "+20.0 [+5.0, +35.0]"],
        ["trial 3", "75.0 / 70.0", "50.0 / 45.0", "110.0 [100.0, 120.0]", ""],
    ]


def test_what_is_not_scored_held_out_is_told_apart(make_results, tmp_path):
    [ties, trial] = make_results().rows
    partly = replace(ties, hold_out={"code": 0.3}, objective=(), lead=())
    results = make_results(rows=[partly, trial])
    _, cells = results.table()
    assert cells[0] == ["TIES", "50.0 / –", "25.0 / 30.0", "–"]
    assert "is scored on the tasks that name it alone" in results.legend
    results.save(tmp_path)
    assert Results.load(tmp_path).rows == results.rows
    assert "name it alone" not in make_results().legend


def test_a_lead_without_an_interval_is_one_number(make_results):
    [ties, trial] = make_results().rows
    _, cells = make_results(rows=[replace(ties, lead=(-0.004,)), trial]).table()
    assert [row[-1] for row in cells] == ["-0.4", ""]


def test_results_of_before_leads_were_kept_are_read_and_shown_without(make_results, tmp_path):
    results = make_results()
    results.save(tmp_path)
    data = read_checked(tmp_path / RESULTS_FILE)
    for row in data["rows"]:
        del row["lead"]
    (tmp_path / RESULTS_FILE).write_text(with_checksum(data))
    earlier = Results.load(tmp_path)
    assert earlier.rows == [replace(row, lead=()) for row in results.rows]
    assert earlier.table()[0] == ["", "math", "code", "normalised, held out"]
    assert "last column" in results.legend
    assert "last column" not in earlier.legend


def test_the_report_holds_verdict_table_counts_plan_and_sources(make_results):
    results = make_results()
    report = results.markdown()
    assert report.startswith("# toy\n\n**The found merge is better")
    assert "| **trial 3** | **75.0 / 70.0** |" in report
    assert "| **110.0 [100.0, 120.0]** |  |" in report
    assert "| 90.0 [85.0, 95.0] | +20.0 [+5.0, +35.0] |" in report
    assert "| TIES | 50.0 / 40.0 |" in report
    assert "metrics: math: acc, code: macro_f1" in report
    assert results.legend in report
    assert "95 % intervals" in results.legend
    assert "single comparisons: only the verdict's interval is corrected" in results.legend
    assert "Counts: trials in full 3, trials stopped early 2, search seconds 12." in report
    assert "| base | `models/base, 0123abcd` |" in report
    text = report.split("```yaml\n")[1].split("```")[0]
    assert text == plan(0.5).to_yaml()
    assert "constraints" not in report
    assert "The front" not in report


def test_of_a_plan_of_many_numbers_the_report_names_the_file_and_the_results_hold_all(
    make_results, tmp_path
):
    groups = Groups.of_tensors([f"layers.{i}.weight" for i in range(400)])
    rows = tuple((i / 1000, 1.0, 0.5) for i in range(400))
    fine = replace(plan(0.5), values={"coefficient": rows}, groups=groups)
    results = make_results(plan=fine.to_dict())
    assert "all of them are in `plans/trial-3.yaml`" in results.markdown()
    assert len(results.markdown().splitlines()) < 40
    results.save(tmp_path)
    assert Results.load(tmp_path).merge_plan == fine


def test_the_plan_in_the_results_is_the_winners(make_results):
    assert make_results().merge_plan == plan(0.5)
    assert isinstance(make_results().merge_plan, MergePlan)


def test_a_constraint_that_is_broken_on_held_out_examples_is_marked(make_results, bounds):
    report = make_results(bounds=bounds).markdown()
    assert "| math at least 0.9 | 0.950 | 0.850 (broken) |" in report
    assert "| code at least 0.4 of the base's | 0.500 | 0.450 |" in report


def test_plans_that_cannot_be_saved_and_references_that_cannot_be_scored_are_named(
    make_results, bounds
):
    results = make_results(
        bounds=bounds, breaking=("TIES",), missing={"DARE": "example 3 has NaN logits"}
    )
    text = results.markdown()
    assert "Not to be saved, as they break one on select examples: TIES." in text
    assert "Not in the table:\n\n- DARE: example 3 has NaN logits\n" in text
    assert "Not " not in make_results(bounds=bounds).markdown()


def test_what_was_searched_says_that_references_are_counted(make_results):
    text = make_results(searched=[Searched("ties, one coefficient", 4, 3, 0.5)]).markdown()
    assert "| ties, one coefficient | 4 | 3 | 50.0 |\n\nReferences that lie in the space" in text


def test_tasks_without_an_expert_are_named_where_scores_are_over_experts(make_results):
    assert "Not over an expert's score but as it is: code." in make_results(raw=("code",)).legend
    assert "as it is" not in make_results().legend


def test_what_nothing_can_be_divided_by_held_out_is_named(make_results, tmp_path):
    results = make_results(undivided=("its own expert on code",))
    assert "their select scores stand in: its own expert on code. " in results.legend
    assert "stand in" not in make_results().legend
    results.save(tmp_path)
    assert Results.load(tmp_path).undivided == results.undivided


def test_the_front_is_a_table_in_the_order_of_its_first_objective(make_results, points):
    report = make_results(points=points).markdown()
    third, first = (report.index(f"| {name} | 0.") for name in ("trial 3", "trial 1"))
    assert third < first
    assert "| trial 2 | 0." not in report


def test_members_and_other_metrics_fold_out(make_results, details):
    report = make_results(details=details).markdown()
    folded = report.split("<details>\n")[1].split("</details>")[0]
    assert "| held out | examples | TIES | trial 3 |" in folded
    assert "| math: algebra | 3 | 25.0 | 50.0 |" in folded
    assert "| code: acc | 8 | 12.5 | 75.0 |" in folded
    assert "<details>" not in make_results().markdown()


def test_parts_of_different_data_are_named(make_results, drawn_from):
    results = make_results(drawn_from=drawn_from)
    assert "| math | split 'train' | split 'test' of m&lt;x&gt;.jsonl |" in results.markdown()
    assert results.front_title == "toy, on select examples: math from split 'train'"
    assert "different data" not in make_results().markdown()
    assert make_results().front_title == "toy, on select examples"


def test_one_row_of_a_table_stands_out():
    assert markdown_table(["a", "b"], [["x", "1"], ["y", "2"]], bold="y").splitlines() == [
        "| a | b |",
        "|---|---|",
        "| x | 1 |",
        "| **y** | **2** |",
    ]


def test_damaged_results_are_named(make_results, tmp_path):
    make_results().save(tmp_path)
    file = tmp_path / RESULTS_FILE
    file.write_text(file.read_text().replace("0.75", "0.76", 1))
    with pytest.raises(StudyError, match=r"results\.json: it is not as it was written; `searchm"):
        Results.load(tmp_path)
    file.write_text("[]")
    with pytest.raises(StudyError, match=r"results\.json: it is not as it was written"):
        Results.load(tmp_path)
