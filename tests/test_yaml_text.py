"""YAML as plain data: what is read how, and what is refused by file and line."""

import time

import pytest
import yaml

from searchmerge.errors import SpecError
from searchmerge.yaml_text import dump_yaml, parse_yaml, read_yaml_file

READ = {
    "1e-3": 0.001,
    "1e3": 1000.0,
    "1.": 1.0,
    ".5": 0.5,
    "+.5E1": 5.0,
    "-0x1F": -31,
    "1_000": 1000,
    "0": 0,
    "off": False,
    "Yes": True,
    "~": None,
    "": None,
    "010": "010",
    "00.5": "00.5",
    "1:30": "1:30",
    "2024-01-01": "2024-01-01",
    "2024-01-01 10:00:00": "2024-01-01 10:00:00",
    "=": "=",
    ".": ".",
    "1e": "1e",
    "'7'": "7",
    "!!str 7": "7",
}


@pytest.mark.parametrize("text", READ)
def test_a_value_is_read_as_a_person_means_it(text):
    value = parse_yaml(f"key: {text}", "text").data["key"]
    assert value == READ[text]
    assert type(value) is type(READ[text])


def test_keys_are_text_as_they_are_written():
    text = "no: 1\n007: 2\n1.0: 3\nnull: 4\n2024-01-01: 5\n"
    assert list(parse_yaml(text, "text").data) == ["no", "007", "1.0", "null", "2024-01-01"]


def test_every_key_has_its_line(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_bytes("\ufeffa: 1\n\nb:\n  - c: é\n    d: 2\n".encode())
    data, lines = read_yaml_file(file)
    assert data == {"a": 1, "b": [{"c": "é", "d": 2}]}
    assert lines[("a",)] == 1
    assert lines[("b", 0, "d")] == 5


def test_merged_mappings_are_defaults_and_nothing_is_shared():
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: {<<: [{x: 5}, *a]}\n"
    data = parse_yaml(text, "text").data
    assert data == yaml.safe_load(text)
    data["a"]["y"].append(4)
    assert data["b"] == {"x": 3, "y": [2]}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
REFUSED = {
    "an alias bomb": (BOMB, r":\d: stands for more than 300000 values"),
    "a bomb of merges": (BOMB.replace("[x,", "[{x: 1},"), "stands for more than"),
    "a list within itself": ("a: &a [*a]", ":1: stands for more than"),
    "a mapping within itself": ("\na: &a {b: *a}", ":2: stands for more than"),
    "deep": ("{a: " * 60 + "1" + "}" * 60, ":1: is nested deeper than 40 levels"),
    "very deep": ("[" * 3000, "is nested deeper than 40 levels"),
    "twice": ("a: 1\nb: 2\na: 3", ":3: key 'a' stands twice"),
    "twice under another type": ("1: 1\n'1': 3", ":2: key '1' stands twice"),
    "a key that is a list": ("? [1]\n: 2", ":1: a key is no text"),
    "Python": ("a: !!python/object/apply:os.system [x]", ":1: the tag !!python/object/apply:os"),
    "a function": ("a: !function x.y", ":1: the tag !function is not allowed"),
    "a set": ("\na: !!set {x}", ":2: the tag !!set is not allowed"),
    "a date": ("a: !!timestamp 2024-01-01", "the tag !!timestamp is not allowed"),
    "infinite": ("a: 1e999", ":1: '1e999' is no finite number"),
    "no number": ("a: .nan", ":1: '.nan' is no finite number"),
    "too long": (f"a: {'9' * 5000}", r":1: '9{40}\.\.\.' is no int, or too long"),
    "too large": (f"a: {'9' * 30}", "is too large a number"),
    "a wrong tag": ("a: !!int many", ":1: 'many' is no int"),
    "an empty tag": ("a: !!float ''", ":1: '' is no float"),
    "a tag of a list": ("a: !!map [x]", ":1: the tag !!map is not allowed here"),
    "merged text": ("<<: text", ":1: << needs a mapping"),
    "two documents": ("a: 1\n---\nb: 2", ":2: not valid YAML"),
    "a colon too many": ("a: b: c", ":1: not valid YAML: mapping values are not allowed here"),
    "no anchor": ("a: 1\nb: *x", ":2: not valid YAML: found undefined alias 'x'"),
    "a control character": ("a: \a", "not valid YAML: special characters are not allowed"),
    "another version": ("%YAML 9.9\n---\na: 1", ":1: not valid YAML"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_yaml_is_refused_by_file_and_line(tmp_path, kind):
    text, message = REFUSED[kind]
    file = tmp_path / "some.yaml"
    file.write_text(text)
    start = time.perf_counter()
    with pytest.raises(SpecError, match=rf"some\.yaml.*{message}") as refused:
        read_yaml_file(file)
    assert time.perf_counter() - start < 10
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: b\nc: é\n".encode("latin-1"), r":2: is not UTF-8 text \(byte 0xe9\); save it as"),
        ("a: b\n".encode("utf-16"), r":1: is not UTF-8 text, but UTF-16 \(byte 0xff\)"),
        (b"\x80\x02}q\x00", r":1: is not UTF-8 text \(byte 0x80\)"),
        (b"# " + b"x" * 5_000_000, ": is larger than 4 MB; not read as YAML"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_what_it_is(tmp_path, content, message):
    file = tmp_path / "some.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError, match=rf"some\.yaml{message}"):
        read_yaml_file(file)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    with pytest.raises(SpecError, match="nowhere: cannot be read: No such file"):
        read_yaml_file(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        read_yaml_file(tmp_path)


@pytest.mark.parametrize(
    "text", ["1e3", "010", "no", "1:30", "0x1", "0o7", "2024-01-01", "=", "", "a\nb: c"]
)
def test_text_that_is_written_is_read_back_by_any_reader(text):
    written = dump_yaml({text: [text]})
    assert parse_yaml(written, "text").data == {text: [text]}
    assert yaml.safe_load(written) == {text: [text]}
