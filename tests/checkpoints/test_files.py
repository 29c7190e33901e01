"""Files are whole or absent, and sizes are said in words."""

import os
from pathlib import Path

import pytest

from searchmerge.checkpoints.files import default_cache_dir, in_words, read_json
from searchmerge.errors import CheckpointError


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (999_990, "1 MB"),
        (2_500_000, "2.5 MB"),
        (7e9, "7 GB"),
        (2.5e12, "2500 GB"),
    ],
)
def test_a_size_is_said_in_powers_of_1000(size_bytes, words):
    assert in_words(size_bytes) == words


def test_the_cache_is_where_the_environment_says_or_in_the_home(monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", "~/elsewhere")
    assert default_cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("SEARCHMERGE_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "searchmerge"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.json: not valid JSON"),
        ("[1]", r"a\.json: holds a list; an object is needed"),
        (None, r"a\.json: no such file"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(file)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=f"{os.sep}{tmp_path.name}: cannot be read"):
        read_json(tmp_path)
