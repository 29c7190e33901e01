"""Rows of data for evaluators, read with Hugging Face ``datasets``: from the hub or from files."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Origin, PartInfo, TaskInfo

_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""How files are read, by their suffix; a ``.gz`` after it is taken off."""


@dataclass(frozen=True)
class DataPlace:
    """What a study says of where a task's rows are.

    Attributes:
        path: A file or folder, from the study's folder on, or the id of a dataset on the hub.
        subset: The configuration of a dataset on the hub, where it has several.
        revision: Branch, tag or commit of a dataset on the hub.
    """

    path: str
    subset: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class DataPlaces:
    """What a study says of where the rows of a task's two parts are.

    Attributes:
        select: The rows that trials see are drawn from these.
        hold_out: Those that only the confirmation sees.
    """

    select: DataPlace
    hold_out: DataPlace


@dataclass(frozen=True)
class Splits:
    """What a study says of which splits a task's two parts are drawn from.

    Attributes:
        select: What trials see.
        hold_out: What only the confirmation sees.
    """

    select: str
    hold_out: str


@dataclass(frozen=True)
class DataSource:
    """Where rows are.

    Attributes:
        path: A file, a folder of files named after their splits (``train.jsonl``), a folder of
            images by class, or the id of a dataset on the hub.
        split: The split that is scored; a single file has one split, under any name.
        subset: The configuration of a dataset on the hub, where it has several.
        revision: Branch, tag or commit of a dataset on the hub.
    """

    path: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return f"split {self.split!r} of {self.path}" if self.split else self.path


Sources = tuple[DataSource, ...]
"""Where a task's examples are: one source; or that of ``select``, and after it that of
``hold_out``."""


def data_sources(
    data: DataPlace | DataPlaces, split: str | Splits | None, resolve: Callable[[str], str]
) -> Sources:
    """Return where a task's examples are.

    Args:
        data: Where the rows are, of both parts or of each.
        split: The split that is scored, of both or of each; ``None`` where there is one only.
        resolve: Returns a file or folder of the study's as a path, all else as it is.
    """
    sources = []
    for part in ("select", "hold_out"):
        place = data if isinstance(data, DataPlace) else getattr(data, part)
        its_split = getattr(split, part) if isinstance(split, Splits) else split
        path = resolve(place.path)
        sources.append(DataSource(path, its_split, place.subset, place.revision))
    return tuple(dict.fromkeys(sources))


def data_paths(data: DataPlace | DataPlaces) -> list[str]:
    """Return the files, folders and datasets that hold a task's rows, as the study says it."""
    places = [data] if isinstance(data, DataPlace) else [data.select, data.hold_out]
    return [place.path for place in places]


def rows_info(sources: Sources, n_rows: Sequence[int], **said: Any) -> TaskInfo:
    """Return what is known of a task whose examples are rows.

    Args:
        sources: Where they are.
        n_rows: How many each source has.
        **said: What else is known.
    """
    named = list(zip(sources, n_rows, strict=True))
    said["origins"] = tuple(Origin(_data(source), range(n)) for source, n in named)
    if len(sources) == 1:
        return TaskInfo(n_rows[0], **said)
    return TaskInfo.of_parts(*(PartInfo(source.name, n) for source, n in named), **said)


def _data(source: DataSource) -> str:
    """Return which data a source is: the same file, by whatever name, is the same data."""
    path = Path(source.path)
    if path.is_dir():
        path = _split_files(path).get(source.split or "", path)
    if path.is_file():
        return str(path.resolve())
    return ", ".join(filter(None, (source.name, source.subset, source.revision)))


def load_rows(source: DataSource, where: str) -> Any:
    """Return the rows of a split as a ``datasets.Dataset``.

    Args:
        source: What to read.
        where: The key of the study that names it, for messages: ``"tasks.sst2"``.

    Raises:
        SpecError: If there are no such data or no such split, or they cannot be read.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        with _quiet():
            found = _load(source, where)
    except (OSError, ValueError, DatasetsError, DatasetGenerationError) as error:
        if isinstance(error, SpecError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise SpecError(f"{where}.data: {source.path} cannot be read: {reason}") from error
    split = source.split
    if split is None and Path(source.path).is_file():
        split = next(iter(found))
    if split not in found:
        asked = "split is missing" if split is None else f"no split {split!r} in {source.path}"
        raise SpecError(f"{where}.split: {asked} (it has: {', '.join(map(str, found))})")
    return found[split]


def _load(source: DataSource, where: str) -> Any:
    """Return a mapping from split to rows."""
    from datasets import load_dataset

    path = Path(source.path)
    if path.is_file():
        return {source.split or "rows": _read(path, where)}
    if path.is_dir():
        files = _split_files(path)
        wanted = {split: f for split, f in files.items() if source.split in (None, split)}
        if wanted and source.split is not None:
            return {split: _read(file, where) for split, file in wanted.items()}
        return files or load_dataset("imagefolder", data_dir=str(path))
    if path.is_absolute() or source.path.startswith(".") or source.path.count("/") > 1:
        raise SpecError(f"{where}.data: no file or folder {source.path}")
    return load_dataset(source.path, source.subset, revision=source.revision)


def _read(file: Path, where: str) -> Any:
    from datasets import load_dataset

    data_files = {"rows": str(file)}  # a name of our own: not every split may be called so
    return load_dataset(_format(file, where), data_files=data_files, **_reading(file))["rows"]


def _suffix(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes else ""


def _format(path: Path, where: str) -> str:
    if _suffix(path) not in _FORMATS:
        raise SpecError(
            f"{where}.data: {path} is of no known format; known: {', '.join(_FORMATS)}, each "
            "also with .gz"
        )
    return _FORMATS[_suffix(path)]


def _reading(path: Path) -> dict[str, Any]:
    return {"delimiter": "\t"} if _suffix(path) == ".tsv" else {}


def _split_files(folder: Path) -> dict[str, Path]:
    """Return the data files of a folder by the split each is named after."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and _suffix(f) in _FORMATS)
    return {
        file.name.partition(".")[0]: file
        for file in files
        if file.name.partition(".")[0] not in ("metadata", "labels", "dataset_info", "README")
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars of ``datasets`` off the terminal."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def column(rows: Any, name: str, where: str) -> Any:
    """Return a column of the rows.

    Raises:
        SpecError: If there is no such column, or an entry of it is missing.
    """
    if name not in rows.column_names:
        raise SpecError(f"{where}: no column {name!r} (there are: {', '.join(rows.column_names)})")
    return rows[name]


class Joined:
    """Columns one after the other; an entry is read when it is looked up.

    Args:
        columns: Of the sources of a task's examples.
    """

    def __init__(self, columns: Sequence[Any]) -> None:
        self._columns = columns
        self._ends = list(accumulate(len(column) for column in columns))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, example: int) -> Any:
        number = bisect_right(self._ends, example)
        start = self._ends[number - 1] if number else 0
        return self._columns[number][example - start]


def text_column(rows: Any, name: str, where: str) -> list[str]:
    """Return a column of texts.

    Raises:
        SpecError: If there is no such column, or an entry is no text.
    """
    texts = list(column(rows, name, where))
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise SpecError(f"{where}: row {row} of column {name!r} is {text!r}, and no text")
    return texts
