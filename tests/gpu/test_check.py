"""The GPU's check runs in small on a CPU, and says what failed."""

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from searchmerge.errors import SearchMergeError
from tests.gpu.check import SECTIONS
from tests.gpu.merging import covered
from tests.gpu.report import Report, Step, Wrong, open_file

CHECK = Path(__file__).with_name("check.py")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("engines", [["eager"], pytest.param([], marks=pytest.mark.slow)], ids=str)
def test_all_of_it_runs_in_small_on_a_cpu(tmp_path, engines):
    file = tmp_path / "figures.jsonl"
    command = [sys.executable, str(CHECK), "--small", "--device", "cpu", "--out", str(file)]
    command += ["--budget", "900", *(["--engines", *engines] if engines else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    header, *figures, summary = lines(file)
    assert header["section"] == "header"
    assert header["torch"]
    assert tuple(dict.fromkeys(line["section"] for line in figures)) == SECTIONS
    assert summary["failed"] == summary["left out"] == []


def test_sections_can_be_chosen(tmp_path):
    file = tmp_path / "figures.jsonl"
    command = [sys.executable, str(CHECK), "--small", "--device", "cpu", "--out", str(file)]
    command += ["--engines", "eager", "--only", "TSV", "statistics"]
    subprocess.run(command, capture_output=True, cwd=tmp_path, check=True)
    sections = [line["section"] for line in lines(file)]
    assert list(dict.fromkeys(sections)) == ["header", "statistics", "TSV", "summary"]


@pytest.fixture
def report(tmp_path):
    file = open_file(tmp_path / "figures.jsonl")
    yield Report("cpu", 60.0, file)
    file.close()


def figures_of(*found):
    yield from found


def test_a_step_that_fails_is_noted_with_what_it_found_and_the_rest_goes_on(report, tmp_path):
    def fails():
        yield {"what": "first", "value": 1.0}
        raise Wrong("three of them differ")

    report.step(Step("golden", "eager", fails))
    report.step(Step("study", "all", lambda: figures_of({"what": "second"})))
    assert report.failures == ["golden: eager: three of them differ"]
    assert not report.summary()
    names = [line.get("what") for line in lines(tmp_path / "figures.jsonl")]
    assert names == ["first", None, "step", "second", "step", None]


def test_a_package_that_is_missing_is_told_in_one_line(report, tmp_path):
    def fails():
        yield from ()
        importlib.metadata.version("no-such-package")

    report.step(Step("study", "20 trials", fails))
    [told] = report.failures
    assert told.startswith("study: 20 trials: the package no-such-package is not installed")
    failed = [line["failed"] for line in lines(tmp_path / "figures.jsonl") if "failed" in line]
    assert "\n" not in failed[0]


def test_what_the_product_says_of_a_failure_is_told_without_a_traceback(report):
    def fails():
        yield from ()
        raise SearchMergeError("study.yaml: the package searchmerge is needed")

    report.step(Step("study", "20 trials", fails))
    assert report.failures == ["study: 20 trials: study.yaml: the package searchmerge is needed"]


def test_a_figure_beyond_its_target_is_missed_and_fails_nothing(report):
    ratios = [{"what": "ratio", "value": 1.5, "at most": 1.2}, {"what": "gain", "value": 1.0}]
    ratios.append({"what": "speed", "value": 0.9, "at least": 1.0})
    report.step(Step("merging", "ties", lambda: figures_of(*ratios)))
    assert report.missed == [
        "merging: ties: ratio is 1.5; wanted at most 1.2",
        "merging: ties: speed is 0.9; wanted at least 1.0",
    ]
    assert report.summary()


def test_a_step_that_takes_too_long_is_stopped(report):
    def waits():
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            yield from ()

    report.step(Step("TSV", "one layer", waits, limit_s=0.05))
    report.step(Step("golden", "all", waits, limit_s=0.05, is_open_ended=True))
    assert report.failures == ["TSV: one layer: stopped after 0 s"]
    assert report.skipped == ["golden: all (what is not told above: stopped after 0 s)"]


def test_what_there_is_no_time_for_is_named(report):
    report.budget_s = 1.0
    report.step(Step("study", "20 trials", figures_of))
    assert report.skipped == ["study: 20 trials (the time was up)"]
    assert report.summary()


def test_after_a_device_fault_the_rest_is_left_out(report):
    def fails():
        yield from ()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    report.step(Step("merging", "ties", fails))
    report.step(Step("study", "20 trials", figures_of))
    assert report.skipped == ["study: 20 trials (the device failed)"]
    assert "illegal memory access" in report.failures[0]


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0.0), ([(0, 2), (5, 6)], 3.0), ([(1, 4), (0, 2), (2, 3)], 4.0)],
    ids=["none", "apart", "one over another"],
)
def test_intervals_that_overlap_count_once(spans, length):
    assert covered(spans) == length
