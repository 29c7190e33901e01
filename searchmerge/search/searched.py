"""What a study may search of a hyper-parameter or a setting: each kind, in both directions.

A kind says which parameters Optuna draws for it, turns them into what a plan holds, and back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from searchmerge.errors import SpecError
from searchmerge.merging.method import Hyperparameter
from searchmerge.plan import Groups, Rows, SettingValue
from searchmerge.search.distributions import CLOSE, DIGITS, Params

Per = Literal["all", "expert", "group", "expert_and_group"]
"""What a searched hyper-parameter has a number of its own for."""


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What the rows of a plan's values are for.

    Attributes:
        experts: Their names; each has a column.
        groups: The groups of parameters; each has a row.
    """

    experts: tuple[str, ...]
    groups: Groups


class SearchedRows(Protocol):
    """What is searched of a hyper-parameter."""

    @property
    def fixed(self) -> tuple[float, ...] | None:
        """The row that every plan has in every group; ``None`` where it is searched."""

    def check(self, legal: Hyperparameter, shape: PlanShape) -> None:
        """Refuse what the method does not allow.

        Raises:
            SpecError: If a range is empty, or not within the legal one.
        """

    def distributions(self, name: str, shape: PlanShape) -> dict[str, FloatDistribution]:
        """Return the parameters that are drawn, which are named after the hyper-parameter."""

    def rows(self, name: str, shape: PlanShape, params: Params) -> Rows:
        """Return the rows that parameters stand for."""

    def params(self, name: str, shape: PlanShape, rows: Rows) -> dict[str, SettingValue]:
        """Return the parameters that come nearest to some rows: the inverse of :meth:`rows`."""


class SearchedSetting(Protocol):
    """What is searched of a setting."""

    @property
    def fixed(self) -> SettingValue | None:
        """The value that every plan has; ``None`` where it is searched."""

    @property
    def examples(self) -> Sequence[SettingValue]:
        """Values that are legal only if all are."""

    def check(self, name: str) -> None:
        """Refuse what leaves nothing to choose from.

        Raises:
            SpecError: If it is empty, or a value stands twice.
        """

    def distributions(self, name: str) -> Mapping[str, BaseDistribution]:
        """Return the parameter that is drawn, if any."""

    def value(self, name: str, params: Params) -> SettingValue:
        """Return the value that parameters stand for."""

    def params(self, name: str, value: SettingValue) -> dict[str, SettingValue]:
        """Return the parameter that stands for a value: the inverse of :meth:`value`."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A hyper-parameter that is not searched: one number per expert, in every group."""

    row: tuple[float, ...]

    @property
    def fixed(self) -> tuple[float, ...]:
        """The row."""
        return self.row

    def check(self, legal: Hyperparameter, shape: PlanShape) -> None:
        """Refuse nothing: the numbers are checked with the plan that they are in."""

    def distributions(self, name: str, shape: PlanShape) -> dict[str, FloatDistribution]:
        """Return no parameter."""
        return {}

    def rows(self, name: str, shape: PlanShape, params: Params) -> Rows:
        """Return the row for every group."""
        return (self.row,) * len(shape.groups)

    def params(self, name: str, shape: PlanShape, rows: Rows) -> dict[str, SettingValue]:
        """Return no parameter."""
        return {}


@dataclass(frozen=True, slots=True)
class Interval:
    """A number of [low, high], both included; of itself, a setting that is searched.

    Attributes:
        low: Smallest value.
        high: Largest value.
        step: Distance between neighbouring values, counted from ``low``; ``None`` for any value.
        log: Whether the logarithm is drawn uniformly.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def fixed(self) -> None:
        """Nothing: it is searched, even where one value is left."""
        return None

    @property
    def examples(self) -> tuple[float, float]:
        """The ends."""
        return self.low, self.high

    def check(self, name: str) -> None:
        """Refuse an empty range, and a logarithm or step that does not go with it."""
        low, high = self.low, self.high
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise SpecError(f"{name}: range [{low}, {high}] is empty; low must not be above high")
        if self.log and (low <= 0 or self.step is not None):
            raise SpecError(f"{name}: a log range needs low above 0, and no step")
        if (self.step or 0.0) > high - low > 0:
            raise SpecError(
                f"{name}: step {self.step} is larger than the range [{low}, {high}], "
                "so that only one value is left"
            )

    @property
    def distribution(self) -> FloatDistribution:
        """The distribution, up to the last value that steps reach, as decimals like Optuna."""
        low, high = self.low, self.high
        if self.step is not None:
            low = round(low, DIGITS)
            start, step = Decimal(str(low)), Decimal(str(self.step))
            high = float(start + (Decimal(str(high)) - start) // step * step)
        return FloatDistribution(low, high, step=self.step, log=self.log)

    def rounded(self, value: SettingValue) -> float:
        """Return a drawn value as a plan holds it."""
        return float(value) if self.step is None else round(float(value), DIGITS)

    def distributions(self, name: str) -> dict[str, FloatDistribution]:
        """Return the one parameter."""
        return {name: self.distribution}

    def value(self, name: str, params: Params) -> float:
        """Return the number."""
        return self.rounded(params[name])

    def params(self, name: str, value: SettingValue) -> dict[str, SettingValue]:
        """Return the number as the parameter."""
        return {name: value}


@dataclass(frozen=True, slots=True)
class Choices:
    """A setting that is one of some values; a single one is fixed."""

    values: tuple[SettingValue, ...]

    @property
    def fixed(self) -> SettingValue | None:
        """The value, if there is only one."""
        return self.values[0] if len(self.values) == 1 else None

    @property
    def examples(self) -> tuple[SettingValue, ...]:
        """All of them."""
        return self.values

    def check(self, name: str) -> None:
        """Refuse an empty list, and a value given twice."""
        if not self.values:
            raise SpecError(f"{name} is an empty list; give one value or more")
        if len({(type(value), value) for value in self.values}) != len(self.values):
            raise SpecError(f"{name}: a value stands twice in {list(self.values)}")

    def distributions(self, name: str) -> dict[str, CategoricalDistribution]:
        """Return the one parameter, where there is a choice."""
        return {} if len(self.values) == 1 else {name: CategoricalDistribution(self.values)}

    def value(self, name: str, params: Params) -> SettingValue:
        """Return the value chosen."""
        return self.values[0] if len(self.values) == 1 else params[name]

    def params(self, name: str, value: SettingValue) -> dict[str, SettingValue]:
        """Return the value as the parameter, where there is a choice."""
        return {} if len(self.values) == 1 else {name: value}


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

    @property
    def fixed(self) -> None:
        """Nothing: it is searched."""
        return None

    @property
    def interval(self) -> Interval:
        """What each number is drawn from."""
        return Interval(self.low, self.high, self.step, self.log)

    def check(self, legal: Hyperparameter, shape: PlanShape) -> None:
        """Refuse what is not within the legal range."""
        self.interval.check(legal.name)
        if not (legal.low <= self.low and self.high <= legal.high):
            raise SpecError(_not_within(self, legal))

    def distributions(self, name: str, shape: PlanShape) -> dict[str, FloatDistribution]:
        """Return a parameter for each number of its own."""
        distribution = self.interval.distribution
        return {cell: distribution for cells in self._cells(name, shape) for cell in cells}

    def rows(self, name: str, shape: PlanShape, params: Params) -> Rows:
        """Return each parameter's number wherever it is used."""
        rounded = self.interval.rounded
        return tuple(
            tuple(rounded(params[cell]) for cell in cells) for cells in self._cells(name, shape)
        )

    def params(self, name: str, shape: PlanShape, rows: Rows) -> dict[str, SettingValue]:
        """Return the numbers as parameters, the last where several share one."""
        return {
            cell: number
            for cells, row in zip(self._cells(name, shape), rows, strict=True)
            for cell, number in zip(cells, row, strict=True)
        }

    def _cells(self, name: str, shape: PlanShape) -> list[list[str]]:
        """Return, for each group and expert, the parameter that its number comes from."""
        of_groups, of_experts = [""] * len(shape.groups), [""] * len(shape.experts)
        if self.per in ("group", "expert_and_group"):
            of_groups = [f".{group}" for group in shape.groups.names]
        if self.per in ("expert", "expert_and_group"):
            of_experts = [f".{expert}" for expert in shape.experts]
        return [[f"{name}{group}{expert}" for expert in of_experts] for group in of_groups]


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

    @property
    def fixed(self) -> None:
        """Nothing: it is searched."""
        return None

    def check(self, legal: Hyperparameter, shape: PlanShape) -> None:
        """Refuse scales of which one expert's part may be beyond the legal range."""
        Interval(self.low, self.high).check(legal.name)
        n_experts = len(shape.experts)  # one expert may take the whole sum
        low, high = min(0.0, self.low * n_experts), max(0.0, self.high * n_experts)
        if not (legal.low <= low and high <= legal.high):
            raise SpecError(
                f"{_not_within(self, legal)}, where one expert takes the whole sum {high}"
            )

    def distributions(self, name: str, shape: PlanShape) -> dict[str, FloatDistribution]:
        """Return the scale, and a number for the share of each expert but the last."""
        shares = {cell: FloatDistribution(0.0, 1.0) for cell in self._cells(name, shape)}
        return {f"{name}.scale": FloatDistribution(self.low, self.high), **shares}

    def rows(self, name: str, shape: PlanShape, params: Params) -> Rows:
        """Return the same row for every group."""
        total = float(params[f"{name}.scale"]) * len(shape.experts)
        shares = shares_of([float(params[cell]) for cell in self._cells(name, shape)])
        return (tuple(total * share for share in shares),) * len(shape.groups)

    def params(self, name: str, shape: PlanShape, rows: Rows) -> dict[str, SettingValue]:
        """Return the scale and shares of the first group."""
        total, n_experts = sum(rows[0]), len(shape.experts)
        shares = [number / total if total else 1 / n_experts for number in rows[0]]
        uniform = zip(self._cells(name, shape), uniform_of(shares), strict=True)
        return {f"{name}.scale": total / n_experts, **dict(uniform)}

    def _cells(self, name: str, shape: PlanShape) -> list[str]:
        return [f"{name}.share.{expert}" for expert in shape.experts[:-1]]


def _not_within(searched: Range | Shares, legal: Hyperparameter) -> str:
    return (
        f"range [{searched.low}, {searched.high}] of {legal.name!r} is not within what the "
        f"method allows, [{legal.low}, {legal.high}]"
    )


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
        fraction = min(1.0, max(0.0, share / left)) if left > CLOSE else 0.0
        uniform.append(1 - (1 - fraction) ** (len(shares) - k))
        left -= share
    return uniform
