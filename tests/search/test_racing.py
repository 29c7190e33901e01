"""A candidate is stopped only when it will not win, by whatever the study maximises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import make_blocks
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.racing import Racing, Rival, outlook_of, predict

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
    arrays = {task: np.array(own) for task, own in values.items()}
    return Rival({task: float(own.mean()) for task, own in arrays.items()}, arrays)


def stops(racing, goal, candidate, rivals, base=None, blocks=BLOCKS, pool=()):
    """Return whether a candidate is stopped; the pool tells how much plans differ."""
    paired = [(one, outlook_of([*pool, *rivals], one)) for one in rivals]
    below = (base, outlook_of([*pool, *rivals], base)) if base else None
    return racing.stops(goal, blocks, candidate, paired, below)


def flips(share, seed=0):
    return [float(x < share) for x in np.random.default_rng(seed).random(N)]


def objective(kind, **options):
    return Objective(kind, GOALS, {"a": 0.8, "b": 0.5}, {"a": 0.3, "b": 0.3}, **options)


GOOD = {"a": flips(0.8, 1), "b": flips(0.7, 2)}
WORSE = {"a": flips(0.4, 1), "b": flips(0.35, 2)}  # wrong wherever GOOD is wrong, and elsewhere
MIXED = {"a": flips(0.5, 1), "b": flips(0.97, 2)}

POOL = [
    rival({"a": flips(0.7, 1), "b": flips(0.6, 2)}),
    rival({"a": flips(0.75, 1), "b": flips(0.65, 2)}),
]


@pytest.mark.parametrize("kind", ["normalised", "mean", "worst", "tasks"])
def test_a_worse_candidate_is_stopped_before_its_end_and_a_better_one_never(kind):
    racing = Racing(collapse_margin=10.0)
    stopped_at = [
        n
        for n in range(1, 9)
        if stops(racing, objective(kind), known(WORSE, n), [rival(GOOD)], pool=POOL)
    ]
    assert stopped_at
    assert 3 <= min(stopped_at) <= 5
    for n in range(1, 9):
        assert not stops(racing, objective(kind), known(GOOD, n), [rival(WORSE)], pool=POOL)
        assert not stops(racing, objective(kind), known(GOOD, n), [rival(GOOD)], pool=POOL)


def test_with_several_objectives_only_a_dominated_candidate_is_stopped():
    racing = Racing(collapse_margin=10.0)
    front = [rival(GOOD), rival(MIXED)]
    assert not stops(racing, objective("tasks"), known(MIXED, 6), [rival(GOOD)], pool=POOL)
    assert stops(racing, objective("tasks"), known(WORSE, 6), front, pool=POOL)
    assert stops(racing, objective("worst"), known(MIXED, 6), [rival(GOOD)], pool=POOL)


def test_a_candidate_that_breaks_a_constraint_is_stopped_though_its_mean_is_higher():
    racing = Racing(collapse_margin=10.0)
    bound = Constraint("a", "expert", 0.9)
    free, bounded = objective("mean"), objective("mean", constraints=(bound,))
    assert not stops(racing, free, known(MIXED, 6), [rival(GOOD)], pool=POOL)
    assert stops(racing, bounded, known(MIXED, 6), [rival(GOOD)], pool=POOL)
    # where the best breaks it too, breaking it is no reason
    assert not stops(racing, bounded, known(MIXED, 6), [rival(MIXED)], pool=POOL)


def test_a_collapsed_candidate_is_stopped_on_its_first_blocks():
    base = rival({"a": flips(0.6, 1), "b": flips(0.6, 2)})
    collapsed = {"a": [0.0] * N, "b": [0.0] * N}
    racing = Racing(min_blocks=100, collapse_margin=0.1)
    assert stops(racing, objective("mean"), known(collapsed, 2), [], base, pool=POOL)
    assert not stops(racing, objective("mean"), known(GOOD, 2), [], base, pool=POOL)
    lenient = Racing(min_blocks=100, collapse_margin=2.0)
    assert not stops(lenient, objective("mean"), known(collapsed, 8), [], base, pool=POOL)


def test_what_is_not_seen_is_predicted_from_plans_that_did_alike():
    """Examples 0 to 7 of a, seen, go with the last 8 of b in every other plan that fails there."""
    right = {task: [1.0] * N for task in "ab"}
    fails = {"a": [0.0] * 8 + [1.0] * (N - 8), "b": [1.0] * (N - 8) + [0.0] * 8}
    best = rival(right)
    others = [rival(fails), rival({**right, "a": right["a"][:-8] + [0.0] * 8})]
    seen = {
        key: values
        for key, values in known(right, 8).items()
        if key in (("a", "select", 0), ("b", "select", 0))
    }
    failing = {**seen, ("a", "select", 0): (0.0,) * 8}
    outlook = outlook_of(others, best)
    at_b = [predict(BLOCKS, own, best, outlook).scores["b"] for own in (seen, failing)]
    assert at_b[0] == 1.0
    assert 1 - 8 / N <= at_b[1] < 1 - 4 / N


def test_nothing_is_decided_while_nothing_is_known_of_a_task():
    seen = {key: values for key, values in known(WORSE, 8).items() if key[0] == "a"}
    racing = Racing(min_blocks=2)
    assert not stops(racing, objective("normalised"), seen, [rival(GOOD)], rival(GOOD), pool=POOL)
    assert stops(racing, objective("worst"), seen, [rival(GOOD)], pool=POOL)


def test_a_score_that_is_no_mean_counts_once_it_is_known():
    info = TaskInfo(N, mean=False)
    blocks = {**BLOCKS, "b": make_blocks("b", "select", range(N), info, 8)}
    whole = blocks["b"][0].key
    best = Rival({"a": 0.5, "b": 0.9}, {"a": np.array(GOOD["a"]), "b": np.array([0.9])})
    candidate = {**{k: v for k, v in known(GOOD, 4).items() if k[0] == "a"}, whole: (0.2,)}
    predicted = predict(blocks, candidate, best, outlook_of([], best))
    assert predicted.upper(1.6)["b"] == predicted.scores["b"] == pytest.approx(0.2)
    assert stops(Racing(min_blocks=2), objective("mean"), candidate, [best], blocks=blocks)


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
    predicted = predict(BLOCKS, known(draws[0]), best, outlook_of([candidate], best))
    assert predicted.scores == pytest.approx(candidate.scores)
    assert not predicted.covariance.any()
    goal = objective(kind)
    stopped = stops(Racing(p_threshold, 2, 10.0), goal, known(draws[0]), [best])
    if kind == "tasks":
        assert stopped == goal.dominates(best.scores, candidate.scores)
    elif abs(goal.scalar(candidate.scores) - goal.scalar(best.scores)) > 1e-9:
        assert stopped == (goal.scalar(candidate.scores) < goal.scalar(best.scores))


def test_a_candidate_as_good_as_the_best_is_seldom_stopped():
    """Of 400 candidates that tie with the best or beat it in full, few are lost in 8 looks."""
    generator = np.random.default_rng(0)
    goal = objective("mean")
    difficulty = generator.random((2, N))

    def draw():
        noise = generator.random((2, N))
        right = 0.7 * difficulty + 0.3 * noise < 0.6
        return {task: list(right[i] * 1.0) for i, task in enumerate("ab")}

    pool = [rival(draw()) for _ in range(12)]
    squares = outlook_of(pool, pool[0]).squares
    order = {task: np.argsort(-own, kind="stable") for task, own in squares.items()}
    lost = n_candidates = 0
    while n_candidates < 400:
        best, candidate = (
            {task: [own[e] for e in order[task]] for task, own in draw().items()} for _ in range(2)
        )
        if goal.scalar(rival(candidate).scores) < goal.scalar(rival(best).scores):
            continue
        n_candidates += 1
        lost += any(
            stops(Racing(), goal, known(candidate, n), [rival(best)], pool=pool)
            for n in range(1, 9)
        )
    assert lost <= 0.05 * 400
