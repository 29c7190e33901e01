"""The candidates of a study: the plans among which the one to be saved is chosen."""

from collections.abc import Iterable

from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.search.objective import Objective
from searchmerge.search.trials import TrialRecord, best_of


def candidates(records: Iterable[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """Return the trials that have a score, ranked by ``objective`` from here on.

    The records hold what the objective made of the scores when they were kept; what is picked
    from a front may have been changed since.
    """
    return [r.judged(objective, r.scores, r.estimates) for r in records if r.value is not None]


def best_candidates(
    scored: Iterable[TrialRecord], n_best: int, references: Iterable[MergePlan]
) -> list[TrialRecord]:
    """Return the best candidates but the references, best first, each plan once.

    Args:
        scored: From :func:`candidates`.
        n_best: How many to return, at most.
        references: Plans that are scored whatever the search finds.

    Raises:
        StudyError: If there is none.
    """
    best = best_of(scored, n_best, references)
    if not best:
        raise StudyError(
            "no trial but the references was scored, so there is nothing to confirm; "
            "give the search more trials or time"
        )
    return best
