"""What is said of trials that failed."""

import pytest

from searchmerge.search.failures import failure_reasons, told_failures
from searchmerge.search.trials import TrialRecord
from tests.search.test_trials import plan, record


def failed(*reasons):
    return [TrialRecord(i, plan(i), failure=reason) for i, reason in enumerate(reasons)]


def test_reasons_are_counted_in_a_line_each_the_commonest_first():
    records = [*failed("odd", "disk\x1b full\nand more", "disk\x1b full"), record(9, 0.5, 0.5)]
    assert list(failure_reasons(records).items()) == [("disk\\x1b full", 2), ("odd", 1)]
    [short] = failure_reasons(failed("x" * 5000))
    assert len(short) < 400


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (["disk full."], "1 of 1 trial failed, as: disk full. If"),
        (["disk full"] * 3, "3 of 3 trials failed, as: disk full. If"),
        (["odd", "disk full", "disk full"], "3 of 3 trials failed, 2 of them as: disk full. If"),
        (["odd", "disk full"], "2 of 2 trials failed, the first as: odd. If"),
    ],
)
def test_how_many_failed_why_and_what_can_be_done_is_told(reasons, told):
    line = told_failures(failure_reasons(failed(*reasons)), len(reasons))
    assert line.startswith(told)
    assert line.endswith("the same `searchmerge run` with --retry-failed tries them again.")


def test_where_none_failed_nothing_is_told():
    assert told_failures(failure_reasons([record(0, 0.5, 0.5)]), 1) == ""
