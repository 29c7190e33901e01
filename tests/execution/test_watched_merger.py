"""Files are checked before and after each merge."""

import pytest
import torch

from searchmerge.errors import CheckpointError
from searchmerge.execution.watched_merger import WatchedMerger, WatchedWhole
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


class Whole:
    """Yields two tensors, and counts."""

    def __init__(self):
        self.n_yielded = 0

    def merged(self, plan, dtype):
        for name in ("a", "b"):
            self.n_yielded += 1
            yield name, torch.zeros(3, dtype=dtype)


@pytest.mark.parametrize(("fails_at", "n_yielded"), [(None, 2), (1, 0), (2, 2)])
def test_a_whole_model_stands_between_two_checks(fails_at, n_yielded):
    merger, checks = Whole(), []

    def check():
        checks.append(merger.n_yielded)
        if len(checks) == fails_at:
            raise CheckpointError("expert 'first' changed")

    weights = WatchedWhole(merger, check).merged(default_plan("ties", ("a",)), torch.float32)
    if fails_at is None:
        assert [name for name, _ in weights] == ["a", "b"]
    else:
        with pytest.raises(CheckpointError, match="expert 'first' changed"):
            list(weights)
    assert merger.n_yielded == n_yielded
    assert checks == [0, 2][: fails_at or 2]
