"""Paths, free space, and the JSON files of a model."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.errors import CheckpointError

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_MAX_DIGITS = 300  # what a float holds, so that any two numbers can be compared
_MAX_SHOWN = 100  # characters of a value that is not allowed

_LISTS = re.compile(
    r"(model type should be one of|should contain one of|,? or contain one of the following).*",
    re.IGNORECASE,
)

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
)
"""Shell patterns of the files of a tokenizer, by their names in a model's directory."""

COMPANIONS = (
    CONFIG_FILE,
    "generation_config.json",
    *TOKENIZER_FILES,
    "additional_chat_templates/*.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""Shell patterns of the files that belong to a model, besides its weights."""


def default_cache_dir() -> Path:
    """Return ``$SEARCHMERGE_CACHE``, or ``~/.cache/searchmerge`` where that is not set."""
    named = os.environ.get("SEARCHMERGE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "searchmerge"


class Kind(NamedTuple):
    """What a key of a JSON file may hold.

    Attributes:
        words: It, for messages.
        allows: Returns whether a value is of this kind.
    """

    words: str
    allows: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_pattern(value: str) -> bool:
    """Return whether text is a regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


TEXT = Kind("text", _is_text)
TEXTS = Kind("a list of texts", lambda v: isinstance(v, list) and all(map(_is_text, v)))
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number from 0", _is_count)
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
PATTERNS = Kind(
    "an object of numbers by regular expression",
    lambda v: isinstance(v, dict) and all(is_pattern(k) and _is_number(v[k]) for k in v),
)
TEXTS_BY_NAME = Kind(
    "an object of texts",
    lambda v: isinstance(v, dict) and all(t is None or _is_text(t) for t in v.values()),
)
TOKENS = Kind(
    "an object of ids by token", lambda v: isinstance(v, dict) and all(map(_is_count, v.values()))
)
LABELS = Kind(
    "an object of texts by whole numbers",
    lambda v: isinstance(v, dict) and all(k.isdecimal() and _is_text(v[k]) for k in v),
)
FILE = Kind("the name of a file in this folder", lambda v: _is_inside(v))
FILES = Kind(
    "an object of names of files in this folder",
    lambda v: isinstance(v, dict) and all(map(_is_inside, v.values())),
)

CONFIG_KEYS = {
    "model_type": TEXT,
    "transformers_weights": FILE,
    "architectures": TEXTS,
    "id2label": LABELS,
    "num_labels": COUNT,
    "tie_word_embeddings": SWITCH,
    "text_config": OBJECT,
    "vision_config": OBJECT,
    "quantization_config": OBJECT,
}
"""What is read of a model's configuration here; transformers reads the rest."""


def _is_inside(name: Any) -> bool:
    """Return whether a name leads to a file within the folder, whatever links it may have."""
    if not _is_text(name) or not name.isprintable():
        return False
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def read_json(file: Path, keys: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        file: The file.
        keys: Key to what it must hold, where it is there and not null.

    Raises:
        CheckpointError: If the file is missing or does not hold such an object; it names the
            file, and the line or the key.
    """
    data = _parsed(file)
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds a {type(data).__name__}; an object is needed")
    check_keys(file, data, keys or {})
    return data


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raise ``CheckpointError`` in place of whatever a library raises over a user's file.

    Odd values lead transformers to errors of any kind, and tokenizers raises bare ``Exception``.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """Return what an error of transformers says, in one line, without the lists of all it has."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it needs Python code that comes with it, which is not run; allow that with "
            "`trust_remote_code: true`, if you trust whoever wrote it"
        )
    return _LISTS.sub("", text).strip(" ,.") or type(error).__name__


def check_keys(file: Path, data: Mapping[str, Any], keys: Mapping[str, Kind]) -> None:
    """Refuse values of other kinds than their keys may hold; what is missing or null is not.

    Args:
        file: What to name in the error.
        data: An object of the file.
        keys: Key to what it must hold.

    Raises:
        CheckpointError: For the first that is wrong; it names the file and the key.
    """
    for key, kind in keys.items():
        value = data.get(key)
        if value is not None and not kind.allows(value):
            shown = repr(value)
            shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
            raise CheckpointError(f"{file}: {key} is {shown}; {kind.words} is needed")


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes().decode("utf-8"), parse_int=_whole_number)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not valid JSON: it is nested too deep") from error


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def check_free_space(directory: Path, headers: Mapping[str, TensorHeader], target: Path) -> None:
    """Refuse to start writing tensors that cannot fit.

    Args:
        directory: An existing directory on the file system that will be written to.
        headers: What will be written.
        target: What to name in the error.

    Raises:
        CheckpointError: If there is less free space than that.
    """
    free = shutil.disk_usage(directory).free
    if free < (needed := _size(headers)):
        raise CheckpointError(
            f"{target}: not enough disk space: {in_words(needed)} needed, {in_words(free)} free"
        )


def describe_write_error(target: Path, headers: Mapping[str, TensorHeader], error: OSError) -> str:
    """Return a message for tensors that could not be written: path, reason and space."""
    existing = next(place for place in target.absolute().parents if place.exists())
    return (
        f"{target}: cannot be written: {error.strerror or error} "
        f"({in_words(_size(headers))} needed, {in_words(shutil.disk_usage(existing).free)} free)"
    )


def _size(headers: Mapping[str, TensorHeader]) -> int:
    return sum(header.size_bytes for header in headers.values())


def in_words(size_bytes: float) -> str:
    """Return a size for people: ``"1.5 GB"``, in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if size_bytes < 999.95:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} GB"
