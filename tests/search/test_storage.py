"""Storages: SQLite, journals that were cut off, URLs, and what is refused."""

import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from optuna.trial import TrialState

from searchmerge.config import read_config
from searchmerge.durable import with_checksum
from searchmerge.errors import SpecError, StudyError
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.status import describe_status, read_status
from searchmerge.search.storage import close_storage, open_storage, prepare_storage, repair_journal
from tests.search.conftest import SPACE, Recorder, Toy


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


def test_a_file_of_sqlite_is_waited_for_at_checkpoints_of_its_log_alone(run_dir):
    prepare_storage(run_dir, None)
    storage = open_storage(run_dir, None)
    with storage.engine.connect() as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous")
        ]
    close_storage(storage)
    assert pragmas == ["wal", 1]


@pytest.mark.parametrize("torn", [b'{"op_code":5,"worker_id":"ab', b"\0" * 37, b'{"op_co\n'])
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
    journal, whole = tmp_path / "study.journal", b'{"op_code":1}\n{"op_code":2}\n'
    assert repair_journal(journal) == 0
    assert not journal.exists()
    journal.write_bytes(whole)
    assert repair_journal(journal) == 0
    assert journal.read_bytes() == whole
    journal.write_bytes(b'{"op_')
    assert repair_journal(journal) == 5
    assert journal.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [journal]


def test_no_more_than_the_last_line_of_a_journal_is_cut_off(tmp_path):
    journal = tmp_path / "study.journal"
    journal.write_bytes(b'{"op_code":1}\n{"op_code":\n{"op_code":3')
    with pytest.raises(StudyError, match=r"study\.journal: .* in the middle \(more than its last"):
        repair_journal(journal)
    assert journal.read_bytes() == b'{"op_code":1}\n{"op_code":\n'


@pytest.mark.parametrize(
    "content",
    [
        b"notes of mine\nand more\n",
        b'{"name": "no journal"}\n',
        (2000).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}' + b"\n\0" * 2000,
        b"\0" * 50,
        b"\n",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_not_touched(stored, run_dir, content):
    file = run_dir / "model.safetensors"
    file.write_bytes(content)
    for use in (
        lambda: repair_journal(file),
        lambda: stored("journal:model.safetensors"),
    ):
        with pytest.raises(StudyError, match=r"model\.safetensors: is no journal of a study, and"):
            use()
        assert file.read_bytes() == content


def test_a_journal_that_is_a_folder_is_refused(stored):
    with pytest.raises(StudyError, match="run: the journal cannot be read: Is a directory"):
        stored("journal:")


SHARED = ["journal:../shared.journal", "sqlite:///{}/shared.db"]


@pytest.fixture
def begin(tmp_path):
    """Begin the same study in a run directory, in a storage that several share."""

    def begin(name, storage):
        (tmp_path / name).mkdir(exist_ok=True)
        return StudyDirectory(
            tmp_path / name,
            name="toy",
            spec={"space": SPACE.describe()},
            storage=storage.format(tmp_path),
        )

    return begin


@pytest.mark.parametrize("storage", SHARED)
def test_a_shared_study_belongs_to_the_directory_that_it_was_begun_in(begin, tmp_path, storage):
    begin("a", storage).close()
    for _ in range(2):
        with pytest.raises(
            StudyError, match=r"b: study 'toy' in storage .* belongs to the run di"
        ):
            begin("b", storage)
    assert not (tmp_path / "b" / "storage.json").exists()
    (tmp_path / "a").rename(tmp_path / "moved")
    begin("moved", storage).close()


@pytest.mark.parametrize("storage", SHARED)
def test_of_two_that_begin_at_once_never_both_go_on(begin, tmp_path, storage):
    names = [f"run{i}" for i in range(4)]

    def start(name):
        try:
            begin(name, storage).close()
        except StudyError as error:
            assert "belongs to the run directory" in str(error)
            return None
        return name

    (tmp_path / "any").mkdir()
    close_storage(open_storage(tmp_path / "any", storage.format(tmp_path)))  # makes its tables
    with ThreadPoolExecutor(len(names)) as threads:
        winners = [name for name in threads.map(start, names) if name]
    assert len(winners) <= 1
    later = [name for name in map(start, names) if name]
    assert len(later) == 1
    assert winners in ([], later)


def test_a_damaged_note_of_the_storage_is_named(stored, run_dir):
    stored("journal:study.journal").run(1)
    note = run_dir / "storage.json"
    note.write_text(note.read_text().replace("toy", "boy"))
    with pytest.raises(StudyError, match=r"storage\.json: damaged: it is not as it was written"):
        read_status(run_dir)
    (run_dir / ".owner").write_text("")
    note.unlink()
    with pytest.raises(StudyError, match=r"\.owner: damaged"):
        stored("journal:study.journal")


def test_a_study_is_not_gone_on_with_in_another_storage(stored, run_dir):
    stored(None).run(1)
    with pytest.raises(StudyError, match="begun with storage sqlite, and the config"):
        stored("journal:study.journal")
    stored(None).run(2)


PASSWORD = "s3cr3t"
WITH_PASSWORD = [
    f"postgresql://me:{PASSWORD}@localhost:1/studies",
    f"postgresql+psycopg2://localhost:1/studies?user=me&password={PASSWORD}",
    f"postgresql://localhost:1/studies?pass%77ord={PASSWORD}",
    f"postgresql://localhost:1/studies?sslpassword={PASSWORD}&application_name=shown",
    f"mysql+pymysql://me@localhost:1/studies?passwd={PASSWORD}",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BPWD%3D{PASSWORD}",
    f"postgresql://me:{PASSWORD[:3]}@{PASSWORD[3:]}@localhost:1/studies",
    f"postgresql://my/self:{PASSWORD}@localhost:1/studies",
    f"postgresql://me:0@x:{PASSWORD}@localhost:1/studies",
    f"host=localhost port=1 password={PASSWORD}",
    f"postgresql:/me:{PASSWORD}@localhost",
    f"postgresql//me:{PASSWORD}@localhost",
    f"unheard://me:{PASSWORD}@localhost:1/studies",
    f"postgresql://me:{PASSWORD}@localhost:port/studies",
]


@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_a_password_reaches_no_file_and_no_message(stored, run_dir, url, caplog):
    caplog.set_level("DEBUG")
    with pytest.raises((SpecError, StudyError)) as raised:
        stored(url)
    told = "\n".join(traceback.format_exception(raised.value))
    shown = (
        str(raised.value)
        + caplog.text
        + "".join(
            file.read_bytes().decode(errors="replace")
            for file in run_dir.rglob("*")
            if file.is_file()
        )
    )
    assert PASSWORD not in shown
    assert PASSWORD[3:] + "@" not in shown
    assert PASSWORD not in "".join(
        line
        for line in told.splitlines()
        if not line.startswith("    ")  # source lines
    )
    assert "\n" not in str(raised.value)


def test_a_config_with_a_wrong_storage_does_not_show_it(tmp_path):
    file = tmp_path / "config.yaml"
    for text in (
        f"storage: [{WITH_PASSWORD[0]}]\n",
        f"storage: {{url: {WITH_PASSWORD[0]}}}\n",
        f"storage: {WITH_PASSWORD[0]}: x\n",
        f"storage: '{WITH_PASSWORD[0]}\n",
        f"threads: many\nstorage: {WITH_PASSWORD[0]}\n",
    ):
        file.write_text(text)
        with pytest.raises(SpecError, match=r"config\.yaml:\d+: ") as raised:
            read_config(file)
        assert PASSWORD not in str(raised.value)
    file.write_text(f"storage: {WITH_PASSWORD[0]}\n")
    assert PASSWORD not in repr(read_config(file))


def test_a_storage_with_a_password_is_read_with_the_config_alone(tmp_path):
    note = {"storage": "postgresql+psycopg://me:***@host/studies", "study": "toy"}
    (tmp_path / "storage.json").write_text(with_checksum(note))
    with pytest.raises(StudyError, match="needs a password; give --config"):
        read_status(tmp_path)
    with pytest.raises(
        StudyError, match=r"begun with storage postgresql\+psycopg://me:\*\*\*@host"
    ):
        prepare_storage(tmp_path, "postgresql://me:other@elsewhere/studies")
    prepare_storage(tmp_path, "postgresql://me:other@host/studies")


@pytest.mark.skipif(find_spec("psycopg") is not None, reason="psycopg is installed")
def test_a_missing_driver_is_named(stored):
    with pytest.raises(
        StudyError, match=r"psycopg 3 is needed: pip install 'searchmerge\[postgre"
    ):
        stored("postgresql://me@localhost:1/studies")


def test_what_is_no_storage_is_refused(stored):
    with pytest.raises(SpecError, match=r"storage 'study\.db' is not allowed: give"):
        stored("study.db")
    with pytest.raises(StudyError, match="cannot be used: unable to open database file"):
        stored("sqlite:////nowhere/at/all/study.db")


def test_where_no_study_was_begun_there_is_no_status(tmp_path):
    with pytest.raises(StudyError, match=r"no study here; a run directory holds study\.db"):
        read_status(tmp_path)
