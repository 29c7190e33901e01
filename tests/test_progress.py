"""A person sees one line for every phase, reference and trial."""

import io
import re

import pytest
from rich.console import Console

from searchmerge.progress import ProgressView
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.trials import TrialRecord
from tests.search.test_trials import plan


@pytest.fixture
def shown():
    """Return a view and a function that returns its lines, without the time before each."""
    file = io.StringIO()
    view = ProgressView(Console(file=file, width=200))

    def lines():
        texts = file.getvalue().splitlines()
        assert all(re.match(r" *\d+:\d\d ", text) for text in texts)
        return [re.sub(r"^ *\d+:\d\d ", "", text) for text in texts]

    with view:
        yield view, lines


def test_a_phase_says_how_much_there_is_and_how_much_was_done_before(shown):
    view, lines = shown
    view.phase("references", 7)
    view.phase("search", 40, 12)
    view.phase("saving the model", None)
    assert lines() == ["references (7)", "search (40, 12 done before)", "saving the model"]


def test_a_reference_is_shown_with_its_scores(shown):
    view, lines = shown
    view.step("task arithmetic", {"math": 0.25, "code": 1 / 3})
    assert lines() == ["  task arithmetic          math 0.250  code 0.333"]


@pytest.mark.parametrize(
    ("fields", "is_best", "marks"),
    [
        ({}, False, ""),
        ({}, True, "best so far"),
        ({"kind": "TIES"}, True, "TIES, best so far"),
        ({"stopped_after": 6}, False, "stopped after 6 blocks"),
        ({"repeats": 3, "kind": "TIES"}, False, "trial 3 again, TIES"),
    ],
)
def test_a_trial_is_shown_with_value_scores_time_and_what_is_special(
    shown, fields, is_best, marks
):
    view, lines = shown
    record = TrialRecord(12, plan(0), merge_s=0.5, score_s=1.0, **fields)
    view.trial(record.judged(Objective("mean", {"math": Goal()}), {"math": 0.75}), is_best=is_best)
    assert lines() == [f"  trial 12   0.7500  math 0.750    1.5 s  {marks}".rstrip()]


def test_a_failed_trial_is_shown_with_its_reason(shown):
    view, lines = shown
    view.trial(TrialRecord(3, plan(0), failure="NaN logits"), is_best=False)
    view.trial(TrialRecord(8, plan(0), repeats=3, failure="NaN logits"), is_best=False)
    assert lines() == ["  trial 3    failed: NaN logits", "  trial 8    failed again: NaN logits"]


def test_a_trial_on_a_crowded_machine_says_so():
    file = io.StringIO()
    crowded = iter(["load 8.1 on 2 processors", ""])
    record = TrialRecord(12, plan(0), merge_s=0.5, score_s=125.5)
    judged = record.judged(Objective("mean", {"math": Goal()}), {"math": 0.75})
    with ProgressView(Console(file=file, width=200), crowding=lambda: next(crowded)) as view:
        view.trial(judged, is_best=False)
        view.trial(judged, is_best=False)
    first, second = file.getvalue().splitlines()
    assert first.endswith("0.7500  math 0.750  126.0 s  load 8.1 on 2 processors")
    assert second.endswith("126.0 s")
