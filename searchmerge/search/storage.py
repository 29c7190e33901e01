"""Where a study's trials are kept: SQLite in its run directory, or any storage of Optuna's."""

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from searchmerge.errors import SpecError, StudyError

_logger = logging.getLogger(__name__)

DATABASE_FILE = "study.db"
_NOTE_FILE = "storage.json"
_JOURNAL = "journal:"


def open_storage(run_dir: Path, storage: str | None) -> BaseStorage:
    """Return the storage, without changing what is in it.

    Args:
        run_dir: The study's run directory.
        storage: ``None`` for SQLite in ``run_dir``; ``journal:path`` for a journal file, from
            ``run_dir`` on; else a URL of Optuna's.

    Raises:
        StudyError: If the database's driver is not installed, or a journal is damaged.
    """
    if storage is None:
        return RDBStorage(f"sqlite:///{(run_dir / DATABASE_FILE).resolve()}")
    if storage.startswith(_JOURNAL):
        path = _journal(run_dir, storage)
        try:
            return JournalStorage(JournalFileBackend(str(path)))
        except ValueError as error:  # a torn end is none: Optuna reads as far as it goes
            raise StudyError(
                f"{path}: the journal is damaged in the middle ({error}); put back a copy of it, "
                "or cut it off before the damaged line to go on from there"
            ) from error
    try:
        return RDBStorage(storage)
    except ImportError as error:
        raise StudyError(f"storage {_shown(storage)}: {error}") from error


def prepare_storage(run_dir: Path, storage: str | None, study: str) -> None:
    """Make the storage ready for the one driver that writes to it.

    SQLite is switched to its write-ahead log, so that readers and the writer do not wait for
    one another; a journal loses what was half written when the power went.

    Raises:
        SpecError: If ``storage`` is no URL.
        StudyError: If the study was begun with another storage.
    """
    shown = _shown(storage)
    begun = _noted(run_dir)
    if begun is not None and begun[0] != shown:
        raise StudyError(
            f"{run_dir}: the study was begun with storage {begun[0]}, and the config says "
            f"{shown}; change it back, or give the study another name or run directory"
        )
    if storage is None:
        with contextlib.closing(sqlite3.connect(run_dir / DATABASE_FILE)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    elif storage.startswith(_JOURNAL):
        _journal(run_dir, storage).parent.mkdir(parents=True, exist_ok=True)
        repair_journal(_journal(run_dir, storage))
    if storage is not None and begun is None:
        _write_note(run_dir, shown, study)


def find_study(run_dir: Path, storage: str | None = None) -> tuple[str, BaseStorage]:
    """Return the name and the storage of the study that was begun in ``run_dir``.

    Args:
        run_dir: The study's run directory.
        storage: As in the config; needed only where it is a URL with a password.

    Raises:
        StudyError: If no study was begun there, or its storage cannot be reached.
    """
    begun = _noted(run_dir)
    if begun is None:
        raise StudyError(f"{run_dir}: no study here; a run directory holds {DATABASE_FILE}")
    shown, study = begun
    if storage is None and shown != "sqlite":
        storage = shown
    if storage is not None and "***" in storage:
        raise StudyError(f"{run_dir}: its storage {shown} needs a password; give --config")
    if storage is not None and storage.startswith(_JOURNAL):
        path = _journal(run_dir, storage)
        if not path.exists():
            raise StudyError(f"{run_dir}: its journal {path} does not exist")
    with storage_errors(run_dir):
        opened = open_storage(run_dir, storage)
        names = optuna.get_all_study_names(opened)
    if not names or (study and study not in names):
        raise StudyError(f"{run_dir}: the study was not begun yet")
    return study or names[0], opened


@contextlib.contextmanager
def storage_errors(run_dir: Path) -> Iterator[None]:
    """Raise ``StudyError`` in place of what a storage raises when it cannot be used."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        told = " ".join(str(getattr(cause, "orig", None) or cause).split())
        raise StudyError(
            f"{run_dir}: the study's storage cannot be used: {told}; all that was kept is kept, "
            "and the same command goes on"
        ) from error


def repair_journal(path: Path) -> int:
    """Cut off the end of a journal file that was not written whole; return how many bytes.

    Optuna reads such a file, but would write its next line behind the torn one, and could never
    read the study again.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    while end and not _is_entry(data[data.rfind(b"\n", 0, end - 1) + 1 : end]):
        end = data.rfind(b"\n", 0, end - 1) + 1
    if torn := len(data) - end:
        _logger.warning("%s: its last %d bytes were not written whole; cut off", path, torn)
        with path.open("r+b") as file:
            file.truncate(end)
    return torn


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _journal(run_dir: Path, storage: str) -> Path:
    return run_dir / Path(storage.removeprefix(_JOURNAL)).expanduser()


def _write_note(run_dir: Path, storage: str, study: str) -> None:
    """Note where the study is; the file is there whole, or not at all."""
    part = run_dir / f"{_NOTE_FILE}.part"
    with part.open("w") as file:
        file.write(json.dumps({"storage": storage, "study": study}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(run_dir / _NOTE_FILE)


def _noted(run_dir: Path) -> tuple[str, str] | None:
    """Return the storage that a study was begun with and the study's name, where it is known."""
    note = run_dir / _NOTE_FILE
    if note.exists():
        data = json.loads(note.read_text())
        return str(data["storage"]), str(data["study"])
    return ("sqlite", "") if (run_dir / DATABASE_FILE).exists() else None


def _shown(storage: str | None) -> str:
    """Return a storage as it may be written down: a password is left out."""
    if storage is None:
        return "sqlite"
    if storage.startswith(_JOURNAL):
        return storage
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError as error:
        raise SpecError(
            f"storage {storage!r} is not allowed: give journal:PATH or a URL, "
            "e.g. postgresql://user@host/database"
        ) from error
