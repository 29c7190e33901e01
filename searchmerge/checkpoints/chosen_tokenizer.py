"""The tokenizer of the merged model: the base's or an expert's, with tokens and a template."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.companions import companions
from searchmerge.checkpoints.files import CONFIG_FILE, in_one_line, read_json
from searchmerge.checkpoints.tokenizer_files import AddedToken, is_of_tokenizer
from searchmerge.durable import read_checked, with_checksum, write_atomically
from searchmerge.errors import CheckpointError

_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"


def chat_template(directory: Path) -> str | None:
    """Return the chat template of the tokenizer in a directory; ``None`` where it has none.

    Raises:
        CheckpointError: If a file cannot be read; it names the file.
    """
    if (file := directory / _TEMPLATE_FILE).exists():
        return _read_text(file)
    for name in (_TOKENIZER_CONFIG, "chat_template.json"):
        if (directory / name).exists():
            said = read_json(directory / name).get("chat_template")
            if isinstance(said, list):
                named = [each for each in said if isinstance(each, Mapping)]
                said = next((t.get("template") for t in named if t.get("name") == "default"), None)
            if said:
                return str(said)
    return None


def template_doubts(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    """Return which experts have another chat template than the merged model will have."""
    ours = chat_template(base.tokenizer_dir)
    found = []
    for name, expert in experts.items():
        theirs = chat_template(expert.tokenizer_dir)
        if theirs is not None and theirs != ours:
            found.append(
                f"expert {name!r} ({expert.name}) has a chat template, the merged model gets "
                f"{'none' if ours is None else 'another'}; choose with `chat_template:` (base, "
                f"{', '.join(experts)}, or a file)"
            )
    return found


def read_template(file: Path) -> str:
    """Return the chat template in a file.

    Raises:
        CheckpointError: If it cannot be read, or is no Jinja template.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = _read_text(file)
    try:
        ImmutableSandboxedEnvironment(extensions=[loopcontrols]).parse(text)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{file}:{error.lineno}: is no chat template: {in_one_line(error)}"
        ) from error
    return text


def with_tokenizer(
    base: Checkpoint,
    expert: Checkpoint | None = None,
    *,
    template: str | None = None,
    added: Sequence[AddedToken] = (),
) -> Checkpoint:
    """Return the base with the tokenizer that the merged model gets.

    It is put together once, in a folder under the cache directory, and named after what it is
    made of. Of an expert, how a generation ends comes along: the ids of special tokens in its
    configuration, and its generation configuration.

    Args:
        base: The base model.
        expert: Whose tokenizer is taken; ``None`` for the base's.
        template: Text of the chat template; ``None`` for the tokenizer's own.
        added: Tokens that are added to it, in order of id.

    Raises:
        CheckpointError: If a tokenizer is not there, or tokens cannot be added to it.
    """
    source = expert or base
    if expert is not None:
        ids = {k: v for k, v in expert.config.items() if k.endswith("_token_id")}
        base = replace(base, config={**base.config, **ids})
    files = _files(base, source)
    if not any(is_of_tokenizer(name) for name in files):
        raise CheckpointError(f"{source.name}: has no tokenizer")
    if template is not None:
        files = _with_template(files, template)
    folder = base.cache_dir / "tokenizers" / _digest(files, added)
    if not _is_whole(folder):
        _make(folder, files, added, trust_remote_code=base.trust_remote_code)
    return replace(base, chosen_tokenizer=folder)


def _files(base: Checkpoint, source: Checkpoint) -> dict[str, bytes]:
    """Return what a folder needs so that transformers loads the tokenizer, by name."""
    own = [file for file in companions(base.path) if len(file.parts) == 1]
    files = {f.name: base.path / f for f in own if not is_of_tokenizer(f.name)}
    directory = source.tokenizer_dir
    for file in companions(directory):
        is_ending = source is not base and file.name == _GENERATION_CONFIG
        if is_of_tokenizer(file.name) or is_ending:
            files[file.as_posix()] = directory / file
    contents = {name: file.read_bytes() for name, file in files.items()}
    contents[CONFIG_FILE] = (json.dumps(dict(base.config), indent=2) + "\n").encode()
    return contents


def _with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Return the files with one chat template, in the place where it counts."""
    kept = {
        name: content
        for name, content in files.items()
        if not name.startswith(("chat_template", "additional_chat_templates"))
    }
    if _TOKENIZER_CONFIG in kept:
        said: dict[str, Any] = json.loads(kept[_TOKENIZER_CONFIG])
        said.pop("chat_template", None)
        kept[_TOKENIZER_CONFIG] = (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()
    return {**kept, _TEMPLATE_FILE: template.encode()}


def _digest(files: Mapping[str, bytes], added: Sequence[AddedToken]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    tokens = [[token.index, token.content, dict(token.options)] for token in added]
    digest.update(json.dumps(tokens, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _is_whole(folder: Path) -> bool:
    """Return whether a folder was made before, and its files are as they were written."""
    try:
        return read_checked(_noted(folder)).get("content") == _content(folder)
    except (OSError, ValueError):
        return False


def _noted(folder: Path) -> Path:
    return folder.with_suffix(".json")


def _content(folder: Path) -> str:
    names = sorted(file for file in folder.rglob("*") if file.is_file())
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in names}
    return _digest(files, ())


def _make(
    folder: Path,
    files: Mapping[str, bytes],
    added: Sequence[AddedToken],
    *,
    trust_remote_code: bool,
) -> None:
    """Put the folder in place once it is whole; processes that ask at once make it once."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")), TemporaryDirectory(dir=folder.parent) as part:
            if _is_whole(folder):
                return
            directory = Path(part) / "tokenizer"
            for name, content in files.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(content)
            if added:
                _add_tokens(directory, added, trust_remote_code=trust_remote_code)
            shutil.rmtree(folder, ignore_errors=True)
            directory.rename(folder)
            write_atomically(_noted(folder), with_checksum({"content": _content(folder)}))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from error


def _add_tokens(directory: Path, added: Sequence[AddedToken], *, trust_remote_code: bool) -> None:
    from transformers import AddedToken as Token
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer.add_tokens([Token(token.content, **token.options) for token in added])
        tokenizer.save_pretrained(directory)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise CheckpointError(
            f"vocabulary: union: tokens cannot be added: {in_one_line(error)}"
        ) from error
    for token in added:
        if (index := tokenizer.convert_tokens_to_ids(token.content)) != token.index:
            raise CheckpointError(
                f"vocabulary: union: token {token.content!r} gets id {index}; {token.index} is "
                "the next that is free"
            )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is no UTF-8 text: {error}") from error
