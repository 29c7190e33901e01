"""On the held-out examples of which tasks each plan is scored."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from searchmerge.search.objective import Objective
from searchmerge.search.references import BASE, is_merge

Extent = Literal["all", "own"]
"""Of the base and the experts: all tasks, or those that others are divided by their scores of."""

TasksOf = Mapping[str, Collection[str]]
"""Plan name to the tasks."""


def tasks_held_out(
    extent: Extent,
    plans: Iterable[str],
    objective: Objective,
    experts: Mapping[str, str],
    ahead: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """Return on the held-out examples of which tasks each plan is scored.

    Merges are scored on those of all, and so is what is ahead of them: it may be saved.

    Args:
        extent: Which of them the others are scored on.
        plans: Names of the references and the best candidates.
        objective: What to compare by.
        experts: Task name to the plan name of its own expert.
        ahead: References with better evidence than all that merge, before any is scored on them.
    """
    everything, own = tuple(objective.goals), dict[str, list[str]]()
    for task, name in experts.items():
        own.setdefault(name, []).append(task)
    own[BASE] = [c.task for c in objective.constraints if c.against == "base"]
    return {
        name: everything
        if extent == "all" or is_merge(name) or name in ahead
        else tuple(task for task in everything if task in own.get(name, ()))
        for name in plans
    }
