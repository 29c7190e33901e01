"""What a found merge is compared with: the models themselves, and the published settings."""

from collections.abc import Mapping, Sequence

from searchmerge.merging.method import default_plan
from searchmerge.plan import MergePlan

BASE = "base"


def reference_plans(experts: Sequence[str]) -> dict[str, MergePlan]:
    """Return the plans of the base, each expert, and four methods at their published settings.

    The base and the experts are written as task arithmetic with coefficients 0 and 1. Published
    are the uniform average; task arithmetic 0.4; TIES keeping 20 % with coefficient 1; PCB
    keeping 10 % with coefficient 1.
    """
    return {
        BASE: default_plan("task_arithmetic", experts, coefficient=0.0),
        **{expert_name(expert): _alone(expert, experts) for expert in experts},
        "average": default_plan("linear", experts),
        "task arithmetic": default_plan("task_arithmetic", experts),
        "TIES": default_plan("ties", experts),
        "PCB": default_plan("pcb", experts),
    }


def expert_name(expert: str) -> str:
    """Return what an expert alone is called in tables."""
    return f"expert {expert}"


def merges(references: Mapping[str, MergePlan]) -> list[MergePlan]:
    """Return those references that merge: not the base, and no expert alone."""
    return [
        plan
        for name, plan in references.items()
        if name != BASE and name not in {expert_name(expert) for expert in plan.experts}
    ]


def _alone(expert: str, experts: Sequence[str]) -> MergePlan:
    row = tuple(float(other == expert) for other in experts)
    return MergePlan("task_arithmetic", tuple(experts), {"coefficient": (row,)})
