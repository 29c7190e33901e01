"""The candidates of a study: which are best, and which are on the front."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.runner import PLAN, RESULT
from searchmerge.search.schedule import Schedule
from searchmerge.search.study import StudyDirectory


@dataclass(frozen=True, slots=True)
class Candidate:
    """A finished trial.

    Attributes:
        number: Of the trial.
        plan: What it merged.
        scores: Task name to score; expected ones where it was stopped early.
        is_full: Whether it was scored on every example.
    """

    number: int
    plan: MergePlan
    scores: dict[str, float]
    is_full: bool

    @property
    def name(self) -> str:
        """Return what it is called in tables."""
        return f"trial {self.number}"


def candidates(directory: StudyDirectory, schedule: Schedule) -> list[Candidate]:
    """Return all trials that have a score, by number."""
    store, found = directory.scores, []
    for trial in directory.trials(TrialState.COMPLETE):
        plan = MergePlan.from_dict(trial.user_attrs[PLAN])
        is_full = schedule.is_known(store, plan, "select")
        result: dict[str, Any] = trial.user_attrs[RESULT]
        scores = schedule.scores(store, plan, "select") if is_full else result["scores"]
        found.append(Candidate(trial.number, plan, scores, is_full))
    return found


def front_of(found: Sequence[Candidate], objective: Objective) -> list[Candidate]:
    """Return those that keep all constraints and that no other such candidate dominates.

    With one objective there is no front, and none is returned.
    """
    if len(objective.names) < 2:
        return []
    feasible = [one for one in found if objective.is_feasible(one.scores)]
    return [
        one
        for one in feasible
        if not any(objective.dominates(other.scores, one.scores) for other in feasible)
    ]


def best_of(
    found: Sequence[Candidate], objective: Objective, n_best: int, but: Iterable[MergePlan] = ()
) -> list[Candidate]:
    """Return the best candidates, best first, each plan once.

    Plans that keep all constraints come before those that do not, which are left out where there
    is one that does; with several objectives those on the front come before the others.

    Args:
        found: From :func:`candidates`.
        objective: What is maximised.
        n_best: How many to return, at most.
        but: Plans that do not count, e.g. the references.

    Raises:
        StudyError: If there is none.
    """
    front = {one.number for one in front_of(found, objective)}
    ranked = sorted(
        found,
        key=lambda one: (one.number in front, *objective.standing(one.scores)),
        reverse=True,
    )
    known = {plan.digest for plan in but}
    best: list[Candidate] = []
    for one in ranked:
        if one.plan.digest not in known:
            known.add(one.plan.digest)
            best.append(one)
    if not best:
        raise StudyError(
            "no trial but the references was scored, so there is nothing to confirm; "
            "give the search more trials or time"
        )
    feasible = [one for one in best if objective.is_feasible(one.scores)]
    return (feasible or best)[:n_best]
