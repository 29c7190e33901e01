"""What is said of trials that failed: how many, why most of them did, how they are tried again."""

from collections import Counter
from collections.abc import Iterable, Mapping

from searchmerge.errors import printable
from searchmerge.search.trials import TrialRecord
from searchmerge.wording import counted

TRIED_AGAIN = "the same `searchmerge run` with --retry-failed tries them again"

_LONGEST = 300  # characters of a reason


def failure_reasons(records: Iterable[TrialRecord]) -> dict[str, int]:
    """Return why trials failed, each in a line, and how many did; the commonest reason first."""
    reasons = (_in_short(record.failure) for record in records if record.value is None)
    return dict(Counter(reasons).most_common())


def told_failures(reasons: Mapping[str, int], n_trials: int) -> str:
    """Return in a line that trials failed, and what can be done; empty where none did.

    Args:
        reasons: From :func:`failure_reasons`.
        n_trials: How many trials there are, those that have a score among them.
    """
    if not reasons:
        return ""
    n_failed, (reason, n_alike) = sum(reasons.values()), next(iter(reasons.items()))
    which = f"{n_alike} of them " if n_alike > 1 else "the first "
    return (
        f"{n_failed} of {counted(n_trials, 'trial')} failed, "
        f"{'' if n_alike == n_failed else which}as: {reason.rstrip('.')}. If that is mended, "
        f"{TRIED_AGAIN}."
    )


def _in_short(reason: str) -> str:
    line = printable(reason.strip().partition("\n")[0])
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
