"""Which settings of an lm-eval task a study changes: the split scored, where data files are."""

from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

import yaml

_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow", "xml")
"""Values of ``dataset_path`` that say how to read ``data_files``, and not where they are."""


def split_overrides(config: Mapping[str, Any], split: str) -> dict[str, str]:
    """Return the settings that make lm-eval score ``split``.

    It scores the test split if there is one, and leaves an example out of its own few-shot
    prompt only where that is also the split that few-shot examples come from.
    """
    source, is_implicit = _fewshot_source(config)
    if split == _scored_split(config) and source != split:
        return {}
    overrides = {"test_split": split}
    if is_implicit and source is not None:
        overrides["fewshot_split"] = source
    return overrides


def needed_split(config: Mapping[str, Any], split: str) -> dict[str, str]:
    """Return the setting without which lm-eval loads no task: a split, where it names none."""
    return {} if _scored_split(config) else {"test_split": split}


def may_show_itself(config: Mapping[str, Any], split: str) -> bool:
    """Return whether lm-eval, left alone, may show an example in its own few-shot prompt.

    ``ConfigurableTask.fewshot_context`` takes an example out of those that are drawn only where
    the ``fewshot_split`` that a task names is its ``test_split``, or it names neither. So a task
    keeps them that names its validation split for both, or has a test split alone.
    """
    source, is_implicit = _fewshot_source(config)
    named = None if is_implicit else source
    return source == split == _scored_split(config) and named != config.get("test_split")


def _scored_split(config: Mapping[str, Any]) -> str | None:
    """Return the split that lm-eval scores by itself."""
    return config.get("test_split") or config.get("validation_split")


def _fewshot_source(config: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the split that few-shot examples are drawn from, and whether the task names none."""
    fewshot = config.get("fewshot_config") or {}
    named = fewshot.get("split") or config.get("fewshot_split")
    if named is not None or "samples" in fewshot:
        return named, False
    order = ("training_split", "validation_split", "test_split")
    return next((config[key] for key in order if config.get(key)), None), True


def data_files(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return ``dataset_kwargs`` whose relative data files are found from ``folder``.

    Those of a dataset on the hub, or in a folder, are relative to that dataset and stay so.
    """
    settings = config.get("dataset_kwargs") or {}
    plain_files = config.get("dataset_path") in _FILE_FORMATS
    if not plain_files or "data_files" not in settings:
        return {}

    def absolute(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: absolute(value) for split, value in files.items()}
        if isinstance(files, list):
            return [absolute(value) for value in files]
        return files if "://" in files else str(folder.resolve() / files)

    return {"dataset_kwargs": {**settings, "data_files": absolute(settings["data_files"])}}


class _PlainLoader(yaml.SafeLoader):
    """Reads a task's YAML and leaves its ``!function`` tags as text."""


_PlainLoader.add_constructor("!function", lambda loader, node: node.value)


def data_folder(path: Path) -> Path:
    """Return the folder that the data files of a task's YAML are relative to."""
    return _declaring_folder(path) or path.parent


def _declaring_folder(path: Path) -> Path | None:
    """Return the folder of the YAML that says ``dataset_kwargs``: this one, or one it includes."""
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    if "dataset_kwargs" in config:
        return path.parent
    included = config.get("include") or []
    for name in reversed(included if isinstance(included, list) else [included]):
        if (folder := _declaring_folder(path.parent / name)) is not None:
            return folder
    return None


def referred_files(place: Path) -> Iterator[Path]:
    """Yield the files that task YAMLs refer to: included ones, data files, and data folders.

    Args:
        place: A folder of YAML files; what cannot be read refers to nothing.
    """
    waiting = [file for file in sorted(place.rglob("*.y*ml")) if file.is_file()]
    seen: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file.resolve() in seen:
            continue
        seen.add(file.resolve())
        config = _plain_settings(file)
        yield from local_data(config, file.parent)
        included = config.get("include") or []
        for name in included if isinstance(included, list) else [included]:
            if isinstance(name, str) and (other := file.parent / name).is_file():
                yield other
                waiting.append(other)


def local_data(config: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Yield the data files and the folders of a data set on this machine that a task names."""
    named = config.get("dataset_path")
    if isinstance(named, str) and named not in _FILE_FORMATS and Path(named).exists():
        yield Path(named)
    settings = config.get("dataset_kwargs")
    waiting = [settings.get("data_files")] if isinstance(settings, Mapping) else []
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and "://" not in item:
            pattern = str(folder.resolve() / item)
            yield from map(Path, sorted(glob(pattern, recursive=True)))  # noqa: PTH207 - absolute


def _plain_settings(file: Path) -> Mapping[str, Any]:
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # named when it is loaded
        return {}
    return config if isinstance(config, Mapping) else {}
