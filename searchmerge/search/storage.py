"""Where a study's trials are kept: SQLite in its run directory, or any storage of Optuna's."""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import URL, make_url
from sqlalchemy.event import listen
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from searchmerge.durable import read_checked, with_checksum, write_atomically
from searchmerge.errors import SpecError, StudyError

_logger = logging.getLogger(__name__)

DATABASE_FILE = "study.db"
_NOTE_FILE = "storage.json"
_OWNER_FILE = ".owner"
_OWNER = "owner:"  # begins the user attribute of a run directory that goes on with the study
_JOURNAL = "journal:"
_POSTGRESQL = "postgresql+psycopg"
_ENTRY = b'{"op_code":'  # begins every line of Optuna's journals
_SHOWN_PARAMETERS = (
    *("application_name", "charset", "client_encoding", "connect_timeout", "host", "port"),
    *("sslmode", "target_session_attrs", "timeout", "user"),
)
"""What is shown of a URL's query; any other parameter may be a password in some driver."""


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
        return _open_sqlite(run_dir / DATABASE_FILE)
    if storage.startswith(_JOURNAL):
        path = _journal(run_dir, storage)
        _check_journal(path)
        try:
            return JournalStorage(JournalFileBackend(str(path)))
        except (ValueError, KeyError, TypeError) as error:  # a torn end is none: it is not read
            raise StudyError(_damaged(path, error)) from error
    url = _parsed(storage)
    try:
        return RDBStorage(url.render_as_string(hide_password=False))
    except ImportError as error:
        needed = "install its driver for SQLAlchemy"
        if url.drivername == _POSTGRESQL:
            needed = "psycopg 3 is needed: pip install 'searchmerge[postgresql]'"
        raise StudyError(f"storage {_shown(storage)} cannot be used here: {needed}") from error


def _open_sqlite(file: Path) -> RDBStorage:
    """Return the storage in a file, which waits for the disk at checkpoints of its log alone.

    A process that is killed loses nothing. Where the power goes the last trials may be missing
    from the file, which stays sound; what they scored is kept elsewhere, and they come again.
    """
    storage = RDBStorage(f"sqlite:///{file.resolve()}")

    def relax(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=NORMAL")

    listen(storage.engine, "connect", relax)
    storage.engine.dispose()  # what was opened before
    return storage


def close_storage(storage: str | BaseStorage) -> None:
    """Let go of the connections of what :func:`open_storage` returned."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def prepare_storage(run_dir: Path, storage: str | None) -> None:
    """Make the storage ready for the one driver that writes to it.

    SQLite is switched to its write-ahead log, so that readers and the writer do not wait for
    one another; a journal loses its last line where it was half written when the power went.

    Raises:
        SpecError: If ``storage`` is no URL.
        StudyError: If the study was begun with another storage, or a journal's file is something
            else.
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


def claim_study(run_dir: Path, storage: str | None, study: optuna.Study) -> None:
    """Let ``run_dir`` be the one directory that goes on with a study, and note where it is.

    A directory writes a mark of its own before it looks for those of others. So of two that
    begin in the same moment one at least sees the other, and never do both go on.

    Raises:
        StudyError: If the study belongs to another run directory.
    """
    if storage is None:
        return  # it is in the directory itself
    owner = _owner(run_dir)
    other = _other_owner(study, owner)
    if other is None:
        study.set_user_attr(f"{_OWNER}{owner}", str(run_dir.resolve()))
        if (other := _other_owner(study, owner)) is not None:
            study.set_user_attr(f"{_OWNER}{owner}", None)
    if other is not None:
        raise StudyError(
            f"{run_dir}: study {study.study_name!r} in storage {_shown(storage)} belongs to the "
            f"run directory {other}; go on with it there, or give this study another name"
        )
    if _noted(run_dir) is None:
        note = {"storage": _shown(storage), "study": study.study_name}
        write_atomically(run_dir / _NOTE_FILE, with_checksum(note))


def _other_owner(study: optuna.Study, owner: str) -> str | None:
    """Return in words which run directory goes on with a study, if it is not that of ``owner``."""
    for key, directory in study.user_attrs.items():
        other = key.removeprefix(_OWNER)
        if key.startswith(_OWNER) and other != owner and directory is not None:
            return f"{directory} (whose {_OWNER_FILE} holds {other})"
    return None


def _owner(run_dir: Path) -> str:
    """Return what tells a run directory from all others, wherever it is moved to.

    Raises:
        StudyError: If its file is damaged.
    """
    file = run_dir / _OWNER_FILE
    if not file.exists():
        write_atomically(file, secrets.token_hex(16))
    owner = file.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{32}", owner):
        raise StudyError(f"{file}: damaged; it tells to which directory a shared study belongs")
    return owner


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
    with storage_errors(run_dir, storage):
        opened = open_storage(run_dir, storage)
        names = optuna.get_all_study_names(opened)
    if not names or (study and study not in names):
        close_storage(opened)
        raise StudyError(f"{run_dir}: the study was not begun yet")
    return study or names[0], opened


@contextlib.contextmanager
def readable(run_dir: Path) -> Iterator[Path]:
    """Yield where the study of ``run_dir`` can be read.

    SQLite writes a file beside a database that it reads alone. So where nothing can be written it
    is a copy.
    """
    files = [run_dir / f"{DATABASE_FILE}{suffix}" for suffix in ("", "-wal")]
    if os.access(run_dir, os.W_OK) or not files[0].exists():
        yield run_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in filter(Path.exists, files):
            shutil.copyfile(file, Path(folder) / file.name)
        yield Path(folder)


@contextlib.contextmanager
def storage_errors(run_dir: Path, storage: str | None = None) -> Iterator[None]:
    """Raise ``StudyError`` in place of what a storage raises when it cannot be used."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        told = " ".join(str(getattr(cause, "orig", None) or cause).split())
        for secret in _secrets(storage):
            told = told.replace(secret, "***")
        raise StudyError(
            f"{run_dir}: the study's storage cannot be used: {told}; all that was kept is kept, "
            "and the same command goes on"
        ) from error


def repair_journal(path: Path) -> int:
    """Cut off the last line of a journal that was not written whole; return how many bytes.

    Optuna reads such a file, but would write its next line behind the torn one, and could never
    read the study again. Nothing but a journal is ever changed.

    Raises:
        StudyError: If the file is no journal, or more than its last line is damaged.
    """
    _check_journal(path)
    if not path.exists() or not _torn_bytes(path):
        return 0
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # another study may be at work in the same journal
    try:
        if torn := _torn_bytes(path):
            _logger.warning("%s: its last %d bytes were not written whole; cut off", path, torn)
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - torn)
    finally:
        lock.release()
    if torn and _torn_bytes(path):
        raise StudyError(_damaged(path, "more than its last line was not written whole"))
    return torn


def _check_journal(path: Path) -> None:
    """Refuse a file that is something else, by how it begins; one that is empty may become one.

    Raises:
        StudyError: If so.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_ENTRY))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StudyError(f"{path}: the journal cannot be read: {error.strerror}") from error
    if not _ENTRY.startswith(start):  # all of it, or as much as was written of the first line
        raise StudyError(
            f"{path}: is no journal of a study, and was not touched; give journal:PATH another "
            "file, one that does not exist yet"
        )


def _torn_bytes(path: Path) -> int:
    """Return the size of the last line of a journal, if it was not written whole."""
    data = path.read_bytes()
    start = data.rfind(b"\n", 0, -1) + 1
    last = data[start:]
    return 0 if not last or (last.endswith(b"\n") and _is_entry(last)) else len(last)


def _is_entry(line: bytes) -> bool:
    try:
        return line.startswith(_ENTRY) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _damaged(path: Path, reason: object) -> str:
    return (
        f"{path}: the journal is damaged in the middle ({reason}); put back a copy of it, "
        "or cut it off before the damaged line to go on from there"
    )


def _journal(run_dir: Path, storage: str) -> Path:
    return run_dir / Path(storage.removeprefix(_JOURNAL)).expanduser()


def _noted(run_dir: Path) -> tuple[str, str] | None:
    """Return the storage that a study was begun with and the study's name, where it is known.

    Raises:
        StudyError: If the note is damaged.
    """
    note = run_dir / _NOTE_FILE
    try:
        data = read_checked(note)
        return str(data["storage"]), str(data["study"])
    except FileNotFoundError:
        return ("sqlite", "") if (run_dir / DATABASE_FILE).exists() else None
    except OSError as error:
        raise StudyError(f"{note}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise StudyError(
            f"{note}: damaged: {error}; remove it, and `searchmerge run` writes it again"
        ) from error


def _shown(storage: str | None) -> str:
    """Return a storage as it may be written down: without a password, wherever that stands."""
    if storage is None:
        return "sqlite"
    if storage.startswith(_JOURNAL):
        return storage
    url = _parsed(storage)
    query = {key: v if key in _SHOWN_PARAMETERS else "***" for key, v in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True).replace("%2A", "*")


def _secrets(storage: str | None) -> set[str]:
    """Return what a storage's URL holds and no message may: passwords, and what may be one."""
    if storage is None or storage.startswith(_JOURNAL):
        return set()
    url = _parsed(storage)
    hidden = [v for key, v in url.query.items() if key not in _SHOWN_PARAMETERS]
    values = [each for v in hidden for each in ((v,) if isinstance(v, str) else v)]
    return {value for value in (url.password, *values) if value}


def _parsed(storage: str) -> URL:
    """Return a storage's URL, with psycopg 3 for a PostgreSQL URL that names no driver.

    Raises:
        SpecError: If it is no URL; the message holds nothing that may be a password.
    """
    allowed = "give journal:PATH or a URL, e.g. postgresql://user@host/database"
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        shown = f" {storage!r}" if re.fullmatch(r"[\w./~-]+", storage) else ""
        raise SpecError(f"storage{shown} is not allowed: {allowed}") from None
    is_server = url.get_backend_name() != "sqlite"
    if is_server and any("@" in part for part in (url.host or "", url.database or "")):
        raise SpecError(
            "storage: its URL has an @ too many, or a / in the name of the user: inside a name "
            "or a password write %40 and %2F"
        )
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername=_POSTGRESQL)
    return url
