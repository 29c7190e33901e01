"""Examples are divided once and for all, and every prefix of the rounds sees every task."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Member, PartInfo, TaskInfo
from searchmerge.evaluators.score_kind import Whole
from searchmerge.execution.blocks import make_blocks, make_rounds, split_examples, telling_first


@given(st.integers(2, 300), st.integers(0, 5), st.data())
def test_no_example_is_in_both_parts(n_examples, seed, data):
    select = data.draw(st.integers(1, n_examples - 1))
    parts = split_examples("t", TaskInfo(n_examples), seed=seed, select=select, hold_out=None)
    assert len(parts["select"]) == select
    assert sorted(parts["select"] + parts["hold_out"]) == list(range(n_examples))
    info = TaskInfo(n_examples)
    assert parts == split_examples("t", info, seed=seed, select=select, hold_out=None)


@pytest.mark.parametrize(
    ("select", "hold_out", "told"),
    [
        (0, 5, "select 0 and hold_out 5"),
        (5, 0, "select 5 and hold_out 0"),
        (10, None, "select 10"),
        (None, 25, "hold_out 25"),
        (6, 5, "select 6 and hold_out 5"),
    ],
)
def test_parts_that_are_empty_or_too_large_are_refused(select, hold_out, told):
    with pytest.raises(SpecError, match=rf"tasks\.t: {told} were asked for, but the task has 10"):
        split_examples("t", TaskInfo(10), seed=0, select=select, hold_out=hold_out)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 7))
def test_rounds_hold_every_block_once_and_every_task_in_proportion(n_a, n_b, round_blocks):
    blocks = {
        task: make_blocks(task, "select", range(n), TaskInfo(n), 4)
        for task, n in (("a", n_a), ("b", n_b))
    }
    rounds = make_rounds(blocks, round_blocks=round_blocks, seed=1)
    seen = Counter(block.key for round_ in rounds for block in round_)
    assert set(seen.values()) == {1}
    assert len(seen) == len(blocks["a"]) + len(blocks["b"])
    done = Counter()
    for round_ in rounds:
        done.update(block.task for block in round_)
        shares = [done[task] / len(blocks[task]) for task in blocks]
        slack = (round_blocks + 1) / min(map(len, blocks.values()))
        assert abs(shares[0] - shares[1]) <= slack


def test_a_score_that_is_no_mean_is_one_block():
    [block] = make_blocks("t", "select", range(50), TaskInfo(50, kind=Whole()), 8)
    assert block.examples == tuple(range(50))


def test_examples_on_which_plans_differ_most_come_first():
    blocks = make_blocks("t", "pilot", range(10), TaskInfo(10), 4)
    scored = [{e: float(e in wrong) for e in range(10)} for wrong in ((7, 2), (7,), (7, 2), (9,))]
    cut = telling_first(blocks, scored, "select")
    assert [block.examples for block in cut] == [(2, 7, 9, 0), (1, 3, 4, 5), (6, 8)]
    assert {block.part for block in cut} == {"select"}


def test_where_no_plan_was_scored_examples_keep_their_order():
    blocks = make_blocks("t", "pilot", (3, 1, 2), TaskInfo(3), 2)
    assert [b.examples for b in telling_first(blocks, [], "select")] == [(3, 1), (2,)]


GROUP = TaskInfo(
    500, members=(Member("a", 300, 0.5), Member("b", 50, 0.25), Member("c", 150, 0.25))
)


@given(select=st.integers(1, 150), hold_out=st.integers(1, 50), seed=st.integers(0, 5))
def test_members_of_a_group_are_drawn_in_proportion_to_their_weights(select, hold_out, seed):
    parts = split_examples("t", GROUP, seed=seed, select=select, hold_out=hold_out)
    assert not set(parts["select"]) & set(parts["hold_out"])
    for part, total in (("select", select), ("hold_out", hold_out)):
        examples = parts[part]
        assert len(set(examples)) == len(examples) == total
        of_a = sum(example < 300 for example in examples)
        of_b = sum(300 <= example < 350 for example in examples)
        assert abs(of_a - total * 0.5) <= 1.5 and abs(of_b - total * 0.25) <= 1.5


def test_a_group_has_as_many_examples_as_its_weights_allow():
    parts = split_examples("t", GROUP, seed=0, select=None, hold_out=None)
    assert [len(examples) for examples in parts.values()] == [100, 100]
    with pytest.raises(SpecError, match="the task has 200 examples, counted in proportion to its"):
        split_examples("t", GROUP, seed=0, select=150, hold_out=51)


def test_every_beginning_of_a_part_holds_all_members():
    parts = split_examples("t", GROUP, seed=3, select=80, hold_out=80)
    beginning = parts["select"][:40]
    assert any(e < 300 for e in beginning) and any(e >= 350 for e in beginning)
    assert any(300 <= e < 350 for e in beginning)


APART = TaskInfo.of_parts(PartInfo("split 'train'", 30), PartInfo("split 'test'", 20))


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 5))
def test_each_part_is_drawn_from_its_own_data(select, hold_out, seed):
    parts = split_examples("t", APART, seed=seed, select=select, hold_out=hold_out)
    assert len(set(parts["select"])) == select and set(parts["select"]) <= set(range(30))
    assert len(set(parts["hold_out"])) == hold_out and set(parts["hold_out"]) <= set(range(30, 50))
    # one part says nothing of how the other is shuffled
    other = split_examples("t", APART, seed=seed, select=None, hold_out=hold_out)
    assert other["hold_out"] == parts["hold_out"]
    assert sorted(other["select"]) == list(range(30))


@pytest.mark.parametrize(
    ("select", "hold_out", "message"),
    [
        (
            31,
            None,
            r"tasks\.t\.select: 31 were asked for, but split 'train' has 30 examples; allow",
        ),
        (
            None,
            21,
            r"tasks\.t\.hold_out: 21 were asked for, but split 'test' has 20 examples; allo",
        ),
    ],
)
def test_more_than_a_parts_own_data_has_is_refused(select, hold_out, message):
    with pytest.raises(SpecError, match=message):
        split_examples("t", APART, seed=0, select=select, hold_out=hold_out)


def test_members_are_drawn_in_proportion_from_each_parts_own_data():
    def members(*sizes):
        weights = (0.5, 0.25, 0.25)
        named = zip("abc", sizes, weights, strict=True)
        return tuple(Member(name, n, weight) for name, n, weight in named)

    info = TaskInfo.of_parts(
        PartInfo("split 'dev'", 60, members(40, 10, 10)),
        PartInfo("split 'test'", 500, members(300, 50, 150)),
    )
    parts = split_examples("t", info, seed=0, select=None, hold_out=100)
    counts = [sum(e in examples for e in parts["select"]) for examples in SELECT_RANGES]
    assert counts == [20, 10, 10]
    counts = [sum(e in examples for e in parts["hold_out"]) for examples in HOLD_OUT_RANGES]
    assert counts == [50, 25, 25]
    assert [r for _, r in info.members_of("select")] == SELECT_RANGES
    assert [r for _, r in info.members_of("hold_out")] == HOLD_OUT_RANGES
    with pytest.raises(
        SpecError, match=r"t\.select: 41 .* split 'dev' has 40 examples, counted in"
    ):
        split_examples("t", info, seed=0, select=41, hold_out=1)


SELECT_RANGES = [range(40), range(40, 50), range(50, 60)]
HOLD_OUT_RANGES = [range(60, 360), range(360, 410), range(410, 560)]
