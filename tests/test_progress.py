"""What a person sees of a run."""

import io

from rich.console import Console

from searchmerge.progress import ProgressView
from searchmerge.search.runner import TrialRecord


def test_a_trial_on_a_crowded_machine_says_so():
    out = io.StringIO()
    crowded = iter(["load 8.1 on 2 processors", ""])
    with ProgressView(Console(file=out), crowding=lambda: next(crowded)) as view:
        view.trial(TrialRecord(0, 0.5, {"math": 0.5}, seconds=126.0))
        view.trial(TrialRecord(1, 0.5, {"math": 0.5}, is_best=True, seconds=8.0))
    first, second = out.getvalue().splitlines()
    assert first.endswith("0.5000  math 0.500  126.0 s  load 8.1 on 2 processors")
    assert second.endswith("8.0 s  best so far")


def test_without_workers_here_nothing_is_said_of_this_machine():
    out = io.StringIO()
    with ProgressView(Console(file=out)) as view:
        view.trial(TrialRecord(0, 0.5, seconds=8.0))
    assert out.getvalue().rstrip().endswith("8.0 s")
