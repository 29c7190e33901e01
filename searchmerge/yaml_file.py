"""Reading a YAML file into a pydantic model, with errors that name file, line and key."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from searchmerge.errors import SpecError

Model = TypeVar("Model", bound=BaseModel)
Marks = dict[tuple[str | int, ...], int]
"""Path of a key to its line."""


def read_yaml(path: Path, model: type[Model], overrides: Mapping[str, str] | None = None) -> Model:
    """Return what ``path`` holds.

    Args:
        path: A YAML file.
        model: What it must be.
        overrides: Dotted key to YAML text that replaces the file's value.

    Raises:
        SpecError: If the file cannot be read, a key is unknown or stands twice, or a value is
            not allowed; it names the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    marks: Marks = {}
    if node is not None:
        _mark(node, (), marks, path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise SpecError(f"{path}: holds {type(data).__name__}; a mapping of keys is needed")
    return to_model(data, model, overrides, path, marks)


def to_model(
    data: dict[str, Any],
    model: type[Model],
    overrides: Mapping[str, str] | None,
    where: Path | str,
    marks: Marks | None = None,
) -> Model:
    """Return what ``data`` holds.

    Args:
        data: Keys and values; overwritten.
        model: What it must be.
        overrides: Dotted key to YAML text that replaces a value.
        where: What errors begin with.
        marks: Path of a key to the line that they name.

    Raises:
        SpecError: If a key is unknown or a value is not allowed.
    """
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(_describe(error, marks or {}, where, model)) from error


def _mark(node: yaml.Node, where: tuple[str | int, ...], marks: Marks, path: Path) -> None:
    marks.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise SpecError(f"{path}:{line}: key {key.value!r} stands twice")
            seen.add(key.value)
            marks[(*where, key.value)] = line
            _mark(value, (*where, key.value), marks, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _mark(item, (*where, i), marks, path)


def _override(data: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise SpecError(f"--set {key}: {parent!r} holds no keys")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {key}: {value!r} is not valid YAML") from error


def _describe(
    error: ValidationError, marks: Marks, path: Path | str, model: type[BaseModel]
) -> str:
    # a union reports every form that did not fit: the deepest one is what was meant
    details = max(error.errors(), key=lambda detail: len(detail["loc"]))
    where = tuple(part for part in details["loc"] if _is_key(part))
    known = where
    while known and known not in marks:
        known = known[:-1]
    dotted = ".".join(str(part) for part in where)
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        names = _field_names(model)
        close = get_close_matches(str(where[-1]), names, n=1)
        message = "unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
        if where[-1] in names:
            message = "a key that is not known here"
    if details["type"] == "model_type":
        message = "a mapping of keys is needed"
    found = details.get("input")
    if details["type"] not in ("extra_forbidden", "missing", "value_error"):
        message += f"; found {found!r}"
    line = f":{marks[known]}" if known in marks else ""
    return f"{path}{line}: {dotted}: {message}" if dotted else f"{path}{line}: {message}"


def _is_key(part: str | int) -> bool:
    """Return whether part of an error's location stands in the file: no name of a union's form."""
    return isinstance(part, int) or not (
        part[:1].isupper() or set("[ (") & set(part) or part in _FORMS
    )


_FORMS = frozenset({"str", "int", "float", "bool", "constrained-str"})


def _field_names(model: type[BaseModel]) -> list[str]:
    """Return the keys of a model and of all models within it."""
    names: list[str] = []
    for schema in (s := model.model_json_schema(), *s.get("$defs", {}).values()):
        names += schema.get("properties", {})
    return names
