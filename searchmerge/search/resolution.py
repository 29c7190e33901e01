"""How far apart plans must be for the examples that select to tell them apart."""

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from statistics import median

import numpy as np

from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.pick import measured
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.space import SearchSpace

DISAGREE = 0.1
"""On this part of right-or-wrong examples one of two good plans is right and the other wrong, as
long as nothing is known of a study's own plans."""
N_ERRORS = 2
"""As many standard errors apart plans are told apart."""
WANTED = 0.02
"""A difference worth finding, in units of the objective."""
REALISTIC = 10_000
"""Nobody gathers, or waits for, more examples of a task."""
_TRIALS = 40  # of `space: auto`, which has few numbers that matter
_TRIALS_A_NUMBER = 10
_MOST_TRIALS = 200


def expected_error(objective: Objective, n_select: Mapping[str, int]) -> float:
    r"""Return the standard error of the difference of two good plans, before any is scored.

    Where a part :math:`q` of n examples tells two plans apart, the difference of their accuracies
    has the variance :math:`q / n`. Own experts, which normalise it, are taken to score 1; where
    one scores less its task weighs more. Of an objective that is no mean over tasks it is the
    error of the task that has the fewest examples.

    Args:
        objective: What is maximised.
        n_select: Task name to its examples that trials see, all right or wrong.
    """
    variances = {task: DISAGREE / n for task, n in n_select.items()}
    if objective.kind not in ("normalised", "mean"):
        return math.sqrt(max(variances.values()))
    total = sum(goal.weight for goal in objective.goals.values())
    shares = {task: goal.weight / total for task, goal in objective.goals.items()}
    return math.sqrt(sum(shares[task] ** 2 * variance for task, variance in variances.items()))


def recorded_error(
    board: Scoreboard, plans: Iterable[MergePlan], objective: Objective
) -> float | None:
    """Return the standard error of the difference of two good plans that were scored.

    It is the median over all pairs of the better half of the plans, by the metric alone, on what
    the references are scored on first. The plans should differ as those of several methods do:
    between neighbours of one search the error is small, and so is what there is to be told.

    Args:
        board: Holds the scores of an earlier run.
        plans: Merges that are known to be sensible; those without all scores do not count.
        objective: What is maximised, with the experts' scores put in.

    Returns:
        ``None`` with fewer than two such plans, or an objective that is no mean of means.
    """
    scored = {plan.digest: plan for plan in plans if board.is_full(plan, "pilot")}
    if len(scored) < 2:
        return None
    together = measured(board, scored, "pilot", objective)
    best = [together.names[i] for i in np.argsort(-together.values, kind="stable")]
    good = best[: max(2, (len(best) + 1) // 2)]
    variances = []
    for pair in combinations(good, 2):
        two = measured(board, {digest: scored[digest] for digest in pair}, "pilot", objective)
        variances.append(4 * float(two.variances[0]))  # each is half the difference off the mean
    return math.sqrt(median(variances)) or None


def examples_wanted(error: float, n_examples: int, block_size: int) -> int:
    """Return of how many examples a task has to have to tell :data:`WANTED` apart.

    Args:
        error: The standard error with as many as there are, of the difference of two plans.
        n_examples: How many there are.
        block_size: Examples in a block; whole blocks are returned.

    Returns:
        ``n_examples`` where that is enough, else what brings the error down.
    """
    wanted = n_examples * (N_ERRORS * error / WANTED) ** 2
    if wanted <= n_examples:
        return n_examples
    return math.ceil(wanted / block_size) * block_size


def trials_wanted(space: SearchSpace) -> int:
    """Return how many trials suit a space: about ten for each number, of each alternative."""
    if space.is_auto:
        return _TRIALS
    largest = max(len(space.distributions(name)) for name in space.alternatives)
    wanted = _TRIALS_A_NUMBER * largest * len(space.alternatives)
    return min(_MOST_TRIALS, max(_TRIALS // 2, wanted))
