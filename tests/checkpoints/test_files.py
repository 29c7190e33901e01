"""Files are whole or absent, and sizes are said in words."""

import json
import os
from pathlib import Path

import pytest

from searchmerge.checkpoints import files
from searchmerge.checkpoints.files import (
    default_cache_dir,
    in_words,
    library_errors,
    read_json,
)
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


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=f"{os.sep}{tmp_path.name}: cannot be read"):
        read_json(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")


KINDS = {
    files.TEXT: (["", "x"], [1, [], {}, True]),
    files.TEXTS: ([[], ["a"]], ["a", [1], [["a"]], {}]),
    files.SWITCH: ([True, False], [0, 1, "true", []]),
    files.NUMBER: ([0, -1, 2.5], ["1", True, [], float("nan"), float("inf")]),
    files.COUNT: ([0, 7], [-1, 2.0, True, "7", 2**40]),
    files.OBJECT: ([{}, {"a": 1}], [[], "a", 1]),
    files.PATTERNS: ([{}, {"a.*": 1.5}], [[], {"a": "1"}, {"a": float("nan")}, {"(": 1}]),
    files.TEXTS_BY_NAME: ([{}, {"a": "b"}], [[], "a", {"a": 1}]),
    files.TOKENS: ([{}, {"a": 1}], [[], {"a": 1.5}, {"a": None}, {"a": -1}]),
    files.LABELS: ([{}, {"0": "no"}], [["no"], {"no": 0}, {"0": 1}, {"-1": "x"}]),
    files.FILE: (["a.bin", "sub/a.bin"], ["", "/a", "../a", "a/../../b", "a\0", "a\nb", 1]),
    files.FILES: ([{"t": "a.bin"}], [["a.bin"], {"t": "/etc/passwd"}, {"t": "../a"}, {"t": 1}]),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.words)
def test_a_key_holds_its_kind_or_the_file_and_the_key_are_named(tmp_path, kind):
    allowed, refused = KINDS[kind]
    file = tmp_path / "some.json"
    for value in (*allowed, None):
        file.write_text(json.dumps({"key": value}))
        assert read_json(file, {"key": kind, "other": kind}) == {"key": value}
    for value in refused:
        file.write_text(json.dumps({"key": value}))
        with pytest.raises(CheckpointError, match=rf"some\.json: key is .*; {kind.words}"):
            read_json(file, {"key": kind})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter: line 1 column 8"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON: Unexpected UTF-8 BOM"),
        ('{"a": "é"}'.encode("latin-1"), r"is not UTF-8 text \(byte 7\)"),
        ('{"a": 1}'.encode("utf-16"), r"is not UTF-8 text \(byte 0\)"),
        (b"[" * 100_000, "not valid JSON: it is nested too deep"),
        (b'{"a": ' + b"9" * 400 + b"}", "not valid JSON: a number of 400 digits"),
        (b"[1]", "holds a list; an object is needed"),
        (b"", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, message):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"some\.json: {message}"):
        read_json(file)


def test_whatever_a_library_raises_is_an_error_of_the_file():
    for error in (KeyError("a"), Exception("b\n  c"), TypeError()):
        with (
            pytest.raises(CheckpointError, match=r"^some\.json: ('a'|b c|TypeError)$"),
            library_errors("some.json"),
        ):
            raise error
