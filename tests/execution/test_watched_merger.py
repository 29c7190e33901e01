"""Files are checked before and after each merge."""

import pytest

from searchmerge.errors import CheckpointError
from searchmerge.execution.watched_merger import WatchedMerger
from searchmerge.merging.method import default_plan
from tests.toy import ToyMerger, ToyModel


@pytest.mark.parametrize(("fails_at", "n_merged"), [(None, 1), (1, 0), (2, 1)])
def test_a_merge_stands_between_two_checks(fails_at, n_merged):
    merger, checks = ToyMerger(ToyModel()), []

    def check():
        checks.append(len(merger.plans))
        if len(checks) == fails_at:
            raise CheckpointError("expert 'first' changed")

    plan = default_plan("task_arithmetic", ("math", "code", "chat"))
    watched = WatchedMerger(merger, check)
    if fails_at is None:
        watched.apply(plan)
    else:
        with pytest.raises(CheckpointError, match="expert 'first' changed"):
            watched.apply(plan)
    assert len(merger.plans) == n_merged
    assert checks == [0, 1][: fails_at or 2]
