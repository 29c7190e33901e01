"""Crashes in a row are those with no block scored in between."""

from searchmerge.search.crashes import Crashes


def test_crashes_are_counted_while_no_block_more_is_scored():
    crashes, counts = Crashes(0, 2), []
    for n_blocks in (2, 2, 5, 5, 5, 6):
        crashes = crashes.again(n_blocks)
        counts.append(crashes.n)
    assert counts == [1, 2, 1, 2, 3, 1]
