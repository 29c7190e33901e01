"""Reading a YAML file into a pydantic model, with errors that name file, line and key."""

from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from searchmerge.errors import SpecError
from searchmerge.yaml_text import KeyPath, parse_yaml, read_yaml_file

Model = TypeVar("Model", bound=BaseModel)
Lines = Mapping[KeyPath, int]
"""Path of a key to its line."""

_MAX_SHOWN = 200  # characters of a value that is not allowed


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
    data, lines = read_yaml_file(path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise SpecError(f"{path}: holds {type(data).__name__}; a mapping of keys is needed")
    return to_model(data, model, overrides, path, lines)


def to_model(
    data: dict[str, Any],
    model: type[Model],
    overrides: Mapping[str, str] | None,
    where: Path | str,
    lines: Lines | None = None,
) -> Model:
    """Return what ``data`` holds.

    Args:
        data: Keys and values; overwritten.
        model: What it must be.
        overrides: Dotted key to YAML text that replaces a value.
        where: What errors begin with.
        lines: Path of a key to the line that they name.

    Raises:
        SpecError: If a key is unknown or a value is not allowed.
    """
    lines = dict(lines or {})
    for key, value in (overrides or {}).items():
        _override(data, key, value)
        replaced = tuple(key.split("."))
        lines = {path: n for path, n in lines.items() if path[: len(replaced)] != replaced}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(_describe(error, lines, where, model, overrides or {})) from error


def _override(data: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise SpecError(f"--set {key}: {parent!r} holds no keys")
    data[last] = parse_yaml(value, f"--set {key}").data


def _describe(
    error: ValidationError,
    lines: Lines,
    file: Path | str,
    model: type[BaseModel],
    overrides: Mapping[str, str],
) -> str:
    # a union reports every form that did not fit: what was meant is the deepest one, of several
    # that which is wrong in the fewest places
    counts = Counter(detail["loc"][:-1] for detail in error.errors())
    details = max(error.errors(), key=lambda d: (len(d["loc"]), -counts[d["loc"][:-1]]))
    where = _key_path(details["loc"], lines)
    set_by = [key for key in overrides if where[: key.count(".") + 1] == tuple(key.split("."))]
    place = f"{file}: --set" if set_by and lines else f"{file}"
    if not set_by:
        known = where
        while known and known not in lines:
            known = known[:-1]
        place += f":{lines[known]}" if known in lines else ""
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
    if details["type"] not in ("extra_forbidden", "missing", "value_error"):
        message += _shown(details.get("input"), where, model)
    return f"{place}: {dotted}: {message}" if dotted else f"{place}: {message}"


def _shown(value: Any, where: KeyPath, model: type[BaseModel]) -> str:
    """Return the value that was found, unless it is of a key that may hold a password."""
    field = model.model_fields.get(str(where[0])) if where else None
    if field is not None and not field.repr:
        return ""
    text = repr(value)
    return f"; found {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'}"


def _key_path(location: KeyPath, lines: Lines) -> KeyPath:
    """Return an error's location without the names of a union's forms, which stand in no file."""
    where: KeyPath = ()
    for part in location:
        if (*where, part) in lines or _is_key(part):
            where = (*where, part)
    return where


def _is_key(part: str | int) -> bool:
    """Return whether part of an error's location stands in the file: no name of a union's form."""
    return isinstance(part, int) or not (
        part[:1].isupper() or set("[ (") & set(part) or part in _FORMS
    )


_FORMS = frozenset({"str", "int", "float", "bool", "constrained-str", "constrained-int"})


def _field_names(model: type[BaseModel]) -> list[str]:
    """Return the keys of a model and of all models within it."""
    names: list[str] = []
    for schema in (s := model.model_json_schema(), *s.get("$defs", {}).values()):
        names += schema.get("properties", {})
    return names
