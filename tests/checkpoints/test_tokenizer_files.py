"""Tokenizers are compared by what their files say, and not by how they say it."""

import json

import pytest

from searchmerge.checkpoints.tokenizer_files import difference, read_tokenizer
from searchmerge.errors import CheckpointError

TOKENS = {"a": 0, "b": 1, "ab": 2}


def fast(folder, tokens=TOKENS, merges=("a b",), added=(), *, kind="BPE", indent=None):
    folder.mkdir()
    data = {
        "model": {"type": kind, "vocab": tokens, "merges": list(merges)},
        "added_tokens": [{"content": token, "id": i} for token, i in added],
    }
    (folder / "tokenizer.json").write_text(json.dumps(data, indent=indent))
    return read_tokenizer(folder)


def test_a_folder_without_tokenizer_files_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None


def test_formatting_and_the_form_of_merges_make_no_difference(tmp_path):
    one = fast(tmp_path / "one")
    turned = dict(reversed(TOKENS.items()))
    other = fast(tmp_path / "other", turned, merges=(["a", "b"],), indent=2)
    assert one.tokens == TOKENS
    assert difference(one, other) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": {"a": 1, "b": 0, "ab": 2}}, "they differ in 'a' and 1 more"),
        ({"tokens": {**TOKENS, "c": 3}}, "they differ in 'c'"),
        ({"added": [("<pad>", 3)]}, "they differ in '<pad>'"),
        ({"merges": ()}, "tokenizer.json differs"),
        ({"kind": "WordLevel"}, "tokenizer.json differs"),
    ],
)
def test_a_difference_is_named(tmp_path, changes, message):
    one, other = fast(tmp_path / "one"), fast(tmp_path / "other", **changes)
    assert message in (difference(one, other), difference(other, one))
    assert difference(other, one) is not None


def test_a_unigram_vocabulary_counts_from_its_first_pair(tmp_path):
    found = fast(tmp_path / "t", [["<unk>", 0.0], ["x", -1.5]], kind="Unigram")
    assert found.tokens == {"<unk>": 0, "x": 1}


def slow(folder, tokens=TOKENS, merges="#version: 0.2\na b\n"):
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(tokens, indent=1))
    (folder / "merges.txt").write_bytes(merges.encode())
    return read_tokenizer(folder)


def test_older_files_are_the_same_as_the_newer_one_with_the_same_tokens(tmp_path):
    one, other = fast(tmp_path / "one"), slow(tmp_path / "other")
    assert difference(one, other) is None
    assert difference(one, slow(tmp_path / "third", {**TOKENS, "c": 3})) == "they differ in 'c'"


def test_the_ends_of_lines_make_no_difference_and_other_merges_do(tmp_path):
    one = slow(tmp_path / "one")
    assert difference(one, slow(tmp_path / "two", merges="#version: 0.2\r\na b\r\n")) is None
    assert difference(one, slow(tmp_path / "three", merges="b a\n")) == "merges.txt differs"


def test_a_binary_vocabulary_is_compared_whole(tmp_path):
    found = []
    for name, data in (("one", b"\0\1"), ("two", b"\0\1"), ("three", b"\0\2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spiece.model").write_bytes(data)
        found.append(read_tokenizer(tmp_path / name))
    assert found[0].tokens == {}
    assert difference(found[0], found[1]) is None
    assert difference(found[0], found[2]) == "spiece.model differs"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not valid JSON"):
        read_tokenizer(tmp_path)
