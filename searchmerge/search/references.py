"""What a found merge is compared with: the models themselves, and the published settings."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from searchmerge.merging.method import METHODS, default_plan
from searchmerge.plan import MergePlan

BASE = "base"

_MOST_WORK = 2e12
"""Up to this many products of a matrix's sides and its shorter one a reference may be taken apart:
about ten minutes of one core, which does some 2.5e9 of them a second. Eight encoders of 110M
parameters or four models of 0.5B stay below it; three of 1B do not."""


def reference_plans(
    experts: Sequence[str], left_out: Collection[str] = ()
) -> dict[str, MergePlan]:
    """Return the plans of the base, of each expert, and of what methods publish, oldest first.

    The base and the experts are written as task arithmetic with coefficients 0 and 1.

    Args:
        experts: Expert names.
        left_out: Methods whose published setting is no reference here.
    """
    settings = {m: METHODS[m].published for m in METHODS if m not in left_out}
    published = {method: setting for method, setting in settings.items() if setting is not None}
    return {
        BASE: default_plan("task_arithmetic", experts, coefficient=0.0),
        **{expert_name(expert): _alone(expert, experts) for expert in experts},
        **{
            published[method].name: default_plan(method, experts)
            for method in sorted(published, key=lambda method: published[method].arxiv)
        },
    }


def slow_methods(shapes: Iterable[Sequence[int]], n_experts: int) -> list[str]:
    """Return the methods whose published setting takes too long to be merged for a comparison.

    That depends on the models alone, so that a study has the same references on any machine.

    Args:
        shapes: Of the tensors that are merged; those that are no matrix are not taken apart.
        n_experts: How many experts are merged.
    """
    work = n_experts * sum(prod(shape) * min(shape) for shape in shapes if len(shape) == 2)
    if work <= _MOST_WORK:
        return []
    published = {method: METHODS[method].published for method in METHODS}
    return [method for method, setting in published.items() if setting and setting.decomposes]


def expert_name(expert: str) -> str:
    """Return what an expert alone is called in tables."""
    return f"expert {expert}"


def is_merge(name: str) -> bool:
    """Return whether what is called so in tables merges: not the base, and no expert alone."""
    return name != BASE and not name.startswith(expert_name(""))


def merges(references: Mapping[str, MergePlan]) -> list[MergePlan]:
    """Return those references that merge."""
    return [plan for name, plan in references.items() if is_merge(name)]


def _alone(expert: str, experts: Sequence[str]) -> MergePlan:
    row = tuple(float(other == expert) for other in experts)
    return MergePlan("task_arithmetic", tuple(experts), {"coefficient": (row,)})
