"""The search space: between Optuna's flat parameters and merge plans."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from searchmerge.errors import SpecError
from searchmerge.merging.method import (
    METHODS,
    Hyperparameter,
    default_plan,
    validate_plan,
    with_defaults,
)
from searchmerge.plan import WHOLE, Groups, MergePlan, Rows, SettingValue

Per = Literal["all", "expert", "group", "expert_and_group"]
"""What a searched hyper-parameter has a number of its own for."""

_DIGITS = 12  # a stepped float is rounded to this many digits, so that equal plans are equal
_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Fixed:
    """A hyper-parameter that is not searched: one number per expert, in every group."""

    row: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A hyper-parameter drawn from [low, high], both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        per: What has a number of its own.
        step: Distance between neighbouring values, counted from ``low``; ``None`` for any value.
        log: Whether the logarithm is drawn uniformly.
    """

    low: float
    high: float
    per: Per = "expert"
    step: float | None = None
    log: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """A hyper-parameter as one global scale, the experts' mean, times each expert's share of it.

    A share is the expert's part of the sum, so the scale of the shares is no direction of its
    own: n experts make one scale and n - 1 shares. The shares are drawn uniformly from all that
    are 0 or more and sum to 1.

    Attributes:
        low: Smallest scale.
        high: Largest scale.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """One method, and what is searched of it.

    Attributes:
        name: Name among the alternatives of the space.
        method: Name of a registered merge method.
        groups: How the parameters are divided.
        values: Hyper-parameter name to what is searched; one left out has its default.
        settings: Setting name to the values to choose from, or to the range of a number; a
            single value is fixed.
    """

    name: str
    method: str
    groups: Groups = WHOLE
    values: Mapping[str, Fixed | Range | Shares] = field(default_factory=dict)
    settings: Mapping[str, tuple[SettingValue, ...] | Range] = field(default_factory=dict)


class SearchSpace:
    """All plans that a study may propose.

    With several alternatives, the parameter ``method`` chooses among them, and each one's own
    parameters are named after it and drawn only where it is chosen.

    Args:
        experts: Expert names, in the order of every row.
        alternatives: One or more, with different names.

    Raises:
        SpecError: If there is none, or one names what its method does not have, or a range is
            not within the legal one.
    """

    def __init__(self, experts: Sequence[str], alternatives: Sequence[Alternative]) -> None:
        self.experts = tuple(experts)
        self.alternatives = {alternative.name: alternative for alternative in alternatives}
        if not alternatives:
            raise SpecError("space: it is empty; give one method or more")
        if len(self.alternatives) != len(alternatives):
            names = [alternative.name for alternative in alternatives]
            raise SpecError(f"space: a name stands twice in {names}; give each a name: of its own")
        for alternative in alternatives:
            _check(alternative, self.experts)
        self._distributions = {
            name: _distributions(alternative, self.experts, self._prefix(name))
            for name, alternative in self.alternatives.items()
        }

    def _prefix(self, name: str) -> str:
        return f"{name}." if len(self.alternatives) > 1 else ""

    @property
    def is_flat(self) -> bool:
        """Whether every trial has the same parameters, all of them numbers."""
        return len(self.alternatives) == 1 and not any(
            isinstance(d, CategoricalDistribution) for d in self.distributions().values()
        )

    def distributions(self, alternative: str | None = None) -> dict[str, BaseDistribution]:
        """Return the parameters of one alternative; of the only one where none is named."""
        if alternative is None:
            [alternative] = self.alternatives
        return self._distributions[alternative]

    def suggest(self, trial: optuna.Trial) -> MergePlan:
        """Let the sampler choose every parameter of ``trial``, and return the plan."""
        name = next(iter(self.alternatives))
        if len(self.alternatives) > 1:
            name = trial.suggest_categorical("method", list(self.alternatives))
        for parameter, distribution in self._distributions[name].items():
            _suggest(trial, parameter, distribution)
        return self.plan(trial.params)

    def plan(self, params: Mapping[str, SettingValue]) -> MergePlan:
        """Turn the parameters of a trial into the plan they stand for."""
        name = str(params.get("method", next(iter(self.alternatives))))
        alternative, prefix = self.alternatives[name], self._prefix(name)
        values = {
            h.name: _rows(h, alternative, self.experts, prefix, params)
            for h in METHODS[alternative.method].hyperparameters
        }
        settings = {
            setting: _setting(params, f"{prefix}{setting}", choices)
            for setting, choices in alternative.settings.items()
        }
        settings = with_defaults(alternative.method, settings)
        return MergePlan(alternative.method, self.experts, values, alternative.groups, settings)

    def params(self, plan: MergePlan) -> dict[str, SettingValue] | None:
        """Turn a plan into parameters, the inverse of :meth:`plan`; ``None`` if it is not in."""
        for name, alternative in self.alternatives.items():
            params = _params_of(alternative, self.experts, self._prefix(name), plan)
            if params is None or not _within(params, self._distributions[name]):
                continue
            if len(self.alternatives) > 1:
                params = {"method": name, **params}
            if _same(self.plan(params), plan):
                return params
        return None

    def nearest(self, plan: MergePlan) -> dict[str, SettingValue] | None:
        """Return the parameters that come nearest to a plan; ``None`` if none are of its kind.

        Numbers outside a range are moved to its end, and to the nearest step; what this space
        fixes stays as it fixes it. A plan of another method, of other experts, of other groups
        or with a setting that is not among the choices is of another kind.
        """
        if (exact := self.params(plan)) is not None:
            return exact
        for name, alternative in self.alternatives.items():
            params = _params_of(alternative, self.experts, self._prefix(name), plan)
            if params is None:
                continue
            moved = {k: _moved(d, params[k]) for k, d in self._distributions[name].items()}
            if _within(moved, self._distributions[name]):
                return {"method": name, **moved} if len(self.alternatives) > 1 else moved
        return None

    def start(self) -> dict[str, float]:
        """Return the published settings of a flat space's method, as near as parameters come."""
        [alternative] = self.alternatives.values()
        plan = default_plan(alternative.method, self.experts)
        params = _params_of(alternative, self.experts, "", plan) or {}
        return {name: float(value) for name, value in params.items()}

    def describe(self) -> dict[str, object]:
        """Return the space as plain data, for fingerprints and reports."""
        return {
            name: {
                "method": alternative.method,
                "groups": alternative.groups.to_data(),
                "parameters": {k: repr(d) for k, d in self._distributions[name].items()},
                "fixed": {
                    k: list(v.row) for k, v in alternative.values.items() if isinstance(v, Fixed)
                },
                "settings": {
                    k: v[0]
                    for k, v in alternative.settings.items()
                    if not isinstance(v, Range) and len(v) == 1
                },
            }
            for name, alternative in self.alternatives.items()
        }


def _check(alternative: Alternative, experts: tuple[str, ...]) -> None:
    where = f"space {alternative.name!r}"
    hyperparameters = {h.name: h for h in METHODS[alternative.method].hyperparameters}
    for name, searched in alternative.values.items():
        if name not in hyperparameters:
            raise SpecError(
                f"{where}: method {alternative.method!r} has no hyper-parameter {name!r} "
                f"(it has: {', '.join(hyperparameters) or 'none'})"
            )
        _check_range(where, hyperparameters[name], searched, experts)
    for name, choices in alternative.settings.items():
        _check_choices(f"{where}: settings.{name}", choices)
    try:
        validate_plan(_probe(alternative, experts))  # settings, and fixed values
    except SpecError as error:
        raise SpecError(f"{where}: {str(error).removeprefix('plan: ')}") from error


def _check_choices(where: str, choices: tuple[SettingValue, ...] | Range) -> None:
    if not isinstance(choices, Range):
        if not choices:
            raise SpecError(f"{where} is an empty list; give one value or more")
        if len({(type(choice), choice) for choice in choices}) != len(choices):
            raise SpecError(f"{where}: a value stands twice in {list(choices)}")
        return
    _check_order(where, choices)


def _check_order(where: str, searched: Range | Shares) -> None:
    low, high = searched.low, searched.high
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise SpecError(f"{where}: range [{low}, {high}] is empty; low must not be above high")
    if isinstance(searched, Range) and searched.log and (low <= 0 or searched.step is not None):
        raise SpecError(f"{where}: a log range needs low above 0, and no step")
    if isinstance(searched, Range) and (searched.step or 0.0) > high - low > 0:
        raise SpecError(
            f"{where}: step {searched.step} is larger than the range [{low}, {high}], "
            "so that only one value is left"
        )


def _check_range(
    where: str, legal: Hyperparameter, searched: Fixed | Range | Shares, experts: tuple[str, ...]
) -> None:
    if isinstance(searched, Fixed):
        return
    _check_order(f"{where}: {legal.name}", searched)
    low, high = searched.low, searched.high
    if isinstance(searched, Shares):
        # one expert may take the whole sum
        low, high = min(0.0, low * len(experts)), max(0.0, high * len(experts))
    if not (legal.low <= low and high <= legal.high):
        raise SpecError(
            f"{where}: range [{searched.low}, {searched.high}] of {legal.name!r} is not within "
            f"what {where.split()[-1]} allows, [{legal.low}, {legal.high}]"
            + (f", where one expert takes the whole sum {high}" * isinstance(searched, Shares))
        )


def _probe(alternative: Alternative, experts: tuple[str, ...]) -> MergePlan:
    """Return some plan of the alternative, to have its settings and fixed values checked."""
    values = {}
    for h in METHODS[alternative.method].hyperparameters:
        searched = alternative.values.get(h.name)
        row = (h.default,) * len(experts)
        if isinstance(searched, Fixed):
            row = searched.row
        elif isinstance(searched, Range):
            row = (searched.low,) * len(experts)
        values[h.name] = (row,) * len(alternative.groups)
    settings: dict[str, SettingValue] = {}
    for name, choices in alternative.settings.items():
        ends = (choices.low, choices.high) if isinstance(choices, Range) else choices
        for choice in ends:
            settings[name] = choice
            validate_plan(
                MergePlan(alternative.method, experts, values, alternative.groups, settings)
            )
    return MergePlan(alternative.method, experts, values, alternative.groups, settings)


def _cells(
    name: str, per: Per, alternative: Alternative, experts: tuple[str, ...]
) -> list[list[str]]:
    """Return, for each group and expert, the name of the parameter that its number comes from."""
    rows = []
    for group in alternative.groups.names:
        by_group = f".{group}" if per in ("group", "expert_and_group") else ""
        by_expert = per in ("expert", "expert_and_group")
        rows.append([f"{name}{by_group}" + (f".{e}" if by_expert else "") for e in experts])
    return rows


def _distributions(
    alternative: Alternative, experts: tuple[str, ...], prefix: str
) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    for name, searched in alternative.values.items():
        match searched:
            case Range():
                cells = _cells(name, searched.per, alternative, experts)
                found |= {cell: _number(searched) for row in cells for cell in row}
            case Shares(low, high):
                found[f"{name}.scale"] = FloatDistribution(low, high)
                found |= {
                    f"{name}.share.{expert}": FloatDistribution(0.0, 1.0)
                    for expert in experts[:-1]
                }
    for setting, choices in alternative.settings.items():
        if isinstance(choices, Range):
            found[setting] = _number(choices)
        elif len(choices) > 1:
            found[setting] = CategoricalDistribution(choices)
    return {f"{prefix}{name}": distribution for name, distribution in found.items()}


def _number(searched: Range) -> BaseDistribution:
    low, high = searched.low, searched.high
    if searched.step is not None:  # up to the last value that steps reach, as decimals like Optuna
        low = round(low, _DIGITS)
        start, step = Decimal(str(low)), Decimal(str(searched.step))
        high = float(start + (Decimal(str(high)) - start) // step * step)
    return FloatDistribution(low, high, step=searched.step, log=searched.log)


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> None:
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            trial.suggest_float(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            trial.suggest_categorical(name, choices)


def _rows(
    legal: Hyperparameter,
    alternative: Alternative,
    experts: tuple[str, ...],
    prefix: str,
    params: Mapping[str, SettingValue],
) -> Rows:
    searched = alternative.values.get(legal.name)
    if isinstance(searched, Range):
        return tuple(
            tuple(_rounded(float(params[f"{prefix}{cell}"]), searched.step) for cell in row)
            for row in _cells(legal.name, searched.per, alternative, experts)
        )
    if isinstance(searched, Shares):
        scale = float(params[f"{prefix}{legal.name}.scale"])
        uniform = [float(params[f"{prefix}{legal.name}.share.{e}"]) for e in experts[:-1]]
        row = tuple(scale * len(experts) * share for share in shares_of(uniform))
    else:
        row = searched.row if searched else (legal.default,) * len(experts)
    return (row,) * len(alternative.groups)


def _rounded(number: float, step: float | None) -> float:
    return number if step is None else round(number, _DIGITS)


def _setting(
    params: Mapping[str, SettingValue], name: str, choices: tuple[SettingValue, ...] | Range
) -> SettingValue:
    if isinstance(choices, Range):
        return _rounded(float(params[name]), choices.step)
    return params[name] if len(choices) > 1 else choices[0]


def shares_of(uniform: Sequence[float]) -> list[float]:
    """Return n shares that sum to 1 from n - 1 numbers in [0, 1], by breaking a stick.

    Uniform numbers give shares that are uniform over the simplex: the k-th break takes
    ``1 - (1 - u) ** (1 / (n - k))`` of what is left.
    """
    n_shares, left, shares = len(uniform) + 1, 1.0, []
    for k, u in enumerate(uniform, start=1):
        taken = left * (1 - (1 - u) ** (1 / (n_shares - k)))
        shares.append(taken)
        left -= taken
    return [*shares, left]


def uniform_of(shares: Sequence[float]) -> list[float]:
    """Return the numbers that :func:`shares_of` makes ``shares`` of: its inverse."""
    left, uniform = 1.0, []
    for k, share in enumerate(shares[:-1], start=1):
        fraction = min(1.0, max(0.0, share / left)) if left > _CLOSE else 0.0
        uniform.append(1 - (1 - fraction) ** (len(shares) - k))
        left -= share
    return uniform


def _params_of(
    alternative: Alternative, experts: tuple[str, ...], prefix: str, plan: MergePlan
) -> dict[str, SettingValue] | None:
    """Return the parameters that come nearest to ``plan``; ``None`` if it is of another kind."""
    if plan.method != alternative.method or set(plan.experts) != set(experts):
        return None
    plan = _spread(_reordered(plan, experts), alternative.groups)
    params: dict[str, SettingValue] = {}
    for name, searched in alternative.values.items():
        rows = plan.values.get(name)
        if rows is None or len(rows) != len(alternative.groups):
            return None
        if isinstance(searched, Range):
            cells = _cells(name, searched.per, alternative, experts)
            for cell_row, row in zip(cells, rows, strict=True):
                params |= {
                    f"{prefix}{cell}": number for cell, number in zip(cell_row, row, strict=True)
                }
        elif isinstance(searched, Shares):
            total = sum(rows[0])
            params[f"{prefix}{name}.scale"] = total / len(experts)
            parts = [number / total if total else 1 / len(experts) for number in rows[0]]
            for expert, u in zip(experts[:-1], uniform_of(parts), strict=True):
                params[f"{prefix}{name}.share.{expert}"] = u
    return params | _settings_of(alternative, prefix, plan)


def _settings_of(
    alternative: Alternative, prefix: str, plan: MergePlan
) -> dict[str, SettingValue]:
    defaults = {s.name: s.default for s in METHODS[alternative.method].settings}
    return {
        f"{prefix}{name}": plan.settings.get(name, defaults.get(name, 0.0))
        for name, choices in alternative.settings.items()
        if isinstance(choices, Range) or len(choices) > 1
    }


def _reordered(plan: MergePlan, experts: tuple[str, ...]) -> MergePlan:
    order = [plan.experts.index(expert) for expert in experts]
    values = {
        name: tuple(tuple(row[i] for i in order) for row in rows)
        for name, rows in plan.values.items()
    }
    return MergePlan(plan.method, experts, values, plan.groups, plan.settings)


def _spread(plan: MergePlan, groups: Groups) -> MergePlan:
    """Return a whole-model plan as the plan with equal rows in ``groups``; others as they are."""
    if plan.groups != WHOLE or groups == WHOLE:
        return plan
    values = {name: rows * len(groups) for name, rows in plan.values.items()}
    return MergePlan(plan.method, plan.experts, values, groups, plan.settings)


def _within(
    params: Mapping[str, SettingValue], distributions: Mapping[str, BaseDistribution]
) -> bool:
    for name, distribution in distributions.items():
        value = params[name]
        if isinstance(distribution, CategoricalDistribution):
            if value not in distribution.choices:
                return False
        elif not _holds(distribution, float(value)):
            return False
    return True


def _holds(distribution: BaseDistribution, value: float) -> bool:
    if not isinstance(distribution, FloatDistribution):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    on_step = math.isclose(steps, round(steps), abs_tol=1e-6)
    return on_step and distribution.low - _CLOSE <= value <= distribution.high + _CLOSE


def _moved(distribution: BaseDistribution, value: SettingValue) -> SettingValue:
    """Return the number of a range that is nearest to ``value``; a choice as it is."""
    if not isinstance(distribution, FloatDistribution):
        return value
    inside = min(distribution.high, max(distribution.low, float(value)))
    if distribution.step is None:
        return inside
    n_steps = round((inside - distribution.low) / distribution.step)
    return round(distribution.low + n_steps * distribution.step, _DIGITS)


def _same(plan: MergePlan, other: MergePlan) -> bool:
    """Return whether two plans of one space make the same model, up to rounding."""
    other = _spread(_reordered(other, plan.experts), plan.groups)
    defaults = {s.name: s.default for s in METHODS[plan.method].settings}
    if plan.groups != other.groups or plan.values.keys() != other.values.keys():
        return False
    if {**defaults, **plan.settings} != {**defaults, **other.settings}:
        return False
    return all(
        math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE)
        for name, rows in plan.values.items()
        for row, other_row in zip(rows, other.values[name], strict=True)
        for a, b in zip(row, other_row, strict=True)
    )
