"""The merge plan: all that one trial decides, in a form that a person can read."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from searchmerge.durable import write_atomically
from searchmerge.errors import SpecError
from searchmerge.tensor_names import compress, expand, in_order
from searchmerge.wording import counted

Rows = tuple[tuple[float, ...], ...]
"""One row per group, one number per expert."""

SettingValue = str | int | float | bool
"""The value of a method-wide choice."""


@dataclass(frozen=True, slots=True)
class Groups:
    """How the parameters of a model are divided; each group has its own row of values.

    Attributes:
        depth: Number of blocks of consecutive layers, 1 or more; ``None`` where not by depth.
        patterns: Regular expressions searched in parameter names, one group each; a last
            pattern ``rest`` takes the parameters that no other matches. Empty where not by name.
        tensors: The name of every parameter, each a group of its own, as :meth:`of_tensors`
            orders them. Empty where groups have several parameters.
    """

    depth: int | None = None
    patterns: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.depth is not None) + bool(self.patterns) + bool(self.tensors) > 1:
            raise SpecError("groups: give either depth, patterns or tensors, not two of them")
        if self.tensors != in_order(set(self.tensors)):
            raise SpecError("groups: tensors are listed twice, or in another order than theirs")
        if self.depth is not None and not 1 <= self.depth <= _MAX_DEPTH:
            raise SpecError(f"groups: depth is {self.depth}; allowed is 1 to {_MAX_DEPTH}")
        if len(set(self.patterns)) != len(self.patterns):
            raise SpecError(f"groups: a pattern is listed twice in {list(self.patterns)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Return a name for each group, for parameter names and reports."""
        if self.depth is not None:
            return tuple(f"depth{i}" for i in range(self.depth))
        return self.tensors or self.patterns or ("whole",)

    @classmethod
    def of_tensors(cls, names: Iterable[str]) -> "Groups":
        """Return the groups in which every parameter has a row of its own."""
        return cls(tensors=in_order(set(names)))

    @classmethod
    def from_data(cls, data: Any) -> "Groups":
        """Read ``whole``, ``{depth: k}`` or ``{patterns: [...]}``.

        Raises:
            SpecError: If ``data`` is none of these.
        """
        if data == "whole":
            return cls()
        match data:
            case {"depth": int(depth), **rest} if not rest and not isinstance(depth, bool):
                return cls(depth=depth)
            case {"patterns": [str(), *_] as patterns, **rest} if not rest:
                if all(isinstance(pattern, str) for pattern in patterns):
                    return cls(patterns=tuple(patterns))
        raise SpecError(
            f"groups: found {data!r}; allowed: whole, {{depth: k}} or {{patterns: [p, ...]}}; "
            f"{TENSOR} is for plans whose values name the tensors, and for search.refine"
        )

    def to_data(self) -> Any:
        """Return what :meth:`from_data` reads, or what says that values name the tensors."""
        if self.tensors:
            return NAMED if REST in self.tensors else TENSOR
        if self.depth is not None:
            return {"depth": self.depth}
        return {"patterns": list(self.patterns)} if self.patterns else "whole"


WHOLE = Groups()
TENSOR = "tensor"
"""What a file says of groups of one parameter each, whose names stand before their rows."""
NAMED = "named tensor"
"""As ``tensor``, where a parameter is called ``rest``, so that no row is for all others."""
REST = "rest"
"""As the last pattern, the parameters that no other pattern matches; before a row, the tensors
that no other row of the hyper-parameter is for."""
_MAX_DEPTH = 1000  # blocks of layers; no model has as many
_KEYS = ("method", "experts", "groups", "values", "settings")


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Which experts to merge, by which method, with which hyper-parameters.

    A plan holds names and numbers only, no tensors: it is what travels to a worker, what is
    written beside a saved model, and what a report prints.

    Attributes:
        method: Name of a merge method.
        experts: Expert names, in the order of every row and of axis 0 of every stacked tensor.
        values: For each hyper-parameter of the method, one row per group.
        groups: How the parameters are divided.
        settings: Method-wide choices, e.g. ``{"aggregate": "mean"}``.
    """

    method: str
    experts: tuple[str, ...]
    values: Mapping[str, Rows]
    groups: Groups = WHOLE
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    # what `digest` says, once it was asked for: of a number per tensor that takes a while
    _digest: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.experts:
            raise SpecError("plan: experts is empty; give one name or more")
        if len(set(self.experts)) != len(self.experts):
            raise SpecError(f"plan: an expert is listed twice in {list(self.experts)}")
        for name, rows in self.values.items():
            if len(rows) != len(self.groups):
                raise SpecError(
                    f"plan: values.{name} has {counted(len(rows), 'row')}; "
                    f"groups {self.groups.to_data()!r} need {len(self.groups)}"
                )
            for group, row in zip(self.groups.names, rows, strict=True):
                where = f" (group {group!r})" if len(rows) > 1 else ""
                _check_row(f"values.{name}{where}", row, self.experts)

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits that are equal for equal plans, in any process."""
        if not self._digest:
            text = json.dumps(self.to_dict(), sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            object.__setattr__(self, "_digest", digest)
        return self._digest

    def reordered(self, experts: tuple[str, ...]) -> "MergePlan":
        """Return the same plan with its experts in another order.

        Args:
            experts: The same names, in that order.
        """
        order = [self.experts.index(expert) for expert in experts]
        values = {
            name: tuple(tuple(row[i] for i in order) for row in rows)
            for name, rows in self.values.items()
        }
        return replace(self, experts=experts, values=values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MergePlan":
        """Read what :meth:`to_dict` returns.

        Raises:
            SpecError: If a key is missing or unknown, or a value does not have the right form.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"plan: found {type(data).__name__}; a mapping is needed")
        if unknown := [key for key in data if key not in _KEYS]:
            raise SpecError(f"plan: unknown key {unknown[0]!r} (known: {', '.join(_KEYS)})")
        if missing := [key for key in ("method", "experts", "values") if key not in data]:
            raise SpecError(f"plan: key {missing[0]!r} is missing")
        method, experts = data["method"], data["experts"]
        if not isinstance(method, str):
            raise SpecError(f"plan: method is {method!r}; a name is needed")
        if not (isinstance(experts, list | tuple) and all(isinstance(e, str) for e in experts)):
            raise SpecError(f"plan: experts is {experts!r}; a list of names is needed")
        if (kind := data.get("groups")) in (TENSOR, NAMED):
            rest = REST if kind == TENSOR else None
            groups, values = _read_tensor_values(data["values"], rest)
        else:
            groups = Groups.from_data(data.get("groups", "whole"))
            values = _read_values(data["values"])
        return cls(
            method=method,
            experts=tuple(experts),
            groups=groups,
            values=values,
            settings=_read_settings({} if data.get("settings") is None else data["settings"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists, mappings, strings and numbers.

        Where every tensor has a row of its own, tensors whose rows are equal stand together: as
        names with their layers in braces, and as ``rest``.
        """
        values: dict[str, Any] = {n: [list(r) for r in rows] for n, rows in self.values.items()}
        if self.groups.tensors:
            values = _by_tensor(self.groups.tensors, self.values)
        return {
            "method": self.method,
            "experts": list(self.experts),
            "groups": self.groups.to_data(),
            "values": values,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_yaml(cls, source: str | Path) -> "MergePlan":
        """Read a plan from a YAML file, or from YAML text that holds a newline.

        Raises:
            SpecError: If the file cannot be read, or does not hold a plan; it names the file.
        """
        from searchmerge.yaml_text import parse_yaml, read_yaml_file

        if isinstance(source, str) and "\n" in source:
            return cls.from_dict(parse_yaml(source, "plan").data)
        data, lines = read_yaml_file(Path(source))
        try:
            return cls.from_dict(data)
        except SpecError as error:
            named = re.search(rf"\b({'|'.join(_KEYS)})(?:\.(\w+))?", str(error))
            keys = tuple(key for key in named.groups() if key) if named else ()
            line = lines.get(keys, lines.get(keys[:1]))
            raise SpecError(f"{source}{f':{line}' if line else ''}: {error}") from error

    def to_yaml(self, path: Path | None = None) -> str:
        """Return the plan as YAML text, and write it to ``path`` where one is given."""
        from searchmerge.yaml_text import dump_yaml

        text = dump_yaml(self.to_dict())
        if path is not None:
            write_atomically(path, text)
        return text


def _check_row(where: str, row: tuple[float, ...], experts: tuple[str, ...]) -> None:
    if len(row) != len(experts):
        raise SpecError(
            f"plan: a row of {where} has {counted(len(row), 'number')}; "
            f"it has {counted(len(experts), 'expert')}: {', '.join(experts)}"
        )
    for expert, number in zip(experts, row, strict=True):
        if not math.isfinite(number):
            raise SpecError(f"plan: {where} of expert {expert!r} is {number}, not finite")


def _by_tensor(names: tuple[str, ...], values: Mapping[str, Rows]) -> dict[str, Any]:
    """Return the rows of each hyper-parameter under the names of the tensors that they are for.

    The first names them all; in the others the commonest row is that of ``rest``, unless a tensor
    is called so.
    """
    by_tensor: dict[str, Any] = {}
    for number, (name, rows) in enumerate(values.items()):
        alike: dict[tuple[float, ...], list[str]] = {}
        for tensor, row in zip(names, rows, strict=True):
            alike.setdefault(row, []).append(tensor)
        has_rest = number and REST not in names
        rest = max(alike, key=lambda row: len(alike[row])) if has_rest else None
        lines = {
            pattern: list(row)
            for row, tensors in alike.items()
            if row != rest
            for pattern in compress(tensors)
        }
        lines = {pattern: lines[pattern] for pattern in in_order(lines)}
        by_tensor[name] = lines if rest is None else {**lines, REST: list(rest)}
    return by_tensor


def _read_tensor_values(data: Any, rest: str | None) -> tuple[Groups, dict[str, Rows]]:
    """Return the tensors that values name, and their rows in the order of these groups.

    Args:
        data: The values as they are written.
        rest: What stands before the row of all other tensors; ``None`` where no row is theirs.
    """
    if not isinstance(data, Mapping) or not all(isinstance(v, Mapping) for v in data.values()):
        raise SpecError(
            f"plan: groups: {TENSOR} needs values of the form {{coefficient: {{NAME: row}}}}, "
            "where NAME is a tensor's, e.g. layers.{0..11}.norm.weight for those of twelve layers"
        )
    listed = {str(name): _listed_rows(str(name), rows) for name, rows in data.items()}
    groups = Groups.of_tensors(
        tensor for rows in listed.values() for tensor in rows if tensor != rest
    )
    if not groups.tensors:
        raise SpecError(f"plan: groups: {TENSOR}, but values name no tensor")
    values: dict[str, Any] = {}
    for name, rows in listed.items():
        others = None if rest is None else rows.get(rest)
        values[name] = [rows.get(tensor, others) for tensor in groups.tensors]
        if None in values[name]:
            missing = groups.tensors[values[name].index(None)]
            raise SpecError(
                f"plan: values.{name} has no row for tensor {missing!r}; give one"
                f"{f', or a row {rest}' if rest else ''}"
            )
    return groups, _read_values(values)


def _listed_rows(name: str, rows: Mapping[Any, Any]) -> dict[str, Any]:
    """Return each tensor's row of a hyper-parameter.

    Raises:
        SpecError: If a tensor has two, or a row is no list of numbers.
    """
    listed: dict[str, Any] = {}
    for pattern, row in rows.items():
        _read_row(name, f"the row of {pattern}", row)
        for tensor in expand(str(pattern)):
            if tensor in listed:
                raise SpecError(f"plan: values.{name} has two rows for tensor {tensor!r}")
            listed[tensor] = row
    return listed


def _read_values(data: Any) -> dict[str, Rows]:
    if not isinstance(data, Mapping):
        raise SpecError(f"plan: values is {data!r}; a mapping of name to rows is needed")
    values = {}
    for name, rows in data.items():
        if isinstance(rows, Mapping):
            raise SpecError(
                f"plan: values.{name} names what its rows are for, as they do with groups: "
                f"{TENSOR} alone; else a list of rows is needed, one per group"
            )
        if not isinstance(rows, list | tuple):
            raise SpecError(
                f"plan: values.{name} is {rows!r}; a list of rows of numbers is needed, "
                "one row per group, one number per expert"
            )
        values[str(name)] = tuple(
            _read_row(str(name), f"row {number}", row) for number, row in enumerate(rows, 1)
        )
    return values


def _read_row(name: str, which: str, row: Any) -> tuple[float, ...]:
    try:
        if isinstance(row, list | tuple):
            return tuple(map(_number, row))
    except (TypeError, OverflowError):
        pass
    raise SpecError(
        f"plan: values.{name}: {which} is {row!r}; a list of rows of numbers is needed, "
        "one row per group, one number per expert"
    )


def _number(data: Any) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise TypeError(data)
    return float(data)


def _read_settings(data: Any) -> dict[str, SettingValue]:
    if not isinstance(data, Mapping):
        raise SpecError(f"plan: settings is {data!r}; a mapping is needed")
    for name, value in data.items():
        if not isinstance(value, str | int | float | bool):
            raise SpecError(f"plan: settings.{name} is {value!r}; one word or number is needed")
    return {str(name): value for name, value in data.items()}
