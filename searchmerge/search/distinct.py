"""Choosing plans that differ: three copies of one plan are one candidate, and not three."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from searchmerge.execution.blocks import BlockValues
from searchmerge.merging.method import with_defaults
from searchmerge.plan import WHOLE, MergePlan
from searchmerge.search.trials import TrialRecord

NEAR = 0.02
"""Up to this part of the largest number of their hyper-parameter, numbers are nearly the same."""


def distinct(
    records: Sequence[TrialRecord],
    n: int,
    observed: Callable[[MergePlan], BlockValues],
    references: Iterable[MergePlan] = (),
) -> list[TrialRecord]:
    """Return the first ``n`` records whose plans differ, in their order; fewer if no more do.

    A plan that is nearly one before, or a reference, is left out. One that scores on every
    example as one of these gets a place where places are left, since nothing tells the two apart.

    Args:
        records: Best first.
        n: How many to return, at most.
        observed: Returns what a plan scored.
        references: Plans that have places of their own.
    """
    taken = list(references)
    answers = [_on_select(observed(plan)) for plan in taken]
    chosen: list[TrialRecord] = []
    alike: list[TrialRecord] = []
    for record in records:
        if len(chosen) == n:
            break
        if are_near(record.plan, taken):
            continue
        answered = _on_select(observed(record.plan))
        if answered and answered in answers:
            alike.append(record)
        else:
            chosen.append(record)
            taken.append(record.plan)
            answers.append(answered)
    for record in alike:
        if len(chosen) < n and not are_near(record.plan, taken):
            chosen.append(record)
            taken.append(record.plan)
    numbers = {record.number for record in chosen}
    return [record for record in records if record.number in numbers]


def are_near(plan: MergePlan, others: Iterable[MergePlan]) -> bool:
    """Return whether a plan does the same as one of others, with nearly the same numbers."""
    plan = _plainly(plan)
    return any(_is_near(plan, _plainly(other)) for other in others)


def _plainly(plan: MergePlan) -> MergePlan:
    """Return the plan in the form that is equal for plans that are written otherwise alone.

    Settings that are not named are their defaults; groups with the same rows are the whole; and
    an average is a sum of task vectors whose coefficients sum to 1.
    """
    settings = with_defaults(plan.method, plan.settings)
    plan = replace(plan, settings=settings)
    if all(len(set(rows)) == 1 for rows in plan.values.values()):
        values = {name: rows[:1] for name, rows in plan.values.items()}
        plan = replace(plan, groups=WHOLE, values=values)
    if plan.method == "linear":
        rows = plan.values["coefficient"]
        shares = tuple(tuple(number / (sum(row) or 1.0) for number in row) for row in rows)
        plan = replace(plan, method="task_arithmetic", values={"coefficient": shares})
    return plan


def _is_near(plan: MergePlan, other: MergePlan) -> bool:
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


def _on_select(observed: BlockValues) -> BlockValues:
    """Return what a plan scored on the examples that trials see."""
    return {key: values for key, values in observed.items() if key[1] == "select"}
