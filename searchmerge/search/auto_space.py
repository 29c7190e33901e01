"""The space of a study that names none: the strong methods, each with the numbers that matter."""

from collections.abc import Sequence

from searchmerge.merging.method import DEPTH_SLOPE, METHODS, Hyperparameter
from searchmerge.plan import WHOLE
from searchmerge.search.searched import Interval, Per, Range, SearchedRows
from searchmerge.search.space import Alternative, SearchSpace

EACH = " each"
"""What ends the name of a method's finer alternative: a coefficient for each expert."""

_SLOPES = Interval(-0.5, 1.0)


def auto_space(experts: Sequence[str]) -> SearchSpace:
    """Return the space of all methods that publish a setting, coarse and fine.

    A method's coarse alternative has one coefficient and, where it has one, one density. The fine
    one has a coefficient for each expert, and a slope over depth besides. The average is not
    among them: it is task arithmetic with one coefficient.

    Args:
        experts: Their names, in the order of every row.
    """
    alternatives = []
    for method in sorted(METHODS):
        declared = METHODS[method]
        if declared.published is None or method == "linear":
            continue
        coarse = {h.name: _range(h, "all") for h in declared.hyperparameters}
        fine = {
            h.name: _range(h, "expert" if h.name == "coefficient" else "all")
            for h in declared.hyperparameters
        }
        alternatives += [
            Alternative(method, method, WHOLE, coarse),
            Alternative(f"{method}{EACH}", method, WHOLE, fine, {DEPTH_SLOPE.name: _SLOPES}),
        ]
    return SearchSpace(experts, alternatives, is_auto=True)


def _range(legal: Hyperparameter, per: Per) -> SearchedRows:
    low, high = legal.search
    return Range(low, high, per, legal.step)
