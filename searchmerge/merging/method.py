"""What a merge method is, what it may be told, and the registry of those there are.

Importing the package ``searchmerge.merging.methods`` registers every method.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan, Setting
from searchmerge.registry import Registry


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A number per expert that a merge method takes and a study may search.

    Attributes:
        name: The name used in plans, study files and reports.
        low: Smallest legal value, included.
        high: Largest legal value, included.
        default: The value that the method's paper recommends.
        search: A good range to search, both ends included.
        step: Distance between values worth telling apart; ``None`` for any.
    """

    name: str
    low: float
    high: float
    default: float
    search: tuple[float, float]
    step: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A method-wide choice.

    Attributes:
        name: The name used under ``settings``.
        default: The value where a plan says nothing.
        choices: The words allowed; empty where it is a number.
        low: Smallest legal number, included.
        high: Largest legal number, included.
        whole: Whether the number must be an integer, e.g. a seed.
    """

    name: str
    default: Setting
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False


DEPTH_SLOPE = Choice("depth_slope", default=0.0, low=-1.0, high=10.0)
r"""A setting of every method: coefficients that grow linearly with depth.

A parameter at relative depth :math:`l \in [0, 1]` has its coefficients multiplied by
:math:`1 + s\,l` (LiNeS, Wang et al., 2024, arXiv:2410.17146, which scales layer :math:`l` by
:math:`\alpha + \beta\,(l - 1)/(L - 1)`; here :math:`\alpha` is the coefficient and
:math:`s = \beta / \alpha`). What lies before the layers counts as depth 0, what lies behind them
as depth 1; the paper leaves both open.
"""


@dataclass(frozen=True, slots=True)
class Bound:
    """A method with all its numbers fixed for one trial.

    Attributes:
        combine: A pure function of stacked task vectors ``(n_experts, m)`` float32, which it
            may overwrite, and scalars ``(n_scalars, n_experts)`` float32; returns the merged
            task vector ``(m,)`` float32, and a tally ``(2,)`` that is summed over all chunks, or
            ``None``. It works entry by entry, so the engine may cut a parameter anywhere.
        scalars: For each row of the plan, ``(n_scalars, n_experts)`` as nested lists.
        settle: Given the tally's sum, returns the bound method to do the pass again with, or
            ``None`` where the pass stands. ``None`` for methods that have no tally.
    """

    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    scalars: Sequence[Sequence[Sequence[float]]]
    settle: "Callable[[Tensor], Bound | None] | None" = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A plan's numbers as a method sees them: groups and depth slope are taken care of.

    Attributes:
        settings: Every setting of the method, defaults put in.
        rows: For each row, hyper-parameter name to one number per expert. A method makes its
            scalars of each row alike.
    """

    settings: Mapping[str, Setting]
    rows: Sequence[Mapping[str, tuple[float, ...]]]


class MergeMethod(Protocol):
    """A way of merging task vectors, in three steps with three lifetimes.

    Constructing it measures, once a worker, what does not depend on the trial. :meth:`bind`
    fixes, once a trial, what the plan decides. The function in what it returns is called once a
    parameter, and does nothing but arithmetic.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]]
    settings: ClassVar[tuple[Choice, ...]]

    def __init__(self, task_vectors: TaskVectors) -> None: ...

    def bind(self, rows: Rows) -> Bound:
        """Return the arithmetic that merges every parameter under ``rows``."""
        ...


METHODS: Registry[type[MergeMethod]] = Registry("merge method")

COEFFICIENT = Hyperparameter("coefficient", -10.0, 10.0, default=1.0, search=(0.0, 2.0))


def settings_of(method: str) -> dict[str, Choice]:
    """Return every setting that a plan of ``method`` may hold, by name."""
    return {choice.name: choice for choice in (*METHODS[method].settings, DEPTH_SLOPE)}


def default_plan(method: str, experts: Sequence[str], **overrides: float) -> MergePlan:
    """Return the plan with the published value of every hyper-parameter but the overridden."""
    values = {
        h.name: ((overrides.get(h.name, h.default),) * len(experts),)
        for h in METHODS[method].hyperparameters
    }
    return MergePlan(method, tuple(experts), values)


def validate_plan(plan: MergePlan) -> None:
    """Check a plan against what its method allows.

    Raises:
        SpecError: If there is no such method, a hyper-parameter is missing, unknown or out of
            its legal range, or a setting is unknown or not allowed.
    """
    legal = {h.name: h for h in METHODS[plan.method].hyperparameters}
    _check_names("hyper-parameter", plan.method, plan.values, legal)
    if missing := [name for name in legal if name not in plan.values]:
        raise SpecError(f"plan: method {plan.method!r} needs values.{missing[0]}")
    for name, rows in plan.values.items():
        for group, row in zip(plan.groups.names, rows, strict=True):
            _check_row(plan, legal[name], group, row)
    choices = settings_of(plan.method)
    _check_names("setting", plan.method, plan.settings, choices)
    for name, value in plan.settings.items():
        _check_choice(plan.method, choices[name], value)


def _check_names(kind: str, method: str, found: Iterable[str], known: Iterable[str]) -> None:
    if unknown := [name for name in found if name not in known]:
        raise SpecError(
            f"plan: method {method!r} has no {kind} {unknown[0]!r} (it has: {', '.join(known)})"
        )


def _check_row(plan: MergePlan, legal: Hyperparameter, group: str, row: Sequence[float]) -> None:
    for expert, number in zip(plan.experts, row, strict=True):
        if not legal.low <= number <= legal.high:
            raise SpecError(
                f"plan: {legal.name} of expert {expert!r} in group {group!r} is {number}; "
                f"method {plan.method!r} allows [{legal.low}, {legal.high}]"
            )


def _check_choice(method: str, legal: Choice, value: Setting) -> None:
    if legal.choices:
        if value not in legal.choices:
            raise SpecError(
                f"plan: setting {legal.name!r} of method {method!r} is {value!r}; "
                f"allowed: {', '.join(legal.choices)}"
            )
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _is_legal(legal, float(value)):
        raise SpecError(
            f"plan: setting {legal.name!r} of method {method!r} is {value!r}; allowed: "
            f"{'an integer' if legal.whole else 'a number'} in [{legal.low}, {legal.high}]"
        )


def _is_legal(legal: Choice, value: float) -> bool:
    return legal.low <= value <= legal.high and not (legal.whole and value != int(value))
