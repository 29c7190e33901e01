"""Sources are compiled for this processor, or refused with the compiler's reason."""

import os
import subprocess
import sys

import pytest

from searchmerge.merging.native.compiler import load
from searchmerge.merging.native.operations import NoSourceError
from tests.merging.compiling import needs_compiler


@needs_compiler
def test_what_the_compiler_refuses_is_said():
    with pytest.raises(NoSourceError, match=r"is refused by g\+\+: (.|\n)*not_declared"):
        load("int run() { return not_declared; }")


@needs_compiler
def test_a_loop_that_is_not_vectorised_is_left_to_others():
    with pytest.raises(NoSourceError, match=r"is not vectorised by g\+\+"):
        load('extern "C" void run() {}', vectorised="entries.cpp")
    load('extern "C" void run() {}').run()


MERGED = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors
base = {"w": torch.zeros(1000)}
vectors = TaskVectors.from_weights(base, {"a": {"w": torch.arange(1000.0)}})
for engine in ("auto", "auto"):
    [(_, merged)] = Merger(vectors, engine=engine).merged(default_plan("ties", ["a"], density=1.0))
    print(merged.sum().item())
"""


def test_without_a_compiler_everything_runs_all_the_same_and_that_is_said_once():
    done = subprocess.run(
        [sys.executable, "-c", MERGED],
        env=os.environ | {"CXX": "/no/compiler -with options"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["499500.0", "499500.0"]
    told = "merging on a CPU takes several times as long, as C++ cannot be compiled: "
    assert done.stderr.count(told) == 1
    assert "/no/compiler" in done.stderr
    assert "warn" not in done.stderr.lower()


def test_a_compiler_that_fails_leaves_all_to_others(tmp_path):
    compiler = tmp_path / "fails"
    compiler.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", MERGED],
        env=os.environ | {"CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["499500.0", "499500.0"]
    assert done.stderr.count(f"as C++ is refused by {compiler}: out of order") == 1


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("g++ 'x", 'CXX is "g\\+\\+ \'x": No closing quotation'),
        ("/no/compiler", "No such file or directory: '/no/compiler'"),
    ],
)
def test_a_compiler_that_is_none_is_said(monkeypatch, named, message):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(NoSourceError, match=message):
        load("int run() { return 1; }")


def test_a_folder_that_cannot_be_written_to_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(NoSourceError, match=r"cannot be compiled: .*missing"):
        load("int run() { return 1; }")
