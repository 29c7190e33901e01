"""Choosing plans that differ: three copies of one plan are one candidate, and not three."""

from collections.abc import Callable, Sequence

from searchmerge.execution.blocks import BlockValues
from searchmerge.plan import MergePlan
from searchmerge.search.trials import TrialRecord

NEAR = 0.02
"""Up to this part of the largest number of their hyper-parameter, numbers are nearly the same."""


def distinct(
    records: Sequence[TrialRecord], n: int, observed: Callable[[MergePlan], BlockValues]
) -> list[TrialRecord]:
    """Return the first ``n`` records whose plans differ, in their order; fewer if no more do.

    A plan that is nearly one before is left out. One that scores on every example as one before
    gets a place where places are left, since nothing tells the two apart.

    Args:
        records: Best first.
        n: How many to return, at most.
        observed: Returns what a plan scored.
    """
    chosen: list[TrialRecord] = []
    alike: list[TrialRecord] = []
    for record in records:
        if len(chosen) == n:
            break
        if any(_are_near(record.plan, other.plan) for other in chosen):
            continue
        if any(_score_alike(record, other, observed) for other in chosen):
            alike.append(record)
        else:
            chosen.append(record)
    for record in alike:
        if len(chosen) < n and not any(_are_near(record.plan, c.plan) for c in chosen):
            chosen.append(record)
    numbers = {record.number for record in chosen}
    return [record for record in records if record.number in numbers]


def _are_near(plan: MergePlan, other: MergePlan) -> bool:
    """Return whether two plans do the same with nearly the same numbers."""
    same = ("method", "experts", "groups", "settings")
    if any(getattr(plan, name) != getattr(other, name) for name in same):
        return False
    for name, rows in plan.values.items():
        numbers = [number for row in rows for number in row]
        others = [number for row in other.values[name] for number in row]
        tolerance = NEAR * max(map(abs, (*numbers, *others)))
        if any(abs(a - b) > tolerance for a, b in zip(numbers, others, strict=True)):
            return False
    return True


def _score_alike(
    record: TrialRecord, other: TrialRecord, observed: Callable[[MergePlan], BlockValues]
) -> bool:
    """Return whether two plans score the same on every example that trials see."""
    if record.scores != other.scores:
        return False
    scored, others = (
        {key: values for key, values in observed(plan).items() if key[1] == "select"}
        for plan in (record.plan, other.plan)
    )
    return scored == others
