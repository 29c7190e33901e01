"""Files that are whole or absent, and that show damage."""

import pytest

from searchmerge.durable import read_checked, with_checksum, write_atomically


def test_a_file_is_replaced_in_one_step_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "some.json"
    for data in ("old", b"new"):
        write_atomically(file, data)
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "place").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "place", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_what_was_written_is_read_back(tmp_path):
    data = {"a": [1.5, None, "é"], "b": {"c": True}}
    write_atomically(tmp_path / "some.json", with_checksum(data))
    assert read_checked(tmp_path / "some.json") == data


def test_any_damage_to_a_checked_file_is_seen(tmp_path):
    file = tmp_path / "some.json"
    text = with_checksum({"scores": [0.25, 0.5], "name": "first"})
    for place, letter in enumerate(text):
        if letter.isalnum():
            file.write_text(f"{text[:place]}{'7' if letter != '7' else '8'}{text[place + 1 :]}")
            with pytest.raises(ValueError, match="it is"):
                read_checked(file)
    for length in range(len(text) - 2):
        file.write_text(text[:length])
        with pytest.raises(ValueError, match="it is"):
            read_checked(file)
    for other in (b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b"9" * 5000):
        file.write_bytes(other)
        with pytest.raises(ValueError, match="it is"):
            read_checked(file)
