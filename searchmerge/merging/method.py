"""What a merge method is, what it may be told, and the registry of those there are."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.merging.groups import assign_groups
from searchmerge.merging.kernels import ChunkFunction, Numbers, pack
from searchmerge.plan import WHOLE, Groups, MergePlan, SettingValue
from searchmerge.registry import Registry

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A number per expert, and per group, that a merge method takes and a study may search.

    Attributes:
        name: The name used in plans, study files and reports.
        low: Smallest legal value, included.
        high: Largest legal value, included.
        default: The value that the method's paper publishes.
        search: A good range to search, both ends included; the legal one where none is given.
        step: Distance between values worth telling apart; ``None`` for any value.
        shared: Whether all experts have one number where it is searched and a study does not
            say otherwise.
        complement: What a study may call 1 minus the number, to give that instead; ``None``
            where it has no such name.
        is_linear: Whether the merged task vector is a sum over experts of the number times what
            does not depend on it.
    """

    name: str
    low: float
    high: float
    default: float
    search: tuple[float, float] = (math.nan, math.nan)
    step: float | None = None
    shared: bool = False
    complement: str | None = None
    is_linear: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.search[0]):
            object.__setattr__(self, "search", (self.low, self.high))


@dataclass(frozen=True, slots=True)
class Setting:
    """A method-wide choice: one of some values, or a number of a range.

    Attributes:
        name: The name used under ``settings``.
        default: The value where a plan says nothing.
        choices: The values allowed; empty where it is a number.
        low: Smallest legal number, included.
        high: Largest legal number, included.
        step: 1 where only whole numbers are legal, e.g. a seed; ``None`` for any number.
    """

    name: str
    default: SettingValue
    choices: tuple[SettingValue, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    step: float | None = None


COEFFICIENT = Hyperparameter(
    "coefficient", -10.0, 10.0, default=1.0, search=(0.0, 2.0), is_linear=True
)
"""The factor on a task vector; methods take it with their own default and search range, and say
where the merge is not linear in it."""

DENSITY = Hyperparameter(
    "density", 0.0, 1.0, default=0.2, step=0.01, shared=True, complement="drop_ratio"
)
"""The fraction of entries kept; methods take it with their own default and search range."""

DEPTH_SLOPE = Setting("depth_slope", default=0.0, low=-1.0, high=10.0)
r"""A setting of every method: the merged task vector grows linearly with depth.

A parameter at relative depth :math:`l \in [0, 1]` has its merged task vector multiplied by
:math:`1 + s\,l`, which is what multiplying its coefficients does in every method that is linear
in them. LiNeS (Wang et al., 2024, arXiv:2410.17146) scales the l-th of L blocks by
:math:`\alpha + \beta\,(l - 1)/(L - 1)`; here :math:`\alpha` is the coefficient and
:math:`s = \beta / \alpha`. The paper leaves open what becomes of parameters outside the blocks:
here what lies before them counts as the first, what lies behind as the last. 0 is no slope.
"""

SEED = Setting("seed", default=0, low=0, high=2**31 - 1, step=1)
"""A setting of every method that draws random numbers."""


@dataclass(frozen=True, slots=True)
class Published:
    """That a method, with every default, is a setting that a paper publishes: a reference.

    Attributes:
        name: What it is called in tables.
        arxiv: The paper, by which references are ordered: the earliest first.
        decomposes: Whether its first merge takes every matrix apart, which takes time with the
            cube of a model's width.
    """

    name: str
    arxiv: str
    decomposes: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over all parameters, entry by entry, with every number fixed.

    Attributes:
        function: The arithmetic.
        scalars: Parameter name to ``(n_scalars, n_experts)`` float32 on the CPU.
        experts: Indices of the experts that are read; ``None`` for all.
        kept: Parameter name to tensors that :class:`Measure` keeps, or computes when asked.
        keys: Parameter name to int64 ``(n_experts,)``; ``None`` where nothing is random.
        revise: Given the sums of the two tallies (float64), returns the pass that has to be done
            instead, or ``None`` where this one stands.
    """

    function: ChunkFunction
    scalars: Callable[[str], Tensor]
    experts: tuple[int, ...] | None = None
    kept: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    keys: Callable[[str], Tensor] | None = None
    revise: "Callable[[Tensor], Pass | None] | None" = None


Scope = Literal["entry", "draw", "tensor"]
"""What a merged entry depends on, beside statistics of the whole model.

``entry``: the experts' entries at its place, so that cutting a parameter in two changes nothing.
``draw``: also random numbers, which go by the parameter's name and the place in it: cutting a
parameter in two changes the draws and nothing else. ``tensor``: all of its parameter, whose norm,
ranks or singular values count; parameters do not depend on one another.
"""


class MergeMethod(Protocol):
    """A way of merging task vectors, in three steps with three lifetimes.

    Constructing it measures, once per worker and set of experts, what no plan decides.
    :meth:`bind` fixes, once per trial, what the plan decides, by looking it up. What it returns
    is run once per parameter, and does nothing but arithmetic.

    Attributes:
        hyperparameters: What has a number per expert and group.
        settings: The method-wide choices, ``DEPTH_SLOPE`` among them.
        scope: What a merged entry depends on.
        published: What it is as a reference of every study; ``None`` where its defaults are a
            place to begin at, and not a setting that the paper recommends for any experts.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]]
    settings: ClassVar[tuple[Setting, ...]]
    scope: ClassVar[Scope]
    published: ClassVar[Published | None]

    def __init__(self, measure: "Measure") -> None: ...

    def bind(self, plan: MergePlan) -> Pass:
        """Return the pass that merges under ``plan``, whose experts are those measured."""
        ...


METHODS: Registry[type[MergeMethod]] = Registry("merge method", "searchmerge.merging.methods")


def hyperparameter(method: str, name: str) -> Hyperparameter:
    """Return what a method declares of a hyper-parameter.

    Raises:
        SpecError: If there is no such method, or it has no such hyper-parameter.
    """
    legal = {h.name: h for h in METHODS[method].hyperparameters}
    _check_names("hyper-parameter", method, [name], legal)
    return legal[name]


def linear_hyperparameter(method: str) -> Hyperparameter:
    """Return the hyper-parameter that a method is linear in.

    Raises:
        SpecError: If there is no such method, or it is linear in none.
    """
    for h in METHODS[method].hyperparameters:
        if h.is_linear:
            return h
    linear = [
        name for name, other in METHODS.items() if any(h.is_linear for h in other.hyperparameters)
    ]
    raise SpecError(
        f"method {method!r} is not linear in its coefficients, so that one pass does not give the "
        f"gradient by them (methods that are: {', '.join(sorted(linear))})"
    )


def setting(plan: MergePlan, legal: Setting) -> SettingValue:
    """Return what a plan says about a setting, or the default."""
    return plan.settings.get(legal.name, legal.default)


def by_group(
    plan: MergePlan, names: Sequence[str], scalars: Sequence[Iterable[Numbers]]
) -> Callable[[str], Tensor]:
    """Return the ``scalars`` of a :class:`Pass` that depend on the parameter's group alone.

    Args:
        plan: The plan, for its groups.
        names: The names of all parameters.
        scalars: For each group, a named tuple of numbers per expert that is read.
    """
    group_of = assign_groups(names, plan.groups)
    tensors = [pack(of_group) for of_group in scalars]
    return lambda name: tensors[group_of[name]]


def default_plan(
    method: str,
    experts: Sequence[str],
    *,
    groups: Groups = WHOLE,
    **overrides: float | Sequence[float] | SettingValue,
) -> MergePlan:
    """Return the plan with the published value of everything that is not overridden.

    Args:
        method: Name of a merge method.
        experts: Expert names.
        groups: How the parameters are divided; every group gets the same row.
        **overrides: Of a hyper-parameter, one number for all experts or one each; of a setting,
            its value.

    Raises:
        SpecError: If there is no such method, or the plan is not legal.
    """
    entry = METHODS[method]
    values = {}
    for h in entry.hyperparameters:
        given = overrides.pop(h.name, h.default)
        row = (given,) * len(experts) if isinstance(given, int | float) else given
        values[h.name] = (tuple(float(number) for number in row),) * len(groups)
    settings: dict[str, SettingValue] = {}
    for name, value in overrides.items():
        if not isinstance(value, str | int | float | bool):
            raise SpecError(f"plan: setting {name!r} of method {method!r} is {value!r}")
        settings[name] = value
    settings = with_defaults(method, settings)
    plan = MergePlan(method, tuple(experts), values, groups, settings)
    validate_plan(plan)
    return plan


def with_defaults(method: str, settings: Mapping[str, SettingValue]) -> dict[str, SettingValue]:
    """Return settings in the form that is equal for equal merges.

    Every setting of the method is named, but a depth slope of 0, which is none.
    """
    defaults = {setting.name: setting.default for setting in METHODS[method].settings}
    full = {**defaults, **settings}
    if full.get(DEPTH_SLOPE.name) == DEPTH_SLOPE.default:
        del full[DEPTH_SLOPE.name]
    return full


def validate_plan(plan: MergePlan) -> None:
    """Check a plan against what its method allows.

    Raises:
        SpecError: If there is no such method, a hyper-parameter is missing, unknown or out of
            its legal range, or a setting is unknown or not allowed.
    """
    method = METHODS[plan.method]
    legal = {h.name: h for h in method.hyperparameters}
    _check_names("hyper-parameter", plan.method, plan.values, legal)
    if missing := [name for name in legal if name not in plan.values]:
        raise SpecError(f"plan: method {plan.method!r} needs values.{missing[0]}; it is missing")
    for name, rows in plan.values.items():
        for group, row in zip(plan.groups.names, rows, strict=True):
            _check_row(plan, legal[name], group, row)
    settings = {s.name: s for s in method.settings}
    _check_names("setting", plan.method, plan.settings, settings)
    for name, value in plan.settings.items():
        _check_setting(plan.method, settings[name], value)


def _check_names(kind: str, method: str, names: Iterable[str], legal: Iterable[str]) -> None:
    for name in names:
        if name in legal:
            continue
        close = get_close_matches(name, list(legal), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SpecError(
            f"plan: method {method!r} has no {kind} {name!r}{hint} "
            f"(it has: {', '.join(legal) or 'none'})"
        )


def _check_row(plan: MergePlan, legal: Hyperparameter, group: str, row: Sequence[float]) -> None:
    for expert, number in zip(plan.experts, row, strict=True):
        if not legal.low <= number <= legal.high:
            raise SpecError(
                f"plan: {legal.name} of expert {expert!r} in group {group!r} is {number}; "
                f"method {plan.method!r} allows [{legal.low}, {legal.high}]"
            )


def _check_setting(method: str, legal: Setting, value: SettingValue) -> None:
    if legal.choices:
        same_kind = [choice for choice in legal.choices if type(choice) is type(value)]
        if value in same_kind:
            return
        allowed = ", ".join(str(choice) for choice in legal.choices)
    else:
        if _is_legal(legal, value):
            return
        kind = "a number" if legal.step is None else f"a multiple of {legal.step}"
        allowed = f"{kind} in [{legal.low}, {legal.high}]"
    raise SpecError(
        f"plan: setting {legal.name!r} of method {method!r} is {value!r}; allowed: {allowed}"
    )


def _is_legal(legal: Setting, value: SettingValue) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    steps = 0.0 if legal.step is None or not math.isfinite(value) else value / legal.step
    return legal.low <= value <= legal.high and steps == round(steps)
