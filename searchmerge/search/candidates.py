"""The candidates of a study: the plans among which the one to be saved is chosen."""

from collections.abc import Callable, Iterable, Sequence

from searchmerge.execution.blocks import BlockValues
from searchmerge.plan import MergePlan
from searchmerge.search.distinct import are_near, distinct
from searchmerge.search.objective import Objective
from searchmerge.search.trials import TrialRecord, best_of


def candidates(records: Iterable[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """Return the trials that have a score, ranked by ``objective`` from here on.

    The records hold what the objective made of the scores when they were kept; what is picked
    from a front may have been changed since.
    """
    return [r.judged(objective, r.scores, r.estimates) for r in records if r.value is not None]


def best_candidates(
    scored: Sequence[TrialRecord],
    n_best: int,
    references: Iterable[MergePlan],
    observed: Callable[[MergePlan], BlockValues],
) -> list[TrialRecord]:
    """Return the best candidates, best first, whose plans differ, also from the references.

    Args:
        scored: From :func:`candidates`.
        n_best: How many to return, at most.
        references: Plans that are scored whatever the search finds.
        observed: Returns what a plan scored.
    """
    references = list(references)
    found = [record for record in scored if not are_near(record.plan, references)]
    return distinct(best_of(found, len(found)), n_best, observed, references)
