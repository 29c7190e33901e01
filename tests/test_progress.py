"""What a person sees of a run."""

import io

import pytest
from rich.console import Console

from searchmerge.progress import ProgressView
from searchmerge.search.runner import TrialRecord


@pytest.fixture
def shown():
    """Return a view outside of a terminal, and a function for the lines that it printed."""
    out = io.StringIO()

    def lines():
        return [line.rstrip() for line in out.getvalue().splitlines()]

    with ProgressView(Console(file=out, width=40)) as view:
        yield view, lines


def test_a_phase_says_how_much_there_is_and_was_done_before(shown):
    view, lines = shown
    view.phase("references", 7)
    view.phase("search", 100, done=12)
    view.phase("search", None, done=3)
    view.phase("search", None)
    assert lines() == [
        "  0:00 references (7)",
        "  0:00 search (100, 12 done before)",
        "  0:00 search, 3 done before",
        "  0:00 search",
    ]


def test_a_step_shows_its_scores_on_one_line_however_narrow_the_terminal_is(shown):
    view, lines = shown
    view.step("expert math", {"math": 0.5, "code": 0.25, "a task with a long name": 1.0})
    assert lines() == [
        "  0:00   expert math              math 0.500  code 0.250  a task with a long name 1.000"
    ]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            TrialRecord(3, 0.5, {"math": 0.5}, seconds=12.34, is_best=True),
            "  0:00   trial 3    0.5000  math 0.500   12.3 s  best so far",
        ),
        (
            TrialRecord(4, 0.25, {"math": 0.25}, seconds=1.0, partial=2),
            "  0:00   trial 4    0.2500  math 0.250    1.0 s  stopped after 2 blocks",
        ),
        (
            TrialRecord(0, 0.25, {"math": 0.25}, seconds=1.0, note="base"),
            "  0:00   trial 0    0.2500  math 0.250    1.0 s  base",
        ),
        (
            TrialRecord(5, None, note="task 'math': [red]NaN[/red]"),
            "  0:00   trial 5    failed: task 'math': [red]NaN[/red]",
        ),
    ],
    ids=["best", "stopped", "reference", "failed"],
)
def test_a_trial_is_one_line(shown, record, line):
    view, lines = shown
    view.trial(record)
    assert lines() == [line]


def test_in_a_terminal_a_bar_stands_below_the_lines_and_is_gone_in_the_end():
    out = io.StringIO()
    with ProgressView(Console(file=out, force_terminal=True, width=80)) as view:
        view.phase("search", 2)
        view.trial(TrialRecord(0, 0.5, seconds=1.0))
    text = out.getvalue()
    assert "1/2" in text
    assert text.rstrip().endswith("\x1b[2K")  # the bar's line is erased
