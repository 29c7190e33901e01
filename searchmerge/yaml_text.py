"""YAML text as plain data, and the line of every key: strictly, and in bounded time and memory."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from searchmerge.errors import SpecError

KeyPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value."""

_MAX_BYTES = 4_000_000
_MAX_VALUES = 300_000  # with aliases written out: a few of them can stand for billions
_MAX_DEPTH = 40
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null"))
_UNBUILDABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
"""What PyYAML raises where a tag does not fit its text, e.g. ``!!int many``."""


class Document(NamedTuple):
    """What a text holds: mappings of text to values, lists, text, numbers, booleans and None.

    Attributes:
        data: All of it; no part is shared by two others.
        lines: The line of each key, counted from 1; of the whole document under ``()``.
    """

    data: Any
    lines: dict[KeyPath, int]


def read_yaml_file(file: Path) -> Document:
    """Return what a YAML file holds.

    Raises:
        SpecError: If it cannot be read; it names the file, and the line where it is one.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise SpecError(f"{file}: cannot be read: {_reason(error)}") from error
    if len(content) > _MAX_BYTES:
        raise SpecError(f"{file}: is larger than {_MAX_BYTES // 1_000_000} MB; not read as YAML")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = ", but UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise SpecError(
            f"{file}:{line}: is not UTF-8 text{kind} (byte {content[error.start]:#04x}); "
            "save it as UTF-8"
        ) from error
    return parse_yaml(text, file)


def parse_yaml(text: str, where: Path | str) -> Document:
    """Return what YAML text holds.

    Numbers, booleans and nothing are read as in YAML 1.1, save that ``1e-3`` is a number, and
    that dates, ``1:30`` and ``010`` are text. Keys are text as they are written.

    Args:
        text: One document.
        where: The file that it is from, or in words what it is.

    Raises:
        SpecError: If it is no YAML, a key stands twice, or it would grow beyond all bounds; it
            names ``where``, and the line where that is a file.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(loader, where)
        if node is None:
            return Document(None, {})
        reader.check_size(node)
        return Document(reader.value(node, ()), reader.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        told = error.problem or error.context or "it cannot be read"
        raise SpecError(f"{_at(where, mark)}: not valid YAML: {told}") from error
    except yaml.YAMLError as error:
        told = getattr(error, "reason", "it cannot be read")
        raise SpecError(f"{where}: not valid YAML: {told}") from error
    except RecursionError as error:
        raise SpecError(f"{where}: is nested deeper than {_MAX_DEPTH} levels") from error


class _Loader(yaml.SafeLoader):
    """Reads scalars as :func:`parse_yaml` says."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as PyYAML has it; filled below


_DIGITS = r"[-+]?(?:0|[1-9][0-9_]*)"
_EXPONENT = "[eE][-+]?[0-9]+"
for _kind, _pattern, _first in (
    ("bool", "(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("null", "(?:~|(?i:null)|)", ["~", "n", "N", ""]),
    ("int", f"{_DIGITS}|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+", "-+0123456789"),
    ("float", rf"{_DIGITS}(?:\.[0-9_]*(?:{_EXPONENT})?|{_EXPONENT})", "-+0123456789"),
    ("float", rf"[-+]?\.(?:[0-9][0-9_]*(?:{_EXPONENT})?|(?i:inf))|\.(?i:nan)", "-+."),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what is text to PyYAML and a number here."""


for _first, _own in _Loader.yaml_implicit_resolvers.items():
    for _tag, _regex in _own:
        _Dumper.add_implicit_resolver(_tag, _regex, [_first])


def dump_yaml(data: Any, *, flow: bool | None = None, width: float = 80) -> str:
    """Return plain data as YAML text that any YAML 1.1 or 1.2 reader takes for the same data.

    Args:
        data: Mappings, lists, text, numbers, booleans and None.
        flow: Whether ``{}`` and ``[]`` are written; ``None`` for the innermost alone.
        width: Columns of a line, about.
    """
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width
    )
    return text


def yaml_in_one_line(data: Any) -> str:
    """Return plain data as one line of YAML text."""
    return dump_yaml(data, flow=True, width=float("inf")).removesuffix("...\n").strip()


class _Reader:
    """Makes plain data of a document's nodes, and notes the line of each key."""

    def __init__(self, loader: _Loader, where: Path | str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._loader = loader
        self._where = where
        self._sizes: dict[int, int] = {}

    def check_size(self, node: yaml.Node, depth: int = 1) -> int:
        """Return how many values a node stands for, with its aliases written out.

        Raises:
            SpecError: If there are too many, it is nested too deep, or holds itself.
        """
        if depth > _MAX_DEPTH:
            raise self._error(node, f"is nested deeper than {_MAX_DEPTH} levels")
        if id(node) not in self._sizes:
            self._sizes[id(node)] = _MAX_VALUES  # met again within itself, it has no end
            size = 1 + sum(self.check_size(inner, depth + 1) for inner in _children(node))
            if size > _MAX_VALUES:
                raise self._error(node, f"stands for more than {_MAX_VALUES} values")
            self._sizes[id(node)] = size
        return self._sizes[id(node)]

    def value(self, node: yaml.Node, where: KeyPath) -> Any:
        """Return what a node holds.

        Raises:
            SpecError: If a key is no text or stands twice, or a value is of a kind that is not
                allowed.
        """
        self.lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(inner, (*where, i)) for i, inner in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        shown = node.tag.replace(_TAG, "!!")
        raise self._error(node, f"the tag {shown} is not allowed here; write plain YAML")

    def _mapping(self, node: yaml.MappingNode, where: KeyPath) -> dict[str, Any]:
        merged: list[yaml.Node] = []
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key is no text")
            if key.tag == f"{_TAG}merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if key.value in entries:
                raise self._error(key, f"key {key.value!r} stands twice")
            entries[key.value] = value
            self.lines[(*where, key.value)] = key.start_mark.line + 1
        data = {key: self.value(value, (*where, key)) for key, value in entries.items()}
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                raise self._error(other, "<< needs a mapping, or a list of them")
            data = {**self._mapping(other, where), **data}
        return data

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self._loader.construct_object(node)
        except _UNBUILDABLE as error:
            kind = node.tag.removeprefix(_TAG)
            raise self._error(node, f"{_short(node.value)} is no {kind}, or too long") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(node, f"{_short(node.value)} is no finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise self._error(node, f"{_short(node.value)} is too large a number")
        return value

    def _error(self, node: yaml.Node, message: str) -> SpecError:
        return SpecError(f"{_at(self._where, node.start_mark)}: {message}")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _at(where: Path | str, mark: yaml.Mark | None) -> str:
    return (
        f"{where}:{mark.line + 1}" if mark is not None and isinstance(where, Path) else str(where)
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
