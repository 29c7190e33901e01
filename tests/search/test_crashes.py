"""Crashes in a row are those with no block scored in between."""

import pytest

from searchmerge.search.crashes import MAX_DEATHS, Crashes, LostWorkers


def test_crashes_are_counted_while_no_block_more_is_scored():
    crashes, counts = Crashes(0, 2), []
    for n_blocks in (2, 2, 5, 5, 5, 6):
        crashes = crashes.again(n_blocks)
        counts.append(crashes.n)
    assert counts == [1, 2, 1, 2, 3, 1]


def test_two_plans_that_kill_do_not_excuse_each_other():
    lost = LostWorkers()
    for n in (1, 2, 3):
        for digest in ("one", "two"):
            assert not lost.is_hopeless(digest)
            lost.begin()
            assert lost.lose(digest, 0, blameless=False) == n
    assert lost.is_hopeless("one")
    assert lost.is_hopeless("two")


@pytest.mark.parametrize(("n_excused", "n_allowed"), [(0, 3), (3, 4), (10, 6), (80, MAX_DEATHS)])
def test_the_more_workers_die_at_good_plans_the_more_may_die_at_this(n_excused, n_allowed):
    lost = LostWorkers()
    for n in range(10):
        lost.begin()
        lost.end(f"well {n}")
    for n in range(n_excused):
        lost.begin()
        lost.lose(f"good {n}", 0, blameless=False)
        lost.begin()
        lost.end(f"good {n}")
    n_died = 0
    while not lost.is_hopeless("bad"):
        lost.begin()
        n_died = lost.lose("bad", 0, blameless=False)
    assert n_died == n_allowed
    assert lost.n_lost("bad") == n_allowed
