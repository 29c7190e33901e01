"""Watching the files of models while a study uses them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.companions import companions
from searchmerge.checkpoints.lora_config import ADAPTER_CONFIG
from searchmerge.checkpoints.stamps import Stamp, stamp
from searchmerge.errors import CheckpointError
from searchmerge.models import Models

Content = dict[str, dict[str, str]]
"""Name of a model to a hash of its weights, under ``weights``, and of every file beside them."""

_NO_SCORE = ("LICENSE", "NOTICE")  # begin the names of files that decide none


class Watch:
    """Sees whether the models are still those that a study was begun with.

    It notes how every file stands and then what it holds. Weights are mapped, not copied: were a
    file written to, later merges would be of other models, and the saved model not the one that
    was confirmed.

    Args:
        models: The models, as they are now.
        content: What they have to hold; ``None`` for whatever they hold now.

    Attributes:
        models: The models.
        content: What they hold.

    Raises:
        CheckpointError: If they hold something else.
    """

    def __init__(self, models: Models, content: Content | None = None) -> None:
        self.models = models
        self._stamps = {file: stamp(file) for file in _files(models)}
        self.content = content_of(models)
        if content is not None:
            _compare(models, content, self.content, "than where the study was begun")

    def check(self) -> None:
        """Refuse to go on where a file has changed; nothing is read, unless one was only moved.

        Raises:
            CheckpointError: If one has; it names the file, and what was changed.
        """
        moved = False
        for file, noted in self._stamps.items():
            now = stamp(file)
            if now != noted:
                if now._replace(changed_ns=noted.changed_ns) != noted:
                    raise CheckpointError(_message(file, _change(noted, now)))
                moved = True  # or its rights were changed; or it was written to, times put back
        if moved:
            _compare(self.models, self.content, content_of(self.models), "than before")
            self._stamps = {file: stamp(file) for file in self._stamps}


def content_of(models: Models) -> Content:
    """Return what tells the models' content from any other that would score otherwise."""
    weights = models.fingerprints()
    content = {}
    for name, model in {"base": models.base, **models.experts}.items():
        content[name] = {"weights": weights[name]}
        for folder in dict.fromkeys((model.source_dir, model.path, model.tokenizer_dir)):
            for file in _deciding(folder):
                digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()[:16]
                content[name].setdefault(str(file), digest)
    if (chosen := models.base.chosen_tokenizer) is not None:
        content["base"]["tokenizer"] = chosen.name  # a hash of what it was put together from
    return content


def _files(models: Models) -> Iterator[Path]:
    for model in (models.base, *models.experts.values()):
        yield from _weight_files(model)
        for folder in (model.source_dir, model.path, model.tokenizer_dir):
            yield from (folder / file for file in _deciding(folder))


def _weight_files(model: Checkpoint) -> Iterator[Path]:
    yield from dict.fromkeys(model.own_files.values())
    if model.adapter is not None:
        yield model.adapter.file
        yield model.source_dir / ADAPTER_CONFIG


def _deciding(folder: Path) -> list[Path]:
    return [file for file in companions(folder) if not file.name.startswith(_NO_SCORE)]


def _compare(models: Models, content: Content, now: Content, than: str) -> None:
    sources = {"base": models.base.name, **models.sources}
    for name, files in content.items():
        for file in sorted(files.keys() | now[name].keys()):
            if files.get(file) != now[name].get(file):
                where = f"{name} ({sources[name]})"
                raise CheckpointError(_message(where, f"{file} holds something else {than}"))


def _change(noted: Stamp, now: Stamp) -> str:
    if now.inode != noted.inode:
        return "another file is in its place"
    if now.size_bytes != noted.size_bytes:
        return f"it had {noted.size_bytes} bytes and has {now.size_bytes}"
    return "it was written to"


def _message(where: Path | str, change: str) -> str:
    return (
        f"{where}: changed while the study uses it: {change}; what was scored before is kept, and "
        "with the former file in its place the same command goes on"
    )
