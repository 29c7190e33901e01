"""What models said: kept where a study says so, shown side by side, told where one scores 0."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from searchmerge.answers import kept_answers
from searchmerge.cli import app
from searchmerge.errors import SpecError, StudyError
from searchmerge.report.results import Results
from searchmerge.search.directory import stored_study
from tests.studies_of_tasks import run
from tests.tiny import make_models

PARTS = {"split": "validation", "select": 8, "hold_out": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    make_models(root)
    return root


@pytest.fixture(scope="module")
def finished(root):
    """A study that was finished without answers, and was told to keep them then."""
    tasks = {"said": PARTS, "first": {**PARTS, "task": "tiny_first"}}
    run_dir = run(root, name="answers", tasks=tasks)
    with pytest.raises(
        StudyError, match="'said' is not kept; give the study's task answers: keep"
    ):
        kept_answers(run_dir, "said", ["best"])
    with stored_study(run_dir) as study:
        trials = len(study.trials)
    before = Results.load(run_dir)
    run(
        root, name="answers", tasks={"said": {**PARTS, "answers": "keep"}, "first": tasks["first"]}
    )
    with stored_study(run_dir) as study:
        assert len(study.trials) == trials
    assert Results.load(run_dir).rows == before.rows
    return run_dir


def test_answers_of_the_winner_and_the_references_are_kept(finished):
    names = ["best", "base", "expert first", "PCB"]
    kept = kept_answers(finished, "said", names)
    assert [name for name, _ in kept] == names
    examples = [[answer.example for answer in answers] for _, answers in kept]
    assert examples == [sorted(examples[0])] * 4
    assert len(examples[0]) == 6
    assert all(len(answer.said) == 1 for _, answers in kept for answer in answers)
    winner = Results.load(finished).winner
    assert kept_answers(finished, "said", [winner])[0][1] == kept[0][1]


def test_what_is_not_there_is_named(finished):
    with pytest.raises(StudyError, match="'first' is not kept"):
        kept_answers(finished, "first", ["best"])
    with pytest.raises(SpecError, match=r"--task second: no such task .there are: said, first."):
        kept_answers(finished, "second", ["best"])
    with pytest.raises(SpecError, match=r"no plan 'trial 99' .there are: best, base, "):
        kept_answers(finished, "said", ["trial 99"])


def test_a_plan_that_was_not_asked_is_named(finished, tmp_path):
    results = Results.load(finished)
    rows = [replace(r, hold_out={}) if r.name == "base" else r for r in results.rows]
    replace(results, rows=rows).save(tmp_path)
    with pytest.raises(
        StudyError, match=r"base was not asked .* of 'said': with confirm: .experts"
    ):
        kept_answers(tmp_path, "said", ["best", "base"])


def test_the_command_shows_them_side_by_side(finished):
    words = ["answers", str(finished), "--task", "said", "--against", "base", "--limit", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    header = result.output.splitlines()[1]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "example",
        "question",
        "right",
        "best",
        "base",
    ]
    [(_, answers)] = kept_answers(finished, "said", ["base"])
    assert answers[1].question in result.output
    assert answers[2].question not in result.output


def test_other_metrics_and_members_are_in_the_results(root):
    tasks = {
        "pair": {**PARTS, "answers": "drop"},
        "said": {**PARTS, "metric": ["exact_match,word", "exact_match"]},
    }
    run_dir = run(root, name="details", tasks=tasks)
    results = Results.load(run_dir)
    assert [(d.task, d.name, d.n_examples) for d in results.details] == [
        ("pair", "tiny_first", 3),
        ("pair", "tiny_second", 3),
        ("said", "exact_match", 6),
    ]
    winner = next(row for row in results.rows if row.name == results.winner)
    halves = [detail.scores[winner.name] for detail in results.details[:2]]
    assert sum(halves) / 2 == pytest.approx(winner.hold_out["pair"])
    assert set(results.details[0].scores) == {
        winner.name,
        *(row.name for row in results.rows if not row.is_candidate),
    }
    assert "| pair: tiny_first | 3 |" in (run_dir / "report.md").read_text()


def test_an_expert_that_scores_nothing_on_its_own_task_is_heard(root):
    silent = {**PARTS, "filter": "word", "generation": {"max_gen_toks": 1}, "expert": "first"}
    message = (
        "tasks.said: its own expert 'first' scores 0 there, so that no score can be normalised "
        r"by it; what it said first: "
        r"example \d+: it said '.*', read in it was '.*', right is '\d'; "
        r"example \d+: it said .*; "
        "look at the task's keys chat_template, filter, generation"
    )
    with pytest.raises(StudyError, match=message):
        run(root, name="silent", tasks={"said": silent}, objective="normalised")
