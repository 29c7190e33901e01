"""A candidate is stopped only when it will not win, by whatever the study maximises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.score_kind import Whole
from searchmerge.execution.blocks import make_blocks
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.racing import Observed, PlanScores, Racing, incumbent_of, predict
from searchmerge.search.schedule import Schedule
from searchmerge.search.trials import TrialRecord

N = 64


def places(**infos):
    """Return where the observations of blocks of 8 stand."""
    blocks = {task: make_blocks(task, "select", range(N), info, 8) for task, info in infos.items()}
    schedule = Schedule.interleaved(infos, {"select": blocks}, round_blocks=1, seed=None)
    return schedule.places("select")


PLACES = places(a=TaskInfo(N), b=TaskInfo(N))
GOALS = {"a": Goal(1.0, "A"), "b": Goal(2.0, "B")}


def first(values, n_blocks=8):
    """Return what is observed on the first blocks of each task, from task name to 64 values."""
    return Observed(
        {
            key: tuple(values[task][place])
            for task, blocks in PLACES.items()
            for key, place in list(blocks.items())[:n_blocks]
        }
    )


def scored(values):
    arrays = {task: np.array(numbers) for task, numbers in values.items()}
    return PlanScores({task: float(array.mean()) for task, array in arrays.items()}, arrays)


def stops(racing, goal, candidate, plans, base=None, places=PLACES, pool=()):
    """Return whether a candidate is stopped; the pool tells how much plans differ."""
    incumbents = [incumbent_of(plan, [*pool, *plans]) for plan in plans]
    below = incumbent_of(base, [*pool, *plans]) if base else None
    return racing.stops(goal, places, candidate, incumbents, below)


def flips(share, seed=0):
    return [float(x < share) for x in np.random.default_rng(seed).random(N)]


def objective(kind, **options):
    return Objective(kind, GOALS, {"a": 0.8, "b": 0.5}, {"a": 0.3, "b": 0.3}, **options)


GOOD = {"a": flips(0.8, 1), "b": flips(0.7, 2)}
WORSE = {"a": flips(0.4, 1), "b": flips(0.35, 2)}  # wrong wherever GOOD is wrong, and elsewhere
MIXED = {"a": flips(0.5, 1), "b": flips(0.97, 2)}

POOL = [
    scored({"a": flips(0.7, 1), "b": flips(0.6, 2)}),
    scored({"a": flips(0.75, 1), "b": flips(0.65, 2)}),
]


@pytest.mark.parametrize("kind", ["normalised", "mean", "worst", "tasks"])
def test_a_worse_candidate_is_stopped_before_its_end_and_a_better_one_never(kind):
    racing = Racing(collapse_margin=10.0)
    stopped_at = [
        n
        for n in range(1, 9)
        if stops(racing, objective(kind), first(WORSE, n), [scored(GOOD)], pool=POOL)
    ]
    assert stopped_at
    assert 3 <= min(stopped_at) <= 5
    for n in range(1, 9):
        assert not stops(racing, objective(kind), first(GOOD, n), [scored(WORSE)], pool=POOL)
        assert not stops(racing, objective(kind), first(GOOD, n), [scored(GOOD)], pool=POOL)


def test_with_several_objectives_only_a_dominated_candidate_is_stopped():
    racing = Racing(collapse_margin=10.0)
    front = [scored(GOOD), scored(MIXED)]
    assert not stops(racing, objective("tasks"), first(MIXED, 6), [scored(GOOD)], pool=POOL)
    assert stops(racing, objective("tasks"), first(WORSE, 6), front, pool=POOL)
    assert stops(racing, objective("worst"), first(MIXED, 6), [scored(GOOD)], pool=POOL)


def test_a_candidate_that_breaks_a_constraint_is_stopped_though_its_mean_is_higher():
    racing = Racing(collapse_margin=10.0)
    bound = Constraint("a", "expert", 0.9)
    free, bounded = objective("mean"), objective("mean", constraints=(bound,))
    assert not stops(racing, free, first(MIXED, 6), [scored(GOOD)], pool=POOL)
    assert stops(racing, bounded, first(MIXED, 6), [scored(GOOD)], pool=POOL)
    # where the best breaks it too, breaking it is no reason
    assert not stops(racing, bounded, first(MIXED, 6), [scored(MIXED)], pool=POOL)


def test_a_collapsed_candidate_is_stopped_on_its_first_blocks():
    base = scored({"a": flips(0.6, 1), "b": flips(0.6, 2)})
    collapsed = {"a": [0.0] * N, "b": [0.0] * N}
    racing = Racing(min_blocks=100, collapse_margin=0.1)
    assert stops(racing, objective("mean"), first(collapsed, 2), [], base, pool=POOL)
    assert not stops(racing, objective("mean"), first(GOOD, 2), [], base, pool=POOL)
    lenient = Racing(min_blocks=100, collapse_margin=2.0)
    assert not stops(lenient, objective("mean"), first(collapsed, 8), [], base, pool=POOL)


def test_what_is_not_seen_is_predicted_from_plans_that_did_alike():
    """Examples 0 to 7 of a, seen, go with the last 8 of b in every other plan that fails there."""
    right = {task: [1.0] * N for task in "ab"}
    fails = {"a": [0.0] * 8 + [1.0] * (N - 8), "b": [1.0] * (N - 8) + [0.0] * 8}
    best = scored(right)
    others = [scored(fails), scored({**right, "a": right["a"][:-8] + [0.0] * 8})]
    seen = {
        key: values
        for key, values in first(right, 8).values.items()
        if key in (("a", "select", 0), ("b", "select", 0))
    }
    failing = {**seen, ("a", "select", 0): (0.0,) * 8}
    incumbent = incumbent_of(best, others)
    at_b = [predict(PLACES, Observed(values), incumbent).scores["b"] for values in (seen, failing)]
    assert at_b[0] == 1.0
    assert 1 - 8 / N <= at_b[1] < 1 - 4 / N


def test_a_unit_that_may_be_off_makes_a_prediction_less_certain_and_a_stop_later():
    """All of a task is off at once, so that what is seen is off by the sum of its shifts."""
    values = first(WORSE, 5).values
    certain = Observed(values)
    doubted = Observed(values, {k: (0.9,) * len(v) for k, v in values.items() if k[0] == "a"})
    incumbent = incumbent_of(scored(GOOD), POOL)
    before, after = (predict(PLACES, seen, incumbent) for seen in (certain, doubted))
    assert after.scores == before.scores
    added = after.covariance - before.covariance
    moved = {k: tuple(np.add(v, 0.9)) if k[0] == "a" else v for k, v in values.items()}
    shifted = predict(PLACES, Observed(moved), incumbent).scores
    by = np.array([shifted[task] - before.scores[task] for task in before.scores])
    assert added == pytest.approx(np.outer(by, by))
    assert by[0] > 0.9 * 40 / N
    racing = Racing(collapse_margin=10.0)
    for seen, expected in ((certain, True), (doubted, False)):
        assert stops(racing, objective("mean"), seen, [scored(GOOD)], pool=POOL) is expected


def test_nothing_is_decided_while_nothing_is_known_of_a_task():
    everything = first(WORSE, 8).values
    seen = Observed({key: values for key, values in everything.items() if key[0] == "a"})
    racing = Racing(min_blocks=2)
    assert not stops(
        racing, objective("normalised"), seen, [scored(GOOD)], scored(GOOD), pool=POOL
    )
    assert stops(racing, objective("worst"), seen, [scored(GOOD)], pool=POOL)


def test_a_score_that_is_no_mean_counts_once_it_is_known():
    both = places(a=TaskInfo(N), b=TaskInfo(N, kind=Whole()))
    [whole] = both["b"]
    best = PlanScores({"a": 0.5, "b": 0.9}, {"a": np.array(GOOD["a"]), "b": np.array([0.9])})
    of_a = {k: v for k, v in first(GOOD, 4).values.items() if k[0] == "a"}
    candidate = Observed({**of_a, whole: (0.2,)})
    predicted = predict(both, candidate, incumbent_of(best, []))
    assert predicted.upper(1.6)["b"] == predicted.scores["b"] == pytest.approx(0.2)
    assert stops(Racing(min_blocks=2), objective("mean"), candidate, [best], places=both)


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
    draws = [{t: list(generator.integers(0, 2, N) * 1.0) for t in PLACES} for _ in range(2)]
    candidate, best = (scored(values) for values in draws)
    predicted = predict(PLACES, first(draws[0]), incumbent_of(best, [candidate]))
    assert predicted.scores == pytest.approx(candidate.scores)
    assert not predicted.covariance.any()
    goal = objective(kind)
    stopped = stops(Racing(p_threshold, 2, 10.0), goal, first(draws[0]), [best])
    if kind == "tasks":
        theirs, mine = (
            TrialRecord(0, None).judged(goal, plan.scores) for plan in (best, candidate)
        )
        assert stopped == theirs.dominates(mine)
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

    pool = [scored(draw()) for _ in range(12)]
    squares = incumbent_of(pool[0], pool).prior.squares
    order = {task: np.argsort(-expected, kind="stable") for task, expected in squares.items()}
    lost = n_candidates = 0
    while n_candidates < 400:
        best, candidate = (
            {t: [values[e] for e in order[t]] for t, values in draw().items()} for _ in range(2)
        )
        if goal.scalar(scored(candidate).scores) < goal.scalar(scored(best).scores):
            continue
        n_candidates += 1
        lost += any(
            stops(Racing(), goal, first(candidate, n), [scored(best)], pool=pool)
            for n in range(1, 9)
        )
    assert lost <= 0.05 * 400
