"""What a study file may say of a search space: each form of a key, and what it is in the search.

A space names a method; every other key is one of its hyper-parameters, in one of these forms::

    coefficient: 0.4                          # fixed, the same for all experts
    coefficient: {math: 0.4, code: 0.6}       # fixed, a number per expert
    coefficient: {low: 0.0, high: 2.0}        # searched, both ends included
    coefficient: {scale: {low: 0.1, high: 1}} # searched: one scale, times each expert's share
    coefficient: auto                         # searched in the range that the method declares good

A range takes ``per`` (what has a number of its own), ``step`` and ``log``; where it says nothing,
and for ``auto``, the hyper-parameter's declaration decides. ``space: auto`` is all methods that
publish a setting, see :mod:`searchmerge.search.auto_space`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from searchmerge.errors import SpecError
from searchmerge.keys import Strict
from searchmerge.merging.method import METHODS, Hyperparameter, hyperparameter
from searchmerge.plan import WHOLE, Groups, SettingValue
from searchmerge.search.auto_space import auto_space
from searchmerge.search.searched import (
    Choices,
    Fixed,
    Interval,
    Per,
    Range,
    SearchedRows,
    SearchedSetting,
    Shares,
)
from searchmerge.search.space import Alternative, SearchSpace


class RangeSpec(Strict):
    """A range to search, both ends included."""

    low: float
    high: float
    per: Per | None = None
    step: float | None = Field(default=None, gt=0)
    log: bool = False


class EndsSpec(Strict):
    """A range of real numbers to search, both ends included."""

    low: float
    high: float


class ScaleSpec(Strict):
    """One scale for all experts, times each one's share of it."""

    scale: EndsSpec


def _form(value: Any) -> str:
    """Return which form a searched hyper-parameter has, so that errors speak of that one."""
    if isinstance(value, ScaleSpec) or (isinstance(value, dict) and "scale" in value):
        return "a scale"
    if isinstance(value, RangeSpec) or (
        isinstance(value, dict) and value.keys() & {"low", "high"}
    ):
        return "a range"
    if isinstance(value, str) and not _is_number(value):
        return "the method's range"
    return "one per expert" if isinstance(value, dict) else "a number"


def _is_number(text: str) -> bool:
    try:
        float(text)  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return False
    return True


def _auto(value: Any) -> Any:
    if value != "auto":
        raise ValueError(
            f"found {value!r}; a number, one per expert, a range {{low, high}}, "
            "a {scale: {low, high}}, or auto is needed"
        )
    return value


Searched = Annotated[
    Annotated[float, Tag("a number")]
    | Annotated[dict[str, float], Tag("one per expert")]
    | Annotated[ScaleSpec, Tag("a scale")]
    | Annotated[RangeSpec, Tag("a range")]
    | Annotated[Literal["auto"], BeforeValidator(_auto), Tag("the method's range")],
    Discriminator(_form),
]


class SpaceSpec(BaseModel):
    """One method and what is searched of it; every other key is one of its hyper-parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    __pydantic_extra__: dict[str, Searched]
    method: str
    name: str | None = None
    groups: Any = "whole"
    settings: dict[str, SettingValue | list[SettingValue] | RangeSpec] = Field(
        default_factory=dict
    )


def make_space(
    experts: Sequence[str], space: SpaceSpec | Sequence[SpaceSpec] | Literal["auto"]
) -> SearchSpace:
    """Return the search space that a study file asks for.

    Args:
        experts: Their names, in the order of every row.
        space: What the key ``space`` holds.

    Raises:
        SpecError: If a range is not within its method's legal one, or a name is unknown.
    """
    if isinstance(space, str):
        return auto_space(experts)
    alternatives = []
    for number, spec in enumerate([space] if isinstance(space, SpaceSpec) else space):
        where = "space" if isinstance(space, SpaceSpec) else f"space.{number}"
        try:
            alternatives.append(_alternative(spec, tuple(experts)))
        except SpecError as error:
            message = str(error).removeprefix("space: ").removeprefix("plan: ")
            raise SpecError(f"{where}: {message}") from error
    return SearchSpace(experts, alternatives)


def _alternative(spec: SpaceSpec, experts: tuple[str, ...]) -> Alternative:
    declared = METHODS[spec.method]
    complements = {h.complement: h for h in declared.hyperparameters if h.complement}
    groups = Groups.from_data(spec.groups)
    values: dict[str, SearchedRows] = {}
    for key, searched in (spec.__pydantic_extra__ or {}).items():
        if key in complements:
            legal, searched = complements[key], _complement(key, searched)
        else:
            legal = hyperparameter(spec.method, key)
        if legal.name in values:
            raise SpecError(
                f"space: give {legal.name} or {legal.complement}, which is 1 - {legal.name}, "
                "not both"
            )
        values[legal.name] = _rows(legal, searched, experts, groups)
    steps = {setting.name: setting.step for setting in declared.settings}
    settings = {key: _setting(chosen, steps.get(key)) for key, chosen in spec.settings.items()}
    return Alternative(spec.name or spec.method, spec.method, groups, values, settings)


def _complement(key: str, searched: Searched) -> Searched:
    """Return what is given as 1 minus a number, as the number that it is: 1 minus that."""
    match searched:
        case RangeSpec(low=low, high=high):
            return searched.model_copy(update={"low": _one_minus(high), "high": _one_minus(low)})
        case dict():
            return {expert: _one_minus(number) for expert, number in searched.items()}
        case float() | int():
            return _one_minus(searched)
        case "auto":
            return searched
    raise SpecError(f"space: {key} takes a number, one per expert, a range, or auto")


def _one_minus(number: float) -> float:
    return round(1.0 - number, 12)


def _rows(
    legal: Hyperparameter, searched: Searched, experts: tuple[str, ...], groups: Groups
) -> SearchedRows:
    match searched:
        case "auto":
            return Range(*legal.search, _per(legal, groups), legal.step)
        case RangeSpec(low=low, high=high, per=per, log=log):
            step = searched.step or (None if log else legal.step)
            return Range(low, high, per or _per(legal, groups), step, log)
        case ScaleSpec(scale=scale):
            return Shares(scale.low, scale.high)
        case dict():
            if set(searched) != set(experts):
                raise SpecError(
                    f"space: {legal.name} names {', '.join(searched)}; "
                    f"one number per expert is needed: {', '.join(experts)}"
                )
            return Fixed(tuple(float(searched[expert]) for expert in experts))
    return Fixed((float(searched),) * len(experts))


def _per(legal: Hyperparameter, groups: Groups) -> Per:
    """Return what has a number of its own where a study does not say."""
    if legal.shared:
        return "all" if groups == WHOLE else "group"
    return "expert" if groups == WHOLE else "expert_and_group"


def _setting(
    chosen: SettingValue | list[SettingValue] | RangeSpec, step: float | None
) -> SearchedSetting:
    if isinstance(chosen, RangeSpec):
        return Interval(chosen.low, chosen.high, chosen.step or step, chosen.log)
    return Choices(tuple(chosen) if isinstance(chosen, list) else (chosen,))
