"""A candidate is stopped only when it will not win, by whatever the study maximises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.evaluators.blocks import make_blocks
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.racing import Racing, Rival, predict

N = 64
BLOCKS = {
    task: make_blocks(task, "select", range(N), TaskInfo(N, mean=True), 8) for task in ("a", "b")
}
GOALS = {"a": Goal(1.0, "A"), "b": Goal(2.0, "B")}


def known(values, n_blocks=8):
    """Return the first blocks of each task, from task name to 64 values."""
    return {
        block.key: tuple(values[task][e] for e in block.examples)
        for task, own in BLOCKS.items()
        for block in own[:n_blocks]
    }


def rival(values):
    return Rival({task: float(np.mean(own)) for task, own in values.items()}, known(values))


def flips(share, seed=0):
    return [float(x < share) for x in np.random.default_rng(seed).random(N)]


def objective(kind, **options):
    return Objective(kind, GOALS, {"a": 0.8, "b": 0.5}, {"a": 0.3, "b": 0.3}, **options)


GOOD = {"a": flips(0.8, 1), "b": flips(0.7, 2)}
WORSE = {"a": flips(0.4, 1), "b": flips(0.35, 2)}  # wrong wherever GOOD is wrong, and elsewhere
MIXED = {"a": flips(0.3, 1), "b": flips(0.95, 2)}


@pytest.mark.parametrize("kind", ["normalised", "mean", "worst", "tasks"])
def test_a_worse_candidate_is_stopped_before_its_end_and_a_better_one_never(kind):
    racing = Racing(collapse_margin=10.0)
    stopped_at = [
        n
        for n in range(1, 9)
        if racing.stops(objective(kind), BLOCKS, known(WORSE, n), [rival(GOOD)], None)
    ]
    assert stopped_at
    assert 3 <= min(stopped_at) <= 5
    for n in range(1, 9):
        assert not racing.stops(objective(kind), BLOCKS, known(GOOD, n), [rival(WORSE)], None)
        assert not racing.stops(objective(kind), BLOCKS, known(GOOD, n), [rival(GOOD)], None)


def test_with_several_objectives_only_a_dominated_candidate_is_stopped():
    racing = Racing(collapse_margin=10.0)
    front = [rival(GOOD), rival(MIXED)]
    assert not racing.stops(objective("tasks"), BLOCKS, known(MIXED, 6), [rival(GOOD)], None)
    assert racing.stops(objective("tasks"), BLOCKS, known(WORSE, 6), front, None)
    assert racing.stops(objective("worst"), BLOCKS, known(MIXED, 6), [rival(GOOD)], None)


def test_a_candidate_that_breaks_a_constraint_is_stopped_though_its_mean_is_higher():
    racing = Racing(collapse_margin=10.0)
    bound = Constraint("a", "expert", 0.9)
    free, bounded = objective("mean"), objective("mean", constraints=(bound,))
    assert not racing.stops(free, BLOCKS, known(MIXED, 6), [rival(GOOD)], None)
    assert racing.stops(bounded, BLOCKS, known(MIXED, 6), [rival(GOOD)], None)
    # where the best breaks it too, breaking it is no reason
    assert not racing.stops(bounded, BLOCKS, known(MIXED, 6), [rival(MIXED)], None)


def test_a_collapsed_candidate_is_stopped_on_its_first_blocks():
    base = rival({"a": flips(0.6, 1), "b": flips(0.6, 2)})
    collapsed = {"a": [0.0] * N, "b": [0.0] * N}
    racing = Racing(min_blocks=100, collapse_margin=0.1)
    assert racing.stops(objective("mean"), BLOCKS, known(collapsed, 2), [], base)
    assert not racing.stops(objective("mean"), BLOCKS, known(GOOD, 2), [], base)
    assert not Racing(min_blocks=100, collapse_margin=2.0).stops(
        objective("mean"), BLOCKS, known(collapsed, 8), [], base
    )


def test_nothing_is_decided_while_nothing_is_known_of_a_task():
    seen = {key: values for key, values in known(WORSE, 8).items() if key[0] == "a"}
    racing = Racing(min_blocks=2)
    assert not racing.stops(objective("normalised"), BLOCKS, seen, [rival(GOOD)], rival(GOOD))
    assert racing.stops(objective("worst"), BLOCKS, seen, [rival(GOOD)], None)


def test_a_score_that_is_no_mean_counts_once_it_is_known():
    info = TaskInfo(N, mean=False)
    blocks = {**BLOCKS, "b": make_blocks("b", "select", range(N), info, 8)}
    whole = blocks["b"][0].key
    best = Rival({"a": 0.5, "b": 0.9}, {**known(GOOD), whole: (0.9,)})
    candidate = {**{k: v for k, v in known(GOOD, 4).items() if k[0] == "a"}, whole: (0.2,)}
    predicted = predict(blocks, candidate, best)
    assert predicted["b"].se == 0.0
    assert predicted["b"].value == pytest.approx(0.2)
    assert Racing(min_blocks=2).stops(objective("mean"), blocks, candidate, [best], None)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normalised", "mean", "worst", "tasks"]),
    p_threshold=st.floats(0.001, 0.4),
)
def test_once_all_is_known_the_prediction_is_the_score_and_the_decision_is_right(
    seed, kind, p_threshold
):
    generator = np.random.default_rng(seed)
    draws = [{t: list(generator.integers(0, 2, N) * 1.0) for t in BLOCKS} for _ in range(2)]
    candidate, best = (rival(values) for values in draws)
    predicted = predict(BLOCKS, known(draws[0]), best)
    for task, prediction in predicted.items():
        assert prediction.value == pytest.approx(candidate.scores[task])
        assert prediction.se == 0.0
    goal = objective(kind)
    stops = Racing(p_threshold, 2, 10.0).stops(goal, BLOCKS, known(draws[0]), [best], None)
    if kind == "tasks":
        assert stops == goal.dominates(best.scores, candidate.scores)
    elif abs(goal.scalar(candidate.scores) - goal.scalar(best.scores)) > 1e-9:
        assert stops == (goal.scalar(candidate.scores) < goal.scalar(best.scores))


def test_a_candidate_as_good_as_the_best_is_seldom_stopped():
    """At p 0.01 and 6 looks, of 400 candidates that tie or win in full, few are lost."""
    generator = np.random.default_rng(0)
    lost = n_candidates = 0
    while n_candidates < 400:
        skill = generator.random((2, N))
        noise = generator.random((2, 2, N))
        best, candidate = (
            {
                t: list((0.7 * skill[i] + 0.3 * noise[who, i] < 0.6) * 1.0)
                for i, t in enumerate("ab")
            }
            for who in (0, 1)
        )
        goal = objective("mean")
        if goal.scalar(rival(candidate).scores) < goal.scalar(rival(best).scores):
            continue
        n_candidates += 1
        lost += any(
            Racing().stops(goal, BLOCKS, known(candidate, n), [rival(best)], None)
            for n in range(1, 9)
        )
    assert lost <= 0.03 * 400
