"""Storages: SQLite, journals that were cut off, URLs, and what is refused."""

import json

import pytest
from optuna.trial import TrialState

from searchmerge.errors import SpecError, StudyError
from searchmerge.search.status import describe_status, read_status
from searchmerge.search.storage import prepare_storage, repair_journal
from tests.search.conftest import Recorder, Toy


@pytest.fixture
def stored(run_dir):
    return lambda storage: Toy(run_dir, storage=storage)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("storage", [None, "journal:deep/study.journal", "sqlite:///{}/other.db"])
def test_a_study_is_interrupted_resumed_and_read_in_any_storage(stored, run_dir, storage):
    storage = storage and storage.format(run_dir)
    with pytest.raises(KeyboardInterrupt):
        stored(storage).run(8, observer=Recorder(interrupt_at=3))
    assert read_status(run_dir)["trials"]["complete"] == 3
    trials = stored(storage).run(8)
    assert [trial.number for trial in trials] == list(range(8))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert read_status(run_dir)["trials"] == {"complete": 8, "running": 0, "fail": 0}
    assert describe_status(run_dir)[0].startswith("toy: 8 trials complete")


@pytest.mark.parametrize("torn", [b'{"op_code": 5, "worker_id": "ab', b"\0" * 37, b'{"op"\n\0\0'])
def test_a_journal_that_the_power_cut_off_goes_on_with_all_that_was_whole(stored, run_dir, torn):
    journal = run_dir / "study.journal"
    stored("journal:study.journal").run(4)
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    trials = stored("journal:study.journal").run(7)
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 7


def test_a_journal_that_is_damaged_in_the_middle_is_named(stored, run_dir):
    stored("journal:study.journal").run(2)
    journal = run_dir / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\0" * 9 + b"\n", *lines[4:]]))
    for use in (lambda: stored("journal:study.journal"), lambda: read_status(run_dir)):
        with pytest.raises(StudyError, match=r"study\.journal: the journal is damaged in the mid"):
            use()


def test_where_a_study_is_stays_noted_once(stored, run_dir):
    stored("journal:study.journal").run(1)
    note = run_dir / "storage.json"
    before = note.stat()
    stored("journal:study.journal").run(2)
    after = note.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(run_dir.glob("*.part"))


def test_a_whole_journal_is_left_as_it_is(tmp_path):
    journal = tmp_path / "study.journal"
    assert repair_journal(journal) == 0
    journal.write_bytes(b'{"a": 1}\n{"b": 2}\n')
    assert repair_journal(journal) == 0
    assert journal.read_bytes() == b'{"a": 1}\n{"b": 2}\n'
    journal.write_bytes(b"torn")
    assert repair_journal(journal) == 4
    assert journal.read_bytes() == b""


def test_a_study_is_not_gone_on_with_in_another_storage(stored, run_dir):
    stored(None).run(1)
    with pytest.raises(StudyError, match="begun with storage sqlite, and the config"):
        stored("journal:study.journal")
    stored(None).run(2)


def test_a_password_is_not_written_down(tmp_path):
    url = "postgresql://me:secret@host/studies"
    prepare_storage(tmp_path, url, "toy")
    assert "secret" not in "".join(file.read_text() for file in tmp_path.iterdir())
    prepare_storage(tmp_path, url.replace("secret", "changed"), "toy")
    with pytest.raises(StudyError, match="needs a password; give --config"):
        read_status(tmp_path)


def test_what_is_no_storage_is_refused(stored):
    with pytest.raises(SpecError, match=r"storage 'study\.db' is not allowed: give"):
        stored("study.db")
    with pytest.raises(StudyError, match="cannot be used: unable to open database file"):
        stored("sqlite:////nowhere/at/all/study.db")


def test_where_no_study_was_begun_there_is_no_status(tmp_path):
    with pytest.raises(StudyError, match=r"no study here; a run directory holds study\.db"):
        read_status(tmp_path)
