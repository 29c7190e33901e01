"""The search space: between Optuna's flat parameters and merge plans."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from searchmerge.errors import SpecError
from searchmerge.merging.method import (
    METHODS,
    Hyperparameter,
    default_plan,
    hyperparameter,
    validate_plan,
    with_defaults,
)
from searchmerge.plan import WHOLE, Groups, MergePlan, Rows, SettingValue
from searchmerge.search.distributions import CLOSE, Params, is_within, moved, suggest
from searchmerge.search.searched import Fixed, PlanShape, SearchedRows, SearchedSetting

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Alternative:
    """One method, and what is searched of it.

    Attributes:
        name: Name among the alternatives of the space.
        method: Name of a registered merge method.
        groups: How the parameters are divided.
        values: Hyper-parameter name to what is searched; one left out has its default.
        settings: Setting name to what is searched; one left out has its default.
    """

    name: str
    method: str
    groups: Groups = WHOLE
    values: Mapping[str, SearchedRows] = field(default_factory=dict)
    settings: Mapping[str, SearchedSetting] = field(default_factory=dict)

    def check(self, experts: tuple[str, ...]) -> None:
        """Refuse what the method does not have or allow.

        Raises:
            SpecError: It names the alternative and the key.
        """
        shape = PlanShape(experts, self.groups)
        try:
            for name, searched in self.values.items():
                searched.check(hyperparameter(self.method, name), shape)
            for name, chosen in self.settings.items():
                chosen.check(f"settings.{name}")
            self._check_examples(shape)
        except SpecError as error:
            message = str(error).removeprefix("plan: ")
            raise SpecError(f"space {self.name!r}: {message}") from error

    def _check_examples(self, shape: PlanShape) -> None:
        """Check fixed numbers and every choice of a setting, in plans of the lowest numbers."""
        lowest: dict[str, SettingValue] = {}
        for name, searched in self.values.items():
            lowest |= {cell: d.low for cell, d in searched.distributions(name, shape).items()}
        values = {h.name: self._rows(h, shape, lowest) for h in self._hyperparameters}
        plan = MergePlan(self.method, shape.experts, values, self.groups)
        validate_plan(plan)
        for name, chosen in self.settings.items():
            for value in chosen.examples:
                plan = replace(plan, settings={**plan.settings, name: value})
                validate_plan(plan)

    @property
    def _hyperparameters(self) -> tuple[Hyperparameter, ...]:
        return METHODS[self.method].hyperparameters

    def _rows(self, legal: Hyperparameter, shape: PlanShape, params: Params) -> Rows:
        default = Fixed((legal.default,) * len(shape.experts))
        return self.values.get(legal.name, default).rows(legal.name, shape, params)

    def distributions(self, experts: tuple[str, ...]) -> dict[str, BaseDistribution]:
        """Return the parameters that are drawn."""
        shape = PlanShape(experts, self.groups)
        drawn: dict[str, BaseDistribution] = {}
        for name, searched in self.values.items():
            drawn |= searched.distributions(name, shape)
        for name, chosen in self.settings.items():
            drawn |= chosen.distributions(name)
        return drawn

    def plan(self, experts: tuple[str, ...], params: Params) -> MergePlan:
        """Turn parameters into the plan that they stand for."""
        shape = PlanShape(experts, self.groups)
        values = {h.name: self._rows(h, shape, params) for h in self._hyperparameters}
        settings = {name: chosen.value(name, params) for name, chosen in self.settings.items()}
        settings = with_defaults(self.method, settings)
        return MergePlan(self.method, experts, values, self.groups, settings)

    def params(self, experts: tuple[str, ...], plan: MergePlan) -> dict[str, SettingValue] | None:
        """Return the parameters that come nearest to ``plan``; ``None`` if of another kind."""
        if plan.method != self.method or set(plan.experts) != set(experts):
            return None
        plan, shape = _aligned(plan, experts, self.groups), PlanShape(experts, self.groups)
        params: dict[str, SettingValue] = {}
        for name, searched in self.values.items():
            rows = plan.values.get(name)
            if rows is None or len(rows) != len(self.groups):
                return None
            params |= searched.params(name, shape, rows)
        settings = {**_setting_defaults(self.method), **plan.settings}
        for name, chosen in self.settings.items():
            params |= chosen.params(name, settings[name])
        return params

    def describe(self, distributions: Mapping[str, BaseDistribution]) -> dict[str, object]:
        """Return the alternative as plain data; ``distributions`` are its parameters."""
        fixed = {name: searched.fixed for name, searched in self.values.items()}
        settings = {name: chosen.fixed for name, chosen in self.settings.items()}
        return {
            "method": self.method,
            "groups": self.groups.to_data(),
            "parameters": {name: repr(d) for name, d in distributions.items()},
            "fixed": {name: list(row) for name, row in fixed.items() if row is not None},
            "settings": {name: value for name, value in settings.items() if value is not None},
        }


class SearchSpace:
    """All plans that a study may propose.

    With several alternatives, the parameter ``method`` chooses among them, and each one's own
    parameters are named after it and drawn only where it is chosen.

    Args:
        experts: Expert names, in the order of every row.
        alternatives: One or more, with different names.
        is_auto: Whether it is the space of a study that names none.

    Raises:
        SpecError: If there is none, or one names what its method does not have, or a range is
            not within the legal one.
    """

    def __init__(
        self,
        experts: Sequence[str],
        alternatives: Sequence[Alternative],
        *,
        is_auto: bool = False,
    ) -> None:
        self._is_auto = is_auto
        self.experts = tuple(experts)
        self.alternatives = {alternative.name: alternative for alternative in alternatives}
        if not alternatives:
            raise SpecError("space: it is empty; give one method or more")
        if len(self.alternatives) != len(alternatives):
            names = [alternative.name for alternative in alternatives]
            raise SpecError(f"space: a name stands twice in {names}; give each a name: of its own")
        for alternative in alternatives:
            alternative.check(self.experts)
        self._distributions = {
            name: self._named(name, alternative.distributions(self.experts))
            for name, alternative in self.alternatives.items()
        }

    def _prefix(self, name: str) -> str:
        return f"{name}." if len(self.alternatives) > 1 else ""

    def _named(self, name: str, params: Mapping[str, T]) -> dict[str, T]:
        """Return an alternative's parameters under the names that they have in the space."""
        return {f"{self._prefix(name)}{parameter}": of for parameter, of in params.items()}

    def _chosen(self, name: str, params: Params) -> dict[str, SettingValue]:
        """Return the parameters of a trial that says which alternative it is of."""
        chosen: dict[str, SettingValue] = {"method": name} if len(self.alternatives) > 1 else {}
        return {**chosen, **params}

    @property
    def is_auto(self) -> bool:
        """Whether it is the space of a study that names none."""
        return self._is_auto

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
            suggest(trial, parameter, distribution)
        return self.plan(trial.params)

    def plan(self, params: Params) -> MergePlan:
        """Turn the parameters of a trial into the plan they stand for."""
        name = str(params.get("method", next(iter(self.alternatives))))
        prefix = self._prefix(name)
        inner = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
        return self.alternatives[name].plan(self.experts, inner)

    def params(self, plan: MergePlan) -> dict[str, SettingValue] | None:
        """Turn a plan into parameters, the inverse of :meth:`plan`; ``None`` if it is not in."""
        for name, params in self._nearest(plan):
            if is_within(params, self._distributions[name]):
                chosen = self._chosen(name, params)
                if _is_same(self.plan(chosen), plan):
                    return chosen
        return None

    def nearest(self, plan: MergePlan) -> dict[str, SettingValue] | None:
        """Return the parameters that come nearest to a plan; ``None`` if none are of its kind.

        Numbers outside a range are moved to its end, and to the nearest step; what this space
        fixes stays as it fixes it. A plan of another method, of other experts, of other groups
        or with a setting that is not among the choices is of another kind.
        """
        if (exact := self.params(plan)) is not None:
            return exact
        for name, params in self._nearest(plan):
            distributions = self._distributions[name]
            inside = {k: moved(d, params[k]) for k, d in distributions.items()}
            if is_within(inside, distributions):
                return self._chosen(name, inside)
        return None

    def _nearest(self, plan: MergePlan) -> list[tuple[str, dict[str, SettingValue]]]:
        """Return each alternative of the plan's kind with its parameters, legal or not."""
        nearest = {
            name: alternative.params(self.experts, plan)
            for name, alternative in self.alternatives.items()
        }
        return [(name, self._named(name, p)) for name, p in nearest.items() if p is not None]

    def start(self) -> dict[str, float]:
        """Return the published settings of a flat space's method, as near as parameters come."""
        [alternative] = self.alternatives.values()
        published = default_plan(alternative.method, self.experts)
        params = alternative.params(self.experts, published) or {}
        return {name: float(value) for name, value in params.items()}

    def describe(self) -> dict[str, object]:
        """Return the space as plain data, for fingerprints and reports."""
        return {
            name: alternative.describe(self._distributions[name])
            for name, alternative in self.alternatives.items()
        }


def _setting_defaults(method: str) -> dict[str, SettingValue]:
    return {setting.name: setting.default for setting in METHODS[method].settings}


def _aligned(plan: MergePlan, experts: tuple[str, ...], groups: Groups) -> MergePlan:
    """Return a plan with its columns in the order of ``experts``, a whole-model one in groups."""
    plan = plan.reordered(experts)
    if plan.groups != WHOLE or groups == WHOLE:
        return plan
    values = {name: rows * len(groups) for name, rows in plan.values.items()}
    return replace(plan, values=values, groups=groups)


def _is_same(plan: MergePlan, other: MergePlan) -> bool:
    """Return whether two plans of one space make the same model, up to rounding."""
    other = _aligned(other, plan.experts, plan.groups)
    defaults = _setting_defaults(plan.method)
    if plan.groups != other.groups or plan.values.keys() != other.values.keys():
        return False
    if {**defaults, **plan.settings} != {**defaults, **other.settings}:
        return False
    return all(
        math.isclose(number, other_number, rel_tol=CLOSE, abs_tol=CLOSE)
        for name, rows in plan.values.items()
        for row, other_row in zip(rows, other.values[name], strict=True)
        for number, other_number in zip(row, other_row, strict=True)
    )
