"""A budget is used up by trials, by the time of all runs, or by patience."""

import pytest

from searchmerge.search.budget import Budget, Spending, StudyClock


class Kept:
    """Keeps the time of a study, and counts how often."""

    def __init__(self, elapsed_s=0.0):
        self.elapsed_s = elapsed_s
        self.n_kept = 0

    def set_elapsed(self, seconds):
        self.elapsed_s = seconds
        self.n_kept += 1


class Watch:
    def __init__(self):
        self.second = 1000.0

    def __call__(self):
        return self.second


@pytest.fixture
def watch():
    return Watch()


def test_time_is_counted_over_all_runs(watch):
    kept = Kept(elapsed_s=50.0)
    clock = StudyClock(kept, watch)
    watch.second += 7.0
    assert clock.elapsed_s == 57.0
    clock.keep()
    assert kept.elapsed_s == 57.0
    watch.second += 900.0  # the machine stands still between runs
    assert StudyClock(kept, watch).elapsed_s == 57.0


def test_time_is_kept_now_and_then(watch):
    kept = Kept()
    clock = StudyClock(kept, watch)
    for _ in range(60):
        watch.second += 0.5
        clock.tick()
    assert 4 <= kept.n_kept <= 6
    assert kept.elapsed_s > 24.0


def test_trials_that_run_count_towards_their_number(watch):
    spending = Spending(Budget(n_trials=5), StudyClock(Kept(), watch), n_finished=2)
    for _ in range(2):
        spending.begin()
    assert not spending.is_over
    spending.begin()
    assert spending.is_over
    spending.end()
    assert spending.is_over
    assert spending.n_finished == 3


def test_a_timeout_ends_a_study(watch):
    spending = Spending(Budget(timeout_s=60.0), StudyClock(Kept(elapsed_s=50.0), watch))
    watch.second += 9.9
    assert not spending.is_over
    watch.second += 0.1
    assert spending.is_over


def test_patience_begins_anew_with_every_best_trial(watch):
    spending = Spending(Budget(patience=2), StudyClock(Kept(), watch))
    seen = []
    for is_best in (True, False, True, False, False):
        seen.append(spending.is_over)
        spending.scored(is_best=is_best)
    assert seen == [False] * 5
    assert spending.is_over


def test_without_limits_a_study_goes_on(watch):
    spending = Spending(Budget(), StudyClock(Kept(), watch), n_finished=10**6)
    watch.second += 1e9
    assert not spending.is_over
