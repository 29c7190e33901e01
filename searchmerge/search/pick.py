"""Which plan is saved: the one with the best evidence, found or published."""

from collections.abc import Collection, Mapping

import numpy as np

from searchmerge.evaluators.score_kind import Mean
from searchmerge.execution.blocks import Part
from searchmerge.plan import MergePlan
from searchmerge.search.evidence import Evidence, Measured
from searchmerge.search.objective import Objective
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import Standing

Plans = Mapping[str, MergePlan]


def measured(board: Scoreboard, plans: Plans, part: Part, objective: Objective) -> Measured:
    """Return what plans scored on ``part``, all in full, and how far that is chance.

    Where the objective is no weighted mean of means over examples, nothing is known of chance:
    the variances are 0.
    """
    tasks = board.schedule.tasks.values()
    is_mean = objective.kind in ("normalised", "mean")
    if is_mean and all(isinstance(info.kind, Mean) for info in tasks):
        observations = {name: board.observations(plan, part) for name, plan in plans.items()}
        return Measured.of(observations, {task: objective.unit(task) for task in objective.goals})
    values = [objective.scalar(board.estimates(plan, part)) for plan in plans.values()]
    return Measured(tuple(plans), np.array(values), np.zeros(len(values)))


def evidence_on_select(
    board: Scoreboard, plans: Plans, objective: Objective, merges: Collection[str]
) -> Evidence:
    """Return what is believed of plans after the search.

    Args:
        board: Holds their scores, all in full.
        plans: The references and the trials.
        objective: What to compare by.
        merges: Which of them tell what merges usually score: all but the base and the experts.
    """
    typical = [name for name in plans if name in merges] or list(plans)
    return Evidence.shrunken(measured(board, plans, "select", objective), typical)


def confirmed(board: Scoreboard, before: Evidence, plans: Plans, objective: Objective) -> Evidence:
    """Return what is believed of plans after they were scored on held-out examples too.

    Those that break a constraint on what trials see are left out where there are others.

    Args:
        board: Holds their scores, all in full.
        before: What was believed after the search.
        plans: The plans that may be saved.
        objective: What to compare by.
    """
    kept = {
        name: Standing.of(objective.violations(board.scores(plan, "select")).values(), 0.0).kept
        for name, plan in plans.items()
    }
    allowed = {name: plan for name, plan in plans.items() if kept[name] == max(kept.values())}
    return before.and_measured(measured(board, allowed, "hold_out", objective))


def ranking(board: Scoreboard, before: Evidence, plans: Plans, objective: Objective) -> list[str]:
    """Return all plans, best first: those that :func:`confirmed` leaves out come last.

    Args:
        board: As for :func:`confirmed`, and so are the others.
        before: What was believed after the search.
        plans: The plans that may be saved.
        objective: What to compare by.
    """
    ranked: list[str] = []
    while left := {name: plan for name, plan in plans.items() if name not in ranked}:
        ranked += confirmed(board, before, left, objective).ranked()
    return ranked


def broken(board: Scoreboard, plans: Plans, objective: Objective) -> dict[str, tuple[str, ...]]:
    """Return the constraints that plans break on what trials see, of those that break some."""
    violations = {n: objective.violations(board.scores(p, "select")) for n, p in plans.items()}
    names = {n: tuple(c for c, by in its.items() if by > 0) for n, its in violations.items()}
    return {name: constraints for name, constraints in names.items() if constraints}
