"""Rows come from files, folders and the hub, by the split that a study names."""

import gzip
import json
import re

import datasets
import pytest

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.rows import (
    DataPlace,
    DataPlaces,
    DataSource,
    Joined,
    Splits,
    column,
    data_paths,
    data_sources,
    load_rows,
    rows_info,
    text_column,
)

ROWS = [{"text": "a b", "label": 1}, {"text": "c", "label": 0}]


def write(file, rows=ROWS):
    lines = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps(rows),
        ".csv": "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows),
        ".tsv": "text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows),
        ".txt": "".join(f"{row['text']}\n" for row in rows),
    }
    suffix = next(s for s in reversed(file.suffixes) if s != ".gz")
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".gz":
        with gzip.open(file, "wt") as packed:
            packed.write(lines[suffix])
    else:
        file.write_text(lines[suffix])
    return str(file)


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.v2.csv.gz"]
)
@pytest.mark.parametrize("split", [None, "test"])
def test_a_file_has_one_split_under_any_name(tmp_path, name, split):
    found = load_rows(DataSource(write(tmp_path / name), split), "tasks.t")
    assert [dict(row) for row in found] == ROWS


def test_a_text_file_has_a_row_per_line(tmp_path):
    found = load_rows(DataSource(write(tmp_path / "r.txt")), "tasks.t")
    assert found["text"] == ["a b", "c"]


@pytest.fixture
def folder(tmp_path):
    for i, split in enumerate(("train", "test")):
        write(tmp_path / f"{split}.jsonl", ROWS[i:])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("split", "n"), [("train", 2), ("test", 1)])
def test_a_folders_files_are_named_after_their_splits(folder, split, n):
    assert len(load_rows(DataSource(str(folder), split), "tasks.t")) == n


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", r"tasks\.t\.split: no split 'dev' in .* \(it has: test, train\)"),
        (None, r"tasks\.t\.split: split is missing \(it has: test, train\)"),
    ],
)
def test_a_split_that_a_folder_lacks_is_refused(folder, split, message):
    with pytest.raises(SpecError, match=message):
        load_rows(DataSource(str(folder), split), "tasks.t")


@pytest.mark.parametrize("path", ["/no/where", "./nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path):
    with pytest.raises(SpecError, match=f"^tasks.t.data: no file or folder {re.escape(path)}$"):
        load_rows(DataSource(path), "tasks.t")


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": \n')
    with pytest.raises(SpecError, match=r"tasks\.t\.data: .*r\.jsonl cannot be read: \S") as error:
        load_rows(DataSource(str(tmp_path / "r.jsonl")), "tasks.t")
    assert "\n" not in str(error.value)
    (tmp_path / "r.xlsx").write_text("")
    with pytest.raises(SpecError, match=r"r\.xlsx is of no known format; known: \.jsonl, \.json"):
        load_rows(DataSource(str(tmp_path / "r.xlsx")), "tasks.t")


def test_progress_bars_are_kept_off_and_left_as_they_were(tmp_path, capfd):
    datasets.enable_progress_bars()
    try:
        load_rows(DataSource(write(tmp_path / "bars.jsonl")), "tasks.t")
        assert datasets.is_progress_bar_enabled()
    finally:
        datasets.disable_progress_bars()
    assert capfd.readouterr().err == ""


def resolve(path):
    return f"/study/{path}"


def test_a_place_is_resolved_and_given_its_split():
    place = DataPlace("data", "subset", "v1")
    source = DataSource("/study/data", "test", "subset", "v1")
    assert data_sources(place, "test", resolve) == (source,)
    assert data_paths(place) == ["data"]


def test_each_part_has_its_own_source_where_files_or_splits_differ():
    places = DataPlaces(DataPlace("a.jsonl"), DataPlace("b.jsonl"))
    splits = Splits("train", "test")
    of_files = (DataSource("/study/a.jsonl"), DataSource("/study/b.jsonl"))
    assert data_sources(places, None, resolve) == of_files
    assert [s.split for s in data_sources(DataPlace("data"), splits, resolve)] == ["train", "test"]
    of_both = [(s.path, s.split) for s in data_sources(places, splits, resolve)]
    assert of_both == [("/study/a.jsonl", "train"), ("/study/b.jsonl", "test")]
    assert data_paths(places) == ["a.jsonl", "b.jsonl"]


def test_parts_that_are_said_to_be_of_the_same_data_are_divided_as_ever():
    places = DataPlaces(DataPlace("a.jsonl"), DataPlace("a.jsonl"))
    assert data_sources(places, Splits("test", "test"), resolve) == (
        DataSource("/study/a.jsonl", "test"),
    )
    assert rows_info((DataSource("a"),), [5], metric="m") == TaskInfo(5, "m")


def test_what_is_known_of_a_task_names_where_each_part_is_from():
    sources = (DataSource("data", "train"), DataSource("b.jsonl"))
    info = rows_info(sources, [5, 3], metric="m")
    assert (info.n_examples, info.metric) == (8, "m")
    assert {part: (its.source, its.n_examples) for part, its in info.parts.items()} == {
        "select": ("split 'train' of data", 5),
        "hold_out": ("b.jsonl", 3),
    }


def test_joined_columns_are_read_one_entry_at_a_time():
    joined = Joined([["a", "b"], [], ["c"]])
    assert [joined[i] for i in range(len(joined))] == ["a", "b", "c"]


def test_a_column_is_found_by_its_name():
    rows = datasets.Dataset.from_list(ROWS)
    assert list(column(rows, "label", "tasks.t.label")) == [1, 0]
    assert text_column(rows, "text", "tasks.t.text") == ["a b", "c"]
    with pytest.raises(SpecError, match=r"tasks\.t\.x: no column 'x' \(there are: text, label\)"):
        column(rows, "x", "tasks.t.x")
    with pytest.raises(SpecError, match=r"tasks\.t: row 0 of column 'label' is 1, and no text"):
        text_column(rows, "label", "tasks.t")
