"""A file that was written to, or put in another's place, has another stamp."""

import os
import shutil

import pytest

from searchmerge.checkpoints.stamps import stamp
from searchmerge.errors import CheckpointError


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"0123")
    return file


def test_a_file_that_is_only_read_keeps_its_stamp(file):
    before = stamp(file)
    file.read_bytes()
    assert stamp(file) == before
    assert before.size_bytes == 4


def test_a_link_has_the_stamp_of_the_file(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    assert stamp(link) == stamp(file)


def test_another_file_of_the_same_size_and_time_is_told_apart(file, tmp_path):
    before = stamp(file)
    other = tmp_path / "b.bin"
    other.write_bytes(b"4567")
    shutil.copystat(file, other)
    assert stamp(other).modified_ns == before.modified_ns
    other.replace(file)
    assert stamp(file) != before


def test_a_time_that_was_set_back_does_not_hide_a_change(file):
    before = stamp(file)
    file.write_bytes(b"4567")
    os.utime(file, ns=(before.modified_ns, before.modified_ns))
    assert stamp(file).modified_ns == before.modified_ns
    assert stamp(file) != before


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.bin: cannot be read: No such file"):
        stamp(tmp_path / "gone.bin")
