"""What a tokenizer's files say, in a form in which two of them can be compared."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from searchmerge.checkpoints.files import (
    COUNT,
    OBJECT,
    TEXT,
    TEXTS,
    TOKENIZER_FILES,
    TOKENS,
    Kind,
    check_keys,
    read_json,
)
from searchmerge.errors import CheckpointError

_VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt")
_BINARY_SUFFIXES = (".model", ".tiktoken")


def is_of_tokenizer(name: str) -> bool:
    """Return whether a file belongs to a tokenizer, by its name in a model's directory."""
    folder, _, file = name.rpartition("/")
    within = folder in ("", "additional_chat_templates")
    return within and any(fnmatch(file, pattern) for pattern in TOKENIZER_FILES)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that was added to a tokenizer's vocabulary.

    Attributes:
        index: Its id.
        content: Its text.
        options: How it is found in a text: ``special``, ``lstrip``, ``normalized``, ...
    """

    index: int
    content: str
    options: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Which tokens there are, and how text is cut into them.

    Attributes:
        tokens: Token to id, added tokens included; empty where no file lists them.
        digests: Hashes of the parts, by kind of part; two tokenizers are the same where the
            parts that both have are equal.
        added: The tokens that ``tokenizer.json`` lists beside its vocabulary.
        model_digest: Hash of that vocabulary and its merges, without the added tokens; ``None``
            where there is no ``tokenizer.json``.
    """

    tokens: Mapping[str, int]
    digests: Mapping[str, str]
    added: tuple[AddedToken, ...] = ()
    model_digest: str | None = None


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """Return what the tokenizer files in a directory say; None where there are none.

    ``tokenizer.json`` is read where there is one: its vocabulary, merges and added tokens, not
    its formatting. Else the older vocabulary files are.

    Raises:
        CheckpointError: If a file cannot be read; it names the file.
    """
    if (file := directory / "tokenizer.json").exists():
        return _read_fast(file)
    digests = {
        file.name: hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        for file in sorted(directory.iterdir())
        if (file.name in _VOCABULARY_FILES or file.suffix in _BINARY_SUFFIXES) and file.is_file()
    }
    tokens = {}
    if (file := directory / "vocab.json").exists():
        vocabulary = read_json(file)
        if not TOKENS.allows(vocabulary):
            raise CheckpointError(f"{file}: {TOKENS.words} is needed")
        tokens = dict(vocabulary)
        digests["vocab.json"] = _digest(sorted(tokens.items()))
    return Tokenizer(tokens, digests) if digests else None


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return in a few words how two tokenizers differ; None where all that both have is equal."""
    shared = [kind for kind in one.digests if kind in other.digests]
    differing = [kind for kind in shared if one.digests[kind] != other.digests[kind]]
    if not differing:
        return None
    apart = [token for token in one.tokens if other.tokens.get(token) != one.tokens[token]]
    apart += [token for token in other.tokens if token not in one.tokens]
    if not (apart and one.tokens and other.tokens):
        return f"{differing[0]} differs"
    more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
    return f"they differ in {apart[0]!r}{more}"


def _is_scored(value: Any) -> bool:
    """Return whether a unigram model's vocabulary is pairs of token and score."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
    )


def _is_merges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, str) or (TEXTS.allows(pair) and len(pair) == 2) for pair in value
    )


def _is_added(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and COUNT.allows(token.get("id"))
        for token in value
    )


_KEYS = {
    "model": OBJECT,
    "added_tokens": Kind("a list of objects with content and id", _is_added),
}
_MODEL_KEYS = {
    "type": TEXT,
    "vocab": Kind(
        "an object of ids by token, or a list of tokens with scores,",
        lambda v: TOKENS.allows(v) or _is_scored(v),
    ),
    "merges": Kind("a list of pairs of tokens", _is_merges),
}


def _read_fast(file: Path) -> Tokenizer:
    data = read_json(file, _KEYS)
    model = data.get("model") or {}
    check_keys(file, model, _MODEL_KEYS)
    tokens = _tokens(model.get("vocab") or {})
    listed = dict(tokens)
    added = [_added(token) for token in data.get("added_tokens") or []]
    tokens |= {token.content: token.index for token in added}
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []
    ]
    parts: dict[str, Any] = {"tokenizer.json": [model.get("type"), sorted(tokens.items()), merges]}
    if len(listed) == len(tokens):
        parts["vocab.json"] = sorted(tokens.items())
    digests = {kind: _digest(part) for kind, part in parts.items()}
    model_digest = _digest([model.get("type"), sorted(listed.items()), merges])
    return Tokenizer(tokens, digests, tuple(added), model_digest)


def _added(token: Mapping[str, Any]) -> AddedToken:
    options = {key: value for key, value in token.items() if isinstance(value, bool)}
    return AddedToken(int(token["id"]), str(token["content"]), options)


def _tokens(vocabulary: Any) -> dict[str, int]:
    """Return token to id; a unigram model lists pairs of token and score, in order of id."""
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {token: index for index, (token, _) in enumerate(vocabulary)}


def _digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()
